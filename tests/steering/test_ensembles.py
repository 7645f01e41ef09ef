"""An ensemble is its members' scores made one, wherever it is read: fitted, steered, searched, written to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.attacks.surrogate import gates_of
from clampdown.errors import PlanError
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_fitting import FittedGate, Pooled, fit_ensemble, gate_reading
from clampdown.steering.plan import Edit, Gate, Plan, read_plan, write_plan
from clampdown.steering.prepared import prepare
from clampdown.steering.turn_reading import read_prompts
from clampdown.types import Message, Site
from tests.steering.test_gate_fitting import POSITIVE, PROMPTS
from tests.steering.test_turn_reading import TURNS, receipts, scores, talk

LOWER = "blocks.0.hook_resid_post"
MEMBERS = ("probe", f"dense@{LOWER}", "cosine", "probe")


@pytest.fixture(scope="module")
def pooled(lm: LanguageModel, sae: Sae) -> Pooled:
    readings = [gate_reading(sae.cfg.site, sae), gate_reading(Site.parse(LOWER), None)]
    return Pooled.of(collect(plan_pass(lm, readings, PROMPTS)))


@pytest.fixture(scope="module", params=["mean", "max"])
def fitted(request: pytest.FixtureRequest, pooled: Pooled) -> FittedGate:
    return fit_ensemble(MEMBERS, pooled, POSITIVE, combine=request.param, seed=1)


def plan_behind(fitted: FittedGate, site: str, plan_of: Callable[..., Plan], window: int = 8) -> Plan:
    edit = Edit(site=site, operator="add", features=(3,), strengths=(6.0,))
    return plan_of(edit, gate=fitted.gate.changed(window=window), vectors=dict(fitted.vectors))


def test_members_count_alike_and_one_that_is_named_again_is_drawn_anew(pooled: Pooled, fitted: FittedGate) -> None:
    each = np.array([FittedGate(member, fitted.vectors).scores(pooled) for member in fitted.gate.members])
    first, *others = each[:, ~POSITIVE]
    assert first.mean() == pytest.approx(0, abs=1e-4) and first.std() == pytest.approx(1, abs=1e-4)
    assert all(abs(float(other.std()) - 1) < 0.5 for other in others)
    assert not np.allclose(each[0], each[3]) and np.corrcoef(each[0], each[3])[0, 1] > 0.5
    whole = each.mean(0) if fitted.gate.combine == "mean" else each.max(0)
    np.testing.assert_allclose(fitted.scores(pooled), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fitted.renamed("second").scores(pooled), fitted.scores(pooled))


def test_it_steers_by_the_score_that_it_was_fitted_with_and_over_turns_by_the_worst(
    fitted: FittedGate, pooled: Pooled, lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_behind(fitted, site, plan_of)
    seen = scores(lm, sae, plan, *(list(prompt.messages) for prompt in PROMPTS[:6]))
    assert seen == pytest.approx(fitted.scores(pooled)[:6].tolist(), abs=1e-3, rel=1e-3)
    assert plan.gate
    alone = [read.score for read in read_prompts(lm, plan.gate, plan.vectors, sae, PROMPTS[:6])]
    assert alone == pytest.approx(seen, abs=1e-4)
    turns = scores(lm, sae, plan, *([Message("user", turn)] for turn in TURNS))
    (found,) = receipts(lm, sae, plan, talk(*TURNS))
    assert (found.gate_score, found.worst_turn) == (pytest.approx(max(turns), abs=1e-4), int(np.argmax(turns)))
    for threshold, opens in ((max(turns) - 0.1, True), (max(turns) + 0.1, False)):
        at = plan.changed(gate=plan.gate.changed(threshold=threshold))
        assert receipts(lm, sae, at, talk(*TURNS))[0].gate_fired is opens


def test_a_search_with_gradients_sees_the_same_score(
    fitted: FittedGate, lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_behind(fitted, site, plan_of)
    (watched,) = gates_of(lm, plan, [sae])
    assert plan.gate and {program.site.name for program in watched.programs} == {site, LOWER}
    prompt = PROMPTS[0]
    batch = pad_left([encode(lm, prompt.messages)], lm.pad_id, lm.device)
    content = lm.chat.content_mask(batch.input_ids, batch.attention_mask)
    hidden = lm.model(**{"input_ids": batch.input_ids, "output_hidden_states": True}).hidden_states
    seen = {Site.parse(LOWER): hidden[1], Site.parse(site): hidden[2]}
    score = watched.score(seen, content, content.shape[1])
    (read,) = read_prompts(lm, plan.gate, plan.vectors, sae, [prompt])
    assert float(score[0]) == pytest.approx(read.score, abs=1e-3)
    assert torch.isfinite(score).all()


def test_it_is_written_in_a_version_of_its_own_and_reads_back_equal(
    fitted: FittedGate, site: str, plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_behind(fitted, site, plan_of)
    write_plan(tmp_path / "plan.toml", plan)
    read = read_plan(tmp_path / "plan.toml")
    assert read.schema_version == 4
    assert read.digest == plan.digest
    assert plan.sites == {site, LOWER}
    other = fitted.gate.changed(window=8, combine="max" if fitted.gate.combine == "mean" else "mean")
    assert plan.changed(gate=other).digest != plan.digest


def test_what_an_ensemble_cannot_be(
    fitted: FittedGate, pooled: Pooled, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    gate, lone = fitted.gate, fitted.gate.members[0]
    for wrong in (
        {"members": (lone,)}, {"window": 0}, {"combine": "median"}, {"bias": 1.0},
        {"members": (lone, lone.changed(window=3))}, {"members": (gate, gate)},
    ):  # fmt: skip
        with pytest.raises(PlanError):
            gate.changed(**wrong)
    with pytest.raises(PlanError, match="no members"):
        Gate.model_validate({**dict(lone), "members": (lone, lone)})
    n, edit = len(lone.weights), Edit(site=site, operator="add", features=(3,), strengths=(6.0,))
    above = lone.changed(
        site="blocks.2.hook_resid_post", kind="dense", features=(), vectors=("u",) * n, poolings=("mean",) * n
    )
    late = gate.changed(members=(lone, above))
    with pytest.raises(PlanError, match="too late"):
        plan_of(edit, gate=late, vectors={"u": (0.0,) * 32})
    with pytest.raises(PlanError, match="nothing was read"):
        fit_ensemble(("probe", "dense@blocks.2.hook_resid_post"), pooled, POSITIVE)
    for members in (("probe",), ("probe", "external")):
        with pytest.raises(PlanError):
            fit_ensemble(members, pooled, POSITIVE)


def test_a_prepared_model_refuses_one_by_name(
    fitted: FittedGate, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    from tests.steering.conftest import tiny_llama

    own = tiny_llama()
    plan = plan_behind(fitted, site, plan_of)
    prepared = prepare(own, [sae])
    asked = [encode(own, talk(TURNS[0]))]
    with pytest.raises(PlanError, match="ensemble"), prepared.steer(plan, asked):
        pass
    prepared.detach()
