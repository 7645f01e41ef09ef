"""Which prompts may inform which decision of `clampdown tune`.

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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from clampdown.errors import PromptSetError
from clampdown.study.sizes import Answering
from clampdown.study.study import Study
from clampdown.types import Prompt, PromptRole, Split, Suite, SuiteKind


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
    test: Answering


FULL = Scale(240, 1600, 24, 240, 80, 160, 16, 6, 6, 8, 16, Answering(60, 60))
QUICK = Scale(120, 800, 10, 160, 60, 48, 8, 3, 3, 4, 8, Answering(20, 20))


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


def prompt_sets(study: Study, scale: Scale) -> PromptSets:
    """Deal a study's prompts out. Raises `PromptSetError` when a part that is needed has none."""
    data = study.data
    discovery = data.known(Split.DISCOVERY, scale.discovery)
    known = {suite.name for suite in harmful(discovery)}
    validation = data.known(Split.VALIDATION, scale.trial + scale.fresh)
    validation = tuple(s for s in validation if s.name in known or s not in harmful(validation))
    for split, suites in ((Split.DISCOVERY, discovery), (Split.VALIDATION, validation)):
        if not harmful(suites) or not safe(suites):
            raise PromptSetError(
                f"the {split} split needs both harmful prompts and harmless ones without a right answer",
                hint="give more prompts of each role, or a column `split`; see docs/tune.md",
            )
    safe_names = [suite.name for suite in safe(validation)]
    benign = next((name for name in safe_names if data.roles[name] is PromptRole.BENIGN), safe_names[0])
    calibration = next((s for s in data.known(Split.CALIBRATION, scale.calibration) if s.name == benign), None)
    if calibration is None:
        raise PromptSetError(f"suite '{benign}' has no prompt of the calibration split: no gate can be calibrated")
    cuts = {suite.name: min(scale.trial, max(1, len(suite.prompts) // 3)) for suite in validation}
    trial = tuple(suite.take(cuts[suite.name]) for suite in validation)
    fresh = tuple(replace(suite, prompts=suite.prompts[cuts[suite.name] :]) for suite in validation)
    return PromptSets(discovery, calibration, trial, _filled(fresh), benign)


def _filled(suites: Iterable[Suite]) -> tuple[Suite, ...]:
    return tuple(suite for suite in suites if suite.prompts)
