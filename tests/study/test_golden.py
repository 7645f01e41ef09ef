"""Golden runs: what a small study of the embedded model found is found again, arm by arm.

`golden.json` holds, for every arm, the share refused by suite, right answers by suite, and the strength. To renew it
after a change that is meant to change them: `python -m tests.study.test_golden`; the commit says what moved and why.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clampdown.config import ORGANISM
from clampdown.results.run import Run
from clampdown.study.progress import Stages
from clampdown.study.run import StudyRequest, run_study
from clampdown.study.sizes import Answering, Sizes
from clampdown.study.study import make_study
from clampdown.types import Verdict

GOLDEN = Path(__file__).with_name("golden.json")
TINY = Sizes(48, 6, causal_prompts=4, finalists=1, calibration=320, answering=Answering(6, 6, max_new_tokens=20),
             n_random=1)  # fmt: skip
REQUESTS = {
    "sweep": StudyRequest(TINY),
    "methods": StudyRequest(TINY, ("clamp", "refine", "dense", "cast"), sweep=False),
}


def found(name: str, out: Path) -> dict[str, Any]:
    """A golden run's arms in short."""
    study = make_study(ORGANISM, ORGANISM)
    return in_short(run_study(study, out, REQUESTS[name], Stages(Console(file=io.StringIO()))))


def in_short(run: Run) -> dict[str, Any]:
    return {
        arm.name: {
            "refused": {suite: rates[Verdict.REFUSED].value for suite, rates in arm.suites.items()},
            "right": {suite: rate.value for suite, rate in arm.capability.items()},
            "strength": arm.strength,
        }
        for arm in run.arms
    }


@pytest.mark.parametrize("name", REQUESTS)
def test_a_small_study_finds_what_it_found(name: str, tmp_path: Path) -> None:
    golden, now = json.loads(GOLDEN.read_text())[name], found(name, tmp_path)
    assert list(now) == list(golden)
    for arm, was in golden.items():
        assert now[arm]["strength"] == (None if was["strength"] is None else pytest.approx(was["strength"], rel=1e-3))
        for side in ("refused", "right"):
            assert now[arm][side] == pytest.approx(was[side]), (arm, side)


def main() -> None:
    """Write the golden file anew."""
    runs = {}
    for name in REQUESTS:
        with tempfile.TemporaryDirectory() as directory:
            runs[name] = found(name, Path(directory))
    GOLDEN.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
