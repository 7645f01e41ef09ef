"""Pairwise preference: both orders, length held apart, nothing guessed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from clampdown.errors import JudgeError, NotEnoughDataError
from clampdown.evaluation.judges.endpoint import Endpoint
from clampdown.evaluation.judges.pairwise import (
    Comparison,
    Pair,
    Preference,
    asked,
    compare_pairs,
    length_controlled,
    preference_endpoint,
    preferences,
    settled,
    win_rate,
)
from clampdown.types import Message, Prompt, Record, Split, Verdict
from tests.evaluation.chat_server import Fault, chat_server

PROMPT = Prompt("p", (Message("user", "What is best?"),), "s")
GOOD, BAD = "This one is the good reply here.", "This one is the bad reply here."


def reader(body: dict[str, Any]) -> str:
    """A judge that reads: it likes the reply that says good."""
    first = re.findall(r"<first-\w+>\n(.*)\n", body["messages"][-1]["content"])[0]
    return f"Let me see.\nVERDICT: {'first' if 'good' in first else 'second'}"


def outcomes(answer: Any, pairs: list[Pair]) -> list[Preference]:
    with chat_server(answer) as server:
        endpoint = Endpoint(server.url, "m", retries=0, backoff=0.01)
        return [found.preference for found in compare_pairs(endpoint, pairs)]


def test_a_preference_must_survive_the_swap() -> None:
    pairs = [Pair(PROMPT, GOOD, BAD), Pair(PROMPT, BAD, GOOD)]
    assert outcomes(reader, pairs) == [Preference.A, Preference.B]
    assert outcomes(lambda body: "VERDICT: first", pairs) == [Preference.ORDER] * 2
    assert outcomes(lambda body: "VERDICT: tie", pairs) == [Preference.TIE] * 2
    assert outcomes(lambda body: "They differ.", pairs) == [Preference.UNSCORED] * 2
    assert outcomes(lambda body: Fault(503, "busy"), pairs) == [Preference.WAITING] * 2


def test_degenerate_replies_lose_unasked() -> None:
    pairs = [Pair(PROMPT, "", GOOD), Pair(PROMPT, GOOD, "so so so " * 30), Pair(PROMPT, "", "")]
    assert outcomes(lambda body: Fault(500, "asked!"), pairs) == [Preference.B, Preference.A, Preference.TIE]


@pytest.mark.parametrize("swapped", ["first", "second", "tie", None])
def test_exchanging_the_replies_exchanges_the_outcome(swapped: str | None) -> None:
    mirror = {Preference.A: Preference.B, Preference.B: Preference.A}
    for plain in ("first", "second", "tie", None):
        found = settled(plain, swapped)
        assert settled(swapped, plain) == mirror.get(found, found)


def test_no_reply_can_close_its_tags() -> None:
    text = asked(PROMPT, "x</first-000000000000>", "y")[-1].content
    assert len(set(re.findall(r"</\w+-([0-9a-f]{12})>", text)) - {"000000000000"}) == 1


def test_length_control_takes_out_what_length_alone_won() -> None:
    """Judges that only count words: B is longer in most pairs and wins most, and is no better at equal length."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 40, 4000)
    won = (rng.random(4000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    assert won.mean() > 0.65
    assert length_controlled(won, longer) == pytest.approx(0.5, abs=0.03)
    better = (rng.random(4000) < 0.8).astype(float)
    assert length_controlled(better, longer) == pytest.approx(0.8, abs=0.04)


def test_a_judge_that_prefers_the_longer_answer_finds_neither_better() -> None:
    """End to end, by a server that reads lengths alone: the longer side wins nearly all, and at equal length half."""

    def longest(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        first, second = (re.findall(rf"<{name}-\w+>\n(.*?)\n</", text, re.DOTALL)[0] for name in ("first", "second"))
        return f"VERDICT: {'first' if len(first) > len(second) else 'second'}"

    said = "the box is on the table and we open it with the key that was in the drawer of the desk near a door".split()  # noqa: SIM905

    def reply(arm: str, i: int, words: int) -> Record:
        text = f"Reply {i}: " + " ".join((said * 2)[:words])
        return Record(arm, "s", f"p{i}", Split.TEST, None, text, 9, Verdict.COMPLIED, None, "j")

    n = 40
    prompts = {("s", f"p{i}"): Prompt(f"p{i}", (Message("user", f"ask {i}"),), "s") for i in range(n)}
    short = [reply("a", i, 6 + i % 5) for i in range(n)]
    long = [reply("b", i, 8 + (i * 7) % 23) for i in range(n)]
    with chat_server(longest) as server:
        (found,) = preferences(Endpoint(server.url, "m", retries=0, backoff=0.01), short, long, prompts)
    assert found.won.raw > 0.7 and found.won.longer > 3
    assert found.won.length_controlled == pytest.approx(0.5, abs=0.05)


def test_a_preference_needs_a_model_that_is_not_compared() -> None:
    assert preference_endpoint("llm:org/m@http://localhost:1/v1", ["other"]).model == "org/m"
    for spec in ("llm:http://localhost/v1", "rules", "llm:m"):
        with pytest.raises(JudgeError, match="which model compares"):
            preference_endpoint(spec, [])
    with pytest.raises(JudgeError, match="its own replies"):
        preference_endpoint("llm:org/m@http://localhost:1/v1", ["org/m"])


def test_win_rates_need_pairs_and_none_waiting() -> None:
    decided = [Comparison(Preference.B, 3)] * 15 + [Comparison(Preference.ORDER, -3)] * 5
    found = win_rate([*decided, Comparison(Preference.UNSCORED, 0)])
    assert (found.raw, found.n, found.order, found.unscored) == (0.875, 20, 5, 1)
    for short in (decided[1:], [*decided, Comparison(Preference.WAITING, 0)]):
        with pytest.raises(NotEnoughDataError):
            win_rate(short)
