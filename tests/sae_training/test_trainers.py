"""Training with SAELens: every kind learns, is read as SAELens reads it, and a killed run ends as an unbroken one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clampdown.errors import SaeError, StoreError
from clampdown.sae_training import files, measuring, trainers
from clampdown.sae_training.trainers import SaeRecipe, train
from clampdown.saes.checkpoints import load_sae

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

FACTS = {"model_name": "toy", "hook_name": "blocks.3.hook_resid_post"}
D, TRUE = 16, 32


@pytest.fixture(scope="module")
def residuals() -> Tensor:
    """Sparse sums of 32 directions around a mean, as an SAE supposes them to be."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE, D, generator=draw), dim=1)
    code = torch.zeros(6000, TRUE).scatter_(1, torch.randint(TRUE, (6000, 3), generator=draw), 1.0)
    code *= 1 + torch.rand(code.shape, generator=draw)
    return (7 * code @ directions + torch.randn(D, generator=draw)).half()


def recipe(kind: str, epochs: int = 40) -> SaeRecipe:
    return SaeRecipe(kind, features=64, k=4, epochs=epochs, batch=500, lr=5e-3)


@pytest.mark.parametrize("kind", list(trainers.KINDS))
def test_every_kind_learns_and_is_read_back_as_its_trainer_left_it(
    kind: str, residuals: Tensor, tmp_path: Path
) -> None:
    trained = train(residuals, recipe(kind), tmp_path / "training", FACTS)
    files.write_trained(trained, tmp_path, torch.float32)
    ours = load_sae(tmp_path)
    assert (ours.cfg.model_name, ours.cfg.site.name) == ("toy", "blocks.3.hook_resid_post")
    found = measuring.fit(ours, residuals)
    assert found.fvu < 0.35, "scale, mean and threshold are all folded in"
    assert 1 < found.l0 < 12
    x = residuals[:200].float()
    theirs = trainers.saelens().SAE.load_from_disk(str(tmp_path))
    assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-4)
    assert torch.allclose(ours.reconstruct(x), theirs.decode(theirs.encode(x)), atol=1e-4)
    assert torch.allclose(ours.W_dec.norm(dim=1), torch.ones(64), atol=1e-3), "activations are in the residual's units"


def test_sixteen_bits_are_stated_and_reconstruct_as_well(residuals: Tensor, tmp_path: Path) -> None:
    trained = train(residuals, recipe("batchtopk"), tmp_path / "training", FACTS)
    files.write_trained(trained, tmp_path / "full", torch.float32)
    files.write_trained(trained, tmp_path / "half", torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half" / files.WEIGHTS).values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / files.CONFIG).read_text())["dtype"] == "float16"
    full, half = (measuring.fit(load_sae(tmp_path / name), residuals).fvu for name in ("full", "half"))
    assert half == pytest.approx(full, abs=2e-3)


class Killed(Exception):
    """Stands for the end of a process."""


def test_a_killed_run_ends_as_an_unbroken_one(
    residuals: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "STEPS_PER_CHECKPOINT", 10)

    def die_at(step: int, _steps: int) -> None:
        if step == 25:
            raise Killed

    whole = train(residuals, recipe("batchtopk", 4), tmp_path / "whole", FACTS)
    with pytest.raises(Killed):
        train(residuals, recipe("batchtopk", 4), tmp_path / "killed", FACTS, die_at)
    done: list[int] = []
    resumed = train(residuals, recipe("batchtopk", 4), tmp_path / "killed", FACTS, lambda step, _: done.append(step))
    assert done[0] == 21, "the last checkpoint's step is not done again"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_another_training_is_not_continued(residuals: Tensor, tmp_path: Path) -> None:
    train(residuals, recipe("topk", 1), tmp_path, FACTS)
    with pytest.raises(StoreError):
        train(residuals, recipe("topk", 2), tmp_path, FACTS)
    with pytest.raises(StoreError):
        train(residuals + 1, recipe("topk", 1), tmp_path, FACTS)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (SaeRecipe("gated"), "not a kind"),
        (SaeRecipe(features=8, k=8), "make no SAE"),
        (SaeRecipe(batch=10_000), "do not fill one batch"),
    ],
)
def test_impossible_recipes_are_refused(residuals: Tensor, tmp_path: Path, asked: SaeRecipe, says: str) -> None:
    with warnings.catch_warnings(), pytest.raises(SaeError, match=says):
        train(residuals, asked, tmp_path, FACTS)
