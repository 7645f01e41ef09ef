"""What an actor does, made again from a message: the same pass or the same evaluation, batch by batch.

1. A message is plain JSON: names of the model and the SAE, prompts, arms. No tensor travels; weights are read where
   they are used.
2. The task that comes of it is held to the sender's key: another model under the same name is an error, not a result.
3. A unit of work is named by a kind and a number, and doing it twice gives the same thing twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clampdown.activations import files
from clampdown.activations.stream import Budget, Pass, Reading, plan_pass, read_batch
from clampdown.documents import from_json, parse_json
from clampdown.errors import JudgeError, ShardError
from clampdown.evaluation import runner
from clampdown.evaluation.condition import NAME as CONDITION
from clampdown.evaluation.condition import StoredCondition
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.placing import Placing
from clampdown.models.threads import choose_threads
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.store import content_hash, to_jsonable
from clampdown.study.frozen import StoredArm
from clampdown.study.measure import Subject
from clampdown.types import Judgement, OptionChoice, Prompt, Site, StoredReply, Suite

READ, ANSWER, CHOOSE = "read", "answer", "choose"
Unit = tuple[str, int]


@runtime_checkable
class Task(Protocol):
    """Work in units, on a loaded model."""

    @property
    def digest(self) -> str:
        """Hash of everything that could change a result."""
        ...

    def do(self, unit: Unit) -> str:
        """One unit's result as JSON."""
        ...


@dataclass(frozen=True, slots=True)
class NamedSae:
    """An SAE that is loaded by name, at a site."""

    name: str
    site: str

    @classmethod
    def of(cls, sae: Sae) -> NamedSae:
        return cls(sae.name, sae.cfg.site.name)

    def load(self, lm: LanguageModel) -> Sae:
        return load_sae(self.name, device=str(lm.device), site=Site.parse(self.site))


@dataclass(frozen=True, slots=True)
class StoredReading:
    """A `Reading` as plain values."""

    name: str
    site: str
    sae: NamedSae | None
    features: tuple[str, ...]
    dense: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PassMessage:
    """A pass, and the directory into which its batches are written: it must be the same one on every machine."""

    model: str
    placing: Placing
    directory: str
    here: str
    prompts: tuple[Prompt, ...]
    readings: tuple[StoredReading, ...]
    budget: Budget
    include_sinks: bool

    @classmethod
    def of(cls, job: Pass, directory: Path) -> PassMessage:
        readings = tuple(
            StoredReading(r.name, r.site.name, NamedSae.of(r.sae) if r.sae else None, r.features, r.dense)
            for r in job.readings
        )
        where, here = str(directory.resolve()), str(Path.cwd())
        return cls(job.lm.name, job.lm.placing, where, here, job.prompts, readings, job.budget, not job.sinks)


@dataclass(frozen=True)
class PassTask:
    """Batches of a pass, written as files."""

    job: Pass
    directory: Path

    @classmethod
    def of(cls, message: PassMessage) -> PassTask:
        lm = _model(message.model, message.placing)
        readings = [
            Reading(Site.parse(r.site), r.sae.load(lm) if r.sae else None, r.features, r.dense, r.name)
            for r in message.readings
        ]
        job = plan_pass(lm, readings, message.prompts, message.budget, include_sinks=message.include_sinks)
        return cls(job, Path(message.directory))

    @cached_property
    def digest(self) -> str:
        return content_hash(self.job.key)

    def do(self, unit: Unit) -> str:
        kind, number = unit
        assert kind == READ
        if not files.shard_path(self.directory, number).exists():
            files.write_shard(self.job, self.directory, number, read_batch(self.job, number))
        return "[]"


@dataclass(frozen=True, slots=True)
class AnswerMessage:
    """An evaluation: arms on suites, and which arms answer multiple choice by likelihood too. The judge stays with the
    sender; its name is part of the key."""

    model: str
    placing: Placing
    here: str
    saes: tuple[NamedSae, ...]
    conditions: tuple[StoredCondition, ...]
    arms: tuple[StoredArm, ...]
    suites: tuple[Suite, ...]
    likelihood: tuple[str, ...]
    judge: str
    max_new_tokens: int
    batch_rows: int | None
    fewer: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject, job: runner.Job, likelihood: Sequence[str]) -> AnswerMessage:
        named = tuple(NamedSae.of(sae) for sae in subject.saes if sae.name != CONDITION)
        stored = tuple(StoredCondition.of(sae) for sae in subject.saes if sae.name == CONDITION)
        arms = tuple(StoredArm.of(arm) for arm in job.arms)
        lm, here = subject.lm, str(Path.cwd())
        asked = (job.suites, tuple(likelihood), job.judge_name)
        sizes = (job.settings.max_new_tokens, job.settings.batch_rows, job.fewer)
        return cls(lm.name, lm.placing, here, named, stored, arms, *asked, *sizes)


@dataclass(frozen=True)
class AnswerTask:
    """Batches of replies, and pieces of multiple choice, as rows."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    job: runner.Job
    likelihood: tuple[str, ...]

    @classmethod
    def of(cls, message: AnswerMessage) -> AnswerTask:
        lm = _model(message.model, message.placing)
        saes = (
            *(sae.load(lm) for sae in message.saes),
            *(sae.sae().to(lm.device) for sae in message.conditions),
        )
        arms = tuple(arm.arm() for arm in message.arms)
        settings = runner.Settings(message.max_new_tokens, message.batch_rows)
        job = runner.Job(arms, message.suites, _no_judge, message.judge, settings, message.fewer)
        return cls(lm, saes, job, message.likelihood)

    @cached_property
    def digest(self) -> str:
        return content_hash(runner.resume_key(self.lm, self.saes, self.job))

    @cached_property
    def _batches(self) -> list[list[runner.EncodedRow]]:
        return runner.cut_batches(self.lm, self.job)

    @cached_property
    def _choosing(self) -> tuple[runner.Job, list[list[Prompt]]]:
        job = by_likelihood(self.job, self.likelihood)
        return job, runner.option_chunks(job)

    def do(self, unit: Unit) -> str:
        kind, number = unit
        rows: Sequence[StoredReply | OptionChoice]
        if kind == ANSWER:
            rows = runner.answer_batch(self.lm, self.saes, self.job, self._batches[number])
        else:
            assert kind == CHOOSE
            job, chunks = self._choosing
            rows = runner.score_chunk(self.lm, self.saes, job, chunks[number])
        return json.dumps(to_jsonable(list(rows)), ensure_ascii=False)


def by_likelihood(job: runner.Job, names: Sequence[str]) -> runner.Job:
    """The part of a job that answers multiple choice by likelihood."""
    return replace(job, arms=tuple(arm for arm in job.arms if arm.name in names))


def _no_judge(prompt: Prompt, reply: str) -> Judgement:
    raise JudgeError("actors do not judge")


def _model(name: str, placing: Placing) -> LanguageModel:
    lm = load_model(name, placing=placing)
    choose_threads(lm)
    return lm


MESSAGES: dict[str, tuple[type, Any]] = {
    "pass": (PassMessage, PassTask.of),
    "evaluation": (AnswerMessage, AnswerTask.of),
}


def packed(message: PassMessage | AnswerMessage) -> str:
    """A message as text."""
    (kind,) = (kind for kind, (made, _) in MESSAGES.items() if isinstance(message, made))
    return json.dumps({"kind": kind, "message": to_jsonable(message)}, ensure_ascii=False)


def task_of(text: str) -> Task:
    """The task that a message names, on a model that is loaded here. Raises what loading raises, and `ShardError` for a
    message that is none."""
    raw = parse_json(text, "the message", ShardError)
    try:
        kind, make = MESSAGES[raw["kind"]]
        message = from_json(kind, raw["message"])
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"a message that is none: {error!r}") from error
    if Path(message.here).is_dir():  # names of directories are relative to where the command was typed
        os.chdir(message.here)
    return make(message)
