"""IFEval's verifiable instructions (Zhou et al., 2311.07911), each checked by the paper's definition, strict mode.

Two kinds need what is not here: a language detector (response_language) and a trained sentence splitter
(number_sentences). Items with one of them are unscored, never guessed. The two change_case kinds do not check that
the text is English. Canonical IFEval numbers come from lm-evaluation-harness or Inspect.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from clampdown.documents import parse_json
from clampdown.errors import PromptSetError
from clampdown.types import Prompt

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]


def follows_all(prompt: Prompt, reply: str) -> bool | None:
    """Whether the reply follows every instruction. None when all that can be checked are followed and one cannot."""
    kinds: list[str] = parse_json(prompt.meta["instructions"], f"{prompt.id}: instructions", PromptSetError)
    arguments: list[Arguments] = parse_json(prompt.meta["arguments"], f"{prompt.id}: arguments", PromptSetError)
    found = [follows(kind, given, reply) for kind, given in zip(kinds, arguments, strict=True)]
    if False in found:
        return False
    return None if None in found else True


def follows(kind: str, arguments: Arguments, reply: str) -> bool | None:
    """Whether the reply follows one instruction; None for a kind that no check knows. An empty reply follows none."""
    check = CHECKS.get(kind)
    if check is None:
        return None
    return bool(reply.strip()) and check(reply, arguments)


def _related(count: int, relation: str, bound: int) -> bool:
    """IFEval has two relations."""
    return count < bound if relation == "less than" else count >= bound


def _existence(reply: str, given: Arguments) -> bool:
    return all(re.search(word, reply, re.IGNORECASE) for word in given["keywords"])


def _frequency(reply: str, given: Arguments) -> bool:
    return _related(len(re.findall(given["keyword"], reply, re.IGNORECASE)), given["relation"], given["frequency"])


def _forbidden(reply: str, given: Arguments) -> bool:
    return not any(re.search(rf"\b{word}\b", reply, re.IGNORECASE) for word in given["forbidden_words"])


def _letters(reply: str, given: Arguments) -> bool:
    return _related(reply.lower().count(given["letter"].lower()), given["let_relation"], given["let_frequency"])


def _words(reply: str, given: Arguments) -> bool:
    return _related(len(re.findall(r"\w+", reply)), given["relation"], given["num_words"])


def _paragraphs(reply: str, given: Arguments) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", reply)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == given["num_paragraphs"]


def _nth_paragraph(reply: str, given: Arguments) -> bool:
    parts = [part.strip() for part in reply.split("\n\n")]
    nth = given["nth_paragraph"]
    if sum(map(bool, parts)) != given["num_paragraphs"] or nth > len(parts) or not parts[nth - 1]:
        return False
    first = parts[nth - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", first)[0].lower() == given["first_word"].lower()


def _placeholders(reply: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", reply)) >= given["num_placeholders"]


def _postscript(reply: str, given: Arguments) -> bool:
    marker = str(given["postscript_marker"])
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker, re.escape(marker.lower())), reply.lower()) is not None


def _bullets(reply: str, given: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", reply, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", reply, re.MULTILINE)) == given["num_bullets"]


def _constrained(reply: str, _given: Arguments) -> bool:
    return any(f"My answer is {choice}." in reply for choice in ("yes", "no", "maybe"))


def _highlights(reply: str, given: Arguments) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", reply) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", reply) if part[2:-2].strip()]
    return len(single) + len(double) >= given["num_highlights"]


def _sections(reply: str, given: Arguments) -> bool:
    splitter = re.escape(given["section_spliter"])
    return len(re.findall(rf"\s?{splitter}\s?\d+\s?", reply)) >= given["num_sections"]


def _json(reply: str, _given: Arguments) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", reply.strip(), flags=re.IGNORECASE)
    try:
        parse_json(text, "the reply", PromptSetError)
    except PromptSetError:
        return False
    return True


def _title(reply: str, _given: Arguments) -> bool:
    return any(part.strip("<>").strip() for part in re.findall(r"<<[^\n]+>>", reply))


def _two_responses(reply: str, _given: Arguments) -> bool:
    parts = [part.strip() for part in reply.split("******")]
    real = [part for part in parts if part]
    return all(parts[1:-1]) and len(real) == 2 and real[0] != real[1]


def _repeats(reply: str, given: Arguments) -> bool:
    return reply.strip().lower().startswith(given["prompt_to_repeat"].strip().lower())


def _ends(reply: str, given: Arguments) -> bool:
    return reply.strip().strip('"').lower().endswith(given["end_phrase"].strip().lower())


def _capital_words(reply: str, given: Arguments) -> bool:
    words = [word.strip(string.punctuation) for word in re.findall(r"[^\s]+", reply)]
    return _related(sum(word.isupper() for word in words), given["capital_relation"], given["capital_frequency"])


def _quoted(reply: str, _given: Arguments) -> bool:
    text = reply.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda reply, _given: reply.isupper(),
    "change_case:english_lowercase": lambda reply, _given: reply.islower(),
    "punctuation:no_comma": lambda reply, _given: "," not in reply,
}
