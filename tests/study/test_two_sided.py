"""Two-sided steering along the direction of refusing, on the embedded model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from clampdown.models.chat import encode
from clampdown.steering.plan import Plan
from clampdown.study import groundwork
from clampdown.study.gating import Lessons
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods import two_sided as method
from clampdown.study.progress import Stages
from clampdown.study.sizes import QUICK
from clampdown.study.study import Study, make_study
from clampdown.types import ATTACKS, PromptRole, Split


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study("organism", "organism")


@pytest.fixture(scope="module")
def ground(study: Study) -> Groundwork:
    answering = replace(QUICK.answering, max_new_tokens=16)
    return Groundwork(
        study, replace(QUICK, discovery=40, calibration=160, answering=answering), Stages(Console(quiet=True))
    )


@pytest.fixture(scope="module")
def readings(ground: Groundwork) -> tuple[method.Reading, method.Reading]:
    return method.read_discovery(ground)


@pytest.fixture(scope="module")
def read(readings: tuple[method.Reading, method.Reading]) -> method.Reading:
    return readings[0]


def test_the_direction_is_refused_minus_answered_within_each_side(
    ground: Groundwork, read: method.Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other prompt counts as refused: the mean over sides of the differences, computed again by hand."""
    said: dict[str, bool] = {}

    def every_other(_ground: Groundwork, prompts: list) -> list[bool]:
        said.update({f"{p.suite}/{p.id}": place % 2 == 0 for place, p in enumerate(prompts)})
        return [place % 2 == 0 for place in range(len(prompts))]

    monkeypatch.setattr(method, "_refused_unsteered", every_other)
    found = method.refusing_direction(ground, read)
    x = read.pooled.residual["assistant_start"]
    differences = []
    for suite in ("harmful", "borderline"):
        rows = [i for i, p in enumerate(read.prompts) if p.suite == suite]
        refused = [i for i in rows if said[f"{suite}/{read.prompts[i].id}"]]
        answered = [i for i in rows if i not in refused]
        differences.append(x[refused].mean(0) - x[answered].mean(0))
    np.testing.assert_allclose(found.vector, np.mean(differences, axis=0), rtol=1e-4, atol=1e-5)
    assert len(found.features) <= max(method.SET_SIZES)
    assert all(peak > 0 for peak in found.features.values())


def test_a_gate_fires_on_its_side_and_spares_the_other(
    ground: Groundwork, readings: tuple[method.Reading, method.Reading]
) -> None:
    read = readings[0]
    gates = method.Gates(ground, *readings, method.read_validation(ground))
    raised, lowered = gates.up(), gates.down()
    study = ground.study
    harmful = read.are(lambda prompt: study.data.roles[prompt.suite] is PromptRole.HARMFUL)
    benign = read.are(lambda prompt: study.data.roles[prompt.suite] is PromptRole.BENIGN)
    borderline = read.are(lambda prompt: prompt.suite in study.data.over_refused)
    up = raised.scores(read.pooled) > raised.gate.threshold
    down = lowered.scores(read.pooled) > lowered.gate.threshold
    assert up[harmful].mean() > 0.9
    assert up[benign].mean() <= 0.05
    assert down[borderline].mean() > 0.3
    assert down[harmful].mean() <= 0.05
    assert raised.gate.guarantee is not None
    assert raised.gate.guarantee.on == "benign"
    assert lowered.gate.guarantee is not None
    assert lowered.gate.guarantee.on == "harmful"


def test_gates_learn_from_copies_in_random_wrappers_when_that_is_asked_for(
    ground: Groundwork, readings: tuple[method.Reading, method.Reading]
) -> None:
    """The same prompts as they are, whatever was asked for; behind them each in two wrappers, with its own label."""
    few = replace(ground, sizes=replace(ground.sizes, discovery=4))
    plain, both = method.read_discovery(few), method.read_discovery(replace(few, wrapped=2))
    n, study = len(plain[0].prompts), few.study
    assert both[0].prompts == plain[0].prompts
    np.testing.assert_allclose(both[0].pooled.residual["mean"], plain[0].pooled.residual["mean"], atol=1e-4)
    assert both[1].prompts == Lessons.of(study, both[0].prompts[:8], both[0].prompts[8:], wrapped=2).turns
    copies = both[1].prompts[n : 3 * n]
    assert [copy.suite for copy in copies] == [prompt.suite for prompt in plain[0].prompts for _ in range(2)]
    assert [*plain[1].prompts[:n], *copies, *plain[1].prompts[n:]] == [*both[1].prompts]
    assert both[1].pooled.n == plain[1].pooled.n + 2 * n
    gates = [method.Gates(few, *each, method.read_validation(few)) for each in (plain, both)]
    one, other = (each._best("up", lambda p: study.data.roles[p.suite] in ATTACKS) for each in gates)
    assert one.gate != other.gate


def test_the_weakest_of_about_the_most_refusals_is_taken(study: Study) -> None:
    edit = method.Tried(  # the plans' order is their size
        Groundwork(study, QUICK, Stages(Console(quiet=True))), method.Refusing((1.0,) * study.lm.d_model, {3: 2.0})
    )
    plans = [plan for size in method.SIZES_UP for plan in edit._plans(size)]
    assert [plan.edits[0].operator for plan in plans[:2]] == ["clamp", "add_direction"]
    refused = Counter({plan.name: count for plan, count in zip(plans, (5, 19, 20, 20, 20, 20), strict=False)})
    assert method._weakest(plans, refused, 20) is plans[1]


def test_to_steer_down_is_the_edit_turned_round_or_taken_out(study: Study) -> None:
    tried = method.Tried(
        Groundwork(study, QUICK, Stages(Console(quiet=True))), method.Refusing((1.0,) * study.lm.d_model, {3: 2.0})
    )
    plans: list[Plan] = [plan for size in method.SIZES_DOWN for plan in tried._plans(-size)]
    edits = {(plan.edits[0].operator, plan.edits[0].strengths[0]) for plan in plans}
    assert edits == {("scale", -1.0), ("ablate_direction", 1.0), ("add_direction", -1.0), ("add_direction", -2.0)}


def test_without_borderline_prompts_there_is_no_second_side(study: Study) -> None:
    from clampdown.errors import NotEnoughDataError

    fewer = study.only([name for name, role in study.data.roles.items() if role is not PromptRole.BORDERLINE])
    with pytest.raises(NotEnoughDataError, match="no borderline prompts"):
        method.two_sided(Groundwork(fewer, QUICK, Stages(Console(quiet=True))))
    assert study.prompts(Split.VALIDATION, 1, PromptRole.BORDERLINE)


def test_a_search_reads_as_many_prompts_as_it_can_afford_and_leaves_the_longest_out(study):
    parameters = sum(parameter.numel() for parameter in study.lm.model.parameters())

    def read(tokens_per_plan):
        sizes = replace(QUICK, search_flops=2.0 * parameters * groundwork.SEARCHED * tokens_per_plan)
        ground = Groundwork(study, sizes, Stages(Console(quiet=True)))
        assert ground.tempting_tokens == sum(len(encode(study.lm, prompt.messages)) for prompt in ground.tempting)
        return ground.tempting

    every = read(10**6)
    lengths = {prompt.id: len(encode(study.lm, prompt.messages)) for prompt in every}
    some = read(sum(lengths.values()) // 2)
    assert some == [prompt for prompt in every if prompt in some]
    assert sum(lengths[prompt.id] for prompt in some) <= sum(lengths.values()) // 2
    assert max(lengths[p.id] for p in some) <= min(lengths[p.id] for p in every if p not in some)
    assert len(read(1)) == groundwork.LEAST_PROMPTS < len(some) < len(every)
