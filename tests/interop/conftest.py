"""The embedded model, a gated plan for it, and items that our runner and other tools' runners both answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from clampdown.config import ORGANISM
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.plan import Edit, Gate, ModelRef, Plan, SaeRef, write_plan
from clampdown.types import ArmKind, Prompt, Split

FEATURE = 7  # any feature: pushed hard enough it changes answers, which is all that is asked of it here
PER_SUITE = 16


@pytest.fixture(scope="session")
def organism() -> LanguageModel:
    return load_model(ORGANISM)


@pytest.fixture(scope="session")
def organism_sae() -> Sae:
    return load_sae(ORGANISM)


@pytest.fixture(scope="session")
def items() -> dict[str, tuple[Prompt, ...]]:
    """Facts (with options) and instructions (exact match) of the embedded corpus."""
    found = {suite.name: suite.prompts for suite in suites(Split.VALIDATION, PER_SUITE)}
    return {name: found[name] for name in ("facts", "instructions")}


def make_plan(lm: LanguageModel, sae: Sae, scope: str, gate: Gate | None = None, strength: float = 60.0) -> Plan:
    site = sae.cfg.site.name
    edit = Edit(site=site, operator="clamp", features=(FEATURE,), strengths=(strength,), scope=scope)
    return Plan(
        name=f"clamp {scope}",
        model=ModelRef(name=lm.name, revision=lm.revision),
        saes=(SaeRef(site=site, name=sae.name, revision=sae.revision),),
        edits=(edit,),
        gate=gate,
    )


def make_gate(sae: Sae, threshold: float) -> Gate:
    """Fires on about half of anything: the sum of some features' peaks."""
    features = tuple(range(0, sae.cfg.d_sae, 4))
    return Gate(
        site=sae.cfg.site.name,
        features=features,
        weights=(1.0,) * len(features),
        bias=0.0,
        threshold=threshold,
        poolings=("max",) * len(features),
    )


@pytest.fixture(scope="session")
def gated(organism: LanguageModel, organism_sae: Sae, items: dict[str, tuple[Prompt, ...]]) -> Plan:
    """A plan whose gate fires on some of the items and not on others."""
    open_plan = make_plan(organism, organism_sae, "all", make_gate(organism_sae, -1e9))
    arm = Arm("scores", ArmKind.GATED, open_plan)
    prompts = [prompt for suite in items.values() for prompt in suite]
    replies = generate_arms(organism, organism_sae, [(arm, prompt) for prompt in prompts], max_new_tokens=1)
    scores = sorted(float(reply.receipt.gate_score or 0.0) for reply in replies if reply.receipt)
    middle = len(scores) // 2
    # Between two scores, not on one: batches of other shapes round differently.
    threshold = (scores[middle - 1] + scores[middle]) / 2
    return make_plan(organism, organism_sae, "all", make_gate(organism_sae, threshold))


@pytest.fixture(scope="session")
def plan_file(gated: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "plan.toml"
    write_plan(path, gated)
    return path
