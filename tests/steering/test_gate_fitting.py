"""Fitted gates separate what they were fitted on, score as the steered pass does, and keep their promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.errors import NotEnoughDataError, PlanError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_fitting import FITTERS, FittedGate, Pooled, auroc, fit_gate, gate_reading
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.types import Message, Prompt


def words(i: int, positive: bool) -> str:
    rng = np.random.default_rng(i)
    low, high = (0, 22) if positive else (18, 40)
    return " ".join(f"w{w}" for w in rng.integers(low, high, rng.integers(3, 9)))


PROMPTS = tuple(Prompt(str(i), (Message("user", words(i, i % 2 == 0)),), "s") for i in range(120))
POSITIVE = np.arange(120) % 2 == 0


@pytest.fixture(scope="module")
def pooled(lm: LanguageModel, sae: Sae) -> Pooled:
    return Pooled.of(collect(plan_pass(lm, [gate_reading(sae.cfg.site, sae)], PROMPTS)))


@pytest.mark.parametrize("kind", list(FITTERS))
def test_fitted_gates_separate_and_score_as_the_steered_pass_does(
    kind: str, pooled: Pooled, lm: LanguageModel, sae: Sae, site: str
) -> None:
    """Fitted on the first half; held-out prompts are told apart better than by chance."""
    half = np.arange(120) < 60
    fitted = fit_gate(kind, pooled.at(half), POSITIVE[half])
    scores = fitted.scores(pooled)
    assert auroc(scores[half], POSITIVE[half]) > 0.75
    assert auroc(scores[~half], POSITIVE[~half]) > 0.65
    edit = Edit(site=site, operator="add", features=(3,), strengths=(1.0,))
    plan = Plan(
        name="p",
        model=ModelRef(name="tiny", revision="r0"),
        saes=(SaeRef(site=site, name="random", revision="s0"),),
        edits=(edit,),
        gate=fitted.gate,
        vectors=dict(fitted.vectors),
    )
    with steer(lm, plan, sae) as steering:
        next_token_logits(lm, [encode(lm, prompt.messages) for prompt in PROMPTS[:9]])
        seen = [receipt.gate_score for receipt in steering.receipts() if receipt]
    assert seen == pytest.approx(scores[:9].tolist(), abs=1e-3, rel=1e-3)
    again = fitted.renamed("second")
    np.testing.assert_array_equal(again.scores(pooled), scores)


def test_auroc_is_scikit_learns() -> None:
    scores = np.random.default_rng(0).integers(0, 12, 120).astype(float)
    assert auroc(scores, POSITIVE) == pytest.approx(roc_auc_score(POSITIVE, scores))


def test_what_cannot_be_fitted_is_an_error(pooled: Pooled) -> None:
    with pytest.raises(PlanError, match="cannot be fitted"):
        fit_gate("external", pooled, POSITIVE)
    with pytest.raises(PlanError, match="needs an SAE"):
        fit_gate("feature", Pooled(pooled.site, {}, pooled.residual), POSITIVE)
    with pytest.raises(NotEnoughDataError, match="both"):
        fit_gate("dense", pooled, np.ones(120, dtype=bool))


def test_too_few_benign_prompts_name_the_number_that_would_do(pooled: Pooled) -> None:
    fitted = fit_gate("dense", pooled, POSITIVE)
    with pytest.raises(NotEnoughDataError) as caught:
        fitted.calibrated(fitted.scores(pooled)[~POSITIVE], budget=0.02, confidence=0.95)
    assert caught.value.hint and "149" in caught.value.hint


def test_a_gate_without_a_threshold_promises_nothing(pooled: Pooled) -> None:
    fitted = fit_gate("cosine", pooled, POSITIVE)
    assert isinstance(fitted, FittedGate)
    assert fitted.gate.guarantee is None
    assert isinstance(pooled.features["max"], csr_array)
