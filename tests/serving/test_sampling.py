"""Drawn tokens follow the distribution that was asked for, and nobody else's draw changes one's own."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from clampdown.models.generation_config import Penalties
from clampdown.serving.requests import Sampling
from clampdown.serving.sampling import Drawing, choose, describe

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def drawn(sampling: Sampling, n: int = 4000) -> Counter[int | None]:
    drawing = Drawing.of(sampling)
    rows = LOGITS.expand(50, -1)
    return Counter(token for _ in range(n // 50) for token in choose(rows, [drawing] * 50))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_at_the_temperature(temperature: float) -> None:
    found = drawn(Sampling(max_tokens=1, temperature=temperature, seed=1))
    expected = (LOGITS / temperature).softmax(-1)
    for token, p in enumerate(expected.tolist()):
        assert found[token] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000) + 1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Softmax of the logits is about 0.64, 0.24, 0.09, 0.03."""
    assert set(drawn(Sampling(1, temperature=1.0, top_p=0.6, seed=1))) == {0}
    assert set(drawn(Sampling(1, temperature=1.0, top_p=0.7, seed=1))) == {0, 1}
    assert set(drawn(Sampling(1, temperature=1.0, top_p=0.9, seed=1))) == {0, 1, 2}
    assert set(drawn(Sampling(1, temperature=1.0, top_p=0.0, seed=1))) == {0}


@pytest.mark.parametrize(
    "asked",
    [
        *({"top_k": 7}, {"top_k": 1}, {"top_k": 500}, {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 12, "top_p": 0.6}),
        *({"top_p": 0.4, "min_p": 0.2}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7}),
    ],
    ids=lambda asked: "+".join(asked),
)
def test_the_tokens_that_can_be_drawn_are_those_of_the_library(asked: dict[str, Any]) -> None:
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)) * 2
    sampling = Sampling(1, **{"temperature": 1.0, **asked})
    nothing: Any = None  # these processors do not look at what was written
    given: Any = logits
    scores: Any = TemperatureLogitsWarper(sampling.temperature)(nothing, given)
    if "top_k" in asked:
        scores = TopKLogitsWarper(asked["top_k"])(nothing, scores)
    if "top_p" in asked:
        scores = TopPLogitsWarper(asked["top_p"])(nothing, scores)
    if "min_p" in asked:
        scores = MinPLogitsWarper(asked["min_p"])(nothing, scores)
    drawing = Drawing.of(replace(sampling, seed=1))
    for row, expected in zip(logits, scores.softmax(-1), strict=True):
        found = Counter(choose(row.expand(4000, -1), [drawing] * 4000))
        assert set(found) <= set(expected.nonzero().flatten().tolist())
        for token, p in enumerate(expected.tolist()):
            assert found[token] / 4000 == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / 4000) + 1e-3)


def test_penalties_are_the_librarys_for_greedy_and_sampled_rows() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5))
    past = logits[0].topk(4).indices.tolist()
    penalties = Penalties((("repetition_penalty", 4.0),), 2, frozenset({0}), "cpu")
    written: Any = torch.tensor([past])
    rows_of: Any = logits[:1].clone()
    expected = RepetitionPenaltyLogitsProcessor(4.0)(written, rows_of)
    drawings = [
        Drawing.of(Sampling(1), penalties),
        Drawing.of(Sampling(1)),
        Drawing.of(Sampling(1, temperature=1e-6), penalties),
    ]
    before = logits.clone()
    rows = torch.stack([logits[0], logits[0], logits[0]])
    assert choose(rows, drawings, [past, [], past]) == [
        int(expected.argmax()),
        int(logits[0].argmax()),
        int(expected.argmax()),
    ]
    assert int(expected.argmax()) != int(logits[0].argmax()) and torch.equal(before, logits)


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    wanted = Sampling(1, temperature=1.0, seed=7)
    logits = torch.randn(20, 6, 50, generator=torch.Generator().manual_seed(0))
    alone, crowd = Drawing.of(wanted), Drawing.of(wanted)
    others = [Drawing.of(Sampling(1, temperature=t, top_p=p)) for t, p in [(0, 1), (1, 0.5), (3, 1), (1, 1), (0, 1)]]
    single = [choose(step[3:4], [alone])[0] for step in logits]
    together = [choose(step, [*others[:3], crowd, *others[3:]])[3] for step in logits]
    assert single == together and len(set(single)) > 5


def test_seeds_of_either_sign_are_different_draws() -> None:
    """n choices of seed -1 draw with -1, 0, 1, ..."""
    first = {Drawing.of(Sampling(1, temperature=1.0, seed=seed)).generator.random() for seed in range(-3, 4)}
    assert len(first) == 7
    assert Drawing.of(Sampling(1, seed=7)).generator.random() == random.Random(7).random()


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-307, 5e-324])
def test_the_coldest_temperatures_are_greedy_and_spare_the_batch(temperature: float) -> None:
    rows = torch.stack([LOGITS * 20, LOGITS])
    found = choose(rows, [Drawing.of(Sampling(1, temperature=temperature)), Drawing.of(Sampling(1))])
    assert found == [0, 0]


def test_greedy_is_the_likeliest_and_no_number_is_no_token() -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), torch.full((5,), float("nan"))])
    assert choose(rows, [Drawing.of(Sampling(1))] * 3) == [0, 4, None]


def test_logprobs_are_those_of_the_softmax_at_temperature_one() -> None:
    rows = torch.stack([LOGITS, LOGITS, LOGITS])
    tokens = describe(rows, [1, 2, 0], [2, None, 0], str)
    log = LOGITS.log_softmax(-1).tolist()
    assert tokens[0].logprob == pytest.approx(log[1]) and [t[0] for t in tokens[0].top] == [0, 1]
    assert [t[2] for t in tokens[0].top] == pytest.approx(log[:2])
    assert tokens[1].logprob is None and tokens[1].top == ()
    assert tokens[2].logprob == pytest.approx(log[0]) and tokens[2].top == ()
