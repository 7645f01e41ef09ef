"""The state of a training run as one safetensors file, replaced atomically: a kill leaves the old one or the new one.

Nothing is pickled. Numbers that are no tensors travel as JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clampdown.documents import parse_json
from clampdown.errors import StoreError
from clampdown.organism.corpus import Cursor


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is, and the settings that it must be resumed with."""

    step: int
    steps: int
    seed: int
    cursor: Cursor
    tokens: int = 0


def _state_tensors(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[str, Tensor]:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save(path: Path, model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], progress: Progress) -> None:
    """Write the state beside `path`, then move it there."""
    fresh = path.with_suffix(".new")
    save_file(_state_tensors(model, optimizers), fresh, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(fresh, path)


def load(path: Path, model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> Progress:
    """Fill `model` and `optimizers` from `path`. Raises `StoreError` for a file of another model."""
    parameters = dict(model.named_parameters())
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    try:
        with safe_open(path, framework="pt") as file:
            raw = parse_json(file.metadata()["progress"], str(path))
            for name in file.keys():  # noqa: SIM118 - not a dict
                kind, _, rest = name.partition(".")
                if kind == "model":
                    parameters[rest].data.copy_(file.get_tensor(name))
                else:
                    number, index, key = rest.split(".")
                    states[int(number)].setdefault(int(index), {})[key] = file.get_tensor(name)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"cannot resume from {path}: {error}", hint="delete the file to start afresh") from error
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return Progress(raw["step"], raw["steps"], raw["seed"], Cursor(**raw["cursor"]), raw["tokens"])
