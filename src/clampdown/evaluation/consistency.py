"""How steady a judge is: the same reply again, retyped, reworded and longer should get the same verdict.

    again       the same reply a second time: a judge that samples may differ from itself
    retyped     curly quotes, emphasis, line breaks: typography says nothing
    reworded    phrases exchanged for others of the same meaning
    longer      a neutral sentence before and one after

A changed verdict is an error of the judge whatever the truth is, so no labels are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from clampdown.errors import JudgeUnreachableError
from clampdown.evaluation.judges.interface import Case, NamedJudge
from clampdown.types import Interval, Judgement, Verdict

Change = Callable[[str], str]

_PHRASES = {
    "cannot": "am not able to", "can't": "am unable to", "i'm sorry": "my apologies", "provide": "give",
    "assist": "help", "information": "details", "instructions": "directions", "however": "that said",
    "illegal": "against the law", "important": "essential", "purchase": "buy", "obtain": "get", "utilize": "use",
    "additionally": "also", "various": "several", "ensure": "make sure", "begin": "start", "large": "big",
}  # fmt: skip
_PHRASE = re.compile(r"\b(?:" + "|".join(map(re.escape, _PHRASES)) + r")\b", re.IGNORECASE)


def retyped(reply: str) -> str:
    """The reply as another program would set it: typographic quotes, its first word in bold, spaces as line breaks
    after commas."""
    first = re.sub(r"^(\s*)(\S+)", r"\1**\2**", reply.replace("'", "\u2019"), count=1)
    return first.replace(", ", ",\n", 2)


def reworded(reply: str) -> str:
    """The reply with phrases exchanged for others of the same meaning."""

    def other(match: re.Match[str]) -> str:
        found = _PHRASES[match[0].lower()]
        return found[0].upper() + found[1:] if match[0][0].isupper() else found

    return _PHRASE.sub(other, reply)


def longer(reply: str) -> str:
    """The reply between two sentences that say nothing."""
    return f"Thank you for your message.\n\n{reply}\n\nThat is all that there is to say about it."


CHANGES: dict[str, Change] = {"again": lambda reply: reply, "retyped": retyped, "reworded": reworded, "longer": longer}


@dataclass(frozen=True, slots=True)
class Consistency:
    """Share of verdicts that a change of the reply left as they were, by change; `moved` counts verdict -> verdict.

    `n` of an interval counts replies that the change changed (all of them for "again") and the judge scored both times.
    """

    kept: Mapping[str, Interval]
    moved: Mapping[str, Mapping[str, int]]


def consistency(
    judge: NamedJudge, cases: Sequence[Case], on_progress: Callable[[int, int], None] | None = None
) -> Consistency:
    """Ask about every reply and its changes. Raises `JudgeUnreachableError` when any could not be judged."""
    first = _verdicts(judge, cases)
    kept, moved = {}, {}
    for done, (name, change) in enumerate(CHANGES.items(), 1):
        changed = [Case(case.prompt, change(case.reply)) for case in cases]
        asked = [i for i, case in enumerate(cases) if name == "again" or changed[i].reply != case.reply]
        second = _verdicts(judge, [changed[i] for i in asked])
        pairs = [
            (first[i], after)
            for i, after in zip(asked, second, strict=True)
            if Verdict.UNSCORED not in (first[i], after)
        ]
        same = sum(before is after for before, after in pairs)
        kept[name] = Interval.of_rate(same, len(pairs))
        moved[name] = _moves(pairs)
        if on_progress:
            on_progress(done, len(CHANGES))
    return Consistency(kept, moved)


def _moves(pairs: Sequence[tuple[Verdict, Verdict]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for before, after in pairs:
        if before is not after:
            key = f"{before.value} -> {after.value}"
            found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _verdicts(judge: NamedJudge, cases: Sequence[Case]) -> list[Verdict]:
    found: list[Judgement | None] = [None] * len(cases)
    for finding in judge.find(cases):
        if finding.judgement is None:
            raise JudgeUnreachableError(f"judge '{judge.name}' could not be asked: {finding.problem}")
        found[finding.index] = finding.judgement
    return [judgement.verdict for judgement in found if judgement is not None]
