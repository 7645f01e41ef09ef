"""Text that is given out is never taken back, and all of it comes out in the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clampdown.serving.intake import spans_to_starts
from clampdown.serving.requests import Piece, Token
from clampdown.serving.text import TextStream, starts
from clampdown.serving.vocabulary import byte_level, token_bytes


def decode(ids: object) -> str:
    """Tokens are single bytes, as in the worst case of a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[Piece], TextStream]:
    made = TextStream(decode, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(made.push(Token(byte, "")))
        if made.stopped:
            break
    return [piece for piece in (*pieces, made.finish()) if piece], made


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@given(st.text())
def test_pieces_add_up_to_the_text_and_the_tokens(text: str) -> None:
    pieces, _ = stream(text)
    assert joined(pieces) == text
    assert [token.id for piece in pieces for token in piece.tokens] == list(text.encode())
    assert all("\ufffd" not in piece.text for piece in pieces) or "\ufffd" in text


@given(st.text(alphabet="abc", max_size=40), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """The reference looks at every beginning of the text: the first that holds a stop string ends the reply."""
    pieces, made = stream(text, tuple(stop))
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    cut = min((at for s in stop if (at := text[: ends[0]].find(s)) >= 0), default=0) if ends else len(text)
    assert joined(pieces) == text[:cut]
    assert made.stopped == bool(ends)
    assert sum(len(piece.tokens) for piece in pieces) == cut


def test_what_may_become_a_stop_string_waits_and_comes_when_it_does_not() -> None:
    made = TextStream(decode, ("END",))
    first = [made.push(Token(byte, "")) for byte in b"aEN"]
    assert joined([p for p in first if p]) == "a"
    after = made.push(Token(ord("x"), ""))
    assert after is not None and after.text == "ENx" and len(after.tokens) == 3


@given(st.text(alphabet="aက😀é", min_size=1, max_size=30))
def test_a_run_of_fallen_back_bytes_is_never_entered_in_the_middle(text: str) -> None:
    """Gemma's and Llama 2's kind of tokenizer: one missing byte turns a whole run of byte tokens into U+FFFD."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made = TextStream(lambda ids: tokenizer.decode(list(ids)))
    pieces = [made.push(Token(byte, "")) for byte in text.encode()]
    assert joined([piece for piece in (*pieces, made.finish()) if piece]) == text


def test_a_stop_string_before_a_character_that_is_never_completed_is_met_at_the_end() -> None:
    made = TextStream(lambda ids: b"".join([b"a", b"END\xe2"][i] for i in ids).decode(errors="replace"), ("END",))
    first, second = made.push(Token(0, "")), made.push(Token(1, ""))
    assert first is not None and first.text == "a" and second is None
    assert made.finish() is None and made.stopped


def test_bytes_that_never_become_a_character_come_at_the_end() -> None:
    made = TextStream(decode)
    assert made.push(Token(0xE2, "")) is None
    last = made.finish()
    assert last is not None and last.text == "\ufffd" and len(last.tokens) == 1


@given(st.text(alphabet="a က😀é\u0301", max_size=30))
def test_tokens_begin_at_the_character_that_their_first_byte_is_of(text: str) -> None:
    places = [place for place, character in enumerate(text) for _ in character.encode()]
    assert starts(decode, list(text.encode())) == tuple(places)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for two bytes in the middle of an emoji."""
    characters = {byte: character for character, byte in byte_level().items()}
    vocabulary = {characters[byte]: byte for byte in range(256)}
    merged = characters[0x9F] + characters[0x98]
    made = Tokenizer(models.BPE({**vocabulary, merged: 256}, [(characters[0x9F], characters[0x98])]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return fast(made)


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece's: a sign for the blank, which a text begins with, and bytes for what has no token."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "\u2581": 257, "\u2581a": 258}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    return fast(made)


@pytest.mark.parametrize("make", [byte_level_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("text", ["a aa", " a", "😀a naïve", "a\U0001f469‍🚀 é\u0301 a"])
def test_bytes_of_tokens_are_the_text_s_own_and_spans_count_its_characters(
    make: Callable[[], PreTrainedTokenizerFast], text: str
) -> None:
    tokenizer = make()
    encoded = tokenizer(text, return_offsets_mapping=True)
    bytes_of = token_bytes(tokenizer)
    own = [bytes_of(token) for token in encoded["input_ids"]]
    written = b"".join(own)
    assert written in (text.encode(), b" " + text.encode()), "sentencepiece writes a blank before a text"
    before = len(written) - len(text.encode())
    places = [place for place, character in enumerate(text) for _ in character.encode()]
    begins = [max(0, sum(map(len, own[:i])) - before) for i in range(len(own))]
    assert spans_to_starts(encoded["offset_mapping"]) == tuple(places[at] for at in begins)


def test_bytes_of_marks_and_of_no_token() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<é>"})
    bytes_of = token_bytes(tokenizer)
    assert bytes_of(tokenizer.convert_tokens_to_ids("<é>")) == "<é>".encode()
    assert bytes_of(-1) == bytes_of(10**6) == b""
