"""What a `steer` block does: it steers every forward pass of the model, and proves it.

1. A pre-hook on the decoder learns what the pass computes (`passes.py`): the beginning of a turn, or more of the one
   before (`turns.py`). It counts columns of the cache, so scopes hold under any KV cache and any way of decoding.
2. Gate hooks read the prompt's own tokens and fix, per row, whether anything is done this turn (`verdicts.py`). Gates
   that read turn by turn have decided before, in passes of their own (`windows.py`).
3. Site hooks return a new tensor x + delta. While decoding, masks are constants and the whole edit is a handful of
   small operations; what the receipts need is kept by reference and reduced every few passes (`tally.py`).
4. Rows that show the model the same prompt may share its pass below the lowest edit (`prompt_sharing.py`).
5. A post-hook on the decoder checks that every site's hook fired. What cannot be applied is an error.

Our hooks come before any others of a module: what else looks at the residual sees it steered. State belongs to the
context (thread or task) that entered the block, so two threads with two plans on one model do not mix. A thread that
runs the model inside somebody else's block is an error, not an unsteered answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.layout import HiddenFn
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.batch_state import BatchState
from clampdown.steering.generate_calls import GenerateCall, watch_generate
from clampdown.steering.hook_order import attach_in_order
from clampdown.steering.ownership import steers_here
from clampdown.steering.pass_weights import PassWeights
from clampdown.steering.passes import Pass
from clampdown.steering.plan import Plan
from clampdown.steering.program import Rows
from clampdown.steering.prompt_sharing import (
    RowMap,
    SharedPass,
    share_verdicts,
    shared_blocks,
    widen_arguments,
)
from clampdown.steering.receipts import Seat, TurnsRead, make_receipt
from clampdown.steering.tally import FLUSH_EVERY, Change, Tally, edit_sizes, over_sites
from clampdown.steering.turn_start import Asked, Fed, begin_turn
from clampdown.steering.turns import Next, Rules, what_next
from clampdown.steering.verdicts import Enough, read_prompts, run_ahead
from clampdown.types import Point, Receipt, Site


class Steering:
    """The state of one `steer` block. Users need `receipts()`; batch loops that drop rows need `keep_rows`."""

    def __init__(
        self,
        lm: LanguageModel,
        rows: Plan | Rows | None,
        saes: Mapping[str, FeatureSource],
        prompt_width: int | None,
        prompt_of: Int[Tensor, " rows"] | None = None,
        resumed: bool = False,
    ) -> None:
        plans = rows if isinstance(rows, Sequence) else [rows]
        self._lm = lm
        self._asked = Asked.of(rows, saes, prompt_width, prompt_of)
        self._rules = Rules(told=prompt_width is not None, alike=self._asked.alike, resumed=resumed)
        self._call: GenerateCall | None = None
        self._gates_read: set[str] = set()
        self._plans: Rows = ()
        self._state: BatchState | None = None
        self._tally: Tally | None = None
        self._fed = Fed(self._asked.needs_ids)
        self._ahead: dict[str, Tensor] | None = None
        self._weights = PassWeights()
        self._visited: set[str] = set()
        self._passes = 0
        self._gate_sites = _sites(g.site for p in plans if p is not None for g in p.gates if g.site)
        self._edit_sites = _sites(e.site for p in plans if p is not None for e in p.all_edits)
        self._shared = SharedPass(shared_blocks(self._edit_sites, lm.n_layers))
        self._key = id(lm.layout.decoder)

    # ---- what users call -------------------------------------------------------------------------------------

    def receipts(self) -> list[Receipt | None]:
        """One receipt per row of the last turn; None for rows without a plan."""
        if self._state is None or self._tally is None:
            return []
        self._settle()
        tally = self._tally
        columns = (*tally.totals(), tally.gate_score.T, tally.fired.T, tally.factor.T)
        values = list(zip(*(column.tolist() for column in columns), strict=True))
        # Rows that were computed as one did the same, except that a shut gate has a score of its own.
        done = [values[i] for i in self._shared.like] if self._shared.like else values
        return [
            None if plan is None else make_receipt(plan, row[0], row[1], own[2], own[3], self._turns_read(i), own[4])
            for i, (plan, row, own) in enumerate(zip(self._plans, done, values, strict=True))
        ]

    def sizes(self) -> tuple[Float[Tensor, "rows pos"], Float[Tensor, "rows pos"]] | None:
        """Per position of the pass just made: 1 if it was changed, and by what share of its length, the mean over the
        sites that did. For who keeps the pass's beginning; asked before `seats`. None when nothing was changed."""
        _, tally = self._require_state()
        found = [edit_sizes([change]) for change in tally.pending]
        if not found:
            return None
        return over_sites(
            torch.stack([touched for touched, _ in found]).sum(0), torch.stack([s for _, s in found]).sum(0)
        )

    def seats(self) -> list[Seat]:
        """What each row of the batch takes along when it goes on elsewhere (`decoding.py`), after the prompt's pass."""
        state, tally = self._require_state()
        self._settle()
        columns = (state.acts().squeeze(-1).T, *tally.totals(), tally.gate_score.T, tally.fired.T)
        found = zip(self._plans, *(column.tolist() for column in columns), strict=True)
        return [Seat(plan, tuple(acts), *rest, read=self._turns_read(i)) for i, (plan, acts, *rest) in enumerate(found)]

    def _turns_read(self, row: int) -> TurnsRead | None:
        read = self._require_state()[0].read_ahead.get((0, row))
        return read and TurnsRead(read.turns, read.turn, read.beyond)

    @property
    def row_map(self) -> RowMap:
        """How the rows asked for lie in the model's output. Known after the prefill of a block with `prompt_of`."""
        if self._shared.row_map is None:
            raise SteeringNotAppliedError("no prompt has been widened to rows in this block")
        return self._shared.row_map

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """The batch goes on with these of its current rows only."""
        state, tally = self._require_state()
        tally.flush(state.alive)
        state.keep_rows(rows)
        self._fed.forget()

    # ---- calls of generate -----------------------------------------------------------------------------------

    def began(self, call: GenerateCall) -> None:
        """A call of `generate`: its passes are one turn."""
        if not self._edit_sites:
            return
        if self._call is not None:
            raise SteeringNotAppliedError(
                "generate was called on the steered model inside another call of it",
                hint="a model cannot guess for itself while it is steered: use another assistant model",
            )
        call.refuse()
        self._call = call

    def ended(self, call: GenerateCall, output: Any) -> None:
        """What was computed beyond the end of a reply is no part of it."""
        if self._call is not call:
            return
        self._call = None
        state, tally = self._state, self._tally
        if output is None or state is None or tally is None or state.call is not call:
            return
        self._settle()
        self._check_no_pass_was_missed()
        lengths = call.reply_lengths(output, len(state.alive))
        if lengths is not None:
            tally.cut(state.prompt_width + lengths.to(self._lm.device))

    # ---- hooks -----------------------------------------------------------------------------------------------

    def attach(self) -> list[Any]:
        """Register every hook; the caller removes them."""
        decoder: nn.Module = self._lm.layout.decoder
        handles: list[Any] = [
            *watch_generate(self._lm.model, self._key),
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
        ]
        # Gates first: hooks of one module run in this order, and a gate must read what no edit has changed.
        # Between the two, prompts become rows: a row whose gate stayed shut need not be computed.
        hooks: list[tuple[Site, HiddenFn]] = [(s, partial(self._read_gates, s.name)) for s in self._gate_sites]
        if self._asked.prompt_of is not None:
            below, blocks = self._shared.below, self._lm.layout.blocks
            hooks.append((Site(below - 1, Point.RESID_POST) if below else Site(0, Point.RESID_PRE), self._widen))
            handles += [b.register_forward_pre_hook(self._widen_arguments, with_kwargs=True) for b in blocks[below:]]
        hooks += [(site, partial(self._edit, site.name)) for site in self._edit_sites]
        return handles + attach_in_order(self._lm, hooks)

    def _mine(self) -> bool:
        """Whether the running context steers with this object, and not just to read ahead. Another block's is skipped;
        none at all is an error."""
        return steers_here(self._key, self) and self._ahead is None

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # torch leaves `kwargs` out when another thread's block ends, and takes its hooks off, during this pass.
        if kwargs is None or not self._mine():
            return
        now = Pass.of(args, kwargs)
        match self._next(now):
            case Next.BEGIN:
                self._begin_turn(now)
            case Next.AGAIN:
                self._require_state()[1].restart()
                self._require_state()[0].unread = True
            case Next.GO_ON:
                self._go_on(now)
        state, tally = self._require_state()
        state.cache = now.cache
        if len(tally.pending) >= FLUSH_EVERY:
            tally.flush(state.alive)
        expected = state.n_prompts if state.narrow else len(state.alive)
        if now.n_rows != expected:
            raise PlanError(f"the batch has {now.n_rows} rows now, {expected} are being steered")
        state.start, state.seen = now.past, now.end
        self._weights.open(state, now)
        self._fed.add(now)
        self._read_ahead(now)
        self._visited.clear()
        self._passes += 1

    def _next(self, now: Pass) -> Next:
        if self._edit_sites:
            return what_next(self._state, now, self._call, self._rules)
        return Next.BEGIN if self._state is None or now.past == 0 else Next.GO_ON

    def _go_on(self, now: Pass) -> None:
        state, tally = self._require_state()
        state.unread = False
        if now.past < state.seen:
            tally.flush(state.alive)
            tally.cut(now.past)
            self._fed.cut(now.past)
        elif now.width > 1 and now.past == state.prompt_width and self._call is None and not self._rules.told:
            state.prompt_width = now.end  # a plan that treats both alike: the prompt's next piece

    def _begin_turn(self, now: Pass) -> None:
        self._check_no_pass_was_missed()
        self._fed.cut(now.past)
        self._gates_read = set()
        self._state, self._tally, self._plans = begin_turn(
            self._lm, self._asked, now, self._call, self._fed, self._state
        )
        self._shared.begin(self._state)

    def _read_ahead(self, now: Pass) -> None:
        """Gates need the whole prompt. If this pass, the turn's first, does not hold it, they read it beforehand."""
        state, _ = self._require_state()
        whole = now.past == 0 and now.end >= state.prompt_width
        if not state.awaits_verdict:
            return
        state.awaits_verdict, state.unread = False, whole
        if whole or not any(bool(gate.gated.any()) for gate in state.gates):
            return
        ids = state.prompt_ids
        assert ids is not None, "a turn with gates begins with its prompt's tokens"
        real = state.real[:, : state.prompt_width]
        self._ahead = {}
        try:
            run_ahead(self._lm, ids, real, self._fed.positions(now, self._call, real), now.width)
            seen = self._ahead
        finally:
            self._ahead = None
        for site, x in seen.items():
            self._read_prompts(site, x)

    def _read_gates(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> None:
        """At a whole prompt: score each row's and fix whether it is steered this turn."""
        if self._ahead is not None and steers_here(self._key, self):
            self._ahead[site] = torch.cat([self._ahead[site], x], dim=1) if site in self._ahead else x
            if site == self._gate_sites[-1].name:
                raise Enough
            return
        if not self._mine():
            return
        state, _ = self._require_state()
        if state.gates and state.unread:
            self._read_prompts(site, x)

    def _read_prompts(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> None:
        state, tally = self._require_state()
        self._gates_read.add(site)
        read_prompts(self._lm, state, tally, site, x)
        if self._shared.like and not state.narrow:
            share_verdicts(self._plans, self._shared.like, site, state, tally)
        self._weights.weigh(state)

    def _widen(self, x: Float[Tensor, "prompts pos d_model"]) -> Tensor | None:
        """Where the lowest edit acts: from one row per prompt to one per row that can differ."""
        if not self._mine() or not self._require_state()[0].narrow:
            return None
        state, _ = self._require_state()
        index = self._shared.choose(self._plans, state, self._gates_read)
        self.keep_rows(index)
        self._weights.widen(state, index)
        self._shared.widened(state, index)
        return x[state.prompt_of]

    def _widen_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Blocks above: masks and position embeddings of the prefill, which the decoder made for prompts."""
        if kwargs is None or not self._mine() or not self._shared.running:
            return None
        state, _ = self._require_state()
        rest = widen_arguments(args[1:], state.n_prompts, state.prompt_of)
        named = {
            key: value if key == "hidden_states" else widen_arguments(value, state.n_prompts, state.prompt_of)
            for key, value in kwargs.items()
        }
        return (*args[:1], *rest), named

    def _edit(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> Tensor | None:
        if not self._mine():
            return None
        self._visited.add(site)
        state, tally = self._require_state()
        step = state.steps.get(site)
        changed = step(x) if step is not None and x.dtype is torch.float32 else self._edit_general(site, x)
        if changed is not None:
            tally.pending.append(Change(state.start, changed, x, self._weights.real))
        return changed

    def _edit_general(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> Tensor | None:
        state, _ = self._require_state()
        program = next((p for p in state.programs if p.site.name == site), None)
        return None if program is None else x + program.delta(x, self._weights.by_reach)

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self._state
        done = len(self._visited) == len(self._edit_sites)
        if (done and not self._shared.running and (state is None or state.cache is not None)) or not self._mine():
            return
        if not done:
            missed = ", ".join(site.name for site in self._edit_sites if site.name not in self._visited)
            raise SteeringNotAppliedError(f"the model ran, but nothing happened at {missed}")
        self._shared.end(self._require_state()[0])
        if state is not None and state.cache is None:
            state.cache = getattr(output, "past_key_values", None)  # the decoder made it

    # ---- proof -----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Count what is kept, without what the cache has given back since."""
        state, tally = self._require_state()
        tally.flush(state.alive)
        held = int(state.cache.get_seq_length()) if state.cache is not None else 0
        if 0 < held < state.seen:
            tally.cut(held)

    def _check_no_pass_was_missed(self) -> None:
        """The cache counts tokens too: what it holds and no hook saw was computed without steering."""
        state = self._state
        if state is None or state.cache is None or not self._edit_sites:
            return
        cached = int(state.cache.get_seq_length())
        if cached > state.seen:
            raise SteeringNotAppliedError(
                f"{cached - state.seen} tokens were computed without steering: a compiled graph does not call hooks "
                "that are newer than it",
                hint="call generate(..., disable_compile=True), or prepare(lm, ...) before anything is compiled",
            )

    def _require_state(self) -> tuple[BatchState, Tally]:
        if self._state is None or self._tally is None:
            raise SteeringNotAppliedError("a block of the model ran outside a forward pass of its decoder")
        return self._state, self._tally

    def check_it_happened(self, *, require_reach: bool) -> None:
        """After the block: a plan that never had the chance to act is an error.

        Raises `SteeringNotAppliedError` or `ScopeError`.
        """
        if not self._edit_sites:
            return
        if self._passes == 0:
            raise SteeringNotAppliedError(
                "no forward pass of this model ran inside steer(...)",
                hint="a model that was compiled before steering ignores new hooks",
            )
        self._check_no_pass_was_missed()
        state, _ = self._require_state()
        scopes = {reach.scope for program in state.programs for reach in program.reaches}
        unreached = scopes - self._weights.reached
        if require_reach and unreached:
            raise ScopeError(
                f"scope {', '.join(sorted(unreached))} never covered a token of this run",
                hint="a 'generated' scope cannot act on log-likelihoods; use 'all', 'prompt' or 'assistant'",
            )


def _sites(names: Iterable[str]) -> tuple[Site, ...]:
    return tuple(sorted({Site.parse(name) for name in names}))
