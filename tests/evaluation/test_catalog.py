"""Public suites as their authors publish them: counts, labels and categories, and every fault named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import ENTRIES, load_suites
from clampdown.types import SuiteKind

DATA = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the public data sets, which lie outside the repository")

FILES = {
    "xstest": "xstest/prompts.csv",
    "jailbreakbench-harmful": "jailbreakbench/harmful-behaviors.csv",
    "jailbreakbench-benign": "jailbreakbench/benign-behaviors.csv",
    "harmbench": "harmbench/harmbench_behaviors_text_val.csv",
    "advbench": "advbench/harmful_behaviors.csv",
    "coconot-contrast": "coconot/coconot_contrast_eval.jsonl",
    "air-bench-2024": "air-bench-2024/prompts_sample_80.csv",
    "mmlu": "mmlu/test",
    "gsm8k": "gsm8k/test.jsonl",
    "truthfulqa-mc1": "truthfulqa/mc_task.json",
    "truthfulqa-mc2": "truthfulqa/mc_task.json",
    "ifeval": "ifeval/input_data.jsonl",
}
EXPECTED = {
    "xstest": {"xstest-safe": (250, False), "xstest-unsafe": (200, True)},
    "jailbreakbench-harmful": {"jailbreakbench-harmful": (100, True)},
    "jailbreakbench-benign": {"jailbreakbench-benign": (100, False)},
    "harmbench": {"harmbench": (80, True)},
    "advbench": {"advbench": (520, True)},
    "coconot-contrast": {"coconot-contrast": (379, False)},
    "air-bench-2024": {"air-bench-2024": (80, True)},
    "mmlu": {"mmlu": (1261, False)},
    "gsm8k": {"gsm8k": (1319, False)},
    "truthfulqa-mc1": {"truthfulqa-mc1": (817, False)},
    "truthfulqa-mc2": {"truthfulqa-mc2": (817, False)},
    "ifeval": {"ifeval": (541, False)},
}


@real
@pytest.mark.parametrize("name", FILES)
def test_the_authors_files_are_read_whole(name: str) -> None:
    found = load_suites(f"{name}={DATA / FILES[name]}")
    assert {suite.name: (len(suite.prompts), suite.harmful) for suite in found} == EXPECTED[name]
    capability = any(entry.name == name and entry.kind == "capability" for entry in ENTRIES)
    assert all((suite.kind is SuiteKind.CAPABILITY) == capability for suite in found)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(PromptSetError, match=r"(?s)no suite 'xtest'.*xstest"):
        load_suites("xtest")
