"""What the front end tells the worker about one request, as plain data: it travels in the request's `extra_args`.

The worker has no tokenizer and no chat format. It gets positions: where each edit acts, which tokens a gate reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from clampdown_vllm.settings import KEY

Mode = Literal["act", "armed", "read", "measure"]
"""act: the edits of a branch, whatever a gate said. armed: the gate decides in this prompt's own pass. read: gates read
this prompt, nothing is edited. measure: how long the residual is at every token."""


@dataclass(frozen=True, slots=True)
class Order:
    """`id` names the request's receipt. `reach`: per edit of the branch, positions [low, high). `content`: runs
    [start, stop) that gates read; `branches`: whose gates do."""

    id: str
    plan: str
    digest: str
    mode: Mode
    length: int
    branch: int = 0
    reach: tuple[tuple[int, int], ...] = ()
    content: tuple[tuple[int, int], ...] = ()
    branches: tuple[int, ...] = ()

    @property
    def reads(self) -> bool:
        """Whether a gate has to see every token of the prompt, so that none may come from the cache."""
        return self.mode != "act"

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> Self | None:
        """From a request's `extra_args`; None when it is not to be steered. Raises `ValueError` for a name that was
        not resolved: whatever passes it on unsteered would be wrong."""
        given = (extra or {}).get(KEY)
        if given is None:
            return None
        if not isinstance(given, Mapping) or "digest" not in given:
            raise ValueError(f"steering {given!r} reached the engine unresolved: no front end of clampdown saw it")
        return cls(**{k: _tuples(v) for k, v in given.items()})


def within(reach: Sequence[Sequence[int]], start: int, end: int) -> tuple[tuple[int, int, int], ...]:
    """What edits do to the positions [start, end): which edit, and its interval there, counted from `start`."""
    return tuple(
        (edit, max(low - start, 0), min(high, end) - start)
        for edit, (low, high) in enumerate(reach)
        if max(low, start) < min(high, end)
    )


def _tuples(value: Any) -> Any:
    """Lists, which is what travels, as tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def runs(inside: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """The unbroken runs of True, as [start, stop)."""
    edges = [i for i in range(len(inside) + 1) if (i > 0 and inside[i - 1]) != (i < len(inside) and inside[i])]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
