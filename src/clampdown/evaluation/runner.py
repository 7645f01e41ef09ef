"""The runner: (model, arms, suites, judge) -> records, batched, and resumable after a kill at any moment.

1. All (arm, prompt) rows are put in batches of similar length. How they are cut depends on the job alone, never on
   what is already done: a resumed batch is computed as it would have been, so its records come out the same.
2. The replies of a batch are appended to the log, then judged, and each judgement is appended as it comes. Rows that
   the log holds are not generated, judged or written again. A judge that fails is not asked again in this run:
   generation goes on, its replies wait in the log, and the next run judges them.
3. `resume_key` names everything that could change a record. The log refuses a directory made under another key.
4. A plan that did nothing is an error, never an unsteered reply under a steered label.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clampdown.config import CODE_VERSION
from clampdown.errors import JudgeError, PlanError, PromptSetError, SteeringNotAppliedError
from clampdown.evaluation.engines import Engine
from clampdown.evaluation.judging import Judging
from clampdown.evaluation.utility import BATCH_ROWS, option_choices, refuse_generated_scope
from clampdown.models.fingerprint import weights_fingerprint
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, EncodedRow, Reply, batches, generate_batch
from clampdown.steering.plan import Edit, Plan
from clampdown.store import SCHEMA, Key, RecordLog, content_hash, key_of, prompts_hash
from clampdown.types import Judge, OptionChoice, Prompt, Receipt, Record, StoredReply, Suite

Progress = Callable[[int, int], None]
Row = tuple[Arm, Prompt]

# Operators whose effect does not depend on the feature being active: with a strength other than 0 they must act.
_ALWAYS_ACT = frozenset({"clamp", "add", "add_direction", "ablate_direction", "clamp_direction"})


@dataclass(frozen=True, slots=True)
class Settings:
    """How replies are generated (greedily). `batch_rows` is how many are decoded together; None: what memory
    has room for. `engine` None: by this process."""

    max_new_tokens: int = 64
    batch_rows: int | None = None
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What to run. `judge_name` says all that could change a judgement (kind, version, model, rubric): it stands in
    every record and in the resume key.

    Raises `PlanError` for two arms of one name, `PromptSetError` for two prompts of one id in a suite
    or a prompt that says it belongs to another.
    """

    arms: tuple[Arm, ...]
    suites: tuple[Suite, ...]
    judge: Judge = field(repr=False)
    judge_name: str
    settings: Settings = field(default_factory=Settings)
    fewer: Mapping[str, int] = field(default_factory=dict)
    """By arm: how many prompts of each suite it answers, the first ones, where that is not all."""

    def __post_init__(self) -> None:
        for name in _doubled(arm.name for arm in self.arms):
            raise PlanError(f"two arms are called '{name}'", hint="their records could not be told apart")
        for name, prompt_id in _doubled((s.name, p.id) for s in self.suites for p in s.prompts):
            raise PromptSetError(f"suite '{name}' has two prompts with id '{prompt_id}'")
        for suite in self.suites:
            strays = {prompt.suite for prompt in suite.prompts} - {suite.name}
            if strays:
                raise PromptSetError(f"suite '{suite.name}' holds prompts of {sorted(strays)}")

    @property
    def rows(self) -> list[Row]:
        """Every (arm, prompt) pair, the arms of a prompt side by side."""
        return [
            (arm, prompt)
            for suite in self.suites
            for place, prompt in enumerate(suite.prompts)
            for arm in self.arms
            if place < self.fewer.get(arm.name, len(suite.prompts))
        ]


def _doubled(names: Iterable[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def model_key(lm: LanguageModel) -> dict[str, str]:
    """Everything of a model that could change its replies."""
    return {
        "name": lm.name,
        "revision": lm.revision,
        "dtype": str(lm.dtype),
        "weights": weights_fingerprint(lm.model),
        "chat_template": content_hash(lm.tokenizer.chat_template),
    }


def resume_key(lm: LanguageModel, saes: Sequence[Sae], job: Job) -> dict[str, Any]:
    """Everything that could change a record of this job.

    The batch size and the device are left out on purpose: they move results by rounding only, and who resumes after
    running out of memory needs to change them.
    """
    return {
        "code": {"version": CODE_VERSION, "schema": SCHEMA},
        "model": model_key(lm),
        "saes": [{"name": sae.name, "revision": sae.revision, "site": sae.cfg.site.name} for sae in saes],
        "arms": [
            {"name": a.name, "kind": a.kind.value, "plan": a.plan.digest if a.plan else None, "system": a.system_prompt}
            for a in job.arms
        ],
        "suites": {suite.name: prompts_hash(suite.prompts) for suite in job.suites},
        "judge": job.judge_name,
        "generation": {
            "decoding": "greedy",
            "max_new_tokens": job.settings.max_new_tokens,
            **({"engine": job.settings.engine.label} if job.settings.engine else {}),
        },
    }


def run(
    lm: LanguageModel, saes: Sequence[Sae], job: Job, log: RecordLog, progress: Progress | None = None
) -> tuple[Record, ...]:
    """Run what the log does not hold yet; returns all records of the job, in the order of its rows.

    `progress(done, total)` counts rows, including those the log already held. Raises `SteeringNotAppliedError` when a
    plan did nothing, and at the end `JudgeError` when replies still wait for a judge that failed: nothing is lost, and
    running again judges only those.
    """
    answer(lm, saes, job, log, progress)
    rows = job.rows
    found = {key_of(record): record for record in log.records}
    records = tuple(found[_key(arm, prompt)] for arm, prompt in rows)
    check_arms_acted(job.arms, records)
    return records


def answer(
    lm: LanguageModel,
    saes: Sequence[Sae],
    job: Job,
    log: RecordLog,
    progress: Progress | None = None,
    only: Container[int] | None = None,
) -> None:
    """Generate and judge what the log does not hold yet: all batches, or `only` those of these numbers, for a job that
    is split over machines. Raises as `run`."""
    judging = Judging(job.judge, job.judge_name, job.suites, log)
    judging.catch_up()
    cut = [batch for number, batch in enumerate(cut_batches(lm, job)) if only is None or number in only]
    done, total = 0, sum(map(len, cut))
    for batch in cut:
        if any(key not in log and key not in log.replies for key in keys_of(batch)):
            replies = answer_batch(lm, saes, job, batch)
            log.replies.append([reply for reply in replies if key_of(reply) not in log])
        judging.catch_up()
        done += len(batch)
        if progress:
            progress(done, total)
    refuse_unjudged(judging, log)


def cut_batches(lm: LanguageModel, job: Job) -> list[list[EncodedRow]]:
    """The job's batches, which depend on the job and on `batch_rows` alone: their numbers mean the same everywhere."""
    engine = job.settings.engine
    at_once = engine.rows if engine else job.settings.batch_rows
    return list(batches(lm, job.rows, at_once, job.settings.max_new_tokens))


def keys_of(batch: Sequence[EncodedRow]) -> list[Key]:
    """What the records of a batch are told apart by."""
    return [_key(arm, prompt) for arm, prompt, _ in batch]


def answer_batch(lm: LanguageModel, saes: Sequence[Sae], job: Job, batch: Sequence[EncodedRow]) -> list[StoredReply]:
    """One batch's replies, as the log keeps them. Raises `SteeringNotAppliedError`."""
    engine, longest = job.settings.engine, job.settings.max_new_tokens
    replies = engine.replies(batch, longest) if engine else generate_batch(lm, saes, batch, longest)
    check_acted(replies)
    return [_stored(reply) for reply in replies]


def score_options(
    lm: LanguageModel, saes: Sequence[Sae], job: Job, log: RecordLog, progress: Progress | None = None
) -> tuple[OptionChoice, ...]:
    """Every multiple-choice prompt of the job by the likelihood of its options, resumed from the log like replies.

    Raises `ScopeError` for a plan that steers generated tokens only: it could not act, and its score would be the
    baseline's under another name.
    """
    refuse_generated_scope(job.arms)
    score_chunks(lm, saes, job, log, progress)
    return tuple(log.choices[_key(arm, prompt)] for arm in job.arms for prompt in _with_options(job))


def score_chunks(
    lm: LanguageModel,
    saes: Sequence[Sae],
    job: Job,
    log: RecordLog,
    progress: Progress | None = None,
    only: Container[int] | None = None,
) -> None:
    """Score the chunks that the log does not hold yet: all, or `only` those of these numbers."""
    chunks = [chunk for number, chunk in enumerate(option_chunks(job)) if only is None or number in only]
    for done, chunk in enumerate(chunks, 1):
        if any(_key(arm, prompt) not in log.choices for arm in job.arms for prompt in chunk):
            log.choices.append(score_chunk(lm, saes, job, chunk))
        if progress:
            progress(done, len(chunks))


def option_chunks(job: Job) -> list[list[Prompt]]:
    """The multiple-choice prompts in the pieces that are scored together. They depend on the job alone."""
    prompts, batch_rows = _with_options(job), job.settings.batch_rows or BATCH_ROWS
    rows_per_prompt = len(job.arms) * max((len(prompt.options) for prompt in prompts), default=1)
    size = max(1, batch_rows // max(1, rows_per_prompt))
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def score_chunk(lm: LanguageModel, saes: Sequence[Sae], job: Job, chunk: Sequence[Prompt]) -> Sequence[OptionChoice]:
    """All arms on one piece."""
    return option_choices(lm, saes, job.arms, chunk, batch_rows=job.settings.batch_rows or BATCH_ROWS)


def _with_options(job: Job) -> list[Prompt]:
    return [prompt for suite in job.suites for prompt in suite.prompts if prompt.options]


def refuse_unjudged(judging: Judging, log: RecordLog) -> None:
    """Raises `JudgeError` when the judge failed: replies may wait."""
    if judging.failure is None:
        return
    raise JudgeError(
        f"{judging.failure.message}; {len(log.waiting)} replies wait for the judge in {log.replies.path}",
        hint="nothing is lost: the same command judges them without generating anything again",
    ) from judging.failure


def _key(arm: Arm, prompt: Prompt) -> tuple[str, str, str]:
    return (arm.name, prompt.suite, prompt.id)


def _stored(reply: Reply) -> StoredReply:
    return StoredReply(*_key(reply.arm, reply.prompt), reply.text, reply.n_tokens, reply.receipt, reply.same_as)


def check_acted(replies: Iterable[Reply]) -> None:
    """Refuse replies that a plan should have changed and did not touch. Raises `SteeringNotAppliedError`."""
    for reply in replies:
        plan, receipt = reply.arm.plan, reply.receipt
        if plan is None:
            continue
        if receipt is None:
            raise SteeringNotAppliedError(f"no receipt for plan '{plan.name}' on prompt '{reply.prompt.id}'")
        if not receipt.tokens_touched and receipt.gate_fired is not False and _must_act(plan, receipt):
            raise SteeringNotAppliedError(f"plan '{plan.name}' touched no token of prompt '{reply.prompt.id}'")
        if not math.isfinite(receipt.edit_norm):
            raise SteeringNotAppliedError(f"plan '{plan.name}' turned the residual into something that is no number")


def _must_act(plan: Plan, receipt: Receipt) -> bool:
    """Whether the plan's branch that fired touches every prompt. A 'generated' scope may not: a reply can end at its
    first token."""

    def certain(edit: Edit) -> bool:
        return (
            edit.operator in _ALWAYS_ACT and edit.scope != "generated" and any(edit.strengths) and receipt.factor != 0
        )

    branch = plan.otherwise if receipt.branch == "otherwise" else None
    return any(certain(edit) for edit in (branch or plan).edits)


def check_arms_acted(arms: Sequence[Arm], records: Iterable[Record]) -> None:
    """Refuse an arm whose plan touched no token of any prompt (prompts whose gate stayed shut do not count).

    Raises `SteeringNotAppliedError`.
    """
    steered = {arm.name for arm in arms if arm.plan}
    touched: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for record in records:
        if record.arm in steered and record.receipt and record.receipt.gate_fired is not False:
            asked[record.arm] += 1
            touched[record.arm] += record.receipt.tokens_touched
    for arm in asked:
        if not touched[arm]:
            raise SteeringNotAppliedError(
                f"arm '{arm}' steered {asked[arm]} prompts and touched no token",
                hint="its features are never active there, or its strengths are neutral: nothing was measured",
            )
