"""Which arms a report opens with, which it is compared with, and which differ in strength only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.results.points import Sides, point
from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import ArmKind


@dataclass(frozen=True, slots=True)
class Headline:
    """The arms that the page opens with: the unsteered model, what always steers, what steers behind a gate, and what a
    search found."""

    baseline: ArmResult | None
    clamp: ArmResult | None
    gated: ArmResult | None
    tuned: ArmResult | None

    @property
    def arms(self) -> tuple[ArmResult, ...]:
        return tuple(arm for arm in (self.baseline, self.clamp, self.gated, self.tuned) if arm is not None)

    @property
    def lead(self) -> ArmResult | None:
        """What the verdict speaks of first; None when nothing was steered."""
        return self.clamp or self.tuned or self.gated

    @property
    def resolved(self) -> ArmResult | None:
        """What is to spare good answers."""
        return self.tuned or self.gated


def headline(run: Run, sides: Sides) -> Headline:
    """The arms to open with: those the run chose, else the strongest of each kind on harmful prompts."""
    by_name = {arm.name: arm for arm in run.arms}
    return Headline(
        next((arm for arm in run.arms if arm.kind is ArmKind.BASELINE), None),
        by_name.get(run.chosen.arm or "") or _like_chosen(run) or _always(run, sides),
        by_name.get(run.chosen.gated_arm or "") or _strongest(run, sides, ArmKind.GATED),
        _strongest(run, sides, ArmKind.TUNED),
    )


def _like_chosen(run: Run) -> ArmResult | None:
    """The arm with the chosen feature and strength, for runs that measured the chosen plan under another name."""
    return next(
        (
            arm for arm in run.arms
            if arm.kind is ArmKind.FEATURE and arm.strength is not None
            and (arm.feature, arm.strength) == (str(run.chosen.feature), run.chosen.strength)
        ),
        None,
    )  # fmt: skip


def _always(run: Run, sides: Sides) -> ArmResult | None:
    """The strongest steered feature; without one, the strongest direction that is no control."""
    directions = [arm for arm in run.arms if arm.kind is ArmKind.DIRECTION and arm.group != "control"]
    return _strongest(run, sides, ArmKind.FEATURE) or (_best(directions, sides) if not _plans(run) else None)


def _plans(run: Run) -> bool:
    return any(arm.kind in (ArmKind.GATED, ArmKind.TUNED) for arm in run.arms)


def _strongest(run: Run, sides: Sides, kind: ArmKind) -> ArmResult | None:
    return _best([arm for arm in run.arms if arm.kind is kind], sides)


def _best(arms: Sequence[ArmResult], sides: Sides) -> ArmResult | None:
    return max(arms, key=lambda arm: point(arm, sides).refusal.value or 0.0, default=None)


def controls(run: Run) -> tuple[ArmResult, ...]:
    """The arms that a claim has to beat: controls, and dense directions as the published baseline."""
    return tuple(arm for arm in run.arms if arm.kind in (ArmKind.CONTROL, ArmKind.DIRECTION))


def strength_curve(run: Run, chosen: ArmResult | None) -> tuple[ArmResult, ...]:
    """Arms that differ from the chosen one in strength only, weakest first: one feature, operator and group."""
    if chosen is None:
        return ()
    key = (chosen.kind, chosen.feature, chosen.operator, chosen.group)
    same = [arm for arm in run.arms if (arm.kind, arm.feature, arm.operator, arm.group) == key]
    return tuple(sorted((arm for arm in same if arm.strength is not None), key=lambda arm: arm.strength or 0.0))
