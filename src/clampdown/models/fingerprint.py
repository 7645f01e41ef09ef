"""A model's weights as a short hash: what a name and a revision cannot vouch for once weights are in memory.

Merged adapters, edited matrices and another precision change the weights and leave the name. Tensors of up to a million
numbers are read whole, larger ones at evenly spaced places, so that naming a 16 GB model takes a second.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

WHOLE = 1 << 20
SAMPLES = 4096


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and (sampled) values of all parameters and saved buffers, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = _fetched(model, name, tensor)
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
        if tensor.device.type != "meta":
            digest.update(_sampled(tensor).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _fetched(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor, read from disk where a spread model left it there."""
    if tensor.device.type != "meta":
        return tensor
    owner, _, leaf = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    return tensor if kept is None else kept[leaf]


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > WHOLE:
        flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)]
    return flat.contiguous()
