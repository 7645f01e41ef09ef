"""The shapes that published data sets come in: one function from a raw row to an item, per shape.

A shape takes the authors' own columns and those of the set's copy on the hub, so that one table entry reads both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clampdown.evaluation.rows import Row
from clampdown.types import OBJECTIVE


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt as a data set gives it. `part` splits a set whose rows have two labels: it ends the suite's name.

    `harmful` is None where the table entry says it for the whole set; `id` None means "number of the row".
    """

    text: str
    id: str | None = None
    category: str | None = None
    part: str = ""
    harmful: bool | None = None
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)


Shape = Callable[[Row], Item | None]
"""None leaves the row out: it is of another subset than the entry's."""


def xstest(row: Row) -> Item:
    """Safe prompts and unsafe twins, 18 types (Rottger et al., 2308.01263)."""
    label = row.needed("label").strip().lower()
    if label not in ("safe", "unsafe"):
        row.fail(f"column 'label' should be safe or unsafe, got '{label}'")
    identity = row.text("id") or row.text("id_v2")
    meta = _meta(row, "focus", "note")
    return Item(row.needed("prompt"), identity, row.text("type"), label, label == "unsafe", meta=meta)


def wildguard(row: Row) -> Item | None:
    """Prompts with a human label of harm, plain and adversarial (Han et al., 2406.18495). Those on which the annotators
    did not agree have an empty label, and are left out."""
    if "prompt_harm_label" in row.cells and row.text("prompt_harm_label") is None:
        return None
    label = row.needed("prompt_harm_label").strip().lower()
    if label not in ("harmful", "unharmful"):
        row.fail(f"column 'prompt_harm_label' should be harmful or unharmful, got '{label}'")
    style = "adversarial" if str(row.cells.get("adversarial")).lower() in ("true", "1") else "plain"
    part = f"{label}-{style}"
    return Item(row.needed("prompt"), None, row.text("subcategory"), part, label == "harmful", meta={"style": style})


def air_bench(row: Row) -> Item:
    """Prompts under a four-level map of risks; the category is the second level (Zeng et al., 2407.17436)."""
    meta = {
        "risk": row.needed("cate-idx"),
        "level2": row.needed("l2-name"),
        "level3": row.needed("l3-name"),
        "level4": row.needed("l4-name"),
    }
    return Item(row.needed("prompt"), f"{meta['risk']}-{row.index:05d}", meta["level2"], meta=meta)


def harmbench(row: Row) -> Item:
    """Behaviours; a contextual one is asked with its context before it (Mazeika et al., 2402.04249)."""
    behaviour, context = row.needed("Behavior", "prompt"), row.text("ContextString") or row.text("context")
    text = f"{context}\n\n---\n\n{behaviour}" if context else behaviour
    category = row.text("SemanticCategory") or row.text("category")
    return Item(text, row.text("BehaviorID"), category, meta=_meta(row, "FunctionalCategory", "Tags"))


def jailbreakbench(row: Row) -> Item:
    """A behaviour; harmful and benign rows of the same Index are twins (Chao et al., 2404.01318)."""
    index = row.text("Index") or row.text("") or str(row.index)
    meta = {**_behaviour(index), **_meta(row, "Behavior", "Source")}
    return Item(row.needed("Goal"), index, row.needed("Category"), meta=meta)


def _behaviour(index: str) -> dict[str, str]:
    """What the harmful row, its benign twin and every attack on it share: their outcomes are not independent."""
    return {"twin": index, OBJECTIVE: f"jailbreakbench/{index}"}


def attack_artifact(row: Row) -> Item | None:
    """A jailbreak string that an attack found, as JailbreakBench stores it. Attacks that gave up have no prompt."""
    if "prompt" not in row.cells:
        row.fail("no column 'prompt': not a JailbreakBench artifact")
    text = row.text("prompt")
    if text is None:
        return None
    meta = {**_behaviour(str(row.cells.get("index", row.index))), **_meta(row, "goal", "behavior")}
    return Item(text, meta["twin"], row.text("category"), meta=meta)


def wrapped(row: Row) -> Item:
    """A request inside a jailbreak's template: the template's name is the attack's family."""
    family, request = row.needed("family"), row.needed("objective")
    return Item(row.needed("prompt"), None, family, meta={"family": family, OBJECTIVE: request})


def instruction(row: Row) -> Item:
    """One request per row under any of the usual names, with an optional id and category."""
    text = row.needed("prompt", "goal", "forbidden_prompt", "instruction", "question")
    category = row.text("category") or row.text("semantic_category") or row.text("harm_area")
    return Item(text, row.text("id"), category, meta=_meta(row, "subcategory", "source", "dataset"))


def sorry_bench(row: Row) -> Item | None:
    """Base requests only: the other 20 styles are rewordings (Xie et al., 2406.14598)."""
    if (row.text("prompt_style") or "base") != "base":
        return None
    turns = row.needed_structure("turns", list, "a list of turns")
    return Item(str(turns[0]), row.text("question_id"), row.text("category"))


def conversation(row: Row) -> Item | None:
    """The first human turn of a ShareGPT-style conversation (OpenHermes)."""
    turns = row.needed_structure("conversations", list, "a list of turns")
    asked = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "human"]
    if not asked or not isinstance(asked[0], str) or not asked[0].strip():
        return None
    return Item(asked[0], row.text("id"), row.text("category"))


def mmlu(row: Row) -> Item:
    """Four lettered choices below the question; the options are the letters (Hendrycks et al., 2009.03300)."""
    question, letters = row.needed("question"), "ABCD"
    choices = row.structure("choices", list, "a list of four choices") or [row.needed(letter) for letter in letters]
    answer = row.needed("answer").strip()
    letter = letters[int(answer)] if answer in ("0", "1", "2", "3") else answer
    if len(choices) != len(letters) or letter not in letters:
        row.fail(f"expected four choices and an answer A-D or 0-3, got {len(choices)} and '{answer}'")
    subject = row.text("subject") or re.sub(r"_(test|val|dev)$", "", row.stem)
    lines = [question, *(f"{name}. {choice}" for name, choice in zip(letters, choices, strict=True)), "Answer:"]
    return Item("\n".join(lines), f"{subject}-{row.index}", subject, answer=letter, options=tuple(letters))


def arc(row: Row) -> Item:
    """The options are the texts of the choices (Clark et al., 1803.05457)."""
    choices = row.needed_structure("choices", dict, "an object with 'text' and 'label'")
    texts, labels = list(choices.get("text", ())), [str(label) for label in choices.get("label", ())]
    key = row.needed("answerKey")
    if key not in labels or len(texts) != len(labels):
        row.fail(f"the answer key '{key}' is not among the labels {labels}")
    return _options(row, row.needed("question"), texts, [texts[labels.index(key)]], row.text("id"))


def hellaswag(row: Row) -> Item:
    """The options are endings of a context (Zellers et al., 1905.07830)."""
    endings, label = row.needed_structure("endings", list, "a list of endings"), row.needed("label")
    if not label.isdigit() or int(label) >= len(endings):
        row.fail(f"the label '{label}' is not one of {len(endings)} endings")
    category = row.text("activity_label")
    return _options(row, row.needed("ctx"), endings, [endings[int(label)]], row.text("ind"), category)


def truthfulqa_mc1(row: Row) -> Item:
    """One true answer among false ones: right if it is the likeliest (Lin et al., 2109.07958)."""
    options, true = _targets(row, "mc1_targets")
    if len(true) != 1:
        row.fail(f"mc1 has one true answer, this row has {len(true)}")
    return _options(row, row.needed("question"), options, true)


def truthfulqa_mc2(row: Row) -> Item:
    """Several true and false answers: scored by the share of probability on the true ones."""
    options, true = _targets(row, "mc2_targets")
    return _options(row, row.needed("question"), options, true)


def bbq(row: Row) -> Item:
    """A context that does or does not say who, a question, and three answers of which one is "unknown" (Parrish et
    al., 2110.08193). `meta.biased` is the answer that follows the stereotype, where the row tells which one is."""
    options = [row.needed(f"ans{i}") for i in range(3)]
    condition, polarity, label = row.needed("context_condition"), row.needed("question_polarity"), row.needed("label")
    if condition not in ("ambig", "disambig") or polarity not in ("neg", "nonneg") or label not in ("0", "1", "2"):
        row.fail(f"expected ambig or disambig, neg or nonneg and a label 0-2, got {condition}, {polarity}, {label}")
    biased = _stereotyped(row, options, negative=polarity == "neg")
    meta = {OBJECTIVE: f"{row.needed('category')}-{row.needed('question_index')}"}
    item = _options(row, f"{row.needed('context')} {row.needed('question')}", options, [options[int(label)]])
    return replace(
        item,
        id=f"{row.needed('category')}-{row.needed('example_id')}",
        category=row.needed("category"),
        part="ambiguous" if condition == "ambig" else "disambiguated",
        meta=meta if biased is None else {**meta, "biased": biased},
    )


def _stereotyped(row: Row, options: Sequence[str], *, negative: bool) -> str | None:
    """The answer that follows the stereotype: the stereotyped group for a negative question, the other one for the
    opposite; None where the file's words for groups leave it open."""
    groups: dict[str, Any] = row.needed_structure("answer_info", dict, "an object of answers")
    about: dict[str, Any] = row.needed_structure("additional_metadata", dict, "an object")
    targets = {_group_word(name) for name in about.get("stereotyped_groups", ())}
    named = [{_group_word(part) for part in groups.get(f"ans{i}", ())} for i in range(len(options))]
    people = [i for i, words in enumerate(named) if "unknown" not in words]
    stereotyped = [i for i in people if named[i] & targets]
    if len(people) != 2 or len(stereotyped) != 1:
        return None
    other = next(i for i in people if i not in stereotyped)
    return options[stereotyped[0] if negative else other]


_GROUP_WORDS = {"woman": "f", "girl": "f", "man": "m", "boy": "m", "lowses": "low ses", "highses": "high ses"}


def _group_word(name: Any) -> str:
    """A group by one word: the set writes "F" and "woman", "lowSES" and "low SES"."""
    word = str(name).casefold()
    return _GROUP_WORDS.get(word, word)


def gsm8k(row: Row) -> Item:
    """A word problem; the answer is the number after '####' (Cobbe et al., 2110.14168)."""
    worked = row.needed("answer")
    _, mark, number = worked.rpartition("####")
    if not mark or not re.fullmatch(r"\s*-?[\d,]+(\.\d+)?\s*", number):
        row.fail("column 'answer' should end with '#### NUMBER'")
    return Item(row.needed("question"), answer=number.strip().replace(",", ""))


def ifeval(row: Row) -> Item:
    """A prompt with instructions that a program can verify (Zhou et al., 2311.07911)."""
    kinds = row.needed_structure("instruction_id_list", list, "a list of instruction ids")
    arguments = row.needed_structure("kwargs", list, "a list of objects")
    if len(kinds) != len(arguments):
        row.fail(f"{len(kinds)} instructions and {len(arguments)} sets of arguments")
    given = [{key: value for key, value in a.items() if value is not None} for a in arguments]
    meta = {"instructions": json.dumps(kinds), "arguments": json.dumps(given)}
    return Item(row.needed("prompt"), row.text("key"), kinds[0].split(":")[0], answer="every instruction", meta=meta)


def _meta(row: Row, *columns: str) -> dict[str, str]:
    found = {column.lower(): row.text(column) for column in columns}
    return {name: value for name, value in found.items() if value is not None}


def _targets(row: Row, column: str) -> tuple[list[str], list[str]]:
    """(all options, the true ones), from {text: 0 or 1} or the hub's {"choices": [...], "labels": [...]}."""
    found: dict[str, Any] = row.needed_structure(column, dict, "an object of answers")
    if set(found) == {"choices", "labels"}:
        if len(found["choices"]) != len(found["labels"]):
            row.fail(f"column '{column}': {len(found['choices'])} choices and {len(found['labels'])} labels")
        found = dict(zip(found["choices"], found["labels"], strict=True))
    true = [text for text, label in found.items() if label]
    if not true or (len(true) == len(found) and column == "mc1_targets"):
        row.fail(f"column '{column}' has no {'false' if true else 'true'} answer")
    return list(found), true


def _options(
    row: Row, question: str, options: Iterable[str], true: Sequence[str], identity: str | None = None,
    category: str | None = None,
) -> Item:  # fmt: skip
    """An item by option texts. They are put in an order that the question's hash decides: files that list the right
    answer first would make a scorer that breaks ties (or NaNs) towards the first look right."""
    ordered = sorted(map(str, options), key=lambda option: hashlib.sha256(f"{question}\0{option}".encode()).digest())
    meta = {"true_options": json.dumps(list(true), ensure_ascii=False)} if len(true) > 1 else {}
    return Item(question, identity, category, answer=str(true[0]), options=tuple(ordered), meta=meta)


def plain_question(row: Row) -> Item | None:
    """A short question and its answer (our own sets)."""
    return Item(row.needed("prompt"), None, row.text("category"), answer=row.needed("answer"))
