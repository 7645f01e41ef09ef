"""An SAE of another model is warned of; the model's own is not."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from clampdown.activations.fit import POOR, unexplained, warn_unless_fitting
from clampdown.errors import SaeFitWarning
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae, open_sae
from clampdown.saes.sae import Sae


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def sae() -> Sae:
    return load_sae("organism")


def trained_on(sae: Sae, name: str) -> Sae:
    return replace(sae, cfg=replace(sae.cfg, model_name=name))


def test_the_models_own_sae_is_fine(lm: LanguageModel, sae: Sae) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unless_fitting(lm, sae)
        warn_unless_fitting(lm, open_sae("organism:x8"))
        warn_unless_fitting(replace(lm, name="org/Model-7B"), trained_on(sae, "mirror/meta-model-7b"))
        warn_unless_fitting(replace(lm, name="qwen2.5-coder-0.5b"), trained_on(sae, "Qwen/Qwen2.5-Coder-0.5B-Instruct"))
        warn_unless_fitting(replace(lm, name="/tmp"), trained_on(sae, "org/anything"))
    left = unexplained(lm, sae)
    assert left is not None and left < 0.3


@pytest.mark.parametrize("name", ["org/Model-7B", "clampdown-organism"])
def test_an_sae_of_another_model_is_warned_of(lm: LanguageModel, sae: Sae, name: str) -> None:
    with pytest.warns(SaeFitWarning, match="trained on"):
        warn_unless_fitting(replace(lm, name="org/Model-7B-Instruct"), trained_on(sae, name))


def test_an_sae_that_does_not_reconstruct_is_warned_of(lm: LanguageModel, sae: Sae) -> None:
    broken = replace(sae, tensors={**sae.tensors, "W_dec": sae.W_dec[torch.randperm(len(sae.W_dec))]})
    left = unexplained(lm, broken)
    assert left is not None and left > POOR
    with pytest.warns(SaeFitWarning, match="unexplained"):
        warn_unless_fitting(lm, broken)


def test_without_a_template_only_names_are_compared(lm: LanguageModel, sae: Sae) -> None:
    class Plain:
        chat_template = None

    assert unexplained(replace(lm, tokenizer=Plain()), sae) is None
