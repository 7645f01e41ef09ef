"""Engines other than this process that may write the replies of a run: `clampdown evaluate --engine vllm`.

Records, receipts, judging and resuming stay what they are: an engine gets batches of (arm, prompt, token ids) and gives
one reply each, with the receipt of what was done. Extensions bring engines as entry points of the group
`clampdown.engines`; costs on benign text and likelihoods are measured here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from clampdown.documents import parse_json
from clampdown.errors import ClampdownError, PlanError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.arms import Arm, EncodedRow, Reply

GROUP = "clampdown.engines"


@runtime_checkable
class Engine(Protocol):
    """Writes greedy replies. `label` says all of it that could change a reply, and stands in a run's key; `rows` is how
    many replies it is asked for at once."""

    @property
    def label(self) -> str: ...

    @property
    def rows(self) -> int: ...

    def replies(self, batch: Sequence[EncodedRow], max_new_tokens: int) -> list[Reply]: ...

    def close(self) -> None: ...


@runtime_checkable
class OpensEngine(Protocol):
    """What an entry point is: makes an engine for a model and the arms of one run."""

    def __call__(
        self,
        lm: LanguageModel,
        saes: Sequence[FeatureSource],
        arms: Sequence[Arm],
        longest: int,
        options: Mapping[str, Any],
    ) -> Engine: ...


@contextmanager
def opened(
    name: str | None, lm: LanguageModel, saes: Sequence[FeatureSource], arms: Sequence[Arm], longest: int
) -> Iterator[Engine | None]:
    """The engine called NAME, or NAME:{"option": value}; None for this process. `longest`: tokens of a prompt and its
    reply. Raises `ClampdownError` when there is none of that name, `PlanError` for options that are no JSON."""
    if name is None:
        yield None
        return
    plain, _, given = name.partition(":")
    opens: OpensEngine = _entry(plain).load()
    engine = opens(lm, saes, arms, longest, _options(given))
    try:
        yield engine
    finally:
        engine.close()


def _entry(name: str) -> EntryPoint:
    known = entry_points(group=GROUP)
    if name not in known.names:
        there = f"there are: {', '.join(sorted(known.names))}" if known.names else "none is installed here"
        raise ClampdownError(f"there is no engine '{name}': {there}", hint="pip install clampdown-vllm, beside vLLM")
    return known[name]


def _options(text: str) -> Mapping[str, Any]:
    found = parse_json(text or "{}", "the engine's options (--engine 'vllm:{\"seed\": 0}')", PlanError)
    if not isinstance(found, dict):
        raise PlanError(f"the engine's options are no JSON object: {text[:60]}")
    return found
