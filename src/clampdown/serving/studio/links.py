"""A link to a conversation with its plan: what was said, the plan's name, and the controls.

Answers are not in it. They are greedy: the same words under the same plan get the same answers, asked anew by whoever
opens the link. A plan goes by its name, which the server looks up in its own table; nothing in a link is a path.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clampdown.errors import RequestError
from clampdown.serving.studio.conversation import Conversation
from clampdown.serving.studio.settings import AS_PLANNED

PARAMETER = "talk"
LONGEST = 6000
TURNS = 8
_Said = Annotated[str, Field(min_length=1, max_length=LONGEST)]


class Link(BaseModel):
    """What a link holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    plan: str = Field(max_length=200)
    said: tuple[_Said, ...] = Field(max_length=TURNS)
    multiple: float = 1.0
    operator: str = Field(AS_PLANNED, max_length=40)
    scope: str = Field(AS_PLANNED, max_length=40)
    gated: bool = True
    threshold: float | None = None

    @classmethod
    def read(cls, query: Mapping[str, Any]) -> Link | None:
        """From a page's query; None when it has no link. Raises `RequestError` for one that cannot be read."""
        text = query.get(PARAMETER)
        if not text:
            return None
        try:
            raw = base64.urlsafe_b64decode(str(text)[: 4 * LONGEST].encode())
            return cls.model_validate_json(raw)
        except (binascii.Error, ValueError, ValidationError) as error:
            raise RequestError("this link cannot be read", hint="links are made on the page Keep") from error

    def address(self, page: str) -> str:
        """The link. Raises `RequestError` for a conversation that is too long for one."""
        packed = base64.urlsafe_b64encode(self.model_dump_json().encode()).decode()
        if len(packed) > LONGEST:
            raise RequestError("this conversation is too long for a link", hint="save the plan, and copy the words")
        return f"{page}?{urlencode({PARAMETER: packed})}"


def said_in(talk: Conversation) -> tuple[str, ...]:
    """What the user said. Raises `RequestError` for more turns than a link holds."""
    if len(talk.turns) > TURNS:
        raise RequestError(f"a link holds {TURNS} turns, and this conversation has {len(talk.turns)}")
    return tuple(turn.said for turn in talk.turns)
