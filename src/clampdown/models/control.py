"""Control tokens, and text that only looks like them.

A template speaks to the model in control tokens (`<|end|>`, `<|user|>`), and a tokenizer reads those strings wherever
they stand: what somebody typed would end their own turn and open another. So a text with such strings is encoded by a
*twin* of the tokenizer that knows every control token under another name, of the same length and in private
characters: the template's own tokens are written in those names, and what was typed matches nothing. Everything else
(normalisation, splitting, merges, the tokens that are not for control) is the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from clampdown.errors import ChatTemplateError

_PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no text means anything by
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how some vocabularies write a byte: text, even where it is called special
_PIPED = re.compile("<([|\uff5c]).*\\1>")  # how tokens are written that are for control, whatever their tokenizer says


@dataclass(frozen=True)
class ControlTokens:
    """The strings that are control tokens, with their ids; `unknown` is what stands for unknown text, if anything."""

    ids: Mapping[str, int]
    unknown: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> ControlTokens:
        """The special tokens, and the added ones that the template writes or that are written like control tokens.

        `template` is its source with what it renders: some templates put their tokens together from pieces.
        """
        named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
        found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        for token_id, token in tokenizer.added_tokens_decoder.items():
            text = token.content
            written = bool(text.strip()) and (text in template or _PIPED.fullmatch(text) is not None)
            if token.special or written or text in named:
                found[text] = token_id
        return cls({t: n for t, n in found.items() if not _BYTE.fullmatch(t)}, tokenizer.unk_token_id)

    @cached_property
    def numbers(self) -> frozenset[int]:
        return frozenset(self.ids.values())

    def pattern(self) -> re.Pattern[str]:
        """Matches any of them, the longest first."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def inside(self, tokens: Iterable[Token], text: str, spans: Sequence[tuple[int, int]]) -> Iterator[Token]:
        """Those of the tokens that are control tokens and begin inside a span of the text. A token may have taken
        white space around itself."""
        for token in tokens:
            if token.id not in self.numbers:
                continue
            piece = text[token.begin : token.end]
            at = token.begin + len(piece) - len(piece.lstrip())
            typed = token.id != self.unknown or piece.strip() in self.ids
            if typed and any(begin <= at < end for begin, end in spans):
                yield token


@dataclass(frozen=True, slots=True)
class Token:
    """A token and where it lies in the text, in characters."""

    id: int
    begin: int
    end: int


class Twin:
    """A tokenizer that knows the control tokens under names that nobody can type."""

    def __init__(self, tokenizer: Any, control: ControlTokens, avoid: str = "") -> None:
        self.names = _names(control.ids, set(avoid))
        self._letters = frozenset("".join(self.names.values()))
        self._pattern = control.pattern()
        described = json.loads(_backend(tokenizer).to_str())
        wanted: dict[str, int] = {token["content"]: token["id"] for token in described["added_tokens"]}
        self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(described, self.names)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        named = {self.names.get(text, text): number for text, number in wanted.items()}
        self._ids = {self._tokenizer.token_to_id(name): number for name, number in named.items()}

    def collides(self, text: str) -> bool:
        """Whether somebody's text has a character of these names: then other names are needed."""
        return not self._letters.isdisjoint(text)

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Token]:
        """The text's tokens, where nothing inside the spans is a control token."""
        encoding = self._tokenizer.encode(self._written(text, spans), add_special_tokens=False)
        ids = (self._ids.get(token, token) for token in encoding.ids)
        return [Token(token, begin, end) for token, (begin, end) in zip(ids, encoding.offsets, strict=True)]

    def _written(self, text: str, spans: Sequence[tuple[int, int]]) -> str:
        """The text with the control tokens outside the spans under their other names, character for character."""
        pieces, cursor = [], 0
        for begin, end in [*spans, (len(text), len(text))]:
            pieces += [self._pattern.sub(lambda found: self.names[found[0]], text[cursor:begin]), text[begin:end]]
            cursor = end
        return "".join(pieces)


def _backend(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ChatTemplateError(
            "a message holds the text of a control token, and this tokenizer cannot keep it as text",
            hint="a fast tokenizer is needed",
        )
    return backend


def _names(texts: Iterable[str], avoid: set[str]) -> dict[str, str]:
    """For each text a string of private characters of the same length that begins as no other does."""
    letters = [chr(number) for number in _PRIVATE if chr(number) not in avoid]
    return {text: letters[i + 1] + letters[0] * (len(text) - 1) for i, text in enumerate(texts)}


def _renamed(described: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer's description with its tokens renamed, in the model's vocabulary too: a model that looks whole words
    up would find them there."""
    for token in described["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = described["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return described


def _makes(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
