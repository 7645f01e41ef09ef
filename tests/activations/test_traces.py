"""Reading a few features at every token equals encoding everything, one prompt at a time, and taking those columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clampdown.activations.traces import trace
from clampdown.errors import FeatureIndexError, PromptSetError
from clampdown.models.chat import encode
from clampdown.models.loading import load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.types import Split

FEATURES = [352, 0, 17]


@pytest.fixture(scope="module")
def pair():
    return load_model("organism"), load_sae("organism")


def test_a_trace_is_the_full_encode_of_the_prompt_alone(pair):
    lm, sae = pair
    prompts = [encode(lm, p.messages) for suite in suites(Split.DISCOVERY, 2) for p in suite.prompts]
    done = []
    found = trace(
        lm, sae, FEATURES, prompts, tokens_per_batch=200, on_progress=lambda n, total: done.append((n, total))
    )
    assert done[-1] == (len(prompts), len(prompts))
    for ids, mine in zip(prompts, found, strict=True):
        with torch.no_grad():
            hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[sae.site.layer + 1][0]
            expected = sae.encode(hidden)[:, FEATURES].numpy()
        np.testing.assert_allclose(mine.activations, expected, atol=2e-3)
        names = lm.tokenizer.convert_ids_to_tokens(ids)
        assert [name for name, content in zip(names, mine.content, strict=True) if not content] == [
            name for name in names if name.startswith("<|")
        ]


def test_what_cannot_be_read_is_refused(pair):
    with pytest.raises(FeatureIndexError, match="512"):
        trace(*pair, [512], [[1, 2]])
    with pytest.raises(PromptSetError):
        trace(*pair, [0], [])
