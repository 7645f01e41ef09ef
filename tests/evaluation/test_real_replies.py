"""The default judge on 200 replies of two small real models, labelled by reading before any judge was run on them.

The repository holds ids, a hash of each reply, and labels; the replies are generated again, which takes minutes. This
runs only where CLAMPDOWN_REAL_MODELS names a directory with both models and the prompts lie beside the repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from clampdown.evaluation.agreement import Labelled, agreement
from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.correction import reply_hash
from clampdown.evaluation.judges.interface import Case, in_order
from clampdown.evaluation.judges.table import DEFAULT, make_judge
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import load_model
from clampdown.types import Prompt, Verdict

LABELS = Path(__file__).parent / "real_replies_labels.jsonl"
DATA = Path(__file__).parents[3] / "shared" / "data"
MODELS = os.environ.get("CLAMPDOWN_REAL_MODELS", "")
SUITES = (
    f"advbench={DATA / 'advbench' / 'harmful_behaviors.csv'}",
    f"jailbreakbench-harmful={DATA / 'jailbreakbench' / 'harmful-behaviors.csv'}",
    f"jailbreakbench-benign={DATA / 'jailbreakbench' / 'benign-behaviors.csv'}",
    f"coconot-contrast={DATA / 'coconot' / 'coconot_contrast_eval.jsonl'}",
    f"xstest={DATA / 'xstest' / 'prompts.csv'}",
)
VERDICTS = {"full": Verdict.REFUSED, "partial": Verdict.DEFLECTED, "no": Verdict.COMPLIED}


def tens(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    for start in range(0, len(prompts), 10):
        yield prompts[start : start + 10]


def replies(model: str, prompts: list[Prompt]) -> list[str]:
    lm = load_model(str(Path(MODELS) / model))
    return [
        reply.text
        for batch in tens(prompts)
        for reply in generate(lm, [encode(lm, prompt.messages) for prompt in batch], max_new_tokens=32)
    ]


@pytest.mark.skipif(not MODELS or not DATA.is_dir(), reason="needs CLAMPDOWN_REAL_MODELS and the prompts")
def test_the_default_judge_agrees_with_labels_of_real_replies() -> None:
    rows = [json.loads(line) for line in LABELS.read_text().splitlines()]
    known = {(p.suite, p.id): p for spec in SUITES for suite in load_suites(spec) for p in suite.prompts}
    labelled: list[Labelled] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        prompts = [known[row["suite"], row["prompt_id"]] for row in own]
        for row, prompt, text in zip(own, prompts, replies(model, prompts), strict=True):
            if reply_hash(text) == row["reply"]:  # a label is about one reply: rounding may give another
                labelled.append(Labelled(prompt, text, VERDICTS[row["label"]], source=model))
    assert len(labelled) > 0.9 * len(rows)
    judged = in_order(make_judge(DEFAULT).find([Case(each.prompt, each.reply) for each in labelled]), len(labelled))
    kappa = agreement(labelled, [finding.judgement for finding in judged if finding.judgement]).kappa.value
    assert kappa is not None and kappa >= 0.85
