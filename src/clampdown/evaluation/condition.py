"""A CAST-style condition: steer when the prompt's mean cosine with a dense vector exceeds a threshold (2409.05907).

1. The condition vector c is the difference of means between harmful and harmless prompts, pooled over their tokens.
   (CAST takes the first principal component of the mean-centred pairs, which points the same way up to noise.)
2. A gate reads SAE features, so c is put as an SAE of two features: relu(cos(x, c)) and relu(-cos(x, c)), the inputs
   rescaled to one length. Their difference, pooled by the mean over the prompt's tokens, is the mean cosine.
3. The threshold is the one with the best F1 on the prompts that the vector came from, as CAST searches it. It carries
   no guarantee: that is what it is compared for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import NotEnoughDataError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Gate, Plan, SaeRef
from clampdown.store import content_hash
from clampdown.types import Prompt, Site

NAME = "condition vector"
BATCH = 64


@dataclass(frozen=True, slots=True)
class Condition:
    """A gate and the two-feature SAE that it reads. `f1` is the threshold's, on the prompts it was chosen on."""

    sae: Sae
    gate: Gate
    f1: float

    @property
    def ref(self) -> SaeRef:
        return SaeRef.of(self.sae)


def condition_sae(site: Site, vector: Sequence[float]) -> Sae:
    """The condition vector as an SAE: feature 0 is relu(cos), feature 1 relu(-cos). Raises `NotEnoughDataError` for a
    zero vector."""
    raw = torch.tensor(vector, dtype=torch.float32)
    if not bool(raw.norm() > 0):
        raise NotEnoughDataError("the condition vector is zero: the two sides have the same mean")
    unit = raw / raw.norm() / math.sqrt(len(raw))  # inputs are rescaled to length sqrt(d_in)
    return _of_unit(site, unit, content_hash(list(vector)))


@dataclass(frozen=True, slots=True)
class StoredCondition:
    """A condition's SAE as plain numbers, for a file: no checkpoint holds it."""

    site: str
    revision: str
    unit: tuple[float, ...]

    @classmethod
    def of(cls, sae: Sae) -> StoredCondition:
        return cls(sae.cfg.site.name, sae.revision, tuple(sae.W_dec[0].tolist()))

    def sae(self) -> Sae:
        """The SAE that was stored, to the last bit."""
        return _of_unit(Site.parse(self.site), torch.tensor(self.unit, dtype=torch.float32), self.revision)


def _of_unit(site: Site, unit: Float[Tensor, " d_in"], revision: str) -> Sae:
    pair = torch.stack([unit, -unit])
    zeros = {"b_enc": torch.zeros(2), "b_dec": torch.zeros(len(unit))}
    cfg = SaeConfig(
        architecture="relu",
        d_in=len(unit),
        d_sae=2,
        site=site,
        apply_b_dec_to_input=False,
        normalize_activations="constant_norm_rescale",
    )
    return Sae(cfg, {"W_enc": pair.T.contiguous(), "W_dec": pair, **zeros}, NAME, revision)


def condition(
    lm: LanguageModel, site: Site, vector: Sequence[float], harmful: Sequence[Prompt], harmless: Sequence[Prompt]
) -> Condition:
    """The gate with the best F1 on these prompts. Raises `NotEnoughDataError` without prompts of both kinds."""
    if not harmful or not harmless:
        raise NotEnoughDataError("a condition needs both harmful and harmless prompts")
    sae = condition_sae(site, vector).to(lm.device)
    opened = Gate(site=site.name, features=(0, 1), weights=(1.0, -1.0), bias=0.0, threshold=0.0,
                  poolings=("mean", "mean"))  # fmt: skip
    found = Condition(sae, opened, 0.0)
    threshold, f1 = best_f1_threshold(scores(lm, found, harmful), scores(lm, found, harmless))
    return replace(found, gate=opened.changed(threshold=threshold), f1=f1)


def scores(lm: LanguageModel, found: Condition, prompts: Sequence[Prompt]) -> Float[np.ndarray, " prompts"]:
    """Each prompt's score, as the gate itself reads it when it steers."""
    site = found.gate.site
    nothing = Edit(site=site, operator="scale", features=(0,), strengths=(1.0,))
    plan = Plan.of(lm, [found.sae], [nothing], NAME, gate=found.gate)
    values: list[float] = []
    ids = [encode(lm, prompt.messages) for prompt in prompts]
    for start in range(0, len(ids), BATCH):
        with steer(lm, plan, found.sae) as steering:
            next_token_logits(lm, ids[start : start + BATCH])
            values += [receipt.gate_score or 0.0 for receipt in steering.receipts() if receipt]
    return np.array(values)


def best_f1_threshold(
    harmful: Float[np.ndarray, " harmful"], harmless: Float[np.ndarray, " harmless"]
) -> tuple[float, float]:
    """The threshold (fires above it) with the best F1 for harmful prompts, and that F1; of equals the highest."""
    cuts = np.unique(np.concatenate([harmful, harmless]))
    below = [float(cuts[0]) - 1.0, *((cuts[1:] + cuts[:-1]) / 2).tolist()]
    hits = np.array([(harmful > cut).sum() for cut in below])
    false = np.array([(harmless > cut).sum() for cut in below])
    f1 = 2 * hits / (hits + false + len(harmful))
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return below[best], float(f1[best])
