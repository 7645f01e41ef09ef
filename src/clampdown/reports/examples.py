"""The same prompt under the baseline and under the steered arms, and what changed between them.

A *change* compares one prompt's record under an arm with its record under the baseline. Examples of a suite are
bucketed by what each steered arm changed, so that flips in both directions are seen with their counts, whatever
their number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from clampdown.reports.comparison import Headline
from clampdown.results.points import Sides
from clampdown.results.run import Run
from clampdown.types import Message, Record, Verdict

PER_BUCKET = 2
BUCKETS_PER_SUITE = 5
LONGEST_REPLY = 900


class Change(StrEnum):
    """What an arm did to one prompt's outcome, most telling first."""

    NOW_REFUSES = "now refuses"
    STOPS_REFUSING = "no longer refuses"
    LOST = "answer lost"
    GAINED = "answer gained"
    BROKE = "breaks"
    SAME = "unchanged"


@dataclass(frozen=True, slots=True)
class Reply:
    """One arm's reply. `change` is None for the baseline."""

    arm: str
    text: str
    verdict: Verdict
    correct: bool | None
    touched: bool | None
    change: Change | None


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the headline arms' replies, the baseline's first. Without turns only its id is known."""

    prompt_id: str
    turns: tuple[Message, ...]
    replies: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Prompts with the same changes, in the arms' order; `count` of them, of which a few are shown."""

    changes: tuple[Change, ...]
    count: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class SuiteExamples:
    """A suite's buckets; `n` prompts in all, `arms` names the replies' columns."""

    suite: str
    n: int
    arms: tuple[str, ...]
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Paired:
    """All prompts of a suite that every headline arm answered: one tuple of records each, the baseline's first."""

    suite: str
    rows: tuple[tuple[Record, ...], ...]

    def counts(self, position: int) -> Counter[Change]:
        """How often the arm at `position` (1 = first steered arm) made each change."""
        return Counter(change_between(row[0], row[position]) for row in self.rows)


def change_between(before: Record, after: Record) -> Change:
    """Right or wrong decides where there is a right answer; elsewhere the verdict does."""
    if before.correct is not None and after.correct is not None:
        if before.correct == after.correct:
            return Change.SAME
        return Change.GAINED if after.correct else Change.LOST
    was, is_now = before.verdict is Verdict.REFUSED, after.verdict is Verdict.REFUSED
    if is_now and not was:
        return Change.NOW_REFUSES
    if after.verdict is Verdict.DEGENERATE and before.verdict is not Verdict.DEGENERATE:
        return Change.BROKE
    return Change.STOPS_REFUSING if was and not is_now else Change.SAME


def pair(run: Run, found: Headline, sides: Sides) -> tuple[Paired, ...]:
    """Records of the headline arms, prompt by prompt, for every suite that all of them answered."""
    names = [arm.name for arm in found.arms]
    if found.baseline is None or len(names) < 2:
        return ()
    cells: Mapping[str, dict[str, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in run.records:
        if record.arm in names:
            cells[record.suite][record.prompt_id][record.arm] = record
    order = [*sides.harmful, *sides.answerable, *sides.capability]
    suites = [name for name in order if name in cells] + [name for name in cells if name not in order]
    paired = (Paired(suite, _complete(cells[suite], names)) for suite in suites)
    return tuple(each for each in paired if each.rows)


def _complete(by_prompt: Mapping[str, Mapping[str, Record]], names: Sequence[str]) -> tuple[tuple[Record, ...], ...]:
    return tuple(
        tuple(records[name] for name in names)
        for records in by_prompt.values()
        if all(name in records for name in names)
    )


def examples_of(
    paired: Paired, labels: Sequence[str], prompts: Mapping[tuple[str, str], tuple[Message, ...]]
) -> SuiteExamples:
    """Bucket a suite's prompts by what each steered arm changed; changed ones first, largest bucket first. Every
    kind of change that any arm made is among those shown, however rare: flips one way must not hide the other way's.
    """
    buckets: dict[tuple[Change, ...], list[tuple[Record, ...]]] = defaultdict(list)
    for row in paired.rows:
        buckets[tuple(change_between(row[0], after) for after in row[1:])].append(row)
    order = sorted(buckets, key=lambda changes: (all(c is Change.SAME for c in changes), -len(buckets[changes])))
    shown = (
        Bucket(
            changes,
            len(buckets[changes]),
            tuple(_example(row, labels, prompts) for row in buckets[changes][:PER_BUCKET]),
        )
        for changes in _shown(order)
    )
    return SuiteExamples(paired.suite, len(paired.rows), tuple(labels), tuple(shown))


def _shown(order: Sequence[tuple[Change, ...]]) -> list[tuple[Change, ...]]:
    """The first buckets, and further ones as long as an arm's change is in none of those taken."""
    taken = list(order[:BUCKETS_PER_SUITE])
    seen = {made for changes in taken for made in enumerate(changes)}
    for changes in order[BUCKETS_PER_SUITE:]:
        fresh = set(enumerate(changes)) - seen
        if any(change is not Change.SAME for _, change in fresh):
            taken.append(changes)
            seen |= fresh
    return taken


def _example(
    row: Sequence[Record], labels: Sequence[str], prompts: Mapping[tuple[str, str], tuple[Message, ...]]
) -> Example:
    replies = tuple(
        Reply(
            label,
            _shorten(record.reply),
            record.verdict,
            record.correct,
            None if record.receipt is None or index == 0 else record.receipt.tokens_touched > 0,
            None if index == 0 else change_between(row[0], record),
        )
        for index, (record, label) in enumerate(zip(row, labels, strict=True))
    )
    return Example(row[0].prompt_id, prompts.get((row[0].suite, row[0].prompt_id), ()), replies)


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_REPLY else text[:LONGEST_REPLY] + " …"
