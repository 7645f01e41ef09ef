"""From tokens to text that will not be taken back.

1. Text is decoded from a short window of tokens, so that a token costs the same however long the reply is. A window
   that ends inside a character (U+FFFD at its end) waits for the rest of it.
2. The longest end of the text that could begin a stop string is held back until it does, or does not.
3. A token is given out with the text that ends it. A stop string and what follows it are never given out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from clampdown.serving.requests import Piece, Token

Decode = Callable[[Sequence[int]], str]
_WINDOW = 8  # tokens of context that a new window starts with; it is renewed when it holds twice as many
_CUT = "\ufffd"


class TextStream:
    """The text of one reply as it grows. `stopped` is True once a stop string has been met."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._window: list[int] = []
        self._before = 0  # characters of the window that have become text already
        self._text = ""  # text that was not given out yet
        self._given = 0  # characters that were
        self._partial: list[Token] = []  # tokens of a character that is not complete
        self._waiting: list[tuple[int, Token]] = []  # (characters of the reply up to this token's end, token)
        self.stopped = False

    def push(self, token: Token) -> Piece | None:
        """One token more. Returns what has become certain, if anything has."""
        self._window.append(token.id)
        self._partial.append(token)
        window = self._decode(self._window)
        if window.endswith(_CUT):
            return None
        self._complete(window)
        if len(self._window) >= 2 * _WINDOW:
            self._window = self._window[-_WINDOW:]
            self._before = len(self._decode(self._window))
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        return self._give(len(self._text) - (0 if self.stopped else self._held()))

    def finish(self) -> Piece | None:
        """What was held back, when the reply has ended without a stop string."""
        if self.stopped:
            return None
        self._complete(self._decode(self._window))
        return self._give(len(self._text))

    def _complete(self, window: str) -> None:
        self._text += window[self._before :]
        self._before = max(self._before, len(window))
        end = self._given + len(self._text)
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
