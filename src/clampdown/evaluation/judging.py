"""Judging what waits in a run's log, so that no judgement is lost, doubled or paid for twice.

1. Replies wait in the log's order, and each judgement is written when it comes: a kill costs those in flight.
2. The same reply to the same prompt is judged once, whichever arms gave it: a gated arm repeats most of the baseline.
3. A judge may answer several replies at a time and in any order (`NamedJudge.find`).
4. A reply that the judge could not be asked about waits for the next run, and a judge that answers nothing of a batch,
   or raises `JudgeError`, is not asked again in this one: its error is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from clampdown.errors import JudgeError, JudgeUnreachableError
from clampdown.evaluation.judges.interface import Case, NamedJudge, one_by_one
from clampdown.store import RecordLog
from clampdown.types import OBJECTIVE, Judge, Judgement, Prompt, Record, StoredReply, Suite

Asked = tuple[str, str, str]


class Judging:
    """One judge at work on one log. `failure` is its first error, if any: then replies may still wait."""

    def __init__(self, judge: Judge, name: str, suites: Sequence[Suite], log: RecordLog) -> None:
        self.failure: JudgeError | None = None
        self._dead = False
        self._passed_over: set[Asked] = set()
        self._judge = judge if isinstance(judge, NamedJudge) else one_by_one(name, judge)
        self._name = name
        self._log = log
        self._prompts = {(suite.name, prompt.id): prompt for suite in suites for prompt in suite.prompts}
        self._known = {_asked(record): _judgement(record) for record in log.records}

    def catch_up(self) -> None:
        """Judge every reply that waits, or as many as the judge manages."""
        waiting = () if self._dead else [r for r in self._log.waiting if _asked(r) not in self._passed_over]
        if not waiting:
            return
        try:
            self._judge_all(waiting)
        except JudgeError as error:
            self.failure, self._dead = self.failure or error, True
        finally:
            self._log.sync()

    def _judge_all(self, waiting: Sequence[StoredReply]) -> None:
        """Ask about every reply that is not known yet, and write each as soon as it is: in the log's order when the
        judge answers in order, at once when it does not."""
        new = list(self._first_of_each(waiting).values())
        left, answered = deque(waiting), 0
        self._write_known(left)
        for finding in self._judge.find([Case(self._prompt(reply), reply.reply) for reply in new]):
            asked = _asked(new[finding.index])
            if finding.judgement is None:
                self._pass_over(asked, finding.problem)
                continue
            answered += 1
            self._known[asked] = finding.judgement
            self._write_known(left)
            self._log.append([self._record(new[finding.index])], sync=False)
        self._log.append([self._record(reply) for reply in left if _asked(reply) in self._known], sync=False)
        self._dead = bool(new) and not answered

    def _first_of_each(self, waiting: Sequence[StoredReply]) -> dict[Asked, StoredReply]:
        """What must be asked, each question once, in order."""
        found: dict[Asked, StoredReply] = {}
        for reply in waiting:
            if _asked(reply) not in self._known:
                found.setdefault(_asked(reply), reply)
        return found

    def _pass_over(self, asked: Asked, problem: str) -> None:
        self._passed_over.add(asked)
        self.failure = self.failure or JudgeUnreachableError(f"judge '{self._name}' could not be asked: {problem}")

    def _write_known(self, left: deque[StoredReply]) -> None:
        """Write from the front what is known; a reply written before is not written again."""
        while left and _asked(left[0]) in self._known:
            self._log.append([self._record(left.popleft())], sync=False)

    def _prompt(self, reply: StoredReply) -> Prompt:
        return self._prompts[reply.suite, reply.prompt_id]

    def _record(self, reply: StoredReply) -> Record:
        prompt, judgement = self._prompt(reply), self._known[_asked(reply)]
        return Record(
            arm=reply.arm,
            suite=reply.suite,
            prompt_id=reply.prompt_id,
            split=prompt.split,
            category=prompt.category,
            reply=reply.reply,
            n_tokens=reply.n_tokens,
            verdict=judgement.verdict,
            correct=judgement.correct,
            judge=self._name,
            receipt=reply.receipt,
            same_as=reply.same_as,
            score=judgement.score,
            objective=prompt.meta.get(OBJECTIVE),
            refusal=judgement.refusal,
            helped=judgement.helped,
            ground=judgement.ground,
        )


def _judgement(record: Record) -> Judgement:
    """What the judge said when this record was written."""
    return Judgement(
        record.verdict,
        record.correct,
        score=record.score,
        refusal=record.refusal,
        helped=record.helped,
        ground=record.ground,
    )


def _asked(row: StoredReply | Record) -> Asked:
    """What the judge is shown: it never sees which arm a reply came from."""
    return (row.suite, row.prompt_id, row.reply)
