"""Attention sinks (decision 0009): how long a token may be at each site, measured on the served model when it starts.

The same few short prompts as everywhere are run through the engine, and the worker says how long the residual was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from clampdown.activations.sinks import NEUTRAL, RESIDUAL, neutral_ids, sinks_among
from clampdown.errors import SteeringNotAppliedError
from clampdown.types import Site
from clampdown_vllm.front.desk import Desk
from clampdown_vllm.order import Order
from clampdown_vllm.versions import refuse_runner


def measuring(desk: Desk) -> list[tuple[list[int], Order]]:
    """The prompts to run, and what the worker is to note."""
    prompts = [neutral_ids(desk.lm, text) for text in NEUTRAL]
    return [
        (ids, Order(id=f"sinks-{i}", plan="", digest="", mode="measure", length=len(ids)))
        for i, ids in enumerate(prompts)
    ]


def limits(desk: Desk, made: Sequence[tuple[list[int], Order]], found: Mapping[str, Any]) -> dict[str, float]:
    """From what the worker noted to a limit per site; none where there are no sinks.

    Raises `SteeringNotAppliedError` when a pass did not go through the hooks: then nothing would be steered.
    """
    for _, order in made:
        noted = found.get(order.id)
        if noted is None or noted["missed"] or noted["next"] < order.length:
            raise SteeringNotAppliedError(
                "a pass of the served model did not go through its steered sites",
                hint="a graph that was compiled earlier does not know the hooks: clear VLLM_CACHE_ROOT and start again",
            )
    result = {}
    for name in desk.book.sites:
        site = Site.parse(name)
        lengths = [length for _, o in made for length in found[o.id]["lengths"][name][: o.length]]
        if not any(lengths):
            raise SteeringNotAppliedError(f"nothing was seen at {name} in a pass of the served model")
        sinks = sinks_among(desk.lm, site, [ids for ids, _ in made], torch.tensor(lengths))
        result[name] = sinks.limit if site.point in RESIDUAL else math.inf
    return result


def agree(desk: Desk, answers: Sequence[Mapping[str, Any]]) -> None:
    """Every worker holds the plans that were checked here, in a runner that is known. Raises
    `SteeringNotAppliedError`."""
    from vllm import __version__

    from clampdown_vllm import PLUGIN_VERSION

    own = {"plugin": PLUGIN_VERSION, "vllm": __version__, "digests": desk.book.digests, "sites": list(desk.book.sites)}
    for number, answer in enumerate(answers):
        for key, value in own.items():
            if answer.get(key) != value:
                raise SteeringNotAppliedError(
                    f"worker {number} has {key} {answer.get(key)!r}, the front end {value!r}",
                    hint="every process needs the same installation and the same files",
                )
        refuse_runner(answer["runner"], desk.settings.allow_untested)
