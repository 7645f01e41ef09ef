"""The SAE's error is passed on within the span of the plan's vectors and nowhere else, however a model is run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clampdown.discovery.error_subspace import fit_error_subspace, subspace_of_error
from clampdown.errors import PlanError, PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.decoding import Decoding
from clampdown.steering.fused import decoding_step
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan, read_plan, write_plan
from clampdown.steering.prepared import prepare
from clampdown.steering.program import Reach, check_plan, site_programs
from clampdown.steering.selftest import self_test
from clampdown.steering.units import in_words
from clampdown.study.correcting import correct
from clampdown.types import Message, Prompt

PlanOf = Callable[..., Plan]
FEATURES, VALUES = (5, 3), (6.0, 2.0)
ROWS = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(4)))[0].T
VECTORS = {f"e{i}": tuple(row.tolist()) for i, row in enumerate(ROWS)}


def edit_of(site: str, *names: str, **fields: object) -> Edit:
    said = {"site": site, "operator": "clamp", "features": FEATURES, "strengths": VALUES} | fields
    if names:
        said |= {"error_term": "correct", "correction": names}
    return Edit(**said)  # type: ignore[arg-type]


@pytest.fixture
def plan(site: str, plan_of: PlanOf) -> Plan:
    return plan_of(edit_of(site, "e0", "e1", "e2"), vectors=VECTORS)


def by_hand(sae: Sae, x: Tensor, rows: Tensor) -> Tensor:
    """decode(edited features) + P (x - decode(features)), from the whole SAE."""
    features = sae.encode(x)
    edited = features.clone()
    edited[..., list(FEATURES)] = torch.tensor(VALUES)
    error = x - sae.decode(features)
    return sae.decode(edited) + torch.einsum("rd,...d,re->...e", rows, error, rows)


def test_it_is_the_formula_and_between_keep_and_drop(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, plan: Plan
) -> None:
    x = 2 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5))
    dropped, kept = plan_of(edit_of(site, error_term="drop")), plan_of(edit_of(site))
    other = plan_of(edit_of(site, "e3"), vectors=VECTORS)
    rows = [plan, dropped, kept, other, plan, None]
    (program,) = site_programs(rows, lm, {site: sae})
    x = x[:1].expand(6, 5, 32)
    found = x + program.delta(x, {Reach("all", 0): torch.ones(6, 5)})
    every = torch.eye(32)
    for row, basis in enumerate((ROWS[:3], ROWS[:0], every, ROWS[3:], ROWS[:3])):
        torch.testing.assert_close(found[row], by_hand(sae, x[row], basis), atol=1e-4, rtol=1e-4)
    assert torch.equal(found[5], x[5])
    alone = program.at(torch.tensor([3])).delta(x[:1], {Reach("all", 0): torch.ones(1, 5)})
    torch.testing.assert_close(x[:1] + alone, found[3:4])
    assert decoding_step(program, {Reach("all", 0): torch.ones(6, 1)}) is None


def test_every_mode_gives_the_same_or_says_no(lm: LanguageModel, sae: Sae, site: str, plan: Plan) -> None:
    prompts = [encode(lm, [Message("user", text)]) for text in ("w1 w2 w3", "w9 w8 w7 w6")]
    handle = lm.layout.blocks[1].register_forward_hook(lambda _module, _args, out: by_hand(sae, out, ROWS[:3]))
    wanted = [reply.ids for reply in generate(lm, prompts, max_new_tokens=8)]
    handle.remove()
    with steer(lm, plan, sae) as steering:
        steered = [reply.ids for reply in generate(lm, prompts, max_new_tokens=8, on_keep=steering.keep_rows)]
    assert steered == wanted != [reply.ids for reply in generate(lm, prompts, max_new_tokens=8)]
    decoding, batch = Decoding(lm, lambda _plan: [sae]), pad_left(prompts, lm.pad_id)
    with steer(lm, plan, sae) as steering:
        lm.model(batch.input_ids, attention_mask=batch.attention_mask)
        decoding.join(steering.seats())
    x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(decoding._parts[site][0].apply(x), by_hand(sae, x, ROWS[:3]), atol=1e-4, rtol=1e-4)
    from tests.steering.conftest import tiny_llama

    own = tiny_llama()
    prepared = prepare(own, [sae])
    with pytest.raises(PlanError, match="this plan corrects it"), prepared.steer(plan, prompts):
        pass
    assert all(check.passed for check in self_test(lm, plan, sae))


def test_files_say_it_in_schema_5_and_digests_of_older_plans_stay(
    plan: Plan, site: str, plan_of: PlanOf, tmp_path: Path
) -> None:
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan and plan.schema_version == 5
    assert "but for what lies in 3 directions" in in_words(plan.edits[0])
    dropped = plan_of(edit_of(site, error_term="drop"))
    write_plan(tmp_path / "old.toml", dropped)
    assert dropped.schema_version == 1 and "correction" not in (tmp_path / "old.toml").read_text()
    assert not plan.is_identity and plan.edits[0].keeping_error().error_term == "keep"


def test_what_cannot_be_is_refused(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    for wrong in ({"error_term": "correct"}, {"correction": ("e0",)}, {"error_term": "drop", "correction": ("e0",)}):
        with pytest.raises(PlanError, match="correction"):
            edit_of(site, **wrong)
    with pytest.raises(PlanError, match="not among"):
        plan_of(edit_of(site, "nothing"), vectors=VECTORS)
    long = {**VECTORS, "e1": tuple(2 * value for value in VECTORS["e1"])}
    for vectors, names in ((long, ("e0", "e1")), (VECTORS, ("e0", "e0"))):
        with pytest.raises(PlanError, match="not orthonormal"):
            check_plan(plan_of(edit_of(site, *names), vectors=vectors), lm, {site: sae})
    apart = edit_of(site, "e1", features=(9,), strengths=(1.0,), scope="generated")
    for second in (edit_of(site, features=(9,), strengths=(1.0,), error_term="drop"), apart.changed(scope="all")):
        with pytest.raises(PlanError, match="two ways"):
            check_plan(plan_of(edit_of(site, "e0"), second, vectors=VECTORS), lm, {site: sae})
    both = plan_of(edit_of(site, "e0", scope="prompt"), apart, vectors=VECTORS)
    check_plan(both, lm, {site: sae})
    assert all(check.passed for check in self_test(lm, both, sae))


def test_the_leading_directions_of_an_error_are_found() -> None:
    rng = np.random.default_rng(0)
    planted = np.zeros((200, 16))
    planted[:, 3], planted[:, 7] = 5 + rng.normal(size=200), 2 * rng.normal(size=200)  # one of them mostly a mean
    error = torch.tensor(planted + 0.01 * rng.normal(size=(200, 16)))
    x = torch.tensor(rng.normal(size=(200, 16)) * 3)
    found = subspace_of_error(x, error, 2)
    eye = torch.eye(16)[[3, 7]]
    torch.testing.assert_close((found.directions @ eye.T).abs(), torch.eye(2), atol=0.1, rtol=0)
    left = error - error @ found.directions.double().T @ found.directions.double()
    variance = float((x - x.mean(0)).square().sum())
    assert found.fvu == pytest.approx(float(left.square().sum()) / variance, rel=1e-4)
    assert found.dropped == pytest.approx(float(error.square().sum()) / variance)


def test_a_plan_is_corrected_on_ordinary_text(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    prompts = [Prompt(f"p{i}", (Message("user", f"w{i} w{i + 1}"),), "s") for i in range(6)]
    found = correct(lm, sae, plan_of(edit_of(site), vectors={"x": VECTORS["e0"]}), prompts, 5)
    check_plan(found, lm, {site: sae})
    assert found.edits[0].correction == tuple(f"error{i}" for i in range(5)) and set(found.vectors) > {"x"}
    fitted = [fit_error_subspace(lm, sae, prompts, rank) for rank in (1, 5, 32)]
    assert fitted[0].fvu > fitted[1].fvu > fitted[2].fvu == pytest.approx(0, abs=1e-9)
    with pytest.raises(PlanError, match="1 to 32"):
        fit_error_subspace(lm, sae, prompts, 33)
    with pytest.raises(PromptSetError, match="benign"):
        fit_error_subspace(lm, sae, [], 3)
