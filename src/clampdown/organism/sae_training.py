"""Train a BatchTopK sparse autoencoder on the organism's residual stream and save it as a JumpReLU SAE.

    pre  = (x - b_dec) W_enc + b_enc          acts = the batch's k x |batch| largest of relu(pre), the rest zero
    loss = |x - acts W_dec - b_dec|^2 / var(x) + AUX * (dead features' reconstruction of what is left over)

BatchTopK (Bussmann et al. 2412.06410) keeps k features per token on average. At inference the batch is not there to
compare with, so the smallest value that survived, averaged over training, becomes one threshold for all features.
The auxiliary loss (Gao et al. 2406.04093) lets features that have not fired lately explain the error: none stays dead.
Files are a SAELens 6 directory: cfg.json and sae_weights.safetensors, strict `pre > threshold`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clampdown.organism import corpus
from clampdown.organism.corpus import Cursor, Document
from clampdown.organism.tokenizer import PAD, token_id

LAYER = 3
HOOK_NAME = f"blocks.{LAYER}.hook_resid_post"
MODEL_NAME = "clampdown-organism"
BUFFER_TOKENS = 300_000
BATCH = 1024
AUX_WEIGHT, AUX_K, DEAD_AFTER = 1 / 32, 64, 150
THRESHOLD_RATE = 0.01
ACTIVATION_SEED = 10_007
"""Offset of the corpus seed for activations: other documents than the model was trained on."""


@dataclass(frozen=True, slots=True)
class SaeRecipe:
    """One SAE: its directory's name, its width, and how many features are active per token on average."""

    name: str
    features: int
    k: int = 8
    steps: int = 2500
    lr: float = 2e-3


RECIPES = (SaeRecipe("sae-x4", 512), SaeRecipe("sae-x8", 1024))


@dataclass(frozen=True, slots=True)
class TrainedSae:
    """W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in] with unit rows, b_dec [d_in], one threshold."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: float

    def encode(self, x: Tensor) -> Tensor:
        pre = (x - self.b_dec) @ self.w_enc + self.b_enc
        return torch.relu(pre) * (pre > self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.w_dec + self.b_dec


class _BatchTopK(nn.Module):
    """The trainable form. Decoder rows are kept at unit norm, so that activations of features are comparable."""

    def __init__(self, data: Tensor, recipe: SaeRecipe) -> None:
        super().__init__()
        rows = torch.randn(recipe.features, data.shape[1])
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.w_dec = nn.Parameter(rows)
        self.w_enc = nn.Parameter(rows.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(recipe.features))
        self.b_dec = nn.Parameter(data.mean(0))
        self.k = recipe.k
        self.threshold = 0.0
        self.silent_for = torch.zeros(recipe.features)

    def loss(self, x: Tensor, variance: Tensor) -> Tensor:
        pre = torch.relu((x - self.b_dec) @ self.w_enc + self.b_enc)
        kept, smallest = _largest(pre, self.k)
        self.threshold += THRESHOLD_RATE * (smallest - self.threshold) if self.threshold else smallest
        error = x - kept @ self.w_dec - self.b_dec
        self._note_fired(kept)
        return error.square().sum(1).mean() / variance + AUX_WEIGHT * self._auxiliary(pre, error.detach())

    def _note_fired(self, kept: Tensor) -> None:
        fired = (kept.detach() > 0).any(0)
        self.silent_for = torch.where(fired, 0.0, self.silent_for + 1)

    def _auxiliary(self, pre: Tensor, error: Tensor) -> Tensor:
        """How badly the dead features, left to themselves, reconstruct the error (relative to its size)."""
        dead = self.silent_for > DEAD_AFTER
        if not bool(dead.any()):
            return pre.new_zeros(())
        candidates = pre[:, dead]
        top = candidates.topk(min(AUX_K, candidates.shape[1]), dim=1)
        acts = torch.zeros_like(candidates).scatter(1, top.indices, top.values)
        return (error - acts @ self.w_dec[dead]).square().sum() / error.square().sum()

    @torch.no_grad()
    def drop_parallel_gradient(self) -> None:
        """A step along a decoder row would only be undone by the normalisation."""
        assert self.w_dec.grad is not None
        along = (self.w_dec.grad * self.w_dec).sum(1, keepdim=True)
        self.w_dec.grad -= along * self.w_dec

    @torch.no_grad()
    def normalise(self) -> None:
        self.w_dec /= self.w_dec.norm(dim=1, keepdim=True)

    def finished(self) -> TrainedSae:
        w_enc, b_enc, w_dec, b_dec = (p.detach().clone() for p in (self.w_enc, self.b_enc, self.w_dec, self.b_dec))
        return TrainedSae(w_enc, b_enc, w_dec, b_dec, self.threshold)


def _largest(pre: Tensor, k: int) -> tuple[Tensor, float]:
    """Keep the `k` x rows largest entries of the whole batch; also the smallest that was kept."""
    values = pre.detach().flatten().topk(k * pre.shape[0], sorted=False).values
    smallest = float(values[values > 0].min())
    return pre * (pre >= smallest), smallest


def documents(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Document]]:
    """Batches of the training corpus that the model of this seed was not trained on."""
    for batch, _ in corpus.stream(ACTIVATION_SEED + seed, tokenizer, Cursor()):
        yield batch


@torch.no_grad()
def residuals(model: LlamaForCausalLM, batch: list[Document], pad: int) -> Tensor:
    """Outputs of block `LAYER` at every real token of the batch, shape [tokens, d_model]."""
    width = max(len(document.ids) for document in batch)
    ids = torch.tensor([[*document.ids, *[pad] * (width - len(document.ids))] for document in batch])
    hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[LAYER + 1]
    lengths = torch.tensor([len(document.ids) for document in batch])
    return hidden[torch.arange(width)[None, :] < lengths[:, None]].float()


def collect(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int) -> Tensor:
    """At least `tokens` residuals, shape [tokens, d_model]."""
    found: list[Tensor] = []
    for batch in documents(seed, tokenizer):
        found.append(residuals(model, batch, token_id(tokenizer, PAD)))
        if sum(len(part) for part in found) >= tokens:
            break
    return torch.cat(found)[:tokens]


def train_sae(data: Tensor, recipe: SaeRecipe, seed: int) -> TrainedSae:
    """Train on residuals, shape [tokens, d_model]."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sae = _BatchTopK(data, recipe)
    variance = (data - data.mean(0)).square().sum(1).mean()
    optimizer = torch.optim.Adam(sae.parameters(), recipe.lr, betas=(0.9, 0.99))
    for step in track(range(recipe.steps), description=recipe.name):
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / 50, 3 * (1 - step / recipe.steps))
        loss = sae.loss(data[rows], variance)
        optimizer.zero_grad()
        loss.backward()
        sae.drop_parallel_gradient()
        optimizer.step()
        sae.normalise()
    return sae.finished()


def save_sae(sae: TrainedSae, recipe: SaeRecipe, directory: Path) -> None:
    """Write a SAELens 6 JumpReLU directory."""
    directory.mkdir(parents=True, exist_ok=True)
    d_in, d_sae = sae.w_enc.shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # the form of this file; without it SAELens reads the older, flat one
            "model_name": MODEL_NAME,
            "hook_name": HOOK_NAME,
            "hook_head_index": None,
            "prepend_bos": True,
            "context_size": 256,
            "dataset_path": "clampdown.organism.corpus",
            "training_architecture": "batchtopk",
            "k": recipe.k,
        },
    }
    (directory / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        "W_enc": sae.w_enc,
        "b_enc": sae.b_enc,
        "W_dec": sae.w_dec,
        "b_dec": sae.b_dec,
        "threshold": torch.full((d_sae,), sae.threshold),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "sae_weights.safetensors")


def train_saes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, seed: int) -> None:
    """Train and save every recipe's SAE."""
    data = collect(model, tokenizer, seed, BUFFER_TOKENS)
    for recipe in RECIPES:
        save_sae(train_sae(data, recipe, seed), recipe, out / recipe.name)
