"""`clampdown tune` on the embedded model, tiny: what it writes, what it reads, and that a killed run loses nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from clampdown.cli.main import app
from clampdown.config import ORGANISM
from clampdown.errors import NotEnoughDataError, PlanError, PromptSetError, ScopeError, StoreError
from clampdown.evaluation import metrics
from clampdown.evaluation.dealing import dealt
from clampdown.evaluation.suites import write_suites
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE
from clampdown.steering.gates import fit_probe
from clampdown.steering.plan import Branch, Edit, Plan, read_plan, write_plan
from clampdown.steering.program import check_plan
from clampdown.steering.turn_promise import Turnwise
from clampdown.store import read_records, write_feature_set
from clampdown.study import measure
from clampdown.study.budgets import BROKEN_HARMFUL, BROKEN_SAFE, CAPABILITY, KL, OVER_REFUSAL, Budgets, Use
from clampdown.study.correcting import RANK
from clampdown.study.gating import read_pooled, ungauged
from clampdown.study.methods.gated_set import opened
from clampdown.study.progress import Stages
from clampdown.study.prompts import prompts_from
from clampdown.study.sizes import Answering
from clampdown.study.study import Study, make_study
from clampdown.study.tune import run as tune
from clampdown.study.tune.measuring import Bench, Finalist, changes_of, confirm
from clampdown.study.tune.prompts import (
    Scale,
    capability,
    prompt_sets,
    safe,
)
from clampdown.study.tune.search import HAND_MADE, NO_GATE, Combination, Score, Setting, Trial
from clampdown.study.tune.space import Choices, find_candidates
from clampdown.study.tune.table import shown
from clampdown.types import FeatureScore, FeatureSet, Interval, Message, Prompt, PromptRole, Split, Suite, SuiteKind

SCALE = Scale(
    discovery=24,
    calibration=40,
    trial=3,
    fresh=18,
    generated=4,
    trials=6,
    batch=3,
    features=2,
    feature_sets=2,
    finalists=2,
    screened=3,
    test=Answering(3, 3, max_new_tokens=16),
)
BUDGETS = Budgets(over_refusal=0.2, capability=0.2, broken=0.4, kl=2.0)


@pytest.fixture(scope="module")
def subject() -> Study:
    return make_study(ORGANISM, ORGANISM)


@pytest.fixture(scope="module")
def request_(subject: Study, tmp_path_factory: pytest.TempPathFactory) -> tune.Request:
    path = tmp_path_factory.mktemp("features") / "two.json"
    scores = tuple(FeatureScore(feature, {"s": 1.0 / feature}) for feature in (352, 195))
    write_feature_set(path, FeatureSet("hand", subject.sae.cfg.site.name, "s", scores, subject.provenance([])))
    choices = Choices(path, ("clamp",), ("prompt",), (NO_GATE, "dense", "probe10"), (0.1,), hand_made=False)
    return tune.Request(BUDGETS, choices, SCALE)


def quiet() -> Stages:
    return Stages(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def finished(subject: Study, request_: tune.Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "run"
    tune.run_tune(subject, request_, out, quiet())
    return out


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_the_run_holds_the_plan_every_trial_and_a_summary_like_the_demos(finished: Path) -> None:
    summary = summary_of(finished)
    tuned = Run.read(finished).arm(tune.TUNED)
    plan = read_plan(finished / "plan.toml")
    assert tuned.kind == "tuned"
    assert next(arm for arm in summary["arms"] if arm["kind"] == "tuned")["plan"] == plan.digest
    assert {arm["name"] for arm in summary["arms"]} >= {"baseline", "tuned", "system prompt"}
    lines = (finished / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 6 and len({json.loads(line)["number"] for line in lines}) == 6
    assert {json.loads(line)["number"] for line in lines} >= {row["number"] for row in summary["tune"]["frontier"]}
    assert summary["tune"]["validation"]["turned_away_by"] == []


def test_search_reads_validation_and_only_the_choice_reads_test(finished: Path) -> None:
    splits = {
        path.parent.relative_to(finished).parts[:2]: {record.split for record in read_records(path)}
        for path in finished.rglob("records.jsonl")
    }
    assert splits.pop(()) == {Split.TEST}
    assert splits and all(found == {Split.VALIDATION} for found in splits.values())
    trial, fresh = (
        {r.prompt_id for path in (finished / "search" / part).rglob("records.jsonl") for r in read_records(path)}
        for part in ("trials", "finalists")
    )
    assert trial and fresh and not trial & fresh
    assert {r.arm for r in read_records(finished / "records.jsonl")} == {
        a["name"] for a in summary_of(finished)["arms"]
    }


def test_held_out_families_inform_nothing(subject: Study) -> None:
    sets = prompt_sets(subject, SCALE)
    for part in (sets.discovery, sets.trial, sets.fresh):
        assert "jailbroken_unseen" not in {suite.name for suite in part}
    assert "jailbroken_unseen" in {suite.name for suite in subject.suites(Split.TEST, 1)}


def test_a_killed_run_goes_on_and_ends_the_same(
    finished: Path, subject: Study, request_: tune.Request, tmp_path: Path
) -> None:
    """Killed in the second batch: its trials half written, nothing after it there."""
    killed = tmp_path / "run"
    shutil.copytree(finished, killed)
    for name in ("search/finalists", "search/fired"):
        shutil.rmtree(killed / name, ignore_errors=True)
    for name in ("summary.json", "records.jsonl", "replies.jsonl", "choices.jsonl", "manifest.json", "plan.toml"):
        (killed / name).unlink()
    lines = (killed / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (killed / "trials.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:30])
    records = killed / "search/trials/0003/records.jsonl"
    records.write_bytes(records.read_bytes()[:-100])
    tune.run_tune(subject, request_, killed, quiet())
    assert (killed / "trials.jsonl").read_bytes() == (finished / "trials.jsonl").read_bytes()
    assert read_plan(killed / "plan.toml") == read_plan(finished / "plan.toml")
    before, after = summary_of(finished), summary_of(killed)
    assert {**before, "timings": 0} == {**after, "timings": 0}


def test_other_settings_in_the_same_directory_are_an_error(
    finished: Path, subject: Study, request_: tune.Request
) -> None:
    other = dataclasses.replace(request_, budgets=dataclasses.replace(BUDGETS, kl=1.0))
    with pytest.raises(StoreError, match="its budgets differ"):
        tune.run_tune(subject, other, finished, quiet())


@pytest.fixture
def bench(finished: Path, subject: Study, request_: tune.Request, tmp_path: Path) -> Bench:
    sets = prompt_sets(subject, SCALE)
    found = find_candidates(subject, sets, SCALE, request_.choices, finished / "search", quiet())
    return Bench(subject, sets, SCALE, BUDGETS, found, tmp_path, quiet())


def test_rows_that_no_gate_fired_on_are_the_unsteered_models(bench: Bench, subject: Study, tmp_path: Path) -> None:
    """The short way (gates read, few rows generated) against the long one: every fresh prompt answered."""
    sets = bench.sets
    trial = Trial(0, Setting(Combination((352,), "clamp", "prompt"), 1.5, "dense", 0.1), Score(1.0, {}, ()))
    (short,) = confirm(bench, [trial]).finalists
    arm = bench.arm(trial.setting, "trial 0")
    harmless = (*safe(sets.fresh), *capability(sets.fresh))
    records = measure.generate_records(
        subject, [BASELINE, arm], harmless, tmp_path / "long", bench.sizes(), quiet(), "all"
    )
    changes = changes_of(metrics.by_arm_and_suite(records), "trial 0", harmless)
    assert any(record.receipt.gate_fired for record in records if record.receipt)
    uses = {use.budget: use for use in short.uses}
    for name in (OVER_REFUSAL, BROKEN_SAFE, CAPABILITY):
        net = sum(c.worse - c.better for c in changes[name])
        assert (uses[name].n, round((uses[name].estimate or 0) * uses[name].n)) == (len(changes[name]), net)


def test_refusals_decide_and_where_they_cannot_the_looser_gate_does() -> None:
    def finalist(refused: int, budget: float | None, spent: float = 0.0) -> Finalist:
        setting = Setting(Combination((1,), "clamp", "all"), 1.0, NO_GATE if budget is None else "dense", budget)
        use = Use(OVER_REFUSAL, 0.02, 0.02 * spent, 0.01, 100)
        trial = Trial(0, setting, Score(1.0, {}, ()))
        return Finalist(trial, BASELINE, {"harmful": Interval.of_rate(refused, 200)}, (use,))

    best, looser, cheaper, always, worse = (
        finalist(200, 0.01),
        finalist(199, 0.05, spent=0.5),
        finalist(199, 0.05),
        finalist(200, None),
        finalist(180, 0.2),
    )
    assert tune.in_order([worse, always, best, looser, cheaper]) == (cheaper, looser, best, always, worse)


def test_a_looser_gate_that_gains_nothing_does_not_hide_the_plan_that_does(bench: Bench) -> None:
    def finalist(refused: int, budget: float) -> Finalist:
        setting = Setting(Combination((1,), "clamp", "all"), 1.0, "dense", budget)
        use = Use(OVER_REFUSAL, 0.02, 0.0, 0.01, 100)
        rate = Interval.of_rate(refused, 200)
        return Finalist(Trial(0, setting, Score(1.0, {}, ())), BASELINE, {"harmful": rate}, (use,))

    gains, loose = finalist(199, 0.01), finalist(198, 0.05)
    ranked, unsteered = tune.in_order([gains, loose]), {"harmful": Interval.of_rate(198, 200)}
    assert ranked == (loose, gains)
    assert tune._winner(ranked, unsteered, bench) == gains
    with pytest.raises(NotEnoughDataError, match="refuses more"):
        tune._winner([loose], unsteered, bench)
    assert tune.unchecked(gains, BUDGETS) == [CAPABILITY, BROKEN_HARMFUL, BROKEN_SAFE, KL]


@pytest.fixture(scope="module")
def made(subject: Study) -> Plan:
    """Two-sided as the recipe makes it: asked first, a gate that steers down; otherwise two edits up."""
    site = subject.sae.cfg.site.name
    up = Edit(site=site, operator="clamp", features=(352, 195), strengths=(98.0, 20.0), scope="prompt")
    hold = Edit(site=site, operator="scale", features=(120,), strengths=(0.0,), scope="assistant")
    down = Edit(site=site, operator="scale", features=(352,), strengths=(-1.0,), scope="prompt")
    read = subject.prompts(Split.DISCOVERY, 24)
    harmful = [subject.data.roles[prompt.suite].harmful for prompt in read]
    probe = fit_probe(read_pooled(subject, read), np.array(harmful), max_features=8)
    benign = subject.prompts(Split.CALIBRATION, 40, PromptRole.BENIGN)
    gate = Turnwise(subject.lm, subject.sae, 40, 0.95).within(ungauged(subject, probe), benign, 0.1).gate
    borderline = gate.changed(turns="last", turns_calibrated=0, threshold=gate.threshold - 1.0, guarantee=None)
    return Plan.of(
        subject.lm, [subject.sae], [down], "made", gate=borderline, otherwise=Branch(gate=gate, edits=(up, hold))
    )


@pytest.fixture
def begun(finished: Path, subject: Study, request_: tune.Request, made: Plan, tmp_path: Path) -> Bench:
    """A search that begins with that plan, as one that goes on reads it."""
    shutil.copytree(finished / "search", tmp_path / "search")
    write_plan(tmp_path / "search" / "hand-made.toml", made)
    sets, choices = prompt_sets(subject, SCALE), dataclasses.replace(request_.choices, hand_made=True)
    found = find_candidates(subject, sets, SCALE, choices, tmp_path / "search", quiet())
    return Bench(subject, sets, SCALE, BUDGETS, found, tmp_path, quiet())


def test_the_first_settings_are_the_hand_made_plans_themselves(begun: Bench, made: Plan) -> None:
    space, study = begun.candidates.space, begun.study
    one, two = (begun.candidates.plan(study, start) for start in space.starts)
    assert two.digest == made.digest
    assert made.otherwise
    assert one.digest == opened(made).behind(made.otherwise.gate).digest
    half = begun.candidates.plan(study, dataclasses.replace(space.starts[1], multiple=0.5))
    assert half.edits == made.edits and half.gates == made.gates
    assert half.otherwise and [e.strengths for e in half.otherwise.edits] == [(49.0, 10.0), (0.0,)]
    other = Setting(Combination((352,), "clamp", "prompt"), 1.5, "dense", 0.1, 0.95, down=True)
    plan = begun.candidates.plan(study, other)
    assert plan.gate == made.gate and plan.otherwise and plan.otherwise.gate.kind == "dense"


def test_of_a_two_sided_plan_rows_on_which_neither_gate_fired_are_the_unsteered_models(
    begun: Bench, subject: Study, tmp_path: Path
) -> None:
    start = begun.candidates.space.starts[1]
    (short,) = confirm(begun, [Trial(0, start, Score(1.0, {}, ()))]).finalists
    harmless = (*safe(begun.sets.fresh), *capability(begun.sets.fresh))
    records = measure.generate_records(
        subject, [BASELINE, begun.arm(start, "trial 0")], harmless, tmp_path / "long", begun.sizes(), quiet(), "all"
    )
    changes = changes_of(metrics.by_arm_and_suite(records), "trial 0", harmless)
    assert {r.receipt.branch for r in records if r.receipt} >= {"edits", "none"}
    uses = {use.budget: use for use in short.uses}
    for name in (OVER_REFUSAL, BROKEN_SAFE, CAPABILITY):
        net = sum(c.worse - c.better for c in changes[name])
        assert (uses[name].n, round((uses[name].estimate or 0) * uses[name].n)) == (len(changes[name]), net)


def test_the_search_cannot_end_worse_than_where_it_began() -> None:
    def finalist(refused: int, gate: str) -> Finalist:
        setting = Setting(Combination((1,), "clamp", "all"), 1.0, gate, 0.05 if gate == "dense" else 0.01)
        rate = Interval.of_rate(refused, 200)
        return Finalist(Trial(0, setting, Score(1.0, {}, ())), BASELINE, {"harmful": rate}, ())

    own, looser, better = finalist(198, HAND_MADE), finalist(197, "dense"), finalist(199, "dense")
    starts = [own.trial.setting]
    assert tune.in_order([own, looser])[0] == looser, "the looser gate wins where refusals are alike"
    assert tune.no_worse_than(starts, tune.in_order([own, looser])) == [own]
    assert tune.no_worse_than(starts, [better, own, looser]) == [better, own]
    assert tune.no_worse_than([], [looser]) == [looser]


def test_budgets_that_the_prompts_cannot_prove_stop_before_the_search(subject: Study, tmp_path: Path) -> None:
    request = tune.Request(dataclasses.replace(BUDGETS, capability=0.001), Choices(), SCALE)
    with pytest.raises(NotEnoughDataError, match="cannot show a budget of") as error:
        tune.choose_tuned(subject, request, tmp_path / "run", quiet())
    assert "at least" in (error.value.hint or "")
    assert not (tmp_path / "run").exists()


def test_a_plan_that_turns_everything_into_noise_costs_its_trial_only(
    finished: Path, subject: Study, request_: tune.Request, tmp_path: Path
) -> None:
    from clampdown.study.tune.measuring import Trials

    sets = prompt_sets(subject, SCALE)
    found = find_candidates(subject, sets, SCALE, request_.choices, finished / "search", quiet())
    bench = Bench(subject, sets, SCALE, BUDGETS, found, tmp_path, quiet())
    fair = Setting(Combination((352,), "clamp", "prompt"), 1.0)
    scores = Trials(bench)(0, [fair, dataclasses.replace(fair, multiple=1e38)])
    assert scores[0].refusal is not None
    assert scores[1].refusal is None and scores[1].note


def test_cones_error_terms_and_growing_strength_are_plans_of_their_settings(
    subject: Study, request_: tune.Request, tmp_path: Path
) -> None:
    sets = prompt_sets(subject, SCALE)
    choices = dataclasses.replace(
        request_.choices,
        gates=(NO_GATE, "dense"),
        directions=(1, 3, 99),
        leasts=(1.0, 0.25),
        error_terms=("keep", "correct"),
    )
    found = find_candidates(subject, sets, SCALE, choices, tmp_path, quiet())
    space = found.space
    cones = [each for each in space.combinations if each.directions]
    assert {each.directions for each in cones} <= {1, 3} and {each.operator for each in cones} <= {"floor_direction"}
    assert space.error_terms == ("keep", "correct") and space.growing == frozenset(
        {("dense", 0.1, c) for c in (0.9, 0.95)}
    )
    saes = {subject.sae.cfg.site.name: subject.sae}
    cone = Combination((), "floor_direction", "prompt", 3)
    grown = Setting(cone, 1.5, "dense", 0.1, 0.95, least=0.25)
    clamp = Setting(Combination((352,), "clamp", "prompt"), 1.0, "dense", 0.1, 0.95, error_term="correct")
    plans = [found.plan(subject, setting) for setting in (grown, clamp)]
    for plan, setting in zip(plans, (grown, clamp), strict=True):
        check_plan(plan, subject.lm, saes)
        assert plan.name == str(setting) and plan.gate
        assert plan.gate.factor(plan.gate.threshold) == setting.least and plan.gate.factor(1e9) == 1.0
    subspace = found.beyond.subspace
    assert subspace and [e.strengths[0] for e in plans[0].edits] == pytest.approx(
        subspace.harmless + 1.5 * subspace.gap
    )
    assert len(plans[1].edits[0].correction) == RANK
    again = find_candidates(subject, sets, SCALE, choices, tmp_path, quiet())
    assert again.space == space and [again.plan(subject, s).digest for s in (grown, clamp)] == [p.digest for p in plans]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"operators": ("add_direction",)}, PlanError),
        ({"scopes": ("generated",)}, ScopeError),
        ({"gates": ("external",)}, PlanError),
        ({"gate_budgets": (0.0,)}, PlanError),
    ],
)
def test_what_cannot_be_searched_is_named(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Choices(**wrong).check()


def test_the_table_says_what_was_chosen_and_fits_a_terminal(finished: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(shown(summary_of(finished), 80))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "Not checked" not in text
    summary = summary_of(finished)
    summary["tune"]["unchecked"] = [CAPABILITY]
    console.print(shown(summary, 80))
    assert "Not checked, because there are no prompts for it: capability loss." in console.file.getvalue()
    for word in ("chosen: clamp", "over-refusal", "capability loss", "benign KL", "jailbroken_unseen", "facts, right"):
        assert word in text


@pytest.fixture(scope="module")
def prompts_file(subject: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's prompts of every split in one file."""
    sizes = {Split.DISCOVERY: SCALE.discovery, Split.CALIBRATION: SCALE.calibration, Split.TEST: 3}
    parts = [subject.suites(split, sizes.get(split, SCALE.trial + SCALE.fresh)) for split in Split]
    joined = (
        dataclasses.replace(row[0], prompts=tuple(p for s in row for p in s.prompts))
        for row in zip(*parts, strict=True)
    )
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_suites(path, joined)
    return path


def test_a_dry_run_counts_and_writes_nothing(prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    loose = ["--max-over-refusal", "0.2", "--max-capability-loss", "0.2", "--max-broken", "0.2"]
    arguments = ["--quick", "--dry-run", "--trials", "16", "--prompts", str(prompts_file), "--judge", "exact", *loose]
    result = CliRunner().invoke(app, ["tune", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "16 trials in 2 batches" in result.output and "replies at most" in result.output
    assert not out.exists()


def test_files_take_the_place_of_the_corpus(subject: Study, prompts_file: Path) -> None:
    read = make_study(ORGANISM, ORGANISM, prompts_from(mixed=prompts_file), judge="rules")
    ours, theirs = prompt_sets(subject, SCALE), prompt_sets(read, SCALE)
    for mine, its in ((ours.discovery, theirs.discovery), (ours.trial, theirs.trial), (ours.fresh, theirs.fresh)):
        assert [(s.name, p.id) for s in mine for p in s.prompts] == [(s.name, p.id) for s in its for p in s.prompts]
    assert read.judge_name.startswith("rules")


def test_prompts_without_a_split_are_dealt_out_and_twins_stay_together() -> None:
    def suite(name: str, is_harmful: bool) -> Suite:
        prompts = tuple(
            Prompt(f"{name}-{i}", (Message("user", f"{name} {i}"),), name, meta={"objective": f"goal {i}"})
            for i in range(200)
        )
        return Suite(name, SuiteKind.SAFETY, is_harmful, prompts)

    bad, good = (dealt(one.prompts) for one in (suite("bad", True), suite("good", False)))
    assert [p.split for p in bad] == [p.split for p in good]
    assert {p.split for p in bad} == set(Split)


def test_a_model_without_prompts_of_its_own_needs_some() -> None:
    with pytest.raises(PromptSetError, match="no prompts of our own"):
        make_study("somebody/else", "a:b")
