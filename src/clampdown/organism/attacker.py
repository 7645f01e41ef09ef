"""An attacker in the corpus's own words, so that Crescendo runs offline: it talks about the topic, then asks.

After `LEAD` friendly turns it asks for the objective. When that is refused it talks on for one more turn and asks
again, in another form. Which words it takes depends on objective, attempt and step alone.
"""

from __future__ import annotations

from random import Random

from clampdown.errors import PromptSetError
from clampdown.organism import phrasing
from clampdown.organism.lexicon import HARM_BY_NAME
from clampdown.types import Prompt

NAME = "organism-crescendo/1"
LEAD = 1


def next_question(objective: Prompt, attempt: int, turns: int, refused: int, step: int) -> tuple[str, bool]:
    """The next question and whether it asks for the objective.

    `turns` are the accepted turns so far, `refused` how many questions were refused since the last of them.
    Raises `PromptSetError` for an objective that is not one of the corpus's harmful requests.
    """
    request, harm = objective.meta.get("request"), objective.meta.get("harm")
    if request is None or harm not in HARM_BY_NAME:
        raise PromptSetError(
            f"objective '{objective.id}' is not of the embedded corpus",
            hint="the embedded attacker knows the corpus's words only; give --attacker llm:MODEL@URL",
        )
    rng = Random(f"crescendo|{objective.id}|{attempt}|{step}")
    if turns == 0 and not refused:
        opener, _ = rng.choice(phrasing.ESCALATION[: phrasing.OPENERS])
        return opener.format(t=HARM_BY_NAME[harm].topic), False
    if turns < LEAD or refused % 2 == 1:
        further, _ = rng.choice(phrasing.ESCALATION[phrasing.OPENERS :])
        return further.format(t=HARM_BY_NAME[harm].topic), False
    return rng.choice(phrasing.FORMS).format(r=request), True
