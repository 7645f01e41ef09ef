"""The whole job, and the search for the best plan within budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.interactive.given import directory_for, progress, study_of
from clampdown.interactive.loading import AnySae, Judged, Model
from clampdown.results.run import Run
from clampdown.steering.plan import Plan, read_plan
from clampdown.store import write_feature_set
from clampdown.study.budgets import Budgets
from clampdown.study.planned import run_sized
from clampdown.study.prompts import StudyPrompts
from clampdown.study.run import StudyRequest
from clampdown.study.sizes import Sizes, size_named
from clampdown.types import FeatureSet


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search ended with: the plan that refuses most within the budgets, and the run on test prompts."""

    plan: Plan
    run: Run


def tune(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    budgets: Budgets | None = None,
    *,
    features: FeatureSet | Path | None = None,
    trials: int | None = None,
    quick: bool = False,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Tuned:
    """Search features, operators, strengths, scopes and gates for the plan that refuses most within the budgets.

    Raises `NotEnoughDataError` when the prompts cannot prove the budgets, or no plan holds them.
    """
    from clampdown.study.tune import run as tuning
    from clampdown.study.tune.prompts import FULL, QUICK
    from clampdown.study.tune.space import Choices

    directory = directory_for(out, "tune")
    scale = QUICK if quick else FULL
    scale = replace(scale, trials=trials or scale.trials)
    choices = Choices(_features_file(features, directory))
    request = tuning.Request(budgets or Budgets(), choices, scale)
    found = tuning.run_tune(study_of(lm, sae, data, judge, seed), request, directory, progress())
    return Tuned(read_plan(directory / "plan.toml"), found)


def run_study(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    *,
    size: str | Sizes = "small",
    methods: Sequence[str] | None = None,
    minutes: float | None = None,
    judge: Judged = None,
    out: str | Path | None = None,
    seed: int = 0,
) -> Run:
    """The main job: find, choose, sweep, gate, control, read the test prompts once. The report lies in `out`."""
    sizes = size_named(size) if isinstance(size, str) else size
    request = StudyRequest(sizes, None if methods is None else tuple(methods))
    found, directory = study_of(lm, sae, data, judge, seed), directory_for(out, "study")
    ran = run_sized(found, request, directory, progress(), minutes=minutes)
    ran.report()
    return ran


def _features_file(features: FeatureSet | Path | None, directory: Path) -> Path | None:
    if features is None or isinstance(features, Path):
        return features
    path = directory / "given-features.json"
    write_feature_set(path, features)
    return path
