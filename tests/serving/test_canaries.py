"""Canaries: asked of the real server, and an alarm when one that passed fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clampdown.commands.canaries import canaries
from clampdown.commands.serve import Options, background, open_server
from clampdown.organism import PLANS_DIR
from clampdown.serving.audit import read_lines
from clampdown.serving.canaries import Aviary, Canary
from clampdown.serving.desk import Served
from clampdown.study.progress import Stages


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    audit = tmp_path_factory.mktemp("canaries") / "audit.jsonl"
    return open_server(
        Options(audit=audit, inline=None, plans=(PLANS_DIR / "clamp-352-gated.toml",)), Stages(Console(quiet=True))
    )


def rounds(aviary: Aviary, *between: object) -> None:
    """As many rounds as there are things to do before them."""

    async def run() -> None:
        await aviary.served.engine.start()
        try:
            for act in between:
                if callable(act):
                    act()
                await aviary.round()
        finally:
            await aviary.served.engine.stop(drain_seconds=1)

    asyncio.run(run())


def test_the_gated_plan_passes_and_a_changed_reply_is_an_alarm(served: Served) -> None:
    birds = [replace(bird, max_tokens=24) for bird in canaries(served.lm, "organism", None)][::4]
    assert {bird.suite for bird in birds} == {"harmful", "jailbroken_seen", "benign", "facts"}
    aviary = Aviary(served, birds, every=60)

    def spoil() -> None:
        """From now on the harmful canary's reply does not count as a refusal."""
        (index,) = [i for i, bird in enumerate(birds) if bird.suite == "harmful"]
        birds[index] = replace(birds[index], passes=lambda _: False)

    rounds(aviary, None, spoil)
    assert served.ledger.audit is not None
    lines = [line.fields for line, _ in read_lines(served.ledger.audit.path) if line.fields]
    found = [line for line in lines if line["event"] == "canary"]
    first, second = found[:2], found[2:]
    assert not any(line["alarm"] for line in first)
    gated = next(line for line in first if line["plan"] == "clamp-352-gated")
    assert {suite: passed == of for suite, (passed, of) in gated["passed_of"].items()} == dict.fromkeys(
        ("harmful", "jailbroken_seen", "benign", "facts"), True
    )
    assert [line["alarm"] for line in second] == [True] * 2, "the harmful canary was refused with and without the plan"
    metrics = served.ledger.metrics.exposition(served.engine.load()).decode()
    assert 'clampdown_canary_alarm{plan="clamp-352-gated"} 1.0' in metrics
    assert 'clampdown_canary_pass_ratio{plan="clamp-352-gated",suite="facts"} 1.0' in metrics


def test_a_canary_that_ends_in_an_error_has_failed(served: Served) -> None:
    """An error is what a canary is for; only a full queue says nothing about the reply."""
    bird = replace(canaries(served.lm, "organism", None)[0], max_tokens=1, passes=lambda _: True)
    aviary = Aviary(served, [bird], every=60)

    def break_it() -> None:
        engine._context = 1  # no prompt fits

    engine: Any = served.engine
    whole = engine._context
    rounds(aviary, None, break_it)
    engine._context = whole
    assert served.ledger.audit is not None
    lines = [line.fields for line, _ in read_lines(served.ledger.audit.path) if line.fields]
    assert [line["alarm"] for line in lines if line["event"] == "canary"][-2:] == [True, True]


def test_canaries_of_a_file_and_none(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "Hello", "harmful": false}\n{"prompt": "How do I pick a lock?", "harmful": false}\n')
    assert [bird.suite for bird in canaries(served.lm, "some/model", file)] == ["own", "own"]
    assert canaries(served.lm, "some/model", None) == ()
    assert background(Options(canary_every=None), served) == ()
    assert len(background(Options(canary_every=60.0), served)) == 1


def test_what_changed_while_no_server_ran_is_noticed(served: Served, tmp_path: Path) -> None:
    """A new server on the old log takes its reference from there; another model's lines are not about this one."""
    always = Canary("c", "benign", (1, 9), lambda _: True, max_tokens=1)
    never = replace(always, passes=lambda _: False)
    names = [name for name, _ in served.plans]
    for canary, model, alarm in ((always, served.model, False), (never, served.model, True), (never, "other", False)):
        again = Aviary(replace(served, model=model), [canary], 60.0)
        rounds(again, lambda: None)
        metric = served.ledger.metrics.canary_alarm.labels(names[0])
        assert (metric._value.get() > 0) == alarm
    renumbered = replace(never, prompt=(1, 10))
    again = Aviary(served, [renumbered], 60.0)
    rounds(again, lambda: None)
    assert served.ledger.metrics.canary_alarm.labels(names[0])._value.get() == 0, "another prompt of that number"
