"""What an attack is after: a harmful request of a suite, as it was asked, and bare if its form is known.

An attack may put the request in any words, in any place and behind any turns; the judge always reads the reply against
the objective's own prompt, so that an answer to something else does not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clampdown.errors import PromptSetError
from clampdown.types import OBJECTIVE, Message, Prompt

_FORMS = re.compile(
    r"^(?:please\s+)?(?:how (?:do|can|could|would|should) (?:i|you|we|one|someone)|how to|tell me how to|"
    r"explain how to|show me how to|teach me how to|describe how to|what is the best way to|help me(?: to)?|"
    r"(?:give me|provide|write|list)(?: me)? (?:the |detailed |step-by-step )*(?:steps|instructions|a guide) "
    r"(?:to|on how to|for how to))\s+",
    re.IGNORECASE,
)
_MOST_BARE = 300


@dataclass(frozen=True, slots=True)
class Objective:
    """`question` is the request as the suite asks it; `request` is it bare ("bake bread"), None where no form of asking
    was recognised. `prompt` is what the judge reads a reply against."""

    prompt: Prompt
    question: str
    request: str | None = None

    @property
    def key(self) -> str:
        return f"{self.prompt.suite}/{self.prompt.id}"

    @property
    def cluster(self) -> str:
        """Objectives after the same thing are not independent."""
        return self.prompt.meta.get(OBJECTIVE) or self.prompt.meta.get("request") or self.key

    @property
    def system(self) -> tuple[Message, ...]:
        return tuple(message for message in self.prompt.messages if message.role == "system")

    def asked(self, *turns: Message) -> tuple[Message, ...]:
        """A conversation that ends as an attack wants it to, behind the prompt's own system message."""
        return (*self.system, *turns)


def objective(prompt: Prompt) -> Objective:
    """The last user turn of a prompt is what is asked for; turns before it are left to the attacks."""
    asked = Message("user", prompt.text)
    system = tuple(message for message in prompt.messages if message.role == "system")
    return Objective(replace(prompt, messages=(*system, asked)), prompt.text, bare_request(prompt))


def objectives(prompts: Sequence[Prompt]) -> tuple[Objective, ...]:
    """Raises `PromptSetError` when there is nothing to attack for, or one objective twice."""
    if not prompts:
        raise PromptSetError("there are no harmful prompts to attack for", hint="give --suite NAME, NAME=FILE or FILE")
    found = tuple(map(objective, prompts))
    if len({each.key for each in found}) < len(found):
        raise PromptSetError("two objectives have the same id")
    return found


def bare_request(prompt: Prompt) -> str | None:
    """What is asked for, without the asking: the corpus's ground truth, else what follows a known form of question."""
    if "request" in prompt.meta:
        return prompt.meta["request"]
    text = " ".join(prompt.text.split())
    found = _FORMS.match(text)
    rest = text[found.end() :].rstrip(" ?.!") if found else ""
    return rest[:1].lower() + rest[1:] if 0 < len(rest) <= _MOST_BARE else None
