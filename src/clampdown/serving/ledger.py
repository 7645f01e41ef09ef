"""What is kept of every request: metrics, a judge's verdict on a sample of replies, and a line in the audit log.

A request is closed once: by its answer, by what refused it, or by its client's going away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clampdown.errors import RequestError
from clampdown.serving.audit import AuditLog
from clampdown.serving.intake import Job
from clampdown.serving.metrics import Metrics
from clampdown.serving.replies import Answer, Form, agreed
from clampdown.serving.requests import Done, Piece

CLIENT_WENT = 499

JudgeFn = Callable[[str, str], str]
"""(what was asked, the reply) -> verdict."""


@dataclass
class Exchange:
    """One request on its way: what has come of it, and when."""

    job: Job
    key: str
    form: Form
    answers: list[Answer]
    began: float = field(default_factory=time.perf_counter)
    first: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    closed: bool = False

    def take(self, index: int, event: Piece | Done) -> None:
        """Add what has come of one choice."""
        answer, moment = self.answers[index], time.perf_counter()
        if isinstance(event, Done):
            answer.done = event
            self.ended[index] = moment
            return
        self.first.setdefault(index, moment)
        answer.pieces.append(event.text)
        answer.tokens.extend(event.tokens)


@dataclass(frozen=True)
class Ledger:
    """Counts requests and writes them down. `judge_share` of the replies are judged; prompts are written if asked."""

    metrics: Metrics
    audit: AuditLog | None = None
    judge: JudgeFn | None = None
    judge_share: float = 1.0
    log_prompts: bool = False

    def require_audit(self) -> None:
        """A server that was told to keep a log does not answer without one. Raises `RequestError` (503)."""
        if self.audit is not None and self.audit.broken:
            self.write("retry", {})
            self.check_written()

    def check_written(self) -> None:
        """Raises `RequestError` (503) when the last line could not be written."""
        if self.audit is not None and self.audit.broken:
            raise RequestError(
                f"the audit log cannot be written ({self.audit.broken}), and nothing is answered without it",
                status=503,
                code="audit_failed",
            )

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """A line of the audit log, if there is one."""
        if self.audit is not None:
            self.audit.write(event, fields)
            self.metrics.audit_broken.set(self.audit.broken is not None)

    def close(self, exchange: Exchange, status: int, code: str | None = None) -> None:
        """Count a request and write it down. Nothing the second time."""
        if exchange.closed:
            return
        exchange.closed = True
        found = [self._kept(exchange, answer) for answer in exchange.answers if answer.done]
        self._count(exchange, status)
        self.write("request", self._line(exchange, status, code, found))

    def refuse(self, endpoint: str, key: str | None, status: int, code: str | None) -> None:
        """A request that got no further than an error."""
        self.metrics.requests.labels(endpoint, "unknown", str(status)).inc()
        self.write("request", {"endpoint": endpoint, "key": key, "status": status, "code": code})

    def _kept(self, exchange: Exchange, answer: Answer) -> dict[str, Any]:
        """What one ended choice leaves: receipt, counts, verdict."""
        done, choice = answer.done, exchange.job.choice
        assert done is not None
        prompt = exchange.job.prompt_of[answer.index]
        said = {"prompt": prompt.asked, "reply": answer.text} if self.log_prompts else {}
        self.metrics.steered(choice.name, done.receipt)
        return {
            **exchange.form.receipt(done),
            "n_prompt": done.n_prompt,
            "n_generated": done.n_generated,
            "reason": done.reason,
            "verdict": self._verdict(exchange, prompt.asked, answer),
            **said,
        }

    def _verdict(self, exchange: Exchange, asked: str, answer: Answer) -> str | None:
        """The judge's word on a reply, for a sample of replies; none for likelihoods, which have no reply."""
        if self.judge is None or exchange.job.scored or random.random() >= self.judge_share:
            return None
        verdict = self.judge(asked, answer.text)
        self.metrics.verdicts.labels(exchange.job.choice.name, verdict).inc()
        return verdict

    def _count(self, exchange: Exchange, status: int) -> None:
        metrics, job = self.metrics, exchange.job
        metrics.requests.labels(job.endpoint, job.choice.name, str(status)).inc()
        metrics.total.labels(job.endpoint).observe(time.perf_counter() - exchange.began)
        if exchange.first:
            metrics.first_token.observe(min(exchange.first.values()) - exchange.began)
        for answer in exchange.answers:
            if answer.done is not None:
                self._count_tokens(exchange, answer, answer.done)

    def _count_tokens(self, exchange: Exchange, answer: Answer, done: Done) -> None:
        tokens = self.metrics.tokens
        tokens.labels("prompt").inc(done.n_prompt)
        tokens.labels("reused").inc(done.n_reused)
        tokens.labels("generated").inc(done.n_generated)
        if done.n_generated > 1 and answer.index in exchange.first:
            seconds = exchange.ended[answer.index] - exchange.first[answer.index]
            self.metrics.per_token.observe(seconds / (done.n_generated - 1))

    def _line(self, exchange: Exchange, status: int, code: str | None, found: list[dict[str, Any]]) -> dict[str, Any]:
        job, moment = exchange.job, time.perf_counter()
        ended = [answer.index // job.n for answer in exchange.answers if answer.done]
        choices = [{"of_prompt": of, **kept} for of, kept in zip(ended, found, strict=True)]
        plan = {"plan": None if job.choice.plan is None else job.choice.name, "digest": None}
        if job.choice.plan is not None:
            plan["digest"] = job.choice.plan.digest
        first = min(exchange.first.values(), default=None)
        return {
            "id": exchange.form.id,
            "endpoint": job.endpoint,
            "key": exchange.key,
            "model": job.model,
            "status": status,
            "code": code,
            "stream": job.stream,
            "scored": job.scored,
            "raw": job.raw,
            "seconds": round(moment - exchange.began, 4),
            "first_token_seconds": None if first is None else round(first - exchange.began, 4),
            **plan,
            **(agreed(found) if found else {}),
            **({"choices": choices} if len(exchange.answers) > 1 else {}),
        }
