"""Plans as arithmetic: where its tensors lie, in which precision, and how a gate's terms add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from clampdown.errors import PlanError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_programs import gate_programs
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.steering.program import Reach, check_plan, site_programs
from clampdown.types import Message
from tests.steering.conftest import random_sae, tiny_llama

PlanOf = Callable[..., Plan]


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_an_sae_that_lies_elsewhere_is_brought_to_the_model(architecture: str, site: str, plan_of: PlanOf) -> None:
    """The meta device stands for an accelerator: it takes tensors and mixes with no other device."""
    lm = tiny_llama()
    lm.model.to("meta")
    sae = random_sae(architecture=architecture, k=4)
    gate = Gate(site=site, features=(5,), poolings=("max",), weights=(1.0,), bias=0.0, threshold=0.0)
    edit = Edit(site=site, operator="clamp", features=(3, 9), strengths=(6.0, 1.0), error_term="drop")
    plan = plan_of(edit, gate=gate)
    x = torch.zeros(1, 4, lm.d_model, device="meta")
    (program,) = site_programs([plan], lm, {site: sae})
    (read,) = gate_programs([plan], lm, {site: sae})
    assert program.delta(x, {Reach("all", 0): torch.ones(1, 4, device="meta")}).device.type == "meta"
    assert read.scores(x, torch.ones(1, 4, dtype=torch.bool, device="meta")).device.type == "meta"


def test_a_topk_sae_in_16_bit_serves_several_operators_at_once(lm: LanguageModel, site: str, plan_of: PlanOf) -> None:
    sae = random_sae(architecture="topk", k=4).to(dtype=torch.bfloat16)
    edits = [
        Edit(site=site, operator=name, features=(feature,), strengths=(4.0,))
        for name, feature in (("add", 3), ("clamp", 9))
    ]
    with steer(lm, plan_of(*edits), sae) as steering:
        next_token_logits(lm, [encode(lm, [Message("user", "w1 w2 w3")])])
        (receipt,) = steering.receipts()
    assert receipt is not None and receipt.tokens_touched == 7


def test_terms_of_a_gate_that_read_the_same_thing_add_up(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    once = Gate(site=site, features=(9,), poolings=("max",), weights=(3.0,), bias=0.5, threshold=0.0)
    twice = split(once)
    prompt = [encode(lm, [Message("user", "w1 w2 w3")])]
    scores = []
    for gate in (once, twice):
        with steer(lm, plan_of(Edit(site=site, operator="add", features=(5,), strengths=(1.0,)), gate=gate), sae) as on:
            next_token_logits(lm, prompt)
            scores += [receipt.gate_score for receipt in on.receipts() if receipt]
    assert scores[0] != 0.5
    assert scores[1] == pytest.approx(scores[0])


def split(gate: Gate) -> Gate:
    return gate.model_copy(update={"features": (9, 9), "poolings": ("max", "max"), "weights": (1.0, 2.0)})


def test_a_plan_that_does_nothing_or_contradicts_itself_is_refused(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    def edit(operator: str, scope: str, feature: int = 5) -> Edit:
        return Edit(site=site, operator=operator, features=(feature,), strengths=(2.0,), scope=scope)

    def check(*edits: Edit) -> None:
        check_plan(plan_of(*edits), lm, {site: sae})

    with pytest.raises(PlanError, match="no edits"):
        check()
    for scopes in (("all", "prompt"), ("prompt", "last_user"), ("assistant", "generated"), ("prompt", "assistant")):
        for operators in (("clamp", "add"), ("scale", "floor"), ("clamp_active", "clamp")):
            with pytest.raises(PlanError, match=r"feature 5 .* twice"):
                check(*(edit(*pair) for pair in zip(operators, scopes, strict=True)))
    check(edit("clamp", "prompt"), edit("clamp", "generated"))
    check(edit("clamp", "last_user"), edit("floor", "assistant"))
    check(edit("add", "all"), edit("scale", "prompt"))
    check(edit("clamp", "all"), edit("clamp", "all", feature=9))


def test_what_became_no_number_was_touched(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    """16-bit residuals overflow; here a float32 one does."""
    much = Edit(site=site, operator="add", features=(5,), strengths=(3e38,))
    twice = Edit(site=site, operator="add", features=(9,), strengths=(3e38,))
    ids = torch.tensor([[1, 7, 8, 9]])
    for edits in ((much, twice), (much.model_copy(update={"strengths": (3.3e38,)}), twice)):
        with steer(lm, plan_of(*edits), sae) as steering:
            lm.model(ids)
            (receipt,) = steering.receipts()
        assert receipt is not None and receipt.tokens_touched == 4 and not math.isfinite(receipt.edit_norm)
