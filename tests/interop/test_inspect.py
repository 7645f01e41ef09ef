"""Inspect on a steered model: the same items get the same replies and scores as in our own runner.

Inspect lives in an environment of its own (docs/frameworks.md says how to make it and run this file there).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from clampdown.errors import ClampdownError, ModelError
from clampdown.models.loading import LanguageModel
from clampdown.organism.suites import suites
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.steering.plan import Plan
from clampdown.types import ArmKind, Prompt, Split

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed: see docs/frameworks.md")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("inspect")]

MAX_TOKENS = 32


def evaluated(model: str, items: dict[str, tuple[Prompt, ...]], directory: Path) -> Any:
    """The log of a local exact-match task."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer
    from inspect_ai.solver import TaskState, generate

    @scorer(metrics=[accuracy()])
    def exact_match() -> Scorer:
        """Letter by letter; Inspect's own `exact` leaves out punctuation and articles."""

        async def score(state: TaskState, target: Target) -> Score:
            return Score(value="C" if state.output.completion == target.text else "I")

        return score

    import clampdown.interop.inspect_entry  # noqa: F401  (installed, an entry point does this)

    samples = [Sample(id=p.id, input=p.text, target=str(p.answer)) for p in items["instructions"]]
    task = Task(dataset=MemoryDataset(samples), solver=generate(), scorer=exact_match())
    (log,) = eval(task, model=model, max_tokens=MAX_TOKENS, temperature=0.0, log_dir=str(directory), display="none")
    assert log.status == "success", log.error
    return log


@pytest.mark.parametrize("steered", [False, True])
def test_the_same_items_get_the_same_replies_and_scores(
    organism: LanguageModel,
    organism_sae: Sae,
    items: dict[str, tuple[Prompt, ...]],
    gated: Plan,
    plan_file: Path,
    tmp_path: Path,
    steered: bool,
) -> None:
    """Word by word and item by item, with the same receipts: baseline, and a gated plan."""
    arm = Arm(gated.name, ArmKind.GATED, gated) if steered else BASELINE
    log = evaluated(f"clampdown/{plan_file}" if steered else "clampdown/baseline", items, tmp_path)
    ours = generate_arms(
        organism, organism_sae, [(arm, prompt) for prompt in items["instructions"]], max_new_tokens=MAX_TOKENS
    )
    replies = {reply.prompt.id: reply for reply in ours}
    answers = {prompt.id: prompt.answer for prompt in items["instructions"]}
    assert {sample.id: sample.output.completion for sample in log.samples} == {
        name: reply.text for name, reply in replies.items()
    }
    for sample in log.samples:
        mine = replies[sample.id]
        assert (sample.scores["exact_match"].value == "C") == (mine.text == answers[sample.id])
        receipt = sample.output.metadata["clampdown"]["receipt"]
        if mine.receipt is None:
            assert receipt is None
        else:
            assert receipt["tokens_touched"] == mine.receipt.tokens_touched
            assert receipt["gate_fired"] == mine.receipt.gate_fired
    right = [reply.text == answers[name] for name, reply in replies.items()]
    assert log.results.scores[0].metrics["accuracy"].value == pytest.approx(sum(right) / len(right))
    if steered:
        fired = [sample.output.metadata["clampdown"]["receipt"]["gate_fired"] for sample in log.samples]
        assert any(fired)
        assert not all(fired)


def ask(api: Any, text: str = "What is the capital of Spain?", tools: Any = (), **settings: Any) -> Any:
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    return asyncio.run(api.generate([ChatMessageUser(content=text)], list(tools), "none", GenerateConfig(**settings)))


def test_limits_stops_seeds_and_what_would_be_ignored() -> None:
    from inspect_ai.tool import ToolInfo

    from clampdown.interop.inspect import SteeredAPI

    api = SteeredAPI("baseline")
    assert ask(api, max_tokens=16).completion.startswith("Madrid")
    assert ask(api, max_tokens=16, stop_seqs=["rid"]).completion == "Mad"
    short = ask(api, max_tokens=2)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 2)
    drawn = [ask(api, max_tokens=16, temperature=3.0, seed=seed).completion for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    epochs = [ask(api, max_tokens=16, temperature=3.0).completion for _ in range(4)]
    assert len(set(epochs)) > 1, "epochs of a sample are draws, not copies"
    for settings in ({"frequency_penalty": 1.0}, {"logprobs": True}, {"num_choices": 2}):
        with pytest.raises(ModelError, match="would be ignored"):
            ask(api, **settings)
    with pytest.raises(ModelError, match="calls no tools"):
        ask(api, tools=[ToolInfo(name="search", description="search")])
    with pytest.raises(ModelError, match="does not fit"):
        ask(api, text="word " * 5000)


def test_requests_that_come_together_are_answered_each_with_its_own_reply() -> None:
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    from clampdown.interop.inspect import SteeredAPI

    api = SteeredAPI("baseline", batch_rows=4)
    cities = {"Spain": "Madrid", "France": "Paris", "Italy": "Rome"}

    async def all_at_once() -> list[Any]:
        calls = [
            api.generate(
                [ChatMessageUser(content=f"What is the capital of {country}?")],
                [],
                "none",
                GenerateConfig(max_tokens=n),
            )
            for country in cities
            for n in (3, 12)
        ]
        return await asyncio.gather(*calls)

    outputs = asyncio.run(all_at_once())
    for i, city in enumerate(cities.values()):
        assert outputs[2 * i + 1].completion.startswith(city)
        assert outputs[2 * i + 1].completion.startswith(outputs[2 * i].completion)


@pytest.mark.parametrize(("name", "arguments"), [("missing.toml", {}), ("baseline", {"plann": 1})])
def test_wrong_arguments_are_named(name: str, arguments: dict[str, Any]) -> None:
    from clampdown.interop.inspect import SteeredAPI

    with pytest.raises(ClampdownError):
        SteeredAPI(name, **arguments)


def test_a_refusal_stops_as_one_when_somebody_tells_it(tmp_path: Path) -> None:
    """Inspect counts it, and with fail_on_refusal the sample fails; without a judge that setting is an error."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.solver import generate

    import clampdown.interop.inspect_entry  # noqa: F401
    from clampdown.interop.inspect import SteeredAPI

    (harmful,) = (suite.prompts[0].text for suite in suites(Split.VALIDATION, 1) if suite.name == "harmful")
    judged = SteeredAPI("baseline", refusals="rules")
    assert ask(judged, text=harmful, max_tokens=64).stop_reason == "content_filter"
    assert ask(judged, max_tokens=64).stop_reason == "stop"
    assert ask(SteeredAPI("baseline"), text=harmful, max_tokens=64).stop_reason == "stop"
    with pytest.raises(ModelError, match="fail_on_refusal would do nothing"):
        ask(SteeredAPI("baseline"), fail_on_refusal=True)
    task = Task(dataset=MemoryDataset([Sample(input=harmful, target="x")]), solver=generate())
    model = get_model("clampdown/baseline", refusals="rules")
    (log,) = eval(task, model=model, max_tokens=64, fail_on_refusal=True, log_dir=str(tmp_path), display="none")
    assert log.status == "error" and "efus" in str(log.error.message)
