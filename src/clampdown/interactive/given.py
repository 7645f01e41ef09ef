"""What a call was given, as the things it needs: loaded, checked against each other, with a place for results."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clampdown.config import ORGANISM
from clampdown.errors import PlanError, PromptSetError
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.interactive.loading import KNOWN_SAES, AnySae, Judged, Model, load, load_sae, plan
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, check_fits
from clampdown.steering.plan import Plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.loading import saes_of
from clampdown.study.progress import Stages
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.sizes import Sizes, size_named
from clampdown.study.study import Study, judge_for


def progress() -> Stages:
    return Stages(Console())


def directory_for(out: str | Path | None, what: str) -> Path:
    return Path(out) if out is not None else Path(tempfile.mkdtemp(prefix=f"clampdown-{what}-"))


def pair_of(lm: Model, sae: AnySae) -> tuple[LanguageModel, Sae]:
    model, loaded = load(lm), load_sae(sae)
    check_fits(loaded, model.d_model, model.n_layers)
    return model, loaded


def study_of(lm: Model, sae: AnySae, data: StudyPrompts, judge: Judged, seed: int) -> Study:
    model, loaded = pair_of(lm, sae)
    judged = judge_of(judge, model, data)
    return Study(model, loaded.to(model.device), data, judged, judged.name, seed)


def ground_of(found: Study, size: str | Sizes) -> Groundwork:
    return Groundwork(found, size_named(size) if isinstance(size, str) else size, progress())


def judge_of(judge: Judged, lm: LanguageModel, data: StudyPrompts) -> NamedJudge:
    return judge if isinstance(judge, NamedJudge) else judge_for(judge, lm, data)


def own_prompts(lm: LanguageModel) -> StudyPrompts:
    if lm.name != ORGANISM:
        raise PromptSetError("which prompts?", hint="card(lm, sae, feature, data)")
    return embedded_prompts()


def plan_of(found: Any) -> Plan:
    if not isinstance(found, Plan | str | Path):
        raise PlanError(f"{type(found).__name__} is no plan", hint="a Plan, or the path of a plan.toml")
    return plan(found)


def saes_for(plans: Sequence[Plan], lm: LanguageModel) -> list[Sae]:
    """The SAEs that the plans name: those loaded here, else loaded now."""
    known = {ref.site: KNOWN_SAES[ref.site, ref.revision] for one in plans for ref in one.saes
             if (ref.site, ref.revision) in KNOWN_SAES}  # fmt: skip
    missing = [one for one in plans if any(ref.site not in known for ref in one.saes)]
    loaded = {sae.cfg.site.name: sae for sae in saes_of(missing, lm)}
    return list({**loaded, **known}.values())
