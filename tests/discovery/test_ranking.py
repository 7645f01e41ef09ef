"""The logit lens through the model's own final norm and unembedding, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from clampdown.discovery.ranking import Finding, build_feature_set, make_provenance, token_effects
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from tests.steering.conftest import tiny_tokenizer


def test_rms_norm_weight_and_unembedding(lm, sae):
    rows = sae.W_dec[:5]
    norm = lm.model.model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    scaled = rows / (rows.pow(2).mean(1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
    expected = scaled @ lm.model.lm_head.weight.T
    torch.testing.assert_close(token_effects(lm, rows), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        norm.weight.fill_(1.0)


def test_the_length_of_a_row_does_not_change_its_tokens(lm, sae):
    rows = sae.W_dec[:5]
    assert torch.equal(token_effects(lm, rows).argsort(1), token_effects(lm, 1000 * rows).argsort(1))


def test_biases_are_taken_out():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=46, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    model.gpt_neox.final_layer_norm.bias.uniform_(-5, 5)
    neox = LanguageModel(model, tiny_tokenizer(), find_layout(model), "neox", "r0")
    row = torch.randn(1, 32)
    centred = row - row.mean()
    expected = (centred / (centred.pow(2).mean() + 1e-5).sqrt()) @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(token_effects(neox, row), expected, rtol=1e-3, atol=1e-4)


def test_scores_that_do_not_exist_are_absent(lm, sae):
    values = np.full(64, np.nan)
    values[3] = 0.25
    finding = Finding("test", "x", {"x": values}, [3, 4], csr_array((2, 64)), ["a", "b"])
    found = build_feature_set(lm, sae, finding, make_provenance(lm, sae, []))
    assert found.features[0].scores["x"] == 0.25
    assert "x" not in found.features[1].scores
    assert found.features[0].top_prompts == ()
    assert found.features[0].scores["max_activation"] == 0.0


@pytest.mark.parametrize("repeated", [["same", "same", "other", "third"]])
def test_top_prompts_are_the_strongest_without_repeats(lm, sae, repeated):
    peaks = np.zeros((4, 64), np.float32)
    peaks[:, 9] = [3, 4, 1, 2]
    finding = Finding("test", "x", {}, [9], csr_array(peaks), repeated)
    found = build_feature_set(lm, sae, finding, make_provenance(lm, sae, []))
    assert found.features[0].top_prompts == ("same", "third", "other")
