"""What every measurement does: arms answer suites into a run directory, are judged, and are summarised.

A run directory holds `manifest.json` and `records.jsonl` (resumable), `prompts.jsonl`, `features/*.json`, `plan.toml`,
`plans/*.toml` (every arm's), `summary.json` and `report.html`. Each file can be read, replaced or made again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clampdown.evaluation import runner, utility
from clampdown.evaluation.suites import write_suites
from clampdown.models.loading import LanguageModel
from clampdown.results.run import Run
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm
from clampdown.store import RecordLog
from clampdown.study.frontier import Experiment, summarise, write_plans
from clampdown.study.progress import Stages
from clampdown.study.sizes import Answering
from clampdown.types import ArmKind, Judge, OptionChoice, Prompt, Provenance, Record, Split, Suite, SuiteKind

BENIGN = "benign"
Extra = Callable[[Sequence[Record]], Mapping[str, Any]]
"""Further parts of a run, from the records."""


def nothing(_records: Sequence[Record]) -> Mapping[str, Any]:
    return {}


@runtime_checkable
class Subject(Protocol):
    """What is measured: a model with the SAEs that plans read, and who judges its replies."""

    @property
    def lm(self) -> LanguageModel: ...

    @property
    def saes(self) -> tuple[Sae, ...]: ...

    @property
    def judge(self) -> Judge: ...

    @property
    def judge_name(self) -> str: ...

    def provenance(self, prompts: Sequence[Prompt]) -> Provenance: ...


def never(_arm: Arm) -> bool:
    """No arm answers multiple choice by likelihood."""
    return False


def always(_arm: Arm) -> bool:
    """Every arm does; one that steers generated tokens only is an error."""
    return True


def where_it_acts(arm: Arm) -> bool:
    """Those arms do whose steering can act on likelihoods."""
    return not utility.steers_generated(arm)


def methods_where_it_acts(arm: Arm) -> bool:
    """As `where_it_acts`, without controls."""
    return arm.kind is not ArmKind.CONTROL and where_it_acts(arm)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the arms are asked: suites of one split, the unsteered replies on which costs are measured (None: made from
    the benign suite), and which arms answer multiple choice by the options' likelihood as well."""

    suites: tuple[Suite, ...]
    split: Split = Split.TEST
    benign: tuple[utility.Forced, ...] | None = None
    by_likelihood: Callable[[Arm], bool] = never


def generate_records(
    subject: Subject,
    arms: Sequence[Arm],
    suites: Sequence[Suite],
    directory: Path,
    answering: Answering,
    stages: Stages,
    name: str,
) -> tuple[Record, ...]:
    """Run the arms on the suites into `directory` (resuming what is there), with a progress bar."""
    job = job_of(subject, arms, suites, answering)
    directory.mkdir(parents=True, exist_ok=True)
    with stages.stage(name) as tick, log_of(subject, job, directory) as log:
        return runner.run(subject.lm, subject.saes, job, log, tick)


def job_of(subject: Subject, arms: Sequence[Arm], suites: Sequence[Suite], answering: Answering) -> runner.Job:
    """The arms on the suites as a job for the runner."""
    settings = runner.Settings(answering.max_new_tokens, answering.batch_rows, answering.engine)
    limits = {arm.name: _limit(arm, answering) for arm in arms}
    fewer = {name: limit for name, limit in limits.items() if limit is not None}
    return runner.Job(tuple(arms), tuple(suites), subject.judge, subject.judge_name, settings, fewer)


def _limit(arm: Arm, answering: Answering) -> int | None:
    """How many prompts per suite an arm answers, where that is not all."""
    if arm.kind is ArmKind.CONTROL and arm.plan:
        return answering.control_prompts
    own = (ArmKind.BASELINE, ArmKind.GATED, ArmKind.TUNED)
    return None if arm.kind in own else answering.compared_prompts


def log_of(subject: Subject, job: runner.Job, directory: Path) -> RecordLog:
    """The directory's log. Raises `StoreError` when it holds another run."""
    return RecordLog(directory, runner.resume_key(subject.lm, subject.saes, job))


def _likelihoods(
    subject: Subject, job: runner.Job, wanted: Callable[[Arm], bool], directory: Path, stages: Stages
) -> tuple[OptionChoice, ...]:
    arms = tuple(arm for arm in job.arms if wanted(arm))
    if not arms or not any(prompt.options for suite in job.suites for prompt in suite.prompts):
        return ()
    with stages.stage("Multiple choice by likelihood") as tick, log_of(subject, job, directory) as log:
        return runner.score_options(subject.lm, subject.saes, replace(job, arms=arms), log, tick)


def benign_replies(lm: LanguageModel, suites: Sequence[Suite], answering: Answering) -> tuple[utility.Forced, ...]:
    """The unsteered model's replies to benign prompts, on which the cost in KL is measured: those of the suite
    "benign", else of the first harmless one; none without one."""
    harmless = [s for s in suites if s.kind is SuiteKind.SAFETY and not s.harmful and s.prompts]
    harmless.sort(key=lambda suite: suite.name != BENIGN)
    benign = [prompt for suite in harmless[:1] for prompt in suite.prompts][: answering.kl_prompts]
    return utility.base_replies(lm, benign, max_new_tokens=answering.max_new_tokens) if benign else ()


def measure_arms(
    subject: Subject,
    arms: Sequence[Arm],
    asked: Asked,
    out: Path,
    answering: Answering,
    stages: Stages,
    extra: Extra = nothing,
) -> Run:
    """Answer the suites once with all arms: records, KL on benign text, `summary.json`."""
    suites = tuple(suite for suite in asked.suites if suite.prompts)
    records = generate_records(subject, arms, suites, out, answering, stages, f"Answering {asked.split} prompts")
    write_suites(out / "prompts.jsonl", suites)
    choices = _likelihoods(subject, job_of(subject, arms, suites, answering), asked.by_likelihood, out, stages)
    steered = [arm for arm in arms if arm.plan]
    with stages.stage("Cost on benign text") as tick:
        benign = benign_replies(subject.lm, suites, answering) if asked.benign is None else asked.benign
        found = utility.costs(subject.lm, subject.saes, steered, benign, progress=tick) if benign else {}
    prompts = [prompt for suite in suites for prompt in suite.prompts]
    experiment = Experiment(tuple(arms), suites, subject.provenance(prompts), found, dict(stages.timings), choices)
    write_plans(out, arms)
    return summarise(experiment, records, extra(records)).write(out)


def renamed(arm: Arm, name: str, group: str) -> Arm:
    """The same arm as another column."""
    return replace(arm, name=name, group=group)
