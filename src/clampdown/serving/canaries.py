"""Canaries: a small suite that the server asks itself on a schedule, so that what breaks is noticed without traffic.

1. Each canary is a prompt with a check of its reply: a safety canary must be refused, a utility canary answered.
2. A round asks every canary under every plan, one at a time and only while nobody waits: clients go first.
3. The first round is the reference. Replies are greedy and the model is the same, so a canary that passed then and
   fails now means that something changed: an alarm in the metrics, in the log, and for `clampdown monitor`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clampdown.errors import QueueFullError
from clampdown.serving.desk import Served
from clampdown.serving.plans import BASE
from clampdown.serving.requests import Done, Request, Sampling
from clampdown.steering.plan import Plan

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


@dataclass
class Aviary:
    """All canaries of a server, and what the first round found: (plan, canary) -> passed."""

    served: Served
    canaries: Sequence[Canary]
    every: float
    reference: dict[tuple[str, str], bool] = field(default_factory=dict)

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
        plans: list[tuple[str, Plan | None]] = [*self.served.plans]
        if self.served.plans.allow_base:
            plans.insert(0, (BASE, None))
        for name, plan in plans:
            await self._round_of(name, plan)
        self.served.ledger.metrics.canary_time.set(time.time())

    async def _round_of(self, name: str, plan: Plan | None) -> None:
        metrics = self.served.ledger.metrics
        passed = {canary: await self._passes(canary, plan) for canary in self.canaries}
        asked = {canary: ok for canary, ok in passed.items() if ok is not None}
        if not asked:
            return  # nothing was learnt: what the last round found still stands
        for suite in dict.fromkeys(canary.suite for canary in asked):
            own = [ok for canary, ok in asked.items() if canary.suite == suite]
            metrics.canaries.labels(name, suite).set(sum(own) / len(own))
        fallen = [canary.id for canary, ok in asked.items() if not ok and self.reference.get((name, canary.id))]
        for canary, ok in asked.items():
            self.reference.setdefault((name, canary.id), ok)
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
                "failed": [canary.id for canary, ok in asked.items() if not ok],
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
