"""Arms that share a prompt's pass give what each gives alone: for every family, site and kind of gate."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clampdown.errors import PlanError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate, next_token_logits
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.arms import BASELINE, Arm, batches, generate_arms
from clampdown.steering.hooks import Steering, steer
from clampdown.steering.plan import Edit, Gate, ModelRef, Plan, SaeRef
from clampdown.types import ArmKind, Message, Prompt, Site
from tests.models.conftest import ARCHITECTURES, BOS, WIDTH, IdTokenizer, build

NEW = 6


def sae_at(site: str, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(64, WIDTH, generator=generator), dim=-1)
    weights = {
        "W_enc": w_dec.T.clone(),
        "W_dec": w_dec,
        "b_enc": torch.zeros(64),
        "b_dec": 0.1 * torch.randn(WIDTH, generator=generator),
    }
    cfg = SaeConfig(architecture="relu", d_in=WIDTH, d_sae=64, site=Site.parse(site))
    return Sae(cfg, weights, name="random", revision="s0")


def plans_at(site: str, scale: float) -> list[Plan | None]:
    """Nine arms: the baseline, five operators and scopes, and three that need not be computed."""

    def plan(*edits: Edit, **more: object) -> Plan:
        refs = (SaeRef(site=site, name="random", revision="s0"),)
        return Plan(name="p", model=ModelRef(name="m", revision="r"), saes=refs, edits=edits, **more)  # type: ignore[arg-type]

    def edit(operator: str, strength: float, scope: str = "all", feature: int = 3) -> Edit:
        return Edit(site=site, operator=operator, features=(feature,), strengths=(strength * scale,), scope=scope)

    clamp = edit("clamp", 4.0)
    return [
        None,
        plan(clamp),
        plan(edit("clamp", 8.0, "prompt", 5)),
        plan(edit("floor", 6.0, "generated", 7)),
        plan(edit("add", -5.0, "all", 9), edit("clamp", 3.0, "generated", 11)),
        plan(edit("scale", 3.0 / scale, "all", 2)),
        plan(clamp),
        plan(edit("add", 0.0)),
        plan(edit("add", 5.0, "prompt", 1)),
    ]


def model_of(name: str) -> LanguageModel:
    model = build(name)
    return LanguageModel(model, IdTokenizer(), find_layout(model), "m", "r")


def plain_generate(lm: LanguageModel, sae: Sae, plan: Plan | None, prompts: list[list[int]]) -> list[list[int]]:
    """The library's own loop, one arm at a time."""
    batch = pad_left(prompts, lm.pad_id, lm.device)
    with steer(lm, plan, sae, require_reach=False):
        output = lm.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=lm.pad_id,
        )
    replies = output[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in lm.eos_ids), NEW)] for row in replies]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[BOS] + [draw.randrange(3, 60) for _ in range(draw.randint(2, 12))] for _ in range(5)]


OTHER_POINTS = [("gemma2", "mlp_out"), ("gpt_neox", "attn_out"), ("qwen3_moe", "resid_pre"), ("gpt2", "attn_out")]


@pytest.mark.parametrize(("architecture", "point"), [*((name, "resid_post") for name in ARCHITECTURES), *OTHER_POINTS])
def test_nine_arms_equal_nine_runs_of_the_librarys_generate(
    architecture: str, point: str, prompts: list[list[int]]
) -> None:
    lm = model_of(architecture)
    site = f"blocks.1.hook_{point}"
    sae, asked = sae_at(site), prompts
    plans = plans_at(site, scale=5.0)
    rows = [(plan, i) for i in range(len(asked)) for plan in plans]
    with steer(lm, [plan for plan, _ in rows], sae, prompt_of=torch.tensor([i for _, i in rows])) as steering:
        found = generate(
            lm,
            asked,
            max_new_tokens=NEW,
            on_keep=steering.keep_rows,
            widened=lambda: steering.row_map.prompt_of,
        )
    row_of = steering.row_map.row_of.tolist()
    assert len(found) == 7 * len(asked), "the doubled plan and the neutral one are not computed"
    replies = {}
    for (plan, i), row in zip(rows, row_of, strict=True):
        replies.setdefault(id(plan), {})[i] = list(found[row].ids)
    alone = {id(plan): plain_generate(lm, sae, plan, asked) for plan in plans}
    assert {key: [found[i] for i in range(len(asked))] for key, found in replies.items()} == alone
    assert sum(reply != alone[id(None)] for reply in alone.values()) >= 5, "these plans change nothing"


def widened(lm: LanguageModel, saes: Sae | list[Sae], plans: list[Plan | None], asked: list[list[int]]) -> Steering:
    """Every plan on every prompt, prompts outermost."""
    prompt_of = torch.arange(len(asked)).repeat_interleave(len(plans))
    with steer(lm, plans * len(asked), saes, prompt_of=prompt_of, require_reach=False) as steering:
        steering.outputs = next_token_logits(lm, asked)  # type: ignore[attr-defined]
    return steering


@pytest.mark.parametrize("sites", [("blocks.0.hook_resid_pre",), ("blocks.0.hook_mlp_out", "blocks.2.hook_resid_post")])
def test_plans_at_several_sites_and_at_the_very_first(sites: tuple[str, ...], prompts: list[list[int]]) -> None:
    lm = model_of("gemma3")
    saes = [sae_at(site, seed) for seed, site in enumerate(sites)]
    plans = [plan for site in sites for plan in plans_at(site, 5.0)[:3]]
    steering = widened(lm, saes, plans, prompts)
    row_of = steering.row_map.row_of.view(len(prompts), len(plans))
    for column, plan in enumerate(plans):
        with steer(lm, plan, saes):
            alone = next_token_logits(lm, prompts)
        torch.testing.assert_close(steering.outputs[row_of[:, column]], alone, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("gate_layer", [0, 1])
def test_a_row_whose_gate_stays_shut_is_the_baselines_row_and_has_its_own_score(
    gate_layer: int, lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    """The gate reads below the widening and at it; `lm`, `sae` are the tiny Llama with a chat template."""
    gate_site = f"blocks.{gate_layer}.hook_resid_post"
    saes = [sae] if gate_site == site else [sae, sae_at(gate_site)]
    asked = [encode(lm, [Message("user", text)]) for text in ("w1 w2 w3", "w9 w8 w7 w6 w5", "w30", "w4 w4")]
    refs = tuple(SaeRef(site=name, name="random", revision="s0") for name in {site, gate_site})
    edit = Edit(site=site, operator="clamp", features=(3,), strengths=(6.0,), scope="all")
    always = Plan(name="always", model=ModelRef(name="tiny", revision="r0"), saes=refs, edits=(edit,))
    gate = Gate(site=gate_site, features=(5, 9), weights=(1.0, -0.5), poolings=("max", "max"), bias=0.0, threshold=0.0)
    scores = _scores(lm, saes, always.model_copy(update={"gate": gate}), asked)
    gated = always.model_copy(update={"name": "gated", "gate": gate.model_copy(update={"threshold": scores[1]})})

    steering = widened(lm, saes, [None, gated, always], asked)
    receipts = steering.receipts()
    assert [r.gate_score for r in receipts if r and r.plan == "gated"] == pytest.approx(scores)
    for i, score in enumerate(scores):
        baseline, own, ungated = steering.row_map.row_of[3 * i : 3 * i + 3].tolist()
        fired = score > scores[1]
        assert receipts[3 * i + 1].gate_fired is fired
        assert (receipts[3 * i + 1].tokens_touched > 0) is fired
        assert own == baseline if not fired else own not in (baseline, ungated)
    assert 0 < sum(score > scores[1] for score in scores) < len(scores)


@pytest.mark.parametrize("strength", [6.0, 0.0])
def test_rows_that_share_a_verdict_read_above_the_widening_all_have_it_in_their_receipts(
    strength: float, lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    """Another plan edits block 0, so the gate of this one is read after prompts became rows."""
    early = Plan(
        name="early",
        model=ModelRef(name="tiny", revision="r0"),
        edits=(Edit(site="blocks.0.hook_resid_post", operator="add_direction", vector="v", strengths=(1.0,)),),
        vectors={"v": (1.0,) * WIDTH},
    )
    gate = Gate(site=site, features=(5,), weights=(1.0,), poolings=("max",), bias=1.0, threshold=0.0)
    gated = plan_of(Edit(site=site, operator="add", features=(3,), strengths=(strength,)), gate=gate)
    asked = [encode(lm, [Message("user", "w1 w2 w3")])]
    alone = _scores(lm, [sae], gated, asked)
    steering = widened(lm, sae, [None, early, gated, gated.model_copy(update={"name": "again"})], asked)
    receipts = steering.receipts()[2:]
    assert [r.gate_score for r in receipts if r] == pytest.approx(alone * 2)
    assert [r.gate_fired for r in receipts if r] == [True, True]
    assert steering.row_map.row_of[2] == steering.row_map.row_of[3]


def _scores(lm: LanguageModel, saes: list[Sae], plan: Plan, asked: list[list[int]]) -> list[float]:
    with steer(lm, plan, saes) as steering:
        next_token_logits(lm, asked)
        return [receipt.gate_score for receipt in steering.receipts() if receipt]


def test_a_row_that_names_no_prompt_is_an_error(lm: LanguageModel) -> None:
    with steer(lm, [None, None], prompt_of=torch.tensor([0, 3])), pytest.raises(PlanError, match="prompts up to 3"):
        next_token_logits(lm, [[1, 7], [1, 8]])


def test_arms_of_a_prompt_stay_in_one_batch_and_say_whose_reply_they_share(
    lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    clamp = plan_of(Edit(site=site, operator="clamp", features=(3,), strengths=(6.0,), scope="all"))
    arms = [BASELINE, Arm("clamp", ArmKind.FEATURE, clamp), Arm("again", ArmKind.FEATURE, clamp)]
    prompts = [Prompt(str(i), (Message("user", f"w{i} w{2 * i}"),), "s") for i in range(5)]
    pairs = [(arm, prompt) for arm in arms for prompt in prompts]
    cut = list(batches(lm, pairs, 8))
    assert [len(batch) for batch in cut] == [6, 6, 3]
    assert all(len({prompt.id for _, prompt, _ in batch}) * 3 == len(batch) for batch in cut)
    replies = generate_arms(lm, sae, pairs, max_new_tokens=4, batch_rows=8)
    assert [(r.arm.name, r.same_as) for r in replies if r.prompt.id == "2"] == [
        ("baseline", ""),
        ("clamp", ""),
        ("again", "clamp"),
    ]


def test_a_batch_that_does_not_fit_in_memory_is_halved_and_loses_nothing(
    lm: LanguageModel, sae: Sae, site: str, plan_of: Callable[..., Plan]
) -> None:
    clamp = plan_of(Edit(site=site, operator="clamp", features=(3,), strengths=(6.0,), scope="all"))
    arms = [BASELINE, Arm("clamp", ArmKind.FEATURE, clamp)]
    prompts = [Prompt(str(i), (Message("user", f"w{i} w{2 * i}"),), "s") for i in range(5)]
    pairs = [(arm, prompt) for arm in arms for prompt in prompts]
    whole = generate_arms(lm, sae, pairs, max_new_tokens=4)

    def allocate(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] > 2:
            torch.empty(1 << 60)  # the allocator's own error

    handle = lm.layout.blocks[2].register_forward_pre_hook(allocate)
    try:
        parts = generate_arms(lm, sae, pairs, max_new_tokens=4)
    finally:
        handle.remove()
    assert [(r.arm, r.prompt, r.text) for r in parts] == [(r.arm, r.prompt, r.text) for r in whole]
    assert [r.receipt and r.receipt.tokens_touched for r in parts] == [
        r.receipt and r.receipt.tokens_touched for r in whole
    ]
