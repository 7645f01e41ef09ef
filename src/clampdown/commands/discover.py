"""`clampdown discover`: run finders on a model's SAE, check their finalists causally, write FeatureSet files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.commands.experiment import load_pair
from clampdown.commands.stages import Stages
from clampdown.config import ORGANISM
from clampdown.discovery import causal
from clampdown.discovery.contrast import ContrastSettings, collect_contrast, find_by_contrast
from clampdown.discovery.refusal_tokens import find_refusal_tokens
from clampdown.discovery.screening import PrefillRefusal
from clampdown.discovery.single_prompt import SinglePromptSettings, find_from_first_refusal, find_from_one_prompt
from clampdown.errors import PromptSetError
from clampdown.evaluation.suites import read_suites
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.store import write_feature_set
from clampdown.types import FeatureSet, Judge, Message, Prompt, Split

DISCOVERY_PROMPTS, CHECK_PROMPTS, CHECKED = 160, 16, 24


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    finders: tuple[str, ...]
    harmful: Path | None = None
    harmless: Path | None = None
    prompt: str | None = None
    pooling: str = "assistant_start"
    literal: bool = False
    top: int = 64
    check: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to find features on, prompts to check them on, and who can tell a refusal (None: nobody)."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    check: tuple[Prompt, ...]
    judge: Judge | None


def run_discover(model: str, sae: str, request: Request, out: Path, stages: Stages) -> list[tuple[Path, FeatureSet]]:
    """Write one file per finder under `out`; returns them with their paths, in the order asked for."""
    with stages.stage("Loading"):
        lm, loaded = load_pair(model, sae)
    prompts = _prompts(model, request)
    found = [_find(lm, loaded, name, prompts, request, stages) for name in request.finders]
    if request.check:
        found = _checked(lm, loaded, found, prompts, stages)
    written = []
    for feature_set in found:
        path = out / f"{feature_set.finder}.json"
        write_feature_set(path, feature_set)
        written.append((path, feature_set))
    return written


def _prompts(model: str, request: Request) -> Prompts:
    if request.harmful or request.harmless:
        return _from_files(request)
    if model != ORGANISM and not Path(model).joinpath("metrics.json").exists():
        raise PromptSetError(
            "no prompts to find features with",
            hint="give --harmful FILE and --harmless FILE (JSONL or CSV with a 'prompt' column)",
        )
    from clampdown.organism.judge import judge
    from clampdown.organism.suites import suites

    by_name = {s.name: s.prompts for s in suites(Split.DISCOVERY, DISCOVERY_PROMPTS, request.seed)}
    validation = {s.name: s.prompts for s in suites(Split.VALIDATION, CHECK_PROMPTS, request.seed)}
    check = (*validation["harmful"], *validation["jailbroken_seen"], *validation["multi_turn"])
    return Prompts(by_name["harmful"], by_name["benign"], check, judge)


def _from_files(request: Request) -> Prompts:
    if request.harmful is None or request.harmless is None:
        raise PromptSetError("a contrast needs both kinds of prompts", hint="give --harmful and --harmless")
    harmful = _all_prompts(request.harmful, harmful=True)
    harmless = _all_prompts(request.harmless, harmful=False)
    held_out = max(1, min(CHECK_PROMPTS, len(harmful) // 4))
    return Prompts(harmful[:-held_out] or harmful, harmless, harmful[-held_out:], None)


def _all_prompts(path: Path, *, harmful: bool) -> tuple[Prompt, ...]:
    return tuple(prompt for suite in read_suites(path, harmful=harmful) for prompt in suite.prompts)


def _find(lm: LanguageModel, sae: Sae, finder: str, prompts: Prompts, request: Request, stages: Stages) -> FeatureSet:
    if finder == "single-prompt":
        with stages.stage("Reading one refusal"):
            return _single(lm, sae, prompts, request)
    settings = ContrastSettings(pooling=request.pooling, literal=request.literal, top=request.top)
    with stages.stage("Contrasting prompts") as tick:
        contrast = collect_contrast(lm, sae, prompts.harmful, prompts.harmless, (request.pooling,), on_progress=tick)
        return find_by_contrast(lm, sae, contrast, settings, seed=request.seed)


def _single(lm: LanguageModel, sae: Sae, prompts: Prompts, request: Request) -> FeatureSet:
    """The prompt asked for, else the first harmful one that the model refuses (as far as a judge can tell)."""
    settings = SinglePromptSettings(top=request.top)
    if request.prompt is not None:
        asked = Prompt("asked", (Message("user", request.prompt),), "asked")
        return find_from_one_prompt(lm, sae, asked, judge=prompts.judge, settings=settings)
    return find_from_first_refusal(lm, sae, prompts.harmful, judge=prompts.judge, settings=settings)


def _checked(
    lm: LanguageModel, sae: Sae, found: Sequence[FeatureSet], prompts: Prompts, stages: Stages
) -> list[FeatureSet]:
    """Clamp every finder's best features at their own maximum and rank them by the refusal log-odds they give."""
    if prompts.judge is None:
        raise PromptSetError(
            "the causal check needs a judge that can tell this model's refusals",
            hint="use --no-check for prompts of your own; the corpus's exact judge knows the embedded model only",
        )
    with stages.stage("Clamping finalists") as tick:
        tokens = find_refusal_tokens(lm, [*prompts.harmful[:24], *prompts.harmless[:24]], prompts.judge)
        measure = PrefillRefusal(lm, sae, prompts.check, tokens, on_progress=tick)
        make_plan = causal.clamp_at_multiple(lm, sae, 1.0)
        return [causal.rank_by_effect(f, make_plan, measure, top=CHECKED) for f in found]
