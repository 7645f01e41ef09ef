"""The bytes that a token stands for, from the tokenizer's own tables.

Decoded text does not say: a token that is a part of a character decodes to U+FFFD, and some decoders strip the blank
that a first token begins with. Fast tokenizers name their tokens in one of three ways, and their decoder says which:

| decoder | names |
|---|---|
| ByteLevel | a printable character per byte (GPT-2's table) |
| ByteFallback | text with another sign for the blank, and `<0xE2>` for single bytes |
| others | text |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

TokenBytes = Callable[[int], bytes]
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any) -> TokenBytes:
    """Each token's own bytes by its id. Special tokens stand for their names; ids that are no token for nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return cache(lambda token: tokenizer.decode([token]).encode("utf-8", "replace"))
    added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
    from_name = _reader(list(_parts(json.loads(backend.to_str())["decoder"])))

    @cache
    def found(token: int) -> bytes:
        if token in added:
            return added[token].encode("utf-8", "replace")
        name = backend.id_to_token(token) if token >= 0 else None
        return b"" if name is None else from_name(name)

    return found


def _parts(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A decoder's steps, in order."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder


def _reader(parts: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """From a token's name to its bytes."""
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        byte_of = byte_level()
        return lambda name: (
            bytes(byte_of[c] for c in name) if all(c in byte_of for c in name) else name.encode("utf-8", "replace")
        )
    changes = list(_changes(parts))

    def read(name: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        for old, new in changes:
            name = name.replace(old, new)
        return name.encode("utf-8", "replace")

    return read


def _changes(parts: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """What a name says in other characters than the text does: the blank, and a word's continuation."""
    for part in parts:
        if part["type"] == "Metaspace":
            yield part["replacement"], " "
        elif part["type"] == "Replace" and "String" in part["pattern"]:
            yield part["pattern"]["String"], part["content"]
        elif part["type"] == "WordPiece":
            yield part["prefix"], ""


@cache
def byte_level() -> Mapping[str, int]:
    """The character that byte-level tokenizers write for each byte: itself where it is printable, else the next one
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
