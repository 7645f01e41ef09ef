"""What the documentation tells people to type is what the command line takes."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from clampdown.cli import main as cli
from tests.doc_commands import Shown, commands_of

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "docs" / "experiments.md"})
"""Experiments are dated: what was typed then may be gone."""

Mistake: type[Exception] = typer.BadParameter.__mro__[1]
"""What the parser raises: typer brings a click of its own."""

SHOWN = [shown for page in PAGES for shown in commands_of(page)]
CHEAP = (
    "recipe list",
    "suites list",
    "models list",
    "plan show clamp-352-gated",
    "recipe bhargav2025-llama3 --dry-run",
)


@cache
def root() -> Any:
    return typer.main.get_command(cli.app)


def parse(words: tuple[str, ...]) -> None:
    """By the parsers of every level; nothing is run. Raises `Mistake`."""
    command, context = root(), root().make_context("clampdown", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("shown", [shown for shown in SHOWN if shown.whole], ids=str)
def test_a_command_in_a_block_is_taken_as_it_stands(shown: Shown) -> None:
    parse(shown.words)


def leaf(words: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """The command that words begin with, and what follows; the group where they name no command of it."""
    command: Any = root()
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


def test_commands_in_running_text_name_what_exists() -> None:
    wrong = []
    for shown in (shown for shown in SHOWN if not shown.whole):
        command, rest = leaf(shown.words)
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in {*known, "--help"}]
        meant = hasattr(command, "commands") and rest and rest[0].islower() and not rest[0].startswith("-")
        wrong += [f"{shown}: {unknown or rest[0]}"] if unknown or meant else []
    assert not wrong, wrong


def test_a_misspelt_command_would_be_found() -> None:
    with pytest.raises(Mistake, match="quik"):
        parse(("demo", "--quik"))
    with pytest.raises(Mistake, match="mak"):
        parse(("plan", "mak"))
    assert {shown.words for shown in SHOWN} >= {("demo", "--out", "runs/demo"), ("recipe", "list")}


@pytest.mark.parametrize("words", CHEAP)
def test_the_cheap_ones_run(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clampdown", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code, capsys.readouterr().err
    assert capsys.readouterr().out.strip()
