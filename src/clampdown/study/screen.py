"""`clampdown screen`: many features at many strengths, read from prefills; the best few generate and are measured.

The run directory is that of a sweep. Its summary also lists every candidate with what was read of it and why it was
not kept; the report shows them under the arms.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clampdown.discovery.causal import clamp_plan
from clampdown.discovery.refusal_tokens import RefusalTokens, find_refusal_tokens
from clampdown.errors import NotEnoughDataError, ScopeError, StrengthError
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.steering.scopes import SCOPES
from clampdown.study.measure import Asked, measure_arms
from clampdown.study.progress import Stages
from clampdown.study.screening import Halving, Screened, prefills_of, screen
from clampdown.study.sizes import Answering
from clampdown.study.study import Study
from clampdown.study.sweep import calibration_of, read_features, split_to_measure
from clampdown.types import ATTACKS, ArmKind, Prompt, PromptRole, Split


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: the first `top` features of a file, each at every multiple of its largest activation, in
    every scope. `prompts` of each suite are read in the last round of screening."""

    features_file: Path
    multiples: tuple[float, ...]
    scopes: tuple[str, ...] = ("all", "prompt")
    top: int = 20
    prompts: int = 16
    halving: Halving = field(default_factory=Halving)
    split: str = "validation"
    limit: int = 50


def run_screen(study: Study, request: Request, out: Path, stages: Stages) -> Run:
    """Screen on validation prompts, generate for what is kept, write the run directory; returns its summary."""
    split = split_to_measure(request.split)
    features = read_features(study, request.features_file)[: request.top]
    units = dict(zip(features, calibration_of(study, features, stages).largest, strict=True))
    plans = candidate_plans(study, units, request)
    found = screen_plans(study, plans, request.prompts, request.halving, stages)
    kept = [each for each in found if not each.dropped]
    if not kept:
        raise NotEnoughDataError(
            f"all {len(found)} candidates cost more than {request.halving.kl_limit:g} nats on benign prompts",
            hint="smaller --multiples, or a larger --kl-limit",
        )
    arms = [BASELINE, *(screened_arm(each) for each in kept)]
    write_plan(out / "plan.toml", kept[0].plan)
    notes = {
        "strength_unit": "raw activation",
        "split": split.value,
        "screening": [each.facts() for each in found],
    }
    answering = Answering(per_suite=request.limit, kl_prompts=min(60, request.limit))
    asked = Asked(study.suites(split, request.limit), split)
    return measure_arms(study, arms, asked, out, answering, stages, lambda _records: notes)


def candidate_plans(study: Study, units: dict[int, float], request: Request) -> list[Plan]:
    """A clamp for every feature, multiple and scope. `units` maps features to their largest activation.

    Raises `ScopeError` for a scope that a prefill cannot show, `StrengthError` for a feature that never fired.
    """
    for feature, unit in units.items():
        if unit <= 0:
            raise StrengthError(f"feature {feature} never fired on the discovery prompts: it has no scale to multiply")
    for scope in request.scopes:
        if scope not in SCOPES or scope == "generated":
            allowed = [name for name in SCOPES if name != "generated"]
            raise ScopeError(f"cannot screen scope '{scope}': a prefill generates nothing", hint=", ".join(allowed))
    every = itertools.product(units.items(), request.scopes, request.multiples)
    return [
        clamp_plan(study.lm, study.sae, feature, multiple * unit, scope).named(f"clamp {feature} x{multiple:g} {scope}")
        for (feature, unit), scope, multiple in every
    ]


def screen_plans(
    study: Study,
    plans: Sequence[Plan],
    n_prompts: int,
    halving: Halving,
    stages: Stages,
    tokens: RefusalTokens | None = None,
) -> list[Screened]:
    """Screen on `n_prompts` validation prompts of each harmful suite and as many benign ones as that makes together.

    `tokens` are the first tokens of the model's own refusals; by default they are read from discovery prompts.
    """
    harmful: list[Prompt] = study.prompts(Split.VALIDATION, n_prompts, *ATTACKS)
    benign = study.prompts(Split.VALIDATION, len(harmful), PromptRole.BENIGN)
    with stages.stage(f"Screening {len(plans)} candidates") as tick:
        tokens = tokens or refusal_tokens(study)
        measure = prefills_of(study.lm, study.sae, harmful, benign, tokens, seed=study.seed)
        return screen(plans, measure, measure.n_prompts, halving, tick)


def refusal_tokens(study: Study) -> RefusalTokens:
    """Which tokens open this model's refusals, from its own replies to a few discovery prompts."""
    asked = study.prompts(Split.DISCOVERY, 24, PromptRole.HARMFUL, PromptRole.BENIGN)
    return find_refusal_tokens(study.lm, asked, study.judge)


def screened_arm(each: Screened) -> Arm:
    """A kept candidate as a column; candidates of one feature and scope are one curve."""
    edit = each.plan.edits[0]
    group = f"clamp {edit.features[0]}, {edit.scope}"
    return Arm(each.plan.name, ArmKind.FEATURE, each.plan, edit.strengths[0], group=group)
