"""What is studied: a model, its SAE, prompts by role, and who judges the replies. Every step of `study/` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.activations.fit import warn_unless_fitting
from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.errors import PromptSetError
from clampdown.evaluation.judges.interface import NamedJudge, check_not_under_test
from clampdown.evaluation.judges.table import DEFAULT as DEFAULT_JUDGE
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.placing import Placing
from clampdown.models.threads import choose_threads
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.store import prompts_hash
from clampdown.study.judging import judge_named
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.types import Judge, Prompt, PromptRole, Provenance, Site, Split, Suite


@dataclass(frozen=True, slots=True)
class Study:
    """A model, its SAE, prompts for every split, and who judges the replies."""

    lm: LanguageModel
    sae: Sae
    data: StudyPrompts
    judge: Judge
    judge_name: str
    seed: int = 0
    more_saes: tuple[Sae, ...] = ()
    """What arms read beside `sae`, such as a dense condition vector put as an SAE."""

    @property
    def saes(self) -> tuple[Sae, ...]:
        return (self.sae, *self.more_saes)

    @property
    def site(self) -> Site:
        return self.sae.cfg.site

    def suites(self, split: Split, n: int | None, *roles: PromptRole) -> tuple[Suite, ...]:
        """At most `n` prompts of each suite of these roles (default: all), held-out attack families among them."""
        return self.data.suites(split, n, *roles)

    def prompts(self, split: Split, n: int | None, *roles: PromptRole) -> list[Prompt]:
        """At most `n` prompts of each suite of these roles, without held-out attack families: what may decide."""
        return self.data.prompts(split, n, *roles)

    def only(self, names: Sequence[str]) -> Study:
        """The same with these suites alone. Raises `PromptSetError` for one that is not there."""
        return replace(self, data=self.data.only(names))

    def provenance(self, prompts: Sequence[Prompt]) -> Provenance:
        """Where an artefact that read these prompts came from."""
        return provenance_of(self.lm, self.sae, prompts, self.seed, self.judge_name)


def provenance_of(
    lm: LanguageModel, sae: Sae | None, prompts: Sequence[Prompt], seed: int, judge_name: str
) -> Provenance:
    """Where an artefact came from that a model with (or without) an SAE answered prompts for."""
    return Provenance(
        model=lm.name,
        model_revision=lm.revision,
        sae=sae.name if sae else None,
        prompts_hash=prompts_hash(prompts),
        code_version=CODE_VERSION,
        seed=seed,
        extra={"sae_revision": sae.revision if sae else "none", "judge": judge_name, "decoding": "greedy"},
    )


def load_pair(
    model: str, sae: str, site: str | None = None, placing: Placing | None = None
) -> tuple[LanguageModel, Sae]:
    """A model and an SAE that fits it. Raises `ModelError`, `SaeError` and their kin."""
    lm = load_model(model, placing=placing)
    choose_threads(lm)
    loaded = load_sae(sae, device=str(lm.device), site=Site.parse(site) if site else None)
    check_fits(loaded, lm.d_model, lm.n_layers)
    warn_unless_fitting(lm, loaded)
    return lm, loaded


def knows_corpus(model: str, lm: LanguageModel | None = None) -> bool:
    """Whether a model was trained on the embedded corpus, so that its suites and exact judge say something about it:
    the embedded one, or the `model` of a directory that `clampdown organism train` wrote."""
    if model == ORGANISM or (lm is not None and lm.name == ORGANISM):
        return True
    trained = Path(model).parent if Path(model).name == "model" else Path(model)
    return (trained / "metrics.json").exists()


def judge_for(spec: str | None, lm: LanguageModel, data: StudyPrompts | None) -> NamedJudge:
    """The judge asked for; by default the exact one for the embedded corpus's own prompts, else the general one.

    Raises `JudgeError` for an unknown judge, and for one that is the model under test.
    """
    found = judge_named(spec or ("exact" if data is not None and data.name == ORGANISM else DEFAULT_JUDGE))
    check_not_under_test(found, lm.name, lm.revision)
    return found


def make_study(
    model: str,
    sae: str,
    data: StudyPrompts | None = None,
    *,
    judge: str | None = None,
    seed: int = 0,
    placing: Placing | None = None,
) -> Study:
    """Load a study by names. Without prompts of one's own the model must know the embedded corpus.

    Raises `PromptSetError`, `ModelError`, `SaeError` and `JudgeError` for what does not fit together.
    """
    if data is None and not knows_corpus(model):
        raise PromptSetError(
            f"there are no prompts of our own for '{model}'",
            hint="give --harmful FILE and --benign FILE (CSV, JSONL or txt), or public sets by name",
        )
    lm, loaded = load_pair(model, sae, placing=placing)
    data = data or embedded_prompts(seed)
    found = judge_for(judge, lm, data)
    return Study(lm, loaded, data, found, found.name, seed)
