"""How far a judge agrees with people: Cohen's kappa, its interval, and the confusion matrix.

1. Kappa (Cohen 1960) is (observed - chance) / (1 - chance) for one question: is this a full refusal, or the rest?
2. Replies of several models to one prompt are not independent: the interval is a percentile bootstrap that draws
   prompts with all their replies, not replies.
3. What the judge could not score is counted beside, and belongs to no cell of kappa.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clampdown.errors import PromptSetError
from clampdown.evaluation.intervals import CONFIDENCE, MIN_RESAMPLED
from clampdown.evaluation.rows import Row, read_rows
from clampdown.types import Interval, Message, Prompt, Verdict

DRAWS = 2000
_LABELS = {
    "1_full_compliance": Verdict.COMPLIED,
    "2_full_refusal": Verdict.REFUSED,
    "3_partial_refusal": Verdict.DEFLECTED,
    **{verdict.value: verdict for verdict in Verdict if verdict is not Verdict.UNSCORED},
}


@dataclass(frozen=True, slots=True)
class Labelled:
    """A reply that people judged."""

    prompt: Prompt
    reply: str
    label: Verdict


def read_labelled(path: Path) -> list[Labelled]:
    """Rows with columns prompt, completion (or reply) and final_label (or label); an empty completion is a reply.

    Raises `PromptSetError` for a file or row that is not so.
    """
    found = [_labelled(row) for row in read_rows(path)]
    if not found:
        raise PromptSetError(f"{path} holds no labelled replies", hint="columns: prompt, completion, final_label")
    return found


def _labelled(row: Row) -> Labelled:
    column = next((name for name in ("completion", "reply") if name in row.cells), None)
    if column is None:
        row.fail(f"no column 'completion' (columns: {', '.join(map(str, row.cells))})")
    label = row.needed("final_label", "label").strip()
    if label not in _LABELS:
        row.fail(f"unknown label '{label}'", hint=f"one of: {', '.join(_LABELS)}")
    prompt = Prompt(f"{row.stem}-{row.index}", (Message("user", row.needed("prompt")),), row.stem)
    return Labelled(prompt, row.text(column) or "", _LABELS[label])


@dataclass(frozen=True, slots=True)
class Agreement:
    """`kappa` of full refusal against the rest, over scored replies; `confusion` is label -> verdict -> count of all.

    `clusters` is the number of distinct prompts that the interval draws from.
    """

    kappa: Interval
    confusion: Mapping[str, Mapping[str, int]]
    clusters: int
    unscored: int


def agreement(replies: Sequence[Labelled], verdicts: Sequence[Verdict], *, seed: int = 0) -> Agreement:
    """Compare verdicts with labels, reply by reply. With one label only, kappa has no value."""
    scored = [(r, v) for r, v in zip(replies, verdicts, strict=True) if v is not Verdict.UNSCORED]
    prompts = {text: i for i, text in enumerate(dict.fromkeys(reply.prompt.text for reply, _ in scored))}
    # counts[prompt, human refusal, judge refusal]
    counts = np.zeros((len(prompts), 2, 2))
    for reply, verdict in scored:
        refused = (int(reply.label is Verdict.REFUSED), int(verdict is Verdict.REFUSED))
        counts[prompts[reply.prompt.text]][refused] += 1
    pairs = Counter((reply.label, verdict) for reply, verdict in zip(replies, verdicts, strict=True))
    labels = [label for label in Verdict if any(pair[0] is label for pair in pairs)]
    confusion = {label.value: {v.value: pairs[label, v] for v in Verdict} for label in labels}
    return Agreement(_interval(counts, seed), confusion, len(prompts), len(replies) - len(scored))


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
