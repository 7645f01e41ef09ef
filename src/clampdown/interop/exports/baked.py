"""A checkpoint with the plan in its weights: plain transformers, and whatever loads its checkpoints, run it steered.

Which weights change, `weights.py` says. Here they are changed and written: the same family with the biases that its
configuration allows turned on, or as a Llama where that is the same function (Qwen 2 and Mistral, which have no bias
where an addition needs one). Embeddings that are edited are no longer shared with the unembedding. Weights are written
in the precision that the model was loaded in.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clampdown.errors import ExportError, translated
from clampdown.interop.exports.forms import Bound, Unsaid, Words
from clampdown.interop.exports.weights import Changes, Writer, changes_of, everywhere, undone
from clampdown.models.loading import LanguageModel
from clampdown.steering.plan import Edit
from clampdown.types import Point, Site


@dataclass(frozen=True, slots=True)
class Writers:
    """Where a family writes into its residual stream: modules of the decoder and of a block. `attn_flag` and `mlp_flag`
    are fields of the configuration that give those matrices a bias; `as_llama`: the family is a Llama with other names.
    `plain_embeddings`: they enter the stream as they are, not scaled."""

    embeddings: tuple[str, ...] = ("embed_tokens",)
    attn: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    attn_flag: str | None = None
    mlp_flag: str | None = None
    as_llama: bool = False
    plain_embeddings: bool = True


WRITERS = {
    "llama": Writers(attn_flag="attention_bias", mlp_flag="mlp_bias"),
    "smollm3": Writers(attn_flag="attention_bias", mlp_flag="mlp_bias"),
    "qwen2": Writers(as_llama=True),
    "mistral": Writers(as_llama=True),
    "qwen3": Writers(attn_flag="attention_bias"),
    "phi3": Writers(),
    "gemma": Writers(plain_embeddings=False),
    "gpt2": Writers(("wte", "wpe"), "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Writers(("embed_in",), "attention.dense", "mlp.dense_4h_to_h"),
}
"""Families whose matrices write into the stream as they are, by the configuration's model type. Where a norm follows
them (Gemma 2 and 3, OLMo 2) no matrix does what an edit does; mixtures of experts have many."""


def _writers(lm: LanguageModel) -> Writers | None:
    return WRITERS.get(str(lm.model.config.model_type))


def _changes(bound: Bound) -> Changes:
    return changes_of(bound, parallel=bool(getattr(bound.lm.model.config, "use_parallel_residual", False)))


def _faults(bound: Bound) -> Iterator[Unsaid]:
    kind = str(bound.lm.model.config.model_type)
    writers = _writers(bound.lm)
    if writers is None:
        why = f"where a '{kind}' model writes into its residual stream, no matrix can do what an edit does"
        yield Unsaid("every edit", why, None)
        return
    if getattr(bound.lm.model.config, "quantization_config", None) is not None:
        yield Unsaid("every edit", "the model's weights are quantised, and an edit of them would be rounded away", None)
        return
    constant = [edit for edit in bound.plan.edits if edit.operator in CHECKPOINT.operators]
    changes = _changes(bound.saying(bound.plan.changed(edits=tuple(constant))))
    yield from undone(changes)
    for writer, steps in changes.steps.items():
        if any(step.offset is not None for step in steps):
            reason = _no_bias(bound.lm, writers, writer)
            if reason is not None:
                yield Unsaid(f"a vector added by the {writer.kind} writer of block {writer.block}", reason, None)


def _no_bias(lm: LanguageModel, writers: Writers, writer: Writer) -> str | None:
    """Why a writer can have no constant; None when it can."""
    if writer.kind == "embed":
        return None if writers.plain_embeddings else "the embeddings of this family are scaled"
    path = writers.attn if writer.kind == "attn" else writers.mlp
    has = getattr(lm.layout.blocks[writer.block].get_submodule(path), "bias", None) is not None
    if has or (writers.attn_flag if writer.kind == "attn" else writers.mlp_flag) or _is_llama(lm, writers):
        return None
    return f"a '{lm.model.config.model_type}' model has no bias there"


def _is_llama(lm: LanguageModel, writers: Writers) -> bool:
    """Whether this model is, as a function, a Llama: the same blocks, and attention to everything before."""
    config = lm.model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return writers.as_llama and layers == {"full_attention"} and window is None


def _near(edit: Edit, bound: Bound) -> tuple[Edit, ...] | None:
    if edit.operator != "ablate_direction" or Site.parse(edit.site).point not in (Point.RESID_PRE, Point.RESID_POST):
        return None
    alone = bound.saying(bound.plan.changed(edits=(edit.changed(scope="all"),)))
    return everywhere(edit, bound.lm.n_layers) if _changes(alone).undone else None


CHECKPOINT = Words(frozenset({"add", "add_direction", "ablate_direction"}), more=_faults, near=_near)


# ---- writing -----------------------------------------------------------------------------------------------------


def write_checkpoint(bound: Bound, path: Path) -> None:
    """Write a directory that transformers loads. Raises `ExportError` for weights that are not the family's own."""
    writers = _writers(bound.lm)
    assert writers is not None
    changes = _changes(bound)
    config, state = _changed(bound.lm, writers, changes)
    written = path.with_name(f".{path.name}.writing")
    shutil.rmtree(written, ignore_errors=True)
    _save(bound.lm, config, state, written)
    written.rename(path)


def _changed(lm: LanguageModel, writers: Writers, changes: Changes) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the weights, of which only the edited ones are copies."""
    state = dict(lm.model.state_dict())
    config = _with_biases(lm, writers, changes)
    name_of = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    for writer, steps in changes.steps.items():
        if steps and writer.kind == "embed":
            _edit_embeddings(lm, writers, changes, config, state, name_of)
        elif steps:
            _edit_block(lm, writers, changes, writer, state, name_of)
    return config, state


def _with_biases(lm: LanguageModel, writers: Writers, changes: Changes) -> Any:
    """The configuration, with a bias wherever a writer needs one."""
    config = copy.deepcopy(lm.model.config)
    added = {w.kind for w, steps in changes.steps.items() if any(step.offset is not None for step in steps)}
    lacking = {kind for kind in added - {"embed"} if not _has_bias(lm, writers, kind)}
    if lacking and writers.as_llama:
        return _as_llama(lm, mlp_bias="mlp" in lacking, attention_bias="attn" in lacking)
    for kind in lacking:
        setattr(config, str(writers.attn_flag if kind == "attn" else writers.mlp_flag), True)
    return config


def _has_bias(lm: LanguageModel, writers: Writers, kind: str) -> bool:
    module = lm.layout.blocks[0].get_submodule(writers.attn if kind == "attn" else writers.mlp)
    return getattr(module, "bias", None) is not None


_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
         "tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "dtype")  # fmt: skip


def _as_llama(lm: LanguageModel, *, mlp_bias: bool, attention_bias: bool) -> Any:
    from transformers import LlamaConfig

    config = lm.model.config
    same = {name: copy.deepcopy(getattr(config, name)) for name in _SAME if hasattr(config, name)}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = lm.layout.blocks[0].get_submodule("self_attn.q_proj")
    biased = attention_bias or getattr(queries, "bias", None) is not None
    return LlamaConfig(**same, head_dim=width, mlp_bias=mlp_bias, attention_bias=biased)


def _edit_block(
    lm: LanguageModel,
    writers: Writers,
    changes: Changes,
    writer: Writer,
    state: dict[str, Tensor],
    name_of: dict[int, str],
) -> None:
    module = lm.layout.blocks[writer.block].get_submodule(writers.attn if writer.kind == "attn" else writers.mlp)
    name = name_of[id(module.weight)]
    weight = state[name].float().cpu()
    rows = weight if isinstance(module, torch.nn.Linear) else weight.T  # GPT-2's layers hold the transpose
    changed = changes.linear(writer, rows)
    state[name] = (changed if isinstance(module, torch.nn.Linear) else changed.T).to(state[name].dtype).contiguous()
    bias = name.removesuffix("weight") + "bias"
    own = state[bias].float().cpu() if bias in state else None
    constant = changes.offset(writer, own)
    if constant is not None:
        state[bias] = constant.to(state[name].dtype)


def _edit_embeddings(
    lm: LanguageModel,
    writers: Writers,
    changes: Changes,
    config: Any,
    state: dict[str, Tensor],
    name_of: dict[int, str],
) -> None:
    output: Any = lm.model.get_output_embeddings()
    shared: Any = None if output is None else output.weight
    if shared is not None and shared is lm.model.get_input_embeddings().weight:
        head = next(name for name, found in lm.model.named_parameters(remove_duplicate=False)
                    if found is shared and name != name_of[id(found)])  # fmt: skip
        state[head] = state[name_of[id(shared)]].clone()
        config.tie_word_embeddings = False
    embed = Writer("embed", 0)
    constant = changes.offset(embed, None)
    for number, path in enumerate(writers.embeddings):
        name = name_of[id(lm.layout.decoder.get_submodule(path).weight)]
        rows = changes.linear(embed, state[name].float().cpu().T).T
        shift = constant if constant is not None and number == 0 else torch.zeros(lm.d_model)
        state[name] = (rows + shift).to(state[name].dtype).contiguous()


def _save(lm: LanguageModel, config: Any, state: dict[str, Tensor], directory: Path) -> None:
    """By the library: it checks that every weight has its place, and writes its own files."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    wanted = model.state_dict()
    missing = {name: torch.zeros(wanted[name].shape, dtype=lm.dtype) for name in wanted.keys() - state.keys()}
    if any(not name.endswith(".bias") for name in missing) or state.keys() - wanted.keys():
        raise ExportError(f"the weights of {lm.name} are not those that {type(model).__name__} has")
    model.load_state_dict({**{name: tensor.cpu() for name, tensor in state.items()}, **missing}, assign=True)
    model.generation_config = lm.model.generation_config
    with translated(ExportError, f"cannot save the checkpoint in {directory.parent}"):
        model.save_pretrained(directory)
        lm.tokenizer.save_pretrained(directory)
