"""Answers in OpenAI's shapes, whole and in pieces, with the receipt that every reply carries.

`steering` stands in each choice, and at the top where all choices agree (one choice is the usual case): a field that
differs between choices is null there. Numbers that are not finite have no JSON: they are null, and a log-probability of
minus infinity is -9999, as in OpenAI's own answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clampdown.serving.plans import Choice
from clampdown.serving.requests import Done, Token
from clampdown.serving.vocabulary import TokenBytes
from clampdown.types import Receipt

Endpoint = Literal["chat", "text"]
MINUS_INFINITY = -9999.0


@dataclass
class Answer:
    """What one choice has become so far."""

    index: int
    echoed: str = ""
    starts: tuple[int, ...] = ()
    pieces: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    done: Done | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def finite(value: float | None) -> float | None:
    """A number that JSON has."""
    return value if value is not None and math.isfinite(value) else None


def receipt_fields(choice: Choice, receipt: Receipt | None) -> dict[str, Any]:
    """The proof of what was done to one reply; without a plan, that nothing was."""
    plan = choice.plan
    found: dict[str, Any] = {
        "plan": None if plan is None else choice.name,
        "digest": plan and plan.digest,
        "tokens_touched": receipt.tokens_touched if receipt else 0,
        "edit_norm": finite(receipt.edit_norm) if receipt else 0.0,
        "gate_fired": receipt and receipt.gate_fired,
        "gate_score": finite(receipt.gate_score) if receipt else None,
        "gate_threshold": plan.gate.threshold if plan and plan.gate else None,
        "branch": _branch(receipt),
    }
    if plan and plan.gate and plan.gate.window:
        found["turns_read"] = receipt and receipt.turns_read
        found["worst_turn"] = receipt and receipt.worst_turn
        found["beyond_calibration"] = receipt and receipt.beyond_calibration
    if plan and any(gate.full is not None for gate in plan.gates):
        found["gate_factor"] = receipt and receipt.factor
    if plan and plan.otherwise:
        found["otherwise_score"] = finite(receipt.otherwise_score) if receipt else None
        found["otherwise_threshold"] = plan.otherwise.gate.threshold
    return found


def _branch(receipt: Receipt | None) -> str:
    """What acted: "edits", "otherwise" or "none"."""
    if receipt is None:
        return "none"
    return receipt.branch or ("none" if receipt.gate_fired is False else "edits")


def agreed(receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One receipt for several choices: what they agree on."""
    first = receipts[0]
    return {key: value if all(r[key] == value for r in receipts) else None for key, value in first.items()}


@dataclass(frozen=True)
class Form:
    """How the answers to one HTTP request are written: endpoint, ids, and what was asked to be shown."""

    endpoint: Endpoint
    id: str
    created: int
    model: str
    choice: Choice
    alternatives: int | None
    include_usage: bool
    n: int = 1
    raw: bool = False
    reread: bool = False
    placeholder: bool = False
    bytes_of: TokenBytes = field(default=lambda _token: b"", repr=False)

    def receipt(self, done: Done) -> dict[str, Any]:
        """What was done to one reply, and how its prompt came."""
        found = {**receipt_fields(self.choice, done.receipt), "raw": self.raw}
        return {**found, "tokens_rescored": done.rescored} if self.reread else found

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(answer) for answer in answers]
        return {
            **self._head("chat.completion" if self.endpoint == "chat" else "text_completion"),
            "choices": choices,
            "usage": usage(answers, self.n),
            "steering": agreed([choice["steering"] for choice in choices]),
        }

    def opening(self, answer: Answer) -> dict[str, Any] | None:
        """The first chunk of a choice, before any of its text: who speaks, or the prompt that is echoed."""
        if self.endpoint == "chat":
            return self._chunk(answer, {"delta": {"role": "assistant", "content": "", "refusal": None}})
        return self._chunk(answer, {"text": answer.echoed}) if answer.echoed else None

    def piece(self, answer: Answer, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A chunk of text."""
        if self.endpoint == "chat":
            return self._chunk(answer, {"delta": {"content": text}}, self._chat_logprobs(tokens))
        return self._chunk(answer, {"text": text}, self._text_logprobs(tokens, _offsets(answer, tokens)))

    def closing(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of a choice: why it ended, and its receipt."""
        done = _done(answer)
        receipt = self.receipt(done)
        said = {"delta": {}} if self.endpoint == "chat" else {"text": ""}
        chunk = self._chunk(answer, {**said, "finish_reason": _reason(done), "steering": receipt})
        return {**chunk, "steering": receipt}

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a stream ends with when it was asked to count: usage, and the receipt once more."""
        receipts = [self.receipt(_done(answer)) for answer in answers]
        return {
            **self._head(self._chunk_object),
            "choices": [],
            "usage": usage(answers, self.n),
            "steering": agreed(receipts),
        }

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.endpoint == "chat" else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, answer: Answer, said: Mapping[str, Any], logprobs: Any = None) -> dict[str, Any]:
        choice = {"index": answer.index, "finish_reason": None, "logprobs": logprobs, **said}
        more = {"usage": None} if self.include_usage else {}
        return {**self._head(self._chunk_object), "choices": [choice], **more}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        done = _done(answer)
        common = {
            "index": answer.index,
            "finish_reason": _reason(done),
            "steering": self.receipt(done),
        }
        if self.endpoint == "chat":
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            return {**common, "message": message, "logprobs": self._chat_logprobs(answer.tokens)}
        # Scored texts are followed by the one token that was asked for, which clients cut off: it is nothing.
        written = [Token(-1, "")] if self.placeholder else answer.tokens
        offsets = [*answer.starts[: len(done.prompt)], *_offsets(answer, written)]
        logprobs = self._text_logprobs([*done.prompt, *written], offsets)
        return {**common, "text": answer.echoed + answer.text, "logprobs": logprobs}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.alternatives is None:
            return None
        return {"content": [self._chat_token(token) for token in tokens], "refusal": None}

    def _chat_token(self, token: Token) -> dict[str, Any]:
        top = [self._alternative(*alternative) for alternative in token.top]
        return {**self._alternative(token.id, token.text, token.logprob), "top_logprobs": top}

    def _alternative(self, token: int, text: str, value: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": _logprob(value), "bytes": list(self.bytes_of(token))}

    def _text_logprobs(self, tokens: Sequence[Token], offsets: list[int]) -> dict[str, Any] | None:
        if self.alternatives is None:
            return None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_logprob(token.logprob) for token in tokens],
            "top_logprobs": [_top_texts(token) if self.alternatives else None for token in tokens],
            "text_offset": offsets,
        }


def usage(answers: Iterable[Answer], n: int) -> dict[str, Any]:
    """Tokens read, written, and found in the prefix cache. A prompt counts once for its n choices, as OpenAI counts."""
    done = [_done(answer) for answer in answers]
    read, written = sum(d.n_prompt for d in done[::n]), sum(d.n_generated for d in done)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(d.n_reused for d in done[::n])},
    }


def _done(answer: Answer) -> Done:
    assert answer.done is not None, "an answer is written when it has ended"
    return answer.done


def _reason(done: Done) -> str:
    """OpenAI's words have none for a request that was cancelled while the server stopped."""
    return "length" if done.reason == "cancelled" else done.reason


def _logprob(value: float | None) -> float | None:
    return MINUS_INFINITY if value == -math.inf else finite(value)


def _top_texts(token: Token) -> dict[str, float | None] | None:
    """Alternatives by text; of tokens that read the same, the likeliest."""
    if token.logprob is None and not token.top:
        return None
    found: dict[str, float | None] = {}
    for _, text, value in token.top:
        found.setdefault(text, _logprob(value))
    return found


def _offsets(answer: Answer, tokens: Sequence[Token]) -> list[int]:
    """Where the reply's tokens begin in the text that is returned."""
    return [len(answer.echoed) + token.offset for token in tokens]
