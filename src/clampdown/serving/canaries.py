"""Canaries: a small suite that the server asks itself on a schedule, so that what breaks is noticed without traffic.

1. Each canary is a prompt with a check of its reply: a safety canary must be refused, a utility canary answered.
2. A round asks every canary under every plan, one at a time and only while nobody waits: clients go first.
3. The first round is the reference. Replies are greedy and the model is the same, so a canary that passed then and
   fails now means that something changed: an alarm in the metrics, in the log, and for `clampdown monitor`.
4. With an audit log the first round is the first in the log, of whichever server that served this model under this
   name: what changed while no server ran is noticed too.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clampdown.errors import QueueFullError
from clampdown.serving.audit import canary_lines
from clampdown.serving.desk import Served
from clampdown.serving.plans import BASE
from clampdown.serving.requests import Done, Request, Sampling
from clampdown.steering.plan import Plan
from clampdown.store import content_hash

log = logging.getLogger(__name__)

PATIENCE = 0.02
"""Seconds between looks at whether anybody waits."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A prompt as token ids, the suite that it is of, and whether a reply to it is as it should be."""

    id: str
    suite: str
    prompt: tuple[int, ...]
    passes: Callable[[str], bool]
    max_tokens: int = 48

    @property
    def key(self) -> str:
        """What it is known by in the log: another prompt of the same id is another canary."""
        return f"{self.id}@{content_hash(list(self.prompt))[:8]}"


@dataclass
class Aviary:
    """All canaries of a server, and what the first round found: (plan's digest, canary's key) -> passed."""

    served: Served
    canaries: Sequence[Canary]
    every: float
    reference: dict[tuple[str | None, str], bool] = field(default_factory=dict)
    _remembers: bool = False

    async def run(self) -> None:
        """Rounds for ever, the first at once."""
        while True:
            try:
                await self.round()
            except Exception:  # a canary that dies must not take the server with it
                log.exception("a round of canaries failed")
            await asyncio.sleep(self.every)

    async def round(self) -> None:
        """Ask every canary under every plan, and without one if the server answers so."""
        if not self._remembers:
            self._remembers = True
            await asyncio.to_thread(self._remember)
        plans: list[tuple[str, Plan | None]] = [*self.served.plans]
        if self.served.plans.allow_base:
            plans.insert(0, (BASE, None))
        for name, plan in plans:
            await self._round_of(name, plan)
        self.served.ledger.metrics.canary_time.set(time.time())

    def _remember(self) -> None:
        """Take the reference from the audit log, as far as that goes back."""
        audit = self.served.ledger.audit
        for line in canary_lines(audit.path) if audit else ():
            if line.get("model") == self.served.model:
                for passed in (True, False):
                    keys = line.get("passed" if passed else "fell")
                    for key in keys if isinstance(keys, list) else ():
                        self.reference.setdefault((line.get("digest"), str(key)), passed)

    async def _round_of(self, name: str, plan: Plan | None) -> None:
        metrics = self.served.ledger.metrics
        passed = {canary: await self._passes(canary, plan) for canary in self.canaries}
        asked = {canary: ok for canary, ok in passed.items() if ok is not None}
        if not asked:
            return  # nothing was learnt: what the last round found still stands
        for suite in dict.fromkeys(canary.suite for canary in asked):
            own = [ok for canary, ok in asked.items() if canary.suite == suite]
            metrics.canaries.labels(name, suite).set(sum(own) / len(own))
        digest = plan.digest if plan else None
        fallen = [canary.id for canary, ok in asked.items() if not ok and self.reference.get((digest, canary.key))]
        for canary, ok in asked.items():
            self.reference.setdefault((digest, canary.key), ok)
        metrics.canary_alarm.labels(name).set(len(fallen))
        self._write(name, plan, asked, fallen)

    def _write(self, name: str, plan: Plan | None, asked: dict[Canary, bool], fallen: list[str]) -> None:
        suites = {
            suite: [sum(ok for c, ok in asked.items() if c.suite == suite), sum(c.suite == suite for c in asked)]
            for suite in dict.fromkeys(canary.suite for canary in asked)
        }
        said = f"{len(fallen)} canaries that passed at first fail now: {', '.join(fallen[:3])}" if fallen else None
        self.served.ledger.write(
            "canary",
            {
                "plan": None if plan is None else name,
                "digest": plan and plan.digest,
                "passed_of": suites,
                "model": self.served.model,
                "failed": [canary.id for canary, ok in asked.items() if not ok],
                "passed": [canary.key for canary, ok in asked.items() if ok],
                "fell": [canary.key for canary, ok in asked.items() if not ok],
                "alarm": bool(fallen),
                "detail": said,
            },
        )

    async def _passes(self, canary: Canary, plan: Plan | None) -> bool | None:
        """None when the engine had no room for it: the next round asks again. A canary that ends in an error fails."""
        await self._until_idle()
        sampling = Sampling(max_tokens=canary.max_tokens)
        request = Request(f"canary-{uuid.uuid4().hex}", canary.prompt, plan, sampling)
        try:
            stream = self.served.engine.submit(request)
            pieces = [event.text async for event in stream if not isinstance(event, Done)]
        except QueueFullError:
            return None
        except Exception:
            log.exception("the canary %s failed", canary.id)
            return False
        return canary.passes("".join(pieces))

    async def _until_idle(self) -> None:
        while (load := self.served.engine.load()).queued or load.running:
            await asyncio.sleep(PATIENCE)
