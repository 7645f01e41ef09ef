"""lm-evaluation-harness against a running server: its `local-completions` and `local-chat-completions`, unchanged.

    .venv/bin/python clampdown-vllm/tests/with_lm_eval.py URL PLANS_DIRECTORY

from the repository's root, in clampdown's own environment, which has the harness. Likelihoods and replies are compared
with those of the run in this process, and printed as JSON. A gate keeps a prompt's likelihoods to itself, so that under
a gated plan only replies are asked for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))

from clampdown.config import ORGANISM_WEIGHTS
from clampdown.interop.lm_eval import SteeredLM
from clampdown.organism.suites import suites
from clampdown.types import Split
from tests.interop.test_lm_eval import (
    FACTS,
    INSTRUCTIONS,
    MAX_NEW_TOKENS,
    likelihoods,
    replies,
    run_harness,
)

PER_SUITE = 8
REPLIES = "local_instructions"


def write_tasks(directory: Path) -> None:
    found = {suite.name: suite.prompts for suite in suites(Split.VALIDATION, PER_SUITE)}
    for name, template in (("facts", FACTS), ("instructions", INSTRUCTIONS)):
        rows = [{"question": p.text, "answer": p.answer, "options": list(p.options)} for p in found[name]]
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (directory / f"{name}.yaml").write_text(template.format(file=file, max_new_tokens=MAX_NEW_TOKENS))


def compared(url: str, plan: str | None, file: Path, tasks: Path) -> dict[str, Any]:
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    model = f"organism:{plan}" if plan else "organism"
    gated = plan is not None and "gated" in plan
    names = (REPLIES,) if gated else ()
    served = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model=model,
        tokenizer_backend="huggingface",
        tokenizer=str(ORGANISM_WEIGHTS / "model"),
        batch_size=8,
        num_concurrent=2,
        max_length=500,
    )
    own, theirs = (
        run_harness(SteeredLM(plan=str(file) if plan else None), tasks, *names),
        run_harness(served, tasks, *names),
    )
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model=model, num_concurrent=2)
    chatted = run_harness(chat, tasks, REPLIES)
    pairs = [] if gated else list(zip(likelihoods(own), likelihoods(theirs), strict=True))
    return {
        "plan": plan,
        "replies": len(replies(own)),
        "replies that differ": sum(a != b for a, b in zip(replies(own), replies(theirs), strict=True)),
        "of a chat": sum(a != b for a, b in zip(replies(own), replies(chatted), strict=True)),
        "likelihoods": sum(len(ours) for ours, _ in pairs),
        "largest difference": max((abs(a - b) for o, t in pairs for a, b in zip(o, t, strict=True)), default=None),
    }


def main(url: str, plans: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = f"{name}/cache"
        write_tasks(Path(name))
        for plan in (None, "clamp-352-everywhere", "clamp-352-gated"):
            found = compared(url, plan, plans / f"{plan}.toml", Path(name))
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
