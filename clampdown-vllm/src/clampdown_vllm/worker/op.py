"""The op at a site, opaque to the compiler, and the hooks that call it.

vLLM's decoder layers return the block's output as two tensors that are not yet added. The op reads their sum in their
own precision and adds x'-x to the first, in place. It finds its buffers by the site's name in a table of the process,
so that a graph that was traced once, or captured, serves whatever is seated later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clampdown.errors import SiteError
from clampdown.models.layout import FAMILIES, Family
from clampdown.types import Point, Site
from clampdown_vllm.worker.state import State

STATES: dict[str, State] = {}
"""By site, whose buffers the op reads: the last model that was armed."""


def steer(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    state = STATES.get(site)
    if state is not None:
        state.act(site, hidden, residual)


def _traced(hidden: Tensor, residual: Tensor | None, site: str) -> None:
    return None


def register() -> None:
    """Make the op known to torch, once in a process."""
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "clampdown_steer"):
        direct_register_custom_op("clampdown_steer", steer, mutates_args=["hidden"], fake_impl=_traced)


def attach(model: nn.Module, model_type: str, state: State) -> None:
    """Hook every site of the state's plans: after the weights are loaded, before anything is compiled.

    Raises `SiteError` for a site that this model does not have.
    """
    register()
    family, layers = _family(model_type), _layers(model, model_type)
    for name in state.book.sites:
        site = Site.parse(name)
        if not 0 <= site.layer < len(layers):
            raise SiteError(f"{name} does not exist: the model has {len(layers)} blocks")
        STATES[name] = state
        _hook(layers, site, family)


def _family(model_type: str) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise SiteError(f"models of type '{model_type}' have not been looked at: where their sites are is not known")


def _layers(model: nn.Module, model_type: str) -> Any:
    family = _family(model_type)
    for prefix in ("model", "transformer", "gpt_neox", ""):
        try:
            return model.get_submodule(f"{prefix}.{family.blocks}".strip("."))
        except AttributeError:
            continue
    raise SiteError(f"{type(model).__name__} has no list of blocks called '{family.blocks}'")


def _hook(layers: Any, site: Site, family: Family) -> None:
    name, layer = site.name, layers[site.layer]
    match site.point:
        case Point.RESID_POST:
            layer.register_forward_hook(_on_output(name))
        case Point.RESID_PRE if site.layer:
            layers[site.layer - 1].register_forward_hook(_on_output(name))
        case Point.RESID_PRE:
            layer.register_forward_pre_hook(_on_input(name), with_kwargs=True)
        case Point.ATTN_OUT:
            layer.get_submodule(family.attn_out).register_forward_hook(_on_output(name))
        case Point.MLP_OUT:
            layer.get_submodule(family.mlp_out).register_forward_hook(_on_output(name))


def _on_output(site: str) -> Any:
    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden, residual = output if isinstance(output, tuple) else (output, None)
        torch.ops.vllm.clampdown_steer(hidden, residual, site)
        return output

    return after


def _on_input(site: str) -> Any:
    """Before the first block: its first tensor of two dimensions is the embedding, and nothing is to be added to it."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and given.is_floating_point():
                torch.ops.vllm.clampdown_steer(given, None, site)
                return

    return before
