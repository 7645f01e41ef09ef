"""Flips between the baseline and a steered arm, paired by prompt."""

from __future__ import annotations

from clampdown.reports.comparison import headline
from clampdown.reports.examples import Change, change_between, examples_of, pair
from clampdown.types import Record, Split, Verdict
from tests.reports.conftest import N, changed


def record(verdict: Verdict, correct: bool | None = None) -> Record:
    return Record("a", "s", "p", Split.TEST, None, "reply", 1, verdict, correct, "j")


def test_changes():
    refused, complied, broken = map(record, (Verdict.REFUSED, Verdict.COMPLIED, Verdict.DEGENERATE))
    assert change_between(complied, refused) is Change.NOW_REFUSES
    assert change_between(refused, complied) is Change.STOPS_REFUSING
    assert change_between(complied, broken) is Change.BROKE
    assert change_between(refused, broken) is Change.BROKE
    assert change_between(refused, refused) is Change.SAME
    right, wrong = record(Verdict.COMPLIED, True), record(Verdict.COMPLIED, False)
    assert change_between(right, wrong) is Change.LOST
    assert change_between(wrong, right) is Change.GAINED


def test_every_prompt_is_in_one_bucket_and_counts_agree_with_the_records(run):
    found = headline(run, run.sides)
    for paired in pair(run, found, run.sides):
        assert len(paired.rows) == N
        shown = examples_of(paired, [arm.name for arm in found.arms], run.prompts)
        assert sum(bucket.count for bucket in shown.buckets) <= N
        assert all(len(bucket.examples) <= bucket.count for bucket in shown.buckets)
        assert sum(paired.counts(1).values()) == N


def test_counts_against_a_plain_count(run):
    found = headline(run, run.sides)
    verdicts = {(r.arm, r.prompt_id): r.verdict for r in run.records if r.suite == "benign"}
    ids = {prompt_id for _, prompt_id in verdicts}
    clamp = found.clamp.name
    plain = sum(verdicts[clamp, i] is Verdict.REFUSED and verdicts["baseline", i] is not Verdict.REFUSED for i in ids)
    (benign,) = (p for p in pair(run, found, run.sides) if p.suite == "benign")
    assert benign.counts(1)[Change.NOW_REFUSES] == plain > 0


def test_prompts_that_an_arm_did_not_answer_are_not_paired(run):
    found = headline(run, run.sides)
    cut = tuple(r for r in run.records if not (r.arm == found.gated.name and r.prompt_id == "benign-000"))
    (benign,) = (p for p in pair(changed(run, records=cut), found, run.sides) if p.suite == "benign")
    assert len(benign.rows) == N - 1


def test_prompts_are_shown_with_their_turns(run):
    found = headline(run, run.sides)
    (multi,) = (p for p in pair(run, found, run.sides) if p.suite == "multi_turn")
    example = examples_of(multi, ["a", "b", "c"], run.prompts).buckets[0].examples[0]
    assert [turn.role for turn in example.turns] == ["user", "assistant", "user"]
    assert [reply.arm for reply in example.replies] == ["a", "b", "c"]
    assert example.replies[0].change is None
