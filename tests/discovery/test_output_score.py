"""The output score against its definition, one feature at a time through the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clampdown.discovery.output_score import N_TOKENS, output_scores
from clampdown.discovery.ranking import token_effects
from tests.steering.conftest import SITE, random_sae

TEXT = [1, 9, 22, 14]


def by_definition(lm, sae, feature, factor):
    def amplify(_module, _args, x):
        code = sae.encode(x)
        more = code.clone()
        more[:, -1, feature] += factor * code[:, -1].max()
        return x + sae.decode(more, x) - sae.decode(code, x)

    handle = lm.layout.blocks[SITE.layer].register_forward_hook(amplify)
    with torch.no_grad():
        p = lm.model(input_ids=torch.tensor([TEXT]), use_cache=False).logits[0, -1].softmax(-1)
    handle.remove()
    promoted = token_effects(lm, sae.W_dec[[feature]])[0].topk(N_TOKENS).indices.tolist()
    order = p.argsort(descending=True).tolist()
    return (1 - min(order.index(t) for t in promoted) / len(p)) * max(p[t].item() for t in promoted)


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
@pytest.mark.parametrize("factor", [0.5, 10.0])
def test_the_score_is_the_published_one(lm, factor, normalization):
    sae = random_sae(normalize_activations=normalization)
    found = output_scores(lm, sae, TEXT, factor=factor)
    expected = [by_definition(lm, sae, f, factor) for f in range(0, 64, 7)]
    np.testing.assert_allclose(found[::7], expected, rtol=1e-3)
    assert len(set(np.round(found, 6))) > 10


def test_chunks_do_not_matter(lm, sae, monkeypatch):
    seen = []
    whole = output_scores(lm, sae, TEXT, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 64)]
    monkeypatch.setattr("clampdown.discovery.output_score.ROWS", 10)
    np.testing.assert_allclose(output_scores(lm, sae, TEXT), whole, rtol=1e-5)
