"""Hooks that stay on the model, for `torch.compile`, static caches, CUDA graphs and packed batches.

`steer` registers its hooks on entry, and a graph that was traced before does not know them. `prepare` registers them
once, before anything is compiled; what they do stands in buffers (`slots.py`) that a `steer` block of the prepared
model changes in place. No plan is the exact identity. Changing the plan traces nothing again.

1. Before the block, on the host: each row's prompt gives the intervals of positions that its scopes mean.
2. In the graph: a pre-hook on the decoder finds each token's row and position, gates read the prompt and fix per row
   whether anything is done, sites add their delta and count what they did.
3. After the block, on the host: the counters show that every pass went through every hook, and that the passes were
   those of the prompts given: their tokens, in order, and then a reply token by token. Else it is an error.

One prepared model is one engine: requests share it as rows of a batch, not as threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clampdown.activations.sinks import sinks_at
from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.chat import Batch, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource, check_fits
from clampdown.steering.compiled import refuse_compiled
from clampdown.steering.hook_order import attach_in_order
from clampdown.steering.plan import Plan
from clampdown.steering.prepared_passes import FAULTS, Capacity, Passes
from clampdown.steering.program import check_plan
from clampdown.steering.receipts import make_receipt
from clampdown.steering.seating import PromptSpan, Seating, prompt_spans
from clampdown.steering.slots import GateSlots, SiteSlots
from clampdown.types import Receipt, Site

_OWNED: ContextVar[frozenset[int]] = ContextVar("clampdown_prepared", default=frozenset())

Prompts = Batch | Sequence[Sequence[int]]


class Prepared:
    """A model with permanent hooks. Made by `prepare`; `steer` says what they do, `detach` takes them off."""

    def __init__(
        self, lm: LanguageModel, saes: Sequence[FeatureSource], sites: Sequence[Site], capacity: Capacity
    ) -> None:
        self.lm = lm
        self.capacity = capacity
        self.saes = {sae.cfg.site.name: sae for sae in saes}
        self.names = tuple(site.name for site in sorted({*sites, *(sae.cfg.site for sae in saes)}))
        device = str(lm.device)
        endings = sorted({*lm.eos_ids, lm.pad_id})
        self.passes = Passes(capacity, len(self.names), endings, device)
        self.sites = {
            name: SiteSlots(
                self.saes.get(name),
                d_model=lm.d_model,
                rows=capacity.rows,
                features=capacity.features,
                directions=capacity.directions,
                device=device,
            )
            for name in self.names
        }
        self.gates = {
            name: GateSlots(sae, rows=capacity.rows, features=capacity.gate_features, device=device)
            for name, sae in self.saes.items()
            if capacity.gate_features
        }
        sinks = sinks_at(lm, [Site.parse(name) for name in {*self.sites, *self.gates}])
        self.seating = Seating(lm, self.sites, self.gates, self.passes.prompt, {s.name: sinks[s] for s in sinks})
        self._busy = threading.Lock()
        self._n_rows: int | None = None
        self._handles = self._attach()

    def _attach(self) -> list[Any]:
        handles: list[Any] = [self.lm.layout.decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True)]
        # Gates first: hooks of one module run in this order, and a gate must read what no edit has changed.
        hooks: list[Any] = [(Site.parse(name), partial(self._read_gate, gate)) for name, gate in self.gates.items()]
        for index, name in enumerate(self.names):
            hooks.append((Site.parse(name), partial(self._edit, self.sites[name], index)))
        return handles + attach_in_order(self.lm, hooks)

    def detach(self) -> None:
        """Take the hooks off. Graphs that were compiled with them must be compiled again."""
        for handle in self._handles:
            handle.remove()

    # ---- in the graph ----------------------------------------------------------------------------------------

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        inputs: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        if not torch.compiler.is_compiling():
            self._check_call(inputs, kwargs.get("position_ids"))
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        self.passes.open(inputs, past, kwargs.get("position_ids"), ids)

    def _read_gate(self, gate: GateSlots, x: Float[Tensor, "*tokens d_model"]) -> None:
        self.passes.decide(gate, x.reshape(-1, 1, x.shape[-1]).float(), self.passes.tokens(x.shape))

    def _edit(self, slots: SiteSlots, index: int, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "..."]:
        tokens = self.passes.tokens(x.shape)
        flat = x.reshape(-1, 1, x.shape[-1]).float()
        delta = slots.delta(flat, tokens, self.passes.fired).to(x.dtype)
        self.passes.count(index, delta, flat, tokens)
        self.passes.n_visits[index].add_(1)
        return x + delta.view_as(x)

    # ---- on the host -----------------------------------------------------------------------------------------

    def _check_call(self, inputs: Tensor, position_ids: Tensor | None) -> None:
        """What only an uncompiled pass can be asked: is it ours, and does it fit."""
        if self._n_rows is not None and id(self) not in _OWNED.get():
            raise SteeringNotAppliedError(
                "this prepared model is being steered, but not by the thread that is running it now",
                hint="run it in the thread that entered the block, or inside contextvars.copy_context().run; threads "
                "that share a prepared model share its batch",
            )
        if self._n_rows is not None and self.passes.packed and position_ids is None:
            raise SteeringNotAppliedError(
                "a packed pass came without position_ids: nothing else says where a request begins",
                hint="pass position_ids that start again at 0 with every sequence",
            )
        size, room = inputs.shape[0], self.capacity.rows
        if self.passes.packed:
            size, room = inputs.numel() if inputs.ndim == 2 else size, self.capacity.tokens
        if size > room:
            raise PlanError(f"the pass has {size} rows or tokens, the model was prepared for {room}")
        if self._n_rows is not None and not self.passes.packed and size != self._n_rows:
            raise PlanError(f"the batch has {size} rows, {self._n_rows} are being steered")

    @contextmanager
    def steer(self, plans: Plan | Sequence[Plan | None] | None, prompts: Prompts) -> Iterator[PreparedSteering]:
        """Steer the model inside the block: calls, `generate`, compiled or replayed, with the prompts given here.

        `plans` is one plan for all rows, or one (or None) per row. `prompts` are left padded as the model will get
        them, or token ids. A pass that computes position 0 of a row starts its turn anew.

        Raises `PlanError` and its kin before anything runs: a plan for another model, one that needs more than the
        capacity, `error_term = "drop"`. Raises `SteeringNotAppliedError` or `ScopeError` after, when it could not act.
        """
        if not self._busy.acquire(blocking=False):
            raise PlanError("this prepared model is being steered already", hint="put both plans into one batch")
        owned = _OWNED.set(_OWNED.get() | {id(self)})
        try:
            batch = prompts if isinstance(prompts, Batch) else pad_left(prompts, self.lm.pad_id, self.lm.device)
            steering = PreparedSteering(self, plans, batch)
            self._n_rows = batch.input_ids.shape[0]
            yield steering
            steering.check_it_happened()
        finally:
            self._n_rows = None
            self.seating.clear()
            self.passes.reset()
            _OWNED.reset(owned)
            self._busy.release()

    def set_rows(self, n: int) -> None:
        self._n_rows = n


class PreparedSteering:
    """One block of a prepared model: `receipts` for users, `keep_rows` for loops, `seat` and `pack` for engines."""

    def __init__(self, prepared: Prepared, plans: Plan | Sequence[Plan | None] | None, prompts: Batch) -> None:
        self._prepared = prepared
        n = prompts.input_ids.shape[0]
        rows = list(plans) if isinstance(plans, Sequence) else [plans] * n
        if len(rows) != n:
            raise PlanError(f"{len(rows)} plans for {n} prompts", hint="give one plan, or one per row")
        if n > prepared.capacity.rows:
            raise PlanError(f"{n} rows, but the model was prepared for {prepared.capacity.rows}")
        for plan in {id(plan): plan for plan in rows if plan is not None}.values():
            check_plan(plan, prepared.lm, prepared.saes)
        self._plans = rows
        self._origin = list(range(n))
        self._tallies = [_Counted((0.0,), (0.0,), 0.0, False, -1, -1, -1, ())] * n
        self._spans = prompt_spans(prepared.lm, rows, prompts)
        prepared.passes.reset()
        prepared.passes.expect(self._spans)
        prepared.seating.place(rows, self._spans)

    def seat(self, row: int, plan: Plan | None, prompt: Sequence[int]) -> None:
        """Give a row to a new request; it starts with the pass that computes its position 0."""
        prepared = self._prepared
        if self._origin != list(range(len(self._plans))):
            raise PlanError("rows have left this batch, so its seats have moved", hint="seat requests, or keep_rows")
        if plan is not None:
            check_plan(plan, prepared.lm, prepared.saes)
        (span,) = prompt_spans(prepared.lm, [plan], pad_left([prompt], prepared.lm.pad_id, prepared.lm.device))
        self._collect()
        self._plans[row], self._spans[row] = plan, span
        prepared.passes.expect(self._spans)
        prepared.seating.place(self._plans, self._spans)

    def pack(self, arm_of_token: Int[Tensor, " tokens"]) -> None:
        """Say, before a packed pass, whose each token is: a row's number, or -1 for padding."""
        room = self._prepared.passes.arm_of_token
        if len(arm_of_token) > len(room):
            raise PlanError(f"{len(arm_of_token)} tokens in a pass, but the model was prepared for {len(room)}")
        room.fill_(-1)
        room[: len(arm_of_token)].copy_(arm_of_token)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """The batch goes on with these of its current rows only."""
        self._collect()
        prepared = self._prepared
        prepared.passes.keep_rows(rows)
        for part in (*prepared.sites.values(), *prepared.gates.values()):
            part.keep_rows(rows)
        self._origin = [self._origin[row] for row in rows.tolist()]
        prepared.set_rows(len(self._origin))

    def receipts(self) -> list[Receipt | None]:
        """One receipt per row of the batch; None for rows without a plan. Raises `SteeringNotAppliedError` when passes
        were not those of the prompts."""
        self._collect()
        for plan, span, counted in zip(self._plans, self._spans, self._tallies, strict=True):
            if plan is not None:
                counted.check(plan, span)
        return [
            None if plan is None else counted.receipt(plan, span, self._prepared.names)
            for plan, span, counted in zip(self._plans, self._spans, self._tallies, strict=True)
        ]

    def _collect(self) -> None:
        passes = self._prepared.passes
        marks = torch.stack(passes.faults, dim=1)
        columns = (
            passes.touched.T,
            passes.norm.T,
            passes.score,
            passes.fired,
            passes.began,
            passes.furthest,
            passes.counted,
            marks,
        )
        found = zip(*(column.tolist() for column in columns), strict=True)
        for origin, values in zip(self._origin, found, strict=False):
            self._tallies[origin] = _Counted(*values)

    def check_it_happened(self) -> None:
        """Raises `SteeringNotAppliedError` when a pass went past a hook, `ScopeError` when a scope met no token."""
        used = {edit.site for plan in self._plans if plan is not None for edit in plan.edits}
        if not used:
            return
        passes = self._prepared.passes
        n_passes, visits = int(passes.n_passes), dict(zip(self._prepared.names, passes.n_visits.tolist(), strict=True))
        missed = [name for name in sorted(used) if visits[name] != n_passes]
        if n_passes == 0 or missed:
            raise SteeringNotAppliedError(
                "no forward pass of this model went through its hooks"
                if n_passes == 0
                else f"of {n_passes} passes, {visits[missed[0]]} went through the hook at {missed[0]}",
                hint="prepare the model before it is compiled; a graph that was traced earlier does not know the hooks",
            )
        self.receipts()
        for plan, span, counted in zip(self._plans, self._spans, self._tallies, strict=True):
            for edit in plan.edits if plan is not None else ():
                reach = span.scopes[edit.scope]
                if reach.low >= reach.high or reach.low > counted.furthest:
                    raise ScopeError(
                        f"scope {edit.scope} never covered a token of this run",
                        hint="a 'generated' scope cannot act on log-likelihoods; use 'all', 'prompt' or 'assistant'",
                    )


class _Counted(NamedTuple):
    """What the passes say of one row; `touched` and `norm` by site, and `faults` in the order of `FAULTS`."""

    touched: Sequence[float]
    norm: Sequence[float]
    score: float
    fired: bool
    began: int
    furthest: int
    counted: int
    faults: Sequence[bool]

    def check(self, plan: Plan, span: PromptSpan) -> None:
        """Raises `SteeringNotAppliedError` when the passes were not those of this prompt."""
        for (what, hint), marked in zip(FAULTS.values(), self.faults, strict=False):
            if marked:
                raise SteeringNotAppliedError(what, hint=hint)
        needed = min((span.scopes[edit.scope].low for edit in plan.edits), default=0)
        if self.began > (0 if plan.gate else needed):
            raise SteeringNotAppliedError(
                f"the first {self.began} tokens of a prompt were computed outside this block, unsteered",
                hint="fill the cache inside the block",
            )

    def receipt(self, plan: Plan, span: PromptSpan, names: Sequence[str]) -> Receipt:
        pairs = sum(self.touched)
        mean = sum(self.norm) / pairs if pairs else 0.0
        tokens = self._tokens(plan, span, names)
        return make_receipt(plan, tokens, mean * tokens, [self.score], [self.fired])

    def _tokens(self, plan: Plan, span: PromptSpan, names: Sequence[str]) -> int:
        """Tokens that were changed at one site at least. Sites count on their own: where they changed all that their
        scopes cover, these say which tokens were the same."""
        covered = [self._covered(plan, span, name) for name in names]
        if sum(n > 0 for n in self.touched) > 1 and [len(c) for c in covered] == [int(n) for n in self.touched]:
            return len(set().union(*covered))
        return int(max(self.touched))

    def _covered(self, plan: Plan, span: PromptSpan, site: str) -> set[int]:
        """The positions counted that the plan's edits at a site cover."""
        reached = [span.scopes[edit.scope] for edit in plan.edits if edit.site == site]
        return {
            at for low, high in ((r.low, r.high) for r in reached) for at in range(low, min(high, self.counted + 1))
        }


def prepare(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] = (),
    sites: Sequence[str] = (),
    *,
    capacity: Capacity | None = None,
) -> Prepared:
    """Put permanent hooks on the model, before it is compiled: at the sites of `saes`, and at `sites` for plans of
    dense directions only. Until `Prepared.steer` they are the exact identity.

    Raises `SteeringNotAppliedError` when the model is compiled already, `SiteError` or `WidthMismatchError` when an SAE
    does not fit it.
    """
    refuse_compiled(lm)
    given = [saes] if isinstance(saes, FeatureSource) else list(saes)
    for sae in given:
        check_fits(sae, lm.d_model, lm.layout.n_layers, layer_norm=lm.layout.layer_norm)
    return Prepared(lm, given, [Site.parse(name) for name in sites], capacity or Capacity(rows=8))
