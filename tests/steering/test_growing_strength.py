"""Strength that grows with the gate's score: one formula, in every way of running a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clampdown.errors import NotEnoughDataError, PlanError
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_batch
from clampdown.steering.decoding import Decoding
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, Plan, read_plan, write_plan
from clampdown.steering.prepared import prepare
from clampdown.steering.program import site_programs
from clampdown.steering.selftest import self_test
from clampdown.types import ArmKind, Message, Prompt, Site

PlanOf = Callable[..., Plan]
TEXTS = ("w1 w2 w3", "w9 w8 w7 w6 w5", "w11 w12", "w4", "w30 w31")
NEXT = Site.parse("blocks.2.hook_resid_pre")
LEAST = 0.25


def gate_of(site: str, **fields: object) -> Gate:
    return Gate(site=site, features=(9,), poolings=("max",), weights=(1.0,), bias=0.0, **fields)  # type: ignore[arg-type]


def batch_of(lm: LanguageModel) -> Batch:
    return pad_left([encode(lm, [Message("user", text)]) for text in TEXTS], lm.pad_id)


def residuals(lm: LanguageModel, plans: Plan | Sequence[Plan | None] | None, sae: Sae) -> tuple[Tensor, list]:
    """What the next block reads of the prompts, and the receipts."""
    batch, seen = batch_of(lm), []
    with steer(lm, plans, sae) as steering:
        handle = lm.layout.hook_point(NEXT).register(seen.append)
        lm.model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        handle.remove()
        receipts = steering.receipts()
    return seen[0], receipts


@pytest.fixture(scope="module")
def scores(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> list[float]:
    """The gate's score of each prompt: all different."""
    plan = plan_of(Edit(site=site, operator="add", features=(5,), strengths=(1.0,)), gate=gate_of(site, threshold=-1.0))
    found = [receipt.gate_score for receipt in residuals(lm, plan, sae)[1]]
    assert len(set(found)) == len(found)
    return found


@pytest.fixture(scope="module")
def gate(scores: list[float], site: str) -> Gate:
    """The lowest score leaves it shut, the highest is beyond `full`."""
    ordered = sorted(scores)
    return gate_of(site, threshold=ordered[0] + 1e-3, least=LEAST, full=ordered[3])


def formula(gate: Gate, score: float) -> float:
    assert gate.full is not None
    return float(np.clip(LEAST + (1 - LEAST) * (score - gate.threshold) / (gate.full - gate.threshold), LEAST, 1))


EDITS = {
    "clamp": {"features": (5, 3), "strengths": (6.0, 2.0)},
    "floor": {"features": (5,), "strengths": (6.0,)},
    "scale": {"features": (5,), "strengths": (-2.0,)},
    "add": {"features": (5,), "strengths": (6.0,)},
    "clamp_direction": {"vector": "v", "strengths": (4.0,)},
}
VECTORS = {"v": tuple(torch.randn(32, generator=torch.Generator().manual_seed(9)).tolist())}


@pytest.mark.parametrize("operator", [*EDITS, "drop"])
def test_the_change_is_the_full_change_times_the_factor(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, gate: Gate, scores: list[float], operator: str
) -> None:
    dropped = {"operator": "clamp", **EDITS["clamp"], "error_term": "drop"}
    edit = Edit(site=site, **(dropped if operator == "drop" else {"operator": operator, **EDITS[operator]}))
    plan = plan_of(edit, gate=gate, vectors=VECTORS)
    plain, _ = residuals(lm, None, sae)
    full, _ = residuals(lm, plan.ungated(), sae)
    found, receipts = residuals(lm, plan, sae)
    wanted = [formula(gate, score) if score > gate.threshold else 0.0 for score in scores]
    assert sorted(wanted)[0] == 0.0 and sum(LEAST < w < 1 for w in wanted) == 2 and wanted.count(1.0) == 2
    torch.testing.assert_close(
        found - plain, (full - plain) * torch.tensor(wanted).view(-1, 1, 1), atol=1e-4, rtol=1e-4
    )
    assert [r.factor or 0.0 for r in receipts] == pytest.approx(wanted, abs=1e-5)
    assert [r.gate_fired for r in receipts] == [w > 0 for w in wanted]
    ends = gate.changed(full=gate.threshold + 1e9)
    assert residuals(lm, plan.changed(gate=ends), sae)[1][scores.index(max(scores))].factor == pytest.approx(LEAST)


def test_replies_are_the_same_alone_in_a_batch_and_in_the_servers_decoding(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, gate: Gate
) -> None:
    edit = Edit(site=site, operator="clamp", features=(5,), strengths=(9.0,))
    plan = plan_of(edit, gate=gate)
    prompts = [encode(lm, [Message("user", text)]) for text in TEXTS]
    alone = []
    for ids in prompts:
        with steer(lm, plan, sae) as steering:
            (reply,) = generate(lm, [ids], max_new_tokens=6)
            alone.append((list(reply.ids), steering.receipts()[0]))
    shown = [Prompt(f"p{i}", (Message("user", text),), "s") for i, text in enumerate(TEXTS)]
    rows = [
        (Arm(name, ArmKind.TUNED, each), prompt, ids)
        for prompt, ids in zip(shown, prompts, strict=True)
        for name, each in (("grown", plan), ("full", plan.ungated()), ("again", plan))
    ]
    shared = generate_batch(lm, [sae], rows, 6)  # rows of one prompt share its pass
    for i, (ids, receipt) in enumerate(alone):
        for reply in (shared[3 * i], shared[3 * i + 2]):
            assert reply.text == lm.tokenizer.decode(ids, skip_special_tokens=True)
            assert reply.receipt.factor == (receipt.factor and pytest.approx(receipt.factor, abs=1e-5))
        assert shared[3 * i + 1].receipt.factor is None
    decoding = Decoding(lm, lambda _plan: [sae])
    batch = batch_of(lm)
    with steer(lm, plan, sae) as steering:
        lm.model(batch.input_ids, attention_mask=batch.attention_mask)
        decoding.join(steering.seats())
    x = torch.randn(len(TEXTS), 1, 32, generator=torch.Generator().manual_seed(6))
    (program,) = site_programs([plan.ungated()] * len(TEXTS), lm, {site: sae})
    every = {reach: torch.ones(len(TEXTS), 1) for reach in program.reaches}
    factors = torch.tensor([receipt.factor or 0.0 for _, receipt in alone])
    wanted = x + program.delta(x, every) * factors.view(-1, 1, 1)
    torch.testing.assert_close(decoding._parts[site][0].apply(x), wanted, atol=1e-4, rtol=1e-4)
    assert [decoding.receipt(row).factor for row in range(len(TEXTS))] == pytest.approx(
        [receipt.factor for _, receipt in alone], abs=1e-6
    )


def test_turn_by_turn_the_score_that_counts_says_it(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, gate: Gate, scores: list[float]
) -> None:
    edit = Edit(site=site, operator="add", features=(5,), strengths=(6.0,))
    turns = [Message("user", TEXTS[0]), Message("assistant", "w2"), Message("user", TEXTS[1])]
    for threshold in (-1.0, gate.threshold):
        windowed = gate.changed(window=8, threshold=threshold, full=max(scores) + 5)
        with steer(lm, plan_of(edit, gate=windowed), sae) as steering:
            lm.model(torch.tensor([encode(lm, turns)]))
            (receipt,) = steering.receipts()
        assert receipt.turns_read == 2
        assert receipt.factor == pytest.approx(formula(windowed, receipt.gate_score), abs=1e-6)
        assert LEAST < receipt.factor < 0.9


def test_each_side_of_a_two_sided_plan_has_its_own(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, gate: Gate, scores: list[float]
) -> None:
    up, down = (Edit(site=site, operator="add", features=(5,), strengths=(s,)) for s in (6.0, -6.0))
    other = Branch(gate=gate_of(site, threshold=-1.0, least=0.5, full=max(scores) + 1), edits=(down,))
    plan = plan_of(up, gate=gate.changed(threshold=sorted(scores)[2]), otherwise=other)
    plain, _ = residuals(lm, None, sae)
    found, receipts = residuals(lm, plan, sae)
    full, _ = residuals(lm, plan.ungated(), sae)
    for row, (score, receipt) in enumerate(zip(scores, receipts, strict=True)):
        asked = plan.gates[receipt.branch == "otherwise"]
        sign = -1 if receipt.branch == "otherwise" else 1
        assert receipt.factor == pytest.approx(asked.factor(score), abs=1e-5)
        torch.testing.assert_close(
            found[row] - plain[row], sign * receipt.factor * (full - plain)[row], atol=1e-4, rtol=1e-4
        )
    assert {receipt.branch for receipt in receipts} == {"edits", "otherwise"}


def test_files_say_it_in_schema_5_and_other_gates_stay(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, gate: Gate, tmp_path: Path
) -> None:
    edit = Edit(site=site, operator="add", features=(5,), strengths=(6.0,))
    plan, plain = plan_of(edit, gate=gate), plan_of(edit, gate=gate.changed(least=1.0, full=None))
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan and plan.schema_version == 5
    assert plain.schema_version == 1 and plain.digest != plan.digest
    write_plan(tmp_path / "plain.toml", plain)
    assert "least" not in (tmp_path / "plain.toml").read_text()
    checks = self_test(lm, plan.changed(gate=gate.changed(threshold=-1.0)), sae)
    assert all(check.passed for check in checks) and "score says" in checks[-1].name


def test_what_it_cannot_be_and_who_cannot_do_it(sae: Sae, site: str, plan_of: PlanOf, gate: Gate) -> None:
    from tests.steering.conftest import tiny_llama

    for wrong in ({"full": None}, {"least": 1.0}, {"least": -0.1}, {"full": gate.threshold}, {"full": float("inf")}):
        with pytest.raises(PlanError):
            gate.changed(**wrong)
    own = tiny_llama()
    prepared = prepare(own, [sae])
    plan = plan_of(Edit(site=site, operator="add", features=(5,), strengths=(6.0,)), gate=gate)
    with pytest.raises(PlanError, match="strength grows"), prepared.steer(plan, [encode(own, [Message("user", "w1")])]):
        pass
    prepared.detach()


def test_full_strength_is_at_the_median_of_the_prompts_that_fire(gate: Gate) -> None:
    flat = FittedGate(gate.changed(least=1.0, full=None, threshold=2.0), {})
    found = flat.growing(np.array([0.0, 1.0, 3.0, 4.0, 9.0, 2.0]), 0.3).gate
    assert (found.least, found.full) == (0.3, 4.0)
    with pytest.raises(NotEnoughDataError, match="fires on none"):
        flat.growing(np.array([1.0, 2.0]), 0.3)
