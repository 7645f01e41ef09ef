"""Calls of the library's `generate`, seen while they run: a pass does not say what it is, the call does.

A prompt may come in pieces, with guesses at the reply behind it, or on top of what a cache holds, and then its first
pass is not the prompt. So `generate` of a steered model is wrapped for as long as a `steer` block is open:

1. What the call was given is the prompt of a new turn (`GenerateCall`), however many passes it takes.
2. Ways of decoding whose passes cannot be told apart are refused before anything runs.
3. What it returns says where each row's reply ended: what was computed beyond that is not counted.

The wrapper belongs to the model, which threads share; it asks who steers in the running context.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import GenerationMixin

from clampdown.errors import SteeringNotAppliedError
from clampdown.steering.ownership import owner_of

_LOCK = threading.Lock()


@runtime_checkable
class FollowsCalls(Protocol):
    """Who steers, and wants to know of calls. `began` may refuse one."""

    def began(self, call: GenerateCall) -> None: ...

    def ended(self, call: GenerateCall, output: Any) -> None:
        """`output` is None when the call failed."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class GenerateCall:
    """What a call was given. `width` counts the prompt's columns, those in the cache included; None where only the
    first pass can tell. `ids` are the prompt's tokens, or its last ones where the cache holds the others. `endings`
    end a reply, `pad` follows one."""

    width: int | None
    ids: Int[Tensor, "prompts given"] | None
    mask: Bool[Tensor, "prompts columns"] | None
    options: Callable[[str], Any]
    endings: tuple[int, ...]
    pad: int | None

    @classmethod
    def of(cls, host: Any, arguments: Mapping[str, Any]) -> GenerateCall:
        def option(name: str) -> Any:
            own, defaults = arguments.get("generation_config"), host.generation_config
            found = (arguments.get(name), getattr(own, name, None), getattr(defaults, name, None))
            return next((value for value in found if value is not None), None)

        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        ids = arguments.get("inputs") if ids is None else ids
        endings, pad = _listed(option("eos_token_id")), _listed(option("pad_token_id"))
        pad = pad or endings[:1]
        mask = arguments.get("attention_mask")
        if mask is None and ids is not None and embeds is None:
            mask = _mask_of(ids, pad, endings)
        shown = embeds if embeds is not None else ids
        width = None if shown is None else shown.shape[1] if mask is None else mask.shape[1]
        return cls(
            width=width,
            ids=ids if embeds is None else None,
            mask=None if mask is None else mask.bool(),
            options=option,
            endings=endings,
            pad=pad[0] if pad else None,
        )

    def given(self, past: int, n_rows: int) -> Int[Tensor, "rows given"] | None:
        """The tokens that follow `past` cached ones, one row per row of a pass: a call may ask for several replies."""
        if self.ids is None or self.width is None:
            return None
        ids = self.ids[:, past:] if self.ids.shape[1] == self.width else self.ids
        return self.rows(ids, n_rows) if ids.shape[1] == self.width - past else None

    def rows(self, values: Tensor, n_rows: int) -> Tensor:
        return values.repeat_interleave(n_rows // max(len(values), 1), dim=0)

    def refuse(self) -> None:
        """Raises `SteeringNotAppliedError` for ways of decoding in which a pass cannot be told from another's."""
        scale = self.options("guidance_scale")
        beams = self.options("num_beams")
        if scale not in (None, 1):
            _refuse("guidance_scale", "guidance runs the model on a second prompt in between")
        if beams not in (None, 1):
            _refuse(
                "num_beams", "beams change places and are dropped, so no receipt could say what a reply went through"
            )
        if isinstance(self.options("custom_generate"), str):
            _refuse("custom_generate", "a decoding loop from elsewhere may call the model in any order")
        for name in ("penalty_alpha", "dola_layers"):
            if self.options(name):
                _refuse(name, "its decoding loop comes from elsewhere and may call the model in any order")
        if self.options("cache_implementation") == "paged":
            _refuse(
                'cache_implementation="paged"', "continuous batching runs in a thread of its own and packs requests"
            )
        if self.options("token_healing"):
            _refuse("token_healing", "it changes the prompt after it was given")
        if self.options("assistant_early_exit"):
            _refuse("assistant_early_exit", "guesses would be made by a part of the steered model")

    def reply_lengths(self, output: Any, n_rows: int) -> Int[Tensor, " rows"] | None:
        """How many tokens of each row's reply were shown to the model: all but the last, and none after an end."""
        sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if not isinstance(sequences, Tensor) or len(sequences) != n_rows:
            return None
        new = sequences[:, 0 if self.ids is None else self.ids.shape[1] :]
        return (_written(new, self.endings, self.pad) - 1).clamp(min=0)


def _refuse(what: str, why: str) -> None:
    raise SteeringNotAppliedError(
        f"generate(..., {what}) cannot be steered: {why}",
        hint="decode greedily or by sampling, with or without guesses",
    )


def _listed(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value.flatten().tolist() if isinstance(value, Tensor) else value
    return tuple(values) if isinstance(values, list | tuple) else (int(values),)


def _mask_of(ids: Tensor, pad: tuple[int, ...], endings: tuple[int, ...]) -> Tensor | None:
    """The mask that the library infers when none is given."""
    if not pad or set(pad) & set(endings) or not bool((ids == pad[0]).any()):
        return None
    return ids != pad[0]


def _written(new: Int[Tensor, "rows new"], endings: tuple[int, ...], pad: int | None) -> Int[Tensor, " rows"]:
    """Length of each row's reply, its end token included. A row that was stopped without one is padded behind."""
    width = new.shape[1]
    over = torch.isin(new, torch.tensor(endings, device=new.device, dtype=new.dtype))
    length = torch.where(over.any(1), over.int().argmax(1) + 1, width) if width else torch.zeros_like(new.sum(1))
    if pad is None or pad in endings:
        return length
    behind = (new != pad).flip(1).int().cumsum(1) == 0
    return torch.minimum(length, width - behind.sum(1))


class _Watched:
    """`generate` of a model that somebody steers."""

    def __init__(self, host: Any, key: int) -> None:
        self.original = host.generate
        self.own = host.__dict__.get("generate")
        self.users = 0
        self._host = host
        self._key = key
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = owner_of(self._key)
        if not isinstance(owner, FollowsCalls):
            return self.original(*args, **kwargs)
        bound = inspect.signature(self.original).bind(*args, **kwargs).arguments
        call = GenerateCall.of(self._host, {**bound, **bound.get("kwargs", {})})
        owner.began(call)
        output = None
        try:
            output = self.original(*args, **kwargs)
        finally:
            owner.ended(call, output)
        return output


class _Watch:
    """A handle, as those of hooks."""

    def __init__(self, host: Any, key: int) -> None:
        self._host = host
        with _LOCK:
            watched = host.__dict__.get("generate")
            if not isinstance(watched, _Watched):
                watched = host.__dict__["generate"] = _Watched(host, key)
            watched.users += 1

    def remove(self) -> None:
        with _LOCK:
            watched = self._host.__dict__["generate"]
            watched.users -= 1
            if not watched.users:
                del self._host.__dict__["generate"]
                if watched.own is not None:
                    self._host.__dict__["generate"] = watched.own


def watch_generate(model: nn.Module, key: int) -> list[Any]:
    """Follow a model's `generate` calls, inside a wrapper of adapters too, for whoever steers the decoder `key`."""
    host = next((module for module in model.modules() if isinstance(module, GenerationMixin)), None)
    return [] if host is None else [_Watch(host, key)]
