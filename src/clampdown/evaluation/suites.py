"""Prompt files: JSON Lines, CSV, JSON or Parquet on disk <-> suites in memory, with every fault named by file and line.

One row is one prompt. Columns (a `Columns` value renames them, so a dataset's own names need no copy of the file):

    prompt | messages   the user turn (also called goal, question, instruction, behavior, query, text or input), or the
                        conversation as a list of {"role", "content"} that ends with the user
    suite               which suite; default: the file's stem
    id                  unique in its suite; default: suite-LINE
    harmful             true / false: is refusing right? Needed unless the row has an `answer`
    answer, options     expected answer and candidates of a capability item (options: a JSON list)
    split, category     `test` by default; any text
    family, target      which attack's wrapper this is; what it is after (kept in `meta`)
    meta                JSON object of text, ground truth that a judge may read

A suite is of kind capability when its rows have answers, else of kind safety; a file may not mix both in one suite.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.errors import PromptSetError
from clampdown.evaluation.rows import Row, read_rows
from clampdown.store import to_jsonable, write_atomic
from clampdown.types import Message, Prompt, Split, Suite, SuiteKind

PROMPT_NAMES = ("prompt", "goal", "question", "instruction", "behavior", "query", "text", "input")
"""What public sets call the column of the user turn, in any case; the first that is there is read."""
FAMILY, TARGET = "family", "target"
_TRUE = frozenset({"true", "1", "yes", "harmful", "unsafe"})
_FALSE = frozenset({"false", "0", "no", "harmless", "benign", "safe"})
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Columns:
    """What a file calls each column. Datasets differ in names only; a table of datasets holds one of these each."""

    prompt: str = "prompt"
    messages: str = "messages"
    suite: str = "suite"
    id: str = "id"
    harmful: str = "harmful"
    answer: str = "answer"
    options: str = "options"
    split: str = "split"
    category: str = "category"
    meta: str = "meta"


@dataclass(frozen=True, slots=True)
class _Item:
    """A parsed row: the prompt, the label its suite must agree on, and its line for later complaints."""

    prompt: Prompt
    harmful: bool | None
    row: Row


def read_suites(path: Path, columns: Columns | None = None, *, harmful: bool | None = None) -> tuple[Suite, ...]:
    """Read a file of a kind that `rows.READERS` lists. `harmful` labels rows whose file has no such column.

    Raises `PromptSetError` for a file that is missing, empty, malformed, unlabelled or inconsistent; it says where.
    """
    names = columns or Columns()
    items = [_item(row, names, harmful) for row in read_rows(path)]
    if not items:
        raise PromptSetError(f"{path} holds no prompts", hint="one row per prompt, with a 'prompt' column")
    _refuse_duplicates(items)
    grouped: dict[str, list[_Item]] = {}
    for item in items:
        grouped.setdefault(item.prompt.suite, []).append(item)
    return tuple(_suite(name, group) for name, group in grouped.items())


def write_suites(path: Path, suites: Iterable[Suite]) -> None:
    """Write suites as JSON Lines that `read_suites` reads back equal."""
    lines = [
        json.dumps({"harmful": suite.harmful, **to_jsonable(prompt)}, ensure_ascii=False)
        for suite in suites
        for prompt in suite.prompts
    ]
    write_atomic(path, "".join(line + "\n" for line in lines))


def _item(row: Row, names: Columns, harmful: bool | None) -> _Item:
    suite = row.text(names.suite) or row.stem
    prompt = Prompt(
        id=row.text(names.id) or f"{suite}-{row.line}",
        messages=_messages(row, names),
        suite=suite,
        split=_split(row, names.split),
        category=row.text(names.category),
        answer=row.text(names.answer),
        options=tuple(str(option) for option in row.structure(names.options, list, "a JSON list") or ()),
        meta=_meta(row, names),
    )
    if prompt.options and prompt.answer not in prompt.options:
        row.fail(f"the answer {prompt.answer!r} is not among the options {list(prompt.options)}")
    label = _label(row, names.harmful)
    return _Item(prompt, harmful if label is None else label, row)


def _meta(row: Row, names: Columns) -> dict[str, str]:
    """The column's own entries, and what stands in the columns of the attack's family and target."""
    own = {key: str(value) for key, value in (row.structure(names.meta, dict, "a JSON object") or {}).items()}
    beside = {name: text for name in (FAMILY, TARGET) if (text := row.text(name)) is not None}
    return beside | own


def _prompt_column(row: Row, names: Columns) -> str:
    """The column of the user turn: the named one, else the first of those that sets are known to use."""
    if names.prompt in row.cells:
        return names.prompt
    by_case = {str(name).casefold(): str(name) for name in row.cells}
    return next((by_case[name] for name in PROMPT_NAMES if name in by_case), names.prompt)


def _messages(row: Row, names: Columns) -> tuple[Message, ...]:
    turns = row.structure(names.messages, list, "a JSON list of turns")
    if turns is None:
        column = _prompt_column(row, names)
        text = row.text(column)
        if text is None or not text.strip():
            missing = column not in row.cells and names.messages not in row.cells
            known = ", ".join(str(name) for name in row.cells)
            row.fail(f"no column '{names.prompt}' (columns: {known})" if missing else f"'{column}' is empty")
        return (Message("user", text),)
    messages = tuple(_message(row, turn) for turn in turns)
    if not messages or messages[-1].role != "user":
        row.fail("a conversation must end with a user turn")
    return messages


def _message(row: Row, turn: Any) -> Message:
    fields = turn if isinstance(turn, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if role not in _ROLES or not isinstance(content, str) or not content.strip():
        row.fail(f"a turn needs a role ({', '.join(_ROLES)}) and a content, got {json.dumps(turn)[:60]}")
    return Message(role, content)


def _split(row: Row, column: str) -> Split:
    value = row.text(column) or Split.TEST.value
    try:
        return Split(value)
    except ValueError:
        row.fail(f"unknown split '{value}'", hint=f"one of: {', '.join(Split)}")


def _label(row: Row, column: str) -> bool | None:
    value = row.cells.get(column)
    if value is None or value == "":
        return None
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        row.fail(f"column '{column}' should be true or false, got {value!r}")
    return word in _TRUE


def _refuse_duplicates(items: Sequence[_Item]) -> None:
    lines: dict[tuple[str, str], int] = {}
    for item in items:
        key = (item.prompt.suite, item.prompt.id)
        if key in lines:
            item.row.fail(f"id '{item.prompt.id}' was already used on line {lines[key]}", hint="ids must be unique")
        lines[key] = item.row.line


def _suite(name: str, items: Sequence[_Item]) -> Suite:
    """One suite from its rows, which must agree on kind and label."""
    first = items[0]
    capability = first.prompt.answer is not None
    for item in items:
        if (item.prompt.answer is not None) != capability:
            item.row.fail(
                f"suite '{name}' mixes prompts with and without an answer", hint="put them in suites of their own"
            )
        if item.harmful is None and not capability:
            item.row.fail("no label: is refusing this prompt right?", hint="add a column 'harmful' (true or false)")
        if item.harmful != first.harmful:
            item.row.fail(f"suite '{name}' mixes harmful and harmless prompts", hint="give each a 'suite' of its own")
    kind = SuiteKind.CAPABILITY if capability else SuiteKind.SAFETY
    return Suite(name, kind, bool(first.harmful), tuple(item.prompt for item in items))
