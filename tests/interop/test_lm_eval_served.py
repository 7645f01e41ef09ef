"""lm-evaluation-harness through the server: the scores of the in-process run, for the base model and for a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clampdown.commands.serve import Options
from clampdown.config import ORGANISM_WEIGHTS
from clampdown.serving.limits import Limits
from tests.interop.test_lm_eval import likelihoods, replies, run_harness, tasks
from tests.serving.live import Live, running

__all__ = ["tasks"]  # the fixture: local task files

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, plan_file: Path) -> Iterator[Live]:
    # In process the gate reads the context alone; this plan's fires on half of anything, scored replies too.
    limits = Limits(gated_scoring="context")
    options = Options(plans=(plan_file,), inline=None, limits=limits)
    with running(tmp_path_factory.mktemp("server"), options) as found:
        yield found


@pytest.mark.parametrize("plan", [None, "clamp-all"])
def test_scores_are_those_of_the_run_in_process(live: Live, plan: str | None, plan_file: Path, tasks: Path) -> None:
    """Likelihoods of every option and replies word for word, so accuracy and exact match too."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    from clampdown.interop.lm_eval import SteeredLM

    model = f"organism:{plan}" if plan else "organism"
    served = LocalCompletionsAPI(
        base_url=f"{live.url}/v1/completions",
        model=model,
        tokenizer_backend="huggingface",
        tokenizer=str(ORGANISM_WEIGHTS / "model"),
        batch_size=16,
        num_concurrent=2,
        max_length=500,
    )
    own = run_harness(SteeredLM(plan=str(plan_file) if plan else None, batch_size=24), tasks)
    theirs = run_harness(served, tasks)
    for ours, through in zip(likelihoods(own), likelihoods(theirs), strict=True):
        assert through == pytest.approx(ours, abs=1e-3)
    assert replies(theirs) == replies(own)
    chatting = LocalChatCompletion(base_url=f"{live.url}/v1/chat/completions", model=model, num_concurrent=2)
    chatted = run_harness(chatting, tasks, "local_instructions")
    assert replies(chatted) == replies(own)
    for task, metric in (("local_facts", "acc,none"), ("local_instructions", "exact_match,none")):
        assert theirs["results"][task][metric] == own["results"][task][metric]
    if plan:
        fired: list[Any] = [line["gate_fired"] for line in live.lines() if line.get("gate_fired") is not None]
        assert {True, False} <= set(fired), "the gate decides per request"
