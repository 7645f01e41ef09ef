"""What a recipe names, checked without a network, and what running it would take.

A field is `ok`, `to give` (nobody published it: the user gives it with --set), or `wrong`. What the machine already has
is opened: the model's configuration, the SAE's, local copies of prompts. Of the rest, names are held to the tables of
this package and to the shape that the recipe states.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.config import ORGANISM, embedded_model, embedded_sae
from clampdown.documents import read_object
from clampdown.errors import ClampdownError, JudgeError, ModelError, PromptSetError, RecipeError, SaeError, SiteError
from clampdown.evaluation.judges.llm import parse_llm
from clampdown.evaluation.judges.pairwise import preference_endpoint
from clampdown.evaluation.judges.table import JUDGES
from clampdown.models.layout import FAMILIES
from clampdown.saes.catalog import find_release
from clampdown.saes.checkpoints import open_sae
from clampdown.steering.gates import prompts_needed
from clampdown.study.multiturn import ATTACKERS
from clampdown.study.recipes import sources
from clampdown.study.recipes.schema import ROLES, MultiturnPart, Recipe, SinglePromptClamp
from clampdown.study.recipes.sources import Source
from clampdown.types import Site

OK, TO_GIVE, WRONG = "ok", "to give", "wrong"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Check:
    """One field of the recipe: its path, how it stands, and what was found."""

    field: str
    state: str
    found: str


@dataclass(frozen=True, slots=True)
class Work:
    """One stage of the run: how much of what. `n` None: its size is known only when the set is there."""

    stage: str
    what: str
    n: int | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """All checks, and the work in order."""

    recipe: Recipe
    checks: tuple[Check, ...]
    work: tuple[Work, ...]

    @property
    def wrong(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.state == WRONG)

    def raise_if_wrong(self) -> None:
        """Raises `RecipeError` naming every field that is wrong."""
        if self.wrong:
            fields = "; ".join(f"{check.field}: {check.found}" for check in self.wrong)
            raise RecipeError(f"recipe '{self.recipe.name}' cannot run: {fields}", hint="mend the file, or use --set")


def dry_run(recipe: Recipe) -> DryRun:
    """Check every field that names something."""
    checks = (*_things(recipe), *_prompt_checks(recipe), *_later(recipe))
    return DryRun(recipe, checks, tuple(_work(recipe)))


def _checked(field: str, find: Callable[[], str]) -> Check:
    try:
        return Check(field, OK, find())
    except ClampdownError as error:
        return Check(field, WRONG, f"{error.message}{f' ({error.hint})' if error.hint else ''}")


def _things(recipe: Recipe) -> Iterator[Check]:
    """Model, SAE, site and judges."""
    yield _checked("model", lambda: _model(recipe))
    if recipe.sae.id is None:
        yield Check("sae.id", TO_GIVE, str(recipe.sae.to_be_given))
    else:
        yield _checked("sae.id", lambda: _sae(recipe))
    yield _checked("sae.site", lambda: _site(recipe))
    yield _checked("judges.verdicts", lambda: _judge(recipe.judges.verdicts, recipe.model.id))
    yield _checked("judges.refusals", lambda: _judge(recipe.judges.refusals, recipe.model.id))
    if (spec := recipe.judges.preference) is not None:
        yield _checked("judges.preference", lambda: preference_endpoint(spec, [recipe.model.id]).model)


def _model(recipe: Recipe) -> str:
    stated = recipe.model
    known = {name: family.name for family in FAMILIES for name in family.model_types}
    if stated.type not in known:
        raise ModelError(f"no models of type '{stated.type}' can be steered", hint=f"one of: {', '.join(known)}")
    shape = f"{stated.id}, {stated.layers} x {stated.width}"
    config = _config_of(stated.id)
    if config is None:
        return f"{shape}, from the hub"
    there = (config.get("model_type"), config.get("num_hidden_layers"), config.get("hidden_size"))
    if there != (stated.type, stated.layers, stated.width):
        raise ModelError(f"'{stated.id}' is {there}, the recipe says {(stated.type, stated.layers, stated.width)}")
    return f"{shape}, here"


def _config_of(model: str) -> dict[str, Any] | None:
    """The model's configuration if this machine has it. Raises `ModelError` for a name that is none."""
    directory = embedded_model(model) or Path(model)
    if directory.is_dir():
        return read_object(directory / "config.json")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"'{model}' is no directory and no hub id", hint=f"'{ORGANISM}', a directory, or org/model")
    cached = try_to_load_from_cache(model, "config.json")
    return read_object(Path(cached)) if isinstance(cached, str) else None


def _sae(recipe: Recipe) -> str:
    name, site = str(recipe.sae.id), Site.parse(recipe.sae.site)
    if embedded_sae(name) is not None or Path(name).exists():
        found = open_sae(name, site=site).cfg
        if found.d_sae != recipe.sae.features:
            raise SaeError(f"it has {found.d_sae} features, the recipe says {recipe.sae.features}")
        return f"{name}, {found.d_sae:,} features, here"
    address = find_release(name)
    if address is None:
        raise SaeError(f"'{name}' is no directory and no release", hint="release:id, org/repo:path or a directory")
    layer = re.search(r"\d+", name.partition(":")[2])
    if layer is not None and int(layer[0]) != site.layer:
        raise SiteError(f"'{name}' is of layer {layer[0]}, the recipe steers {site.name}")
    trained = f", trained on {address.model}" if address.model else ""
    return f"{address.repo}: {address.path}, {recipe.sae.features:,} features{trained}, from the hub"


def _site(recipe: Recipe) -> str:
    site = Site.parse(recipe.sae.site)
    if site.layer >= recipe.model.layers:
        raise SiteError(f"{site.name} does not exist: the model has {recipe.model.layers} blocks, counted from 0")
    return f"{site.name}, of blocks 0 to {recipe.model.layers - 1}"


def _judge(spec: str, model: str) -> str:
    """The judge's kind and argument, without loading it."""
    kind, colon, argument = spec.partition(":")
    if kind not in (*JUDGES, "exact"):
        raise JudgeError(f"no judge '{kind}'", hint=f"one of: {', '.join((*JUDGES, 'exact'))}")
    if kind == "exact" and model != ORGANISM:
        raise JudgeError(
            "the exact judge knows replies to the embedded corpus only", hint="learned, rules, wildguard or llm:..."
        )
    if kind == "llm":
        return parse_llm(argument).name
    if kind == "wildguard":
        return f"wildguard, {argument or 'allenai/wildguard'} from the hub"
    if kind == "guard":
        return f"guard model {argument}"
    if colon and kind != "learned":
        raise JudgeError(f"the judge '{kind}' takes no argument, got '{argument}'")
    return spec


def _prompt_checks(recipe: Recipe) -> Iterator[Check]:
    for role in ROLES:
        for name, source in recipe.prompts.sources(role).items():
            yield _checked(f"prompts.{role}.{name}", lambda source=source: _source(source, recipe.model.id))
    for first, second in itertools.combinations(ROLES, 2):
        for (a, one), (b, other) in itertools.product(
            recipe.prompts.sources(first).items(), recipe.prompts.sources(second).items()
        ):
            if one.overlaps(other):
                yield Check(f"prompts.{second}.{b}", WRONG, f"{other} has prompts of prompts.{first}.{a} ({one})")


def _source(source: Source, model: str) -> str:
    if source.embedded is not None and model != ORGANISM:
        raise PromptSetError("the embedded corpus is for the embedded model")
    where, n = sources.check(source), sources.size(source)
    return f"{source}, {where}, {'size not known' if n is None else f'at most {n:,} prompts'}"


def _later(recipe: Recipe) -> Iterator[Check]:
    """The method in words, the gate's budget, and the attacks."""
    yield Check("method", OK, in_words(recipe))
    if recipe.gate is not None:
        yield _checked("gate.budget", lambda: _budget(recipe))
    part = recipe.multiturn
    if part is not None:
        yield _checked("multiturn.objectives", lambda: _source(Source.parse(part.objectives), recipe.model.id))
        if part.attacker is None:
            yield Check("multiturn.attacker", TO_GIVE, f"{part.to_be_given}; left out until then")
        else:
            yield _checked("multiturn.attacker", lambda: _attacker(part, recipe.model.id))


def in_words(recipe: Recipe) -> str:
    """What the method does, in a line."""
    method = recipe.method
    if isinstance(method, SinglePromptClamp):
        return (
            f"{method.operator} at {', '.join(method.clamps)}, scope {method.scope}, error {method.error_term}; "
            f"at most {method.candidates} candidates, {method.finalists} answer validation prompts"
        )
    score = "as published" if method.literal else f"with an activity floor of {method.min_firing_rate:g}"
    multiples = ", ".join(f"{m:g}" for m in method.multiples)
    return (
        f"contrast score {score}, pooled by {method.pooling}; add at {multiples} of each feature's maximum, scope "
        f"{method.scope}; at most {method.set_size} features within {method.kl_budget:g} nats"
    )


def _budget(recipe: Recipe) -> str:
    assert recipe.gate is not None
    budget, confidence = recipe.gate.budget, recipe.gate.confidence
    n, needed = sources.size(recipe.prompts.sources("calibration")["benign"]), prompts_needed(budget, confidence)
    if n is not None and n < needed:
        raise PromptSetError(f"{n} calibration prompts cannot show {budget:g}", hint=f"at least {needed}")
    return f"{budget:g} of benign prompts at {confidence:.0%}: needs {needed} calibration prompts"


def _attacker(part: MultiturnPart, model: str) -> str:
    spec = str(part.attacker)
    kind, _, argument = spec.partition(":")
    if spec not in ("scripted", "embedded") and not (kind in ("llm", "local") and argument):
        raise PromptSetError(f"no attacker '{spec}'", hint=f"one of: {ATTACKERS}")
    if kind in ("llm", "local") and not (part.judge or "").startswith("llm:"):
        raise JudgeError(
            "this attacker needs a judge that reads the objective too",
            hint="multiturn.judge = llm:strongreject:MODEL@URL",
        )
    judge = "the usual judge" if part.judge is None else _judge(part.judge, model)
    return f"{spec}, scored by {judge}; at most {part.max_turns} turns, {part.max_backtracks} backtracks"


# --- the work -----------------------------------------------------------------------------------------------------


def _count(recipe: Recipe, role: str, *names: str) -> int | None:
    """Prompts of a role, at most; None when the size of a set is not known or a source is wrong. Parts of one set have
    no more prompts together than the set has rows."""
    by_set: dict[str, list[int]] = {}
    rows: dict[str, int | None] = {}
    for name, source in recipe.prompts.sources(role).items():
        if names and name not in names:
            continue
        try:
            n, whole = sources.size(source), sources.whole(source)
        except ClampdownError:
            return None
        if n is None:
            return None
        by_set.setdefault(whole.name, []).append(n)
        rows[whole.name] = whole.rows
    return sum(min(sum(sizes), rows[name] or sources.UNBOUNDED) for name, sizes in by_set.items())


def _times(n: int | None, factor: int) -> int | None:
    return None if n is None else n * factor


def _work(recipe: Recipe) -> Iterator[Work]:
    """In the order of the run. Prefills stop at the first reply token; rows that equal the baseline's are shared, so
    replies are upper bounds."""
    method, validation = recipe.method, _count(recipe, "validation", "harmful")
    yield Work("read discovery prompts", "prompts up to the site", _count(recipe, "discovery"))
    if isinstance(method, SinglePromptClamp):
        yield Work("clamp the candidates", "prefills", _times(validation, method.candidates))
        yield Work("choose on validation", "replies", _times(validation, method.finalists + 1))
    else:
        sets = 2 * method.features * len(method.sizes)
        yield Work(f"add {method.features} features", "prefills a round", _times(validation, sets))
        yield Work("choose on validation", "replies", _times(validation, len(method.factors) + 1))
    if recipe.gate is not None:
        yield Work("calibrate the gate", "prompts up to the site", _count(recipe, "calibration"))
    yield Work(f"test, {n_arms(recipe)} arms", "replies", _times(_count(recipe, "test"), n_arms(recipe)))
    part = recipe.multiturn
    if part is not None and part.attacker is not None:
        arms, turns = 2 + (recipe.gate is not None), part.max_turns + part.max_backtracks
        yield Work(f"attacks, {arms} arms", "turns", arms * part.limit * part.attempts * turns)


def n_arms(recipe: Recipe) -> int:
    """Columns of the test: the baseline, the method's, its gated choice, and controls (random, unrelated, three dense,
    pass-through, system prompt) at most."""
    method = recipe.method
    own = len(method.clamps) if isinstance(method, SinglePromptClamp) else 2 + len(method.multiples)
    controls = recipe.controls.random + 6 if recipe.controls is not None else 0
    return 1 + own + (recipe.gate is not None) + controls


def shown(found: DryRun) -> RenderableType:
    """For a terminal: what is named, what the paper left open, and the work."""
    recipe = found.recipe
    styles = {OK: "green", TO_GIVE: "yellow", WRONG: "bold red"}
    checks = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("field", "", "found"):
        checks.add_column(heading, overflow="fold", no_wrap=heading == "")
    for check in found.checks:
        checks.add_row(check.field, Text(check.state, styles[check.state]), Text(check.found))
    work = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    work.add_column("what would be run")
    work.add_column("at most", justify="right")
    work.add_column("")
    for line in found.work:
        work.add_row(line.stage, "not known" if line.n is None else f"{line.n:,}", line.what)
    weights = 2 * recipe.sae.features * recipe.model.width * 4 / 1e6
    notes = [Text(f"ours, not the paper's: {note}") for note in recipe.ours]
    notes += [
        Text(f"option {name}{' (chosen)' if name in recipe.chosen else ''}, by {option.source}: {option.about}")
        for name, option in recipe.options.items()
    ]
    tokens = f"replies of at most {recipe.measure.max_new_tokens} tokens; the SAE takes {weights:,.0f} MB in memory"
    head = Text(f"{recipe.name} ({recipe.paper}): {recipe.about}", style="bold")
    return Padding(Group(head, "", checks, "", *notes, *([""] if notes else []), work, Text(tokens)), (1, 0))
