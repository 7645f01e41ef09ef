"""Partners: the search is greedy and causal, and a set's effect is that of clamping all of it at once."""

from __future__ import annotations

import pytest
import torch

from clampdown.discovery.causal import clamp_plan
from clampdown.discovery.partners import partners, with_partners
from clampdown.discovery.relapse import failing, held, repairs
from clampdown.errors import NotEnoughDataError
from clampdown.models.chat import encode
from clampdown.models.loading import load_model
from clampdown.organism.judge import judge
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.hooks import steer
from clampdown.types import Split


@pytest.fixture(scope="module")
def lm():
    return load_model("organism")


@pytest.fixture(scope="module")
def sae():
    return load_sae("organism")


def test_the_best_of_every_round_joins_and_a_useless_one_ends_the_search(lm, sae):
    """The measure is additive here, so the order is known; feature 4 lowers it and never joins."""
    worth = {1: 0.5, 2: 2.0, 3: 1.0, 4: -1.0}
    plan = clamp_plan(lm, sae, 352, 40.0, "prompt")

    def measure(plans):
        return [sum(worth.get(f, 0.0) for f in p.edits[0].features) for p in plans]

    found = partners(plan, dict.fromkeys(worth, 5.0), measure, 4)
    assert [(p.feature, p.log_odds) for p in found] == [(2, 2.0), (3, 3.0), (1, 3.5)]
    assert [p.feature for p in partners(plan, dict.fromkeys(worth, 5.0), measure, 1)] == [2]


def test_a_grown_plan_clamps_old_and_new_features_together(lm, sae):
    plan = with_partners(clamp_plan(lm, sae, 352, 100.0, "prompt"), {294: 60.0})
    (edit,) = plan.edits
    assert (edit.features, edit.strengths, edit.scope) == ((352, 294), (100.0, 60.0), "prompt")
    assert with_partners(plan, {}).digest == plan.digest


def test_partners_of_another_operator_are_refused(lm, sae):
    plan = clamp_plan(lm, sae, 352, 100.0)
    scaled = plan.model_copy(update={"edits": (plan.edits[0].model_copy(update={"operator": "scale"}),)})
    with pytest.raises(NotEnoughDataError, match="first edit is 'scale'"):
        with_partners(scaled, {294: 60.0})


def test_a_held_feature_is_silent_from_the_header_on_and_untouched_before(lm, sae):
    """The prediction is the ablation formula on the unsteered residual: x - a_f d_f, after the header only."""
    prompt = next(s for s in suites(Split.VALIDATION, 1) if s.name == "jailbroken_seen").prompts[0]
    ids = torch.tensor([encode(lm, prompt.messages)])
    start = lm.chat.assistant_start(ids)
    x = residual(lm, sae, ids)
    feature = int(sae.encode(x)[start:].amax(0).argmax())
    plan = held(clamp_plan(lm, sae, 352, 1.0), [feature])
    with steer(lm, plan.model_copy(update={"edits": plan.edits[1:]}), sae):
        after = residual(lm, sae, ids)
    expected = x.clone()
    expected[start:] -= sae.encode(x)[start:, feature, None] * sae.W_dec[feature]
    assert not torch.equal(after, x)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def residual(lm, sae, ids):
    """What leaves the SAE's site, [pos, d_model], after every hook that is on."""
    seen = []
    handle = lm.layout.hook_point(sae.cfg.site).register(lambda x: seen.append(x.detach().clone()))
    with torch.no_grad():
        lm.model(input_ids=ids)
    handle.remove()
    return seen[0][0]


def test_repairs_count_replies_that_become_refusals(lm, sae):
    """On prompts that fail under a weak clamp, ablating a feature that never fires repairs nothing."""
    plan = clamp_plan(lm, sae, 352, 40.0, "prompt")
    prompts = next(s for s in suites(Split.DISCOVERY, 40) if s.name == "jailbroken_seen").prompts
    failed = failing(lm, sae, plan, prompts, judge, max_new_tokens=24)
    assert 0 < len(failed) < len(prompts)
    found = {r.feature: r for r in repairs(lm, sae, plan, failed, [299, 511], judge, max_new_tokens=24)}
    assert found[299].n == len(failed)
    again = failing(lm, sae, held(plan, [299]), failed, judge, max_new_tokens=24)
    assert found[299].repaired == len(failed) - len(again)
