"""Steering in 16 bit, while streaming, and its self-test."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TextIteratorStreamer

from clampdown.cli import main as cli
from clampdown.errors import SteeringNotAppliedError
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering import selftest
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Gate, Plan, write_plan
from clampdown.steering.prepared import Capacity, prepare
from clampdown.types import Message, Site
from tests.steering.test_prepared import edit_of, logits, mixed_plans, prompts

PlanOf = Callable[..., Plan]
HALF = [torch.bfloat16, torch.float16]


def half_lm(dtype: torch.dtype) -> LanguageModel:
    from tests.steering.conftest import tiny_llama

    lm = tiny_llama()
    lm.model.to(dtype)
    return lm


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["steer", "prepare"])
def test_in_16_bit_activations_are_read_in_32_and_zero_strength_is_exact(
    sae: Sae, site: str, plan_of: PlanOf, dtype: torch.dtype, way: str
) -> None:
    lm = half_lm(dtype)
    batch = prompts(lm)
    plan = plan_of(edit_of(site, "clamp", 3.0))
    zero = plan_of(edit_of(site, strength=0.0), edit_of(site, "scale", 1.0))
    plain = logits(lm, batch)
    prepared = prepare(lm, sae, capacity=Capacity(rows=4, gate_features=0)) if way == "prepare" else None

    def steered(which: Plan):
        return steer(lm, which, sae) if prepared is None else prepared.steer(which, batch)

    seen: list[torch.Tensor] = []
    point, above = (lm.layout.hook_point(Site.parse(name)) for name in (site, "blocks.2.hook_resid_pre"))
    x = lm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
    ).hidden_states[2]
    with steered(zero):
        assert torch.equal(logits(lm, batch), plain)
    handle = above.register(seen.append)
    with steered(plan) as steering:
        assert logits(lm, batch).dtype == dtype
        receipts = steering.receipts()
    handle.remove()
    assert x.dtype == seen[0].dtype == dtype
    delta = (3.0 - sae.encode(x.float())[..., 5]).unsqueeze(-1) * sae.W_dec[5]
    real = batch.attention_mask.bool()
    # Equal to the last bit but for sums that lie between two 16-bit numbers.
    error = (seen[0][real] - (x + delta.to(dtype))[real]).abs()
    assert float((error > 0).float().mean()) < 0.01
    assert all(r is not None and r.tokens_touched == int(n) for r, n in zip(receipts, real.sum(1), strict=True))
    assert point.module is lm.layout.blocks[1]


@pytest.mark.parametrize("dtype", HALF)
def test_in_16_bit_both_ways_generate_the_same(sae: Sae, site: str, plan_of: PlanOf, dtype: torch.dtype) -> None:
    lm = half_lm(dtype)
    batch, plans = prompts(lm), mixed_plans(site, plan_of)
    with steer(lm, plans, sae):
        expected = logits(lm, batch)
    prepared = prepare(lm, sae, capacity=Capacity(rows=4, gate_features=0))
    with prepared.steer(plans, batch):
        found = logits(lm, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=0.1, rtol=0.02)


def test_streaming_is_steered_in_the_thread_that_gets_the_context(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch = pad_left([encode(lm, [Message("user", "w1 w2 w3")])], lm.pad_id)
    options = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "max_new_tokens": 8}
    with steer(lm, plan_of(edit_of(site)), sae) as steering:
        out = lm.model.generate(**options, do_sample=False)
        (expected,) = steering.receipts()
        text = lm.tokenizer.decode(out[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
    with steer(lm, plan_of(edit_of(site)), sae) as steering:
        streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        run = contextvars.copy_context().run
        worker = threading.Thread(
            target=run, args=(lm.model.generate,), kwargs={**options, "do_sample": False, "streamer": streamer}
        )
        worker.start()
        pieces = list(streamer)
        worker.join()
        assert steering.receipts() == [expected]
    assert "".join(pieces).split() == text.split()
    assert len(pieces) > 2


def checks_of(lm: LanguageModel, plan: Plan, sae: Sae | list[Sae]) -> dict[str, bool]:
    return {check.name: check.passed for check in selftest.self_test(lm, plan, sae)}


def test_the_self_test_passes_for_every_operator_and_dtype(sae: Sae, site: str, plan_of: PlanOf) -> None:
    from tests.steering.conftest import tiny_llama

    gate = Gate(site=site, features=(5,), poolings=("max",), weights=(1.0,), bias=0.0, threshold=1e9)
    for lm in (tiny_llama(), half_lm(torch.bfloat16)):
        for plan in mixed_plans(site, plan_of):
            if plan is not None:
                assert all(checks_of(lm, plan, sae).values())
        plan = plan_of(edit_of(site, "clamp", scope="generated", error_term="drop"), gate=gate)
        found = checks_of(lm, plan, sae)
        assert len(found) == 6
        assert all(found.values())


def test_the_self_test_sees_what_is_broken(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(edit_of(site, "clamp", 5.0))
    with monkeypatch.context() as patch:
        patch.setattr("clampdown.steering.program.SiteProgram.delta", lambda _self, x, _weights: torch.ones_like(x))
        found = checks_of(lm, plan, sae)
    assert not found["strength zero is the identity, bit for bit"]
    assert not found["the residual changes as the formula says"]
    with monkeypatch.context() as patch:
        patch.setattr("clampdown.steering.program.SiteProgram.delta", lambda _self, x, _weights: torch.zeros_like(x))
        found = checks_of(lm, plan, sae)
        assert not found["the plan changes the logits"]
        with pytest.raises(SteeringNotAppliedError, match="self-test of plan 'test' failed"):
            selftest.require_self_test(lm, plan, sae)
    assert all(checks_of(lm, plan, sae).values())


def test_the_check_command_prints_a_table_and_fails_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, sae = load_model("organism"), load_sae("organism")
    ref = {"site": sae.site.name, "name": sae.name, "revision": sae.revision}
    plan = Plan(
        name="clamp",
        model={"name": "organism", "revision": lm.revision},  # type: ignore[arg-type]
        saes=(ref,),  # type: ignore[arg-type]
        edits=(Edit(site=sae.site.name, operator="clamp", features=(5,), strengths=(3.0,)),),
    )
    path = tmp_path / "plan.toml"
    write_plan(path, plan)

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["clampdown", "check", str(path)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    assert run() == 0
    assert capsys.readouterr().out.count("ok") >= 5
    monkeypatch.setattr("clampdown.steering.program.SiteProgram.delta", lambda _self, x, _weights: torch.zeros_like(x))
    assert run() == 2
    assert "checks failed" in capsys.readouterr().err
