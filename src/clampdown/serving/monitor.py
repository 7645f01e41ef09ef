"""What an audit log says over time: rates per window and plan with their intervals, and when they have left the range
that the plan was calibrated for.

1. A window holds the requests of one plan in one stretch of time. Its rates are how often the gate fired (that of the
   plan's own edits, for which ranges are) and how often replies were refused, among those that had a gate or a verdict,
   with Wilson's intervals. Choices of one prompt are no independent draws: the first of them counts.
2. A rate has left its range when what was seen would be too unlikely at the range's nearest edge (exact binomial
   tail). "Too unlikely" is ALPHA / (k (k + 1)) for the k-th test of a log, half of it at each edge of a range that has
   two: these add up to ALPHA, so that a log that goes on for ever raises a false alarm with at most that probability.
   A window is tested once, when it has ended: who looks often would otherwise test often.
3. Ranges stand in the log itself, in the server's lines of `event` "start"; a plan without one is shown, not tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from clampdown.serving.audit import Line
from clampdown.types import Interval

ALPHA = 0.05
BASE = "base"
ERRORS = "(errors)"  # no plan can be called that
RATES = ("gate", "refusal")
_SAID = {"gate": "the gate fired on", "refusal": "refused were"}

Range = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class Rate:
    """One rate of one window. `expected` None: there is no range to test it against."""

    successes: int
    n: int
    expected: Range | None

    @property
    def interval(self) -> Interval:
        return Interval.of_rate(self.successes, self.n)


@dataclass(frozen=True, slots=True)
class Window:
    """One plan's requests in one stretch of time. `alarms` are sentences."""

    begin: datetime
    seconds: float
    plan: str
    requests: int
    failed: int
    edit_norm: float | None
    rates: Mapping[str, Rate]
    alarms: tuple[str, ...]
    ended: bool = True

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rates = {
            name: {
                "successes": rate.successes,
                "n": rate.n,
                "rate": rate.interval.value,
                "low": rate.interval.low,
                "high": rate.interval.high,
                "expected": rate.expected,
            }
            for name, rate in self.rates.items()
        }
        return {
            "begin": stamp(self.begin),
            "seconds": self.seconds,
            "ended": self.ended,
            "plan": self.plan,
            "requests": self.requests,
            "failed": self.failed,
            "edit_norm": self.edit_norm,
            **rates,
            "alarms": list(self.alarms),
        }


@dataclass
class _Tally:
    """Running counts of one plan in the open window."""

    requests: int = 0
    failed: int = 0
    norms: list[float] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in RATES})
    canaries: list[str] = field(default_factory=list)

    def add(self, fields: Mapping[str, Any]) -> None:
        self.requests += 1
        self.failed += int(fields.get("status") or 0) >= 500
        counted: set[tuple[str, Any]] = set()
        for reply in fields.get("choices") or [fields]:
            if reply.get("tokens_touched") and isinstance(reply.get("edit_norm"), float):
                self.norms.append(reply["edit_norm"])
            for name, found in (("gate", _gate_acted(reply)), ("refusal", _refused(reply))):
                which = (name, reply.get("of_prompt"))
                if found is not None and which not in counted:
                    counted.add(which)
                    self.counts[name][0] += found
                    self.counts[name][1] += 1


class Watch:
    """Reads a log line by line; gives windows as they end. `expected` goes before the log's own ranges, by rate."""

    def __init__(self, seconds: float, expected: Mapping[str, Range] | None = None, plan: str | None = None) -> None:
        self.seconds = seconds
        self.lines = self.cut = 0
        self._expected = dict(expected or {})
        self._only = plan
        self._ranges: dict[str, dict[str, Range]] = {}
        self._index: int | None = None
        self._open: dict[str, _Tally] = {}
        self._tests = 0

    def feed(self, line: Line) -> list[Window]:
        """The windows that this line ends."""
        self.lines += 1
        moment = None if line.fields is None else _moment(line.fields.get("time"))
        if line.fields is None or moment is None:
            self.cut += 1
            return []
        ended = self.at(moment)
        if self._index is None:
            self._index = self._window_of(moment)
        self._take(line.fields)
        return ended

    def at(self, moment: datetime) -> list[Window]:
        """The windows that have ended by this moment."""
        if self._index is None or self._window_of(moment) <= self._index:
            return []
        return self.close()

    def close(self, *, ended: bool = True) -> list[Window]:
        """Give the open window now; one that has not ended is shown, not tested."""
        if self._index is None:
            return []
        begin = datetime.fromtimestamp(self._index * self.seconds, UTC)
        found = [self._window(begin, plan, tally, ended) for plan, tally in sorted(self._open.items())]
        self._open, self._index = {}, None
        return found

    def _window_of(self, moment: datetime) -> int:
        return math.floor(moment.timestamp() / self.seconds)

    def _take(self, fields: Mapping[str, Any]) -> None:
        event = fields.get("event")
        if event == "start" and isinstance(fields.get("plans"), dict):
            self._ranges = {plan: _ranges(about) for plan, about in fields["plans"].items()}
        plan = str(fields.get("plan") or BASE)
        if event == "request" and "id" not in fields:
            plan = ERRORS  # what got no further than an error has no plan
        if self._only not in (None, plan):
            return
        if event == "request":
            self._open.setdefault(plan, _Tally()).add(fields)
        elif event == "canary" and fields.get("alarm"):
            said = str(fields.get("detail") or "a canary that passed at first fails now")
            self._open.setdefault(plan, _Tally()).canaries.append(said)

    def _window(self, begin: datetime, plan: str, tally: _Tally, ended: bool) -> Window:
        rates, alarms = {}, list(tally.canaries)
        for name in RATES:
            successes, n = tally.counts[name]
            rates[name] = Rate(successes, n, self._range(plan, name))
            alarms += self._tested(name, rates[name]) if ended else []
        norm = sum(tally.norms) / len(tally.norms) if tally.norms else None
        return Window(begin, self.seconds, plan, tally.requests, tally.failed, norm, rates, tuple(alarms), ended)

    def _range(self, plan: str, name: str) -> Range | None:
        return self._expected.get(name, self._ranges.get(plan, {}).get(name))

    def _tested(self, name: str, rate: Rate) -> list[str]:
        """A sentence if the rate has left its range."""
        if rate.expected is None or rate.n == 0:
            return []
        self._tests += 1
        low, high = rate.expected
        edges = 2 if low and high is not None and high < 1 else 1  # nothing is below 0 or above 1
        limit = ALPHA / (self._tests * (self._tests + 1)) / edges
        said = f"{_SAID[name]} {rate.successes} of {rate.n} ({_percent(rate.interval)})"
        if high is not None and at_least(rate.successes, rate.n, high) < limit:
            return [f"{said}; calibrated for at most {high:.2%}"]
        if low is not None and at_most(rate.successes, rate.n, low) < limit:
            return [f"{said}; calibrated for at least {low:.2%}"]
        return []


def windows(lines: Iterable[Line], watch: Watch, now: datetime | None = None) -> list[Window]:
    """Every window of a log as it is at a moment: the last may not have ended."""
    found = [window for line in lines for window in watch.feed(line)]
    return found + watch.at(now or datetime.now(UTC)) + watch.close(ended=False)


def _gate_acted(reply: Mapping[str, Any]) -> bool | None:
    """Whether the gate of a plan's own edits opened; None without a gate. `gate_fired` alone would count the branch
    `otherwise` too, whose gate makes other promises."""
    if reply.get("gate_fired") is None:
        return None
    return reply["branch"] == "edits" if reply.get("branch") is not None else bool(reply["gate_fired"])


def _refused(reply: Mapping[str, Any]) -> bool | None:
    verdict = reply.get("verdict")
    return None if verdict is None else verdict == "refused"


def at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) for a binomial X."""
    return min(1.0, math.fsum(_pmf(i, n, p) for i in range(k + 1)))


def at_least(k: int, n: int, p: float) -> float:
    """P(X >= k) for a binomial X, summed where it is small."""
    return min(1.0, math.fsum(_pmf(i, n, p) for i in range(k, n + 1)))


def _pmf(k: int, n: int, p: float) -> float:
    if p in (0.0, 1.0):
        return float(k == n * p)
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))


def stamp(moment: datetime) -> str:
    """A moment as the log writes it, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _percent(interval: Interval) -> str:
    assert interval.value is not None and interval.low is not None and interval.high is not None
    return f"{interval.value:.1%}, 95 %: {interval.low:.1%}-{interval.high:.1%}"


def _ranges(about: Any) -> dict[str, Range]:
    found = about.get("ranges", {}) if isinstance(about, dict) else {}
    return {str(name): (bounds[0], bounds[1]) for name, bounds in found.items() if len(bounds) == 2}


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
