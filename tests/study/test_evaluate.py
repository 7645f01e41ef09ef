"""`clampdown evaluate` and `clampdown compare` on the embedded model: the files, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from clampdown.cli import main as cli
from clampdown.config import embedded_model
from clampdown.models.loading import directory_revision
from clampdown.saes.checkpoints import sae_revision
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, read_plan, write_plan
from clampdown.store import read_records

SITE = "blocks.3.hook_resid_post"
SUITES = "harmful,benign,facts"


def plan(**edit: Any) -> Plan:
    fields = {"site": SITE, "operator": "clamp", "features": (352,), "strengths": (6.0,), **edit}
    return Plan(
        name="clamped",
        model=ModelRef(name="organism", revision=directory_revision(embedded_model("organism") or Path())),
        saes=(SaeRef(site=SITE, name="organism", revision=sae_revision("organism")),),
        edits=(Edit(**fields),),
    )


def command(*args: object) -> int:
    """Exit code of `clampdown args`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["clampdown", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("evaluate")
    write_plan(directory / "clamped.toml", plan())
    options = ("--controls", "--random-features", 1, "--max-new-tokens", 12, "--out", directory / "run")
    assert command("evaluate", directory / "clamped.toml", "--suites", SUITES, "--limit", 4, *options) == 0
    return directory / "run"


def test_a_run_has_all_its_files_and_measures(evaluated: Path) -> None:
    names = {path.name for path in evaluated.iterdir()}
    assert {"manifest.json", "records.jsonl", "prompts.jsonl", "plan.toml", "summary.json", "report.html"} <= names
    summary = json.loads((evaluated / "summary.json").read_text())
    arms = {row["name"]: row for row in summary["arms"]}
    assert len(arms) == 2 + 1 + 6, "baseline, plan, a random feature, six further controls"
    assert len(read_records(evaluated / "records.jsonl")) == len(arms) * 12
    clamped = arms["clamped"]
    assert clamped["capability"]["facts"]["n"] == clamped["capability_by_likelihood"]["facts"]["n"] == 4
    assert clamped["attack_success"]["harmful"]["n"] == 4
    assert clamped["selective_refusal"]["n"] == 4
    assert clamped["perplexity_benign"] >= 1.0 and arms["baseline"]["name"] == "baseline"
    against = summary["controls"].pop("against_random")
    as_far = arms[next(name for name in arms if name.startswith("random"))]["frontier"]["refusal"]
    assert against == {"as_far": int(as_far >= clamped["frontier"]["refusal"]), "n": 1}
    rows = {name: row for name, row in summary["controls"].items() if isinstance(row, dict)}
    assert len(rows) == 7
    matched = [row for row in rows.values() if row["factor"] is not None]
    assert len(matched) == 4
    assert all(abs(row["reached"] - row["goal"]) <= 0.02 * row["goal"] for row in matched)


def test_every_arm_that_steers_can_be_steered_with_again(evaluated: Path) -> None:
    rows = json.loads((evaluated / "summary.json").read_text())["arms"]
    digests = {row["plan"] for row in rows if row["plan"]}
    assert len(digests) == len(rows) - 2, "all but the baseline and the system prompt"
    stored = {path.stem: read_plan(path) for path in (evaluated / "plans").glob("*.toml")}
    assert {digest: plan.digest for digest, plan in stored.items()} == {digest: digest for digest in digests}


def test_a_second_start_does_nothing_again(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (evaluated / "records.jsonl").read_bytes()
    options = ("--controls", "--random-features", 1, "--max-new-tokens", 12, "--out", evaluated)
    path = evaluated.parent / "clamped.toml"
    assert command("evaluate", path, "--suites", SUITES, "--limit", 4, "--dry-run", *options) == 0
    assert "0 replies to generate" in capsys.readouterr().out
    assert (evaluated / "records.jsonl").read_bytes() == before


def test_a_dry_run_writes_nothing(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = evaluated.parent / "clamped.toml", tmp_path / "run"
    assert command("evaluate", path, "--suites", "facts", "--limit", 3, "--dry-run", "--out", out) == 0
    assert "6 replies to generate and judge" in capsys.readouterr().out
    assert not out.exists()


def test_two_arms_of_one_run_are_compared(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "c.json", tmp_path / "c.html"
    assert command("compare", f"{evaluated}:baseline", "clamped", "--json", file, "--html", page) == 0
    assert "difference" in capsys.readouterr().out
    (arms,) = json.loads(file.read_text())["arms"]
    assert (arms["first"], arms["second"]) == ("baseline", "clamped")
    facts = next(row for row in arms["suites"] if row["suite"] == "facts")
    records = {(r.arm, r.prompt_id): r.correct for r in read_records(evaluated / "records.jsonl") if r.suite == "facts"}
    flipped = [p for (arm, p), right in records.items() if arm == "baseline" and right != records["clamped", p]]
    assert [flip["before"]["prompt_id"] for flip in facts["flips"]] == flipped
    assert facts["change"]["gained"] + facts["change"]["lost"] == len(flipped)
    assert page.read_text().count('class="example"') == sum(len(row["flips"]) for row in arms["suites"])


def changed(run: Path, to: Path, **key: Any) -> Path:
    """A copy of a run whose manifest says something else."""
    shutil.copytree(run, to)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["key"] |= key
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_two_runs_are_compared_arm_by_arm(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(evaluated, tmp_path / "other", generation={"max_new_tokens": 99})
    assert command("compare", evaluated, other, "--examples", 0) == 0
    shown = capsys.readouterr().out
    assert "generation differs" in shown
    assert shown.count("suite ") == len({r.arm for r in read_records(evaluated / "records.jsonl")})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"judge": "rules/1"}, "different judges"),
        ({"suites": {"facts": "other", "benign": "other"}}, "different prompts in benign, facts"),
        ({"suites": {"elsewhere": "x"}}, "no suite in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: dict[str, Any], message: str
) -> None:
    other = changed(evaluated, tmp_path / "other", **key)
    assert command("compare", evaluated, other) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (("nowhere", "nothing"), "neither 'nowhere' nor 'nothing'"),
        (("RUN", "RUN"), "the same run twice"),
        (("RUN:baseline", "nobody"), "no arm 'nobody'"),
    ],
)
def test_operands_that_name_nothing(
    evaluated: Path, capsys: pytest.CaptureFixture[str], operands: tuple[str, str], message: str
) -> None:
    assert command("compare", *(operand.replace("RUN", str(evaluated)) for operand in operands)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_plan_for_another_model_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = plan().model_copy(update={"model": ModelRef(name="organism", revision="another")})
    write_plan(tmp_path / "plan.toml", other)
    assert command("evaluate", tmp_path / "plan.toml", "--dry-run", "--out", tmp_path / "run") == 2
    assert "was made for organism at revision another" in " ".join(capsys.readouterr().err.split())


def test_a_scope_that_cannot_act_on_likelihoods_is_refused_when_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(tmp_path / "late.toml", plan(scope="generated"))
    options = ("--suites", "facts", "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path / "run", "--likelihood")
    assert command("evaluate", tmp_path / "late.toml", *options) == 2
    assert "steers generated tokens" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suites", "nonsense"), "no suite 'nonsense'"),
        (("--split", "discovery"), "not a split"),
        (("--judge", "nobody"), "no judge 'nobody'"),
        (("--suites", "facts,facts"), "two suites have the same name"),
        (("--suites", "facts", "--controls", "--match", "size"), "cannot be matched on 'size'"),
        (("--suites", "facts", "--controls"), "matched on benign text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str) -> None:
    write_plan(tmp_path / "plan.toml", plan())
    assert command("evaluate", tmp_path / "plan.toml", "--limit", 2, "--out", tmp_path / "run", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
