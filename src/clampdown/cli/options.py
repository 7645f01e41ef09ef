"""Options that several commands share as a group, stated once: prompts by role.

`asks_prompts` gives a command the group's options, and the command one value, `prompts: PromptOptions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from clampdown.study.prompts import StudyPrompts
    from clampdown.study.spec import PromptsPart

Listed = list[str] | None
JudgeOption = Annotated[
    str | None, typer.Option("--judge", help="Who judges replies; default: the embedded exact judge, or a general one.")
]
PANEL = "Prompts by role"


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL)


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Prompts by role as they were asked for: files or public sets by name, several for each."""

    harmful: Annotated[Listed, _option("Harmful prompts: a file, or a set by name.", "--harmful")] = None
    jailbroken: Annotated[
        Listed, _option("Harmful prompts in attack wrappers; a column `family` names the wrapper.", "--jailbroken")
    ] = None
    multi_turn: Annotated[Listed, _option("Harm asked for over several turns.", "--multi-turn")] = None
    borderline: Annotated[Listed, _option("Harmless prompts that look harmful.", "--borderline")] = None
    benign: Annotated[Listed, _option("Harmless prompts.", "--benign", "--harmless")] = None
    capability: Annotated[Listed, _option("Prompts with a column `answer`.", "--capability")] = None
    mixed: Annotated[Listed, _option("A file of several roles, with columns `suite` and `harmful`.", "--prompts")] = (
        None
    )
    hold_out: Annotated[Listed, _option("An attack family to test on only.", "--hold-out")] = None

    @property
    def given(self) -> bool:
        return any(getattr(self, one.name) for one in fields(self) if one.name != "hold_out")

    def part(self) -> PromptsPart:
        """As a study's file says it."""
        from clampdown.study.spec import PromptsPart

        given = {one.name: tuple(getattr(self, one.name) or ()) for one in fields(self)}
        return PromptsPart(**{**given, "hold_out": given["hold_out"] or None})

    def load(self) -> StudyPrompts | None:
        """The prompts; None when no role has any. Raises `PromptSetError`."""
        return self.part().load("files") if self.given else None


def asks_prompts(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options of `PromptOptions` in the place of its parameter `prompts`."""
    group = get_type_hints(PromptOptions, include_extras=True)
    own = get_type_hints(command, include_extras=True)
    names = [one.name for one in fields(PromptOptions)]

    def run(**options: Any) -> Any:
        found = PromptOptions(**{name: options.pop(name) for name in names})
        return command(**options, prompts=found)

    kept = [
        parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "prompts"
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=group[name]) for name in names
    ]
    run.__signature__ = inspect.Signature([*kept, *added])  # pyright: ignore[reportFunctionMemberAccess]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    return run
