"""The layer scan against sklearn, on halves that never meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from clampdown.activations.capture import forward_to
from clampdown.discovery.layers import scan_layers
from clampdown.errors import NotEnoughDataError
from clampdown.models.chat import encode, pad_left
from clampdown.types import Site
from tests.discovery.conftest import random_prompts
from tests.steering.conftest import WORDS


def residuals(lm, prompts, layer):
    rows = [
        forward_to(lm, pad_left([encode(lm, p.messages)], lm.pad_id), [Site(layer)])[Site(layer)][0, -1]
        for p in prompts
    ]
    return torch.stack(rows)


def test_every_layer_and_sae_gets_a_row_that_sklearn_agrees_with(lm, sae, harmful, harmless):
    rows = scan_layers(lm, [sae], harmful, harmless)
    assert [row.site for row in rows] == [Site(layer).name for layer in range(lm.n_layers)] + [sae.cfg.site.name]
    labels = np.r_[np.ones(len(harmful[1::2])), np.zeros(len(harmless[1::2]))]
    for layer, row in enumerate(rows[:-1]):
        made = [residuals(lm, side[::2], layer).double().mean(0) for side in (harmful, harmless)]
        tested = residuals(lm, [*harmful[1::2], *harmless[1::2]], layer).double()
        assert row.auroc == pytest.approx(roc_auc_score(labels, (tested @ (made[0] - made[1])).numpy()), abs=1e-9)
        assert row.n == len(labels)
        shown = np.r_[row.harmful, row.harmless]
        assert roc_auc_score(labels, shown) == pytest.approx(row.auroc, abs=0.01)
        assert np.mean(row.harmless) == pytest.approx(0.0, abs=1e-3)
        assert np.mean(row.harmful) == pytest.approx(row.d_prime, abs=1e-3)
    last = rows[-1]
    codes = sae.encode(residuals(lm, [*harmful[1::2], *harmless[1::2]], sae.cfg.site.layer))[:, last.feature]
    assert last.auroc == pytest.approx(roc_auc_score(labels, codes.numpy()), abs=0.02)


def test_a_direction_made_on_noise_separates_nothing(lm, harmful):
    """Both sides from one source: what the first half shows by chance must not carry over."""
    noise = random_prompts(120, WORDS, "noise")
    rows = scan_layers(lm, [], noise[:60], noise[60:])
    assert all(0.25 < row.auroc < 0.75 for row in rows)
    with pytest.raises(NotEnoughDataError):
        scan_layers(lm, [], harmful[:1], harmful)
