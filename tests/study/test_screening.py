"""Screening reads what plain passes read, halves as it says, and tells why each candidate was dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from clampdown.discovery.causal import clamp_plan
from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.errors import NotEnoughDataError, PromptSetError
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.study.screening import DECIDED, Halving, Prefills, Reading, screen, spread_order
from tests.steering.conftest import random_sae, tiny_llama

TOKENS = RefusalTokens((10, 11), 1.0, 0.0, 1, 1)
HARMFUL = [[1, 2, 7 + i, 9 + 2 * i, 5, 3] for i in range(6)]
BENIGN = [[1, 2, 30 - i, 5, 3] for i in range(5)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def sae() -> Sae:
    return random_sae()


@pytest.fixture(scope="module")
def plans(lm: LanguageModel, sae: Sae) -> list[Plan]:
    return [clamp_plan(lm, sae, f, 2.0 + f, ("all", "prompt")[f % 2]) for f in range(12)]


def test_readings_equal_plain_passes(lm: LanguageModel, sae: Sae, plans: list[Plan]) -> None:
    found = Prefills(lm, sae, HARMFUL, BENIGN, TOKENS)(plans, 4)
    for plan, reading in zip(plans, found, strict=True):
        with steer(lm, plan, sae):
            odds = refusal_log_odds(next_token_logits(lm, HARMFUL[:4]), TOKENS)
        with steer(lm, plan, sae):
            steered = next_token_logits(lm, BENIGN[:4]).log_softmax(-1)
        base = next_token_logits(lm, BENIGN[:4]).log_softmax(-1)
        before = refusal_log_odds(next_token_logits(lm, HARMFUL[:4]), TOKENS)
        change = odds.clamp(max=DECIDED) - before.clamp(max=DECIDED)
        assert reading.gain == pytest.approx(float(change.mean()), abs=1e-3)
        kl = torch.nn.functional.kl_div(steered, base, log_target=True, reduction="batchmean")
        assert reading.kl == pytest.approx(float(kl), rel=1e-3)
    assert len({round(reading.gain, 3) for reading in found}) == len(plans)


def test_scopes_that_a_prefill_cannot_tell_apart_are_read_once(lm: LanguageModel, sae: Sae) -> None:
    scopes = ("all", "prompt", "assistant")
    widths: list[int] = []
    plans = [clamp_plan(lm, sae, 3, 5.0, scope) for scope in scopes]
    measure = Prefills(lm, sae, HARMFUL[:2], BENIGN[:2], TOKENS)
    measure(plans, 2)
    handle = lm.layout.blocks[2].register_forward_pre_hook(lambda _module, args: widths.append(len(args[0])))
    try:
        every, prompt, assistant = measure(plans, 2)
    finally:
        handle.remove()
    assert every == prompt != assistant
    assert sum(widths) == 2 * (len(HARMFUL[:2]) + len(BENIGN[:2])), "two plans' rows, not three"


def test_a_certain_refusal_that_gets_less_certain_is_no_loss(lm: LanguageModel, sae: Sae, plans: list[Plan]) -> None:
    likely = tuple(next_token_logits(lm, HARMFUL).mean(0).topk(44).indices.tolist())
    tokens = RefusalTokens(likely, 1.0, 0.0, 1, 1)
    assert bool((refusal_log_odds(next_token_logits(lm, HARMFUL), tokens) > DECIDED).all())
    weak = clamp_plan(lm, sae, 1, 0.5)
    assert Prefills(lm, sae, HARMFUL, BENIGN, tokens)([weak], 6)[0].gain == 0.0


@pytest.mark.parametrize("n", [1, 2, 5, 8, 48])
def test_every_beginning_of_the_order_covers_the_range(n: int) -> None:
    order = spread_order(n)
    assert sorted(order) == list(range(n))
    for size in (s for s in (4, 8, 16) if s <= n):
        quarters = [sum(i * 4 // n == q for i in order[:size]) for q in range(4)]
        assert min(quarters) >= size // 8


def test_halving_reads_the_best_on_ever_more_prompts(plans: list[Plan]) -> None:
    asked: list[tuple[int, int]] = []

    def measure(some: Sequence[Plan], n: int) -> list[Reading]:
        asked.append((len(some), n))
        return [Reading(gain=float(plan.edits[0].features[0]), kl=0.1) for plan in some]

    many = [plan.model_copy(update={"name": f"{plan.name}-{i}"}) for i in range(10) for plan in plans]
    found = screen(many, measure, 60, Halving(keep=3, first=2, factor=4))
    assert asked == [(120, 2), (30, 8), (7, 32), (3, 60)]
    kept = [each for each in found if not each.dropped]
    assert len(found) == len(many)
    assert {each.plan.name for each in found} == {plan.name for plan in many}
    assert [each.reading.gain for each in kept] == [11.0, 11.0, 11.0]
    assert found[3].dropped == "rank 4 of 7 by refusal log-odds on 32 prompts"
    assert found[-1].n_prompts == 2


def test_what_costs_too_much_is_dropped_whatever_it_gains(plans: list[Plan]) -> None:
    def measure(some: Sequence[Plan], n: int) -> list[Reading]:
        return [Reading(gain=float(i), kl=math.nan if i == 11 else 0.2 * i) for i in range(len(some))]

    found = screen(plans, measure, 4, Halving(keep=2, first=4, kl_limit=0.9))
    assert [each.reading.gain for each in found[:2]] == [4.0, 3.0]
    assert {each.dropped.partition(" above")[0] for each in found if each.reading.gain > 4} == {
        "benign KL 1.00", "benign KL 1.20", "benign KL 1.40", "benign KL 1.60", "benign KL 1.80", "benign KL 2.00",
        "benign KL nan",
    }  # fmt: skip
    assert found[-1].facts()["kl"] is None or found[-1].reading.kl == found[-1].reading.kl


def test_nothing_to_screen_and_nothing_to_screen_on(lm: LanguageModel, sae: Sae) -> None:
    with pytest.raises(NotEnoughDataError, match="no candidate"):
        screen([], lambda _plans, _n: [], 4)
    with pytest.raises(PromptSetError, match="benign"):
        Prefills(lm, sae, HARMFUL, [], TOKENS)
