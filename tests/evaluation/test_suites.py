"""Prompt files round-trip, and every fault is a `PromptSetError` that names the file and the line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clampdown.errors import PromptSetError
from clampdown.evaluation.suites import Columns, read_suites, write_suites
from clampdown.types import Message, Prompt, Split, Suite, SuiteKind

# Any text that UTF-8 can hold, with the characters that naive line splitting trips over.
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() != ""
) | st.sampled_from(["a\u2028b", "a\x85b", "\x0bx", '"quoted", comma', "line\r\nbreak", "\ufefftext"])


@st.composite
def suites(draw: st.DrawFn) -> Suite:
    kind = draw(st.sampled_from(list(SuiteKind)))
    name = draw(texts)
    ids = draw(st.lists(texts, min_size=1, max_size=4, unique=True))
    return Suite(name, kind, draw(st.booleans()), tuple(draw(prompts(name, i, kind)) for i in ids))


@st.composite
def prompts(draw: st.DrawFn, suite: str, prompt_id: str, kind: SuiteKind) -> Prompt:
    capability = kind is SuiteKind.CAPABILITY
    options = tuple(draw(st.lists(texts, max_size=3, unique=True))) if capability else ()
    answer = draw(st.sampled_from(options) if options else texts) if capability else None
    history = draw(st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), texts), max_size=2))
    return Prompt(
        prompt_id,
        (*history, Message("user", draw(texts))),
        suite,
        draw(st.sampled_from(list(Split))),
        draw(st.none() | texts),
        answer,
        options,
        draw(st.dictionaries(texts, texts, max_size=2)),
    )


# beartype samples containers with `random` when a strategy builds a checked dataclass.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@settings(max_examples=30)
@given(st.lists(suites(), min_size=1, max_size=3, unique_by=lambda s: s.name))
def test_what_is_written_reads_back_equal(written: list[Suite]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "prompts.jsonl"
        write_suites(path, written)
        assert read_suites(path) == tuple(written)


@given(st.lists(texts, min_size=1, max_size=5), st.booleans())
def test_csv_holds_any_text(contents: list[str], harmful: bool) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "mine.csv"
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ["prompt", "harmful"])
            writer.writeheader()
            writer.writerows({"prompt": text, "harmful": harmful} for text in contents)
        (found,) = read_suites(path)
        assert (found.name, found.harmful, found.kind) == ("mine", harmful, SuiteKind.SAFETY)
        assert [prompt.text for prompt in found.prompts] == contents


def test_columns_of_a_dataset_are_named_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "xstest.csv"
    path.write_text("id_v2,type,prompt,label\n7,homonyms,How do I kill a process?,safe\n8,x,How to kill?,unsafe\n")
    columns = Columns(id="id_v2", category="type", harmful="label", suite="label")
    safe, unsafe = read_suites(path, columns)
    assert (safe.name, safe.harmful, unsafe.name, unsafe.harmful) == ("safe", False, "unsafe", True)
    assert (safe.prompts[0].id, safe.prompts[0].category) == ("7", "homonyms")


def test_a_file_without_labels_can_be_labelled_by_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "wild.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    assert read_suites(path, harmful=True)[0].harmful is True
    with pytest.raises(PromptSetError, match=r"wild\.jsonl line 1: no label"):
        read_suites(path)


def test_options_and_meta_in_csv_are_json(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text('prompt,answer,options,meta\nCapital?,Rome,"[""Rome"", ""Oslo""]","{""kind"": ""fact""}"\n')
    (found,) = read_suites(path)
    assert found.kind is SuiteKind.CAPABILITY
    assert found.prompts[0].options == ("Rome", "Oslo")
    assert found.prompts[0].meta == {"kind": "fact"}


OK = '{"prompt": "a", "harmful": true, "id": "1"}\n'

BAD_JSONL: dict[str, tuple[str, str]] = {
    "empty": ("", r"p\.jsonl holds no prompts"),
    "blank": ("\n \n", r"p\.jsonl holds no prompts"),
    "not json": (OK + "{oops\n", r"line 2: not JSON"),
    "cut off": (OK + '{"prompt": "b", "harm', r"line 2: not JSON"),
    "not an object": (OK + "[1]\n", r"line 2: expected an object"),
    "no prompt column": (OK + '{"said": "b"}\n', r"line 2: no column 'prompt' \(columns: said\)"),
    "empty prompt": (OK + '{"prompt": " ", "harmful": true}\n', r"line 2: 'prompt' is empty"),
    "null prompt": (OK + '{"prompt": null, "harmful": true}\n', r"line 2: 'prompt' is empty"),
    "duplicate id": (OK + "\n" + OK, r"line 3: id '1' was already used on line 1"),
    "unlabelled": (OK + '{"prompt": "b"}\n', r"line 2: no label"),
    "bad label": ('{"prompt": "b", "harmful": "maybe"}\n', r"line 1: column 'harmful'"),
    "mixed labels": (OK + '{"prompt": "b", "harmful": false}\n', r"line 2: .*mixes harmful and harmless"),
    "mixed kinds": (OK + '{"prompt": "b", "answer": "c"}\n', r"line 2: .*mixes prompts with and without"),
    "bad split": ('{"prompt": "b", "harmful": true, "split": "train"}\n', r"line 1: unknown split 'train'"),
    "bad role": ('{"messages": [{"role": "bot", "content": "x"}], "harmful": true}\n', r"line 1: a turn needs"),
    "ends with the assistant": (
        '{"messages": [{"role": "assistant", "content": "x"}], "harmful": true}\n',
        r"line 1: a conversation must end with a user turn",
    ),
    "no turns": ('{"messages": [], "harmful": true}\n', r"line 1: a conversation must end"),
    "messages is text": ('{"messages": "hi", "harmful": true}\n', r"line 1: column 'messages'"),
    "answer not an option": ('{"prompt": "b", "answer": "c", "options": ["d"]}\n', r"line 1: the answer 'c'"),
    "prompt is a list": ('{"prompt": ["b"], "harmful": true}\n', r"line 1: column 'prompt' should be text"),
    "half a surrogate": ('{"prompt": "\\ud800", "harmful": true}\n', r"line 1: not JSON"),
    "too deep": (OK + "[" * 100_000, r"line 2: not JSON"),
}


@pytest.mark.parametrize("name", BAD_JSONL)
def test_every_fault_in_jsonl_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_JSONL[name]
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(PromptSetError, match=message):
        read_suites(path)


BAD_CSV: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"p\.csv holds no prompts"),
    "header only": (b"prompt,harmful\n", r"p\.csv holds no prompts"),
    "no prompt column": (b"said,harmful\na,true\n", r"line 2: no column 'prompt' \(columns: said, harmful\)"),
    "too few cells": (b"prompt,harmful\na,true\nb\n", r"line 3: 1 cells, the header has 2"),
    "too many cells": (b"prompt,harmful\na, b,true\n", r"line 2: 3 cells, the header has 2"),
    "open quote": (b'prompt,harmful\n"a,true\n', r"line 2: not CSV"),
    "twice the same column": (b"prompt,prompt\na,b\n", r"line 1: two columns"),
    "not utf-8": (b"prompt,harmful\na,true\n\xff,true\n", r"line 3: not UTF-8"),
    "duplicate id": (b"id,prompt,harmful\n1,a,true\n1,b,true\n", r"line 3: id '1' was already used on line 2"),
    "options no list": (b"prompt,answer,options\na,b,b|c\n", r"line 2: column 'options'"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_every_fault_in_csv_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_CSV[name]
    path = tmp_path / "p.csv"
    path.write_bytes(content)
    with pytest.raises(PromptSetError, match=message):
        read_suites(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "prompts.xlsx", "."])
def test_files_that_are_not_there_or_not_prompts(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptSetError):
        read_suites(tmp_path / name)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(["prompt", "messages", "id", "harmful", "answer", "options", "split", "meta"])


@given(st.dictionaries(names, values))
def test_any_object_is_a_suite_or_a_named_error(row: dict[str, Any]) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "p.jsonl"
        path.write_text(json.dumps(row))
        problem = None
        try:
            assert len(read_suites(path)[0].prompts) == 1
        except PromptSetError as error:
            problem = error.message
        assert problem is None or "p.jsonl line 1" in problem
