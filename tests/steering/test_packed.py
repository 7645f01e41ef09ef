"""Packed batches: the arm of a token is looked up, and each request gets what it would get in a padded batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from clampdown.errors import PlanError, SteeringNotAppliedError
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Gate, Plan
from clampdown.steering.prepared import Capacity, PreparedSteering, prepare
from clampdown.types import Message
from tests.steering.test_prepared import edit_of, hf_generate, logits, mixed_plans

PlanOf = Callable[..., Plan]
TEXTS = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5", "w11 w12"]
CAPACITY = Capacity(rows=4, features=8, directions=2, gate_features=4, prompt=32, tokens=128)


def ids_of(lm: LanguageModel) -> list[list[int]]:
    return [encode(lm, [Message("user", text)]) for text in TEXTS]


def packed_logits(
    lm: LanguageModel,
    steering: PreparedSteering,
    sequences: Sequence[Sequence[int]],
    arms: Sequence[int],
    spare: int = 0,
) -> list[Tensor]:
    """Logits per arm of one pass over sequences laid end to end in the order of `arms`, and `spare` padding.

    The library separates sequences where positions start again at 0 and gives them a block-diagonal mask.
    """
    order = [sequences[arm] for arm in arms]
    ids = torch.tensor([token for sequence in order for token in sequence] + [0] * spare)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in [*order, [0] * spare]])
    owner = torch.tensor([arm for arm, sequence in zip(arms, order, strict=True) for _ in sequence] + [-1] * spare)
    steering.pack(owner)
    out = lm.model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
    return [out[owner == arm] for arm in range(len(sequences))]


@pytest.fixture
def own_lm() -> LanguageModel:
    from tests.steering.conftest import tiny_llama

    return tiny_llama()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_a_packed_pass_equals_the_padded_batch_whatever_the_order(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, order: tuple[int, ...]
) -> None:
    sequences, plans = ids_of(own_lm), mixed_plans(site, plan_of)
    batch = pad_left(sequences, own_lm.pad_id)
    with steer(own_lm, plans, sae) as plain:
        expected = logits(own_lm, batch)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plans, batch) as steering:
        found = packed_logits(own_lm, steering, sequences, order, spare=3)
        receipts = steering.receipts()
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(found[row], expected[row, -len(sequence) :], atol=1e-5, rtol=1e-5)
    for receipt, proof in zip(receipts, plain.receipts(), strict=True):
        assert (receipt and receipt.tokens_touched) == (proof and proof.tokens_touched)


def test_requests_that_come_and_go_keep_to_their_own_plans(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    """Greedy decoding of a changing set of requests; each equals its own steered run of the padded batch."""
    scopes = ("all", "prompt", "generated", "assistant", "last_user")
    plans: list[Plan | None] = [plan_of(edit_of(site, scope=scope)) for scope in scopes]
    requests = [(plan, ids_of(own_lm)[i % 4]) for i, plan in enumerate(plans)]
    expected = []
    for plan, ids in requests:
        with steer(own_lm, plan, sae):
            out = hf_generate(own_lm, pad_left([ids], own_lm.pad_id))
        expected.append(out[0, len(ids) :].tolist())
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    replies: list[list[int]] = [[] for _ in requests]
    seated = [0, 1]
    with prepared.steer([None] * 2, pad_left([[7, 8], [7, 8]], own_lm.pad_id)) as steering:
        for row, request in enumerate(seated):
            steering.seat(row, *requests[request])
        waiting = [2, 3, 4]
        while any(len(replies[request]) < 8 for request in seated):
            sequences = [[*requests[request][1], *replies[request]] for request in seated]
            for row, out in enumerate(packed_logits(own_lm, steering, sequences, range(len(seated)))):
                replies[seated[row]].append(int(out[-1].argmax()))
            for row, request in enumerate(seated):
                if len(replies[request]) == 8 and waiting:
                    seated[row] = waiting.pop(0)
                    steering.seat(row, *requests[seated[row]])
            if len(replies[0]) == 1:
                replies[1] = []  # begins again, a step behind: prompts and decoding now share passes
    for reply, wanted in zip(replies, expected, strict=True):
        assert reply[: len(wanted)] == wanted


def test_packed_gates_read_their_own_prompt(own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    sequences = ids_of(own_lm)
    batch = pad_left(sequences, own_lm.pad_id)

    def gated(threshold: float) -> Plan:
        gate = Gate(
            site=site, features=(5, 9), poolings=("max", "mean"), weights=(1.0, 2.0), bias=0.5, threshold=threshold
        )
        return plan_of(edit_of(site), gate=gate)

    with steer(own_lm, gated(0.0), sae) as plain:
        unsorted = [r.gate_score for r in plain.receipts() if r]
        logits(own_lm, batch)
        scores = [r.gate_score or 0.0 for r in plain.receipts() if r]
    assert not unsorted
    plan = gated(sum(sorted(scores)[1:3]) / 2)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plan, batch) as steering:
        packed_logits(own_lm, steering, sequences, (3, 1, 0, 2))
        receipts = steering.receipts()
    for receipt, score in zip(receipts, scores, strict=True):
        assert receipt is not None
        assert receipt.gate_score == pytest.approx(score, abs=1e-4)
        assert (receipt.tokens_touched > 0) == receipt.gate_fired
    assert {r.gate_fired for r in receipts if r} == {True, False}


def test_more_tokens_or_requests_than_prepared_for_are_refused(own_lm: LanguageModel, sae: Sae) -> None:
    prepared = prepare(own_lm, sae, capacity=Capacity(rows=1, tokens=4))
    two = Batch(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(PlanError, match="prepared for 1"), prepared.steer(None, two):
        pass
    with prepared.steer(None, [[7, 8, 9]]) as steering:
        with pytest.raises(PlanError, match="5 tokens"):
            steering.pack(torch.zeros(5, dtype=torch.long))
        with pytest.raises(PlanError, match="prepared for 4"):
            own_lm.model(torch.tensor([[7] * 5]), position_ids=torch.arange(5)[None], use_cache=False)


def test_a_packed_pass_without_positions_is_an_error(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plan_of(edit_of(site)), [[1, 7, 8, 9]]) as steering:
        steering.pack(torch.zeros(4, dtype=torch.long))
        with pytest.raises(SteeringNotAppliedError, match="without position_ids"):
            own_lm.layout.decoder(torch.tensor([[1, 7, 8, 9]]), use_cache=False)
        own_lm.layout.decoder(torch.tensor([[1, 7, 8, 9]]), position_ids=torch.arange(4)[None], use_cache=False)
