"""What people type stays text: vLLM renders a conversation to one string and tokenizes that, so a control token that is
typed into a message becomes one. With it a client could begin a reply in its own message, which no gate reads.

So a steered conversation with such text is encoded anew, as everywhere in clampdown; where more than plain messages is
asked for, it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clampdown.errors import ChatTemplateError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.types import Message
from clampdown_vllm.front.desk import Unknown

_MORE = ("tools", "documents", "chat_template", "chat_template_kwargs", "continue_final_message", "response_format")


def control_texts(lm: LanguageModel) -> tuple[str, ...]:
    """How the model's control tokens are written."""
    return tuple(str(text) for text in lm.tokenizer.convert_ids_to_tokens(sorted(lm.chat.special_ids)) if text)


def plain_ids(lm: LanguageModel, controls: Sequence[str], request: Any) -> list[int] | None:
    """The ids of a conversation in which control tokens were typed; None when none were. Raises `Unknown`."""
    texts = [_texts(message) for message in request.messages]
    if not any(control in text for text in texts for control in controls):
        return None
    if any(getattr(request, field, None) for field in _MORE) or not getattr(request, "add_generation_prompt", True):
        raise Unknown("control tokens in a message can be kept apart from the template's in plain conversations only")
    messages = [Message(message["role"], text) for message, text in zip(request.messages, texts, strict=True)]
    try:
        return encode(lm, messages)
    except ChatTemplateError as error:
        raise Unknown(error.message) from error


def _texts(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
