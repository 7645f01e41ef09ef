"""Monitoring: rates with intervals, alarms that mean something, and logs that were cut."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from scipy.stats import binom
from typer.testing import CliRunner

from clampdown.cli.main import app
from clampdown.commands import monitor as job
from clampdown.errors import ClampdownError
from clampdown.organism import PLANS_DIR
from clampdown.serving.audit import AuditLog, Line, calibrated_for, parse_range, read_lines
from clampdown.serving.metrics import Metrics
from clampdown.serving.monitor import Watch, at_least, at_most, stamp, windows
from clampdown.steering.plan import read_plan

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
START = {"event": "start", "plans": {"gated": {"digest": "d", "ranges": {"gate": [None, 0.02]}}, "free": {}}}


def request(fired: bool | None, verdict: str | None = "complied", plan: str = "gated", **more: Any) -> dict[str, Any]:
    found = {"event": "request", "id": "x", "plan": plan, "status": 200, "gate_fired": fired, "verdict": verdict}
    return found | {"tokens_touched": 3 if fired else 0, "edit_norm": 0.5 if fired else 0.0} | more


def write(path: Path, events: list[dict[str, Any]], minutes: float = 0.1) -> Path:
    """Events at a steady pace from noon."""
    moments = [NOON + timedelta(minutes=minutes * i) for i in range(len(events))]
    lines = [{"v": 1, "time": moment.isoformat()} | event for moment, event in zip(moments, events, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rates_are_counted_per_window_and_plan_with_wilson_s_intervals(tmp_path: Path) -> None:
    events = [START, *[request(i % 4 == 0, "refused" if i % 2 else "complied") for i in range(40)]]
    events += [request(None, None, plan="free"), request(None, "refused", plan=None)]  # type: ignore[arg-type]
    found = job.read(job.Request(write(tmp_path / "log", events, minutes=1), seconds=1800))
    first, second, *others = [window for window in found.windows]
    assert [(w.plan, w.requests) for w in (first, second)] == [("gated", 29), ("base", 1)]
    gate = first.rates["gate"].interval
    assert (gate.n, gate.value) == (29, pytest.approx(8 / 29))
    assert gate.low == pytest.approx(0.1470, abs=1e-3) and gate.high == pytest.approx(0.4572, abs=1e-3)
    assert first.edit_norm == pytest.approx(0.5)
    assert sum(window.requests for window in found.windows) == 42
    assert {window.plan for window in others} == {"gated", "free"}


@pytest.mark.parametrize(("k", "n", "p"), [(0, 10, 0.02), (3, 10, 0.02), (10, 10, 0.5), (5, 500, 0.02), (2, 3, 0.0)])
def test_tails_are_those_of_the_binomial_distribution(k: int, n: int, p: float) -> None:
    assert at_least(k, n, p) == pytest.approx(float(binom.sf(k - 1, n, p)), abs=1e-12)
    assert at_most(k, n, p) == pytest.approx(float(binom.cdf(k, n, p)), abs=1e-12)


def test_an_alarm_is_raised_when_the_gate_fires_more_than_it_was_calibrated_for(tmp_path: Path) -> None:
    quiet = [START, *[request(i == 7) for i in range(100)]]
    assert job.read(job.Request(write(tmp_path / "quiet", quiet))).alarms == []
    loud = [START, *[request(i % 10 == 0) for i in range(100)]]
    (alarm,) = job.read(job.Request(write(tmp_path / "loud", loud))).alarms
    assert "gated" in alarm and "10 of 100" in alarm and "at most 2.00%" in alarm
    assert job.read(job.Request(tmp_path / "loud", expected=("gate=0-0.2",))).alarms == []


def test_a_log_at_the_edge_of_its_range_rarely_raises_a_false_alarm() -> None:
    """The promise of the method: at most 5 % over all windows, however many. 40 logs of 12 windows of 20 requests."""
    rng, false = Random(0), 0
    for _ in range(40):
        fired = [rng.random() < 0.02 for _ in range(240)]
        lines = [Line(i, request(f) | {"time": stamp(NOON + timedelta(minutes=3 * i))}) for i, f in enumerate(fired)]
        false += any(window.alarms for window in windows(lines, Watch(3600, {"gate": (None, 0.02)})))
    assert false <= 4  # a binomial(40, 0.05) is above that with a probability of 5 %; exact tails make it rarer


def test_rates_may_be_too_low_and_canaries_count(tmp_path: Path) -> None:
    events = [START, *[request(False, "complied") for _ in range(60)]]
    (alarm,) = job.read(job.Request(write(tmp_path / "low", events), expected=("refusal=0.2-",))).alarms
    assert "refused were 0 of 60" in alarm and "at least 20.00%" in alarm
    fallen = {
        "event": "canary",
        "plan": "gated",
        "alarm": True,
        "detail": "1 canaries that passed at first fail now: a",
    }
    (alarm,) = job.read(job.Request(write(tmp_path / "canary", [START, fallen]))).alarms
    assert alarm.endswith("fail now: a")


def test_choices_of_one_prompt_count_once_and_likelihoods_have_no_verdict(tmp_path: Path) -> None:
    """One stray prompt never alarms, however many choices of it were asked for: they all have its gate."""
    stray = [request(True, verdict, of_prompt=0) for verdict in (None, "refused", "complied", "complied")]
    others = [request(False, None, of_prompt=prompt) for prompt in (1, 2)]
    found = job.read(job.Request(write(tmp_path / "log", [START, request(None, None, choices=stray + others)])))
    gate, refusal = found.windows[0].rates["gate"], found.windows[0].rates["refusal"]
    assert (gate.successes, gate.n, refusal.successes, refusal.n) == (1, 3, 1, 1)
    assert found.alarms == []


def test_what_a_plan_does_otherwise_is_no_trigger_of_its_gate(tmp_path: Path) -> None:
    """A receipt's `gate_fired` is true for either branch of a two-sided plan; the range is the first gate's."""
    events = [request(True, branch="otherwise" if i % 30 else "edits") for i in range(60)]
    found = job.read(job.Request(write(tmp_path / "log", [START, *events])))
    gate = found.windows[0].rates["gate"]
    assert (gate.successes, gate.n) == (2, 60) and found.alarms == []


def test_two_edges_of_a_range_share_the_error() -> None:
    """2 of 10 have a tail of 0.016 at 2 %: below the first test's 0.025, above half of it."""
    lines = [Line(i, request(i < 2) | {"time": stamp(NOON)}) for i in range(10)]

    def alarms(low: float | None, high: float | None) -> int:
        return sum(len(window.alarms) for window in windows(lines, Watch(3600, {"gate": (low, high)})))

    assert (alarms(None, 0.02), alarms(0.0, 0.02), alarms(0.01, 0.02)) == (1, 1, 0)


def test_a_window_is_tested_once_when_it_has_ended(tmp_path: Path) -> None:
    """Who looked at a growing window every minute would test it as often, and be wrong more often than promised."""
    lines = [Line(i, request(True) | {"time": stamp(NOON)}) for i in range(10)]
    watch = {"gate": (None, 0.02)}
    (early,) = windows(lines, Watch(3600, watch), NOON + timedelta(minutes=59))
    (late,) = windows(lines, Watch(3600, watch), NOON + timedelta(minutes=60))
    assert (early.ended, early.alarms, late.ended, len(late.alarms)) == (False, (), True, 1)
    fresh = [{"v": 1, "time": datetime.now(UTC).isoformat()} | event for event in (START, request(True))]
    log = write(tmp_path / "log", [START, *[request(True) for _ in range(20)]])
    log.write_text(log.read_text() + "".join(json.dumps(event) + "\n" for event in fresh))
    last = job.read(job.Request(log, seconds=86400, last=1))
    assert [w.ended for w in last.windows] == [True, False] and len(last.alarms) == 1


def test_the_command_line_says_alarm_and_exits_with_1(tmp_path: Path) -> None:
    log = write(tmp_path / "log", [START, *[request(True) for _ in range(20)]])
    run = CliRunner().invoke(app, ["monitor", str(log)])
    assert run.exit_code == 1 and "alarm: 2026-01-01T12:00:00Z gated: the gate fired on 20 of 20" in run.stderr
    as_json = CliRunner().invoke(app, ["monitor", str(log), "--json", "--last", "1"])
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == 1 and len(found["alarms"]) == 1
    assert found["windows"][0]["gate"] == {
        "successes": 20,
        "n": 20,
        "rate": 1.0,
        "low": pytest.approx(0.8389, abs=1e-3),
        "high": 1.0,
        "expected": [None, 0.02],
    }
    assert CliRunner().invoke(app, ["monitor", str(log), "--expect", "gate=0.5-1"]).exit_code == 0


@pytest.mark.parametrize("wrong", ["--window=1x", "--expect=gate=2-3", "--expect=what=0-1", "--window=0s"])
def test_what_means_nothing_is_named(tmp_path: Path, wrong: str) -> None:
    run = CliRunner().invoke(app, ["monitor", str(write(tmp_path / "log", [START])), wrong])
    assert isinstance(run.exception, ClampdownError)
    assert isinstance(CliRunner().invoke(app, ["monitor", str(tmp_path / "none")]).exception, ClampdownError)


def test_cut_lines_are_counted_and_ended_by_the_next_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b'{"v": 1, "event": "request", "time": "2026-01-01T12:00:00Z"}\n{"v": 1, "eve')
    assert len(list(read_lines(log))) == 1, "a line that is being written is left for later"
    audit = AuditLog(log)
    audit.write("start", {"plans": {}})
    audit.close()
    assert [line.fields and line.fields["event"] for line, _ in read_lines(log)] == ["request", None, "start"]
    found = job.read(job.Request(log))
    assert (found.lines, found.cut) == (3, 1)


def test_following_sees_lines_as_they_come(tmp_path: Path) -> None:
    log, waits = tmp_path / "log", 0
    log.write_text("")

    def wait(_: float) -> None:
        nonlocal waits
        waits += 1
        write(log, [START, *[request(True) for _ in range(20 * waits)]], minutes=1)

    found = job.follow(job.Request(log, seconds=600), 1.0, wait)
    first = next(found)
    assert (first.plan, first.requests, len(first.alarms)) == ("gated", 9, 1)
    assert next(found).requests == 10


def test_ranges_come_from_guarantees_and_provenance() -> None:
    plan = read_plan(PLANS_DIR / "clamp-352-gated.toml")
    assert calibrated_for(plan)["gate"] == [None, 0.02]
    stated = plan.model_copy(update={"provenance": {"expected_gate_rate": "0.1-0.3", "expected_refusal_rate": "-0.5"}})
    assert calibrated_for(stated) == {"gate": [0.1, 0.3], "refusal": [None, 0.5]}
    assert plan.gate and plan.gate.guarantee
    about_harm = plan.gate.guarantee.model_copy(update={"on": "harmful"})
    down = plan.model_copy(update={"gate": plan.gate.model_copy(update={"guarantee": about_harm})})
    assert calibrated_for(down) == {}, "what harmful prompts rarely do, benign ones may do often"
    for wrong in ("", "0.5", "0.5-0.1", "-", "a-b", "-2"):
        with pytest.raises(ClampdownError):
            parse_range(wrong)


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    named = {name for expr in asked for name in re.findall(r"clampdown_\w+", expr)}
    families = list(Metrics("organism").registry.collect())
    types = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    known = {family.name + suffix for family in families for suffix in types[family.type]}
    assert named <= known, named - known
    assert {family.name for family in families} - {"clampdown_info"} <= {
        name.removesuffix(suffix) for name in named for suffix in ("_total", "_bucket", "_sum", "_count", "")
    }, "every family has a panel"
    labels = {label for expr in asked for label in re.findall(r"by \(([^)]*)\)", expr)}
    assert labels <= {"plan", "status", "kind", "le", "plan, branch", "plan, suite", "plan, verdict", "endpoint"}
