"""A small pass and a small evaluation of the embedded model, as one process does them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clampdown.activations.stream import Budget, Pass, plan_pass, read_sae
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import one_suite
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.study import evaluate as evaluating
from clampdown.study.progress import Stages
from clampdown.study.study import judge_for
from clampdown.types import Split
from tests.study.test_evaluate import plan

SUITES = ("harmful", "benign", "facts")


def quiet() -> Stages:
    return Stages(Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def organism() -> tuple[LanguageModel, Sae]:
    return load_model("organism"), load_sae("organism")


@pytest.fixture(scope="session")
def small_pass(organism: tuple[LanguageModel, Sae]) -> Pass:
    prompts = [p for name in ("harmful", "benign") for p in one_suite(name, Split.DISCOVERY, 40).prompts]
    reading = read_sae(organism[1], "mean", "max", dense=("assistant_start",))
    return plan_pass(organism[0], [reading], prompts, Budget(tokens_per_batch=256))


@pytest.fixture(scope="session")
def small_request() -> evaluating.Request:
    return evaluating.Request((), SUITES, limit=8, max_new_tokens=12, batch_rows=4)


@pytest.fixture(scope="session")
def small_evaluation(organism: tuple[LanguageModel, Sae], small_request: evaluating.Request) -> evaluating.Evaluation:
    lm, sae = organism
    judge = judge_for("exact", lm, None)
    return evaluating.prepared(small_request, [plan()], lm, [sae], judge, quiet())
