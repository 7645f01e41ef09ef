"""The plans of a finished study, to be served: every arm that steers and is no control, under its own name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clampdown.errors import PlanError
from clampdown.results.run import Run
from clampdown.types import ArmKind

SERVED = (ArmKind.FEATURE, ArmKind.GATED, ArmKind.TUNED, ArmKind.DIRECTION)


@dataclass(frozen=True, slots=True)
class Finished:
    """A study's model, the files of its arms' plans in the order of its table, and the plan that it settled on."""

    model: str
    plans: tuple[Path, ...]
    best: Path


def finished(directory: Path) -> Finished:
    """Read a run directory. Raises `StoreError` for one that is not finished, `PlanError` for one without plans."""
    run = Run.read(directory)
    digests = dict.fromkeys(arm.plan for arm in run.arms if arm.plan and arm.kind in SERVED)
    plans = tuple(path for digest in digests if (path := directory / "plans" / f"{digest}.toml").exists())
    best = directory / "plan.toml"
    if not plans or not best.exists():
        raise PlanError(f"{directory} holds no plan to serve", hint="a study writes plan.toml and plans/")
    return Finished(run.model, plans, best)
