"""Where a model keeps its decoder blocks, and how to hook a site: one table row per architecture.

1. `model.get_decoder()` finds the text decoder, inside a multimodal wrapper too.
2. The row for the decoder's `model_type` names its list of blocks and, inside a block, the modules whose outputs are
   added to the residual stream: `attn_out` and `mlp_out` mean what TransformerLens means, the contribution as it is
   added. In families that normalise after the sublayer (Gemma 2 and 3, OLMo 2) that is the post-norm's output.
3. A `HookPoint` hands the hidden states [batch, pos, d_model] to a function and puts back what it returns. Decoder
   blocks return a Tensor in transformers 5 and a tuple in 4, attention returns a tuple in both: one place knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clampdown.errors import SiteError, UnknownArchitectureError
from clampdown.models.placing import home_of
from clampdown.types import Point, Site

HiddenFn = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"] | None]


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table: `model_types` of the text decoder's config, and module paths.

    `blocks` and `final_norm` are relative to the decoder; `attn_out` and `mlp_out` are relative to a block and name the
    module whose output is added to the residual stream.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str = "layers"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    final_norm: str = "norm"


_POST_NORMS = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}

FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("llama",)),
    Family("Phi-3", ("phi3",)),
    Family("Gemma", ("gemma",)),
    Family("Gemma 2", ("gemma2",), **_POST_NORMS),
    Family("Gemma 3", ("gemma3_text",), **_POST_NORMS),
    Family("Qwen", ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")),
    Family("Mistral", ("mistral", "mixtral")),
    Family("GPT-NeoX", ("gpt_neox",), attn_out="attention", final_norm="final_layer_norm"),
    Family("GPT-2", ("gpt2",), blocks="h", attn_out="attn", final_norm="ln_f"),
    Family("OLMo 2", ("olmo2",), **_POST_NORMS),
    Family("SmolLM3", ("smollm3",)),
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


@dataclass(frozen=True, slots=True)
class HookPoint:
    """A site of one model, ready to be hooked. `before` is True when the site is the module's input. Of a model that is
    spread over devices, `home` is where the function sees the hidden states; what it returns goes back to theirs."""

    module: nn.Module
    before: bool
    home: torch.device | None = None

    def register(self, fn: HiddenFn, *, first: bool = False) -> RemovableHandle:
        """Call `fn` with the hidden states at every forward; a tensor that it returns takes their place. With `first`
        it runs before the module's other hooks, also those that are there already."""
        fn = fn if self.home is None else _at_home(fn, self.home)
        if self.before:
            return self.module.register_forward_pre_hook(_on_input(fn), with_kwargs=True, prepend=first)
        return self.module.register_forward_hook(_on_output(fn), prepend=first)


def _at_home(fn: HiddenFn, home: torch.device) -> HiddenFn:
    def at_home(hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"] | None:
        replaced = fn(hidden.to(home))
        return None if replaced is None else replaced.to(hidden.device)

    return at_home


def _on_output(fn: HiddenFn) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return fn(output)
        replaced = fn(output[0])
        return None if replaced is None else (replaced, *output[1:])

    return hook


def _on_input(fn: HiddenFn) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            replaced = fn(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        replaced = fn(kwargs["hidden_states"])
        return None if replaced is None else (args, {**kwargs, "hidden_states": replaced})

    return hook


@dataclass(frozen=True, slots=True)
class Layout:
    """One model's decoder: its blocks in order, and the row of the table that describes them."""

    family: str
    decoder: nn.Module
    blocks: Sequence[nn.Module]
    d_model: int
    row: Family
    home: torch.device | None = None

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """What the last block's output goes through before the unembedding."""
        return self.decoder.get_submodule(self.row.final_norm)

    @property
    def layer_norm(self) -> bool:
        """Whether the model normalises by LayerNorm, which takes the residual stream's mean off."""
        return isinstance(self.final_norm, nn.LayerNorm)

    def hook_point(self, site: Site) -> HookPoint:
        """The place to hook for a site. Raises `SiteError` when the model has no such layer or point."""
        if not 0 <= site.layer < self.n_layers:
            raise SiteError(
                f"{site.name} does not exist: this {self.family} model has {self.n_layers} blocks",
                hint=f"layers are counted from 0: blocks.0 to blocks.{self.n_layers - 1}",
            )
        block = self.blocks[site.layer]
        match site.point:
            case Point.RESID_PRE:
                return HookPoint(block, before=True, home=self.home)
            case Point.RESID_POST:
                return HookPoint(block, before=False, home=self.home)
            case Point.ATTN_OUT:
                return HookPoint(_submodule(block, self.row.attn_out, site), before=False, home=self.home)
            case Point.MLP_OUT:
                return HookPoint(_submodule(block, self.row.mlp_out, site), before=False, home=self.home)


def _submodule(block: nn.Module, path: str, site: Site) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise SiteError(f"{site.name} does not exist: {type(block).__name__} has no module '{path}'") from error


def find_layout(model: nn.Module) -> Layout:
    """The layout of a HF causal language model. Raises `UnknownArchitectureError` for families without a row."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = model if get_decoder is None else get_decoder()
    config = getattr(decoder, "config", None)
    model_type = getattr(config, "model_type", None)
    family = _BY_TYPE.get(model_type or "")
    if family is None or config is None:
        known = ", ".join(sorted(_BY_TYPE))
        raise UnknownArchitectureError(
            f"do not know where a '{model_type}' model ({type(model).__name__}) keeps its decoder blocks",
            hint="add a row to FAMILIES in clampdown/models/layout.py: the config's model_type, the path of the block "
            f"list in get_decoder(), and the names of the attention and MLP modules in a block. Known: {known}",
        )
    blocks: Any = decoder.get_submodule(family.blocks)
    return Layout(
        family=family.name,
        decoder=decoder,
        blocks=tuple(blocks),
        d_model=config.hidden_size,
        row=family,
        home=home_of(model),
    )
