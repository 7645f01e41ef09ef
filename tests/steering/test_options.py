"""Options read from a prompt's cache, arms together, against one full pass per (arm, prompt, option)."""

from __future__ import annotations

import pytest
import torch

from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.options import Continued, continuation_log_likelihoods
from clampdown.steering.plan import Plan
from tests.models.conftest import ARCHITECTURES
from tests.steering.test_prompt_sharing import model_of, plans_at, sae_at

OPTIONS = ((7, 9, 11), (7, 13), (21,))
PROMPTS = [[1, 5, 9, 30, 31], [1, 44], [1, 17, 18, 19, 20, 21, 22, 23]]


def alone(lm: LanguageModel, sae: Sae, plan: Plan | None, prompt: list[int], option: tuple[int, ...], ended: bool):
    """One forward over prompt and option, unpadded, no cache."""
    ids = torch.tensor([[*prompt, *option]])
    with steer(lm, plan, sae, prompt_width=len(prompt), require_reach=False):
        log_probs = lm.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    total = sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(option))
    return total + (float(log_probs[-1, list(lm.eos_ids)].logsumexp(0)) if ended else 0.0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen3_moe", "gpt_neox"])
@pytest.mark.parametrize("ended", [False, True])
def test_options_equal_one_pass_each(architecture: str, ended: bool) -> None:
    assert architecture in ARCHITECTURES
    lm, site = model_of(architecture), "blocks.1.hook_resid_post"
    sae, plans = sae_at(site), plans_at(site, 5.0)
    rows = [Continued(plan, prompt, OPTIONS, ended) for prompt in PROMPTS for plan in plans]
    found = continuation_log_likelihoods(lm, sae, rows)
    for row, values in zip(rows, found, strict=True):
        expected = [alone(lm, sae, row.plan, list(row.prompt), option, ended) for option in OPTIONS]
        assert values == pytest.approx(expected, abs=2e-3)
    assert len({values[0] for values in found}) >= 6 * len(PROMPTS), "these plans change nothing"


def test_options_of_one_token_need_no_second_pass() -> None:
    lm, site = model_of("llama"), "blocks.1.hook_resid_post"
    found = continuation_log_likelihoods(lm, sae_at(site), [Continued(None, PROMPTS[0], ((7,), (9,)))])
    assert found[0] == pytest.approx([alone(lm, sae_at(site), None, PROMPTS[0], (i,), False) for i in (7, 9)], abs=1e-4)
