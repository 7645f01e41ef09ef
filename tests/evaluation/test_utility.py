"""Teacher forcing against one-prompt-at-a-time passes, against generation itself, and its refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from clampdown.errors import NotEnoughDataError, PromptSetError, ScopeError
from clampdown.evaluation.scoring import option_mass
from clampdown.evaluation.utility import (
    BATCH_ROWS,
    Forced,
    base_replies,
    costs,
    option_accuracy,
    option_choices,
    teacher_force,
)
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from clampdown.types import ArmKind, Message, Prompt
from tests.evaluation.conftest import arm, clamp, gate, prompt
from tests.steering.conftest import SITE, make_plan

STRENGTH = 6.0
PROMPTS = tuple(prompt(i) for i in range(7))


@pytest.fixture(scope="module")
def forced(lm: LanguageModel) -> tuple[Forced, ...]:
    """Replies of different lengths: the tiny model seldom ends one, so some are cut here."""
    replies = base_replies(lm, PROMPTS, max_new_tokens=9)
    return tuple(
        Forced(text.prompt, text.reply[: 3 + i], ended=i % 2 == 0) if i else text for i, text in enumerate(replies)
    )


@contextmanager
def clamped_by_hand(lm: LanguageModel, sae: Sae, feature: int, start: int) -> Iterator[None]:
    """The clamp as the paper writes it, by encode and decode, on columns from `start` of an unpadded pass."""

    def edit(_module: object, _args: object, output: Tensor) -> Tensor:
        code = sae.encode(output)
        changed = code.clone()
        changed[..., feature] = STRENGTH
        delta = sae.decode(changed) - sae.decode(code)
        delta[:, :start] = 0
        return output + delta

    handle = lm.layout.blocks[SITE.layer].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


def kl_by_hand(lm: LanguageModel, sae: Sae, forced: Sequence[Forced], scope: str) -> tuple[float, float]:
    """KL(base || steered) and top-1 agreement, one text at a time, no padding."""
    divergences, agreed = [], []
    for text in forced:
        head = encode(lm, text.prompt.messages)
        ids = torch.tensor([[*head, *(text.reply if text.ended else text.reply[:-1])]])
        start = {"all": 0, "assistant": len(head) - len(lm.chat.generation_prompt), "generated": len(head)}[scope]
        base = lm.model(ids).logits[0, len(head) - 1 :].log_softmax(-1)
        with clamped_by_hand(lm, sae, 3, start):
            steered = lm.model(ids).logits[0, len(head) - 1 :].log_softmax(-1)
        assert len(base) == text.n_scored
        divergences.append(torch.nn.functional.kl_div(steered, base, log_target=True, reduction="none").sum(-1))
        agreed.append((base.argmax(-1) == steered.argmax(-1)).float())
    return float(torch.cat(divergences).mean()), float(torch.cat(agreed).mean())


@pytest.mark.parametrize("scope", ["all", "assistant", "generated"])
@pytest.mark.parametrize("batch_rows", [2, 5, BATCH_ROWS])
def test_kl_is_that_of_single_passes_whatever_the_batch(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], scope: str, batch_rows: int
) -> None:
    arms = [arm(clamp(STRENGTH, scope=scope, name=scope)), arm(clamp(1.0, feature=9), "other"), BASELINE]
    found = costs(lm, sae, arms, forced, batch_rows=batch_rows)
    kl, agreement = kl_by_hand(lm, sae, forced, scope)
    assert found["steered"].kl == pytest.approx(kl, rel=1e-3)
    assert found["steered"].top1_agreement == pytest.approx(agreement)
    assert found["steered"].n_tokens == sum(text.n_scored for text in forced)
    assert found["baseline"].kl == pytest.approx(0.0, abs=1e-6)
    assert (found["baseline"].top1_agreement, found["baseline"].touched) == (1.0, 0.0)
    assert kl > 0.01


def test_scopes_touch_the_share_of_tokens_that_they_name(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]
) -> None:
    """Padding on either side is touched by none."""
    scopes = ["all", "prompt", "assistant", "generated"]
    found = costs(lm, sae, [arm(clamp(STRENGTH, scope=s, name=s), s) for s in scopes], forced)
    prompts = sum(len(encode(lm, text.prompt.messages)) for text in forced)
    replies = sum(len(text.reply) - (not text.ended) for text in forced)
    opening = len(lm.chat.generation_prompt) * len(forced)
    expected = {"all": prompts + replies, "prompt": prompts, "assistant": opening + replies, "generated": replies}
    for scope, touched in expected.items():
        assert (found[scope].touched or 0) * (prompts + replies) == pytest.approx(touched), scope


@pytest.mark.parametrize("scope", ["all", "prompt", "assistant", "generated", "last_user"])
def test_a_steered_reply_is_what_teacher_forcing_finds_likeliest(lm: LanguageModel, sae: Sae, scope: str) -> None:
    """Greedy decoding with a cache, token by token, against one pass over the finished reply."""
    steered = arm(clamp(STRENGTH, scope=scope))
    with steer(lm, [steered.plan] * len(PROMPTS), sae) as steering:
        ids = [encode(lm, p.messages) for p in PROMPTS]
        replies = generate(lm, ids, max_new_tokens=10, on_keep=steering.keep_rows)
    texts = [Forced(p, r.ids, r.finished) for p, r in zip(PROMPTS, replies, strict=True)]
    scored = teacher_force(lm, sae, [(steered, text) for text in texts])
    for text, row in zip(texts, scored.log_probs.argmax(-1).tolist(), strict=True):
        assert tuple(row[: len(text.reply)]) == text.reply
        assert not text.ended or row[len(text.reply)] in lm.eos_ids
    assert {t.reply for t in base_replies(lm, PROMPTS, max_new_tokens=10)} != {t.reply for t in texts}


def gated(threshold: float) -> Plan:
    return make_plan(clamp(STRENGTH).edits[0], gate=gate(3, 5, 8, threshold=threshold))


def test_a_gate_reads_the_prompt_only(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]) -> None:
    """The same scores as at prefill in generation, and no reply changes them."""
    steered = arm(gated(0.0))
    scores = {r.prompt.id: r.receipt.gate_score for r in generate_arms(
        lm, sae, [(steered, p) for p in PROMPTS], max_new_tokens=1) if r.receipt}  # fmt: skip
    receipts = teacher_force(lm, sae, [(steered, text) for text in forced]).receipts
    for text, receipt in zip(forced, receipts, strict=True):
        assert receipt is not None
        assert receipt.gate_score == pytest.approx(scores[text.prompt.id], abs=1e-5)


def test_a_gate_that_stays_shut_costs_nothing(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]) -> None:
    found = costs(lm, sae, [arm(gated(1e9), "shut"), arm(gated(-1e9), "open"), arm(clamp(STRENGTH), "free")], forced)
    assert found["shut"].kl == pytest.approx(0.0, abs=1e-6)
    assert (found["shut"].touched, found["shut"].mean_edit) == (0.0, 0.0)
    assert found["open"].kl == pytest.approx(found["free"].kl)


def test_a_scope_that_covers_nothing_is_an_error_and_not_an_unsteered_number(lm: LanguageModel, sae: Sae) -> None:
    one_token = [Forced(p, (10,), ended=False) for p in PROMPTS]
    with pytest.raises(ScopeError, match="one token each"):
        costs(lm, sae, [arm(clamp(STRENGTH, scope="generated"))], one_token)
    assert (costs(lm, sae, [arm(clamp(STRENGTH))], one_token)["steered"].kl or 0) > 0


def test_no_text_is_no_cost(lm: LanguageModel, sae: Sae) -> None:
    for texts in ([], [Forced(PROMPTS[0], (), ended=False)]):
        with pytest.raises(NotEnoughDataError):
            costs(lm, sae, [BASELINE], texts)


def test_a_model_that_answers_in_nan_has_no_kl(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]) -> None:
    vectors = {"direction": (3e38,) * lm.d_model}
    edit = Edit(site=SITE.name, operator="add_direction", vector="direction", strengths=(10.0,))
    assert costs(lm, sae, [arm(make_plan(edit, vectors=vectors))], forced)["steered"].kl is None


def choice(i: int, *options: str) -> Prompt:
    return Prompt(f"q{i}", (Message("user", f"w{i} w{i + 1}"),), "facts", answer=options[0], options=options)


QUESTIONS = [choice(1, "w5", "w5 w6", "w7"), choice(2, "w9 w1", "w3"), choice(3, "w4", "w8", "w2", "w30 w31 w32")]


@pytest.mark.parametrize("ended", [True, False])
def test_options_are_scored_as_single_unpadded_replies_are(lm: LanguageModel, sae: Sae, ended: bool) -> None:
    found = option_choices(lm, sae, [BASELINE, arm(clamp(STRENGTH))], QUESTIONS, ended=ended, batch_rows=4)
    for steered in (False, True):
        mine = [c for c in found if (c.arm == "steered") is steered]
        for question, scored in zip(QUESTIONS, mine, strict=True):
            head = encode(lm, question.messages)
            for option, value in zip(question.options, scored.log_likelihoods, strict=True):
                tail = lm.tokenizer.convert_tokens_to_ids([*option.split(), *(["<end>"] if ended else [])])
                ids = torch.tensor([[*head, *tail]])
                with clamped_by_hand(lm, sae, 3, 0 if steered else ids.shape[1]):
                    log_probs = lm.model(ids).logits[0].log_softmax(-1)
                expected = sum(float(log_probs[len(head) - 1 + i, token]) for i, token in enumerate(tail))
                assert value == pytest.approx(expected, rel=1e-4)
            best = max(zip(scored.log_likelihoods, question.options, strict=True))[1]
            assert (scored.chosen, scored.correct) == (best, best == question.answer)


def test_without_its_end_an_option_never_loses_to_one_that_goes_on(lm: LanguageModel) -> None:
    """Why options of which one begins another need `ended`: "4" always beats "42"."""
    begun, longer, _ = option_choices(lm, None, [BASELINE], QUESTIONS[:1])[0].log_likelihoods
    assert begun >= longer


def test_a_model_that_answers_in_nan_chooses_nothing_and_is_never_right(lm: LanguageModel, sae: Sae) -> None:
    asked = [replace(item, answer=item.options[0]) for item in QUESTIONS]
    overflows = Edit(site=SITE.name, operator="add_direction", vector="v", strengths=(3e38,))
    broken = Arm("broken", ArmKind.CONTROL, make_plan(overflows, vectors={"v": (10.0,) * 32}))
    choices = option_choices(lm, sae, [broken], asked)
    assert all(math.isnan(value) for choice in choices for value in choice.log_likelihoods)
    assert {(choice.chosen, choice.correct) for choice in choices} == {("", False)}


def test_multiple_choice_refuses_what_cannot_act_there(lm: LanguageModel, sae: Sae) -> None:
    with pytest.raises(ScopeError, match="steers generated tokens"):
        option_choices(lm, sae, [arm(clamp(STRENGTH, scope="generated"))], QUESTIONS)
    with pytest.raises(PromptSetError, match="has options"):
        option_choices(lm, sae, [BASELINE], PROMPTS)


def test_option_accuracy_counts_by_arm_and_suite(lm: LanguageModel, sae: Sae) -> None:
    choices = option_choices(lm, sae, [BASELINE, Arm("again", ArmKind.CONTROL)], QUESTIONS)
    found = option_accuracy(choices)
    right = sum(c.correct for c in choices if c.arm == "baseline")
    assert found["baseline"]["facts"] == found["again"]["facts"]
    assert (found["baseline"]["facts"].value, found["baseline"]["facts"].n) == (right / 3, 3)


def test_mc2_is_the_mean_share_of_probability_on_the_true_options(lm: LanguageModel, sae: Sae) -> None:
    """TruthfulQA's second score, end to end: from the options' likelihoods, not from the likeliest."""
    asked = [
        replace(item, meta={"scoring": "option-mass", "true_options": json.dumps(list(item.options[:2]))})
        for item in QUESTIONS
    ]
    choices = option_choices(lm, sae, [BASELINE], asked)
    for choice, item in zip(choices, asked, strict=True):
        weights = np.exp(np.array(choice.log_likelihoods))
        assert choice.mass == pytest.approx(weights[:2].sum() / weights.sum())
        assert choice.mass == option_mass(item, choice.log_likelihoods)
    (found,) = option_accuracy(choices)["baseline"].values()
    assert found.value == pytest.approx(np.mean([choice.mass for choice in choices]))
    assert all(choice.mass is None for choice in option_choices(lm, sae, [BASELINE], QUESTIONS[:2]))
