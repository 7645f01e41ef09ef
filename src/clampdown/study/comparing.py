"""Methods side by side: each at its own best strength, and all at one benign KL, beside random features.

1. Every method proposes arms at several strengths; one run on validation prompts chooses each method's own best.
2. The ungated best of each is also brought to one benign KL, so that methods are compared at equal harm.
3. Random features are brought to that KL too: a method that does not beat them found nothing.
4. `claims` of both papers are tested on the test records, and the table says which are reproduced here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.discovery.screening import BenignKl, Text
from clampdown.errors import StrengthError
from clampdown.evaluation import controls, utility
from clampdown.evaluation.control_arms import RANDOM, Control, Matching, Material, control_arms
from clampdown.models.chat import encode
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.study.claims import Arms, Claim, claims
from clampdown.study.groundwork import Groundwork
from clampdown.study.measure import benign_replies, generate_records
from clampdown.study.methods import clamp, dense, gated_set, refine, two_sided
from clampdown.study.methods.gated_set import at_strengths, opened
from clampdown.study.methods.method import Method, Picked, plan_of
from clampdown.study.methods.table import METHODS
from clampdown.study.strengths import candidates
from clampdown.study.study import Study
from clampdown.types import ATTACKS, SAFE, ArmKind, Split

MATCHED = "at equal KL"
NOT_MATCHED = "was not asked to be matched"


@dataclass(frozen=True, slots=True)
class MatchingRequest:
    """`kl`: nats per token of benign text at which methods are matched, measured on `texts` unsteered replies;
    `methods`: which ones are (None: all)."""

    kl: float = 0.02
    texts: int = 24
    methods: tuple[str, ...] | None = None

    def wants(self, column: str) -> bool:
        """Whether the method of this column is matched."""
        return self.methods is None or column in {METHODS[name].name for name in self.methods}


@dataclass(frozen=True, slots=True)
class Line:
    """A method's arms in the table: its own best, and the same at equal benign KL (None, with the reason)."""

    method: str
    best: str
    matched: str | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Each method's own best, all arms of the test, which of them belong to which method, and the controls."""

    chosen: Mapping[str, Picked]
    arms: tuple[Arm, ...]
    lines: tuple[Line, ...]
    random: tuple[str, ...]
    kl: float

    @property
    def best(self) -> Plan | None:
        """The two-sided plan, else the gated set's, if there is one."""
        picked = self.chosen.get(two_sided.NAME) or self.chosen.get(gated_set.NAME)
        return plan_of(picked.arm) if picked else None

    @property
    def claimed(self) -> Arms | None:
        """The arms that both papers' claims are about; None when one of the papers' methods is not there."""
        if clamp.NAME not in self.chosen or refine.NAME not in self.chosen:
            return None
        matched = next(line.matched for line in self.lines if line.method == clamp.NAME)
        return Arms(clamp.NAME, matched, refine.NAME, f"{refine.NAME}, {refine.TURNED}", self.random)


def claims_on(run: Run, arms: Arms | None) -> tuple[Claim, ...]:
    """Both papers' claims on a run's test records; none without their arms."""
    if arms is None:
        return ()
    summary = run.to_json()
    return claims(summary["arms"], summary["harmful_suites"], arms)


def compare_methods(
    ground: Groundwork, reading: Study, found: Sequence[Method], directory: Path, request: MatchingRequest
) -> Comparison:
    """Choose on validation prompts (a run in `directory`), match, and put the columns together. `reading` is the study
    with every SAE that a method's gate reads."""
    chosen = choose_all(ground, reading, found, directory)
    with ground.stages.stage("Matching at equal KL"):
        suites = ground.study.data.known(Split.VALIDATION, request.texts, *SAFE)
        answering = replace(ground.sizes.answering, kl_prompts=request.texts)
        forced = benign_replies(ground.study.lm, suites, answering)
        measure = kl_measure(ground.study, forced)
        matched = {
            name: match(one.arm, measure, request.kl) if request.wants(name) else NOT_MATCHED
            for name, one in chosen.items()
        }
        wanted = Matching("benign KL", measure, ground.sizes.n_random, ground.study.seed)
        random = random_controls(ground, matched, wanted)
    lines = tuple(_line(name, one, matched[name]) for name, one in chosen.items())
    arms: list[Arm] = [dense.ablated_direction(ground)]
    for name, picked in chosen.items():
        arms += [picked.arm, *([one] if isinstance(one := matched[name], Arm) else [])]
    if refine.NAME in chosen:
        arms.append(refine.turned(chosen[refine.NAME].arm))
    arms += [*random, *other_sides(found, chosen)]
    return Comparison(chosen, tuple(arms), lines, tuple(arm.name for arm in random), request.kl)


def kl_measure(study: Study, replies: Sequence[utility.Forced]) -> Callable[[Plan], float]:
    """A plan's KL(unsteered || steered) on these replies, nats per token: `utility.benign_kl`, with what no plan at the
    study's site can change computed once for all the plans that matching tries."""
    lm = study.lm
    texts = [Text.answered(encode(lm, one.prompt.messages), one.reply, ended=one.ended) for one in replies]
    measure = BenignKl.of_texts(lm, study.sae, texts)
    return lambda plan: measure([plan])[0]


def choose_all(ground: Groundwork, reading: Study, found: Sequence[Method], directory: Path) -> dict[str, Picked]:
    """Each method's own best on validation prompts, and what is to be said about it."""
    sizes = ground.sizes
    suites = reading.data.known(Split.VALIDATION, sizes.validation, *ATTACKS, *SAFE)
    arms = [BASELINE, *(arm for method in found for arm in method.arms)]
    answering = replace(sizes.answering, per_suite=sizes.validation)
    records = generate_records(
        reading, arms, suites, directory, answering, ground.stages, "Choosing methods on validation"
    )
    (unsteered,) = candidates([BASELINE], records, suites)
    return {
        method.name: method.chosen(candidates(method.arms, records, suites), unsteered).as_column(method)
        for method in found
    }


def other_sides(found: Sequence[Method], chosen: Mapping[str, Picked]) -> tuple[Arm, ...]:
    """Gated plans with the other number of sides, which were not chosen: what the second branch buys and costs."""
    others = {gated_set.NAME: _other_side, two_sided.NAME: lambda arm: arm}
    return tuple(
        others[method.name](arm)
        for method in found
        for arm in method.arms
        if method.name in others and plan_of(arm).digest != plan_of(chosen[method.name].arm).digest
    )


def _other_side(arm: Arm) -> Arm:
    name = f"{gated_set.NAME}, {'two' if plan_of(arm).otherwise else 'one'}-sided"
    return replace(arm, name=name, kind=ArmKind.GATED, plan=plan_of(arm).named(name))


def match(arm: Arm, measure: Callable[[Plan], float], goal: float) -> Arm | str:
    """The arm at the goal, its gate open while it is measured; or why it cannot be brought there."""
    plan = plan_of(arm)
    try:
        found = controls.matched_plan(opened(plan), measure, goal)
    except StrengthError as error:
        return error.message
    name = f"{arm.name} {MATCHED}"
    return replace(arm, name=name, plan=at_strengths(plan, found.plan, name), strength=found.plan.edits[0].strengths[0])


def random_controls(ground: Groundwork, matched: Mapping[str, Arm | str], matching: Matching) -> list[Arm]:
    """Random features at the same KL, in the place of the first matched clamp's feature; none without a clamp."""
    clamps = [arm for arm in matched.values() if isinstance(arm, Arm) and len(plan_of(arm).edits[0].features) == 1]
    if not clamps or not matching.n_random:
        return []
    rows: tuple[Control, ...] = control_arms(opened(plan_of(clamps[0])), Material(ground.table, None), matching)
    for row in rows:
        if row.note and row.name.startswith(RANDOM) and row.arm is None:
            ground.stages.leave_out("random features at the methods' KL", row.note)
    return [row.arm for row in rows if row.arm and row.name.startswith(RANDOM)]


def _line(name: str, picked: Picked, matched: Arm | str) -> Line:
    if isinstance(matched, Arm):
        return Line(name, picked.arm.name, matched.name, picked.note)
    return Line(name, picked.arm.name, None, "; ".join(filter(None, (picked.note, matched))))
