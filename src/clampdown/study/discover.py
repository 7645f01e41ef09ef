"""`clampdown discover`: run finders on a model's SAE, refine what they found into a plan, scan the layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from clampdown.activations.collect import collect_to
from clampdown.activations.estimate import Estimate, describe, estimate_pass
from clampdown.activations.sinks import sinks_at
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Pass
from clampdown.config import ORGANISM
from clampdown.discovery.contrast import ContrastSettings
from clampdown.discovery.finders import (
    DEFAULT,
    FINDERS,
    MATCHED_EFFECT,
    Material,
    clamp_all,
    clamp_sources,
    run_finder,
)
from clampdown.discovery.layers import LayerScore, scan_layers
from clampdown.discovery.pairs import Pair
from clampdown.errors import PromptSetError
from clampdown.models.loading import LanguageModel, has_weights, load_shape
from clampdown.models.placing import Placing
from clampdown.reports.scan_page import build_scan_page
from clampdown.saes.checkpoints import load_sae, open_sae
from clampdown.saes.sae import Sae, check_fits, shape_only
from clampdown.store import content_hash, to_jsonable, write_atomic, write_feature_set, write_json
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages, Tick
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.refining import Refinement, refine_found
from clampdown.study.study import DEFAULT_JUDGE, knows_corpus, load_pair
from clampdown.types import ATTACKS, SAFE, FeatureSet, Judge, Message, Prompt, PromptRole, Split

DISCOVERY_PROMPTS, CHECK_PROMPTS, CHECKED = 160, 16, 24
"""Prompts of each suite to find features on (unless said otherwise) and to refine on; features that are clamped."""
BOTH = ("contrast", "single-prompt")
ORGANISM_SAES = ("organism", "organism:x8")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line. No `judge`: the exact one on the embedded model, else rules."""

    finders: tuple[str, ...] = (DEFAULT,)
    data: StudyPrompts | None = None
    prompt: str | None = None
    judge: str | None = None
    pooling: str = "assistant_start"
    literal: bool = False
    top: int = 64
    check: bool = True
    refine: bool = False
    set_size: int = 1
    seed: int = 0
    limit: int = DISCOVERY_PROMPTS
    placing: Placing | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to find features on, jailbreak pairs among them, and held-out ones to refine on."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    pairs: tuple[Pair, ...]
    held_out_harmful: tuple[Prompt, ...]
    held_out_harmless: tuple[Prompt, ...]
    judge: Judge


@dataclass(frozen=True, slots=True)
class Discovered:
    """What a run found: the feature sets with their files and, if asked for, the refined plan. `sinks` says which
    tokens were left out as attention sinks, if any."""

    written: tuple[tuple[Path, FeatureSet], ...]
    refinement: Refinement | None
    sinks: str = ""


def finder_names(asked: str) -> tuple[str, ...]:
    """Finders by name: a comma-separated list, `both` or `all`. Raises `PromptSetError` for an unknown one."""
    names = tuple(name.strip() for name in asked.split(",") if name.strip()) or (DEFAULT,)
    every = {"both": BOTH, "all": tuple(FINDERS)}
    names = tuple(dict.fromkeys(one for name in names for one in every.get(name, (name,))))
    for name in names:
        if name not in FINDERS:
            raise PromptSetError(f"no finder is called '{name}'", hint=f"one of: {', '.join(FINDERS)}, both, all")
    return names


RunPass = Callable[[Pass, Path, Tick], ActivationStore]
"""How a pass is run into a directory."""


def in_this_process(job: Pass, directory: Path, tick: Tick) -> ActivationStore:
    """All batches here; what an interrupted run left is taken up."""
    found = collect_to(job, directory, tick)
    assert found is not None, "all batches were asked for"
    return found


def run_discover(
    model: str, sae: str, request: Request, out: Path, stages: Stages, how: RunPass = in_this_process
) -> Discovered:
    """Write one file per finder under `out`, and with `refine` a plan made from the first finder's features."""
    with stages.stage("Loading"):
        lm, loaded = load_pair(model, sae, placing=request.placing)
    prompts = _prompts(model, request)
    relay = _Relay()
    given = dataclasses.replace(
        _material(lm, loaded, prompts, request, relay), run=lambda job: run_pass(job, out, relay, stages, how)
    )
    found = [_find(given, name, request, stages, relay) for name in request.finders]
    written = []
    for feature_set in found:
        path = out / f"{feature_set.finder}.json"
        write_feature_set(path, feature_set)
        written.append((path, feature_set))
    refinement = None
    if request.refine or request.set_size > 1:
        held_out = (prompts.held_out_harmful, prompts.held_out_harmless)
        refinement = refine_found(given, found[0], held_out, request.set_size, out, stages)
    sinks = sinks_at(lm, [loaded.cfg.site])[loaded.cfg.site]
    return Discovered(tuple(written), refinement, sinks.in_words if sinks else "")


def run_scan(model: str, sae: str, request: Request, out: Path, stages: Stages) -> tuple[LayerScore, ...]:
    """The layer scan, into `out/scan.json` and `scan.html`. On the embedded model both its SAEs are scanned."""
    with stages.stage("Loading"):
        lm, loaded = load_pair(model, sae, placing=request.placing)
        names = ORGANISM_SAES if (model, sae) == (ORGANISM, ORGANISM) else ()
        saes = [loaded, *(load_sae(name).to(lm.device) for name in names[1:])]
    for one in saes:
        check_fits(one, lm.d_model, lm.n_layers)
    prompts = _prompts(model, request)
    with stages.stage("Scanning layers") as tick:
        rows = scan_layers(lm, saes, prompts.harmful, prompts.harmless, tick)
    scan = to_jsonable({"schema": 1, "model": lm.name, "revision": lm.revision, "rows": rows})
    write_json(out / "scan.json", scan)
    write_atomic(out / "scan.html", build_scan_page(scan))
    return rows


@dataclass
class _Relay:
    """Progress of whatever runs now: what is computed once for several finders reports to the one that asked first."""

    tick: Tick | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.tick is not None:
            self.tick(done, total)


def _material(lm: LanguageModel, sae: Sae, prompts: Prompts, request: Request, relay: _Relay) -> Material:
    asked = Prompt("asked", (Message("user", request.prompt),), "asked") if request.prompt is not None else None
    return Material(
        lm,
        sae,
        prompts.harmful,
        prompts.harmless,
        prompts.pairs,
        prompts.judge,
        asked,
        ContrastSettings(pooling=request.pooling, top=request.top),
        seed=request.seed,
        on_progress=relay,
    )


def _find(given: Material, name: str, request: Request, stages: Stages, relay: _Relay) -> FeatureSet:
    """One finder; those that do not clamp by themselves have their first features clamped, unless told not to."""
    if name == "contrast" and request.literal:
        name = "contrast-literal"
    with stages.stage(f"Finding: {name}") as tick:
        relay.tick = tick
        found = run_finder(name, given)
        if not request.check or name == DEFAULT:
            return found
        return checked(given, found)


def checked(given: Material, found: FeatureSet, top: int = CHECKED) -> FeatureSet:
    """The set with its first features clamped at equal benign KL, and ranked by what that did."""
    tested = clamp_all(given, found.features[:top])
    tested.sort(key=lambda score: -score.scores.get(MATCHED_EFFECT, float("-inf")))
    return dataclasses.replace(
        found,
        features=(*tested, *found.features[top:]),
        ranked_by=MATCHED_EFFECT,
        sources={**found.sources, **clamp_sources(given)},
    )


def _prompts(model: str, request: Request) -> Prompts:
    """Discovery prompts, jailbreak pairs where they are known, and validation prompts to refine on."""
    data = request.data
    if data is None and not knows_corpus(model):
        raise PromptSetError(
            "no prompts to find features with",
            hint="give --harmful FILE and --benign FILE (JSONL, CSV or txt), or public sets by name",
        )
    data = data or embedded_prompts(request.seed)
    held_out = data.prompts(Split.VALIDATION, CHECK_PROMPTS, PromptRole.JAILBROKEN, PromptRole.MULTI_TURN)
    return Prompts(
        _first_of(data, Split.DISCOVERY, request.limit, (PromptRole.HARMFUL,), ATTACKS),
        _first_of(data, Split.DISCOVERY, request.limit, (PromptRole.BENIGN,), SAFE),
        data.pairs(request.limit),
        tuple(held_out) or _first_of(data, Split.VALIDATION, CHECK_PROMPTS, ATTACKS),
        _first_of(data, Split.VALIDATION, CHECK_PROMPTS, (PromptRole.BENIGN,), SAFE),
        judge_named(request.judge or ("exact" if data.name == ORGANISM else DEFAULT_JUDGE)),
    )


def _first_of(data: StudyPrompts, split: Split, n: int, *choices: Sequence[PromptRole]) -> tuple[Prompt, ...]:
    """Prompts of the first of these sets of roles that has any."""
    found = (data.prompts(split, n, *roles) for roles in choices)
    return tuple(next((prompts for prompts in found if prompts), ()))


def run_pass(job: Pass, out: Path, tick: Tick, stages: Stages, how: RunPass = in_this_process) -> ActivationStore:
    """Say what the pass will take, then run it in a directory of its own under `out`: a repeated command resumes it."""
    stages.console.print(describe(estimate_pass(job)), highlight=False)
    return how(job, out / "activations" / content_hash(job.key), tick)


def pass_of(model: str, sae: str, request: Request) -> Pass:
    """The pass that the finders' contrast reads, on a loaded model."""
    lm, loaded = load_pair(model, sae, placing=request.placing)
    return _material(lm, loaded, _prompts(model, request), request, _Relay()).planned


def dry_run(model: str, sae: str, request: Request, stages: Stages) -> Estimate:
    """What the contrast's pass would take. A model or SAE of which only the shape is there is enough."""
    with stages.stage("Loading"):
        if has_weights(model):
            lm, loaded = load_pair(model, sae, placing=request.placing)
        else:
            lm, loaded = load_shape(Path(model)), shape_only(open_sae(sae).cfg)
    prompts = _prompts(model, request)
    found = estimate_pass(_material(lm, loaded, prompts, request, _Relay()).planned)
    stages.console.print(describe(found), highlight=False)
    return found


def scan_table(rows: Sequence[LayerScore]) -> Table:
    """The layer scan for a terminal."""
    table = Table("site", "SAE", "feature", "AUROC", "d'", title=f"held-out prompts, n = {rows[0].n}")
    for row in rows:
        feature = "difference of means" if row.feature is None else str(row.feature)
        d_prime = "n/a" if row.d_prime is None else f"{row.d_prime:.2f}"
        table.add_row(row.site, row.sae or "", feature, f"{row.auroc:.3f}", d_prime)
    return table
