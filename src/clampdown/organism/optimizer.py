"""Muon for the matrices of the decoder blocks, Adam for embeddings and norms, and the schedule.

Muon (Jordan et al. 2024): the momentum of a matrix is replaced by its nearest semi-orthogonal matrix, found by five
Newton-Schulz steps. Matrices of one shape go through them together, which halves the cost on a CPU.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(stack: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices of a stack, shape [count, rows, columns]."""
    a, b, c = _COEFFICIENTS
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if stack.shape[1] <= stack.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Only for two-dimensional parameters."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                updates = orthogonalised(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The Nesterov momentum of one parameter."""
        assert parameter.grad is not None
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, buffer, momentum)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> tuple[Muon, torch.optim.Adam]:
    """Muon for the blocks' matrices, Adam for everything else (the tied embedding counts once)."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    return Muon(matrices, muon_lr), torch.optim.Adam(rest, adam_lr, betas=(0.9, 0.95))


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.5) -> float:
    """Warm-up, constant, then linear to zero over the last `decay` of training; a factor of the learning rate."""
    left = (steps - step) / max(1.0, decay * steps)
    return min(1.0, (step + 1) / min(warmup, max(1, steps // 10)), left)
