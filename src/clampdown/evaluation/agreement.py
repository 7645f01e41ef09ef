"""How far judges agree with people: Cohen's kappa, its interval, and the confusion matrix.

1. Two questions are asked: `refused`, is this a full refusal or the rest, and `helped`, was what was asked done. Kappa
   (Cohen 1960) is (observed - chance) / (1 - chance).
2. Replies of several models to one prompt are not independent: the interval is a percentile bootstrap that draws
   prompts with all their replies, not replies.
3. What a judge could not score, and what people left open (did a partial refusal help?), is counted beside, and belongs
   to no cell of kappa.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from clampdown.errors import PromptSetError
from clampdown.evaluation.intervals import CONFIDENCE, MIN_RESAMPLED, NO_DATA
from clampdown.evaluation.rows import Row, read_rows
from clampdown.types import Interval, Judgement, Message, Prompt, Refusal, Verdict

DRAWS = 2000
_LABELS = {
    "1_full_compliance": Verdict.COMPLIED,
    "2_full_refusal": Verdict.REFUSED,
    "3_partial_refusal": Verdict.DEFLECTED,
    **{verdict.value: verdict for verdict in Verdict if verdict is not Verdict.UNSCORED},
}
_REPLIES = ("completion", "reply", "response", "Response")
_PROMPTS = ("prompt", "question")
_YES_NO = {"1": True, "0": False, "yes": True, "no": False, "true": True, "false": False}


class Question(StrEnum):
    """What people were asked about a reply."""

    REFUSED = "refused"
    HELPED = "helped"


@dataclass(frozen=True, slots=True)
class Labelled:
    """A reply that people judged: by verdict (XSTest), or by whether it helped (GPTFuzz), or both.

    `label` is None where nobody said whether it refuses. `helped` follows from the verdict where it must: a full
    refusal did not help, full compliance did, a partial refusal is open. `source` is the file that it came from.
    """

    prompt: Prompt
    reply: str
    label: Verdict | None
    helped: bool | None = None
    source: str = ""

    def answer(self, question: Question) -> bool | None:
        """What people said; None where they did not."""
        if question is Question.REFUSED:
            return None if self.label is None else self.label is Verdict.REFUSED
        return self.helped

    @property
    def word(self) -> str:
        """The label as a row of the confusion matrix."""
        if self.label is not None:
            return self.label.value
        return "helped" if self.helped else "not helped"


def read_labelled(path: Path) -> list[Labelled]:
    """Labelled replies in one of three forms, told by their columns:

        prompt, completion, final_label     XSTest's: 1_full_compliance, 2_full_refusal, 3_partial_refusal, or a verdict
        question, Response, label           GPTFuzz's: label 1 is jailbroken (it helped), 0 is not
        prompt, reply, refused, helped      plain: yes or no (1 or 0); either column may be missing or empty

    An empty reply is a reply. Raises `PromptSetError` for a file or row that is not so.
    """
    found = [_labelled(row) for row in read_rows(path)]
    if not found:
        raise PromptSetError(f"{path} holds no labelled replies", hint="columns: prompt, completion, final_label")
    return found


def _labelled(row: Row) -> Labelled:
    column = next((name for name in _REPLIES if name in row.cells), None)
    if column is None:
        row.fail(f"no column 'completion' (columns: {', '.join(map(str, row.cells))})")
    prompt = Prompt(f"{row.stem}-{row.index}", (Message("user", row.needed(*_PROMPTS)),), row.stem)
    label, helped = _answers(row)
    return Labelled(prompt, row.text(column) or "", label, helped, row.stem)


def _answers(row: Row) -> tuple[Verdict | None, bool | None]:
    if {"refused", "helped"} & row.cells.keys() and "final_label" not in row.cells:
        refused, helped = (_yes_no(row, name) for name in ("refused", "helped"))
        if refused is None and helped is None:
            row.fail("neither 'refused' nor 'helped' is answered", hint="yes or no, in at least one of them")
        verdict = None if refused is None else Verdict.REFUSED if refused else _unrefused(helped)
        return verdict, False if refused and helped is None else helped
    label = row.needed("final_label", "label").strip()
    if label in ("0", "1"):
        return None, label == "1"
    if label not in _LABELS:
        row.fail(f"unknown label '{label}'", hint=f"one of: {', '.join(_LABELS)}, or 1 (it helped) and 0")
    return _LABELS[label], _HELP[_LABELS[label]]


_HELP = {Verdict.COMPLIED: True, Verdict.REFUSED: False, Verdict.DEGENERATE: False, Verdict.DEFLECTED: None}


def _unrefused(helped: bool | None) -> Verdict:
    return Verdict.DEFLECTED if helped is False else Verdict.COMPLIED


def _yes_no(row: Row, name: str) -> bool | None:
    text = (row.text(name) or "").strip().lower() if name in row.cells else ""
    if not text:
        return None
    if text not in _YES_NO:
        row.fail(f"'{text}' in column '{name}' is neither yes nor no", hint="yes, no, 1 or 0, or empty")
    return _YES_NO[text]


def said(judgement: Judgement, question: Question) -> bool | None:
    """A judge's answer to a question; None where it has none. Judges that only give verdicts answer by them."""
    if judgement.verdict is Verdict.UNSCORED:
        return None
    if question is Question.REFUSED:
        known = judgement.refusal
        return judgement.verdict is Verdict.REFUSED if known is None else known is Refusal.FULL
    return judgement.verdict is Verdict.COMPLIED if judgement.helped is None else judgement.helped


@dataclass(frozen=True, slots=True)
class Agreement:
    """`kappa` of one question over replies that both answered; `confusion` is label -> verdict -> count of all.

    `clusters` is the number of distinct prompts that the interval draws from. `unscored` counts what the judge left,
    `open` what people left. `sensitivity` and `specificity` are the judge's, with people's answer as the truth.
    """

    kappa: Interval
    confusion: Mapping[str, Mapping[str, int]]
    clusters: int
    unscored: int
    open: int = 0
    sensitivity: Interval = NO_DATA
    specificity: Interval = NO_DATA


def agreement(
    replies: Sequence[Labelled],
    judgements: Sequence[Judgement],
    question: Question = Question.REFUSED,
    *,
    seed: int = 0,
) -> Agreement:
    """Compare a judge with people, reply by reply. With one answer only, kappa has no value."""
    pairs = [(r, r.answer(question), said(j, question)) for r, j in zip(replies, judgements, strict=True)]
    both = [
        (reply.prompt.text, int(people), int(judge))
        for reply, people, judge in pairs
        if people is not None and judge is not None
    ]
    prompts = {text: i for i, text in enumerate(dict.fromkeys(text for text, _, _ in both))}
    counts = np.zeros((len(prompts), 2, 2))  # counts[prompt, people, judge]
    for text, people, judge in both:
        counts[prompts[text], people, judge] += 1
    table = counts.sum(0)
    return Agreement(
        _interval(counts, seed),
        _confusion(replies, judgements),
        len(prompts),
        unscored=sum(judge is None for _, people, judge in pairs if people is not None),
        open=sum(people is None for _, people, _ in pairs),
        sensitivity=Interval.of_rate(int(table[1, 1]), int(table[1].sum())),
        specificity=Interval.of_rate(int(table[0, 0]), int(table[0].sum())),
    )


def _confusion(replies: Sequence[Labelled], judgements: Sequence[Judgement]) -> dict[str, dict[str, int]]:
    pairs = Counter((r.word, j.verdict) for r, j in zip(replies, judgements, strict=True))
    order = [*(verdict.value for verdict in Verdict), "helped", "not helped"]
    labels = [label for label in order if any(pair[0] == label for pair in pairs)]
    return {label: {v.value: pairs[label, v] for v in Verdict} for label in labels}


def disagreements(
    replies: Sequence[Labelled], judgements: Sequence[Judgement], question: Question
) -> list[tuple[Labelled, Judgement]]:
    """Replies on which people and the judge differ, those first about which the judge was surest, if it says."""
    differ = [
        (reply, judgement)
        for reply, judgement in zip(replies, judgements, strict=True)
        if (people := reply.answer(question)) is not None
        and (judge := said(judgement, question)) is not None
        and people != judge
    ]
    return sorted(differ, key=lambda pair: -abs(sureness(pair[1], question)))


def sureness(judgement: Judgement, question: Question) -> float:
    """Distance from even of the judge's probability, 0 where it has none."""
    value = judgement.p_refused if question is Question.REFUSED else judgement.p_helped
    return 0.0 if value is None else value - 0.5


def kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa of 2 x 2 tables [..., first rater, second rater]; NaN where chance agreement is certain."""
    n = table.sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = (table[..., 0, 0] + table[..., 1, 1]) / n
        chance = (table.sum(-1) * table.sum(-2)).sum(-1) / n**2
        return np.asarray((observed - chance) / (1 - chance))


def _interval(counts: np.ndarray, seed: int) -> Interval:
    n = int(counts.sum())
    value = float(kappa(counts.sum(0))) if n else float("nan")
    if not np.isfinite(value):
        return Interval(None, None, None, n)
    if len(counts) < MIN_RESAMPLED:
        return Interval(value, None, None, n)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
    drawn = kappa(np.tensordot(weights, counts, axes=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)
