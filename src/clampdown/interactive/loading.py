"""Models, SAEs, prompts, plans and runs, by what names them; and what may stand for them in every function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from clampdown.config import ORGANISM
from clampdown.errors import PromptSetError
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.placing import Placing
from clampdown.models.threads import choose_threads
from clampdown.results.run import Run
from clampdown.saes import checkpoints
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan, read_plan
from clampdown.study.prompts import Sources, StudyPrompts, embedded_prompts, prompts_from
from clampdown.types import FeatureScore, Message, Prompt, Site

Model = LanguageModel | str | Path
AnySae = Sae | str | Path
AnyPlan = Plan | str | Path
Feature = FeatureScore | int
Judged = NamedJudge | str | None
Asked = str | Sequence[Message] | Prompt
"""One prompt: a plain string (the user's turn), a conversation, or a suite's prompt."""

KNOWN_SAES: WeakValueDictionary[tuple[str, str], Any] = WeakValueDictionary()
"""SAEs that were loaded here, by site and revision: a plan that names one is steered with it, not loaded again."""


def load(model: Model, placing: Placing | None = None) -> LanguageModel:
    """A model: 'organism', a directory, a .gguf file, or a hub id; `cd.Placing(device_map="auto")` and its like say
    where it goes, and in which precision. Raises `ModelError`."""
    if isinstance(model, LanguageModel):
        return model
    found = load_model(str(model), placing=placing)
    choose_threads(found)
    return found


def load_sae(sae: AnySae, site: str | None = None) -> Sae:
    """An SAE: 'organism', a directory, or 'release:id'. Raises `SaeError`."""
    found = (
        sae
        if isinstance(sae, Sae)
        else checkpoints.load_sae(str(sae), site=Site.parse(site) if site is not None else None)
    )
    KNOWN_SAES[found.cfg.site.name, found.revision] = found
    return found


def data(
    name: str | None = None,
    *,
    harmful: Sources | None = None,
    jailbroken: Sources | None = None,
    multi_turn: Sources | None = None,
    borderline: Sources | None = None,
    benign: Sources | None = None,
    capability: Sources | None = None,
    mixed: Sources | None = None,
    hold_out: Sequence[str] | None = None,
    seed: int = 0,
) -> StudyPrompts:
    """Prompts by role: of the embedded corpus (`data("organism")`), or files and public sets for each role.

    Prompts without a split are dealt out by a hash of their text, the same way every time. Raises `PromptSetError`.
    """
    given: dict[str, Any] = {
        "harmful": harmful,
        "jailbroken": jailbroken,
        "multi_turn": multi_turn,
        "borderline": borderline,
        "benign": benign,
        "capability": capability,
        "mixed": mixed,
    }
    if name == ORGANISM and not any(given.values()):
        return embedded_prompts(seed)
    if not any(given.values()):
        raise PromptSetError(
            f"no prompts are called '{name}'" if name else "no prompts were given",
            hint="data('organism'), or data(harmful='a.csv', benign='b.csv')",
        )
    return prompts_from(**given, name=name or "files", hold_out=hold_out)


def plan(file: AnyPlan) -> Plan:
    """A plan from its file. Raises `PlanError`."""
    return file if isinstance(file, Plan) else read_plan(Path(file))


def run(directory: str | Path) -> Run:
    """A finished run's directory. Raises `StoreError`."""
    return Run.read(directory)
