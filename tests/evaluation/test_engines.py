"""Replies that another engine writes become the same records, under a key of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from clampdown.errors import ClampdownError, StoreError
from clampdown.evaluation.engines import opened
from clampdown.evaluation.runner import Job, Settings, resume_key, run
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, EncodedRow, Reply, generate_batch
from clampdown.store import RecordLog
from tests.evaluation.conftest import arm, clamp, length_judge, suite


class RowByRow:
    """An engine that writes one reply after the other, and counts how many it was asked for at once."""

    label = "row by row"
    rows = 5

    def __init__(self, lm: LanguageModel, sae: Sae) -> None:
        self._lm, self._sae, self.asked = lm, sae, [0]

    def replies(self, batch: Sequence[EncodedRow], max_new_tokens: int) -> list[Reply]:
        self.asked.append(len(batch))
        return [reply for row in batch for reply in generate_batch(self._lm, [self._sae], [row], max_new_tokens)]

    def close(self) -> None:
        self.asked.append(-1)


def test_another_engines_replies_are_recorded_judged_and_resumed(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    own = Job((BASELINE, arm(clamp(6.0), "clamped")), (suite("harmful", 7, harmful=True),), length_judge, "length")
    own = replace(own, settings=Settings(6, 9))
    engine = RowByRow(lm, sae)
    other = replace(own, settings=Settings(6, 9, engine))
    with RecordLog(tmp_path / "own", resume_key(lm, [sae], own)) as log:
        expected = run(lm, [sae], own, log)
    for _ in range(2):
        with RecordLog(tmp_path / "other", resume_key(lm, [sae], other)) as log:
            found = run(lm, [sae], other, log)
    assert [(r.arm, r.prompt_id, r.reply, r.verdict) for r in found] == [
        (r.arm, r.prompt_id, r.reply, r.verdict) for r in expected
    ]
    assert sum(engine.asked) == len(own.rows), "a second run asks for nothing"
    assert max(engine.asked) <= engine.rows
    with pytest.raises(StoreError, match="engine"):
        RecordLog(tmp_path / "own", resume_key(lm, [sae], other))


def test_an_engine_that_is_not_there_is_named(lm: LanguageModel, sae: Sae) -> None:
    with opened(None, lm, [sae], [BASELINE], 10) as engine:
        assert engine is None
    with pytest.raises(ClampdownError, match="no engine 'nowhere'"), opened("nowhere", lm, [sae], [BASELINE], 10):
        pass
