"""Steering equals the mathematics, row by row and token by token, and what did not happen is an error."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clampdown.errors import FeatureIndexError, PlanError, PlanMismatchError, ScopeError, SteeringNotAppliedError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import Steering, steer
from clampdown.steering.plan import Edit, Gate, ModelRef, Plan
from clampdown.types import Message, Site

PlanOf = Callable[..., Plan]
PROMPTS = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5", "w11 w12"]


def ids_of(lm: LanguageModel, text: str) -> list[int]:
    return encode(lm, [Message("user", text)])


def batch(lm: LanguageModel, texts: list[str]) -> dict[str, Tensor]:
    padded = pad_left([ids_of(lm, text) for text in texts], lm.pad_id)
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}


def feature_edit(site: str, operator: str = "clamp", strength: float = 3.0, **fields: object) -> Edit:
    return Edit(site=site, operator=operator, features=(5,), strengths=(strength,), **fields)  # type: ignore[arg-type]


class naive_hook:
    """The plain way, written apart from the product: encode everything, edit the code, decode, keep the error."""

    def __init__(self, lm: LanguageModel, sae: Sae, edit: Callable[[Tensor], Tensor], *, drop: bool = False) -> None:
        def hook(_m: object, _a: object, x: Tensor) -> Tensor:
            code = sae.encode(x)
            changed = sae.decode(edit(code.clone()), x)
            return changed if drop else changed + (x - sae.decode(code, x))

        self.handle = lm.layout.blocks[1].register_forward_hook(hook)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def clamp_code(code: Tensor) -> Tensor:
    code[..., 5] = 3.0
    return code


def scale_code(code: Tensor) -> Tensor:
    code[..., 5] *= 3.0
    return code


def add_code(code: Tensor) -> Tensor:
    code[..., 5] += 3.0
    return code


def clamp_active_code(code: Tensor) -> Tensor:
    code[..., 5] = torch.where(code[..., 5] > 0, 3.0, code[..., 5])
    return code


def floor_code(code: Tensor) -> Tensor:
    code[..., 5] = code[..., 5].clamp(min=3.0)
    return code


NAIVE = {
    "clamp": clamp_code,
    "scale": scale_code,
    "add": add_code,
    "clamp_active": clamp_active_code,
    "floor": floor_code,
}


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("operator", list(NAIVE))
@pytest.mark.parametrize(
    "sae_config",
    [
        {"architecture": "jumprelu"},
        {"architecture": "relu"},
        {"architecture": "topk", "k": 8},
        {"architecture": "relu", "normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_operator_equals_encode_edit_decode(
    lm: LanguageModel,
    sae_of: Callable[..., Sae],
    site: str,
    plan_of: PlanOf,
    operator: str,
    drop: bool,
    sae_config: dict,
) -> None:
    sae = sae_of(**sae_config)
    # Enough tokens that feature 5 is among a top-k code somewhere.
    inputs = {"input_ids": torch.randint(6, 46, (4, 24), generator=torch.Generator().manual_seed(0))}
    with naive_hook(lm, sae, NAIVE[operator], drop=drop):
        expected = lm.model(**inputs).logits
    plan = plan_of(feature_edit(site, operator, error_term="drop" if drop else "keep"))
    with steer(lm, plan, sae):
        found = lm.model(**inputs).logits
    assert not torch.allclose(expected, lm.model(**inputs).logits, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_ablating_a_direction_leaves_no_projection_and_adding_one_adds_it(
    lm: LanguageModel, site: str, plan_of: PlanOf
) -> None:
    vector = torch.randn(32)
    seen: list[Tensor] = []
    point = lm.layout.hook_point(Site(2).parse("blocks.2.hook_resid_pre"))
    for operator in ("ablate_direction", "add_direction"):
        plan = plan_of(
            Edit(site=site, operator=operator, vector="v", strengths=(1.0,)), vectors={"v": tuple(vector.tolist())}
        )
        with steer(lm, plan):
            handle = point.register(lambda x: seen.append(x))
            lm.model(torch.tensor([[7, 8, 9]]))
            handle.remove()
    handle = point.register(lambda x: seen.append(x))
    lm.model(torch.tensor([[7, 8, 9]]))
    handle.remove()
    ablated, added, plain = seen
    assert (ablated @ vector).abs().max() < 1e-4
    torch.testing.assert_close(added, plain + vector)


def test_rows_with_their_own_plans_equal_single_runs(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    plans = [
        plan_of(feature_edit(site)),
        None,
        plan_of(feature_edit(site, "scale", -4.0), feature_edit(site, "add", 2.0, scope="assistant")),
        plan_of(Edit(site=site, operator="clamp", features=(9, 5), strengths=(4.0, 1.0), scope="generated")),
    ]
    together = [ids_of(lm, text) for text in PROMPTS]
    with steer(lm, plans, sae, require_reach=False) as steering:
        mixed = generate(lm, together, max_new_tokens=12, on_keep=steering.keep_rows)
        receipts = steering.receipts()
    for plan, prompt, got, receipt in zip(plans, together, mixed, receipts, strict=True):
        with steer(lm, plan, sae, require_reach=False) as alone:
            (expected,) = generate(lm, [prompt], max_new_tokens=12, on_keep=alone.keep_rows)
            (proof,) = alone.receipts()
        assert got.ids == expected.ids
        assert (proof is None) == (receipt is None)
        if proof and receipt:
            assert receipt.tokens_touched == proof.tokens_touched
            assert receipt.edit_norm == pytest.approx(proof.edit_norm, rel=1e-3)


def hf_generate(lm: LanguageModel, texts: list[str], **options: object) -> Tensor:
    return lm.model.generate(**batch(lm, texts), max_new_tokens=10, do_sample=False, **options)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "assistant", "last_user"])
def test_dynamic_static_and_no_cache_agree(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, scope: str) -> None:
    plan = plan_of(feature_edit(site, "add", 6.0, scope=scope))
    results, proofs = [], []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        with steer(lm, plan, sae) as steering:
            results.append(hf_generate(lm, PROMPTS, **options))
            proofs.append([r.tokens_touched for r in steering.receipts() if r])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert proofs[0] == proofs[2]
    if scope in ("prompt", "assistant", "last_user"):
        assert proofs[0] == proofs[1]


def test_scopes_touch_exactly_their_tokens(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    """The prompt is <bos><user> 3 words <end><assistant>; 4 tokens are generated, of which 3 are fed back."""
    expected = {"all": 7 + 3, "prompt": 7, "generated": 3, "assistant": 1 + 3, "last_user": 3}
    prompt = ids_of(lm, "w1 w2 w3")
    assert len(prompt) == 7
    for scope, tokens in expected.items():
        with steer(lm, plan_of(feature_edit(site, "add", 0.01, scope=scope)), sae) as steering:
            lm.model.generate(torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
            (receipt,) = steering.receipts()
        assert receipt is not None
        assert receipt.tokens_touched == tokens, scope


def test_last_user_is_the_last_turn_only(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    talk = [Message("user", "w1 w2"), Message("assistant", "w3 w4 w5"), Message("user", "w6 w7 w8 w9")]
    with steer(lm, plan_of(feature_edit(site, "add", 1.0, scope="last_user")), sae) as steering:
        lm.model(torch.tensor([encode(lm, talk)]))
        (receipt,) = steering.receipts()
    assert receipt is not None and receipt.tokens_touched == 4


def test_a_left_padded_batch_equals_single_prompts(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    plan = plan_of(feature_edit(site, "clamp", 5.0))
    with steer(lm, plan, sae):
        together = hf_generate(lm, PROMPTS)
    for row, text in zip(together, PROMPTS, strict=True):
        with steer(lm, plan, sae):
            (alone,) = hf_generate(lm, [text])
        new = row[together.shape[1] - 10 :]
        assert new[: len(alone) - len(ids_of(lm, text))].tolist() == alone[len(ids_of(lm, text)) :].tolist()


def test_padding_is_never_touched(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    with steer(lm, plan_of(feature_edit(site, "add", 1.0)), sae) as steering:
        lm.model(**batch(lm, PROMPTS))
        touched = [r.tokens_touched for r in steering.receipts() if r]
    assert touched == [len(ids_of(lm, text)) for text in PROMPTS]


def test_zero_strength_and_no_plan_are_bit_exact_identities(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    inputs = batch(lm, PROMPTS)
    plain = lm.model(**inputs).logits
    zero = [plan_of(feature_edit(site, "add", 0.0)), plan_of(feature_edit(site, "scale", 1.0)), None, None]
    with steer(lm, zero, sae) as steering:
        assert torch.equal(lm.model(**inputs).logits, plain)
        assert [r and r.tokens_touched for r in steering.receipts()] == [0, 0, None, None]


def gate(site: str, threshold: float) -> Gate:
    poolings = ("max", "max", "assistant_start", "mean")
    weights = (1.0, 1.0, -0.5, 2.0)
    return Gate(site=site, features=(5, 7, 9, 9), poolings=poolings, weights=weights, bias=0.5, threshold=threshold)


def gate_score(lm: LanguageModel, sae: Sae, text: str) -> float:
    """By hand: at the output of block 1, over the content tokens and at the assistant's header."""
    hidden = lm.model(torch.tensor([ids_of(lm, text)]), output_hidden_states=True).hidden_states[2]
    content = sae.encode(hidden[0, 2 : 2 + len(text.split())])
    start = sae.encode(hidden[0, -1])[9]
    return float(content[:, [5, 7]].amax(0).sum() - 0.5 * start + 2.0 * content[:, 9].mean() + 0.5)


def test_gates_decide_per_row_from_the_prompt_and_unfired_rows_are_bit_exact(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    scores = [gate_score(lm, sae, text) for text in PROMPTS]
    threshold = sum(sorted(scores)[1:3]) / 2
    plan = plan_of(feature_edit(site, "add", 6.0), gate=gate(site, threshold))
    inputs = batch(lm, PROMPTS)
    plain = lm.model(**inputs).logits
    with steer(lm, plan, sae) as steering:
        steered = lm.model(**inputs).logits
        receipts = steering.receipts()
    for row, (score, receipt) in enumerate(zip(scores, receipts, strict=True)):
        assert receipt is not None
        assert receipt.gate_score == pytest.approx(score, abs=1e-4)
        assert receipt.gate_fired == (score > threshold)
        assert torch.equal(steered[row], plain[row]) != receipt.gate_fired
        assert (receipt.tokens_touched > 0) == receipt.gate_fired


def test_a_gate_holds_for_the_whole_turn_and_is_read_again_on_the_next(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    scores = {text: gate_score(lm, sae, text) for text in PROMPTS}
    low, high = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    plan = plan_of(feature_edit(site, "add", 6.0), gate=gate(site, (scores[low] + scores[high]) / 2))
    with steer(lm, plan, sae) as steering:
        for text, fires in ((low, False), (high, True), (low, False)):
            hf_generate(lm, [text])
            (receipt,) = steering.receipts()
            assert receipt is not None and receipt.gate_fired is fires


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(order=st.permutations([2, 5, 11, 30]), strength=st.floats(-5, 5, width=32))
def test_order_of_features_does_not_matter_and_disjoint_deltas_add(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, order: list[int], strength: float
) -> None:
    ids = torch.tensor([[7, 9, 12, 30]])
    strengths = {f: strength + f for f in order}

    def residual(*features: int) -> Tensor:
        edit = Edit(
            site=site, operator="clamp", features=tuple(features), strengths=tuple(strengths[f] for f in features)
        )
        seen: list[Tensor] = []
        with steer(lm, plan_of(edit), sae):
            handle = lm.layout.hook_point(Site(2).parse("blocks.2.hook_resid_pre")).register(lambda x: seen.append(x))
            lm.model(ids)
            handle.remove()
        return seen[0]

    plain = lm.model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(residual(*order), residual(*sorted(order)), atol=1e-4, rtol=1e-5)
    apart = (residual(*order[:2]) - plain) + (residual(*order[2:]) - plain)
    torch.testing.assert_close(residual(*order) - plain, apart, atol=1e-4, rtol=1e-4)


def hooks_left(lm: LanguageModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def test_an_exception_leaves_nothing_on_the_model(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    inputs = batch(lm, PROMPTS)
    plain, before = lm.model(**inputs).logits, hooks_left(lm)

    def fail() -> None:
        with steer(lm, plan_of(feature_edit(site)), sae):
            lm.model(**inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert hooks_left(lm) == before
    assert torch.equal(lm.model(**inputs).logits, plain)


def test_two_threads_with_two_plans_do_not_mix(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    plans = [plan_of(feature_edit(site, "add", s)) for s in (9.0, -9.0)] + [None]
    expected = []
    for plan in plans:
        with steer(lm, plan, sae):
            expected.append(hf_generate(lm, PROMPTS).tolist())
    assert expected[0] != expected[1] != expected[2]
    mixed: dict[tuple[int, int], object] = {}
    start = threading.Barrier(len(plans))

    def work(i: int) -> None:
        start.wait()
        for repeat in range(4):
            with steer(lm, plans[i], sae):
                mixed[i, repeat] = hf_generate(lm, PROMPTS).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == {(i, repeat): expected[i] for i in range(len(plans)) for repeat in range(4)}


def test_a_thread_that_did_not_enter_the_block_gets_an_error_and_one_with_its_context_is_steered(
    lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    caught: list[BaseException] = []
    with steer(lm, plan_of(feature_edit(site)), sae) as steering:

        def work() -> None:
            try:
                lm.model(torch.tensor([[7, 8]]))
            except SteeringNotAppliedError as error:
                caught.append(error)

        stray = threading.Thread(target=work)
        stray.start()
        stray.join()
        assert len(caught) == 1
        streaming = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        streaming.start()
        streaming.join()
        assert len(caught) == 1
        assert [r.tokens_touched for r in steering.receipts() if r] == [2]


def test_what_did_not_happen_is_an_error(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    with pytest.raises(SteeringNotAppliedError, match="no forward pass"), steer(lm, plan_of(feature_edit(site)), sae):
        pass
    with (
        pytest.raises(ScopeError, match="never covered"),
        steer(lm, plan_of(feature_edit(site, scope="generated")), sae),
    ):
        lm.model(torch.tensor([[7, 8]]))
    with (
        pytest.raises(ScopeError, match="assistant header"),
        steer(lm, plan_of(feature_edit(site, scope="assistant")), sae),
    ):
        lm.model(torch.tensor([[7, 8]]))


def test_a_plan_for_something_else_is_refused(
    lm: LanguageModel, sae: Sae, sae_of: Callable[..., Sae], site: str, plan_of: PlanOf
) -> None:
    def refused(error: type[Exception], plan: Plan | list[Plan], with_sae: Sae = sae) -> None:
        with pytest.raises(error), steer(lm, plan, with_sae):
            lm.model(torch.tensor([[7, 8]]))

    plan = plan_of(feature_edit(site))
    refused(PlanMismatchError, plan.model_copy(update={"model": ModelRef(name="tiny", revision="other")}))
    refused(PlanMismatchError, plan, Sae(sae.cfg, sae.tensors, name="random", revision="other"))
    refused(FeatureIndexError, plan_of(Edit(site=site, operator="clamp", features=(64,), strengths=(1.0,))))
    refused(PlanError, [plan, plan])
    dense = Edit(site=site, operator="add_direction", vector="v", strengths=(1.0,))
    refused(PlanMismatchError, plan_of(dense, vectors={"v": (1.0, 2.0)}))
    refused(PlanError, plan_of(dense, vectors={"v": (0.0,) * 32}))


def test_steering_twice_in_one_place_is_refused(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    with steer(lm, None), pytest.raises(PlanError, match="already"), steer(lm, plan_of(feature_edit(site)), sae):
        pass


def test_several_sites_in_one_plan(lm: LanguageModel, site: str, plan_of: PlanOf) -> None:
    vector = tuple(torch.randn(32).tolist())
    edits = [
        Edit(site=name, operator="add_direction", vector="v", strengths=(1.0,))
        for name in ("blocks.0.hook_resid_post", "blocks.2.hook_resid_pre")
    ]
    seen: list[Tensor] = []

    def shift(_m: object, _a: object, x: Tensor) -> Tensor:
        return x + torch.tensor(vector)

    ids = torch.tensor([[7, 8, 9]])
    handles = [lm.layout.blocks[0].register_forward_hook(shift), lm.layout.blocks[1].register_forward_hook(shift)]
    expected = lm.model(ids).logits
    for handle in handles:
        handle.remove()
    with steer(lm, plan_of(*edits, vectors={"v": vector})):
        seen.append(lm.model(ids).logits)
    torch.testing.assert_close(seen[0], expected)


def test_receipts_measure_the_edit(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    ids = torch.tensor([[7, 8, 9, 10]])
    x = lm.model(ids, output_hidden_states=True).hidden_states[2][0]
    delta = (3.0 - sae.encode(x)[:, 5]).unsqueeze(-1) * sae.W_dec[5]
    expected = (delta.norm(dim=-1) / x.norm(dim=-1)).mean()
    with steer(lm, plan_of(feature_edit(site)), sae) as steering:
        lm.model(ids)
        (receipt,) = steering.receipts()
    assert receipt is not None and receipt.tokens_touched == 4
    assert receipt.edit_norm == pytest.approx(float(expected), rel=1e-4)
    assert isinstance(steering, Steering)
