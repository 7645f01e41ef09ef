"""The SAEs of real models that the package brings: small, whole, and the ones that their cards describe."""

from __future__ import annotations

import json

import pytest
import torch

from clampdown.config import SHIPPED_SAES, shipped_saes
from clampdown.models.known import known_model
from clampdown.saes.checkpoints import load_sae, open_sae

LARGEST = 15_000_000


@pytest.mark.parametrize("name", shipped_saes())
def test_a_shipped_sae_is_the_one_that_its_card_describes(name: str) -> None:
    directory = SHIPPED_SAES / name
    card = json.loads((directory / "card.json").read_text(encoding="utf-8"))
    sae = load_sae(name)
    assert sae.revision == card["sae"]["revision"]
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (card["sae"]["d_model"], card["sae"]["features"])
    known = known_model(name)
    assert known is not None and sae.cfg.model_name == known.hub == card["sae"]["model"]
    assert card["fit"]["fvu"] < 0.2 and card["fit"]["dead"] < 0.03
    assert f"{card['fit']['fvu']:.3f}" in (directory / "README.md").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in directory.iterdir()) <= LARGEST


def test_one_is_shipped_for_the_model_of_the_study() -> None:
    assert "qwen2.5-coder-0.5b" in shipped_saes()


def test_features_of_a_shipped_sae_are_read_alone() -> None:
    sae, opened = load_sae("qwen2.5-coder-0.5b"), open_sae("qwen2.5-coder-0.5b")
    x = 3 * torch.randn(20, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)) + sae.b_dec
    assert opened.cfg.site.name == "blocks.15.hook_resid_post"
    torch.testing.assert_close(opened.select([5, 900]).read(x), sae.encode(x)[:, [5, 900]], atol=1e-4, rtol=1e-4)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae), atol=1e-2)
