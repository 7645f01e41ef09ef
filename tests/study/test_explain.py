"""The explanation against explicit forward passes with a plain hook, one text at a time, and against the cost table."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from clampdown.discovery.causal import clamp_plan
from clampdown.errors import PromptSetError
from clampdown.evaluation.utility import Forced, base_replies, costs
from clampdown.explanation import write_explanation
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.reports.explain_page import build_explanation_page
from clampdown.reports.explain_terminal import explanation_summary
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Branch, Gate, ModelRef, Plan
from clampdown.study import explaining as job
from clampdown.study.damage import Bench, damage, joints, norm_matched
from clampdown.study.explain import Inside, feature_shifts, look_inside
from clampdown.study.progress import Stages
from clampdown.types import ArmKind, Message, Prompt, Split
from tests.steering.conftest import SITE, random_sae, tiny_llama

FEATURE, STRENGTH = 3, 5.0


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="module")
def sae() -> Sae:
    return random_sae()


@pytest.fixture(scope="module")
def plan(lm: LanguageModel, sae: Sae) -> Plan:
    return clamp_plan(lm, sae, FEATURE, STRENGTH, "all")


@pytest.fixture(scope="module")
def texts(lm: LanguageModel) -> tuple[Forced, ...]:
    """Prompts and replies of different lengths, some of which end."""
    prompts = [
        Prompt(f"p{i}", (Message("user", " ".join(f"w{3 + i + j}" for j in range(1 + i))),), "benign") for i in range(5)
    ]
    replies = base_replies(lm, prompts, max_new_tokens=8)
    return tuple(Forced(t.prompt, t.reply[: 3 + i], ended=i % 2 == 0) for i, t in enumerate(replies))


@pytest.fixture(scope="module")
def found(lm: LanguageModel, sae: Sae, plan: Plan, texts: tuple[Forced, ...]) -> Inside:
    return look_inside(lm, [sae], plan, texts, batch_texts=2)


class ByHand:
    """One unpadded pass: each block's output, and log-probabilities, with or without the paper's clamp."""

    def __init__(self, lm: LanguageModel, sae: Sae, text: Forced, *, clamped: bool) -> None:
        self.blocks: dict[int, Tensor] = {}
        self.edit = torch.zeros(0)
        prompt = encode(lm, text.prompt.messages)
        ids = torch.tensor([[*prompt, *(text.reply if text.ended else text.reply[:-1])]])

        def clamp(_module: object, _args: object, output: Tensor) -> Tensor:
            code = sae.encode(output)
            changed = code.clone()
            changed[..., FEATURE] = STRENGTH
            self.edit = sae.decode(changed) - sae.decode(code)
            self.norm = self.edit.norm(dim=-1) / output.norm(dim=-1)
            return output + self.edit

        with ExitStack() as hooks, torch.no_grad():
            if clamped:
                hooks.callback(lm.layout.blocks[SITE.layer].register_forward_hook(clamp).remove)
            for i, block in enumerate(lm.layout.blocks):
                hooks.callback(
                    block.register_forward_hook(lambda _m, _a, out, i=i: self.blocks.update({i: out})).remove
                )
            logits = lm.model(input_ids=ids, use_cache=False).logits
        self.log_probs = logits[0, len(prompt) - 1 :][: text.n_scored].log_softmax(-1)
        self.content = ids[0] != 1  # not the BOS


@pytest.fixture(scope="module")
def pairs(lm: LanguageModel, sae: Sae, texts: tuple[Forced, ...]) -> list[tuple[ByHand, ByHand]]:
    return [(ByHand(lm, sae, t, clamped=False), ByHand(lm, sae, t, clamped=True)) for t in texts]


def mean(rows: Sequence[Tensor]) -> float:
    return float(torch.cat([row.flatten() for row in rows]).mean())


def test_the_cost_per_token_is_that_of_plain_passes(
    found: Inside, pairs: list[tuple[ByHand, ByHand]], texts: tuple[Forced, ...]
) -> None:
    kl = [(b.log_probs.exp() * (b.log_probs - a.log_probs)).sum(-1) for b, a in pairs]
    same = [(b.log_probs.argmax(-1) == a.log_probs.argmax(-1)).float() for b, a in pairs]
    assert found.cost.kl == pytest.approx(mean(kl), rel=1e-4)
    assert found.cost.top1_agreement.value == pytest.approx(mean(same))
    assert found.cost.n_tokens == sum(map(len, kl)) == sum(t.n_scored for t in texts)
    for which, value in ((0, found.cost.nll_before), (1, found.cost.nll_after)):
        surprise = []
        for pair, text in zip(pairs, texts, strict=True):
            targets = [*text.reply, *([5] if text.ended else [])]
            surprise.append(-pair[which].log_probs[torch.arange(len(targets)), targets])
        assert value == pytest.approx(mean(surprise), rel=1e-4)
    for place in found.by_place:
        at = [row[place.place - 1 : place.place] for row in kl]
        assert (place.kl, place.n) == (pytest.approx(mean(at), rel=1e-3), sum(map(len, at)))
    top = max((float(value), i, j) for i, row in enumerate(kl) for j, value in enumerate(row))
    moved = found.moved[0]
    assert (moved.kl, moved.prompt_id, moved.place) == (
        pytest.approx(top[0], rel=1e-3),
        texts[top[1]].prompt.id,
        top[2] + 1,
    )
    assert [m.kl for m in found.moved] == sorted((m.kl for m in found.moved), reverse=True)


def test_the_edit_and_how_far_it_travels_are_those_of_plain_passes(
    found: Inside, pairs: list[tuple[ByHand, ByHand]]
) -> None:
    (edit,) = found.site_edits
    everything = [a.norm for _, a in pairs]
    assert edit.touched * edit.relative_norm == pytest.approx(mean(everything), rel=1e-4)  # type: ignore[operator]
    assert [t.site for t in found.layers] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    for layer, travel in zip((1, 2), found.layers, strict=True):
        moved = [(a.blocks[layer] - b.blocks[layer], b.blocks[layer], a.edit) for b, a in pairs]
        assert travel.relative_norm == pytest.approx(
            mean([d.norm(dim=-1) / h.norm(dim=-1) for d, h, _ in moved]), rel=1e-4
        )
        assert travel.alignment == pytest.approx(
            mean([torch.cosine_similarity(d, e, dim=-1) for d, _, e in moved]), abs=1e-3
        )
    assert found.layers[0].alignment == pytest.approx(1, abs=1e-5)


def test_feature_shifts_are_those_of_plain_encodes(
    lm: LanguageModel, sae: Sae, plan: Plan, found: Inside, pairs: list[tuple[ByHand, ByHand]]
) -> None:
    shifts, (codes,) = feature_shifts(lm, [sae], plan, found)
    before, after = (torch.cat([sae.encode(p[i].blocks[1][0][p[0].content]) for p in pairs]) for i in (0, 1))
    assert codes.n_tokens == len(before)
    for shift in shifts:
        column = (before[:, shift.feature], after[:, shift.feature])
        assert shift.mean_before == pytest.approx(float(column[0].mean()), abs=1e-5)
        assert shift.mean_after == pytest.approx(float(column[1].mean()), abs=1e-5)
        assert shift.live_before == pytest.approx(float((column[0] > 0).float().mean()))
        assert shift.live_after == pytest.approx(float((column[1] > 0).float().mean()))
        row = torch.nn.functional.cosine_similarity(sae.W_dec[shift.feature], sae.W_dec[FEATURE], dim=0)
        assert shift.cosine == pytest.approx(float(row), abs=1e-5)
    assert (shifts[0].feature, shifts[0].steered) == (FEATURE, True)
    others = torch.arange(sae.cfg.d_sae) != FEATURE
    on = ((after > 0) & (before <= 0))[:, others].float().sum(1).mean()
    off = ((after <= 0) & (before > 0))[:, others].float().sum(1).mean()
    assert (codes.turned_on, codes.turned_off) == (pytest.approx(float(on)), pytest.approx(float(off)))


def test_controls_have_the_plans_size_and_pairs_their_own_cost(
    lm: LanguageModel, sae: Sae, plan: Plan, texts: tuple[Forced, ...], found: Inside
) -> None:
    bench = Bench(lm, (sae,), texts, ())
    rows, _, notes = damage(bench, norm_matched(bench, plan, found, n=2, seed=0))
    own = costs(lm, sae, [Arm("p", ArmKind.FEATURE, plan)], texts)["p"]
    assert (rows[0].kind, rows[0].kl, rows[0].edit_norm) == (
        "plan",
        pytest.approx(own.kl),
        pytest.approx(own.mean_edit),
    )
    matched = [row for row in rows if row.kind in ("feature", "direction")]
    assert {row.kind for row in matched} == {"feature", "direction"}
    for row in matched:
        assert row.edit_norm == pytest.approx(own.mean_edit, rel=0.025)
    assert sum(row.kind == "pass-through" for row in rows) == 1
    assert any("multiple choice" in note for note in notes)

    both = Plan.model_validate(
        {**dict(plan), "edits": (plan.edits[0].model_copy(update={"features": (3, 9), "strengths": (5.0, 4.0)}),)}
    )
    (joint,), _ = joints(bench, both)
    alone = [clamp_plan(lm, sae, f, s, "all") for f, s in ((3, 5.0), (9, 4.0))]
    arms = [Arm(name, ArmKind.FEATURE, each) for name, each in zip("ab+", [*alone, both], strict=True)]
    kl = {name: cost.kl or 0.0 for name, cost in costs(lm, sae, arms, texts).items()}
    assert joint.kl == pytest.approx(kl["+"], rel=1e-3)
    assert joint.sum_kl == pytest.approx(kl["a"] + kl["b"], rel=1e-3)
    assert joints(bench, plan) == ((), ())


def test_the_command_reads_benign_validation_prompts_and_its_page_stands_alone(
    lm: LanguageModel, sae: Sae, plan: Plan, tmp_path: Path
) -> None:
    request = job.Request(limit=4, controls=1, max_new_tokens=6)
    embedded = Plan.model_validate({**dict(plan), "model": ModelRef(name="organism", revision="r0")})
    benign, items = job.prompts_for(lm, embedded, request)
    assert [(p.suite, p.split) for p in benign] == [("benign", Split.VALIDATION)] * 4
    assert {p.suite for p in items} == {"facts", "misconceptions"}
    with pytest.raises(PromptSetError, match="no built-in"):
        job.prompts_for(lm, plan, request)

    benign = [Prompt(f"p{i}", (Message("user", f"w{i} w2"),), "benign") for i in range(3)]
    items = [replace(benign[0], suite="facts", options=("w1", "w2 w3"), answer="w1")]
    named = Plan.model_validate({**dict(plan), "name": "<script>plan"})
    found = job.explain_plan(lm, [sae], named, benign, items, request, Stages(Console(quiet=True)))
    write_explanation(tmp_path / "explain.json", found)
    data = json.loads((tmp_path / "explain.json").read_text())
    assert (data["kind"], list(data["baseline_accuracy"])) == ("explanation", ["facts"])
    page = build_explanation_page(found)
    assert not re.findall(r"(?:src|href)=\"(?!#)", page), "nothing from elsewhere"
    assert "<script" not in page
    assert "&lt;script&gt;plan" in page
    for row in found.damage[1:]:
        assert row.name in page
    console = Console(record=True, width=60, file=io.StringIO())
    console.print(explanation_summary(found, 60))
    text = console.export_text()
    assert "The damage is" in text
    assert max(map(len, text.splitlines())) <= 60


def test_both_gates_of_a_two_sided_plan_are_held_open(plan: Plan) -> None:
    gate = Gate(site=SITE.name, features=(1,), weights=(1.0,), bias=0.0, threshold=1.0, poolings=("max",))
    sided = Plan.model_validate({**dict(plan), "gate": gate, "otherwise": Branch(gate=gate, edits=plan.edits)})
    assert sided.ungated() == plan


def test_what_the_second_branch_does_is_not_counted_as_paid(lm: LanguageModel, sae: Sae, plan: Plan) -> None:
    """Only the first branch is explained, so only where it acts is its cost paid."""
    prompts = [Prompt(f"p{i}", (Message("user", f"w{i} w2"),), "benign") for i in range(3)]
    never, always = (
        Gate(site=SITE.name, features=(1,), weights=(1.0,), bias=bias, threshold=0.0, poolings=("max",))
        for bias in (-1e6, 1e6)
    )

    def fired(first: Gate, second: Gate) -> float | None:
        sided = {**dict(plan), "gate": first, "otherwise": Branch(gate=second, edits=plan.edits)}
        found = job.gate_fired(lm, [sae], Plan.model_validate(sided), prompts)
        return found and found.value

    assert fired(never, always) == 0.0
    assert fired(always, never) == 1.0
    assert fired(never, never) == 0.0
