"""Attacks with the model's weights: each arm is searched by itself, and every find is asked for real.

A search's row is stored when it has ended, so a killed run repeats the group of objectives that was in flight and
nothing else. Suffixes are text: in the end each arm's are tried on every other arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from clampdown.attacks.arms import Defence
from clampdown.attacks.attempt import Attempt
from clampdown.attacks.black_box import Target
from clampdown.attacks.budget import Budget, Clock
from clampdown.attacks.error_direction import Found, fit_error_direction
from clampdown.attacks.log import AttackLog, Searched
from clampdown.attacks.objective import Objective
from clampdown.attacks.replying import Answer, answers
from clampdown.attacks.replying import Asked as Query
from clampdown.attacks.soft_prompt import SoftPrompt, fit_soft_prompts, in_prompts
from clampdown.attacks.success import judged, succeeded
from clampdown.attacks.suffix import Asked, measured, search_suffixes, suffixed
from clampdown.attacks.surrogate import Slot, Surrogate, embedding, slot, surrogate_of
from clampdown.attacks.words import Words
from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.models.generation import generate
from clampdown.steering.arms import EncodedRow, generate_batch
from clampdown.steering.hook_order import hook_point
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan

GROUP_TOKENS = 1_500
"""Prompt tokens of the objectives that are searched together, about."""
TRANSFERRED = "suffix of "
OPENINGS = 2
"""Openings of an answer that a search may aim at."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class WhiteBox:
    """What all searches of a run share. `attacked` is the whole plan, for the arms without one."""

    target: Target
    attacked: Plan
    words: Words
    tokens: RefusalTokens
    budget: Budget
    seed: int

    def clock(self, share: float = 1.0) -> Clock:
        """For a share of an arm's objectives: who is searched later gets no less."""
        return Clock(None if self.budget.seconds is None else share * self.budget.seconds)

    def surrogate(self, defence: Defence) -> Surrogate:
        return surrogate_of(self.target.lm, self.target.saes, defence, self.tokens)

    def places(self, defence: Defence, objectives: Sequence[Objective]) -> list[tuple[Objective, Slot]]:
        """With the opening that each answer is nearest to as it is: the others are further to go."""
        templates = self.words.agreed[:OPENINGS]
        every = [[slot(self.target.lm, defence, o, self.words, each) for each in templates] for o in objectives]
        if not every:
            return []
        with torch.no_grad():
            flat = [(place, ()) for places in every for place in places]
            nats = measured(self.surrogate(defence), flat).opening.view(len(every), -1)
        return [(o, places[i]) for o, places, i in zip(objectives, every, nats.argmin(1).tolist(), strict=True)]

    def ask(self, defence: Defence, asked: Sequence[tuple[Objective, Attempt]]) -> list[Asked]:
        """Greedy answers of the arm itself, judged."""
        queries = [Query(defence.arm, objective.prompt, attempt) for objective, attempt in asked]
        target = self.target
        said = answers(target.lm, target.saes, queries, target.max_new_tokens, target.batch_rows)
        return self.judged([objective for objective, _ in asked], said)

    def judged(self, objectives: Sequence[Objective], said: Sequence[Answer]) -> list[Asked]:
        cases = [(objective, answer.text) for objective, answer in zip(objectives, said, strict=True)]
        found = judged(self.target.judge, cases)
        rows = zip(cases, said, found, strict=True)
        return [
            Asked(answer, judgement.verdict, succeeded(objective, text, judgement))
            for (objective, text), answer, judgement in rows
        ]


def run_suffixes(job: WhiteBox, log: AttackLog, tick: Progress) -> bool:
    """Search every arm's suffixes. Returns whether time ended one."""
    cut = False
    total = len(job.target.defences) * job.budget.steps
    for number, defence in enumerate(job.target.defences):
        todo = _left(job, defence, "suffix", log)
        groups = _groups(job, job.places(defence, todo))
        for at, group in enumerate(groups):
            clock = job.clock(len(group) / len(todo))
            done = number * job.budget.steps + at * job.budget.steps // len(groups)

            def step(now: int, steps: int, done: int = done, groups: int = len(groups)) -> None:
                tick(done + now // groups, total)

            surrogate, ask = job.surrogate(defence), lambda asked, defence=defence: job.ask(defence, asked)
            log.searched.append(search_suffixes(surrogate, group, ask, job.budget, clock, job.seed, defence.kind, step))
            cut = cut or clock.ran_out
    return cut


def _left(job: WhiteBox, defence: Defence, attack: str, log: AttackLog) -> list[Objective]:
    done = {row.objective for row in log.searched.rows if (row.arm, row.attack) == (defence.kind, attack)}
    return [objective for objective in job.target.objectives if objective.key not in done]


def _groups(job: WhiteBox, places: Sequence[tuple[Objective, Slot]]) -> list[list[tuple[Objective, Slot]]]:
    """Objectives that are searched in one batch, those of like length together."""
    ordered = sorted(places, key=lambda place: len(place[1].before))
    if not ordered:
        return []
    longest = len(ordered[-1][1].prompt(range(job.budget.suffix_tokens))) + len(ordered[-1][1].opening)
    size = max(1, GROUP_TOKENS // longest)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def run_transfer(job: WhiteBox, log: AttackLog, tick: Progress) -> None:
    """Every arm's suffixes on every other arm, each asked once."""
    by_key = {objective.key: objective for objective in job.target.objectives}
    found = [row for row in log.searched.rows if row.attack == "suffix"]
    pairs = [(a, b) for a in job.target.defences for b in job.target.defences if a.kind != b.kind]
    for number, (source, defence) in enumerate(pairs):
        tick(number, len(pairs))
        name = TRANSFERRED + source.kind
        left = {objective.key for objective in _left(job, defence, name, log)}
        rows = [row for row in found if row.arm == source.kind and row.objective in left]
        if rows:
            asked = job.ask(defence, [(by_key[r.objective], suffixed(by_key[r.objective], r.found)) for r in rows])
            log.searched.append(
                [
                    _searched(defence, row.objective, name, 0, came, (row.loss, row.log_odds), row.found)
                    for row, came in zip(rows, asked, strict=True)
                ]
            )


def _searched(
    defence: Defence, objective: str, attack: str, steps: int, asked: Asked, loss: tuple[float, float], found: str = ""
) -> Searched:
    """A row of something that was asked for real once; `loss` with the log-odds."""
    receipt = asked.answer.receipt
    return Searched(
        arm=defence.kind,
        objective=objective,
        attack=attack,
        step=steps,
        steps=steps,
        queries=1,
        found=found,
        loss=loss[0],
        log_odds=loss[1],
        reply=asked.answer.text,
        verdict=asked.verdict,
        succeeded=asked.succeeded,
        fired=receipt and receipt.gate_fired,
        gate_score=receipt and receipt.gate_score,
    )


def run_soft_prompts(job: WhiteBox, log: AttackLog, tick: Progress) -> bool:
    """The upper bound of suffixes, arm by arm. Returns whether time ended one."""
    cut = False
    for defence in job.target.defences:
        left = _left(job, defence, "soft_prompt", log)
        for group in _groups(job, job.places(defence, left)):
            clock = job.clock(len(group) / len(left))
            found = fit_soft_prompts(job.surrogate(defence), group, job.budget, clock, tick)
            asked = job.judged([each.objective for each in found], _soft_answers(job, defence, found))
            log.searched.append(
                [
                    _searched(
                        defence, each.objective.key, "soft_prompt", job.budget.steps, came, (each.loss, each.log_odds)
                    )
                    for each, came in zip(found, asked, strict=True)
                ]
            )
            cut = cut or clock.ran_out
    return cut


def _soft_answers(job: WhiteBox, defence: Defence, found: Sequence[SoftPrompt]) -> list[Answer]:
    target = job.target
    rows: list[EncodedRow] = [(defence.arm, each.objective.prompt, each.slot.prompt(each.free)) for each in found]
    with embedding(target.lm, in_prompts(found)):
        replies = generate_batch(target.lm, target.saes, rows, target.max_new_tokens)
    return [Answer(reply.text, reply.n_tokens, reply.receipt) for reply in replies]


def run_error_directions(job: WhiteBox, log: AttackLog, tick: Progress) -> bool:
    """One direction per arm, for all objectives. Returns whether time ended one."""
    cut = False
    for defence in job.target.defences:
        left = _left(job, defence, "error_direction", log)
        if not left:
            continue
        clock, places = job.clock(), job.places(defence, left)
        direction = fit_error_direction(job.surrogate(defence), defence, job.attacked, places, job.budget, clock, tick)
        said, described = _pushed_answers(job, defence, places, direction), _described(direction)
        asked = [_only_through(each) for each in job.judged(left, said)]
        log.searched.append(
            [
                _searched(defence, objective.key, "error_direction", job.budget.steps, came, (0.0, 0.0), described)
                for objective, came in zip(left, asked, strict=True)
            ]
        )
        cut = cut or clock.ran_out
    return cut


def _described(direction: Found) -> str:
    error = (
        ""
        if direction.in_error is None
        else f", which moves the SAE's error term by {direction.in_error:.2f} of its own"
    )
    return f"a direction of {direction.share:.2f} of the residual's length at {direction.site}{error}"


def _only_through(asked: Asked) -> Asked:
    """Success with the gate shut went past the clamp, not through it."""
    receipt = asked.answer.receipt
    shut = receipt is not None and receipt.gate_fired is False
    return Asked(asked.answer, asked.verdict, asked.succeeded and not shut)


@torch.no_grad()
def _pushed_answers(
    job: WhiteBox, defence: Defence, places: Sequence[tuple[Objective, Slot]], direction: Found
) -> list[Answer]:
    """Greedy answers with the direction in place: put on last, so that it comes before the edit."""
    target, prompts = job.target, [list(place.prompt(())) for _, place in places]
    lm, new = target.lm, target.max_new_tokens
    with steer(lm, [defence.plan] * len(prompts), list(target.saes), require_reach=False) as steering:
        with _pushing(job, direction):
            replies = generate(lm, prompts, max_new_tokens=new, on_keep=steering.keep_rows)
        receipts = steering.receipts() or [None] * len(prompts)
    return [Answer(reply.text, len(reply.ids), receipt) for reply, receipt in zip(replies, receipts, strict=True)]


@contextmanager
def _pushing(job: WhiteBox, direction: Found) -> Iterator[None]:
    handle = hook_point(job.target.lm, direction.site).register(direction.added, first=True)
    try:
        yield
    finally:
        handle.remove()
