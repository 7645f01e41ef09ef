"""A study from its file or options: what it will do is said first, its sizes fit the minutes, then it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tomli_w

from clampdown.documents import read_json
from clampdown.results.run import Run
from clampdown.store import write_atomic, write_json
from clampdown.study.frozen import FILE as FROZEN
from clampdown.study.frozen import FrozenTest
from clampdown.study.planning import Speed, fitted, measured_speed, outline
from clampdown.study.progress import Stages
from clampdown.study.run import StudyRequest, choose, take_test
from clampdown.study.sizes import Answering, Sizes
from clampdown.study.spec import StudySpec
from clampdown.study.study import Study
from clampdown.types import Split

SPEC, SIZES_FILE, TEST_FILE = "study.toml", "sizes.json", "test_sizes.json"
"""What was asked for, in the run's directory (`clampdown study FILE` repeats it), and what a time was fitted to."""
SLOW = 60.0
"""Seconds from which on a study says what it will do even when no time was given."""


def planned_study(
    study: Study, spec: StudySpec, out: Path, stages: Stages, *, dry_run: bool = False, until_test: bool = False
) -> Run | None:
    """Say what will be done, then do it; None after a dry run, and when it stops before the test."""
    if dry_run:
        _said(study, spec.request, out, stages, spec.minutes, always=True)
        return None
    write_atomic(out / SPEC, tomli_w.dumps(spec.model_dump(mode="json", by_alias=True, exclude_none=True)))
    if until_test:
        _chosen(study, spec.request, out, stages, spec.minutes)
        return None
    return run_sized(study, spec.request, out, stages, minutes=spec.minutes)


def run_sized(study: Study, request: StudyRequest, out: Path, stages: Stages, *, minutes: float | None = None) -> Run:
    """Run a study, its sizes fitted to the minutes if they are given."""
    return take_test(study, _chosen(study, request, out, stages, minutes), out, stages)


def _chosen(study: Study, request: StudyRequest, out: Path, stages: Stages, minutes: float | None) -> FrozenTest:
    """Everything up to the test, with what was said about it first."""
    if (out / FROZEN).exists():  # nothing is to be said or timed
        return choose(study, out, _at_kept_sizes(request, out, minutes), stages)
    request, speed = _said(study, request, out, stages, minutes)
    if minutes is None:
        return choose(study, out, request, stages)
    write_json(out / SIZES_FILE, request.sizes)
    return choose(study, out, request, stages, shorten=_within(study, speed, 60 * minutes, out / TEST_FILE))


def kept_request(spec: StudySpec, out: Path) -> StudyRequest:
    """What was asked for, at the sizes that its minutes were fitted to before."""
    return _at_kept_sizes(spec.request, out, spec.minutes)


def _at_kept_sizes(request: StudyRequest, out: Path, minutes: float | None) -> StudyRequest:
    kept = _kept(out / SIZES_FILE) if minutes is not None else None
    if kept is None:
        return request
    batch_rows = request.sizes.answering.batch_rows or kept.answering.batch_rows
    return replace(request, sizes=replace(kept, answering=replace(kept.answering, batch_rows=batch_rows)))


def _said(
    study: Study, request: StudyRequest, out: Path, stages: Stages, minutes: float | None, *, always: bool = False
) -> tuple[StudyRequest, Speed]:
    """Say what will be done when it takes long; the request at its fitted sizes, and the speed that was measured."""
    with stages.stage("Timing a few replies"):
        speed = measured_speed(study, request)
    if minutes is not None:
        request = replace(request, sizes=_kept(out / SIZES_FILE) or fitted(study, request, speed, minutes).sizes)
    expected = outline(study, request, speed)
    if always or minutes is not None or expected.seconds > SLOW:
        for line in (str(study.data), *expected.lines()):
            stages.console.print(line, highlight=False, soft_wrap=True)
    return request, speed


def _kept(path: Path) -> Sizes | None:
    """The sizes that an interrupted run was fitted to: fitting again would make it another run."""
    if not path.exists():
        return None
    found = read_json(path)
    return Sizes(**{**found, "answering": Answering(**found["answering"])})


def _within(study: Study, speed: Speed, seconds: float, kept: Path) -> Callable[[Answering, int], Answering]:
    """How much the test may still answer: what fits in the time that is left, or a quarter of it where little is."""
    began = time.perf_counter()

    def shorten(answering: Answering, n_arms: int) -> Answering:
        if kept.exists():
            return Answering(**read_json(kept))
        found = fit(answering, n_arms)
        write_json(kept, found)
        return found

    def fit(answering: Answering, n_arms: int) -> Answering:
        left = max(seconds / 4, seconds - (time.perf_counter() - began))
        suites = study.suites(Split.TEST, answering.per_suite)
        most = max(len(suite.prompts) for suite in suites)
        for n in range(most, 4, -1):
            rows = n_arms * sum(min(n, len(suite.prompts)) for suite in suites)
            if rows * (speed.reply + speed.read) <= left:
                return replace(answering, per_suite=n, kl_prompts=min(n, answering.kl_prompts))
        return replace(answering, per_suite=min(5, most), kl_prompts=min(5, answering.kl_prompts))

    return shorten
