"""From tokens to text that will not be taken back.

1. Text is decoded from a short window of tokens, so that a token costs the same however long the reply is. A window
   that ends inside a character (U+FFFD at its end) waits for the rest of it, and none begins inside one: tokenizers
   that fall back to bytes decode a run of them to nothing but U+FFFD when its first bytes are missing.
2. The longest end of the text that could begin a stop string is held back until it does, or does not.
3. A token is given out with the text that ends it. A stop string and what follows it are never given out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from clampdown.serving.requests import Piece, Token

Decode = Callable[[Sequence[int]], str]
_WINDOW = 8  # tokens of context that a new window has at least; it is renewed when it holds twice as many
_CUT = "\ufffd"


class TextStream:
    """The text of one reply as it grows. `stopped` is True once a stop string has been met."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._window: list[int] = []
        self._whole: list[int] = []  # after how many of the window's tokens its last character was complete
        self._before = 0  # characters of the window that have become text already
        self._text = ""  # text that was not given out yet
        self._given = 0  # characters that were
        self._partial: list[Token] = []  # tokens since the last complete character
        self._waiting: list[tuple[int, Token]] = []  # (characters of the reply up to this token's end, token)
        self.stopped = False

    def push(self, token: Token) -> Piece | None:
        """One token more. Returns what has become certain, if anything has."""
        self._window.append(token.id)
        # Only tokens with figures are asked where they begin.
        self._partial.append(token if token.logprob is None else replace(token, offset=self.length))
        window = self._decode(self._window)
        if window.endswith(_CUT):
            return None
        self._complete(window)
        self._renew()
        self._look_for_stop()
        return self._give(len(self._text) - (0 if self.stopped else self._held()))

    @property
    def length(self) -> int:
        """Complete characters so far: the place in the text of what the next token begins, or goes on with."""
        return self._given + len(self._text)

    def finish(self) -> Piece | None:
        """What was held back, when the reply has ended without a stop string. One may still stand before an incomplete
        character: then `stopped` is True afterwards."""
        if self.stopped:
            return None
        self._complete(self._decode(self._window))
        self._look_for_stop()
        return self._give(len(self._text))

    def _renew(self) -> None:
        """Forget what the window needs no more; it must hold whole characters now."""
        self._whole.append(len(self._window))
        if len(self._window) < 2 * _WINDOW:
            return
        cut = max((n for n in self._whole if n <= len(self._window) - _WINDOW), default=0)
        if cut:
            self._window, self._whole = self._window[cut:], [n - cut for n in self._whole if n > cut]
            self._before = len(self._decode(self._window))

    def _look_for_stop(self) -> None:
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _complete(self, window: str) -> None:
        self._text += window[self._before :]
        self._before = max(self._before, len(window))
        end = self.length
        self._waiting += [(end, token) for token in self._partial]
        self._partial = []

    def _held(self) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        lengths = range(min(longest, len(self._text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)

    def _give(self, n: int) -> Piece | None:
        text, self._text = self._text[:n], self._text[n:]
        self._given += n
        tokens = tuple(token for end, token in self._waiting if end <= self._given)
        self._waiting = [(end, token) for end, token in self._waiting if end > self._given]
        return Piece(text, tokens) if text or tokens else None


def starts(decode: Decode, ids: Sequence[int]) -> tuple[int, ...]:
    """Where each token begins in the text of them all, in characters. Tokens of one character begin where it does."""
    text, found = TextStream(decode), []
    for token in ids:
        found.append(text.length)
        text.push(Token(token, ""))
    return tuple(found)
