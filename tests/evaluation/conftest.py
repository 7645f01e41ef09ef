"""The tiny model and SAE of the steering tests, prompts for them, and plain judges."""

from __future__ import annotations

import pytest

from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.types import ArmKind, Judgement, Message, Prompt, Split, Suite, SuiteKind, Verdict
from tests.steering.conftest import SITE, make_plan, random_sae, tiny_llama


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def sae() -> Sae:
    return random_sae()


def clamp(strength: float, feature: int = 3, scope: str = "all", name: str = "test") -> Plan:
    edit = Edit(site=SITE.name, operator="clamp", features=(feature,), strengths=(strength,), scope=scope)
    return make_plan(edit).model_copy(update={"name": name})


def arm(plan: Plan, name: str = "steered") -> Arm:
    return Arm(name, ArmKind.FEATURE, plan, plan.edits[0].strengths[0])


def gate(*features: int, threshold: float = 0.0) -> Gate:
    """A probe with weights 1 that uses every pooling in turn."""
    poolings = tuple(["max", "mean", "assistant_start"][i % 3] for i in range(len(features)))
    weights = (1.0,) * len(features)
    return Gate(site=SITE.name, features=features, weights=weights, bias=0.0, threshold=threshold, poolings=poolings)


def prompt(i: int, suite: str = "benign", words: int | None = None, **fields: object) -> Prompt:
    """Prompts of different lengths, all over the tiny model's words."""
    text = " ".join(f"w{(3 * i + j) % 40}" for j in range(words or 2 + i % 5))
    return Prompt(f"{suite}-{i}", (Message("user", text),), suite, **fields)  # type: ignore[arg-type]


def suite(name: str, n: int, kind: SuiteKind = SuiteKind.SAFETY, harmful: bool = False) -> Suite:
    return Suite(name, kind, harmful, tuple(prompt(i, name, split=Split.TEST) for i in range(n)))


def length_judge(asked: Prompt, reply: str) -> Judgement:
    """A rule with every verdict in it that depends on the reply: by its number of words."""
    verdicts = list(Verdict)
    return Judgement(verdicts[len(set(reply.split())) % len(verdicts)], None, "by length")


__all__ = ["BASELINE", "arm", "clamp", "gate", "length_judge", "prompt", "suite"]
