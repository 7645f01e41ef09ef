"""`clampdown gate calibrate` on the embedded model: what it writes works, and what it promises holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest
from typer.testing import CliRunner

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.attacks.encodings import ENCODINGS
from clampdown.cli.main import app
from clampdown.config import ORGANISM
from clampdown.errors import NotEnoughDataError, PlanError, PromptSetError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.steering.gate_fitting import Pooled, fit_gate, gate_reading
from clampdown.steering.gates import choose_threshold
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, read_plan, write_plan
from clampdown.steering.turn_reading import read_prompts
from clampdown.study import gate as job
from clampdown.study.progress import Stages
from clampdown.study.prompts import prompts_from
from clampdown.study.study import make_study
from clampdown.types import ATTACKS, Message, PromptRole, Split


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with up.toml and down.toml for the embedded model."""
    subject = make_study(ORGANISM, ORGANISM)
    where = tmp_path_factory.mktemp("plans")
    site = subject.sae.cfg.site.name
    for name, operator, strength in (("up", "clamp", 98.0), ("down", "scale", 0.0)):
        edit = Edit(site=site, operator=operator, features=(352,), strengths=(strength,), scope="prompt")
        plan = Plan(
            name=name,
            model=ModelRef(name=ORGANISM, revision=subject.lm.revision),
            saes=(SaeRef(site=site, name=subject.sae.name, revision=subject.sae.revision),),
            edits=(edit,),
        )
        write_plan(where / f"{name}.toml", plan)
    return where


def run(plans: Path, out: Path, **changes: object) -> job.Calibrated:
    request = job.Request(plans / "up.toml", "probe", budget=0.1, n=60, limit=24)
    fields = {name: getattr(request, name) for name in request.__slots__} | changes
    return job.calibrate(job.Request(**fields), out, Stages(Console(quiet=True)))  # type: ignore[arg-type]


def test_the_command_writes_a_two_sided_plan_and_says_how_often_it_acts(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.toml"
    arguments = [str(plans / "up.toml"), "--kind", "dense", "--otherwise", str(plans / "down.toml"), "--out", str(out)]
    shown = CliRunner().invoke(
        app, ["gate", "calibrate", *arguments, "--budget", "0.1", "--n", "60", "--limit", "24"], terminal_width=200
    )
    assert shown.exit_code == 0, shown.output
    plan = read_plan(out)
    assert [gate.kind for gate in plan.gates] == ["dense", "dense"]
    assert plan.otherwise and plan.otherwise.edits == read_plan(plans / "down.toml").edits
    assert plan.edits == read_plan(plans / "up.toml").edits
    assert all(gate.guarantee and gate.guarantee.n == 60 and gate.guarantee.bound <= 0.1 for gate in plan.gates)
    assert "of 60 benign calibration prompts" in shown.output
    assert f"written: {out}" in shown.output


def test_strength_that_grows_reaches_all_of_it_at_the_median_harmful_prompt(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown.toml"
    sizes = ["--budget", "0.1", "--n", "60", "--limit", "24"]
    arguments = [str(plans / "up.toml"), "--kind", "dense", "--least", "0.3", "--out", str(out), *sizes]
    shown = CliRunner().invoke(app, ["gate", "calibrate", *arguments], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert "strength: 30% at the threshold" in shown.output
    gate = read_plan(out).gate
    assert gate and gate.full is not None
    found = make_study(ORGANISM, ORGANISM).data.suites(Split.DISCOVERY, 24)
    harmful = [prompt for suite in found if suite.harmful for prompt in suite.prompts]
    lm, plan = make_study(ORGANISM, ORGANISM).lm, read_plan(out)
    read = read_prompts(lm, gate, plan.vectors, None, harmful)
    fired = [reading.score for reading in read if reading.opens]
    assert gate.full == pytest.approx(float(np.median(fired)), abs=1e-4)
    assert {reading.factor for reading in read if reading.score > gate.full} == {1.0}
    with pytest.raises(PlanError, match="share of the whole"):
        run(plans, out, least=1.5)


def test_down_first_spares_harmful_prompts_and_asks_the_harm_gate_next(plans: Path, tmp_path: Path) -> None:
    out = tmp_path / "down.toml"
    arguments = [str(plans / "up.toml"), "--otherwise", str(plans / "down.toml"), "--out", str(out)]
    sizes = ["--budget", "0.1", "--n", "60", "--limit", "24", "--features", "12", "--inverse-penalty", "0.3"]
    sides = ["--first", "down", "--down-budget", "0.05"]
    shown = CliRunner().invoke(app, ["gate", "calibrate", *arguments, *sizes, *sides], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    plan = read_plan(out)
    assert plan.gate and plan.otherwise
    assert plan.edits == read_plan(plans / "down.toml").edits
    assert plan.otherwise.edits == read_plan(plans / "up.toml").edits
    first, second = plan.gate.guarantee, plan.otherwise.gate.guarantee
    assert first and (first.on, first.n, first.bound <= 0.05) == ("harmful", 180, True)
    assert second and (second.on, second.n, second.bound <= 0.1) == ("benign", 60, True)
    assert max(len(gate.features) for gate in plan.gates) <= 12
    assert "of 180 harmful calibration prompts" in shown.output
    subject = make_study(ORGANISM, ORGANISM)
    harmful = subject.prompts(Split.CALIBRATION, 60, *ATTACKS)
    with steer(subject.lm, plan, subject.sae) as steering:
        next_token_logits(subject.lm, [encode(subject.lm, prompt.messages) for prompt in harmful])
        taken = sum(receipt.branch == "edits" for receipt in steering.receipts() if receipt)
    assert taken == first.triggered


def test_rates_are_those_of_the_steered_model(plans: Path, tmp_path: Path) -> None:
    found = run(plans, tmp_path / "gated.toml")
    subject = make_study(ORGANISM, ORGANISM)
    prompts = subject.data.draw("jailbroken_unseen", Split.VALIDATION, 24).prompts
    with steer(subject.lm, found.plan, subject.sae) as steering:
        next_token_logits(subject.lm, [encode(subject.lm, prompt.messages) for prompt in prompts])
        fired = [receipt.gate_fired for receipt in steering.receipts() if receipt]
    rate = next(rate for rate in found.rates if rate.suite == "jailbroken_unseen")
    assert (rate.harmful, rate.edits.n, rate.edits.value) == (True, 24, pytest.approx(sum(fired) / 24))


def test_the_gate_never_sees_harmful_prompts_of_unseen_families() -> None:
    request = job.Request(Path("unused"), "probe", limit=4, n=4)
    plan = Plan(name="p", model=ModelRef(name=ORGANISM, revision="r"), edits=())
    seen = [prompt for suite in job._suites(request, plan) for prompt in suite.prompts]
    unseen = {prompt.split for prompt in seen if prompt.suite == "jailbroken_unseen"}
    assert unseen == {Split.VALIDATION}
    assert Split.TEST not in {prompt.split for prompt in seen}


def test_the_guarantee_holds_over_200_resampled_calibration_sets() -> None:
    """The benign prompts' scores are computed once; 200 calibration sets of 200 are drawn from them, and the trigger
    rate among all of them exceeds the budget no more often than the confidence allows."""
    subject = make_study(ORGANISM, ORGANISM)
    harmful = subject.prompts(Split.DISCOVERY, 30, PromptRole.HARMFUL, PromptRole.JAILBROKEN)
    benign = subject.prompts(Split.CALIBRATION, 460, PromptRole.BENIGN)
    store = collect(plan_pass(subject.lm, [gate_reading(subject.sae.cfg.site, subject.sae)], [*harmful, *benign]))
    pooled = Pooled.of(store)
    labels = np.arange(len(store.prompts)) < len(harmful)
    fitting = labels | (np.arange(len(labels)) < len(harmful) + 60)
    scores = fit_gate("dense", pooled.at(fitting), labels[fitting]).scores(pooled)[~fitting]
    rng = np.random.default_rng(0)
    for budget, confidence in ((0.1, 0.8),):
        drawn = (scores[rng.integers(0, len(scores), 200)] for _ in range(200))
        thresholds = [choose_threshold(s, budget=budget, confidence=confidence)[0] for s in drawn]
        rates = [float((scores > threshold).mean()) for threshold in thresholds]
        exceeded = sum(rate > budget for rate in rates)
        assert binomtest(exceeded, 200, 1 - confidence, alternative="greater").pvalue > 1e-3, (exceeded, confidence)
        assert np.mean(rates) > 0.4 * budget, "a bound this loose would waste the budget"


def test_what_cannot_be_calibrated_is_an_error(plans: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDataError) as caught:
        run(plans, tmp_path / "x.toml", budget=0.01, limit=8)
    assert caught.value.hint and "299" in caught.value.hint
    with pytest.raises(PlanError, match="shares between"):
        run(plans, tmp_path / "x.toml", budget=2.0)
    for wrong in ({"first": "down"}, {"first": "sideways"}, {"kind": "dense", "features": 3}, {"features": 0}):
        with pytest.raises(PlanError):
            run(plans, tmp_path / "x.toml", **wrong)
    rows = [{"prompt": f"{n}", "suite": n, "harmful": n == "harmful", "split": s}
            for n in ("harmful", "benign") for s in ("discovery", "validation", "test")]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(PromptSetError, match="no prompt of the split 'calibration'"):
        run(plans, tmp_path / "x.toml", data=prompts_from(mixed=tmp_path / "p.jsonl"))
    assert not (tmp_path / "x.toml").exists()


def test_a_gate_fires_on_what_cannot_be_read_whoever_asks(plans: Path, tmp_path: Path) -> None:
    """In writings that it learnt and in one that it did not, and no more often on plain prompts; the second branch does
    not take such text for over-refused."""
    run(plans, tmp_path / "plain.toml")
    run(plans, tmp_path / "blind.toml", unreadable=96, otherwise=plans / "down.toml", limit=48)
    study = make_study(ORGANISM, ORGANISM)
    asked = study.prompts(Split.VALIDATION, 20, PromptRole.BENIGN)
    rng = Random(3)

    def fired(name: str, writing: str) -> float:
        plan = read_plan(tmp_path / f"{name}.toml")
        written = [replace(p, messages=(Message("user", ENCODINGS[writing](p.text, rng)),)) for p in asked]
        assert plan.gate is not None
        read = read_prompts(study.lm, plan.gate, plan.vectors, study.sae, written)
        return float(np.mean([reading.opens for reading in read]))

    for writing in ("base64", "random capitals", "pig latin"):
        assert fired("plain", writing) < 0.5 < 0.8 < fired("blind", writing), writing
    plan = read_plan(tmp_path / "blind.toml")
    assert plan.gate is not None and plan.otherwise is not None
    plain = read_prompts(study.lm, plan.gate, plan.vectors, study.sae, asked)
    assert sum(reading.opens for reading in plain) <= 2
