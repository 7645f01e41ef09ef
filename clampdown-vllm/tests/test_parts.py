"""The parts by themselves: blocks' keys, what is counted, the edits' arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clampdown.errors import PlanError
from clampdown.models.loading import LanguageModel, load_identity, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.steering.program import Reach, site_programs
from clampdown_vllm.blocks import done_to
from clampdown_vllm.book import Book, check_book
from clampdown_vllm.order import Order, runs
from clampdown_vllm.settings import KEY
from clampdown_vllm.worker.edits import SiteEdits, Where
from clampdown_vllm.worker.tally import Sizes, Tally

pytestmark = pytest.mark.ci


# ---- the prefix cache's keys -------------------------------------------------------------------------------------


def key(start: int, end: int, *reach: tuple[int, int], **more: Any) -> Any:
    order = Order(id="i", plan="p", digest="d", mode="act", length=50, reach=reach)
    return done_to({KEY: {**order.plain(), **more}}, start, end)


def test_blocks_that_nothing_is_done_to_are_everybodys() -> None:
    assert done_to(None, 0, 32) is done_to({"other": 1}, 0, 32) is None
    assert key(0, 32, (50, 1 << 40)) is None
    assert key(0, 32, (0, 50), mode="read") is key(0, 32, mode="measure") is None


def test_a_blocks_key_says_what_is_done_to_its_own_tokens() -> None:
    assert key(0, 32, (0, 50)) == key(0, 32, (0, 80))
    assert key(32, 64, (0, 50)) != key(32, 64, (0, 80))
    assert key(0, 32, (0, 50)) != key(0, 32, (4, 50))
    assert key(0, 32, (0, 50)) != key(0, 32, (0, 50), digest="e")
    assert key(0, 32, (0, 50)) != key(0, 32, (0, 50), branch=1)


def test_blocks_of_an_undecided_gate_are_nobody_elses() -> None:
    assert key(0, 32, (0, 50), mode="armed") != key(0, 32, (0, 50), mode="armed", id="j")
    assert key(0, 32, (0, 50), mode="armed") != key(0, 32, (0, 50))


# ---- orders ------------------------------------------------------------------------------------------------------


def test_an_order_survives_the_way_through_lists() -> None:
    order = Order("i", "p", "d", "armed", 9, 0, ((0, 4),), ((1, 3), (5, 6)), (0,))
    travelled = {
        k: [list(i) if isinstance(i, tuple) else i for i in v] if isinstance(v, tuple) else v
        for k, v in order.plain().items()
    }
    assert Order.of({KEY: travelled}) == order


@pytest.mark.parametrize("given", ["clamp", 3, {"plan": "clamp"}])
def test_steering_that_nobody_resolved_is_an_error(given: Any) -> None:
    with pytest.raises(ValueError, match="unresolved"):
        Order.of({KEY: given})


@pytest.mark.parametrize("text", ["", "1", "0110", "1101", "00", "111"])
def test_runs_are_the_positions_that_are_inside(text: str) -> None:
    inside = [c == "1" for c in text]
    assert [i for low, high in runs(inside) for i in range(low, high)] == [i for i, c in enumerate(inside) if c]


# ---- what is counted ---------------------------------------------------------------------------------------------


def tally(n_sites: int = 1) -> tuple[Sizes, torch.Tensor, Tally]:
    sizes, positions = Sizes([f"s{i}" for i in range(n_sites)], 8, "cpu"), torch.zeros(8, dtype=torch.long)
    return sizes, positions, Tally(sizes, positions, rows=3, longest=32)


def passed(
    parts: tuple[Sizes, torch.Tensor, Tally], rows: list[int], at: list[int], size: float = 1.0, length: float = 4.0
) -> None:
    sizes, positions, counted = parts
    positions[: len(at)] = torch.tensor(at)
    sizes.begin(len(rows), [True] * len(sizes.at))
    for site in sizes.at:
        sizes.write(site, torch.full((len(rows), 1), size), torch.full((len(rows),), length))
    counted.made(np.array(rows))


def test_a_position_that_is_computed_again_counts_once() -> None:
    parts = tally()
    passed(parts, [0, 0, 1], [0, 1, 0])
    passed(parts, [0, 0, 0], [0, 1, 2], size=2.0)
    assert parts[2].totals(0, 32) == (3, 0.5)
    assert parts[2].totals(1, 32) == (1, 0.25)


def test_a_replys_end_cuts_what_lies_behind_it() -> None:
    parts = tally()
    passed(parts, [0, 0, 0], [5, 6, 7])
    assert parts[2].totals(0, 7) == (2, 0.25)


def test_a_token_that_two_sites_change_is_one_token() -> None:
    parts = tally(2)
    passed(parts, [0], [3])
    assert parts[2].totals(0, 32) == (1, 0.25)


def test_a_token_that_went_past_a_hook_is_noticed() -> None:
    sizes, _, counted = tally(2)
    sizes.begin(2, [True, True])
    sizes.write("s0", torch.ones(2, 1), torch.ones(2))
    counted.made(np.array([1, -1]))
    assert counted.missed == {1}
    counted.start(1, measures=False)
    assert counted.missed == set()


def test_what_was_done_to_cached_blocks_is_remembered() -> None:
    parts = tally()
    passed(parts, [0, 0, 0], [0, 1, 3])
    parts[2].remember(0, ["a", "b"], 2)
    assert parts[2].recall(1, ["a", "other", "b"], 2) == [1]
    assert parts[2].totals(1, 6) == (3, 0.25)
    parts[2].unmeasured(1, 8, 12)
    assert parts[2].totals(1, 32) == (7, 0.25)


# ---- the edits' arithmetic ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def sae() -> Sae:
    return load_sae("organism")


OPERATORS = ("clamp", "clamp_active", "floor", "scale", "add")
DENSE = ("add_direction", "ablate_direction", "clamp_direction", "floor_direction")


def test_every_operator_is_that_of_the_general_way(lm: LanguageModel, sae: Sae) -> None:
    """All of them at once, in rows of their own, some features twice and some tokens out of reach."""
    site, width = sae.cfg.site.name, 6
    edits = [
        Edit(site=site, operator=o, features=(352, 7, i), strengths=(30.0, -4.0, 9.0)) for i, o in enumerate(OPERATORS)
    ]
    drawn = torch.Generator().manual_seed(1)
    vectors = {"v": tuple(torch.randn(lm.d_model, generator=drawn).tolist())}
    edits += [Edit(site=site, operator=o, vector="v", strengths=(0.7,)) for o in DENSE]
    edits += [Edit(site=site, operator="add", features=(9,), strengths=(5.0,), error_term="drop")]
    plans = [Plan.of(lm, [sae], [edit], str(i), vectors=vectors) for i, edit in enumerate(edits)]
    ours = SiteEdits(site, plans, sae, lm.d_model, len(plans) + 1, "cpu")
    x = 30 * torch.randn(len(plans), width, lm.d_model, generator=drawn)
    for row, plan in enumerate(plans):
        ours.write_row(row, plan, [(plan.edits[0], (1, 4))], math.inf)
    rows = torch.arange(len(plans)).repeat_interleave(width)
    positions = torch.arange(width).repeat(len(plans))
    flat = x.reshape(-1, lm.d_model)
    delta = ours.delta(flat, flat.norm(dim=-1), Where(rows, positions, None), always=False).view_as(x)
    (program,) = site_programs(plans, lm, {site: sae})
    inside = ((torch.arange(width) >= 1) & (torch.arange(width) < 4)).float().expand(len(plans), width)
    torch.testing.assert_close(delta, program.delta(x, {Reach("all", 0): inside}), atol=1e-3, rtol=1e-4)
    assert not delta[:, [0, 4, 5]].any(), "a token out of reach was changed"


def test_what_the_plugin_cannot_do_is_refused_by_name(lm: LanguageModel, sae: Sae) -> None:
    site = sae.cfg.site.name
    edit = Edit(site=site, operator="add", features=(7,), strengths=(5.0,))
    gate = Gate(site=site, features=(7,), poolings=("max",), weights=(1.0,), threshold=1.0)
    vectors = {"e": (1.0, *(0.0 for _ in range(lm.d_model - 1)))}
    refused = {
        "grows with": Plan.of(lm, [sae], [edit], "p", gate=gate.changed(least=0.5, full=2.0)),
        "corrects": Plan.of(lm, [sae], [edit.changed(error_term="correct", correction=("e",))], "p", vectors=vectors),
        "ensemble": Plan.of(
            lm, [sae], [edit], "p", gate=Gate(kind="ensemble", members=(gate, gate), threshold=1.0, window=8)
        ),
    }
    for why, plan in refused.items():
        with pytest.raises(PlanError, match=why):
            check_book(Book({"p": plan}, {site: sae}), lm)
    check_book(Book({"p": Plan.of(lm, [sae], [edit], "p", gate=gate)}, {site: sae}), lm)


def test_rows_are_written_over_and_sinks_are_left_out(lm: LanguageModel, sae: Sae) -> None:
    site = sae.cfg.site.name
    edit = Edit(site=site, operator="add", features=(7,), strengths=(5.0,))
    plan = Plan.of(lm, [sae], [edit], "p")
    ours = SiteEdits(site, [plan], sae, lm.d_model, 2, "cpu")
    x = torch.ones(1, lm.d_model)
    where = Where(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), None)

    def acts(limit: float, *edits: tuple[Edit, tuple[int, int]]) -> bool:
        ours.write_row(0, plan, edits, limit)
        return bool(ours.delta(x, x.norm(dim=-1), where, always=False).any())

    length = float(x.norm())
    assert acts(math.inf, (edit, (0, 1)))
    assert not acts(length * 0.9, (edit, (0, 1)))
    assert acts(length * 1.1, (edit, (0, 1)))
    assert not acts(math.inf)


def test_the_models_files_say_the_revision_of_the_loaded_model(lm: LanguageModel) -> None:
    assert load_identity("organism").revision == lm.revision
