"""A run that is killed and resumed gives the records of one that was not; nothing unsteered passes as steered."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clampdown.errors import JudgeError, PlanError, PromptSetError, SteeringNotAppliedError, StoreError
from clampdown.evaluation import runner
from clampdown.evaluation.runner import Job, Settings, resume_key, run
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, Reply
from clampdown.steering.plan import Edit, Plan
from clampdown.store import RecordLog, content_hash, read_records
from clampdown.types import ArmKind, Judge, Judgement, Prompt, Receipt, Record, Verdict
from tests.evaluation.conftest import arm, clamp, gate, length_judge, prompt, suite
from tests.steering.conftest import SITE, make_plan

ARMS = (
    BASELINE,
    arm(clamp(6.0), "clamped"),
    arm(clamp(6.0, scope="generated", name="late"), "late"),
    Arm("asked", ArmKind.CONTROL, system_prompt="w9 w8"),
)
SUITES = (suite("harmful", 7, harmful=True), suite("benign", 6))


def job(**changes: Any) -> Job:
    settings = Settings(max_new_tokens=6, batch_rows=9)
    return replace(Job(ARMS, SUITES, length_judge, "by length", settings), **changes)


def records_in(directory: Path, lm: LanguageModel, sae: Sae, what: Job) -> tuple[Record, ...]:
    with RecordLog(directory, resume_key(lm, [sae], what)) as log:
        return run(lm, [sae], what, log)


@pytest.fixture(scope="module")
def undisturbed(lm: LanguageModel, sae: Sae, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    records_in(directory, lm, sae, job())
    return directory


def test_an_arm_may_answer_only_the_first_prompts_of_each_suite() -> None:
    rows = job(fewer={"asked": 2}).rows
    assert Counter(arm.name for arm, _ in rows) == {"baseline": 13, "clamped": 13, "late": 13, "asked": 4}
    first = {prompt.id for suite in SUITES for prompt in suite.prompts[:2]}
    assert {prompt.id for arm, prompt in rows if arm.name == "asked"} == first


def test_every_arm_answers_every_prompt_once_and_is_judged(lm: LanguageModel, sae: Sae, undisturbed: Path) -> None:
    records = read_records(undisturbed / "records.jsonl")
    wanted = {(a.name, s.name, p.id) for a in ARMS for s in SUITES for p in s.prompts}
    assert {(r.arm, r.suite, r.prompt_id) for r in records} == wanted
    assert len(records) == len(wanted)
    prompts = {p.id: p for s in SUITES for p in s.prompts}
    for record in records:
        assert record.verdict is length_judge(prompts[record.prompt_id], record.reply).verdict
        assert record.judge == "by length"
        assert (record.receipt is not None) is (record.arm in {"clamped", "late"})
    assert records_in(undisturbed, lm, sae, job()) == tuple(
        next(r for r in records if (r.arm, r.suite, r.prompt_id) == (a.name, s.name, p.id))
        for s in SUITES
        for p in s.prompts
        for a in ARMS
    )


def test_arms_in_one_batch_answer_as_they_do_alone(
    lm: LanguageModel, sae: Sae, undisturbed: Path, tmp_path: Path
) -> None:
    together = {(r.arm, r.prompt_id): r.reply for r in read_records(undisturbed / "records.jsonl")}
    for each in ARMS:
        alone = records_in(tmp_path / each.name, lm, sae, job(arms=(each,), settings=Settings(6, batch_rows=4)))
        assert {(r.arm, r.prompt_id): r.reply for r in alone}.items() <= together.items()
    assert len({together[a.name, "harmful-1"] for a in ARMS}) > 1


def test_a_resumed_run_ends_as_an_undisturbed_one(
    lm: LanguageModel, sae: Sae, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed at 8 random bytes of the file: between records, inside one, inside a batch, before the first."""
    whole = (undisturbed / "records.jsonl").read_bytes()
    chance = random.Random(0)
    for i in range(8):
        directory = tmp_path / str(i)
        RecordLog(directory_made(directory), resume_key(lm, [sae], job())).close()
        (directory / "records.jsonl").write_bytes(whole[: chance.randrange(len(whole))])
        records_in(directory, lm, sae, job())
        assert (directory / "records.jsonl").read_bytes() == whole


def directory_made(directory: Path) -> Path:
    directory.mkdir(parents=True)
    return directory


class Interrupted(Exception):
    """Stands for whatever ends a run from outside."""


class Counting:
    """A judge that counts what it is asked, and stops working for a while."""

    def __init__(self, fails_at: int) -> None:
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.fails_at = fails_at

    def __call__(self, asked: Prompt, reply: str) -> Judgement:
        if sum(self.asked.values()) == self.fails_at:
            self.fails_at = -1
            raise JudgeError("the endpoint does not answer")
        self.asked[asked.suite, asked.id, reply] += 1
        return length_judge(asked, reply)


@pytest.mark.parametrize("fails_at", [0, 4, 9, 25])
def test_a_judge_that_fails_loses_nothing_and_judges_nothing_twice(
    lm: LanguageModel,
    sae: Sae,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: int,
) -> None:
    judge = Counting(fails_at)
    with pytest.raises(JudgeError, match=r"endpoint does not answer; .* replies wait"):
        records_in(tmp_path, lm, sae, job(judge=judge))
    judged = read_records(tmp_path / "records.jsonl")
    assert len({(r.suite, r.prompt_id, r.reply) for r in judged}) == fails_at
    assert (tmp_path / "replies.jsonl").read_text().count("\n") == len(job().rows)
    monkeypatch.setattr(runner, "generate_batch", no_generation)
    records_in(tmp_path, lm, sae, job(judge=judge))
    assert (tmp_path / "records.jsonl").read_bytes() == (undisturbed / "records.jsonl").read_bytes()
    whole = read_records(undisturbed / "records.jsonl")
    assert judge.asked == dict.fromkeys({(r.suite, r.prompt_id, r.reply) for r in whole}, 1)


def no_generation(*_args: Any) -> list[Reply]:
    raise AssertionError("every reply was there already")


def test_an_interrupt_between_batches_keeps_what_was_done(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            raise Interrupted

    with RecordLog(tmp_path, resume_key(lm, [sae], job())) as log:
        with pytest.raises(Interrupted):
            run(lm, [sae], job(), log, stop)
        assert len(log.records) == seen[-1][0] < len(job().rows)
    assert len(seen) == 2, "the first batch was done and kept, the second was the interrupted one"


def key_of(lm: LanguageModel, sae: Sae, **changes: Any) -> str:
    return content_hash(resume_key(lm, [sae], job(**changes)))


def other_arms(change: Arm) -> tuple[Arm, ...]:
    return (*ARMS[:1], change, *ARMS[2:])


CHANGES: dict[str, dict[str, Any]] = {
    "another prompt": {"suites": (*SUITES[:1], suite("benign", 5))},
    "another ground truth": {
        "suites": (*SUITES[:1], replace(SUITES[1], prompts=(replace(SUITES[1].prompts[0], answer="4"),))),
    },
    "another suite": {"suites": SUITES[:1]},
    "another judge": {"judge_name": "by length/2"},
    "longer replies": {"settings": Settings(max_new_tokens=7, batch_rows=9)},
    "another strength": {"arms": other_arms(arm(clamp(6.5), "clamped"))},
    "another feature": {"arms": other_arms(arm(clamp(6.0, feature=4), "clamped"))},
    "another scope": {"arms": other_arms(arm(clamp(6.0, scope="assistant"), "clamped"))},
    "another gate": {
        "arms": other_arms(
            arm(
                make_plan(
                    *clamp(6.0).edits,
                    gate=gate(1),
                ),
                "clamped",
            )
        )
    },
    "another arm name": {"arms": other_arms(arm(clamp(6.0), "renamed"))},
    "another system prompt": {"arms": (*ARMS[:3], replace(ARMS[3], system_prompt="w9"))},
    "fewer arms": {"arms": ARMS[:2]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_could_change_a_record_changes_the_resume_key(lm: LanguageModel, sae: Sae, change: str) -> None:
    assert key_of(lm, sae, **CHANGES[change]) != key_of(lm, sae)


def test_another_model_sae_precision_or_code_changes_the_resume_key(
    lm: LanguageModel, sae: Sae, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        key_of(lm, sae),
        key_of(replace(lm, name="other"), sae),
        key_of(replace(lm, revision="r1"), sae),
        key_of(lm, replace(sae, name="other")),
        key_of(lm, replace(sae, revision="s1")),
        content_hash(resume_key(lm, [], job())),
    }
    monkeypatch.setattr(runner, "CODE_VERSION", "9.9.9")
    keys.add(key_of(lm, sae))
    assert len(keys) == 7
    assert '"dtype"' in str(resume_key(lm, [sae], job())).replace("'", '"')


def test_rows_per_batch_and_display_names_do_not_change_the_resume_key(lm: LanguageModel, sae: Sae) -> None:
    """Who ran out of memory resumes with smaller batches; a curve's label is no result."""
    assert key_of(lm, sae, settings=Settings(max_new_tokens=6, batch_rows=2)) == key_of(lm, sae)
    assert key_of(lm, sae, arms=other_arms(replace(ARMS[1], group="sweep"))) == key_of(lm, sae)


def test_another_runs_directory_is_refused(lm: LanguageModel, sae: Sae, undisturbed: Path) -> None:
    with pytest.raises(StoreError, match="holds another run"):
        records_in(undisturbed, lm, sae, job(judge_name="another"))


def dead_feature(sae: Sae) -> Sae:
    tensors = dict(sae.tensors)
    tensors["b_enc"] = tensors["b_enc"].clone()
    tensors["b_enc"][3] = -1e6
    return replace(sae, tensors=tensors)


NOTHING = {
    "add nothing": Edit(site=SITE.name, operator="add", features=(3,), strengths=(0.0,)),
    "scale by one": Edit(site=SITE.name, operator="scale", features=(5,), strengths=(1.0,)),
    "a dead feature": Edit(site=SITE.name, operator="scale", features=(3,), strengths=(0.0,)),
    "clamp a dead feature where active": Edit(
        site=SITE.name, operator="clamp_active", features=(3,), strengths=(9.0,), scope="assistant"
    ),
}


@pytest.mark.parametrize("what", NOTHING)
def test_steering_that_did_nothing_is_an_error(lm: LanguageModel, sae: Sae, tmp_path: Path, what: str) -> None:
    idle = job(arms=(BASELINE, arm(make_plan(NOTHING[what]), "idle")))
    with pytest.raises(SteeringNotAppliedError, match="arm 'idle' steered 13 prompts and touched no token"):
        records_in(tmp_path, lm, dead_feature(sae), idle)


def test_a_plan_that_failed_to_act_writes_no_record(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    """An edit so small that it is zero in float32: the label would say steered, and the reply is not."""
    lost = arm(make_plan(Edit(site=SITE.name, operator="add", features=(3,), strengths=(1e-60,))), "lost")
    with pytest.raises(SteeringNotAppliedError, match="touched no token of prompt"):
        records_in(tmp_path, lm, sae, job(arms=(BASELINE, lost)))
    assert read_records(tmp_path / "records.jsonl") == ()


def test_a_gate_that_never_fires_is_a_result(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    shut = arm(make_plan(*clamp(6.0).edits, gate=gate(1, threshold=1e9)), "shut")
    records = records_in(tmp_path, lm, sae, job(arms=(BASELINE, shut)))
    replies = {(r.arm, r.prompt_id): r.reply for r in records}
    assert all(replies["shut", p] == reply for (_, p), reply in replies.items())
    assert {r.receipt.gate_fired for r in records if r.receipt} == {False}


def reply_with(plan: Plan, receipt: Receipt | None) -> Reply:
    return Reply(arm(plan), prompt(0), "w1", 1, receipt)


def test_a_reply_that_a_plan_should_have_changed_needs_its_proof() -> None:
    untouched = Receipt("test", 0, 0.0)
    for bad in (None, untouched, Receipt("test", 4, float("nan"))):
        with pytest.raises(SteeringNotAppliedError):
            runner.check_acted([reply_with(clamp(6.0), bad)])
    runner.check_acted([reply_with(clamp(6.0), Receipt("test", 4, 0.1))])
    runner.check_acted([reply_with(clamp(6.0), replace(untouched, gate_fired=False))])
    runner.check_acted([reply_with(clamp(6.0, scope="generated"), untouched)])


def test_records_that_could_be_mixed_up_are_refused() -> None:
    with pytest.raises(PlanError, match="two arms are called 'baseline'"):
        job(arms=(BASELINE, BASELINE))
    with pytest.raises(PromptSetError, match="two prompts with id 'benign-0'"):
        job(suites=(replace(SUITES[1], prompts=SUITES[1].prompts + SUITES[1].prompts[:1]),))
    with pytest.raises(PromptSetError, match="holds prompts of"):
        job(suites=(replace(SUITES[1], name="borderline"),))


def test_unscored_replies_are_recorded_as_such(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    judge: Judge = lambda _prompt, _reply: Judgement(Verdict.UNSCORED)  # noqa: E731
    records = records_in(tmp_path, lm, sae, job(judge=judge))
    assert {r.verdict for r in records} == {Verdict.UNSCORED}
