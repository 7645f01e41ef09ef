"""Text that is given out is never taken back, and all of it comes out in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from clampdown.serving.requests import Piece, Token
from clampdown.serving.text import TextStream


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
