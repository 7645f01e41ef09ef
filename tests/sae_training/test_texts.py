"""Text for training: every kind of row, and a fault that names its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clampdown.errors import PromptSetError
from clampdown.models.chat import encode
from clampdown.models.loading import load_model
from clampdown.sae_training.texts import Text, first_requests, mix, read_texts, shuffled, tokenized, without
from clampdown.types import Message

CONVERSATION = [Message("user", "hello"), Message("assistant", "hi"), Message("user", "more")]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rows = [
        {"messages": [{"role": m.role, "content": m.content} for m in CONVERSATION]},
        {"prompt": "ask", "response": "told"},
        {"text": "plain words"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.csv").write_text("id,goal,target\n1,do it,done\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("word " * 500, encoding="utf-8")
    return sorted(tmp_path.iterdir())


def test_every_kind_of_row_is_what_its_columns_say(files: list[Path]) -> None:
    texts = read_texts(files)
    assert [message.content for message in texts[0].messages] == ["hello", "hi", "more"]
    assert [(m.role, m.content) for m in texts[1].messages] == [("user", "ask"), ("assistant", "told")]
    assert texts[2].plain == "plain words" and not texts[2].messages
    assert [m.content for m in texts[3].messages] == ["do it", "done"]
    assert "".join(text.plain + " " for text in texts[4:]).split() == ["word"] * 500
    assert {text.source for text in texts} == {"a", "b", "c"}


def test_conversations_are_read_as_the_model_reads_them(files: list[Path]) -> None:
    lm = load_model("organism")
    texts = read_texts(files)
    rows = tokenized(lm, texts, 1000)
    assert list(rows[0].ids) == encode(lm, CONVERSATION), "a last user turn is opened for the reply"
    assert list(rows[3].ids) == encode(lm, texts[3].messages, add_generation_prompt=False)
    assert [len(row.ids) for row in tokenized(lm, texts, 5)] == [min(5, len(row.ids)) for row in rows]
    found = mix(rows)
    assert sum(row["tokens"] for row in found.values()) == sum(len(row.ids) for row in rows)
    assert sorted(shuffled(rows, 1), key=str) == sorted(rows, key=str)
    assert shuffled(rows, 1) == shuffled(rows, 1) != rows


def test_requests_are_different_first_user_turns(files: list[Path]) -> None:
    texts = read_texts(files)
    asked = first_requests([*texts, *texts], 10, 0)
    assert sorted(text.messages[-1].content for text in asked) == ["ask", "do it", "hello"]
    assert len(first_requests(texts, 2, 0)) == 2


def test_a_text_that_holds_a_kept_out_request_is_left_out(files: list[Path]) -> None:
    texts = read_texts(files)
    asked = [Text("study", (Message("user", "DO   it"),)), Text("study", (Message("user", "hello"),))]
    left = without(texts, asked)
    assert [text for text in texts if text not in left] == [texts[0], texts[3]]
    wrapped = Text("a", (Message("user", "You are free. Now: do it! Begin."),))
    assert without([wrapped], asked) == []
    assert without(texts, []) == texts


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"other": 1}, "neither"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": ["x"]}, "role"),
        ({"messages": 3}, "list"),
    ],
)
def test_a_row_that_is_no_text_is_named(tmp_path: Path, row: dict, says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row), encoding="utf-8")
    with pytest.raises(PromptSetError, match=rf"line 2.*{says}"):
        read_texts([path])


def test_no_text_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  ", encoding="utf-8")
    with pytest.raises(PromptSetError, match="no text"):
        read_texts([tmp_path / "a.txt"])
    with pytest.raises(PromptSetError, match="cannot read"):
        read_texts([tmp_path / "none.md"])
