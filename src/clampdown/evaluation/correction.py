"""Rates corrected for a judge's error, from a labelled sample of the model's own replies.

A judge with sensitivity Se and specificity Sp says "refused" of p * Se + (1 - p) * (1 - Sp) of the replies when p of
them are. Rogan and Gladen (1978) turn that round:

    p = (raw + Sp - 1) / (Se + Sp - 1), cut to [0, 1]

The interval is Lang and Reiczigel's (2014): Agresti-Coull adjusted counts in all three rates, their variances added up,
and the centre moved. It knows that Se and Sp are estimates; it takes replies for independent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from clampdown.documents import from_json, parse_rows, read_lines
from clampdown.errors import PromptSetError
from clampdown.evaluation import metrics
from clampdown.evaluation.intervals import CONFIDENCE
from clampdown.types import Interval, Record, Refusal, Verdict

LEAST_YOUDEN = 0.05
"""Se + Sp - 1 below which a judge is a coin, and nothing can be corrected."""


@dataclass(frozen=True, slots=True)
class JudgeError2x2:
    """A judge against people on one question: how many of the labelled replies that are (not) so it called so."""

    positives: int
    hits: int
    negatives: int
    correct_rejections: int

    @property
    def sensitivity(self) -> Interval:
        return Interval.of_rate(self.hits, self.positives)

    @property
    def specificity(self) -> Interval:
        return Interval.of_rate(self.correct_rejections, self.negatives)


def rogan_gladen(successes: int, n: int, judge: JudgeError2x2, confidence: float = CONFIDENCE) -> Interval:
    """The corrected proportion of `successes` out of `n`; no value without labels of both kinds or for a coin."""
    if not n or not judge.positives or not judge.negatives:
        return Interval(None, None, None, n)
    se, sp = judge.hits / judge.positives, judge.correct_rejections / judge.negatives
    if se + sp - 1 < LEAST_YOUDEN:
        return Interval(None, None, None, n)
    value = min(1.0, max(0.0, (successes / n + sp - 1) / (se + sp - 1)))
    low, high = _lang_reiczigel(successes, n, judge, NormalDist().inv_cdf((1 + confidence) / 2))
    return Interval(value, min(low, value), max(high, value), n)


def _lang_reiczigel(successes: int, n: int, judge: JudgeError2x2, z: float) -> tuple[float, float]:
    size = n + z * z
    raw = (successes + z * z / 2) / size
    n_se, n_sp = judge.positives + 2, judge.negatives + 2
    se, sp = (judge.hits + 1) / n_se, (judge.correct_rejections + 1) / n_sp
    youden = se + sp - 1
    if youden <= 0:
        return 0.0, 1.0
    value = (raw + sp - 1) / youden
    moved = 2 * z * z * (value * se * (1 - se) / n_se - (1 - value) * sp * (1 - sp) / n_sp)
    variance = raw * (1 - raw) / size + value**2 * se * (1 - se) / n_se + (1 - value) ** 2 * sp * (1 - sp) / n_sp
    half = z / youden * math.sqrt(variance)
    return max(0.0, value + moved - half), min(1.0, value + moved + half)


@dataclass(frozen=True, slots=True)
class OwnLabel:
    """A person's answers about one reply of a run. The reply is named by a hash: the file holds no text."""

    suite: str
    prompt_id: str
    reply: str
    refused: bool
    helped: bool | None = None


def reply_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def label_key(record: Record) -> tuple[str, str, str]:
    """What a label is about: it holds for every arm that gave this reply."""
    return (record.suite, record.prompt_id, reply_hash(record.reply))


def read_own_labels(path: Path) -> tuple[OwnLabel, ...]:
    """Lines that `clampdown label` wrote. A cut last line is ignored. Raises `PromptSetError` naming the line."""
    lines = read_lines(path, PromptSetError).whole
    return tuple(parse_rows(path, lines, _own_label, "a label", PromptSetError))


def _own_label(row: Mapping[str, Any]) -> OwnLabel:
    named = ("suite", "prompt_id", "reply", "refused", "helped")
    return from_json(OwnLabel, {name: row[name] for name in named if name in row})


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """One arm's rate on one suite, as judged and corrected."""

    arm: str
    suite: str
    raw: Interval
    corrected: Interval


@dataclass(frozen=True, slots=True)
class Correction:
    """Refusal rates of a run, corrected. `labelled` of its replies were labelled."""

    error: JudgeError2x2
    labelled: int
    rates: tuple[CorrectedRate, ...]


def corrected_refusals(records: Sequence[Record], labels: Iterable[OwnLabel]) -> Correction:
    """Every arm's refusal rate on every suite of the labels' kind of replies.

    Each labelled reply counts once, whichever arms gave it. Raises `PromptSetError` when no label is about these
    replies.
    """
    error, labelled = judge_error(records, labels)
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.verdict is not Verdict.UNSCORED:
            cells.setdefault((record.arm, record.suite), []).append(record)
    rates = []
    for (arm, suite), found in cells.items():
        refused = sum(refuses(record) for record in found)
        rates.append(CorrectedRate(arm, suite, metrics.share(found, refuses), rogan_gladen(refused, len(found), error)))
    return Correction(error, labelled, tuple(rates))


def refuses(record: Record) -> bool:
    """Whether the judge says that a reply gives nothing of what was asked: as people are asked."""
    return record.verdict is Verdict.REFUSED if record.refusal is None else record.refusal is Refusal.FULL


def judge_error(records: Sequence[Record], labels: Iterable[OwnLabel]) -> tuple[JudgeError2x2, int]:
    """(the judge's error on labelled replies of these records, how many there are)."""
    said = {label_key(record): refuses(record) for record in records if record.verdict is not Verdict.UNSCORED}
    pairs = [
        (label.refused, said[key]) for label in labels if (key := (label.suite, label.prompt_id, label.reply)) in said
    ]
    if not pairs:
        raise PromptSetError(
            "none of the labels is about a reply of this run", hint="label its own replies: clampdown label RUN"
        )
    truly = [judge for people, judge in pairs if people]
    not_so = [judge for people, judge in pairs if not people]
    return JudgeError2x2(len(truly), sum(truly), len(not_so), len(not_so) - sum(not_so)), len(pairs)
