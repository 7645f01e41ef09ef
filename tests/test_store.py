"""Files survive what happens to files: any text, a kill at any byte, a full disk, another run's directory."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clampdown.documents import read_json
from clampdown.errors import StoreError
from clampdown.store import (
    RecordLog,
    content_hash,
    prompts_hash,
    read_feature_set,
    read_records,
    write_atomic,
    write_feature_set,
    write_json,
)
from clampdown.types import (
    FeatureScore,
    FeatureSet,
    Ground,
    Message,
    OptionChoice,
    Prompt,
    Provenance,
    Receipt,
    Record,
    Refusal,
    Split,
    StoredReply,
    Verdict,
)

# What UTF-8 can hold, with the characters at which `str.splitlines` cuts and a JSON line must not.
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["a\u2028b", "\u2029", "\x85", "\x1c\x0b\x0c"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
receipts = st.builds(Receipt, texts, st.integers(0, 10**6), numbers, st.none() | numbers, st.none() | st.booleans())
records = st.builds(
    Record,
    arm=texts,
    suite=texts,
    prompt_id=texts,
    split=st.sampled_from(list(Split)),
    category=st.none() | texts,
    reply=texts,
    n_tokens=st.integers(0, 10**6),
    verdict=st.sampled_from(list(Verdict)),
    correct=st.none() | st.booleans(),
    judge=texts,
    receipt=st.none() | receipts,
    refusal=st.none() | st.sampled_from(list(Refusal)),
    helped=st.none() | st.booleans(),
    ground=st.none() | st.sampled_from(list(Ground)),
)
unique_records = st.lists(records, max_size=6, unique_by=lambda r: (r.arm, r.suite, r.prompt_id))
# beartype samples containers with `random` when a strategy builds a checked dataclass.
quiet = pytest.mark.filterwarnings("ignore:Do not use the `random` module")


def record(i: int = 0, reply: str = "no") -> Record:
    return Record("arm", "suite", f"p{i}", Split.TEST, None, reply, 2, Verdict.REFUSED, None, "rules")


@quiet
@settings(max_examples=40)
@given(unique_records)
def test_records_come_back_as_they_were(written: list[Record]) -> None:
    with TemporaryDirectory() as directory:
        with RecordLog(Path(directory), {"k": 1}) as log:
            log.append(written)
        with RecordLog(Path(directory), {"k": 1}) as log:
            assert log.records == tuple(written)
        assert read_records(Path(directory) / "records.jsonl") == tuple(written)


@quiet
@settings(max_examples=40)
@given(unique_records.filter(len), st.data())
def test_a_kill_at_any_byte_loses_only_the_line_in_flight(written: list[Record], data: st.DataObject) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "records.jsonl"
        with RecordLog(Path(directory), "key") as log:
            log.append(written)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        n_whole = whole[:cut].count(b"\n")
        assert read_records(path) == tuple(written[:n_whole])
        with RecordLog(Path(directory), "key") as log:
            assert log.records == tuple(written[:n_whole])
            log.append(written)
        assert path.read_bytes() == whole


def test_records_of_before_the_two_questions_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in asdict(record()).items() if key not in ("refusal", "helped", "ground")}
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n")
    assert read_records(tmp_path / "records.jsonl") == (record(),)


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    with RecordLog(tmp_path, "key") as log:
        log.append([record(0), record(1)])
        log.append([record(1, "another reply"), record(2)])
        assert ("arm", "suite", "p2") in log
        assert ("arm", "suite", "p3") not in log
    assert [r.reply for r in read_records(tmp_path / "records.jsonl")] == ["no", "no", "no"]


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    RecordLog(tmp_path, {"model": "a", "settings": [1, 2]}).close()
    RecordLog(tmp_path, {"settings": [1, 2], "model": "a"}).close()
    with pytest.raises(StoreError, match="holds another run"):
        RecordLog(tmp_path, {"model": "b", "settings": [1, 2]})


def test_what_differs_from_the_other_run_is_said(tmp_path: Path) -> None:
    RecordLog(tmp_path, {"model": "a", "judge": "exact", "suites": {"s": "1"}}).close()
    with pytest.raises(StoreError, match="its judge, suites differ"):
        RecordLog(tmp_path, {"model": "a", "judge": "rules", "suites": {"s": "2"}})


def test_one_process_at_a_time_may_write_to_a_directory(tmp_path: Path) -> None:
    """Two would both do the same rows, and both append them."""
    with RecordLog(tmp_path, "key") as log:
        with pytest.raises(StoreError, match="another process is writing"):
            RecordLog(tmp_path, "key")
        log.append([record(0)])
    RecordLog(tmp_path, "key").close()


def test_replies_wait_until_they_are_judged(tmp_path: Path) -> None:
    replies = [StoredReply("arm", "suite", f"p{i}", "no", 2, Receipt("plan", 3, 0.5)) for i in range(3)]
    with RecordLog(tmp_path, "key") as log:
        log.replies.append(replies)
        log.append([record(1)])
    with RecordLog(tmp_path, "key") as log:
        assert log.waiting == (replies[0], replies[2])
        assert log.replies.rows == tuple(replies)


def test_choices_come_back_as_they_were(tmp_path: Path) -> None:
    choice = OptionChoice("arm", "suite", "p0", (-1.5, -0.25), "yes", True)
    with RecordLog(tmp_path, "key") as log:
        log.choices.append([choice, choice])
    with RecordLog(tmp_path, "key") as log:
        assert log.choices.rows == (choice,)
        assert log.choices["arm", "suite", "p0"] == choice


def test_a_broken_line_that_is_not_the_last_is_an_error_with_its_number(tmp_path: Path) -> None:
    with RecordLog(tmp_path, "key") as log:
        log.append([record(0), record(1)])
    path = tmp_path / "records.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{{broken\n{lines[1]}\n")
    with pytest.raises(StoreError, match="line 2 is not a record"):
        RecordLog(tmp_path, "key")
    with pytest.raises(StoreError, match="line 2 is not a record"):
        read_records(path)


@contextmanager
def disk_with(free_bytes: int, path: Path) -> Iterator[None]:
    """A disk on which `path` can grow by that much only: the system refuses the rest of the write, as ENOSPC does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_named_error_and_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    rows = [record(i, "reply " * 20) for i in range(6)]
    with RecordLog(tmp_path, "key") as log:
        log.append(rows[:2])
        with disk_with(300, log.path), pytest.raises(StoreError, match="cannot write"):
            log.append(rows[2:])
        assert [r.prompt_id for r in log.records] == ["p0", "p1"]
    with RecordLog(tmp_path, "key") as again:
        assert again.records[:2] == tuple(rows[:2])
        again.append(rows)
        assert again.records == tuple(rows)
    assert read_records(log.path) == tuple(rows)


def test_a_log_goes_on_after_the_disk_has_room_again(tmp_path: Path) -> None:
    rows = [record(i, "reply " * 20) for i in range(6)]
    with RecordLog(tmp_path, "key") as log:
        with disk_with(300, log.path), pytest.raises(StoreError):
            log.append(rows[:3])
        log.append(rows)
    assert sorted(read_records(log.path), key=lambda r: r.prompt_id) == rows


def test_a_file_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with disk_with(10, path), pytest.raises(StoreError, match="cannot write"):
        write_atomic(path, "x" * 10_000)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), (b"{", "not JSON"), (b"\xff", "not JSON")])
def test_unreadable_json_is_a_named_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=message):
        read_json(path)


PROMPT = Prompt("a", (Message("user", "hi"),), "s", Split.TEST, None, "yes", ("yes", "no"), {"k": "v"})
CHANGED_PROMPTS = [
    replace(PROMPT, id="b"),
    replace(PROMPT, messages=(Message("user", "hi "),)),
    replace(PROMPT, messages=(Message("system", "hi"), *PROMPT.messages)),
    replace(PROMPT, suite="t"),
    replace(PROMPT, split=Split.VALIDATION),
    replace(PROMPT, answer="no"),
    replace(PROMPT, options=("no", "yes")),
    replace(PROMPT, meta={"k": "w"}),
]


@pytest.mark.parametrize("changed", CHANGED_PROMPTS)
def test_every_part_of_a_prompt_changes_the_hash(changed: Prompt) -> None:
    assert prompts_hash([changed]) != prompts_hash([PROMPT])


def test_order_and_number_of_prompts_change_the_hash() -> None:
    other = replace(PROMPT, id="b")
    hashes = [prompts_hash(p) for p in ([PROMPT], [PROMPT, other], [other, PROMPT], [])]
    assert len(set(hashes)) == 4


def test_the_hash_of_a_set_does_not_depend_on_its_order() -> None:
    """Sets of strings iterate differently in every process; a resume key must not."""
    words = [f"word{i}" for i in range(50)]
    assert content_hash({"s": set(words)}) == content_hash({"s": set(reversed(words))})
    assert content_hash({"s": frozenset(words)}) == content_hash({"s": sorted(words)})


feature_sets = st.builds(
    FeatureSet,
    texts,
    texts,
    texts,
    st.lists(
        st.builds(
            FeatureScore,
            st.integers(0, 65535),
            st.dictionaries(texts, numbers, max_size=2),
            st.lists(texts, max_size=2).map(tuple),
            st.lists(texts, max_size=2).map(tuple),
            st.lists(texts, max_size=2).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    st.builds(
        Provenance,
        texts,
        texts,
        st.none() | texts,
        texts,
        texts,
        st.integers(0, 2**31),
        st.dictionaries(texts, texts, max_size=2),
    ),
    st.dictionaries(texts, texts, max_size=2),
)


@quiet
@settings(max_examples=40)
@given(feature_sets)
def test_feature_sets_come_back_as_they_were(found: FeatureSet) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "f.json"
        write_feature_set(path, found)
        assert read_feature_set(path) == found


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1},
        {"kind": "summary"},
        {"sources": {"x": {}}},
        {"columns": "gone.safetensors"},
        {"features": None},
        {"provenance": {}},
    ],
)
def test_what_is_no_feature_set_is_a_named_error(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "f.json"
    write_feature_set(path, FeatureSet("f", "s", "r", (), Provenance("m", "r", None, "h", "0", 0)))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreError):
        read_feature_set(path)
