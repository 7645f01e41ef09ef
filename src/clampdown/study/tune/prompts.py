"""Which prompts may inform which decision of `clampdown tune`, and a subject made from prompt files.

| part | split | informs |
|---|---|---|
| discovery | discovery | features, their units, the gates' fits |
| calibration | calibration, the benign suite | the gates' thresholds |
| trial | validation, its first prompts | screening and every trial |
| fresh | validation, the rest | the finalists' bounds, and the choice among them |
| test | test | nothing: it is read once, for the plan that was chosen |

A harmful suite without discovery prompts is a held-out family: it informs nothing and is tested only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.config import ORGANISM
from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.suites import read_suites
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.study.evaluate import judge_of
from clampdown.study.experiment import Sizes, Subject, load_pair, organism_subject
from clampdown.types import OBJECTIVE, Prompt, Split, Suite, SuiteKind

BENIGN = "benign"
SHARES = {Split.DISCOVERY: 0.35, Split.VALIDATION: 0.3, Split.CALIBRATION: 0.15, Split.TEST: 0.2}
"""How prompts without a split are dealt out. Trials and bounds both come out of validation."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How many prompts each step reads per suite, and how many candidates it keeps.

    `fresh` prompts are for the finalists, who answer all harmful ones and `generated` harmless ones; of the other
    harmless ones only those on which a gate fires. `calibration` counts benign prompts.
    """

    discovery: int
    calibration: int
    trial: int
    fresh: int
    generated: int
    trials: int
    batch: int
    features: int
    feature_sets: int
    finalists: int
    screened: int
    test: Sizes


FULL = Scale(240, 1600, 24, 240, 80, 160, 16, 6, 6, 8, 16, Sizes(60, 60, likelihood=True))
QUICK = Scale(120, 800, 10, 160, 60, 48, 8, 3, 3, 4, 8, Sizes(20, 20, likelihood=True))


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The parts of the module's table, and the name of the benign suite: what KL is measured and gates are calibrated
    on."""

    discovery: tuple[Suite, ...]
    calibration: Suite
    trial: tuple[Suite, ...]
    fresh: tuple[Suite, ...]
    benign: str

    def benign_of(self, suites: Sequence[Suite]) -> tuple[Prompt, ...]:
        return next((suite.prompts for suite in suites if suite.name == self.benign), ())


def harmful(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    """Where refusing is right."""
    return tuple(suite for suite in suites if suite.kind is SuiteKind.SAFETY and suite.harmful)


def safe(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    """Where refusing is wrong."""
    return tuple(suite for suite in suites if suite.kind is SuiteKind.SAFETY and not suite.harmful)


def capability(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    """Where there is a right answer."""
    return tuple(suite for suite in suites if suite.kind is SuiteKind.CAPABILITY)


def prompts_of(suites: Iterable[Suite]) -> list[Prompt]:
    return [prompt for suite in suites for prompt in suite.prompts]


def prompt_sets(subject: Subject, scale: Scale) -> PromptSets:
    """Deal a subject's prompts out. Raises `PromptSetError` when a part that is needed has none."""
    discovery = _filled(subject.suites(Split.DISCOVERY, scale.discovery))
    known = {suite.name for suite in harmful(discovery)}
    validation = _filled(subject.suites(Split.VALIDATION, scale.trial + scale.fresh))
    validation = tuple(s for s in validation if s.name in known or s not in harmful(validation))
    for split, suites in ((Split.DISCOVERY, discovery), (Split.VALIDATION, validation)):
        if not harmful(suites) or not safe(suites):
            raise PromptSetError(
                f"the {split} split needs both harmful prompts and harmless ones without a right answer",
                hint="rows have the columns suite, harmful and split; see docs/tune.md",
            )
    names = [suite.name for suite in safe(validation)]
    benign = BENIGN if BENIGN in names else names[0]
    calibration = next(
        (s for s in subject.suites(Split.CALIBRATION, scale.calibration) if s.name == benign and s.prompts), None
    )
    if calibration is None:
        raise PromptSetError(f"suite '{benign}' has no prompt of the calibration split: no gate can be calibrated")
    cuts = {suite.name: min(scale.trial, max(1, len(suite.prompts) // 3)) for suite in validation}
    trial = tuple(suite.take(cuts[suite.name]) for suite in validation)
    fresh = tuple(replace(suite, prompts=suite.prompts[cuts[suite.name] :]) for suite in validation)
    return PromptSets(discovery, calibration, trial, _filled(fresh), benign)


def _filled(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    return tuple(suite for suite in suites if suite.prompts)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a subject's prompts are: nothing for the embedded corpus."""

    suites: tuple[str, ...] = ()
    harmful: Path | None = None
    harmless: Path | None = None
    judge: str | None = None

    @property
    def given(self) -> bool:
        return bool(self.suites or self.harmful or self.harmless)


def tuning_subject(model: str, sae: str, sources: Sources, seed: int) -> Subject:
    """The embedded model with its corpus, or any model with prompts of files.

    Raises `PromptSetError`, `ModelError`, `SaeError` and `JudgeError` for what does not fit together.
    """
    if not sources.given:
        if model != ORGANISM and not Path(model).joinpath("metrics.json").exists():
            raise PromptSetError(
                f"there are no prompts of our own for '{model}'",
                hint="give --harmful FILE and --harmless FILE, or --suites NAME, NAME=FILE or FILE",
            )
        return organism_subject(model, sae, seed=seed)
    return _subject_of_files(*load_pair(model, sae), sources, seed)


def _subject_of_files(lm: LanguageModel, sae: Sae, sources: Sources, seed: int) -> Subject:
    found = [suite for spec in sources.suites for suite in load_suites(spec)]
    for path, is_harmful in ((sources.harmful, True), (sources.harmless, False)):
        found += read_suites(path, harmful=is_harmful) if path else ()
    names = [suite.name for suite in found]
    if len(set(names)) < len(names):
        raise PromptSetError(f"two suites have the same name among {', '.join(names)}", hint="name each once")
    dealt = dealt_out(found, seed)

    def suites(split: Split, n: int | None) -> tuple[Suite, ...]:
        mine = (replace(s, prompts=tuple(p for p in s.prompts if p.split is split)) for s in dealt)
        return tuple(suite if n is None else suite.take(n) for suite in mine)

    judge = judge_of(sources.judge, lm)
    return Subject(lm, sae, suites, judge, judge.name, seed)


def dealt_out(suites: Sequence[Suite], seed: int) -> tuple[Suite, ...]:
    """The suites with a split for every prompt: as their rows say, or, when no row says any but `test` (what a row
    without the column gets), dealt out by `SHARES`. Prompts of one objective go to one split, across suites."""
    if any(prompt.split is not Split.TEST for prompt in prompts_of(suites)):
        return tuple(suites)
    return tuple(replace(suite, prompts=tuple(_dealt(suite.prompts, seed))) for suite in suites)


def _dealt(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Each prompt's place is drawn from what it is after, so that twins in other suites get the same."""
    found = []
    for prompt in prompts:
        place = random.Random(f"{seed}|{prompt.meta.get(OBJECTIVE) or prompt.text}").random()
        found.append(replace(prompt, split=_split_at(place)))
    return found


def _split_at(place: float) -> Split:
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return Split.TEST
