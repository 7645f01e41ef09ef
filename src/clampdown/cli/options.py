"""Options that several commands share as a group, stated once: prompts by role, and how work is spread over machines.

`asks(prompts=PromptOptions)` gives a command the group's options, and the command one value, `prompts: PromptOptions`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from clampdown.models.placing import Placing
    from clampdown.scale.pool import PoolRequest
    from clampdown.scale.shards import Shard
    from clampdown.study.prompts import StudyPrompts
    from clampdown.study.spec import PromptsPart

Listed = list[str] | None
JudgeOption = Annotated[
    str | None, typer.Option("--judge", help="Who judges replies; default: the embedded exact judge, or a general one.")
]
UntilTestOption = Annotated[
    bool,
    typer.Option("--until-test", help="Choose, calibrate and match, and stop before the test: then come its shards."),
]
PANEL, MACHINES, LARGE = "Prompts by role", "Several machines", "Large models"


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL)


def _machines(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=MACHINES)


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


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """How the work is spread over machines: one shard of it here, or all of it on Ray's actors."""

    shard: Annotated[
        str | None, _machines("Do only this part of the batches: INDEX/COUNT, counted from 0.", "--shard")
    ] = None
    ray: Annotated[str | None, _machines("Use Ray's actors: local, auto, or the address of a Ray.", "--ray")] = None
    actors: Annotated[
        int | None, _machines("How many actors. Default: one per accelerator, else per machine.", "--actors")
    ] = None
    gpus_per_actor: Annotated[float | None, _machines("Accelerators that an actor holds.", "--gpus-per-actor")] = None

    def parsed(self) -> Shard | None:
        """The shard asked for. Raises `ShardError`."""
        from clampdown.errors import ShardError
        from clampdown.scale.shards import Shard

        if self.shard and self.ray:
            raise ShardError("a shard is done by one machine, --ray by many", hint="give one of --shard and --ray")
        if not self.ray and (self.actors is not None or self.gpus_per_actor is not None):
            raise ShardError("--actors and --gpus-per-actor are about Ray", hint="add --ray local")
        return None if self.shard is None else Shard.parse(self.shard)

    def pool(self) -> PoolRequest | None:
        """The actors asked for."""
        from clampdown.scale.pool import PoolRequest

        return PoolRequest(self.ray, self.actors, self.gpus_per_actor) if self.ray else None


def _placing(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=LARGE)


@dataclass(frozen=True, slots=True)
class PlacingOptions:
    """Where a model goes, and in which precision."""

    device: Annotated[str, _placing("auto, cpu, cuda, cuda:1, mps.", "--device")] = "auto"
    dtype: Annotated[str, _placing("auto (fp32 on CPU), float32, bfloat16 or float16.", "--dtype")] = "auto"
    device_map: Annotated[
        str | None, _placing("Spread the model: auto, balanced, sequential, or a .json file.", "--device-map")
    ] = None
    offload: Annotated[str | None, _placing("A directory for weights that fit nowhere.", "--offload")] = None
    quantise: Annotated[str | None, _placing("Read the weights as 8bit or 4bit (bitsandbytes).", "--quantise")] = None

    @property
    def given(self) -> bool:
        return self != PlacingOptions()

    def value(self) -> Placing:
        """As models are loaded with it."""
        from clampdown.models.placing import Placing

        return Placing(self.device, self.dtype, self.device_map, self.quantise, self.offload)


def asks(**groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with the options of each group in the place of its parameter of that name, and the command's context
    in that of its parameter `context`, if it has one."""

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        own = get_type_hints(command, include_extras=True)

        def run(**options: Any) -> Any:
            made = {
                parameter: group(**{one.name: options.pop(one.name) for one in fields(group)})
                for parameter, group in groups.items()
            }
            return command(**options, **made)

        own |= {"context": typer.Context}
        kept = [
            parameter.replace(annotation=own[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in groups
        ]
        added = [parameter for group in groups.values() for parameter in _parameters(group)]
        run.__signature__ = inspect.Signature([*kept, *added])  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *added)}
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        return run

    return wrap


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(group)
    ]


def asks_prompts(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the options of `PromptOptions` in the place of its parameter `prompts`."""
    return asks(prompts=PromptOptions)(command)


PLACE = ("shard", "ray", "actors", "gpus_per_actor", "out", "until_test")
"""Parameters that say where something is done, not what."""


def command_of(context: Any) -> tuple[str, ...]:
    """The command as it was typed, from its name on, without where it is done and without what is the default."""
    words: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if parameter.name in PLACE or value is None or value == parameter.default:
            continue
        values = [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]
        if parameter.param_type_name == "argument":
            arguments += values
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            words += [word for one in values for word in (parameter.opts[0], one)]
    return (str(context.info_name), *words, *arguments)
