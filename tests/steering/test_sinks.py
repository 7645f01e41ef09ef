"""Attention sinks are found in the model, and neither read nor edited, unless a plan says so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.activations.collect import collect
from clampdown.activations.sinks import sinks_at
from clampdown.activations.stream import Reading, plan_pass
from clampdown.activations.traces import trace
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.generation import generate, next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering import units
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.prepared import prepare
from clampdown.types import Message, Prompt, Site
from tests.steering.conftest import tiny_llama
from tests.steering.test_gate_kinds import OTHER, VECTOR, gate_of

TEXT = "w1 w5 w2 w3"
SINK_POSITIONS = [0, 3]
"""Of BOS and of w5 in the prompt: <bos> <user> w1 w5 w2 w3 <end> <assistant>."""


@pytest.fixture(scope="module")
def sunk() -> LanguageModel:
    """A model in which BOS and one word are sinks."""
    found = tiny_llama()
    with torch.no_grad():
        for token in ("<bos>", "w5"):
            found.model.model.embed_tokens.weight[found.tokenizer.convert_tokens_to_ids(token)] *= 300.0
    return found


@pytest.fixture
def plan(site: str, plan_of: Callable[..., Plan]) -> Plan:
    return plan_of(Edit(site=site, operator="add", features=(3,), strengths=(6.0,), scope="all"))


def prompt(lm: LanguageModel) -> Batch:
    return pad_left([encode(lm, [Message("user", TEXT)])], lm.pad_id)


def residual(lm: LanguageModel, site: str) -> torch.Tensor:
    batch = prompt(lm)
    return forward_to(lm, batch, [Site.parse(site)])[Site.parse(site)][0]


def test_sinks_are_found_by_their_length_and_named(lm: LanguageModel, sunk: LanguageModel, site: str) -> None:
    where = Site.parse(site)
    none, found = sinks_at(lm, [where])[where], sinks_at(sunk, [where])[where]
    assert not none
    assert none.limit == math.inf
    assert [(at, text) for at, text, _ in found.tokens] == [(0, "<bos>")]
    assert "'<bos>' at 0" in found.in_words
    outside = found.outside(residual(sunk, site))
    assert (~outside).nonzero().flatten().tolist() == SINK_POSITIONS


def test_changed_weights_are_looked_at_again(site: str) -> None:
    own, where = tiny_llama(), Site.parse(site)
    assert not sinks_at(own, [where])[where]
    with torch.no_grad():
        own.model.model.embed_tokens.weight[1] *= 300.0
    assert sinks_at(own, [where])[where]


def test_finders_units_and_cards_leave_sinks_out(sunk: LanguageModel, sae: Sae, site: str) -> None:
    x = residual(sunk, site)
    content = torch.tensor([2, 4, 5])
    prompts = [Prompt("a", (Message("user", TEXT),), "s")]
    reading = Reading(Site.parse(site), sae, ("max",), ("mean",))
    store = collect(plan_pass(sunk, [reading], prompts))
    assert torch.allclose(torch.tensor(store.dense("mean")[0]), x[content].mean(0), atol=1e-4)
    assert torch.allclose(torch.tensor(store.matrix("max").toarray()[0]), sae.encode(x[content]).amax(0), atol=1e-3)
    included = collect(plan_pass(sunk, [reading], prompts, include_sinks=True))
    assert included.dense("mean")[0].std() > 5 * store.dense("mean")[0].std()
    measured = units.calibrate(sunk, Site.parse(site), sae.select([3]), prompts)
    assert measured.mean_length == pytest.approx(x[[2, 4, 5, 7]].norm(dim=-1).mean().item(), rel=1e-4)
    (card,) = trace(sunk, sae, [3], [encode(sunk, prompts[0].messages)])
    assert card.content.nonzero()[0].tolist() == content.tolist()


def edited(lm: LanguageModel, sae: Sae, plan: Plan, site: str) -> torch.Tensor:
    """Which positions of the prompt the plan changes."""
    before, batch = residual(lm, site), prompt(lm)
    with torch.no_grad(), steer(lm, plan, sae):
        after = lm.model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[2][0]
    return (after != before).any(-1)


def test_an_edit_spares_sinks_unless_they_are_included(
    lm: LanguageModel, sunk: LanguageModel, sae: Sae, plan: Plan, site: str
) -> None:
    assert edited(lm, sae, plan, site).all()
    assert (~edited(sunk, sae, plan, site)).nonzero().flatten().tolist() == SINK_POSITIONS
    assert edited(sunk, sae, plan.model_copy(update={"sinks": "include"}), site).all()


def test_sinks_that_are_generated_are_spared_too(sunk: LanguageModel, sae: Sae, plan: Plan) -> None:
    """One pass over prompt and reply does what decoding did."""
    ids = encode(sunk, [Message("user", TEXT)])
    w5 = sunk.tokenizer.convert_tokens_to_ids("w5")
    logits = []
    for given in ([*ids, w5, 9], [*ids, w5, 9][:-1]):
        with torch.no_grad(), steer(sunk, plan, sae, prompt_width=len(ids)) as steering:
            logits.append(sunk.model(input_ids=torch.tensor([given])).logits[0, len(ids)])
            receipt = steering.receipts()[0]
    assert torch.allclose(*logits, atol=1e-4)
    assert receipt is not None
    assert receipt.tokens_touched == len(ids) - len(SINK_POSITIONS)


def test_prepared_and_decoding_rows_spare_the_same(sunk: LanguageModel, sae: Sae, plan: Plan) -> None:
    ids = [encode(sunk, [Message("user", TEXT)])]
    with steer(sunk, plan, sae) as steering:
        wanted = generate(sunk, ids, max_new_tokens=6)[0].text
        touched = steering.receipts()
    own = tiny_llama()
    own.model.load_state_dict(sunk.model.state_dict())
    prepared = prepare(own, [sae])
    with prepared.steer(plan, ids) as steering:
        assert generate(own, ids, max_new_tokens=6)[0].text == wanted
        assert [r.tokens_touched for r in steering.receipts() if r] == [r.tokens_touched for r in touched if r]
    prepared.detach()


@pytest.mark.parametrize("kind", ["feature", "probe", "dense", "cosine"])
def test_gates_do_not_read_sinks(
    kind: str, sunk: LanguageModel, sae: Sae, plan: Plan, site: str, plan_of: Callable[..., Plan]
) -> None:
    x = residual(sunk, site)
    a, mean, last = sae.encode(x), x[[2, 4, 5]].mean(0), x[-1]
    v, u = torch.tensor(VECTOR), torch.tensor(OTHER)
    wanted = {
        "feature": lambda: a[[2, 4, 5], 5].max(),
        "probe": lambda: a[[2, 4, 5], 5].max() - 0.5 * a[[2, 4, 5], 9].mean() + 2 * a[-1, 5],
        "dense": lambda: mean @ v + 0.5 * (last @ u) + 0.3,
        "cosine": lambda: torch.cosine_similarity(mean, v, dim=0),
    }[kind]().item()
    for window in (0, 2):
        gate = gate_of(kind, site, window=window)
        gated = plan_of(*plan.edits, gate=gate, vectors={"v": VECTOR, "u": OTHER})
        with steer(sunk, gated, sae) as steering:
            next_token_logits(sunk, [encode(sunk, [Message("user", TEXT)])])
            (receipt,) = steering.receipts()
        assert receipt is not None
        if not window:
            assert receipt.gate_score == pytest.approx(wanted, abs=1e-3)
        assert abs(receipt.gate_score or 0.0) < 100


def test_a_plan_that_says_nothing_of_sinks_is_what_it_was(plan: Plan) -> None:
    included = plan.model_copy(update={"sinks": "include"})
    assert (plan.schema_version, included.schema_version) == (1, 3)
    assert plan.digest != included.digest
