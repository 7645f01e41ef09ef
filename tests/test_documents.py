"""Whatever lies in a file, reading it ends soon, with a value or with one error that names the place."""

from __future__ import annotations

import ast
import contextlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.cards import read_card
from clampdown.documents import (
    MAX_DEPTH,
    from_json,
    parse_json,
    parse_toml,
    read_json,
    read_toml,
)
from clampdown.errors import PlanError, RecipeError, StoreError
from clampdown.evaluation.turn_log import TurnLog
from clampdown.results.run import Run
from clampdown.steering.plan import read_plan
from clampdown.store import RecordLog, read_feature_set, read_records
from clampdown.study.compare import run_compare
from clampdown.study.recipes.schema import read_recipe

SOURCE = Path(__file__).parents[1] / "src" / "clampdown"
DEEP = "[" * 5000
WRONG_JSON = {
    "5,000 brackets": DEEP,
    "5,000 closed brackets": DEEP + "]" * 5000,
    "900 objects": '{"a":' * 900 + "1" + "}" * 900,
    "a number": "5",
    "a list": "[]",
    "null": "null",
    "text": '"schema"',
    "5,000 digits": f'{{"schema": {"9" * 5000}}}',
    "half a surrogate": '{"schema": "\\ud800"}',
    "a key twice": '{"schema": 1, "schema": 1}',
    "bytes that are no text": "\udcff",
    "nothing": "",
}
WRONG_TOML = {
    "5,000 brackets": f"x = {DEEP}",
    "5,000 dots": ".".join(["a"] * 5000) + " = 1",
    "5,000 digits": f"x = {'9' * 5000}",
    "nothing": "",
    "a wrong version": "schema_version = []",
    "a table for a list": "schema_version = 1\n[edits]\na = 1",
}


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def one_record() -> str:
    row = {"arm": "a", "suite": "s", "prompt_id": "p", "split": "test", "category": None, "reply": "no"}
    return json.dumps(row | {"n_tokens": 2, "verdict": "refused", "correct": None, "judge": "rules"}) + "\n"


@pytest.mark.parametrize("text", WRONG_JSON.values(), ids=WRONG_JSON)
def test_json_of_another_shape_is_a_named_error_everywhere(text: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file.json", text)
    for read in (read_feature_set, read_card):
        with pytest.raises(StoreError, match=r"file\.json"):
            read(file)
    for name in ("manifest.json", "summary.json"):
        written(tmp_path / "run" / name, text)
    written(tmp_path / "run" / "records.jsonl", one_record())
    with pytest.raises(StoreError, match=r"summary\.json"):
        Run.read(tmp_path / "run")
    for opened in (lambda: RecordLog(tmp_path / "run", "key"), lambda: TurnLog(tmp_path / "run", "key")):
        with pytest.raises(StoreError, match=r"manifest\.json"):
            opened()
    with pytest.raises(StoreError, match=r"manifest\.json"):
        run_compare(str(tmp_path / "run"), str(tmp_path / "run"))


@pytest.mark.parametrize("text", WRONG_JSON.values(), ids=WRONG_JSON)
def test_a_line_of_another_shape_is_a_named_error_with_its_number(text: str, tmp_path: Path) -> None:
    file = written(tmp_path / "records.jsonl", one_record() + text + "\n")
    with pytest.raises(StoreError, match=r"records\.jsonl line 2"):
        read_records(file)
    with pytest.raises(StoreError, match=r"records\.jsonl line 2"):
        RecordLog(tmp_path, "key")


@pytest.mark.parametrize("text", WRONG_TOML.values(), ids=WRONG_TOML)
def test_toml_of_another_shape_is_a_named_error_everywhere(text: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file.toml", text)
    for read, error in ((read_plan, PlanError), (read_recipe, RecipeError)):
        with pytest.raises(error, match=r"file\.toml"):
            read(file)


@pytest.mark.parametrize("read", [read_json, read_toml])
def test_what_cannot_be_opened_or_has_no_end_is_a_named_error(read, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("clampdown.documents.MAX_JSON", 1000)
    monkeypatch.setattr("clampdown.documents.MAX_TOML", 1000)
    for path in (tmp_path, tmp_path / "none", Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(StoreError):
            read(path)


def test_a_records_file_under_another_name_is_not_cut(tmp_path: Path) -> None:
    """Only what a kill leaves is cut off: the beginning of a row, in a file that is this run's alone."""
    notes = written(tmp_path / "notes.txt", "my notes, without an end of line")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.jsonl").symlink_to(notes)
    with pytest.raises(StoreError, match="ends in the middle of a line"):
        RecordLog(tmp_path / "run", "key")
    assert notes.read_text() == "my notes, without an end of line"
    elsewhere = written(tmp_path / "elsewhere.jsonl", one_record() + one_record()[:20])
    (tmp_path / "run" / "records.jsonl").unlink()
    (tmp_path / "run" / "records.jsonl").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="under another name"):
        RecordLog(tmp_path / "run", "key")
    assert elsewhere.read_text() == one_record() + one_record()[:20]
    (tmp_path / "run" / "records.jsonl").unlink()
    elsewhere.rename(tmp_path / "run" / "records.jsonl")
    with RecordLog(tmp_path / "run", "key") as log:
        assert len(log.records) == 1


def test_both_readers_count_a_row_that_was_written_twice_once(tmp_path: Path) -> None:
    path = written(tmp_path / "records.jsonl", one_record() * 2)
    with RecordLog(tmp_path, "key") as log:
        assert log.records == read_records(path)
        assert len(log.records) == 1
    written(path, one_record() + one_record().replace('"no"', '"yes"'))
    for read in (lambda: read_records(path), lambda: RecordLog(tmp_path, "key")):
        with pytest.raises(StoreError, match="line 2 is a record of a s p again"):
            read()


class Colour(StrEnum):
    """A choice of words."""

    RED = "red"


@dataclass(frozen=True)
class Inner:
    """A part."""

    weight: float | None
    colour: Colour = Colour.RED


@dataclass(frozen=True)
class Outer:
    """A whole with parts of every kind."""

    name: str
    count: int
    pair: tuple[float, bool]
    inner: tuple[Inner, ...] = ()
    kind: Literal["a", "b"] = "a"
    more: dict[str, Inner] = field(default_factory=dict)


VALUE = {"name": "n", "count": 3, "pair": [1.5, True], "inner": [{"weight": 2}], "more": {"x": {"weight": None}}}


def test_a_dataclass_is_made_of_plain_values_with_those_inside_it() -> None:
    made = Outer("n", 3, (1.5, True), (Inner(2),), "a", {"x": Inner(None)})
    assert from_json(Outer, VALUE) == made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": "3"}, "count: expected a whole number, got 3"),
        ({"count": True}, "count: expected a whole number"),
        ({"name": None}, "name: expected text"),
        ({"pair": [1.5]}, "pair: expected 2 items"),
        ({"inner": 5}, "inner: expected a list"),
        ({"inner": [{"weight": []}]}, "inner: weight: expected a number"),
        ({"inner": [{"weight": 1, "colour": "green"}]}, "green"),
        ({"more": {"x": 5}}, "more: expected an object, got 5"),
        ({"kind": "c"}, "kind: expected one of 'a', 'b', got c"),
        ({"surprise": "red"}, "unknown field 'surprise'"),
    ],
)
def test_a_value_of_another_kind_names_its_field(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_json(Outer, VALUE | changes)
    with pytest.raises(ValueError, match="no field 'name'"):
        from_json(Outer, {key: value for key, value in VALUE.items() if key != "name"})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=12,
)


@given(plain)
def test_any_value_comes_back_or_is_no_record(value: object) -> None:
    assert parse_json(json.dumps(value), "here") == value
    with pytest.raises(ValueError, match=r"expected|no field|unknown field"):
        from_json(Outer, value)


@given(st.text() | st.text("[]{}\"',:1ae.=\n# -"))
def test_any_text_is_a_value_or_a_named_error(text: str) -> None:
    for parse in (parse_json, parse_toml):
        with contextlib.suppress(StoreError):
            parse(text, "here")


def test_nesting_is_allowed_up_to_a_depth() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "here") == json.loads(deepest)
    with pytest.raises(StoreError, match="here: not JSON: nested deeper"):
        parse_json(f"[{deepest}]", "here")
    with pytest.raises(StoreError, match="nested deeper"):
        parse_toml(f"x = [{deepest}]", "here")


# Modules that parse by themselves, and why.
PARSES_ITSELF = {
    "documents.py": "it is the place",
    "evaluation/judges/endpoint.py": "answers from a network, of bounded size: whatever is wrong is a failed attempt",
    "serving/studio/mount.py": "bodies of requests, of bounded size: whatever is wrong is refused",
    "models/control.py": "text that the tokenizers library wrote a moment before",
    "serving/vocabulary.py": "text that the tokenizers library wrote a moment before",
}


def test_no_other_module_parses() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [name.name for name in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            called = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "json"
            if "tomllib" in imported or (called and node.attr in ("load", "loads")):
                found.add(path.relative_to(SOURCE).as_posix())
    assert found == set(PARSES_ITSELF)
