"""Beginnings of prompts whose pass is done, kept for prompts that begin alike. Never across plans, nor across owners:
what is found, and how fast an answer comes, would tell one what another has asked.

What a block caches of a token depends on the tokens before it and on what was done to them. So an entry belongs to one
key (an owner and a plan's digest) and serves a prompt up to the first token that differs, if what the plan did there
holds however the prompt goes on: no gate, and scopes that are `LOCAL`. Of a plan that is not the same for prompts and
replies only the prompt's part is kept. Receipts count what was done to reused tokens too: the entry knows it per token.

Entries leave in the order of their last use, once they hold more than `limit` bytes. One that begins another goes at
once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from clampdown.serving.requests import Request
from clampdown.steering.hooks import can_resume

LEAST = 16
"""Fewer tokens are not worth a pass of their own."""


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Tokens with each block's keys and values of them [heads, tokens, head_dim], and, summed up to each token, how
    often steering changed it and by how much."""

    tokens: tuple[int, ...]
    states: tuple[tuple[Tensor, Tensor], ...]
    touched: Float[np.ndarray, " tokens"]
    norm: Float[np.ndarray, " tokens"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.states for tensor in pair) + 32 * len(self)

    def counted(self, n: int) -> tuple[float, float]:
        """What steering did to the first n tokens."""
        return (float(self.touched[n - 1]), float(self.norm[n - 1])) if n else (0.0, 0.0)


NOTHING = Prefix((), (), np.zeros(0), np.zeros(0))


def reusable(request: Request) -> int:
    """How many of a prompt's first tokens are computed as in every other prompt of the same plan that has them."""
    plan, n = request.plan, len(request.prompt)
    if not can_resume(plan):
        return 0
    everywhere = plan is None or all(edit.scope == "all" for edit in plan.edits)
    return n if everywhere else n - request.given


class PrefixCache:
    """Prefixes by (owner and plan's digest, tokens), the most recently used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], tuple[Prefix, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str, tokens: Sequence[int]) -> tuple[Prefix, int]:
        """The entry that shares the longest beginning with `tokens`, and how long that is."""
        wanted = np.array(tokens)
        best, longest = NOTHING, 0
        for (owner, _), (entry, ids) in self._entries.items():
            if owner == key and (n := _common(ids, wanted)) > longest:
                best, longest = entry, n
        if longest < LEAST:
            return NOTHING, 0
        self._entries.move_to_end((key, best.tokens))
        return best, longest

    def keep(self, key: str, prefix: Prefix) -> None:
        """Add an entry, and drop those that it makes needless or that no longer fit."""
        if len(prefix) < LEAST or prefix.nbytes > self._limit or (key, prefix.tokens) in self._entries:
            return
        for owner, tokens in list(self._entries):
            if owner == key and prefix.tokens[: len(tokens)] == tokens:
                self._drop((owner, tokens))
        self._entries[key, prefix.tokens] = prefix, np.array(prefix.tokens)
        self._held += prefix.nbytes
        while self._held > self._limit:
            self._drop(next(iter(self._entries)))

    def holds(self, key: str, tokens: tuple[int, ...]) -> bool:
        """Whether there is nothing to gain from keeping these tokens' states."""
        return not self._limit or (key, tokens) in self._entries

    def _drop(self, name: tuple[str, tuple[int, ...]]) -> None:
        self._held -= self._entries.pop(name)[0].nbytes


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
