"""Directions of refusal that are planted are found, and what is found is at right angles."""

from __future__ import annotations

import numpy as np
import pytest

from clampdown.discovery.subspace import find_subspace, groups_of, subspace_of
from clampdown.errors import NotEnoughDataError, PlanError, PromptSetError, StrengthError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.steering.hooks import steer
from clampdown.steering.program import check_plan
from clampdown.steering.selftest import self_test
from clampdown.steering.units import Strength, Unit
from clampdown.study.along import Along, coordinate, plan_along
from clampdown.types import Site

SITE = Site.parse("blocks.1.hook_resid_post")
GROUPS = ["a"] * 20 + ["b"] * 20 + ["c"] * 20


def planted(noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Harmful prompts lie 6 along e0; group a also 3 along e1, group b 2 along e2 and c -2 there; and harmless ones."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=16)
    harmful = np.tile(base, (60, 1)) + noise * rng.normal(size=(60, 16))
    harmful[:, 0] += 6
    harmful[:20, 1] += 3
    harmful[20:40, 2] += 2
    harmful[40:, 2] -= 2
    return harmful, np.tile(base, (50, 1)) + noise * rng.normal(size=(50, 16)), base


def test_planted_directions_are_found() -> None:
    harmful, harmless, base = planted()
    found = subspace_of(SITE, harmful, harmless, GROUPS, 3)
    assert np.allclose(found.directions @ found.directions.T, np.eye(3), atol=1e-12)
    span = np.eye(16)[:3]
    assert np.allclose(found.directions @ span.T @ span, found.directions, atol=1e-9)  # all of it in e0, e1, e2
    first = harmful.mean(0) - base
    assert np.allclose(found.directions[0], first / np.linalg.norm(first))
    assert np.allclose(found.harmless, found.directions @ base)
    for group in range(3):
        own = found.directions @ (harmful[20 * group : 20 * group + 20].mean(0) - base)
        assert (own <= found.gap + 1e-9)[1:].all()
    assert found.gap[0] == pytest.approx(np.linalg.norm(first)) and (found.gap > 0).all()


def test_noise_changes_little_and_labels_matter() -> None:
    harmful, harmless, _ = planted(0.1)
    found = subspace_of(SITE, harmful, harmless, GROUPS, 3)
    assert (np.linalg.norm(found.directions[:, :3], axis=1) > 0.97).all()


def test_groups_that_do_not_span_as_many_are_an_error_that_says_how_many() -> None:
    harmful, harmless, _ = planted()
    with pytest.raises(NotEnoughDataError, match=r"3 groups .* 3 directions, not 4"):
        subspace_of(SITE, harmful, harmless, GROUPS, 4)
    with pytest.raises(NotEnoughDataError, match="1 directions, not 2"):
        subspace_of(SITE, harmful, harmless, ["all"] * 60, 2)
    with pytest.raises(PromptSetError, match="one mean"):
        subspace_of(SITE, harmless, harmless, ["all"] * 50, 1)


def test_a_cone_of_the_embedded_model_is_a_plan_that_refuses(embedded) -> None:
    lm, harmful, harmless, jailbroken = embedded
    found = find_subspace(lm, harmful, harmless, Site.parse("blocks.3.hook_resid_post"), 3)
    asked = Along("floor_direction", Strength.parse("1.5gap"), "prompt")
    plan = plan_along(lm, None, found, asked, harmless[:8], "cone")
    check_plan(plan, lm, {})
    assert all(check.passed for check in self_test(lm, plan))
    wanted = [float(found.harmless[i] + 1.5 * found.gap[i]) for i in range(3)]
    assert [edit.strengths[0] for edit in plan.edits] == pytest.approx(wanted)
    assert coordinate(found, 1, "add_direction", 2.0) == pytest.approx(2 * float(found.gap[1]))
    prompts = [encode(lm, p.messages) for p in jailbroken]
    plain = [reply.text for reply in generate(lm, prompts, max_new_tokens=12)]
    with steer(lm, plan) as steering:
        steered = [reply.text for reply in generate(lm, prompts, max_new_tokens=12, on_keep=steering.keep_rows)]
    assert plain != steered


def test_what_is_asked_wrongly(embedded) -> None:
    lm, harmful, harmless, _ = embedded
    with pytest.raises(PromptSetError, match="1 or more"):
        find_subspace(lm, harmful, harmless, SITE, 0)
    with pytest.raises(PromptSetError, match="harmful and harmless"):
        find_subspace(lm, harmful, [], SITE, 1)
    with pytest.raises(PlanError, match="operator on directions"):
        Along("clamp").check()
    with pytest.raises(StrengthError, match="share"):
        Along("ablate_direction", Strength(1.0, Unit.GAP)).check()
    assert len(set(groups_of(harmful))) > 3


@pytest.fixture(scope="module")
def embedded():
    from clampdown.models.loading import load_model
    from clampdown.organism.suites import one_suite
    from clampdown.types import Split

    names = (("harmful", 60), ("benign", 60), ("jailbroken_seen", 8))
    return load_model("organism"), *(one_suite(name, Split.DISCOVERY, n).prompts for name, n in names)
