"""Both papers' methods, the dense baselines, the tuned plan and random features in one run, the test split read once.

1. Every method proposes arms at several strengths; one run on validation prompts chooses each method's own best.
2. The ungated best of each is also brought to one benign KL, so that methods are compared at equal harm.
3. Random features are brought to that KL too: a method that does not beat them found nothing.
4. All arms answer the test prompts together; capability is read by generation and by the options' likelihood.
5. `claims` of both papers are tested on the records, and the table says which are reproduced here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.errors import NotEnoughDataError, StrengthError
from clampdown.evaluation import controls, utility
from clampdown.evaluation.control_arms import RANDOM, Control, Matching, Material, control_arms
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.study import demo, experiment, methods, tuned
from clampdown.study.claims import Arms, Claim, claims
from clampdown.study.experiment import Sizes, Subject
from clampdown.study.methods import Bench, Method, Picked
from clampdown.study.progress import Stages
from clampdown.study.strengths import candidates
from clampdown.types import ArmKind, Split

FULL = replace(demo.FULL, validation=40, sizes=Sizes(120, 60))
QUICK = demo.QUICK
MATCHED = "at equal KL"
REVERSED = "signs turned"
DECIDED_ON = (*demo.HARMFUL, "benign", "borderline", "about_harm")


@dataclass(frozen=True, slots=True)
class Request:
    """`kl`: nats per token of benign text at which methods are matched; `n_random`: controls at that KL."""

    kl: float = 0.02
    n_random: int = 20
    matching_texts: int = 24


@dataclass(frozen=True, slots=True)
class Line:
    """A method's arms in the table: its own best, and the same at equal benign KL (None, with the reason)."""

    method: str
    best: str
    matched: str | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """All arms of the test run, which of them belong to which method, and the controls."""

    arms: tuple[Arm, ...]
    lines: tuple[Line, ...]
    random: tuple[str, ...]


def run_compare_methods(
    subject: Subject, out: Path, scale: demo.Scale, request: Request, stages: Stages
) -> dict[str, Any]:
    """Write the run directory; returns the summary. Resumes a run of the same settings that was interrupted."""
    with stages.stage("Reading activations"):
        bench = methods.make_bench(subject, scale)
    found = methods.all_methods(bench, stages)
    reading = replace(subject, more_saes=(bench.condition.sae,))
    chosen = choose_all(reading, found, scale, out / "validation", stages)
    return measure_chosen(bench, chosen, out, request, stages, other_sides(found, chosen))


def other_sides(found: Sequence[Method], chosen: Mapping[str, Picked]) -> tuple[Arm, ...]:
    """The tuned plan with the other number of sides, which was not chosen: what the second branch buys and costs."""
    picked = _plan(chosen[methods.TUNED].arm)
    return tuple(
        replace(arm, name=f"{methods.TUNED}, {'two' if _plan(arm).otherwise else 'one'}-sided", kind=ArmKind.GATED)
        for method in found
        for arm in method.arms
        if method.name == methods.TUNED and _plan(arm).digest != picked.digest
    )


def measure_chosen(
    bench: Bench,
    chosen: Mapping[str, Picked],
    out: Path,
    request: Request,
    stages: Stages,
    also: Sequence[Arm] = (),
) -> dict[str, Any]:
    """Read the test split once, with each method's own best, matched arms, controls and what else is to be shown;
    returns the summary."""
    columns = build_columns(bench, chosen, request, stages)
    columns = replace(columns, arms=(*columns.arms, *also))
    write_plan(out / "plan.toml", _plan(chosen[methods.TUNED].arm))
    sizes = replace(bench.scale.sizes, likelihood=True)
    reading = replace(bench.subject, more_saes=(bench.condition.sae,))
    summary = experiment.measure_arms(reading, columns.arms, out, sizes, stages, lambda _: _extra(columns))
    claimed = paper_claims(summary, columns)
    run = Run.parse(summary).with_parts(methods=columns.lines, claims=claimed, matched_kl=request.kl)
    return run.write(out).to_json()


def choose_all(
    subject: Subject, found: Sequence[Method], scale: demo.Scale, directory: Path, stages: Stages
) -> dict[str, Picked]:
    """Each method's own best on validation prompts, and what is to be said about it."""
    suites = experiment.safety_only(subject.suites(Split.VALIDATION, scale.validation), *DECIDED_ON)
    arms = [BASELINE, *(arm for method in found for arm in method.arms)]
    sizes = replace(scale.sizes, per_suite=scale.validation)
    records = experiment.generate_records(subject, arms, suites, directory, sizes, stages, "Choosing on validation")
    (unsteered,) = candidates([BASELINE], records, suites)
    return {
        method.name: method.chosen(candidates(method.arms, records, suites), unsteered).as_column(method)
        for method in found
    }


def build_columns(bench: Bench, chosen: Mapping[str, Picked], request: Request, stages: Stages) -> Columns:
    """Own bests, the same at equal KL, the second paper's signs turned, random features, and what has no strength."""
    suites = bench.subject.suites(Split.VALIDATION, request.matching_texts)
    sizes = replace(bench.scale.sizes, kl_prompts=request.matching_texts)
    with stages.stage("Matching at equal KL"):
        forced = experiment.benign_replies(bench.subject, suites, sizes)
        measure = utility.benign_kl(bench.subject.lm, [bench.subject.sae], forced)
        matched = {name: match(one.arm, measure, request.kl) for name, one in chosen.items()}
        random = random_controls(bench, matched, Matching("benign KL", measure, request.n_random, bench.subject.seed))
    lines = tuple(_line(name, one, matched[name]) for name, one in chosen.items())
    arms = [BASELINE, controls.system_prompt_arm(demo.SYSTEM_PROMPT), methods.ablated_direction(bench)]
    for name, picked in chosen.items():
        arms += [picked.arm, *([one] if isinstance(one := matched[name], Arm) else [])]
    return Columns((*arms, turned(chosen[methods.SECOND].arm), *random), lines, tuple(arm.name for arm in random))


def match(arm: Arm, measure: Any, goal: float) -> Arm | str:
    """The arm at the goal, its gate open while it is measured; or why it cannot be brought there."""
    plan = _plan(arm)
    try:
        found = controls.matched_plan(_opened(plan), measure, goal)
    except StrengthError as error:
        return error.message
    name = f"{arm.name} {MATCHED}"
    closed = tuned.at_strengths(plan, found.plan, name)
    return replace(arm, name=name, plan=closed, strength=found.plan.edits[0].strengths[0])


def random_controls(bench: Bench, matched: Mapping[str, Arm | str], matching: Matching) -> list[Arm]:
    """Random features at the same KL, in the place of the first matched clamp's feature; none without a clamp."""
    clamps = [arm for arm in matched.values() if isinstance(arm, Arm) and len(_plan(arm).edits[0].features) == 1]
    if not clamps or not matching.n_random:
        return []
    table = demo.feature_table_of(bench.subject, bench.given.contrast)
    rows: tuple[Control, ...] = control_arms(_opened(_plan(clamps[0])), Material(table, None), matching)
    return [row.arm for row in rows if row.arm and row.name.startswith(RANDOM)]


def turned(arm: Arm) -> Arm:
    """The same edit in the other direction."""
    plan = _plan(arm)
    name = f"{arm.name} {REVERSED}"
    opposite = controls.with_strengths(plan, [-s for edit in plan.edits for s in edit.strengths], name)
    return replace(arm, name=name, plan=opposite, strength=opposite.edits[0].strengths[0])


def paper_claims(summary: Mapping[str, Any], columns: Columns) -> tuple[Claim, ...]:
    """Both papers' claims on this run's test records."""
    matched = next(line.matched for line in columns.lines if line.method == methods.FIRST)
    arms = Arms(methods.FIRST, matched, methods.SECOND, f"{methods.SECOND} {REVERSED}", columns.random)
    return claims(summary["arms"], summary["harmful_suites"], arms)


def _line(name: str, picked: Picked, matched: Arm | str) -> Line:
    if isinstance(matched, Arm):
        return Line(name, picked.arm.name, matched.name, picked.note)
    return Line(name, picked.arm.name, None, "; ".join(filter(None, (picked.note, matched))))


def _opened(plan: Plan) -> Plan:
    """What the plan does to what it takes for harmful: no gate, and no SAE that only a gate reads."""
    up = tuned.opened(plan)
    sites = {edit.site for edit in up.edits if edit.features}
    return up.model_copy(update={"saes": tuple(ref for ref in plan.saes if ref.site in sites)})


def _plan(arm: Arm) -> Plan:
    if arm.plan is None:
        raise NotEnoughDataError(f"'{arm.name}' does not steer")
    return arm.plan


def _extra(columns: Columns) -> dict[str, Any]:
    """What the report opens with: the first paper's clamp; the tuned plan it finds by its kind."""
    return {
        "chosen": {"arm": methods.FIRST},
        "split": Split.TEST.value,
        "strength_unit": "raw activation",
        "n_random": len(columns.random),
    }


def shown(summary: Mapping[str, Any]) -> RenderableType:
    """The methods' table, then the claims."""
    notes = [Text(f"{line['method']}: {line['note']}", style="dim") for line in summary["methods"] if line["note"]]
    return Padding(Group(_methods_table(summary), *notes, "", _claims_table(summary)), (1, 0))


def _methods_table(summary: Mapping[str, Any]) -> Table:
    """One row per arm, one for all random features. Intervals and suites are in summary.json and the report."""
    arms, harmful = summary["arms"], summary["harmful_suites"]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "refused, then right answers, % of test prompts"
    table.add_column("arm", no_wrap=True, overflow="ellipsis")
    for name in (*harmful, "safe", "right", "right,_likelihood", "broken", "KL_benign"):
        table.add_column(name.replace("jailbroken", "jailbr.").replace("_", "\n"), justify="right")
    for arm in arms:
        if not arm["name"].startswith(RANDOM):
            table.add_row(escape(arm["name"]), *_rates([arm], harmful))
    random = [arm for arm in arms if arm["name"].startswith(RANDOM)]
    if random:
        table.add_row(f"{len(random)} random features, mean", *_rates(random, harmful), style="dim")
    return table


def _rates(arms: Sequence[Mapping[str, Any]], harmful: Sequence[str]) -> list[str]:
    """Means over the arms."""
    refused = [_mean([arm["suites"][name]["refused"]["value"] for arm in arms]) for name in harmful]
    likely = [rate["value"] for arm in arms for rate in arm["capability_by_likelihood"].values()]
    means = [[arm["frontier"][name] for arm in arms] for name in ("over_refusal", "capability", "degenerate")]
    safe, right, broken = map(_mean, means)
    kls = [arm["kl_benign"] for arm in arms if arm["kl_benign"] is not None]
    return [*refused, safe, right, _mean(likely), broken, f"{sum(kls) / len(kls):.3f}" if kls else ""]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _percent(sum(known) / len(known)) if known else ""


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}"


def _claims_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "what the papers claim, on this model (* p < 0.05, Bonferroni over the suites of a side)"
    for heading in ("paper", "claim", "here", "evidence"):
        table.add_column(heading, overflow="fold")
    words = {True: "reproduced", False: "not reproduced", None: "no data"}
    for claim in summary["claims"]:
        table.add_row(claim["paper"], claim["claim"], words[claim["reproduced"]], claim["evidence"])
    return table
