"""Where a feature fires in a conversation: each token with its activation, message by message.

The activations are those of the unsteered model reading the conversation: on the steered side that is what the feature
would do there without the plan, because an edit of a feature makes its own activation meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.activations.traces import trace
from clampdown.models.chat import encode, token_owners, token_texts
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import Message


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text and the feature's activation there. `content` is False for template and special tokens; `place` is
    its number in the encoded conversation."""

    text: str
    value: float
    content: bool
    place: int = 0


@dataclass(frozen=True, slots=True)
class Colours:
    """One feature's activations on a conversation. `messages[i]` are the tokens of message i; `before[i]` the
    template's tokens that lie before it, such as the assistant's header, where a reply is decided."""

    feature: int
    messages: tuple[tuple[Piece, ...], ...]
    before: tuple[tuple[Piece, ...], ...]

    @property
    def largest(self) -> float:
        """The largest activation on a content token: full colour."""
        return max((abs(p.value) for pieces in self.messages for p in pieces if p.content), default=0.0)

    @property
    def strongest(self) -> Piece | None:
        """The content token with the largest activation, if there is any."""
        live = [p for pieces in self.messages for p in pieces if p.content and p.value > 0]
        return max(live, key=lambda p: p.value, default=None)


def colour(lm: LanguageModel, sae: Sae, feature: int, messages: Sequence[Message]) -> Colours:
    """Read the conversation with the unsteered model. Raises `FeatureIndexError`, `ChatTemplateError`."""
    (found,) = trace(lm, sae, [feature], [encode(lm, messages, add_generation_prompt=False)])
    texts = token_texts(lm, messages, add_generation_prompt=False)
    owners = token_owners(lm, messages, add_generation_prompt=False)
    inside: list[list[Piece]] = [[] for _ in messages]
    before: list[list[Piece]] = [[] for _ in messages]
    values, content = found.activations[:, 0].tolist(), found.content.tolist()
    following = _following(owners)
    rows = zip(texts, values, content, owners, following, strict=True)
    for place, (text, value, is_content, owner, next_owner) in enumerate(rows):
        if owner is not None:
            inside[owner].append(Piece(text, value, is_content, place))
        elif next_owner is not None:
            before[next_owner].append(Piece(text, value, content=False, place=place))
    return Colours(feature, tuple(map(tuple, inside)), tuple(map(tuple, before)))


def _following(owners: Sequence[int | None]) -> list[int | None]:
    """For each token the next message that begins at or after it; None behind the last."""
    found: list[int | None] = []
    upcoming: int | None = None
    for owner in reversed(owners):
        upcoming = owner if owner is not None else upcoming
        found.append(upcoming)
    return found[::-1]
