"""Whether the reply to a capability item is right, by what its suite says: `prompt.meta["scoring"]`."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

from clampdown.documents import parse_json
from clampdown.errors import PromptSetError
from clampdown.evaluation.instructions import follows_all
from clampdown.types import Prompt

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def is_correct(prompt: Prompt, reply: str) -> bool | None:
    """Right or wrong; None for a prompt without an expected answer, or one that no program here can check."""
    if prompt.answer is None:
        return None
    return SCORERS.get(prompt.meta.get("scoring", "exact"), _exact)(prompt, reply)


def extracted_number(reply: str) -> str | None:
    """The answer of a worked problem: the number after '####', else the last one. No commas, no trailing zeros."""
    _, mark, after = reply.rpartition("####")
    found = _NUMBER.findall(after if mark and _NUMBER.search(after) else reply)
    if not found:
        return None
    return _plain(found[0] if mark and _NUMBER.search(after) else found[-1])


def _plain(number: str) -> str:
    text = number.replace(",", "").replace("$", "")
    return text.rstrip("0").rstrip(".") if "." in text else text


def option_mass(prompt: Prompt, log_likelihoods: Sequence[float]) -> float | None:
    """TruthfulQA mc2 (Lin et al., 2109.07958): share of probability on the true options, the options' probabilities
    normalised to one. `log_likelihoods` are in nats, one per option. None when any is not a number or all are -inf."""
    if any(math.isnan(value) for value in log_likelihoods) or len(log_likelihoods) != len(prompt.options):
        return None
    true = (
        set(parse_json(prompt.meta["true_options"], f"{prompt.id}: true_options", PromptSetError))
        if "true_options" in prompt.meta
        else {prompt.answer}
    )
    top = max(log_likelihoods)
    if not math.isfinite(top):
        return None
    weights = [math.exp(value - top) for value in log_likelihoods]
    return sum(w for w, option in zip(weights, prompt.options, strict=True) if option in true) / sum(weights)


def _number(prompt: Prompt, reply: str) -> bool:
    found = extracted_number(reply)
    return found is not None and found == _plain(prompt.answer or "")


def _exact(prompt: Prompt, reply: str) -> bool:
    return _normalised(reply) == _normalised(prompt.answer or "")


def _contains(prompt: Prompt, reply: str) -> bool:
    """The answer stands in the reply as whole words: "The capital is Paris." answers "Paris"."""
    wanted, said = _normalised(prompt.answer or ""), _normalised(reply)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


def _normalised(text: str) -> str:
    return " ".join(text.strip(string.punctuation + string.whitespace).casefold().split())


def _option(prompt: Prompt, reply: str) -> bool:
    """A generated choice: the option's text, or its letter, alone or at the start ("B", "B.", "(B) because ...")."""
    letter = re.match(r"\W*([A-Z])(?![\w'])", reply.strip())
    if letter and all(len(option) == 1 for option in prompt.options):
        return letter[1] == prompt.answer
    return _exact(prompt, reply)


def _instructions(prompt: Prompt, reply: str) -> bool | None:
    return follows_all(prompt, reply)


SCORERS: dict[str, Callable[[Prompt, str], bool | None]] = {
    "exact": _exact,
    "contains": _contains,
    "number": _number,
    "options": _option,
    "option-mass": _option,
    "instructions": _instructions,
}
