"""How a turn begins: whose rows, which prompt, which columns hold tokens, and what scopes and gates need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.batch_state import BatchState
from clampdown.steering.gate_programs import gate_programs
from clampdown.steering.generate_calls import GenerateCall
from clampdown.steering.passes import Pass, trailing_padding
from clampdown.steering.plan import Plan
from clampdown.steering.program import Rows, site_programs
from clampdown.steering.prompt_sharing import checked_index
from clampdown.steering.scopes import LOCAL, Window, last_run
from clampdown.steering.tally import Tally
from clampdown.steering.verdicts import content_of, read_turns, score_texts
from clampdown.types import BRANCHES


@dataclass(frozen=True, slots=True)
class Asked:
    """What the block was opened with. `needs_ids`: a scope or a gate asks for the prompt's tokens. `local`: what is
    done to a token does not depend on what follows it. `alike`: nor on who wrote it."""

    rows: Plan | Rows | None
    saes: Mapping[str, FeatureSource]
    prompt_width: int | None
    prompt_of: Int[Tensor, " rows"] | None
    needs_ids: bool
    local: bool
    alike: bool

    @classmethod
    def of(
        cls,
        rows: Plan | Rows | None,
        saes: Mapping[str, FeatureSource],
        prompt_width: int | None,
        prompt_of: Int[Tensor, " rows"] | None,
    ) -> Asked:
        plans = [p for p in (rows if isinstance(rows, Sequence) else [rows]) if p is not None]
        scopes = {edit.scope for plan in plans for edit in plan.all_edits}
        gated = any(plan.gate for plan in plans)
        return cls(
            rows=rows,
            saes=saes,
            prompt_width=prompt_width,
            prompt_of=prompt_of,
            needs_ids=gated or bool(scopes & {"assistant", "last_user"}),
            local=not gated and scopes <= LOCAL,
            alike=not gated and scopes <= {"all"},
        )

    def plans(self, n_rows: int) -> Rows:
        plans = self.rows if isinstance(self.rows, Sequence) else [self.rows] * n_rows
        if len(plans) != n_rows:
            raise PlanError(f"{len(plans)} plans for a batch of {n_rows} rows", hint="give one plan, or one per row")
        return plans


@dataclass
class Fed:
    """The tokens that the model was shown, from column 0 on, where a later turn may have to read them again."""

    keeps: bool
    _parts: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)
    _columns: int = 0
    _lost: bool = False

    def add(self, now: Pass) -> None:
        if self.keeps and now.past == self._columns:
            self._parts.append((now.ids, now.positions))
            self._columns = now.end

    def forget(self) -> None:
        """Rows have left, and nobody noted their tokens."""
        self._lost = True

    def cut(self, end: int) -> None:
        """Only the columns below `end` are there still."""
        if not end:
            self._parts, self._columns, self._lost = [], 0, False
        elif end < self._columns and not self._lost:
            ids, positions = (self._joined(which) for which in (0, 1))
            self._parts = [tuple(None if t is None else t[..., :end] for t in (ids, positions))]  # type: ignore[list-item]
            self._columns = end

    def ids(self) -> Int[Tensor, "rows columns"] | None:
        return None if self._lost else self._joined(0)

    def positions(self, now: Pass, call: GenerateCall | None, real: Bool[Tensor, "rows prompt"]) -> Tensor | None:
        """Of a whole prompt, in the way in which this pass says its own; None where the model counts by itself."""
        if now.positions is None:
            return None
        given = self._joined(1) if call is None else call.options("position_ids")
        if given is not None and given.shape[-1] >= real.shape[1]:
            return given[..., : real.shape[1]]
        return (real.long().cumsum(1) - 1).clamp(min=0)

    def _joined(self, which: int) -> Tensor | None:
        parts = [part[which] for part in self._parts]
        return torch.cat(parts, dim=-1) if parts and all(part is not None for part in parts) else None  # type: ignore[arg-type]


def begin_turn(
    lm: LanguageModel, asked: Asked, now: Pass, call: GenerateCall | None, fed: Fed, before: BatchState | None
) -> tuple[BatchState, Tally, Rows]:
    """Everything about a turn that its first pass, its call and the cache can tell."""
    device, n_prompts = lm.device, now.n_rows
    prompt_of = torch.arange(n_prompts) if asked.prompt_of is None else checked_index(asked.prompt_of, n_prompts)
    prompt_of, n_rows = prompt_of.to(device), len(prompt_of)
    plans = asked.plans(n_rows)
    width = _prompt_width(asked, now, call, first=before is None)
    real = _real_columns(now, call, width, before, device)
    shift = trailing_padding(real[:, :width], "a prompt")
    trailing_padding(real[:, width:], "a reply")
    if shift is not None and call is not None:
        raise SteeringNotAppliedError(
            f"{int((shift > 0).sum())} of {n_prompts} prompts end in padding: generate would answer the padding",
            hint="pad on the left: tokenizer.padding_side = 'left'",
        )
    opened = torch.zeros(len(BRANCHES), n_rows, dtype=torch.bool, device=device)
    opened[0] = True  # branch 0 acts until a gate says otherwise; what comes otherwise waits for its gate to open
    state = BatchState(
        programs=site_programs(plans, lm, asked.saes),
        gates=gate_programs(plans, lm, asked.saes),
        alive=torch.arange(n_rows, device=device),
        opened=opened,
        factor=torch.ones(len(BRANCHES), n_rows, device=device),
        prompt_of=prompt_of,
        n_prompts=n_prompts,
        prompt_width=width,
        prompt_ids=_prompt_ids(asked, now, call, fed, width),
        real=real[prompt_of],
        shift=shift,
        call=call,
        narrow=asked.prompt_of is not None,
    )
    tally = Tally.empty(n_rows, device)
    _resolve_scopes(lm, plans, asked.saes, state, tally)
    return state, tally, plans


def _prompt_width(asked: Asked, now: Pass, call: GenerateCall | None, *, first: bool) -> int:
    """Where the prompt ends. What was told is about the block's first turn, which may begin behind it when it resumes a
    cache; of a later turn it is true only where it lies ahead."""
    told = asked.prompt_width if asked.prompt_width is not None and (first or asked.prompt_width > now.past) else None
    known = now.end if call is None or call.width is None else call.width
    if known <= now.past:
        raise SteeringNotAppliedError(f"the call was given {known} columns, and the cache holds {now.past} already")
    if told is not None and told > known and not (asked.local and call is None):
        raise SteeringNotAppliedError(
            f"the prompt has {told} columns, the first pass only {known}",
            hint="a gate and this plan's scopes need the whole prompt at once: call generate, which says what it is",
        )
    return known if told is None else told


def _real_columns(
    now: Pass, call: GenerateCall | None, prompt_width: int, before: BatchState | None, device: torch.device
) -> Bool[Tensor, "prompts columns"]:
    """Which columns hold tokens, of all that are known: the prompt's, and those of this pass."""
    mask = now.plain_mask if call is None else call.mask
    columns = max(prompt_width, now.end)
    if mask is not None and (call is not None or mask.shape[1] >= now.end):
        known = (mask if call is None else call.rows(mask, now.n_rows)).to(device).bool()[:, :columns]
    elif call is not None:
        known = torch.ones(now.n_rows, 0, dtype=torch.bool, device=device)
    else:
        own = now.real()
        own = torch.ones(now.n_rows, now.width, dtype=torch.bool, device=device) if own is None else own
        known = torch.cat([_before(now, before, device), own], dim=1)
    return torch.nn.functional.pad(known, (0, columns - known.shape[1]), value=True)


def _before(now: Pass, before: BatchState | None, device: torch.device) -> Bool[Tensor, "rows past"]:
    """What is known of cached columns without a mask that shows them: replies hold tokens."""
    earlier = torch.ones(now.n_rows, now.past, dtype=torch.bool, device=device)
    if before is not None and len(before.real) == now.n_rows:
        known = min(now.past, before.real.shape[1])
        earlier[:, :known] = before.real[:, :known]
    return earlier


def _prompt_ids(
    asked: Asked, now: Pass, call: GenerateCall | None, fed: Fed, width: int
) -> Int[Tensor, "prompts prompt"] | None:
    """The tokens of the whole prompt. None where they are unknown and nothing needs them."""
    new = now.ids if call is None else call.given(now.past, now.n_rows)
    if call is not None and new is not None and now.ids is not None:
        new = new.to(now.ids.device)
        both = min(new.shape[1], now.width)
        if not torch.equal(new[:, :both], now.ids[:, :both]):
            raise SteeringNotAppliedError("generate shows the model other tokens than those that it was given")
    cached = fed.ids() if now.past else None
    ids = new if not now.past else None if cached is None or new is None else torch.cat([cached, new], dim=1)
    if ids is not None and ids.shape[1] >= width:
        return ids[:, :width]
    if not asked.needs_ids:
        return None
    if new is None:
        raise ScopeError("this plan needs the prompt's token ids, but the model was called with inputs_embeds")
    raise SteeringNotAppliedError(
        f"this plan needs all {width} tokens of the conversation, and those in the cache are unknown",
        hint="run every turn of a conversation in the same block, with no rows leaving in between",
    )


def _resolve_scopes(
    lm: LanguageModel, plans: Rows, saes: Mapping[str, FeatureSource], state: BatchState, tally: Tally
) -> None:
    """Find the offsets that this batch's scopes and gates need, from the token ids."""
    scopes = {reach.scope for program in state.programs for reach in program.reaches}
    if "assistant" in scopes:
        state.assistant_start = lm.chat.assistant_start(state.prompts)
    if "last_user" in scopes:
        state.last_user = last_run(content_of(lm, state))[state.prompt_of]
    if any(gate.scorer for plan in plans if plan is not None for gate in plan.gates):
        score_texts(lm, plans, state, tally)
    if any(gate.window for plan in plans if plan is not None for gate in plan.gates):
        read_turns(lm, plans, saes, state, tally)


def columns_real(state: BatchState, now: Pass) -> Bool[Tensor, "rows pos"]:
    """Which columns of a pass hold tokens: of the prompt it is known, of the rest the pass's mask says it."""
    known = state.real[:, now.past : now.end]
    if known.shape[1] == now.width:
        return known
    # What generate feeds after a prompt, and a single column that anybody does, are tokens.
    own = None if state.call is not None or now.width == 1 else now.real()
    if own is None:
        return torch.nn.functional.pad(known, (0, now.width - known.shape[1]), value=True)
    own = own[state.prompt_of] if state.narrow else own
    return torch.cat([known, own[:, known.shape[1] :]], dim=1)


def numbered(state: BatchState, real: Bool[Tensor, "rows pos"]) -> Window:
    """The pass's columns as scopes see them."""
    columns = torch.arange(state.start, state.seen, device=real.device)[None]
    if state.row_shift is not None:
        columns = torch.where(columns < state.prompt_width, columns + state.row_shift.unsqueeze(1), columns)
    return Window(columns, real, state.prompt_width, state.assistant_start, state.last_user)
