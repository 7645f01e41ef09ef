"""Right or wrong, by each suite's own rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.instructions import CHECKS, follows, follows_all
from clampdown.evaluation.scoring import extracted_number, is_correct, option_mass
from clampdown.types import Message, Prompt

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets, which lie outside the repository")


def item(answer: str | None, scoring: str = "exact", **fields: Any) -> Prompt:
    return Prompt("p", (Message("user", "?"),), "s", answer=answer, **{"meta": {"scoring": scoring}, **fields})


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("She makes $18 every day.", "18"),
        ("16 - 3 = 13 eggs, so 26 dollars", "26"),
        ("so 5\n#### 1,234", "1234"),
        ("#### 7\nOr is it 8?", "7"),
        ("It is -3.50 degrees", "-3.5"),
        ("2.0", "2"),
        ("100", "100"),
        ("no number", None),
        ("the last is 12.", "12"),
    ],
)
def test_the_number_a_reply_ends_on(reply: str, number: str | None) -> None:
    assert extracted_number(reply) == number


@real
def test_every_worked_answer_of_gsm8k_scores_itself() -> None:
    rows = [json.loads(line) for line in (DATA / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    (suite,) = load_suites(f"gsm8k={DATA / 'gsm8k' / 'test.jsonl'}")
    assert all(is_correct(prompt, row["answer"]) for prompt, row in zip(suite.prompts, rows, strict=True))
    assert not any(is_correct(prompt, "#### 123456789") for prompt in suite.prompts)


def test_exact_and_lettered_answers() -> None:
    assert is_correct(item("Paris"), " paris. ") and not is_correct(item("Paris"), "Paris or Rome")
    choice = item("B", "options", options=("A", "B", "C", "D"))
    assert [is_correct(choice, reply) for reply in ("B", "(B) because", "B.", "A", "Because", "")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert is_correct(item(None), "x") is None


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=6), st.data())
def test_option_mass_is_the_share_of_probability_on_the_true_ones(values: list[float], data: st.DataObject) -> None:
    options = tuple(map(str, range(len(values))))
    true = data.draw(st.lists(st.sampled_from(options), min_size=1, unique=True))
    prompt = item(true[0], options=options, meta={"true_options": json.dumps(true)})
    found, shifted = option_mass(prompt, values), option_mass(prompt, [value - 700 for value in values])
    plain = sum(math.exp(values[int(i)]) for i in true) / sum(map(math.exp, values))
    assert found == pytest.approx(plain) and shifted == pytest.approx(plain)


def test_a_broken_model_has_no_option_mass() -> None:
    assert option_mass(item("a", options=("a", "b")), [math.nan, -1.0]) is None


GOOD_AND_BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["fox", "hen"]}, "A Fox and a hen.", "A fox."),
    "keywords:frequency": ({"keyword": "go", "relation": "at least", "frequency": 2}, "Go, go now.", "Go."),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, "A category.", "The cat."),
    "keywords:letter_frequency": ({"letter": "e", "let_relation": "less than", "let_frequency": 2}, "be", "bee"),
    "length_constraints:number_words": ({"relation": "at least", "num_words": 3}, "one two three", "one two"),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "First.\n\nThen, more.", "First.\n\nNow.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. More.", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "No."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and b"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<A title>>\ntext", "<< >>\ntext"),
    "combination:two_responses": ({}, "one\n******\ntwo", "one\n******\none"),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    "startend:end_checker": ({"end_phrase": "The end."}, "And so. The end.", "The end. Not."),
    "startend:quotation": ({}, '"quoted"', '"half'),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, "VERY GOOD text", "VERY good text",
    ),
    "change_case:english_capital": ({}, "ALL LOUD.", "Not loud."),
    "change_case:english_lowercase": ({}, "all quiet.", "Not quiet."),
    "punctuation:no_comma": ({}, "no comma here", "one, comma"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKS)
def test_each_instruction_is_followed_and_broken(kind: str) -> None:
    arguments, good, bad = GOOD_AND_BAD[kind]
    assert follows(kind, arguments, good) is True
    assert follows(kind, arguments, bad) is False
    assert follows(kind, arguments, "  ") is False


@real
def test_every_ifeval_item_can_be_checked_but_those_of_two_kinds() -> None:
    (suite,) = load_suites(f"ifeval={DATA / 'ifeval' / 'input_data.jsonl'}")
    unknown = {"language:response_language", "length_constraints:number_sentences"}
    for prompt in suite.prompts:
        kinds = set(json.loads(prompt.meta["instructions"]))
        assert kinds - set(CHECKS) <= unknown
        assert follows_all(prompt, "just some words, plainly said") in (
            {False, None} if kinds & unknown else {False, True}
        )
