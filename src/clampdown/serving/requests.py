"""What the API asks of the engine, and what the engine answers: values only, so that neither knows the other.

A `Request` is one prompt with one plan and one way of sampling (n > 1 choices are n requests). Its `Stream` yields
`Piece`s as text becomes certain and ends with exactly one `Done`. Dropping a stream cancels the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from clampdown.steering.plan import Plan
from clampdown.types import Receipt


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy, `top_k` 0 keeps every token, `repetition_penalty` None is
    what the model's generation config asks for; `top_logprobs` None returns no log-probabilities."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as token ids, steered by `plan` (None: not at all).

    `echo` also returns the prompt's own log-probabilities (`Done.prompt`), which is what log-likelihood suites read;
    then `max_tokens` may be 0. The last `given` tokens of the prompt are the beginning of a reply: they count as
    generated, so no gate reads them and the scope 'prompt' leaves them alone, as when the model had written them. In a
    likelihood request (`echo`, `max_tokens` 0) that is the continuation which is scored.

    With `reread` (a likelihood request under a gated plan) the gate does read it, token by token (`scoring.py`).
    `owner` is whose request it is: nobody else's prompts share its prefixes.
    """

    id: str
    prompt: tuple[int, ...]
    plan: Plan | None
    sampling: Sampling
    echo: bool = False
    given: int = 0
    reread: bool = False
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A token with the log-probability of being drawn there, in nats, and the likeliest others.

    The first token of a prompt has no log-probability. Both are those of the steered model, at temperature 1. `offset`
    is how many characters of a reply come before the one that the token begins in, for tokens with log-probabilities.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that will not be taken back (it cannot become part of a stop string), and its tokens."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """How it ended, and the proof of what was done. `receipt` is None for a request without a plan."""

    reason: Literal["stop", "length", "cancelled"]
    n_prompt: int
    n_generated: int
    receipt: Receipt | None
    prompt: tuple[Token, ...] = field(default=())
    n_reused: int = 0
    """Prompt tokens whose pass was found in the prefix cache."""
    rescored: int = 0
    """Scored tokens before which the gate, having read the reply so far, decided otherwise than on its context."""


@runtime_checkable
class Stream(Protocol):
    """The answer to one request, as it comes. Closing it early frees its place in the batch."""

    def __aiter__(self) -> AsyncIterator[Piece | Done]: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """What the engine is doing now."""

    queued: int
    running: int
    draining: bool


@runtime_checkable
class Serves(Protocol):
    """What the API needs of an engine.

    `submit` raises `QueueFullError` (with seconds to wait) when the queue is full or the engine drains, and `PlanError`
    and its kin for a plan that does not fit the model. An error while generating is raised by the stream.
    """

    def submit(self, request: Request) -> Stream: ...

    def load(self) -> Load: ...

    @property
    def places(self) -> int:
        """How many requests may wait: more than that are never taken together."""
        ...

    async def start(self) -> None: ...

    async def stop(self, *, drain_seconds: float) -> None: ...
