"""Who was steered how, as in `clampdown serve`: a line of JSON per request, and Prometheus counters beside vLLM's own.

The lines have the fields that `clampdown monitor` reads, the counters the names of the dashboard in docs/grafana.json.
A server that was told to keep a log answers nothing while it cannot be written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.errors import StoreError
from clampdown.models.loading import LanguageModel
from clampdown.serving.audit import AuditLog, calibrated_for
from clampdown.serving.metrics import Metrics
from clampdown.serving.plans import BASE
from clampdown.types import Receipt
from clampdown_vllm.book import Book
from clampdown_vllm.settings import Settings

SHOWN = ("info", "requests", "tokens", "request_seconds", "gate", "edit_norm", "tokens_touched", "audit_broken")


class _Shown:
    """The counters of this process's engine, in prometheus_client's own registry beside vLLM's: put there once, because
    it takes no name twice."""

    def __init__(self) -> None:
        self._metrics: Metrics | None = None

    def show(self, metrics: Metrics) -> None:
        from prometheus_client import REGISTRY

        first, self._metrics = self._metrics is None, metrics
        if first:
            REGISTRY.register(self)  # type: ignore[arg-type]  (has what a collector needs)

    def collect(self) -> Iterator[Any]:
        names = {f"clampdown_{name}" for name in SHOWN}
        found = self._metrics.registry.collect() if self._metrics is not None else ()
        return (family for family in found if family.name in names)


_SHOWN = _Shown()


@dataclass
class Ledger:
    """Counts requests and writes them down."""

    metrics: Metrics
    audit: AuditLog | None

    @classmethod
    def open(cls, settings: Settings, book: Book, lm: LanguageModel) -> Ledger:
        """Raises `StoreError` when the log cannot be opened."""
        metrics = Metrics(Path(lm.name).name)
        _SHOWN.show(metrics)
        audit = AuditLog(Path(settings.audit)) if settings.audit else None
        ledger = cls(metrics, audit)
        plans = {name: {"digest": plan.digest, "ranges": calibrated_for(plan)} for name, plan in book.plans.items()}
        ledger._write("start", {"model": Path(lm.name).name, "revision": lm.revision, "engine": "vllm", "plans": plans})
        return ledger

    def require(self) -> None:
        """Raises `StoreError` when the log that was asked for cannot be written."""
        if self.audit is not None and self.audit.broken:
            self._write("retry", {})
            if self.audit.broken:
                raise StoreError(
                    f"the audit log cannot be written ({self.audit.broken}): nothing is answered without it"
                )

    def close(self, began: float, request_id: str, out: Any, receipt: Mapping[str, Any] | None, written: int) -> None:
        """A request was answered."""
        plan = (receipt or {}).get("plan") or BASE
        prompt = len(out.prompt_token_ids or ())
        seconds = time.perf_counter() - began
        self.metrics.requests.labels("engine", plan, "200").inc()
        self.metrics.total.labels("engine").observe(seconds)
        for kind, n in (("prompt", prompt), ("reused", out.num_cached_tokens or 0), ("generated", written)):
            self.metrics.tokens.labels(kind).inc(n)
        if receipt is not None:
            self.metrics.steered(plan, _as_receipt(receipt))
        said = {"n_prompt": prompt, "n_generated": written, "reason": out.outputs[0].finish_reason}
        line = {"id": request_id, "endpoint": "engine", "status": 200, "seconds": round(seconds, 4)}
        self._write("request", {**line, "plan": None, "digest": None, **(receipt or {}), **said})

    def fail(self, plan: str | None, request_id: str, error: BaseException) -> None:
        """A request was refused, given up by its client, or went wrong."""
        self.metrics.requests.labels("engine", plan or BASE, "failed").inc()
        line = {"id": request_id, "endpoint": "engine", "status": 500, "code": type(error).__name__, "plan": plan}
        self._write("request", line)

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        if self.audit is not None:
            self.audit.write(event, fields)
            self.metrics.audit_broken.set(self.audit.broken is not None)


def _as_receipt(found: Mapping[str, Any]) -> Receipt:
    keys = ("plan", "tokens_touched", "edit_norm", "gate_score", "gate_fired", "branch")
    return Receipt(**{key: found[key] for key in keys})
