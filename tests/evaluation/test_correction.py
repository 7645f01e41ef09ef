"""Rates corrected for a judge's error: exact inversion, coverage, and labels that hold no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clampdown.errors import PromptSetError
from clampdown.evaluation.correction import (
    JudgeError2x2,
    OwnLabel,
    corrected_refusals,
    label_key,
    read_own_labels,
    reply_hash,
    rogan_gladen,
)
from clampdown.types import Record, Split, Verdict


def test_the_correction_inverts_the_error_exactly() -> None:
    """600 refusals of 1000 at sensitivity 0.9 and specificity 0.8 are read as 600 * 0.9 + 400 * 0.2 = 620."""
    assert rogan_gladen(620, 1000, JudgeError2x2(100, 90, 100, 80)).value == pytest.approx(0.6)
    perfect = JudgeError2x2(1000, 1000, 1000, 1000)
    assert rogan_gladen(3, 10, perfect).value == pytest.approx(0.3)
    assert rogan_gladen(0, 100, JudgeError2x2(100, 90, 100, 80)).value == 0.0


def test_a_coin_and_missing_labels_correct_nothing() -> None:
    for judge in (JudgeError2x2(100, 50, 100, 50), JudgeError2x2(0, 0, 10, 9), JudgeError2x2(10, 9, 0, 0)):
        found = rogan_gladen(5, 10, judge)
        assert (found.value, found.low, found.high, found.n) == (None, None, None, 10)
    assert rogan_gladen(0, 0, JudgeError2x2(10, 9, 10, 9)).value is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    se, sp, truth, hits = 0.85, 0.92, 0.3, 0
    for _ in range(600):
        judge = JudgeError2x2(60, int(rng.binomial(60, se)), 90, int(rng.binomial(90, sp)))
        raw = int(rng.binomial(200, truth * se + (1 - truth) * (1 - sp)))
        found = rogan_gladen(raw, 200, judge)
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 600 <= 0.98


def record(arm: str, i: int, verdict: Verdict) -> Record:
    return Record(arm, "s", f"p{i}", Split.TEST, None, f"reply {i}", 4, verdict, None, "j")


def test_labels_of_a_run_correct_every_arm(tmp_path: Path) -> None:
    refused = [Verdict.REFUSED if i < 30 else Verdict.COMPLIED for i in range(60)]
    records = [record(arm, i, verdict) for arm in ("a", "b") for i, verdict in enumerate(refused)]
    labels = [OwnLabel(*label_key(records[i]), i < 27 or i >= 57) for i in range(60)]
    found = corrected_refusals(records, labels)
    assert found.labelled == 60
    assert (found.error.positives, found.error.hits, found.error.negatives) == (30, 27, 30)
    assert [(rate.arm, rate.raw.value, rate.corrected.value) for rate in found.rates] == [
        ("a", 0.5, pytest.approx(0.5)),
        ("b", 0.5, pytest.approx(0.5)),
    ]
    with pytest.raises(PromptSetError, match="none of the labels"):
        corrected_refusals(records, [OwnLabel("s", "p1", reply_hash("another reply"), True)])


@pytest.mark.parametrize("line", ["{}", "no", '{"suite": "s", "prompt_id": "p", "reply": "r", "refused": "yes"}'])
def test_a_line_that_is_no_label_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(PromptSetError, match="line 1"):
        read_own_labels(path)
