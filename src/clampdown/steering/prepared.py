"""Hooks that stay on the model, for `torch.compile`, static caches, CUDA graphs and packed batches.

`steer` registers its hooks on entry, and a graph that was traced before does not know them. `prepare` registers them
once, before anything is compiled; what they do stands in buffers (`slots.py`) that a `steer` block of the prepared
model changes in place. No plan is the exact identity. Changing the plan traces nothing again.

1. Before the block, on the host: each row's prompt gives the intervals of positions that its scopes mean.
2. In the graph: a pre-hook on the decoder finds each token's row and position, gates read the prompt and fix per row
   whether anything is done, sites add their delta and count what they did.
3. After the block, on the host: the counters show that every pass went through every hook, or it is an error.

One prepared model is one engine: requests share it as rows of a batch, not as threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.chat import Batch, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource, check_fits
from clampdown.steering.compiled import refuse_compiled
from clampdown.steering.plan import Plan
from clampdown.steering.program import check_plan
from clampdown.steering.receipts import make_receipt
from clampdown.steering.seating import Seating, prompt_spans
from clampdown.steering.slots import GateSlots, PromptMarks, SiteSlots, Tokens, move_rows
from clampdown.types import Receipt, Site

_OWNED: ContextVar[frozenset[int]] = ContextVar("clampdown_prepared", default=frozenset())

Prompts = Batch | Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The fixed sizes. `features` and `directions` are slots per site, one for each different (feature or vector,
    operator, scope) in a batch; `prompt` is the longest prompt that a gate reads. `tokens` > 0 makes batches packed: it
    is the most tokens of one pass, and `rows` is the most requests."""

    rows: int
    features: int = 8
    directions: int = 2
    gate_features: int = 64
    prompt: int = 4096
    tokens: int = 0


class Passes(nn.Module):
    """What the hooks know about a pass and have counted so far, as buffers."""

    first: Tensor
    arm_of_token: Tensor
    position: Tensor
    fired: Tensor
    fresh: Tensor
    score: Tensor
    touched: Tensor
    norm: Tensor
    furthest: Tensor
    n_passes: Tensor
    n_visits: Tensor

    def __init__(self, capacity: Capacity, n_sites: int, device: str) -> None:
        super().__init__()
        self.packed = capacity.tokens > 0
        self.prompt = PromptMarks(capacity.rows, capacity.prompt, device)
        rows = capacity.rows
        for name, tensor in {
            "first": torch.zeros((), dtype=torch.long),
            "arm_of_token": torch.full((capacity.tokens,), -1),
            "position": torch.zeros(capacity.tokens, dtype=torch.long),
            "fired": torch.ones(rows, dtype=torch.bool),
            "fresh": torch.zeros(rows, dtype=torch.bool),
            "score": torch.zeros(rows),
            "touched": torch.zeros(rows),
            "norm": torch.zeros(rows),
            "furthest": torch.full((rows,), -1),
            "n_passes": torch.zeros((), dtype=torch.long),
            "n_visits": torch.zeros(n_sites, dtype=torch.long),
        }.items():
            self.register_buffer(name, tensor.to(device))

    def reset(self) -> None:
        for counter in (self.score, self.touched, self.norm, self.n_passes, self.n_visits):
            counter.zero_()
        self.fired.fill_(True)
        self.furthest.fill_(-1)

    def tokens(self, shape: torch.Size) -> Tokens:
        """Rows and positions of the tokens of a residual [rows, pos, d_model], or packed [(1,) tokens, d_model]."""
        if self.packed:
            n = shape[:-1].numel()
            rows = self.arm_of_token[:n]
            return Tokens(rows.clamp(min=0), torch.where(rows < 0, -1, self.position[:n]))
        n_rows, width = shape[0], shape[1]
        columns = self.first + torch.arange(width, device=self.first.device)
        positions = columns - self.prompt.pad[:n_rows].unsqueeze(1)
        rows = torch.arange(n_rows, device=self.first.device).unsqueeze(1).expand(n_rows, width)
        return Tokens(rows.reshape(-1), positions.reshape(-1))

    def open(self, inputs: Tensor, past: Tensor | int, position_ids: Tensor | None) -> None:
        """Begin a pass. A row whose position 0 is in it starts a new turn."""
        if self.packed and position_ids is not None:
            flat = position_ids.reshape(-1)
            self.position[: flat.shape[0]] = flat
        elif isinstance(past, Tensor):
            self.first.copy_(past)
        else:
            self.first.fill_(past)
        tokens = self.tokens(torch.Size((*inputs.shape[:2], 1)))
        starts = torch.zeros_like(self.touched).index_add_(0, tokens.rows, (tokens.positions == 0).float())
        self.fresh.copy_(starts > 0)
        self.fired.logical_or_(self.fresh)
        for tally in (self.touched, self.norm, self.score):
            tally.masked_fill_(self.fresh, 0.0)
        self.furthest.masked_fill_(self.fresh, -1)
        self.furthest.scatter_reduce_(0, tokens.rows, tokens.positions, "amax")
        self.n_passes.add_(1)

    def decide(self, gate: GateSlots, x: Float[Tensor, "tokens 1 d_model"], tokens: Tokens) -> None:
        """Let a site's gates decide for the rows whose prompt this pass holds a part of."""
        scores = gate.scores(x, tokens, self.prompt, self.fresh)
        in_prompt = (tokens.positions >= 0) & (tokens.positions < self.prompt.length[tokens.rows])
        reading = torch.zeros_like(self.touched).index_add_(0, tokens.rows, in_prompt.float()) > 0
        deciding = gate.gated & reading
        self.score.copy_(torch.where(deciding, scores, self.score))
        self.fired.copy_(torch.where(deciding, scores > gate.threshold, self.fired))

    def count(self, delta: Float[Tensor, "tokens 1 d"], x: Float[Tensor, "tokens 1 d"], tokens: Tokens) -> None:
        size = torch.linalg.vector_norm(delta.squeeze(1).detach(), dim=-1, dtype=torch.float32)
        length = torch.linalg.vector_norm(x.squeeze(1).detach(), dim=-1, dtype=torch.float32).clamp(min=1e-12)
        self.touched.index_add_(0, tokens.rows, (size > 0).float())
        self.norm.index_add_(0, tokens.rows, size / length)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self.prompt.keep_rows(rows)
        for tensor in (self.fired, self.score, self.touched, self.norm, self.furthest):
            move_rows(tensor, rows)


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
        self.passes = Passes(capacity, len(self.names), device)
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
        self.seating = Seating(lm, self.sites, self.gates, self.passes.prompt)
        self._busy = threading.Lock()
        self._n_rows: int | None = None
        self._handles = self._attach()

    def _attach(self) -> list[Any]:
        handles: list[Any] = [self.lm.layout.decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True)]
        for index, name in enumerate(self.names):
            point = self.lm.layout.hook_point(Site.parse(name))
            # The gate first: hooks of one module run in this order, and it must read what no edit has changed.
            if name in self.gates:
                handles.append(point.register(partial(self._read_gate, self.gates[name])))
            handles.append(point.register(partial(self._edit, self.sites[name], index)))
        return handles

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
        self.passes.open(inputs, past, kwargs.get("position_ids"))

    def _read_gate(self, gate: GateSlots, x: Float[Tensor, "*tokens d_model"]) -> None:
        self.passes.decide(gate, x.reshape(-1, 1, x.shape[-1]).float(), self.passes.tokens(x.shape))

    def _edit(self, slots: SiteSlots, index: int, x: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "..."]:
        tokens = self.passes.tokens(x.shape)
        flat = x.reshape(-1, 1, x.shape[-1]).float()
        delta = slots.delta(flat, tokens, self.passes.fired).to(x.dtype)
        self.passes.count(delta, flat, tokens)
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
        self._tallies: list[tuple[float, float, float, bool, int]] = [(0.0, 0.0, 0.0, False, -1)] * n
        self._spans = prompt_spans(prepared.lm, rows, prompts)
        prepared.passes.reset()
        prepared.seating.place(rows, self._spans)

    def seat(self, row: int, plan: Plan | None, prompt: Sequence[int]) -> None:
        """Give a row to a new request; it starts with the pass that computes its position 0."""
        prepared = self._prepared
        if self._origin != list(range(len(self._plans))):
            raise PlanError("rows have left this batch, so its seats have moved", hint="seat requests, or keep_rows")
        if plan is not None:
            check_plan(plan, prepared.lm, prepared.saes)
        (span,) = prompt_spans(prepared.lm, [plan], pad_left([prompt], prepared.lm.pad_id, prepared.lm.device))
        self._plans[row], self._spans[row] = plan, span
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
        """One receipt per row of the batch; None for rows without a plan."""
        self._collect()
        return [
            None if plan is None else make_receipt(plan, *tally[:2], [tally[2]], [tally[3]])
            for plan, tally in zip(self._plans, self._tallies, strict=True)
        ]

    def _collect(self) -> None:
        passes = self._prepared.passes
        columns = (passes.touched, passes.norm, passes.score, passes.fired, passes.furthest)
        found = zip(*(column.tolist() for column in columns), strict=True)
        for origin, tally in zip(self._origin, found, strict=False):
            self._tallies[origin] = tally

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
        self._collect()
        for plan, span, tally in zip(self._plans, self._spans, self._tallies, strict=True):
            for edit in plan.edits if plan is not None else ():
                reach = span.scopes[edit.scope]
                if reach.low >= reach.high or reach.low > tally[4]:
                    raise ScopeError(
                        f"scope {edit.scope} never covered a token of this run",
                        hint="a 'generated' scope cannot act on log-likelihoods; use 'all', 'prompt' or 'assistant'",
                    )


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
        check_fits(sae, lm.d_model, lm.layout.n_layers)
    return Prepared(lm, given, [Site.parse(name) for name in sites], capacity or Capacity(rows=8))
