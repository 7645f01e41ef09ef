"""Training with SAELens's trainer: its architectures, losses and optimiser; ours are the data, the order, the resuming.

    topk        exactly k features per token (Gao et al. 2406.04093), with its auxiliary loss against dead features
    batchtopk   k per token on average over a batch (Bussmann et al. 2412.06410); saved as JumpReLU with one threshold
    jumprelu    a threshold per feature, trained (Rajamanoharan et al. 2407.14435), pulled towards k on average

Inputs are scaled so that their mean length is sqrt(d_model), and the scale is folded into the weights at the end. The
order of the residuals follows from the seed and the step alone, so a killed run goes on as if it had not been killed.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import SaeError
from clampdown.extras import extra
from clampdown.store import claim, content_hash

Progress = Callable[[int, int], None]
Batch = Float[Tensor, "batch d_model"]

CHECKPOINT, MANIFEST = "checkpoint", "training.json"
STEPS_PER_CHECKPOINT = 100
_WARM_UP, _DECAY = 0.03, 0.3


@dataclass(frozen=True, slots=True)
class SaeRecipe:
    """How to train: the kind of SAE, its width, features per token, passes over the data, and the optimiser's numbers.

    `bfloat16` runs the matrix products in 16 bit (weights stay in 32): faster where the machine has such arithmetic.
    """

    kind: str = "batchtopk"
    features: int = 4096
    k: int = 48
    epochs: int = 4
    batch: int = 2048
    lr: float = 1e-3
    seed: int = 0
    bfloat16: bool = False


def _topk(package: Any, recipe: SaeRecipe, shared: dict[str, Any]) -> Any:
    return package.TopKTrainingSAE(package.TopKTrainingSAEConfig(k=recipe.k, **shared))


def _batchtopk(package: Any, recipe: SaeRecipe, shared: dict[str, Any]) -> Any:
    return package.BatchTopKTrainingSAE(package.BatchTopKTrainingSAEConfig(k=float(recipe.k), **shared))


def _jumprelu(package: Any, recipe: SaeRecipe, shared: dict[str, Any]) -> Any:
    # Gemma Scope 2's penalty, quadratic around a number of features, so that k means the same for every kind.
    config = package.JumpReLUTrainingSAEConfig(
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=float(recipe.k),
        l0_coefficient=1.0,
        l0_warm_up_steps=100,
        jumprelu_init_threshold=0.1,
        jumprelu_bandwidth=0.5,
        jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=3e-6,
        **shared,
    )
    return package.JumpReLUTrainingSAE(config)


KINDS: dict[str, Callable[[Any, SaeRecipe, dict[str, Any]], Any]] = {
    "topk": _topk,
    "batchtopk": _batchtopk,
    "jumprelu": _jumprelu,
}


def saelens() -> Any:
    """The package SAELens. Raises `MissingPackageError` without it."""
    with extra("saelens", "training an SAE"):
        return importlib.import_module("sae_lens")


def train(
    residuals: Float[Tensor, "tokens d_model"],
    recipe: SaeRecipe,
    directory: Path,
    facts: dict[str, Any],
    on_progress: Progress | None = None,
) -> Any:
    """A trained SAE of SAELens, scale folded in. `directory` keeps the checkpoint; `facts` go into the SAE's config.

    Raises `SaeError` for an unknown kind or impossible sizes, `StoreError` when the directory holds another training.
    """
    _check(recipe, len(residuals))
    directory.mkdir(parents=True, exist_ok=True)
    claim(directory / MANIFEST, {**asdict(recipe), "residuals": _identity(residuals), **facts})
    torch.manual_seed(recipe.seed)
    trainer = _trainer(residuals, recipe, facts)
    checkpoint = directory / CHECKPOINT
    if checkpoint.is_dir():
        trainer.sae.load_weights_from_checkpoint(checkpoint)
        trainer.load_trainer_state(checkpoint)
    _run(trainer, _batches(residuals, recipe, trainer.n_training_steps), directory, on_progress)
    sae = trainer.sae
    sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    if recipe.kind == "jumprelu":  # the others fold it when they are saved
        sae.fold_W_dec_norm()
    return sae


def _run(trainer: Any, batches: Iterator[Batch], directory: Path, on_progress: Progress | None) -> None:
    """The public seams of SAELens's trainer, as its own coordinator of several SAEs uses them."""
    steps = trainer.cfg.total_training_steps
    while trainer.n_training_steps < steps:
        trainer.maybe_reset_sparsity()
        trainer.step(next(batches))
        trainer.n_training_steps += 1
        if trainer.n_training_steps % STEPS_PER_CHECKPOINT == 0 or trainer.n_training_steps == steps:
            _keep(trainer, directory)
        if on_progress is not None:
            on_progress(trainer.n_training_steps, steps)


def _keep(trainer: Any, directory: Path) -> None:
    """Write a checkpoint beside the old one and put it in its place."""
    fresh, old = directory / f"{CHECKPOINT}.new", directory / f"{CHECKPOINT}.old"
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    trainer.save_checkpoint(fresh.name, base_path=directory)
    if (directory / CHECKPOINT).is_dir():
        os.rename(directory / CHECKPOINT, old)
    os.rename(fresh, directory / CHECKPOINT)
    shutil.rmtree(old, ignore_errors=True)


def _trainer(residuals: Tensor, recipe: SaeRecipe, facts: dict[str, Any]) -> Any:
    package = saelens()
    with extra("saelens", "training an SAE"):
        config = importlib.import_module("sae_lens.config")
        trainers = importlib.import_module("sae_lens.training.sae_trainer")
    d_in, steps = residuals.shape[1], recipe.epochs * (len(residuals) // recipe.batch)
    scale = d_in**0.5 / float(lengths(residuals).mean())
    shared = {
        "d_in": d_in,
        "d_sae": recipe.features,
        "device": "cpu",
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
        "metadata": package.saes.sae.SAEMetadata(**facts),
    }
    sae = KINDS[recipe.kind](package, recipe, shared)
    with torch.no_grad():
        sae.b_dec.copy_(residuals.float().mean(0) * scale)
    settings = config.SAETrainerConfig(
        total_training_samples=steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.lr,
        lr_end=0.0,
        lr_warm_up_steps=int(_WARM_UP * steps),
        lr_decay_steps=int(_DECAY * steps),
        autocast=recipe.bfloat16,
        dead_feature_window=max(20, min(200, steps // 10)),
        feature_sampling_window=10**9,
    )
    trainer = trainers.SAETrainer(settings, sae, iter(()))
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def lengths(residuals: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " tokens"]:
    """Euclidean lengths in float32, some rows at a time."""
    return torch.cat([part.float().norm(dim=1) for part in residuals.split(1 << 15)])


def _batches(residuals: Tensor, recipe: SaeRecipe, start: int) -> Iterator[Batch]:
    """Batches from step `start` on: every epoch is one permutation that its number and the seed decide."""
    per_epoch = len(residuals) // recipe.batch
    for epoch in range(start // per_epoch, recipe.epochs):
        order = torch.randperm(len(residuals), generator=torch.Generator().manual_seed(recipe.seed * 1009 + epoch))
        for step in range(start - epoch * per_epoch if epoch == start // per_epoch else 0, per_epoch):
            yield residuals[order[step * recipe.batch : (step + 1) * recipe.batch]].float()


def _identity(residuals: Tensor) -> str:
    sample = residuals[:: max(1, len(residuals) // 64)]
    return content_hash([list(residuals.shape), sample.float().sum(1).tolist()])


def _check(recipe: SaeRecipe, tokens: int) -> None:
    if recipe.kind not in KINDS:
        raise SaeError(f"'{recipe.kind}' is not a kind of SAE that can be trained", hint=", ".join(KINDS))
    if not 0 < recipe.k < recipe.features:
        raise SaeError(f"{recipe.k} features per token out of {recipe.features} make no SAE")
    if tokens < recipe.batch:
        raise SaeError(
            f"{tokens} residuals do not fill one batch of {recipe.batch}", hint="give more text, or a smaller batch"
        )
