"""Whether an SAE is one of this model: the model it says it was trained on, and whether it reconstructs this one.

Same width and depth are not enough: an SAE of the base model fits the instruct model, and its features may mean nothing
there. Both checks warn; neither stops, because a base model's SAE often works, and `sae measure` says how well.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from clampdown.activations.capture import forward_to
from clampdown.config import embedded_model
from clampdown.errors import SaeFitWarning
from clampdown.models.chat import encode, pad_left
from clampdown.models.known import known_model
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource, Sae
from clampdown.types import Message

POOR = 0.5
"""A share of variance left unexplained above which an SAE does not describe a model."""
_SINK = 4.0
_EMBEDDED = "clampdown-organism"
_ASKED = (
    "What is the capital of France?",
    "Write two sentences about the weather in spring, then name three birds.",
    "How do I sort a list of numbers in Python without changing the list itself?",
    "My neighbour plays loud music at night. What could I say to her?",
)


def warn_unless_fitting(lm: LanguageModel, sae: FeatureSource) -> None:
    """Warn (`SaeFitWarning`) of an SAE that was trained on another model or, when it is in memory, that does not
    reconstruct this one."""
    name = _other_model(sae.cfg.model_name, lm.name)
    left = unexplained(lm, sae) if isinstance(sae, Sae) else None
    poor = left is not None and left > POOR
    if name is None and not poor:
        return
    said = [] if name is None else [f"it was trained on {name}, and this model is {lm.name}"]
    said += [f"it leaves {left:.0%} of this model's variance unexplained"] if poor else []
    warnings.warn(
        f"SAE '{sae.name}' may not be this model's: {'; '.join(said)} "
        "(`clampdown sae measure` says more; its --graft moves an SAE to another model's mean)",
        SaeFitWarning,
        stacklevel=2,
    )


def _other_model(trained_on: str, name: str) -> str | None:
    """The model that the SAE names, where both are names and differ; a directory or a file has no name to compare."""
    if not trained_on or Path(name).exists() or name.endswith(".gguf"):
        return None
    known = known_model(name)
    here = _EMBEDDED if embedded_model(name) else known.hub if known else name
    there = known_model(trained_on)
    return None if _bare(here) == _bare(there.hub if there else trained_on) else trained_on


def _bare(name: str) -> str:
    """A model's name without its owner: mirrors of a model have another."""
    return name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")


@torch.no_grad()
def unexplained(lm: LanguageModel, sae: Sae) -> float | None:
    """Share of the variance of a few short chats' residuals that is left, sinks excepted; None without a chat template
    or when nothing varies."""
    if not lm.tokenizer.chat_template:
        return None
    batch = pad_left([encode(lm, [Message("user", text)]) for text in _ASKED], lm.pad_id, lm.device)
    hidden = forward_to(lm, batch, [sae.cfg.site])[sae.cfg.site].float()
    norms = hidden.norm(dim=-1)
    later = batch.attention_mask.bool() & (batch.position_ids > 0)
    x = hidden[later & (norms <= _SINK * norms[later].median())]
    spread = float((x - x.mean(0)).square().sum())
    rebuilt = sae.reconstruct(x.to(sae.device)).to(x.device)
    return float((x - rebuilt).square().sum()) / spread if spread > 0 else None
