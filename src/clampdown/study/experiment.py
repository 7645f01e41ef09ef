"""What every command that measures does: load a subject, run arms on suites, write the run directory.

A run directory holds `manifest.json` and `records.jsonl` (resumable), `prompts.jsonl`, `features/*.json`, `plan.toml`,
`plans/*.toml` (every arm's), `summary.json` and `report.html`. Each file can be read, replaced or made again alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.errors import ModelError
from clampdown.evaluation import runner, utility
from clampdown.evaluation.suites import write_suites
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.steering.arms import Arm
from clampdown.store import RecordLog, prompts_hash
from clampdown.study.frontier import Experiment, summarise, write_plans
from clampdown.study.progress import Stages
from clampdown.types import ArmKind, Judge, OptionChoice, Prompt, Provenance, Record, Split, Suite, SuiteKind

SuitesOf = Callable[[Split, int | None], tuple[Suite, ...]]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is studied: a model, its SAE, prompts for every split, and who judges the replies."""

    lm: LanguageModel
    sae: Sae
    suites: SuitesOf
    judge: Judge
    judge_name: str
    seed: int = 0
    more_saes: tuple[Sae, ...] = ()
    """What arms read beside `sae`, such as a dense condition vector put as an SAE."""

    @property
    def saes(self) -> tuple[Sae, ...]:
        return (self.sae, *self.more_saes)

    def prompts(self, split: Split, n: int, *names: str) -> list[Prompt]:
        """At most `n` prompts of each named suite."""
        return [prompt for suite in self.suites(split, n) if suite.name in names for prompt in suite.prompts]

    def with_suites(self, names: set[str]) -> Subject:
        """The same subject, with only these suites."""
        every = self.suites
        return replace(self, suites=lambda split, n: tuple(s for s in every(split, n) if s.name in names))

    def provenance(self, prompts: Sequence[Prompt]) -> Provenance:
        return Provenance(
            model=self.lm.name,
            model_revision=self.lm.revision,
            sae=self.sae.name,
            prompts_hash=prompts_hash(prompts),
            code_version=CODE_VERSION,
            seed=self.seed,
            extra={"sae_revision": self.sae.revision, "judge": self.judge_name, "decoding": "greedy"},
        )


def load_pair(model: str, sae: str) -> tuple[LanguageModel, Sae]:
    """A model and an SAE that fits it. Raises `ModelError`, `SaeError` and their kin."""
    lm = load_model(model)
    loaded = load_sae(sae).to(lm.device)
    check_fits(loaded, lm.d_model, lm.n_layers)
    return lm, loaded


def organism_subject(model: str = ORGANISM, sae: str = ORGANISM, *, seed: int = 0) -> Subject:
    """The embedded model, or one trained like it, with the corpus's own suites and exact judge."""
    from clampdown.organism.judge import judge
    from clampdown.organism.suites import suites

    lm, loaded = load_pair(model, sae)
    if lm.model.config.model_type != "llama" or lm.tokenizer.vocab_size > 4096:
        raise ModelError(
            f"'{model}' was not trained on the embedded corpus, so its suites and exact judge say nothing about it",
            hint="this command measures 'organism' or a directory that `clampdown organism train` wrote",
        )
    return Subject(lm, loaded, lambda split, n: suites(split, n, seed), judge, "organism-exact/1", seed)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much to measure: prompts per suite for generation and for KL, rows per batch, tokens per reply.

    `likelihood`: multiple choice is answered by the options' likelihood as well, by arms that are no controls.
    """

    per_suite: int
    kl_prompts: int
    batch_rows: int | None = None
    max_new_tokens: int = 40
    likelihood: bool = False


def generate_records(
    subject: Subject,
    arms: Sequence[Arm],
    suites: Sequence[Suite],
    directory: Path,
    sizes: Sizes,
    stages: Stages,
    name: str,
) -> tuple[Record, ...]:
    """Run the arms on the suites into `directory` (resuming what is there), with a progress bar."""
    job = _job(subject, arms, suites, sizes)
    directory.mkdir(parents=True, exist_ok=True)
    with stages.stage(name) as tick, RecordLog(directory, runner.resume_key(subject.lm, subject.saes, job)) as log:
        return runner.run(subject.lm, subject.saes, job, log, tick)


def _job(subject: Subject, arms: Sequence[Arm], suites: Sequence[Suite], sizes: Sizes) -> runner.Job:
    settings = runner.Settings(max_new_tokens=sizes.max_new_tokens, batch_rows=sizes.batch_rows)
    return runner.Job(tuple(arms), tuple(suites), subject.judge, subject.judge_name, settings)


def _likelihoods(subject: Subject, job: runner.Job, directory: Path, stages: Stages) -> tuple[OptionChoice, ...]:
    """Multiple choice by likelihood, of the arms that are no controls and can act on it."""
    arms = tuple(a for a in job.arms if a.kind is not ArmKind.CONTROL and not utility.steers_generated(a))
    key = runner.resume_key(subject.lm, subject.saes, job)
    with stages.stage("Multiple choice by likelihood") as tick, RecordLog(directory, key) as log:
        return runner.score_options(subject.lm, subject.saes, replace(job, arms=arms), log, tick)


def benign_replies(subject: Subject, suites: Sequence[Suite], sizes: Sizes) -> tuple[utility.Forced, ...]:
    """The unsteered model's replies to benign prompts, on which the cost in KL is measured: those of the suite
    "benign", else of the first harmless one."""
    harmless = [s for s in suites if s.kind is SuiteKind.SAFETY and not s.harmful]
    harmless.sort(key=lambda suite: suite.name != "benign")
    benign = [prompt for suite in harmless[:1] for prompt in suite.prompts][: sizes.kl_prompts]
    return utility.base_replies(subject.lm, benign, max_new_tokens=sizes.max_new_tokens)


def measure_arms(
    subject: Subject,
    arms: Sequence[Arm],
    out: Path,
    sizes: Sizes,
    stages: Stages,
    extra: Callable[[Sequence[Record]], Mapping[str, Any]] = lambda _records: {},
    *,
    split: Split = Split.TEST,
) -> dict[str, Any]:
    """Read a split once for all arms: records, KL on benign text, `summary.json`. Returns the summary.

    `extra(records)` gives further top-level keys of the summary.
    """
    suites = [suite for suite in subject.suites(split, sizes.per_suite) if suite.prompts]
    records = generate_records(subject, arms, suites, out, sizes, stages, f"Answering {split} prompts")
    write_suites(out / "prompts.jsonl", suites)
    choices = _likelihoods(subject, _job(subject, arms, suites, sizes), out, stages) if sizes.likelihood else ()
    steered = [arm for arm in arms if arm.plan]
    with stages.stage("Cost on benign text") as tick:
        found = utility.costs(subject.lm, subject.saes, steered, benign_replies(subject, suites, sizes), progress=tick)
    prompts = [prompt for suite in suites for prompt in suite.prompts]
    experiment = Experiment(
        tuple(arms), tuple(suites), subject.provenance(prompts), found, dict(stages.timings), choices
    )
    write_plans(out, arms)
    return summarise(experiment, records, extra(records)).write(out).to_json()


def safety_only(suites: Sequence[Suite], *names: str) -> tuple[Suite, ...]:
    """The named safety suites, for decisions that need no capability."""
    return tuple(suite for suite in suites if suite.kind is SuiteKind.SAFETY and suite.name in names)


def renamed(arm: Arm, name: str, group: str) -> Arm:
    """The same arm as another column."""
    return replace(arm, name=name, group=group)
