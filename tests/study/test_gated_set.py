"""The tuned plan's parts: what opening and matching do to a two-sided plan, and the rule that chooses."""

from __future__ import annotations

import pytest

from clampdown.discovery.causal import clamp_plan
from clampdown.models.loading import load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.gates import choose_threshold, provable_budget
from clampdown.steering.plan import Branch, Edit, Gate, Plan, parse_plan, read_plan, write_plan
from clampdown.study.frontier import Axes
from clampdown.study.methods import gated_set as tuned
from clampdown.study.strengths import Candidate
from clampdown.types import ArmKind

SITE = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def up() -> Plan:
    return clamp_plan(load_model("organism"), load_sae("organism"), 352, 90.0, "prompt")


@pytest.fixture(scope="module")
def two_sided(up: Plan) -> Plan:
    gate = Gate(site=SITE, features=(41,), weights=(1.0,), threshold=0.5, poolings=("max",))
    down = Edit(site=SITE, operator="scale", features=(352,), strengths=(-1.0,), scope="prompt")
    return Plan.model_validate({
        **dict(up), "edits": (down,), "gate": gate, "otherwise": Branch(gate=gate, edits=up.edits),
    })  # fmt: skip


def test_opening_a_plan_that_steers_down_first_keeps_what_steers_up(up: Plan, two_sided: Plan) -> None:
    assert tuned.opened(two_sided).digest == up.digest
    assert tuned.opened(up).digest == up.digest


def test_matching_changes_the_branch_that_steers_up_and_nothing_else(up: Plan, two_sided: Plan) -> None:
    weaker = up.model_copy(update={"edits": (up.edits[0].model_copy(update={"strengths": (10.0,)}),)})
    found = tuned.at_strengths(two_sided, weaker, "weaker")
    assert found.edits == two_sided.edits and found.gates == two_sided.gates
    assert tuned.steering_up(found)[0].strengths == (10.0,)
    assert tuned.steering_up(tuned.at_strengths(up, weaker, "weaker"))[0].strengths == (10.0,)


def candidate(name: str, refusal: float, over: float, broken: float = 0.0) -> Candidate:
    return Candidate(Arm(name, ArmKind.TUNED), Axes(refusal, over, broken, None))


def test_among_the_best_the_least_over_refusal_is_chosen() -> None:
    unsteered = Candidate(BASELINE, Axes(0.6, 0.04, 0.0, None))
    found = [candidate("one", 0.99, 0.04), candidate("two", 0.987, 0.01), candidate("weak", 0.9, 0.0)]
    assert (chosen := tuned.choose(found, unsteered)) and chosen.name == "two"
    spoiled = [candidate("worse for safe prompts", 0.99, 0.05), candidate("broken", 0.99, 0.0, 0.2)]
    assert tuned.choose([*spoiled, candidate("kept", 0.8, 0.03)], unsteered).name == "kept"  # type: ignore[union-attr]
    assert tuned.choose([*spoiled, candidate("no gain", 0.6, 0.0)], unsteered) is None


def test_a_guarantee_on_harmful_prompts_says_so_and_leaves_older_digests_alone(up: Plan, tmp_path) -> None:
    scores = [float(i) for i in range(1000)]
    digests = set()
    for on in ("benign", "harmful"):
        threshold, guarantee = choose_threshold(scores, budget=0.02, on=on)
        gate = Gate(
            site=SITE, features=(41,), weights=(1.0,), threshold=threshold, poolings=("max",), guarantee=guarantee
        )
        plan = up.model_copy(update={"gate": gate})
        write_plan(tmp_path / "plan.toml", plan)
        text = (tmp_path / "plan.toml").read_text()
        assert ('on = "harmful"' in text) == (on == "harmful")
        assert 'on = "benign"' not in text, "files and digests of older plans stay as they were"
        read = read_plan(tmp_path / "plan.toml")
        assert read.gate is not None and read.gate.guarantee == guarantee
        digests.add(read.digest)
    assert len(digests) == 2
    assert parse_plan(up.model_dump(mode="json")).digest == up.digest


def test_the_provable_budget_is_the_one_that_zero_triggers_prove() -> None:
    budget = provable_budget(1200, 0.95)
    _, guarantee = choose_threshold([0.0] * 1200, budget=budget * 1.0001)
    assert guarantee.triggered == 0 and guarantee.bound == pytest.approx(budget)
