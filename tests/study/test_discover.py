"""What `discover` is asked for, and that refinement steers by what it measured."""

from __future__ import annotations

import pytest

from clampdown.discovery.finders import DEFAULT, FINDERS
from clampdown.discovery.refine import Clamps
from clampdown.errors import PromptSetError
from clampdown.study.discover import BOTH, finder_names
from clampdown.study.refining import plan_of
from tests.steering.conftest import random_sae, tiny_llama


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("", (DEFAULT,)),
        ("auroc, d-prime", ("auroc", "d-prime")),
        ("both", BOTH),
        ("contrast,both", BOTH),
        ("all", tuple(FINDERS)),
    ],
)
def test_finders_are_asked_for_by_name(asked, names):
    assert finder_names(asked) == names


def test_an_unknown_finder_is_refused_before_anything_is_loaded():
    with pytest.raises(PromptSetError, match="divination"):
        finder_names("auroc,divination")


def test_a_set_becomes_one_edit():
    plan = plan_of(tiny_llama(), random_sae(), Clamps((3, 5), (2.0, 1.5)), "prompt")
    (edit,) = plan.edits
    assert (edit.features, edit.strengths, edit.operator, edit.scope) == ((3, 5), (2.0, 1.5), "clamp", "prompt")
