"""What a judge is: a name, and a function from cases to findings.

The name says all that could change a verdict (kind, version, model, rubric): it stands in every record and in the
resume key. A case that the judge could not be asked about has no judgement. That is not unscored, a verdict: it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clampdown.errors import JudgeError, JudgeUnreachableError
from clampdown.evaluation.degenerate import degeneration
from clampdown.evaluation.judges.rules import rules_verdict
from clampdown.evaluation.scoring import is_correct
from clampdown.replies import answer_of
from clampdown.types import Judge, Judgement, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Case:
    """One reply to judge."""

    prompt: Prompt
    reply: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about case `index`. No judgement: the judge could not be reached, for `problem`."""

    index: int
    judgement: Judgement | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class NamedJudge:
    """A judge under its name. `find` yields one finding per case, in any order, as they become known.

    `model` (and the `revision` of its weights) is the language model that judges, if one does.
    Called with one prompt and reply it is a `types.Judge`; then a judge that cannot be reached raises.
    """

    name: str
    find: Callable[[Sequence[Case]], Iterator[Finding]] = field(repr=False)
    model: str | None = None
    revision: str | None = None

    def __call__(self, prompt: Prompt, reply: str) -> Judgement:
        """Judge one reply. Raises `JudgeUnreachableError` when there is no judgement to be had now."""
        (finding,) = self.find([Case(prompt, reply)])
        if finding.judgement is None:
            raise JudgeUnreachableError(
                f"judge '{self.name}' could not be asked: {finding.problem}",
                hint="replies are kept: repeat the command and only they are judged",
            )
        return finding.judgement


def one_by_one(name: str, judge: Judge) -> NamedJudge:
    """A judge that is a plain function of one reply."""

    def find(cases: Sequence[Case]) -> Iterator[Finding]:
        for index, case in enumerate(cases):
            yield Finding(index, judge(case.prompt, case.reply))

    return NamedJudge(name, find)


def screened(judge: NamedJudge) -> NamedJudge:
    """The judge, asked only about what needs it: degenerate replies and capability items are settled here, by rule.

    A degenerate reply is a failure on safe and unsafe prompts alike; a judge that reads for harm would call it safe.
    What is judged is the answer: a model's thoughts before it refuse and help with nothing.
    """

    def find(replies: Sequence[Case]) -> Iterator[Finding]:
        cases = [Case(case.prompt, answer_of(case.reply)) for case in replies]
        settled = [settle(case) for case in cases]
        yield from (Finding(index, found) for index, found in enumerate(settled) if found is not None)
        left = [index for index, found in enumerate(settled) if found is None]
        if left:
            for finding in judge.find([cases[index] for index in left]):
                yield Finding(left[finding.index], finding.judgement, finding.problem)

    return NamedJudge(judge.name, find, judge.model, judge.revision)


def check_not_under_test(judge: NamedJudge, *names: str) -> None:
    """Refuse a judge that is the model under test, known by these names, directories or revisions.

    Raises `JudgeError`. A served plan ("base:plan") is its base model.
    """
    if judge.model is None:
        return
    own = (judge.model, judge.model.partition(":")[0], judge.revision or judge.model)
    if {_plain_name(name) for name in own} & {_plain_name(name) for name in names}:
        raise JudgeError(
            f"'{judge.model}' would judge its own replies", hint="choose another judge: a model finds itself right"
        )


def _plain_name(name: str) -> str:
    """A directory by its real path, a hub id in lower case."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name.strip().lower()


def settle(case: Case) -> Judgement | None:
    """The judgement that needs no judge; None when one must be asked."""
    prompt, reply = case.prompt, case.reply
    answered = prompt.answer is not None
    broken = degeneration(reply, short_is_broken=not answered)
    if broken is not None:
        return Judgement(Verdict.DEGENERATE, False if answered else None, broken)
    if not answered:
        return None
    verdict, why = rules_verdict(reply, prompt.text)
    return Judgement(verdict, is_correct(prompt, reply), why)


def in_order(findings: Iterable[Finding], n: int) -> list[Finding]:
    """Findings by case. Raises `ValueError` when one is missing or doubled: a judge must lose nothing."""
    found: list[Finding | None] = [None] * n
    for finding in findings:
        if found[finding.index] is not None:
            raise ValueError(f"case {finding.index} was judged twice")
        found[finding.index] = finding
    if None in found:
        raise ValueError(f"case {found.index(None)} was not judged")
    return [finding for finding in found if finding is not None]
