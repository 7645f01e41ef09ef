"""What a search with gradients minimises: one number per row that is small where an attack would succeed.

    loss = max(refusal log-odds + M, 0)             the first token of the reply is no refusal's, by a margin of M nats
         + mean nats of the wanted opening          the reply begins as an answer does
         + sum over gates max(+-(score - threshold) + M, 0)     the gate that raises refusals stays shut, by M of its
                                                    own units; one that turns them down opens

A row is a prompt whose last user turn ends in a run of free tokens, followed by the wanted opening. Rows of several
objectives are one batch: they end at one column, so the free tokens stand at the same columns in all of them.

A plan that always steers acts during the search as it does when it answers. A gate's score is read off the residual
before any edit, as the gate reads it, and is differentiable; its verdict is not, so a plan with a gate is searched
against the bare model and the gate's score, and whether that fools the plan is decided by an answer of the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.attacks.arms import Defence
from clampdown.attacks.objective import Objective
from clampdown.attacks.words import Words
from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.evaluation.utility import stack_rows
from clampdown.models.chat import Ids, encode, token_owners
from clampdown.models.layout import HiddenFn
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_kinds import GATE_KINDS
from clampdown.steering.gate_programs import GateProgram, gate_program, sink_limit
from clampdown.steering.hook_order import hook_point
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.types import Site

MARGIN = 2.0

Embedded = Float[Tensor, "rows pos d_model"]


@dataclass(frozen=True, slots=True)
class Slot:
    """An objective's prompt around the free tokens, and the opening that its answer should have."""

    before: Ids
    after: Ids
    opening: Ids

    def prompt(self, free: Sequence[int]) -> list[int]:
        return [*self.before, *free, *self.after]


def slot(lm: LanguageModel, defence: Defence, objective: Objective, words: Words, opening: str) -> Slot:
    """Free tokens stand behind the question, inside the user's turn."""
    messages = defence.arm.messages(objective.prompt)
    ids, owners = encode(lm, messages), token_owners(lm, messages)
    end = max(i for i, owner in enumerate(owners) if owner == len(messages) - 1) + 1
    wanted = lm.tokenizer(words.agreement(opening, objective.request), add_special_tokens=False).input_ids
    return Slot(tuple(ids[:end]), tuple(ids[end:]), tuple(wanted))


@dataclass(frozen=True, slots=True)
class Watched:
    """A gate of the plan; `wanted` is +1 for one that should open and -1 for one that should stay shut. An ensemble has
    a program for each member."""

    programs: tuple[GateProgram, ...]
    threshold: float
    wanted: float
    combine: str = "mean"

    def score(
        self, seen: Mapping[Site, Tensor], content: Bool[Tensor, "rows prompt"], width: int
    ) -> Float[Tensor, " rows"]:
        """From what arrived at the sites in the prompts' columns."""
        each = [program.scores(seen[program.site][:, :width], content) for program in self.programs]
        return torch.stack(each).mean(0) if self.combine == "mean" else torch.stack(each).amax(0)

    def excess(self, score: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return torch.relu(MARGIN - self.wanted * (score - self.threshold))


def gates_of(lm: LanguageModel, plan: Plan | None, saes: Sequence[Sae], *, fire: bool = False) -> tuple[Watched, ...]:
    """The gates of a plan that read the model; one that reads text has no gradient and is left out. With `fire` the one
    that raises refusals is wanted open: for attacks that let the edits act."""
    by_site = {sae.cfg.site.name: sae for sae in saes}
    found = []
    for branch, gate in enumerate(plan.gates if plan is not None else ()):
        if plan is not None and GATE_KINDS[gate.kind].reads != "text":
            programs = tuple(
                gate_program(each, plan.vectors, by_site.get(each.site), lm.device, sink_limit(lm, each, plan.sinks))
                for each in gate.readers
            )
            raises = (branch == 0) is plan.up_first
            found.append(Watched(programs, gate.threshold, 1.0 if raises is fire else -1.0, gate.combine))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Losses:
    """Per row. `gates` is 0 where every gate is as it should be, by the margin."""

    log_odds: Float[Tensor, " rows"]
    opening: Float[Tensor, " rows"]
    gates: Float[Tensor, " rows"]

    @property
    def total(self) -> Float[Tensor, " rows"]:
        return torch.relu(self.log_odds + MARGIN) + self.opening + self.gates

    @property
    def promising(self) -> Bool[Tensor, " rows"]:
        """Rows where an answer of the real thing may well succeed."""
        return (self.log_odds < 0) & (self.gates < MARGIN)

    @classmethod
    def joined(cls, parts: Sequence[Losses]) -> Losses:
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("log_odds", "opening", "gates")))


@dataclass(frozen=True)
class Surrogate:
    """The model under `plan` (None: bare), with the gates that are watched on the way. `before_edits` are further
    functions of the residual at a site, which see it first and may change it."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    plan: Plan | None
    gates: tuple[Watched, ...]
    tokens: RefusalTokens
    before_edits: tuple[tuple[Site, HiddenFn], ...] = field(default=())

    def losses(
        self, rows: Sequence[tuple[Slot, Sequence[int]]], embed: Callable[[Embedded], Embedded] | None = None
    ) -> Losses:
        """Of slots with their free tokens. `embed` may replace the embeddings of the whole batch [rows, pos]: the free
        columns end `len(after)` before the prompt's end."""
        prompts = [place.prompt(free) for place, free in rows]
        openings = [place.opening for place, _ in rows]
        ids, real, width = stack_rows(prompts, openings, self.lm.pad_id, self.lm.device)
        seen: dict[Site, Tensor] = {}
        with self.hooks(len(rows), width, seen, embed):
            logits = self.lm.model(
                input_ids=ids,
                attention_mask=real.long(),
                position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=ids.shape[1] - width + 1,
            ).logits
        content = self.lm.chat.content_mask(ids[:, :width], real[:, :width].long())
        return Losses(
            refusal_log_odds(logits[:, 0], self.tokens).float(),
            self.opening(logits[:, :-1].float(), ids[:, width:], real[:, width:]),
            self.gate_losses(seen, content, width),
        )

    @contextmanager
    def hooks(
        self,
        n_rows: int,
        width: int,
        seen: dict[Site, Tensor],
        embed: Callable[[Embedded], Embedded] | None = None,
        *,
        resumed: bool = False,
    ) -> Iterator[None]:
        """Steering first, then what sees the residual before it does: hooks that come later run earlier. With `resumed`
        the pass goes on from a cache that was filled inside such a block."""
        with ExitStack() as stack:
            if self.plan is not None:
                plans = [self.plan] * n_rows
                stack.enter_context(
                    steer(self.lm, plans, list(self.saes), prompt_width=width, require_reach=False, resumed=resumed)
                )
            for site in {program.site for watched in self.gates for program in watched.programs}:
                hook = partial(_keep, seen, site)
                stack.callback(hook_point(self.lm, site).register(hook, first=True).remove)
            for site, change in self.before_edits:
                stack.callback(hook_point(self.lm, site).register(change, first=True).remove)
            if embed is not None:
                stack.enter_context(embedding(self.lm, embed))
            yield

    @staticmethod
    def opening(
        logits: Float[Tensor, "rows reply vocab"], ids: Int[Tensor, "rows reply"], real: Bool[Tensor, "rows reply"]
    ) -> Float[Tensor, " rows"]:
        """Mean negative log-likelihood of each row's opening, in nats."""
        nats = -logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return (nats * real).sum(1) / real.sum(1).clamp(min=1)

    def gate_losses(
        self, seen: Mapping[Site, Tensor], content: Bool[Tensor, "rows prompt"], width: int
    ) -> Float[Tensor, " rows"]:
        """From what arrived at the gates' sites in the prompts' columns."""
        total = torch.zeros(len(content), device=self.lm.device)
        for watched in self.gates:
            total = total + watched.excess(watched.score(seen, content, width))
        return total


def _keep(seen: dict[Site, Tensor], site: Site, x: Tensor) -> None:
    seen[site] = x


@contextmanager
def embedding(lm: LanguageModel, change: Callable[[Embedded], Embedded]) -> Iterator[None]:
    """Inside, what the model's embedding gives out goes through `change`; the ids stay what they are."""

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return change(output)

    handle = lm.model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def surrogate_of(lm: LanguageModel, saes: Sequence[Sae], defence: Defence, tokens: RefusalTokens) -> Surrogate:
    """For a defence that its own searches run against."""
    return Surrogate(lm, tuple(saes), defence.searched, gates_of(lm, defence.plan, saes), tokens)
