"""Screening measures what the plain way measures, and matching finds the strength that costs what it should."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clampdown.discovery.causal import clamp_plan
from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.discovery.screening import BenignKl, PrefillRefusal, Text, match_strengths
from clampdown.errors import PromptSetError
from clampdown.evaluation.utility import base_replies, benign_kl
from clampdown.models.chat import encode
from clampdown.steering.plan import Edit
from clampdown.types import Site
from tests.steering.conftest import make_plan

TOKENS = RefusalTokens((10, 11), 1.0, 0.0, 1, 1)


@pytest.fixture(scope="module")
def plans(lm, sae):
    return [clamp_plan(lm, sae, f, value, scope) for f, value, scope in [(3, 4.0, "all"), (9, 6.0, "prompt")]]


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 8192])
def test_the_kl_is_what_the_evaluation_reports(lm, sae, harmless, plans, tokens_per_batch):
    kl = BenignKl(lm, sae, harmless[:7], max_new_tokens=5, tokens_per_batch=tokens_per_batch)
    reported = benign_kl(lm, sae, base_replies(lm, harmless[:7], max_new_tokens=5))
    assert kl(plans) == pytest.approx([reported(plan) for plan in plans], rel=1e-3)
    assert min(kl(plans)) > 1e-3


def test_the_kl_on_replies_that_are_there_is_that_of_the_evaluation(lm, sae, harmless, plans):
    """Also where some replies ended and others were cut off."""
    replies = [replace(one, ended=i % 2 == 0) for i, one in enumerate(base_replies(lm, harmless[:7], max_new_tokens=5))]
    texts = [Text.answered(encode(lm, one.prompt.messages), one.reply, ended=one.ended) for one in replies]
    reported = benign_kl(lm, sae, replies)
    assert BenignKl.of_texts(lm, sae, texts)(plans) == pytest.approx([reported(plan) for plan in plans], rel=1e-3)
    with pytest.raises(PromptSetError):
        BenignKl.of_texts(lm, sae, [])


def test_no_steering_costs_nothing(lm, sae, harmless):
    nothing = make_plan(Edit(site=sae.site.name, operator="scale", features=(3,), strengths=(1.0,)))
    assert BenignKl(lm, sae, harmless[:4])([nothing]) == [0.0]


def test_plans_at_other_sites_share_less_and_measure_the_same(lm, harmful):
    """A plan whose lowest site is deeper or shallower, among them one with nothing to share below."""
    vector = {"v": tuple(torch.linspace(-1, 1, 32).tolist())}

    def push(site):
        return make_plan(Edit(site=site, operator="add_direction", vector="v", strengths=(4.0,)), vectors=vector)

    sites = [Site.parse(f"blocks.{name}").name for name in ("2.hook_resid_post", "1.hook_mlp_out", "0.hook_resid_pre")]
    measure = PrefillRefusal(lm, None, harmful[:5], TOKENS)
    together = measure([push(site) for site in sites])
    assert together == pytest.approx([measure([push(site)])[0] for site in sites], abs=1e-4)
    assert all(abs(effect) > 1e-3 for effect in together)


def test_matched_strengths_cost_the_goal(lm, sae, harmless):
    kl = BenignKl(lm, sae, harmless[:6], max_new_tokens=4)
    candidates = [lambda c, f=f: clamp_plan(lm, sae, f, c) for f in (3, 9, 20, 41)]
    matched = match_strengths(candidates, kl, 0.05, [0.1, 1.0, 50.0, 5.0])
    again = kl([m.plan for m in matched])
    for found, cost in zip(matched, again, strict=True):
        assert found.kl == pytest.approx(cost, rel=1e-3)
        assert found.ok == (abs(math.log(cost / 0.05)) <= 0.1)
    assert sum(m.ok for m in matched) >= 3


def test_the_search_is_exact_on_a_known_curve_and_honest_when_there_is_no_answer(lm, sae):
    """KL = (s / 10)^2 reaches any goal; one that never falls below 1 cannot reach 0.5."""

    def curve(plans):
        square, floor = 1, 2
        return [
            {square: (edit.strengths[0] / 10) ** 2, floor: 1 + edit.strengths[0] ** 2}[edit.features[0]]
            for edit in (plan.edits[0] for plan in plans)
        ]

    candidates = [lambda s, f=f: clamp_plan(lm, sae, f, s) for f in (1, 2)]
    square, floor = match_strengths(candidates, curve, 0.5, [400.0, 3.0], tolerance=0.01)
    assert square.ok and square.strength == pytest.approx(10 * math.sqrt(0.5), rel=0.01)
    assert not floor.ok and floor.kl == pytest.approx(1.0, abs=0.1)


def test_texts_are_needed(lm, sae):
    with pytest.raises(PromptSetError):
        BenignKl(lm, sae, [])
