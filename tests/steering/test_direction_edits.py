"""Coordinates that are set or raised: the formula in every mode, subspaces, and edits that would contradict them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clampdown.errors import PlanError, StrengthError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.steering.decoding import Decoding
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan, read_plan, write_plan
from clampdown.steering.prepared import Capacity, prepare
from clampdown.steering.program import Reach, check_plan, site_programs
from clampdown.steering.selftest import self_test
from clampdown.steering.units import in_words
from clampdown.types import Message

PlanOf = Callable[..., Plan]
SET = ("clamp_direction", "floor_direction")
WANTED = (3.0, -0.5)


def basis() -> Tensor:
    """Three orthonormal rows."""
    return torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(4)))[0].T


def vectors_of(rows: Tensor, lengths: tuple[float, ...] = (1.0, 2.0, 5.0)) -> dict[str, tuple[float, ...]]:
    """The plan's vectors need not be of length 1."""
    return {f"v{i}": tuple((length * row).tolist()) for i, (row, length) in enumerate(zip(rows, lengths, strict=False))}


def edits_of(site: str, operator: str, scope: str = "all") -> list[Edit]:
    return [
        Edit(site=site, operator=operator, vector=f"v{i}", strengths=(s,), scope=scope) for i, s in enumerate(WANTED)
    ]


@pytest.fixture(params=SET)
def plan(request: pytest.FixtureRequest, site: str, plan_of: PlanOf) -> Plan:
    return plan_of(*edits_of(site, request.param), vectors=vectors_of(basis()))


def expected(plan: Plan, x: Tensor) -> Tensor:
    """From the formula: coordinates along orthonormal rows become what was asked, all others stay."""
    rows, wanted = basis()[:2], torch.tensor(WANTED)
    now = x @ rows.T
    new = wanted.expand_as(now) if plan.edits[0].operator == "clamp_direction" else torch.maximum(now, wanted)
    return x - now @ rows + new @ rows


def test_the_coordinates_are_what_was_asked_and_the_others_stay(lm: LanguageModel, plan: Plan) -> None:
    x = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))
    (program,) = site_programs([plan, plan], lm, {})
    changed = x + program.delta(x, {Reach("all", 0): torch.ones(2, 5)})
    torch.testing.assert_close(changed, expected(plan, x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, x, atol=0.1)


def test_every_mode_gives_the_same(plan: Plan, site: str) -> None:
    """Plain passes against the formula put on by hand, the server's decoding, and a prepared model."""
    from tests.steering.conftest import tiny_llama

    lm = tiny_llama()
    prompts = [encode(lm, [Message("user", text)]) for text in ("w1 w2 w3", "w9 w8 w7 w6")]
    handle = lm.layout.blocks[1].register_forward_hook(lambda _module, _args, out: expected(plan, out))
    by_hand = [reply.ids for reply in generate(lm, prompts, max_new_tokens=8)]
    handle.remove()
    with steer(lm, plan) as steering:
        steered = [reply.ids for reply in generate(lm, prompts, max_new_tokens=8, on_keep=steering.keep_rows)]
        receipts = steering.receipts()
    assert steered == by_hand
    assert steered != [reply.ids for reply in generate(lm, prompts, max_new_tokens=8)]

    decoding, x = Decoding(lm, lambda _plan: ()), torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(6))
    with steer(lm, plan) as steering:
        lm.model(pad_left(prompts, lm.pad_id).input_ids, attention_mask=pad_left(prompts, lm.pad_id).attention_mask)
        decoding.join(steering.seats())
    torch.testing.assert_close(decoding._parts[site][0].apply(x), expected(plan, x), atol=1e-5, rtol=1e-5)

    prepared = prepare(lm, sites=[site], capacity=Capacity(rows=2, features=0, gate_features=0))
    batch = pad_left(prompts, lm.pad_id)
    with prepared.steer(plan, batch) as steering:
        out = lm.model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=8, do_sample=False)
        proofs = steering.receipts()
    width = batch.input_ids.shape[1]
    for row, ids in enumerate(steered):
        assert out[row, width : width + len(ids)].tolist() == list(ids)
    assert [r and r.tokens_touched for r in receipts] == [r and r.tokens_touched for r in proofs]


def test_the_self_test_knows_them(lm: LanguageModel, plan: Plan) -> None:
    assert all(check.passed for check in self_test(lm, plan))


def test_files_say_them_in_schema_5_and_older_plans_stay(
    plan: Plan, site: str, plan_of: PlanOf, tmp_path: Path
) -> None:
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    assert "schema_version = 5\n" in (tmp_path / "plan.toml").read_text()
    old = plan_of(Edit(site=site, operator="ablate_direction", vector="v0", strengths=(1.0,)), vectors=plan.vectors)
    assert old.schema_version == 1
    assert "coordinate along the vector 'v0'" in in_words(plan.edits[0])


def test_edits_that_would_move_a_coordinate_that_is_set_are_refused(
    lm: LanguageModel, site: str, plan_of: PlanOf
) -> None:
    rows = basis()
    slanted = torch.stack([rows[0], rows[0] + rows[1], rows[2]])

    def check(*edits: Edit) -> None:
        check_plan(plan_of(*edits, vectors=vectors_of(slanted)), lm, {})

    def edit(operator: str, vector: str, scope: str = "all") -> Edit:
        return Edit(site=site, operator=operator, vector=vector, strengths=(1.0,), scope=scope)

    for other in ("add_direction", "ablate_direction", *SET):
        for first in SET:
            with pytest.raises(PlanError, match="not at right angles"):
                check(edit(first, "v0"), edit(other, "v1", "prompt"))
            with pytest.raises(PlanError, match="twice"):
                check(edit(first, "v0"), edit(other, "v0", "prompt"))
            check(edit(first, "v0"), edit(other, "v2"))
            check(edit(first, "v0", "prompt"), edit(other, "v1", "generated"))
    check(edit("add_direction", "v0"), edit("ablate_direction", "v1"))


def test_they_take_no_features_and_no_error_term(site: str) -> None:
    with pytest.raises(PlanError, match="error_term"):
        Edit(site=site, operator="clamp_direction", vector="v", strengths=(1.0,), error_term="drop")
    with pytest.raises(PlanError, match="needs `vector`"):
        Edit(site=site, operator="floor_direction", features=(1,), strengths=(1.0,))
    with pytest.raises(StrengthError, match="finite"):
        Edit(site=site, operator="floor_direction", vector="v", strengths=(float("nan"),))
