"""The command line: a user's mistake is one readable message and exit code 2, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clampdown.cli import main as cli
from clampdown.cli.app import console
from clampdown.evaluation.catalog import ENTRIES
from clampdown.interop.exports.table import FORMATS
from clampdown.models.known import KNOWN
from clampdown.study.recipes.schema import published

SITE = "blocks.3.hook_resid_post"


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Exit code of `clampdown args`."""
    monkeypatch.setattr(sys, "argv", ["clampdown", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The message of a run that must end with exit code 2."""
    assert run(monkeypatch, *args) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("demo", "discover", "sweep", "report", "chat", "organism"))


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("models", "list"), [model.name for model in KNOWN]),
        (("recipe", "list"), published()),
        (("suites", "list"), [suite.name for suite in ENTRIES]),
        (("export", "clamp-352", "--to", "list"), list(FORMATS)),
        (("plan", "show", "clamp-352-gated"), ["plan", "model", "SAE", "edit", "gate"]),
    ],
)
def test_what_one_types_again_is_shown_whole_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], names: list[str]
) -> None:
    monkeypatch.setattr(console, "width", 80)
    assert run(monkeypatch, *args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert set(names) <= {line.split()[0] for line in lines if line.strip()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("discover", "--model", "/no/such/model"), "no model at"),
        (("chat", "--model", "nowhere/at-all", "--prompt", "x"), "cannot get model"),
        (("demo", "--sae", "/no/such/sae"), "no SAE at"),
        (("sweep", "--feature", "99999"), "feature 99999 does not exist"),
        (("sweep",), "exactly one way"),
        (("sweep", "--feature", "1", "--multiples", "a,b"), "not a list of numbers"),
        (("sweep", "--feature", "1", "--multiples", "nan"), "not a finite number"),
        (("sweep", "--feature", "1", "--suites", "nonsense"), "no suite called nonsense"),
        (("sweep", "--feature", "1", "--split", "discovery"), "not a split"),
        (("sweep", "--feature", "1", "--unit", "furlong"), "not a unit of strength"),
        (("report", "/no/such/run"), "has no summary.json"),
        (("chat", "--plan", "/no/such/plan.toml", "--prompt", "x"), "cannot read"),
        (("discover", "--pooling", "sideways"), "unknown pooling"),
        (("organism", "measure", "/no/such/organism"), "no organism at"),
        (("features", "list"), "no feature sets at runs/discover"),
        (("features", "show", "abc"), "'abc' is not a feature"),
        (("features", "show", "512"), "feature 512 does not exist"),
        (("features", "show", "card.json"), "cannot read"),
        (("features", "compare", "a.json", "b.json"), "no feature sets at a.json"),
        (("features", "list", "--where", "x=1"), "not a condition"),
        (("attack", "/no/such/plan.toml"), "cannot read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    args: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(monkeypatch, capsys, *args)


@pytest.mark.parametrize(
    ("harmful", "message"),
    [
        ("", "holds no prompts"),
        ('{"id": "a", "prompt": "x"}\n{broken\n', "line 2"),
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n', "already used on line 1"),
        ('{"id": "a", "text": "x"}\n', "prompt"),
    ],
)
def test_mistakes_in_prompt_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, harmful: str, message: str
) -> None:
    bad = write(tmp_path / "harmful.jsonl", harmful)
    good = write(tmp_path / "harmless.jsonl", '{"id": "a", "prompt": "x"}\n')
    found = refusal(monkeypatch, capsys, "discover", "--harmful", bad, "--harmless", good, "--out", tmp_path / "out")
    assert message in found


def plan_text(model_revision: str = "other", **edit: object) -> str:
    fields = {"site": SITE, "operator": "clamp", "features": [1], "strengths": [1.0], **edit}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in fields.items())
    return (
        f'schema_version = 1\nname = "p"\n[model]\nname = "organism"\nrevision = "{model_revision}"\n'
        f'[[saes]]\nsite = "{SITE}"\nname = "organism"\nrevision = "x"\n[[edits]]\n{lines}\n'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not TOML"),
        (plan_text(surprise=1), "surprise"),
        (plan_text(operator="explode"), "unknown operator"),
        (plan_text(scope="nowhere"), "unknown scope"),
        (plan_text(strengths=[1.0, 2.0]), "1 features but 2 strengths"),
        (plan_text(site="layer 3"), "not a site"),
        (plan_text(), "was made for organism at revision other"),
    ],
)
def test_mistakes_in_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    plan = write(tmp_path / "plan.toml", text)
    assert message in refusal(monkeypatch, capsys, "chat", "--plan", plan, "--prompt", "hello")


def test_a_pickled_checkpoint_is_refused_and_never_opened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "pytorch_model.bin", "not even a pickle")
    assert "pickled weights only" in refusal(monkeypatch, capsys, "chat", "--model", tmp_path, "--prompt", "x")


def test_a_directory_of_another_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write(tmp_path / "manifest.json", '{"schema": 1, "resume_key": "another"}')
    write(tmp_path / "records.jsonl", "")
    args = ("sweep", "--feature", "1", "--multiples", "1", "--suites", "benign", "--limit", "2", "--out", tmp_path)
    assert "holds another run" in refusal(monkeypatch, capsys, *args)


def test_chat_answers_with_proof(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["clampdown", "chat", "--prompt", "How do I bake bread?"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "not steered" in capsys.readouterr().out


def test_the_installed_command_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clampdown", "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "summary.json" in done.stderr and "Traceback" not in done.stderr


def test_a_plan_made_by_hand_shows_its_strength_in_every_unit(monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    args = ("--feature", "5", "--strength", "1.5p99", "--scope", "assistant", "--out", path)
    assert run(monkeypatch, "plan", "make", *args) == 0
    assert run(monkeypatch, "plan", "show", path, "--check") == 0
    shown = capsys.readouterr().out
    assert "clamp feature 5 to" in shown and "(1.5 x p99)" in shown and "moves the residual by" in shown
    assert "fits its model and SAE" in shown
    text = path.read_text()
    path.write_text(text.replace("assistant", "all"))
    assert "changed after it was made" in refusal(monkeypatch, capsys, "plan", "show", path)
