"""Attacks with text alone: every arm gets the same queries, in rounds, until one succeeds or the budget is spent.

All unfinished (arm, objective) pairs take a round together, so that arms share the prompts' passes. A pair's state is
read off its stored queries, so a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from clampdown.attacks.arms import Defence
from clampdown.attacks.attempt import Attempt, Scene
from clampdown.attacks.budget import Budget, Clock
from clampdown.attacks.log import AttackLog, Tried
from clampdown.attacks.objective import Objective
from clampdown.attacks.replying import Asked, answers
from clampdown.attacks.success import judged, succeeded
from clampdown.attacks.table import attempt_of
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.models.loading import LanguageModel
from clampdown.models.threads import SMALL
from clampdown.saes.sae import Sae

ROUND = 10
"""Queries of each pair per round: what is asked in vain behind a success, at most, for the sake of batches."""
STORED, STORED_OF_LARGE = 192, 48
"""Queries that are answered, judged and stored together, of small models and of others: a step of the progress, and
what a time limit may be overrun by."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """What is attacked, and who says whether it fell."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    defences: tuple[Defence, ...]
    objectives: tuple[Objective, ...]
    judge: NamedJudge
    max_new_tokens: int = 48
    batch_rows: int | None = None


@dataclass(frozen=True, slots=True)
class _Query:
    defence: Defence
    objective: Objective
    number: int
    attack: str
    attempt: Attempt


def run_black_box(
    target: Target, names: Sequence[str], scene: Scene, budget: Budget, seed: int, log: AttackLog, tick: Progress
) -> Clock:
    """Ask until everything is decided. The clock says whether time ended it."""
    clock = Clock(budget.seconds and budget.seconds * len(target.defences))
    weights = sum(parameter.numel() for parameter in target.lm.model.parameters())
    stored = STORED if weights <= SMALL else STORED_OF_LARGE
    for start in range(0, budget.queries, ROUND):
        todo = list(_round(target, names, scene, range(start, min(start + ROUND, budget.queries)), seed, log))
        for at in range(0, len(todo), stored):
            tick(start * len(todo) + ROUND * at, budget.queries * len(todo))
            if clock.over():
                return clock
            log.tried.append(_tried(target, todo[at : at + stored]))
    return clock


def _round(
    target: Target, names: Sequence[str], scene: Scene, numbers: range, seed: int, log: AttackLog
) -> Iterator[_Query]:
    """The queries of a round that are still to be asked."""
    mine = [row for row in log.tried.rows if row.attack in names]
    fallen = {(row.arm, row.objective) for row in mine if row.succeeded and row.query < numbers.start}
    done = {(row.arm, row.objective, row.query) for row in mine}
    for objective in target.objectives:
        pairs = [d for d in target.defences if (d.kind, objective.key) not in fallen]
        for number in numbers if pairs else ():
            attack, attempt = attempt_of(objective, number, names, scene, seed)
            for defence in pairs:
                if (defence.kind, objective.key, number) not in done:
                    yield _Query(defence, objective, number, attack, attempt)


def _tried(target: Target, queries: Sequence[_Query]) -> list[Tried]:
    asked = [Asked(query.defence.arm, query.objective.prompt, query.attempt) for query in queries]
    said = answers(target.lm, target.saes, asked, target.max_new_tokens, target.batch_rows)
    cases = [(query.objective, answer.text) for query, answer in zip(queries, said, strict=True)]
    rows = []
    for query, answer, judgement in zip(queries, said, judged(target.judge, cases), strict=True):
        rows.append(
            Tried(
                arm=query.defence.kind,
                objective=query.objective.key,
                query=query.number,
                attack=query.attack,
                messages=query.attempt.messages,
                begun=query.attempt.begun,
                reply=answer.text,
                verdict=judgement.verdict,
                succeeded=succeeded(query.objective, answer.text, judgement),
                fired=answer.receipt and answer.receipt.gate_fired,
                gate_score=answer.receipt and answer.receipt.gate_score,
            )
        )
    return rows
