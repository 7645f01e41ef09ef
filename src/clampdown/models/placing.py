"""How a model is put into memory: on one device, spread over several with the rest on disk, in which precision.

1. `device_map` hands the blocks to the devices of this machine by the library's own planner (`auto`, `balanced`,
   `sequential`) or by a JSON file of module names and places; what fits nowhere stays on disk (`offload`). The package
   accelerate moves tensors between blocks.
2. `quantise` makes weights 8 or 4 bits wide while they are read (bitsandbytes). A checkpoint that is quantised already
   (GPTQ, AWQ and others) says so itself and needs nothing here. A quantised model answers differently: it is another
   revision, and a plan for one does not pass for the other.
3. Of a spread model, `home` is where its inputs go. What is read at a site is brought home, and what is put there is
   taken back (`layout.HookPoint`), so that plans, SAEs and gates live on one device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clampdown.documents import read_object
from clampdown.errors import ModelError
from clampdown.extras import require

PLANNED = ("auto", "balanced", "balanced_low_0", "sequential")
BITS = {"8bit": "load_in_8bit", "4bit": "load_in_4bit"}


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a model goes and in which precision. `device` is for models that one device holds, `device_map` for others;
    `offload` is a directory for what fits nowhere."""

    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    quantise: str | None = None
    offload: str | None = None

    @property
    def spread(self) -> bool:
        return self.device_map is not None

    def check(self) -> None:
        """Raises `ModelError` for what contradicts itself or is not known, `MissingPackageError` for what is needed and
        not installed."""
        if self.spread and self.device != "auto":
            raise ModelError("a device map says where everything goes: a device says it again", hint="give one of both")
        if self.offload and not self.spread:
            raise ModelError("only a model with a device map leaves weights on disk", hint="--device-map auto")
        if self.quantise is not None and self.quantise not in BITS:
            raise ModelError(f"'{self.quantise}' is not a quantisation", hint=f"one of: {', '.join(BITS)}")
        if self.spread:
            require("spread", "a device map")
        if self.quantise:
            require("quantise", f"quantising to {self.quantise}")

    def options(self, where: torch.device, *, quantised: bool) -> dict[str, Any]:
        """What the library's loader is told beside the precision; none for a model that is moved whole afterwards."""
        found: dict[str, Any] = {}
        if self.device_map is not None:
            found["device_map"] = self._map()
            if self.offload:
                found["offload_folder"] = self.offload
        elif quantised or self.quantise:  # put in its place by the library that quantises, and not to be moved
            found["device_map"] = {"": where}
        if self.quantise:
            found["quantization_config"] = _bits(self.quantise)
        return found

    def _map(self) -> str | dict[str, Any]:
        """The planner's name, or the map in a file. Raises `ModelError`."""
        assert self.device_map is not None
        if self.device_map in PLANNED:
            return self.device_map
        path = Path(self.device_map)
        if path.suffix != ".json":
            raise ModelError(
                f"'{self.device_map}' is not a device map", hint=f"{', '.join(PLANNED)}, or a .json file of places"
            )
        found = read_object(path, ModelError)
        wrong = [name for name, place in found.items() if isinstance(place, bool) or not isinstance(place, int | str)]
        if wrong or not found:
            raise ModelError(
                f"{path} gives {wrong[0] if wrong else 'no module'} a place that is none",
                hint='such as {"model.embed_tokens": 0, "lm_head": "cpu"}',
            )
        return found

    def marked(self, revision: str) -> str:
        """A revision of what this makes of the weights."""
        return f"{revision}+{self.quantise}" if self.quantise else revision


def _bits(name: str) -> Any:
    from transformers import BitsAndBytesConfig

    chosen: Any = {BITS[name]: True}
    return BitsAndBytesConfig(**chosen)


def places_of(model: nn.Module) -> Mapping[str, Any]:
    """Which modules of a spread model are where; nothing for one that lies in one place."""
    found = getattr(model, "hf_device_map", None) or {}
    return found if len(set(found.values())) > 1 else {}


def input_device(model: Any) -> torch.device:
    """Where a model's inputs go: of a spread model, where its embedding is computed."""
    if not places_of(model):
        return model.device
    embedding = model.get_input_embeddings()
    where = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return model.device if where is None else torch.device(where)


def home_of(model: Any) -> torch.device | None:
    """Where what is read at the sites of a spread model is brought; None for one that lies in one place."""
    return input_device(model) if places_of(model) else None
