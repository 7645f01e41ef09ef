"""`with steer(lm, plan):` steers every forward pass of the model inside the block, and proves it.

1. A pre-hook on the decoder learns what the pass computes: a new prompt, or a continuation of the one before. It
   counts columns, so scopes hold under any KV cache.
2. Gate hooks read the prompt's own tokens at prefill and fix, per row, whether anything is done this turn. Gates that
   read turn by turn have decided before, in passes of their own (`windows.py`).
3. Site hooks return a new tensor x + delta. While decoding, masks are constants and the whole edit is a handful of
   small operations; what the receipts need is kept by reference and reduced every `FLUSH_EVERY` passes.
4. Rows that show the model the same prompt may share its pass below the lowest edit (`prompt_of`, `widening.py`).
5. A post-hook on the decoder checks that every site's hook fired. What cannot be applied is an error.

State belongs to the context (thread or task) that entered the block, so two threads with two plans on one model do
not mix. A thread that runs the model inside somebody else's block is an error, not an unsteered answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.chat import content_texts
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource
from clampdown.steering.compiled import refuse_compiled
from clampdown.steering.fused import decoding_step
from clampdown.steering.gate_kinds import external_score
from clampdown.steering.ownership import owning, steers_here
from clampdown.steering.plan import Plan
from clampdown.steering.program import Reach, Rows, check_plan, gate_programs, site_programs
from clampdown.steering.receipts import Seat, TurnsRead, make_receipt
from clampdown.steering.scopes import LOCAL, SCOPES, Window, last_run
from clampdown.steering.turn import Tally, Turn, columns_real, edit_sizes, real_columns
from clampdown.steering.turn_reading import GateReading, read_ahead
from clampdown.steering.widening import (
    Spread,
    as_index,
    checked_index,
    first_alike,
    shared_blocks,
    widen_arguments,
    widen_cache,
)
from clampdown.types import BRANCHES, Point, Receipt, Site

FLUSH_EVERY = 32


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
        self._lm = lm
        self._resumed = resumed
        self._asked = rows
        self._saes = saes
        self._prompt_width = prompt_width
        self._prompt_of = prompt_of
        self._spread: Spread | None = None
        self._like: list[int] = []
        self._gates_read: set[str] = set()
        self._ahead: dict[tuple[int, int], GateReading] = {}
        self._prefill = False
        self._plans: Rows = ()
        self._turn: Turn | None = None
        self._tally: Tally | None = None
        self._masks: dict[str, Tensor] = {}
        self._weights: dict[Reach, Tensor] = {}
        self._visited: set[str] = set()
        self._reached: set[str] = set()
        self._passes = 0
        plans = rows if isinstance(rows, Sequence) else [rows]
        self._gate_sites = _sites(g.site for p in plans if p is not None for g in p.gates if g.site)
        self._edit_sites = _sites(e.site for p in plans if p is not None for e in p.all_edits)
        self._shared_blocks = shared_blocks(self._edit_sites, lm.n_layers)
        self._key = id(lm.layout.decoder)

    # ---- what users call -------------------------------------------------------------------------------------

    def receipts(self) -> list[Receipt | None]:
        """One receipt per row of the last batch; None for rows without a plan."""
        if self._turn is None or self._tally is None:
            return []
        self._tally.flush(self._turn.alive)
        tally = self._tally
        columns = (tally.touched, tally.norm, tally.gate_score.T, tally.fired.T)
        values = list(zip(*(column.tolist() for column in columns), strict=True))
        # Rows that were computed as one did the same, except that a shut gate has a score of its own.
        done = [values[i] for i in self._like] if self._like else values
        return [
            None if plan is None else make_receipt(plan, row[0], row[1], own[2], own[3], self._turns_read(i))
            for i, (plan, row, own) in enumerate(zip(self._plans, done, values, strict=True))
        ]

    def sizes(self) -> tuple[Float[Tensor, "rows pos"], Float[Tensor, "rows pos"]] | None:
        """Per position of the pass just made, summed over sites: how often it was changed, and by what share of its
        length. For who keeps the pass's beginning; asked before `seats`. None when nothing was changed."""
        _, tally = self._require_turn()
        found = [edit_sizes(changed, x) for changed, x in tally.pending]
        if not found:
            return None
        return torch.stack([touched for touched, _ in found]).sum(0), torch.stack([size for _, size in found]).sum(0)

    def seats(self) -> list[Seat]:
        """What each row of the batch takes along when it goes on elsewhere (`decoding.py`), after the prompt's pass."""
        turn, tally = self._require_turn()
        tally.flush(turn.alive)
        columns = (turn.fired.T, tally.touched, tally.norm, tally.gate_score.T, tally.fired.T)
        found = zip(self._plans, *(column.tolist() for column in columns), strict=True)
        return [Seat(plan, tuple(acts), *rest, read=self._turns_read(i)) for i, (plan, acts, *rest) in enumerate(found)]

    def _turns_read(self, row: int) -> TurnsRead | None:
        read = self._ahead.get((0, row))
        return read and TurnsRead(read.turns, read.turn, read.beyond)

    @property
    def spread(self) -> Spread:
        """How the rows asked for lie in the model's output. Known after the prefill of a block with `prompt_of`."""
        if self._spread is None:
            raise SteeringNotAppliedError("no prompt has been widened to rows in this block")
        return self._spread

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """The batch goes on with these of its current rows only."""
        turn, tally = self._require_turn()
        tally.flush(turn.alive)
        turn.alive, turn.opened, turn.real = turn.alive[rows], turn.opened[:, rows], turn.real[rows]
        turn.prompt_of = turn.prompt_of[rows]
        turn.programs = tuple(program.at(rows) for program in turn.programs)
        turn.constant, turn.steps = None, {}
        if turn.last_user is not None:
            turn.last_user = turn.last_user[rows]

    # ---- hooks -----------------------------------------------------------------------------------------------

    def attach(self) -> list[Any]:
        """Register every hook; the caller removes them."""
        decoder: nn.Module = self._lm.layout.decoder
        handles: list[Any] = [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
        ]
        # Gates first: hooks of one module run in this order, and a gate must read what no edit has changed.
        # Between the two, prompts become rows: a row whose gate stayed shut need not be computed.
        for site in self._gate_sites:
            handles.append(self._lm.layout.hook_point(site).register(partial(self._read_gates, site.name)))
        if self._prompt_of is not None:
            handles += self._attach_widening()
        for site in self._edit_sites:
            handles.append(self._lm.layout.hook_point(site).register(partial(self._edit, site.name)))
        return handles

    def _attach_widening(self) -> list[Any]:
        below, blocks = self._shared_blocks, self._lm.layout.blocks
        where = Site(below - 1, Point.RESID_POST) if below else Site(0, Point.RESID_PRE)
        widen = self._lm.layout.hook_point(where).register(self._widen)
        above = [block.register_forward_pre_hook(self._widen_arguments, with_kwargs=True) for block in blocks[below:]]
        return [widen, *above]

    def _mine(self) -> bool:
        """Whether the running context steers with this object. Another block's is skipped; none at all is an error."""
        return steers_here(self._key, self)

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # torch leaves `kwargs` out when another thread's block ends, and takes its hooks off, during this pass.
        if kwargs is None or not self._mine():
            return
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        inputs: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        n_rows, width = inputs.shape[:2]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if past == 0 and self._extends_last(ids, width):
            self._require_turn()[1].restart()
        elif past == 0 or (self._resumed and self._turn is None):
            self._check_no_pass_was_missed()
            self._begin_turn(n_rows, past + width, ids, mask)
            self._prefill = self._prompt_of is not None
        self._require_turn()[0].cache = cache
        self._open_window(past, n_rows, width, mask, ids)
        self._visited.clear()
        self._passes += 1

    def _extends_last(self, ids: Tensor | None, width: int) -> bool:
        """Without a KV cache every pass starts at column 0: one token more on the same batch is a continuation."""
        turn = self._turn
        if turn is None or ids is None or turn.prompt_ids is None or width != turn.seen + 1:
            return False
        before = turn.prompt_ids[turn.prompt_of]
        return ids.shape[0] == before.shape[0] and bool(torch.equal(ids[:, : before.shape[1]], before))

    def _begin_turn(self, n_prompts: int, width: int, ids: Tensor | None, mask: Tensor | None) -> None:
        shared = self._prompt_of is not None
        prompt_of = torch.arange(n_prompts) if self._prompt_of is None else checked_index(self._prompt_of, n_prompts)
        n_rows = len(prompt_of)
        plans = self._asked if isinstance(self._asked, Sequence) else [self._asked] * n_rows
        if len(plans) != n_rows:
            raise PlanError(f"{len(plans)} plans for a batch of {n_rows} rows", hint="give one plan, or one per row")
        self._plans = plans
        device = self._lm.device
        prompt_width = width if self._prompt_width is None else self._prompt_width
        if prompt_width > width:
            raise SteeringNotAppliedError(f"the prompt has {prompt_width} columns, the first pass only {width}")
        prompt_of = prompt_of.to(device)
        self._tally = Tally.empty(n_rows, device)
        self._like, self._gates_read, self._ahead = [], set(), {}
        self._turn = Turn(
            programs=site_programs(plans, self._lm, self._saes),
            gates=gate_programs(plans, self._lm, self._saes),
            alive=torch.arange(n_rows, device=device),
            opened=_ungated(plans, device),
            prompt_of=prompt_of,
            n_prompts=n_prompts,
            prompt_width=prompt_width,
            prompt_ids=ids,
            real=real_columns(ids, mask, n_prompts, width, device, self._lm.pad_id)[prompt_of],
            narrow=shared,
        )
        self._resolve_scopes(self._turn)

    def _resolve_scopes(self, turn: Turn) -> None:
        """Find the offsets that this batch's scopes and gates need, from the token ids."""
        scopes = {reach.scope for program in turn.programs for reach in program.reaches}
        gated = any(plan is not None and plan.gate for plan in self._plans)
        needs_ids = bool(scopes & {"assistant", "last_user"}) or gated
        if not needs_ids:
            return
        if turn.prompt_ids is None:
            raise ScopeError("this plan needs the prompt's token ids, but the model was called with inputs_embeds")
        prompt = turn.prompt_ids[:, : turn.prompt_width]
        if "assistant" in scopes:
            turn.assistant_start = self._lm.chat.assistant_start(prompt)
        if "last_user" in scopes:
            turn.last_user = last_run(self._content(turn))[turn.prompt_of]
        if any(gate.scorer for plan in self._plans if plan is not None for gate in plan.gates):
            self._score_texts(turn)
        if any(gate.window for plan in self._plans if plan is not None for gate in plan.gates):
            self._read_ahead(turn)

    def _read_ahead(self, turn: Turn) -> None:
        """Gates that read turn by turn decide before the prompt's pass, except on prompts that are one turn."""
        assert turn.prompt_ids is not None
        _, tally = self._require_turn()
        real, content = self._real_prompts(turn), self._content(turn)
        prompts = [
            (ids[kept].tolist(), inside[kept].tolist())
            for ids, inside, kept in zip(turn.prompt_ids[:, : turn.prompt_width], content, real, strict=True)
        ]
        self._ahead = read_ahead(self._lm, self._plans, self._saes, prompts, turn.prompt_of.tolist())
        decided = torch.zeros_like(turn.opened)
        for (branch, row), read in self._ahead.items():
            decided[branch, row] = True
            turn.opened[branch, row] = read.opens
            tally.gate_score[branch, row] = read.score
        turn.gates = tuple(replace(gate, gated=gate.gated & ~decided[gate.branch]) for gate in turn.gates)
        tally.fired[:, turn.alive] = turn.fired

    def _real_prompts(self, turn: Turn) -> Bool[Tensor, "prompts prompt"]:
        real = torch.zeros(turn.n_prompts, turn.prompt_width, dtype=torch.bool, device=turn.real.device)
        real[turn.prompt_of] = turn.real[:, : turn.prompt_width]
        return real

    def _score_texts(self, turn: Turn) -> None:
        """External gates decide before the model runs, from the text of each row's prompt."""
        assert turn.prompt_ids is not None
        texts = content_texts(self._lm, turn.prompt_ids[:, : turn.prompt_width], self._content(turn))
        found: dict[tuple[str, str], float] = {}
        for row, plan in enumerate(self._plans):
            for branch, gate in enumerate(plan.gates if plan is not None else ()):
                if gate.scorer and not gate.window:
                    key = (gate.scorer, texts[int(turn.prompt_of[row])])
                    score = found[key] = found[key] if key in found else external_score(*key)
                    one = torch.arange(len(turn.alive), device=turn.alive.device) == row
                    self._decide(
                        branch, one, torch.full_like(turn.opened[0], score, dtype=torch.float32), gate.threshold
                    )

    def _content(self, turn: Turn) -> Bool[Tensor, "prompts prompt"]:
        assert turn.prompt_ids is not None
        return self._lm.chat.content_mask(turn.prompt_ids[:, : turn.prompt_width], self._real_prompts(turn).long())

    def _open_window(self, past: int, n_rows: int, width: int, mask: Tensor | None, ids: Tensor | None) -> None:
        """Set the per-scope weights of the columns that this pass computes."""
        turn, _ = self._require_turn()
        expected = turn.n_prompts if turn.narrow else len(turn.alive)
        if n_rows != expected:
            raise PlanError(f"the batch has {n_rows} rows now, {expected} are being steered")
        if turn.narrow and mask is not None:
            mask = mask[turn.prompt_of]
        start = past if past else 0
        decoding = width == 1 and start >= turn.prompt_width
        turn.start, turn.seen = start, start + width
        if decoding and turn.constant is not None:
            self._weights = turn.constant
            return
        real = columns_real(turn, start, width, mask)
        columns = torch.arange(start, start + width, device=real.device)
        window = Window(columns, real, turn.prompt_width, turn.assistant_start, turn.last_user)
        scopes = {reach.scope for program in turn.programs for reach in program.reaches}
        self._masks = {scope: SCOPES[scope](window) for scope in scopes}
        self._reached |= {scope for scope, m in self._masks.items() if bool(m.any())}
        self._weigh()
        turn.constant, turn.steps = None, {}
        if decoding:  # from here on every pass does the same, until rows leave
            turn.constant = self._weights
            turn.steps = {program.site.name: decoding_step(program, self._weights) for program in turn.programs}

    def _weigh(self) -> None:
        """Each scope's positions, for the rows whose branch fired."""
        turn, _ = self._require_turn()
        acts = turn.acts()
        reaches = {reach for program in turn.programs for reach in program.reaches}
        self._weights = {reach: self._masks[reach.scope] * acts[reach.branch] for reach in reaches}

    def _read_gates(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> None:
        """At prefill: score each row's prompt and fix whether it is steered this turn."""
        if not self._mine():
            return
        turn, tally = self._require_turn()
        if not turn.gates or turn.seen != x.shape[1] or turn.constant is not None:
            return
        self._gates_read.add(site)
        content = self._content(turn)
        # Below the widening x is one prompt per row and each row looks its own up; above it, x holds the rows.
        row_of = turn.prompt_of if turn.narrow else None
        for gate in turn.gates:
            if gate.site.name == site:
                own = content if turn.narrow else content[turn.prompt_of]
                scores = gate.scores(x[:, : turn.prompt_width], own, row_of)
                self._decide(gate.branch, gate.gated, scores, gate.threshold)
        if self._like and not turn.narrow:
            self._share_verdicts(site, tally)
        self._weigh()

    def _decide(
        self,
        branch: int,
        gated: Bool[Tensor, " rows"],
        scores: Float[Tensor, " rows"],
        threshold: Float[Tensor, " rows"] | float,
    ) -> None:
        """Open or shut a branch's gate on the rows that have one."""
        turn, tally = self._require_turn()
        turn.opened[branch] = torch.where(gated, scores > threshold, turn.opened[branch])
        tally.gate_score[branch, turn.alive[gated]] = scores[gated]
        tally.fired[:, turn.alive] = turn.fired

    def _share_verdicts(self, site: str, tally: Tally) -> None:
        """A gate above the widening read one row for all that are computed as that one: they have its verdict."""
        for row, (plan, first) in enumerate(zip(self._plans, self._like, strict=True)):
            same = row != first and (0, row) not in self._ahead
            if same and plan is not None and any(gate.site == site for gate in plan.gates):
                tally.gate_score[:, row], tally.fired[:, row] = tally.gate_score[:, first], tally.fired[:, first]

    def _widen(self, x: Float[Tensor, "prompts pos d_model"]) -> Tensor | None:
        """Where the lowest edit acts: from one row per prompt to one per row that can differ."""
        if not self._mine():
            return None
        turn, _ = self._require_turn()
        if not turn.narrow:
            return None
        self._like = self._alike(turn)
        kept = sorted(set(self._like))
        output_of = {row: i for i, row in enumerate(kept)}
        index = as_index(kept, x.device)
        self.keep_rows(index)
        self._masks = {scope: mask[index] for scope, mask in self._masks.items()}
        self._weigh()
        turn.gates = tuple(gate.at(index) for gate in turn.gates)
        turn.narrow = False
        self._spread = Spread(turn.prompt_of, as_index([output_of[i] for i in self._like], x.device))
        return x[turn.prompt_of]

    def _alike(self, turn: Turn) -> list[int]:
        """For each row the first row that cannot differ from it: one prompt, and one plan or none that acts.

        A plan whose gate is yet to be read stays with its own kind.
        """
        acting = {
            id(plan): None if plan is None or (plan.is_identity and self._verdict_known(plan)) else plan.digest
            for plan in self._plans
        }
        shut = (~turn.fired.any(0)).tolist()
        rows = zip(turn.prompt_of.tolist(), self._plans, shut, strict=True)
        return first_alike([(prompt, None if same else acting[id(plan)]) for prompt, plan, same in rows])

    def _verdict_known(self, plan: Plan) -> bool:
        return all(not gate.site or gate.site in self._gates_read for gate in plan.gates)

    def _widen_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """Blocks above: masks and position embeddings of the prefill, which the decoder made for prompts."""
        if kwargs is None or not self._mine() or not self._prefill:
            return None
        turn, _ = self._require_turn()
        rest = widen_arguments(args[1:], turn.n_prompts, turn.prompt_of)
        named = {
            key: value if key == "hidden_states" else widen_arguments(value, turn.n_prompts, turn.prompt_of)
            for key, value in kwargs.items()
        }
        return (*args[:1], *rest), named

    def _edit(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> Tensor | None:
        if not self._mine():
            return None
        self._visited.add(site)
        turn, tally = self._require_turn()
        step = turn.steps.get(site)
        changed = step(x) if step is not None and x.dtype is torch.float32 else self._edit_general(site, x)
        if changed is not None:
            tally.pending.append((changed, x))
            if len(tally.pending) >= FLUSH_EVERY:
                tally.flush(turn.alive)
        return changed

    def _edit_general(self, site: str, x: Float[Tensor, "rows pos d_model"]) -> Tensor | None:
        turn, _ = self._require_turn()
        program = next((p for p in turn.programs if p.site.name == site), None)
        return None if program is None else x + program.delta(x, self._weights)

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        done = len(self._visited) == len(self._edit_sites)
        if (done and not self._prefill) or not self._mine():
            return
        if not done:
            missed = ", ".join(site.name for site in self._edit_sites if site.name not in self._visited)
            raise SteeringNotAppliedError(f"the model ran, but nothing happened at {missed}")
        self._end_prefill()

    def _end_prefill(self) -> None:
        """What blocks below the widening cached is per prompt: from now on it is per row."""
        turn, _ = self._require_turn()
        if not self._prefill:
            return
        self._prefill = False
        if turn.cache is not None:
            widen_cache(turn.cache, self._shared_blocks, turn.prompt_of)

    def _check_no_pass_was_missed(self) -> None:
        """The cache counts tokens too: what it holds and no hook saw was computed without steering."""
        turn = self._turn
        if turn is None or turn.cache is None or not self._edit_sites:
            return
        cached = int(turn.cache.get_seq_length())
        turn.cache = None
        if cached > turn.seen:
            raise SteeringNotAppliedError(
                f"{cached - turn.seen} tokens were computed without steering: a compiled graph does not call hooks "
                "that are newer than it",
                hint="call generate(..., disable_compile=True), or prepare(lm, ...) before anything is compiled",
            )

    def _require_turn(self) -> tuple[Turn, Tally]:
        if self._turn is None or self._tally is None:
            raise SteeringNotAppliedError("a block of the model ran outside a forward pass of its decoder")
        return self._turn, self._tally

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
        turn, _ = self._require_turn()
        scopes = {reach.scope for program in turn.programs for reach in program.reaches}
        unreached = scopes - self._reached
        if require_reach and unreached:
            raise ScopeError(
                f"scope {', '.join(sorted(unreached))} never covered a token of this run",
                hint="a 'generated' scope cannot act on log-likelihoods; use 'all', 'prompt' or 'assistant'",
            )


def can_resume(plan: Plan | None) -> bool:
    """Whether what a plan does to a prompt's beginning holds however the prompt goes on."""
    return plan is None or (plan.gate is None and all(edit.scope in LOCAL for edit in plan.edits))


def _sites(names: Iterable[str]) -> tuple[Site, ...]:
    return tuple(sorted({Site.parse(name) for name in names}))


def _ungated(plans: Rows, device: torch.device) -> Bool[Tensor, "branches rows"]:
    """Branch 0 acts until a gate says otherwise; what comes otherwise waits for its gate to open."""
    opened = torch.zeros(len(BRANCHES), len(plans), dtype=torch.bool, device=device)
    opened[0] = True
    return opened


def resolve_saes(
    plans: Sequence[Plan | None], saes: FeatureSource | Sequence[FeatureSource] | None, device: torch.device
) -> dict[str, FeatureSource]:
    """SAEs by site: the ones given, else opened by the name that the plan states, of which only features are read."""
    given = [saes] if isinstance(saes, FeatureSource) else list(saes or ())
    found = {sae.cfg.site.name: sae for sae in given}
    for plan in plans:
        for ref in plan.saes if plan is not None else ():
            if ref.site not in found:
                found[ref.site] = open_sae(ref.name, device=str(device), site=Site.parse(ref.site))
    return found


@contextmanager
def steer(
    lm: LanguageModel,
    plans: Plan | Sequence[Plan | None] | None,
    saes: FeatureSource | Sequence[FeatureSource] | None = None,
    *,
    prompt_width: int | None = None,
    prompt_of: Int[Tensor, " rows"] | None = None,
    require_reach: bool = True,
    resumed: bool = False,
) -> Iterator[Steering]:
    """Steer every forward pass of `lm` inside the block: HF `generate`, a plain call, or clampdown's own loops.

    `plans` is one plan for all rows, or one (or None) per row of the batch; None steers nothing.
    `saes` defaults to the SAEs that the plans name, of which only the features they use are read.
    `prompt_width` is the number of prompt columns when the first pass holds more than the prompt (teacher forcing); by
    default the first pass is the prompt.
    With `prompt_of` the model is called with distinct prompts and row r of `plans` steers prompt `prompt_of[r]`: what
    no edit can reach is computed once per prompt, and `Steering.spread` says which output row answers which row.
    `require_reach=False` accepts that a scope covered no token (a reply that ended at once).
    With `resumed` the first pass goes on from a cache that holds the prompts' beginnings, computed with the same plans;
    only plans without a gate and with scopes that are `LOCAL` can.

    Raises `PlanMismatchError` and its kin before anything runs, `SteeringNotAppliedError` or `ScopeError` when the
    plan could not act. No hook outlives the block.
    """
    distinct = list({id(p): p for p in (plans if isinstance(plans, Sequence) else [plans])}.values())
    by_site = resolve_saes(distinct, saes, lm.device)
    for plan in distinct:
        if plan is not None:
            check_plan(plan, lm, by_site)
    if any(plan is not None for plan in distinct):
        refuse_compiled(lm)
    if resumed and not all(map(can_resume, distinct)):
        raise ScopeError("a plan with a gate, or a scope that depends on the whole prompt, cannot go on from a cache")
    steering = Steering(lm, plans, by_site, prompt_width, prompt_of, resumed)
    with owning(id(lm.layout.decoder), steering, steering.attach):
        yield steering
        steering.check_it_happened(require_reach=require_reach)
