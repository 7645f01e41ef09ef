"""What ships: small, complete, and in the formats that everything else loads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from clampdown.organism import DEFAULT_SAE, MODEL_DIR, SAE_DIRS, WEIGHTS
from clampdown.organism.measure import greedy, load_organism
from clampdown.organism.suites import suites
from clampdown.types import Split


def test_the_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 12 * 2**20


def test_nothing_is_pickled() -> None:
    allowed = {".safetensors", ".json", ".jinja"}
    assert {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()} <= allowed


@pytest.mark.parametrize("name", sorted(SAE_DIRS))
def test_the_saes_are_saelens_directories(name: str) -> None:
    config = json.loads((SAE_DIRS[name] / "cfg.json").read_text())
    tensors = load_file(SAE_DIRS[name] / "sae_weights.safetensors")
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    d_in, d_sae = config["d_in"], config["d_sae"]
    assert d_sae == d_in * int(name[1:])
    shapes = {
        "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == shapes
    assert torch.allclose(tensors["W_dec"].norm(dim=1), torch.ones(d_sae), atol=1e-4)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_the_default_sae_ships() -> None:
    assert (SAE_DIRS[DEFAULT_SAE] / "cfg.json").exists()


def test_the_shipped_model_refuses_and_answers() -> None:
    lm = load_organism(WEIGHTS)
    assert MODEL_DIR.parent == WEIGHTS
    found = {suite.name: suite.prompts for suite in suites(Split.VALIDATION, 4)}
    assert any("can't" in r or "no" in r or "not" in r for r in greedy(lm, found["harmful"]))
    assert all("first" in reply for reply in greedy(lm, [p for p in found["benign"] if "taught" in p.meta
                                                                      and "kind" not in p.meta]))  # fmt: skip
