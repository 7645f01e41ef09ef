"""What Prometheus sees of a server: one registry per server, labels from the server's own table of plans only.

A label never holds what a client wrote: an inline edit is "inline", an unknown model "unknown", so the number of series
is bounded.
"""

from __future__ import annotations

from typing import Any

from clampdown.config import CODE_VERSION
from clampdown.extras import extra
from clampdown.serving.requests import Load
from clampdown.types import Receipt

with extra("serve", "the server"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_NORMS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """The server's counters. Families are named once, here; the dashboard's queries are tested against them."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        info = Gauge("clampdown_info", "Version and model; always 1.", ["version", "model"], **own)
        info.labels(CODE_VERSION, model).set(1)
        self.requests = Counter("clampdown_requests", "HTTP requests by status.", ["endpoint", "plan", "status"], **own)
        self.tokens = Counter("clampdown_tokens", "Tokens: prompt, reused (of those), generated.", ["kind"], **own)
        self.first_token = Histogram(
            "clampdown_first_token_seconds", "From the request to its first text.", buckets=_SECONDS, **own
        )
        self.per_token = Histogram(
            "clampdown_token_seconds", "Between tokens, per request.", buckets=_TOKEN_SECONDS, **own
        )
        self.total = Histogram(
            "clampdown_request_seconds", "From the request to its end.", ["endpoint"], buckets=_SECONDS, **own
        )
        self.queued = Gauge("clampdown_queue", "Requests that wait for a place in the batch.", **own)
        self.running = Gauge("clampdown_running", "Requests in the batch.", **own)
        self.gate = Counter("clampdown_gate", "Verdicts of gates.", ["plan", "branch"], **own)
        self.edit_norm = Histogram(
            "clampdown_edit_norm", "Mean ||x'-x||/||x|| over the tokens touched.", ["plan"], buckets=_NORMS, **own
        )
        self.touched = Counter("clampdown_tokens_touched", "Token positions that steering changed.", ["plan"], **own)
        self.verdicts = Counter(
            "clampdown_verdicts", "Verdicts of the learned judge on a sample of replies.", ["plan", "verdict"], **own
        )
        self.canaries = Gauge(
            "clampdown_canary_pass_ratio", "Share of canaries that passed last time.", ["plan", "suite"], **own
        )
        self.canary_alarm = Gauge(
            "clampdown_canary_alarm", "Canaries that passed at first and fail now.", ["plan"], **own
        )
        self.canary_time = Gauge("clampdown_canary_timestamp_seconds", "When canaries ended last.", **own)
        self.audit_broken = Gauge("clampdown_audit_broken", "1 while the audit log cannot be written.", **own)

    def exposition(self, load: Load) -> bytes:
        """The text that Prometheus reads."""
        self.queued.set(load.queued)
        self.running.set(load.running)
        return generate_latest(self.registry)

    def steered(self, plan: str, receipt: Receipt | None) -> None:
        """Count what steering did to one reply."""
        if receipt is None:
            return
        if receipt.gate_fired is not None:
            branch = receipt.branch or ("edits" if receipt.gate_fired else "none")
            self.gate.labels(plan, branch).inc()
        self.touched.labels(plan).inc(receipt.tokens_touched)
        if receipt.tokens_touched:
            self.edit_norm.labels(plan).observe(receipt.edit_norm)
