"""One tokenizer's way with conversations: what its template writes, and how it reads the result.

Everything here is derived from the tokenizer and kept as long as its template and its tokens stay what they are.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from clampdown.errors import ChatTemplateError
from clampdown.models.control import ControlTokens, Token, Twin
from clampdown.models.template import Rendered, Skeletons, located, source
from clampdown.replies import THINKING
from clampdown.types import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words that no template contains, one per message of a probe.
WORDS = ("zebra quilt", "marble otter", "walnut comet", "velvet tulip")
_ROLES: tuple[Role, ...] = ("user", "assistant", "user")


class Voice:
    """How one tokenizer renders and reads conversations: what its template writes, and its control tokens."""

    _known: ClassVar[WeakKeyDictionary[Any, tuple[object, Voice]]] = WeakKeyDictionary()

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.skeletons = Skeletons()
        template = source(tokenizer)
        probe = [Message(role, word) for role, word in zip(_ROLES, WORDS, strict=False)]
        try:
            written = located(tokenizer, self.skeletons, probe, add_generation_prompt=True).outside()
        except ChatTemplateError:
            written = iter(())
        self.control = ControlTokens.of(tokenizer, "\0".join((template, *written)))
        self.format: Any = None  # a ChatFormat, once somebody has asked for it
        self.marks = {self.control.ids[mark]: mark for mark in chain(*THINKING) if mark in self.control.ids}
        self._twin: Twin | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Voice:
        """The tokenizer's, made anew when its template or its tokens change. Raises `ChatTemplateError`."""
        state = (source(tokenizer), len(tokenizer))
        known = cls._known.get(tokenizer)
        if known is None or known[0] != state:
            known = cls._known[tokenizer] = (state, cls(tokenizer))
        return known[1]

    def read(self, tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[Token]:
        """The tokens of a rendered conversation, none of them a control token inside a content."""
        encoding = _encoding(tokenizer, rendered.text)
        if self._typed(encoding, rendered):
            return self._apart(tokenizer, rendered)
        return _tokens(encoding)

    def ids(self, tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[int]:
        """The ids of `read`, in less time."""
        encoding = _encoding(tokenizer, rendered.text)
        if self._typed(encoding, rendered):
            return [token.id for token in self._apart(tokenizer, rendered)]
        return list(encoding.ids)

    def _typed(self, encoding: Any, rendered: Rendered) -> bool:
        """Whether the tokenizer reads control tokens in the contents."""
        numbers = self.control.numbers
        found = (Token(n, *encoding.token_to_chars(i)) for i, n in enumerate(encoding.ids) if n in numbers)
        return any(self.control.inside(found, rendered.text, rendered.spans))

    def twin(self, tokenizer: PreTrainedTokenizerBase, text: str) -> Twin:
        """The tokenizer that reads control tokens in the template only, for a text that has none of its names."""
        if self._twin is None or self._twin.collides(text):
            self._twin = Twin(tokenizer, self.control, text)
        return self._twin

    def _apart(self, tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> list[Token]:
        return self.twin(tokenizer, rendered.text).encode(rendered.text, rendered.spans)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Token]:
    """The tokenizer's own tokens of a text."""
    return _tokens(_encoding(tokenizer, text))


def _encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    if not encoded.encodings:
        raise ChatTemplateError(
            "this tokenizer cannot say where its tokens lie in the text", hint="a fast tokenizer is needed"
        )
    return encoded.encodings[0]


def _tokens(encoding: Any) -> list[Token]:
    return [Token(token, *place) for token, place in zip(encoding.ids, encoding.offsets, strict=True)]
