"""Merged shards are what one process leaves, and every way to merge the wrong ones is an error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import clampdown as cd
from clampdown.errors import ShardError
from clampdown.scale.merging import merge, shards_under
from clampdown.scale.shards import Shard, ShardFile, checked
from clampdown.steering.plan import write_plan
from clampdown.store import content_hash, key_of, read_records
from tests.study.test_evaluate import SUITES, command, plan

N = 3
OPTIONS = ("--suites", SUITES, "--limit", 4, "--max-new-tokens", 12, "--batch-rows", 5)


@given(count=st.integers(1, 9), units=st.integers(0, 40))
def test_every_batch_is_one_shards(count: int, units: int) -> None:
    owned = [number for index in range(count) for number in Shard(index, count).of(units)]
    assert sorted(owned) == list(range(units))


@pytest.mark.parametrize("text", ["", "3", "3/", "4/4", "-1/4", "1/0", "0.5/2", "1/2/3"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ShardError):
        Shard.parse(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, with the shards of the same command beside it."""
    directory = tmp_path_factory.mktemp("sharded")
    write_plan(directory / "clamped.toml", plan())
    evaluate = ("evaluate", directory / "clamped.toml", *OPTIONS)
    assert command(*evaluate, "--out", directory / "one") == 0
    for index in range(N):
        assert command(*evaluate, "--shard", f"{index}/{N}", "--out", directory / "many") == 0
    return directory


def without_times(path: Path) -> dict:
    summary = json.loads((path / "summary.json").read_text())
    return {name: part for name, part in summary.items() if name != "timings"}


def test_merged_shards_of_an_evaluation_are_the_run_of_one_process(whole: Path) -> None:
    one, many = whole / "one", whole / "many"
    parts = [read_records(Shard(index, N).directory(many) / "records.jsonl") for index in range(N)]
    assert all(parts) and sum(map(len, parts)) == 24, "every shard did something"
    assert command("merge", "--out", many) == 0
    for name in ("records.jsonl", "replies.jsonl", "choices.jsonl"):
        rows = [sorted((path / name).read_text().splitlines()) for path in (one, many)]
        assert rows[0] == rows[1] and rows[0], name
    assert without_times(one) == without_times(many)
    assert (many / "report.html").exists()


def test_merging_again_and_elsewhere_changes_nothing(whole: Path, tmp_path: Path) -> None:
    parts = [Shard(index, N).directory(whole / "many") for index in (2, 0, 1)]
    for out in (tmp_path / "a", tmp_path / "a"):
        assert merge(parts, out).held == "24 replies"
    assert {key_of(r): r for r in read_records(tmp_path / "a" / "records.jsonl")} == {
        key_of(r): r for r in read_records(whole / "one" / "records.jsonl")
    }


def doubled(parts: list[Path], spare: Path) -> list[Path]:
    shutil.copytree(parts[1], spare / "again")
    return [*parts, spare / "again"]


def unfinished(parts: list[Path], spare: Path) -> list[Path]:
    return [*parts[:2], rewritten(parts[2], spare, finished=False)]


def foreign(parts: list[Path], spare: Path) -> list[Path]:
    key = json.loads((parts[2] / "shard.json").read_text())["key"]
    return [*parts[:2], rewritten(parts[2], spare, key={**key, "judge": "another"})]


def of_another_count(parts: list[Path], spare: Path) -> list[Path]:
    return [*parts[:2], rewritten(parts[2], spare, shard={"index": 2, "count": 4})]


def cut_otherwise(parts: list[Path], spare: Path) -> list[Path]:
    return [*parts[:2], rewritten(parts[2], spare, units={"batches": 99})]


def emptied(parts: list[Path], spare: Path) -> list[Path]:
    part = rewritten(parts[2], spare)
    for name in ("records.jsonl", "replies.jsonl"):
        (part / name).write_text("")
    return [*parts[:2], part]


def answered_differently(parts: list[Path], spare: Path) -> list[Path]:
    part = rewritten(parts[2], spare)
    row = json.loads((parts[0] / "records.jsonl").read_text().splitlines()[0])
    with (part / "records.jsonl").open("a") as file:
        file.write(json.dumps({**row, "reply": "another"}) + "\n")
    return [*parts[:2], part]


def rewritten(part: Path, spare: Path, **fields: object) -> Path:
    shutil.copytree(part, spare / "changed")
    file = spare / "changed" / "shard.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return spare / "changed"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda parts, _: [], "no shards to merge"),
        (lambda parts, _: parts[:2], "shard 2/3 of .* is missing"),
        (lambda parts, _: [*parts[:2], parts[2] / "nothing"], "nothing holds no shard"),
        (doubled, "shard 1/3 is there twice: .*1-of-3 and .*again"),
        (unfinished, "shard 2/3 in .*changed is not finished"),
        (foreign, "changed is a shard of another run than .*0-of-3: its judge differ"),
        (of_another_count, "changed is shard 2/4"),
        (cut_otherwise, "changed was cut into"),
        (emptied, "hold .* answers of 24"),
        (answered_differently, "0-of-3 and .*changed both answered"),
    ],
)
def test_wrong_shards_are_named(
    whole: Path, tmp_path: Path, made: Callable[[list[Path], Path], list[Path]], message: str
) -> None:
    parts = [Shard(index, N).directory(whole / "many") for index in range(N)]
    with pytest.raises(ShardError, match=message):
        merge(made(parts, tmp_path), tmp_path / "out")


def test_a_directory_is_one_shards(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither another shard's nor another command's."""
    shutil.copytree(whole / "many" / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "0-of-3").rename(tmp_path / "shards" / "0-of-2")
    evaluate = ("evaluate", whole / "clamped.toml", *OPTIONS)
    assert command(*evaluate, "--shard", "0/2", "--out", tmp_path) == 2
    assert "holds shard 0/3, not 0/2" in capsys.readouterr().err
    assert command(*evaluate, "--batch-rows", 4, "--shard", "1/3", "--out", tmp_path) == 2
    assert "the same --batch-rows" in capsys.readouterr().err


def test_shards_must_cut_the_same_batches(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--suites", SUITES, "--limit", 4, "--shard", "0/2", "--out", tmp_path)
    assert command("evaluate", whole / "clamped.toml", *options) == 2
    assert "--batch-rows" in capsys.readouterr().err
    assert command("evaluate", whole / "clamped.toml", "--controls", "--batch-rows", 4, *options) == 2
    assert "--until-test" in capsys.readouterr().err


def test_controls_are_matched_once_and_shared(tmp_path: Path) -> None:
    write_plan(tmp_path / "clamped.toml", plan())
    options = ("--controls", "--random-features", 1, "--max-new-tokens", 8, "--batch-rows", 6, "--no-likelihood")
    evaluate = ("evaluate", tmp_path / "clamped.toml", "--suites", SUITES, "--limit", 2, *options)
    assert command(*evaluate, "--until-test", "--out", tmp_path / "many") == 0
    shutil.copytree(tmp_path / "many", tmp_path / "one")
    assert command(*evaluate, "--out", tmp_path / "one") == 0
    assert command(*evaluate, "--shard", "0/2", "--out", tmp_path / "many") == 0
    assert command(*evaluate, "--shard", "1/2", "--out", tmp_path / "many") == 0
    assert command("merge", "--out", tmp_path / "many") == 0
    assert without_times(tmp_path / "one") == without_times(tmp_path / "many")
    assert any(arm["name"] == "CAST-style" for arm in without_times(tmp_path / "many")["arms"])


STUDY = """
schema = 1
size = "quick"
sweep = false
methods = ["cast"]
discovery_prompts = 48
validation_prompts = 4
causal_prompts = 3
test_prompts = 2
control_prompts = 1
kl_prompts = 4
n_random = 1
max_new_tokens = 8
batch_rows = 12
"""


def test_merged_shards_of_a_study_are_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the commands alone. That nothing is found again is seen by what is not read again."""
    (tmp_path / "study.toml").write_text(STUDY)
    study, one, many = ("study", tmp_path / "study.toml"), tmp_path / "one", tmp_path / "many"
    assert command(*study, "--shard", "0/2", "--out", many) == 2
    assert "--until-test" in capsys.readouterr().err
    assert command(*study, "--until-test", "--out", many) == 0
    shutil.copytree(many, one)
    assert command(*study, "--out", one) == 0
    for index in range(2):
        assert command(*study, "--shard", f"{index}/2", "--out", many) == 0
    capsys.readouterr()
    parts = shards_under(many)
    assert command("merge", *parts, "--out", tmp_path / "elsewhere") == 2
    assert "not where these shards' arms were chosen" in capsys.readouterr().err
    (many / "validation" / "records.jsonl").unlink()
    assert command("merge", "--out", many) == 0
    assert not (many / "validation" / "records.jsonl").exists(), "nothing was chosen again"
    for name in ("records.jsonl", "replies.jsonl", "choices.jsonl"):
        rows = [sorted((path / name).read_text().splitlines()) for path in (one, many)]
        assert rows[0] == rows[1] and rows[0], name
    assert (one / "plan.toml").read_bytes() == (many / "plan.toml").read_bytes()
    assert without_times(one) == without_times(many)
    assert command(*study, "--n-random", 2, "--out", many) == 2
    assert "another command" in capsys.readouterr().err


def test_shards_from_python(tmp_path: Path) -> None:
    data = cd.data("organism").only(["harmful"])
    for index in range(2):
        cd.evaluate_shard("organism", plan(), data, f"{index}/2", tmp_path, batch_rows=2, limit=3)
    cd.merge(tmp_path)
    before = (tmp_path / "replies.jsonl").read_bytes()
    run = cd.evaluate("organism", plan(), data, limit=3, batch_rows=2, out=tmp_path)
    assert [arm.name for arm in run.arms] == ["baseline", "clamped"] and len(run.records) == 6
    assert (tmp_path / "replies.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def discovered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("discovered")
    discover = ("discover", "--finder", "contrast", "--no-check", "--limit", 300)
    assert command(*discover, "--out", directory / "one") == 0
    for index in range(2):
        assert command(*discover, "--shard", f"{index}/2", "--out", directory / "many") == 0
    assert command("merge", "--out", directory / "many") == 0
    return directory


def test_merged_shards_of_a_discovery_are_bytes_of_one_process(discovered: Path) -> None:
    def contents(out: Path) -> dict[str, bytes]:
        kept = [*out.glob("activations/*/**/*"), *out.glob("contrast*")]
        return {str(path.relative_to(out)): path.read_bytes() for path in kept if path.is_file()}

    one, many = contents(discovered / "one"), contents(discovered / "many")
    assert one == many and len(one) > 8
    files = [file for _, file in checked([Shard(index, 2).directory(discovered / "many") for index in range(2)])]
    assert files[0].units["batches"] > 3 and content_hash(files[0].key) == content_hash(files[1].key)


def test_shards_of_two_commands_do_not_merge(whole: Path, discovered: Path, tmp_path: Path) -> None:
    parts = [Shard(0, N).directory(whole / "many"), Shard(0, 2).directory(discovered / "many")]
    with pytest.raises(ShardError, match="another command"):
        merge(parts, tmp_path)


def test_a_shards_file_is_read_back(tmp_path: Path) -> None:
    file = ShardFile("pass", Shard(1, 4), {"code": "x"}, {"batches": 3}, ("discover", "--limit", "3"), True)
    file.write(tmp_path)
    assert ShardFile.read(tmp_path) == file
    for text in ("{}", '{"what": "shard", "schema": 1}', '{"what": "shard", "schema": 9}'):
        (tmp_path / "shard.json").write_text(text)
        with pytest.raises(ShardError):
            ShardFile.read(tmp_path)
