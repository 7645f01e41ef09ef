"""Every way of calling a model: what one plain `generate` gives, or an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from clampdown.activations.sinks import sinks_at
from clampdown.errors import ScopeError, SteeringNotAppliedError
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.types import Message, Receipt, Site
from tests.models.conftest import build
from tests.steering.conftest import make_plan, tiny_llama, tiny_tokenizer

SITE = "blocks.1.hook_resid_post"
SCOPES = ("all", "prompt", "generated", "assistant", "last_user")
TEXTS = ["w1 w2 w3 w30 w2 w1 w2", "w4", "w9 w8 w7 w6 w5"]
NEW = 8
STRENGTH = 6.0
Done = tuple[Tensor, list[Receipt]]


def family(name: str) -> LanguageModel:
    """Sliding windows of 4 columns in gemma3."""
    if name == "llama":
        return tiny_llama()
    model = build(name)
    return LanguageModel(model, tiny_tokenizer(), find_layout(model), "tiny", "r0")


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def any_lm(request: pytest.FixtureRequest) -> LanguageModel:
    return family(request.param)


def edit(scope: str = "all", strength: float = STRENGTH) -> Edit:
    return Edit(site=SITE, operator="add", features=(5,), strengths=(strength,), scope=scope)


def gate(threshold: float = 0.0) -> Gate:
    return Gate(
        site=SITE,
        features=(5, 9, 9),
        poolings=("max", "mean", "assistant_start"),
        weights=(1.0, 2.0, -0.5),
        threshold=threshold,
    )


def prompts(lm: LanguageModel, texts: list[str] = TEXTS) -> Batch:
    return pad_left([encode(lm, [Message("user", text)]) for text in texts], lm.pad_id)


def run(lm: LanguageModel, sae: Sae, plan: Plan, batch: Batch, **options: Any) -> Done:
    with steer(lm, plan, sae, require_reach=False) as steering:
        out = lm.model.generate(
            batch.input_ids,
            **{"attention_mask": batch.attention_mask, "max_new_tokens": NEW, "do_sample": False, **options},
        )
        return out, [r for r in steering.receipts() if r]


def assert_same(found: Done, wanted: Done) -> None:
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one.tokens_touched == other.tokens_touched
        assert one.edit_norm == pytest.approx(other.edit_norm, rel=1e-4)
        assert one.gate_fired == other.gate_fired
        assert (one.gate_score or 0.0) == pytest.approx(other.gate_score or 0.0, abs=1e-4)


def some_fire(lm: LanguageModel, sae: Sae, batch: Batch) -> Plan:
    """A gated plan that acts on some of these prompts and not on others."""
    _, receipts = run(lm, sae, make_plan(edit(), gate=gate()), batch)
    scores = sorted(r.gate_score or 0.0 for r in receipts)
    return make_plan(edit(), gate=gate(sum(scores[:2]) / 2))


WAYS: dict[str, dict[str, Any]] = {
    "pieces of 1": {"prefill_chunk_size": 1},
    "pieces of 3": {"prefill_chunk_size": 3},
    "pieces of 64": {"prefill_chunk_size": 64},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache in pieces": {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 3},
    "no mask": {"attention_mask": None},
    "no mask, in pieces": {"attention_mask": None, "prefill_chunk_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_decoding_changes_neither_reply_nor_receipt_nor_verdict(
    way: str, any_lm: LanguageModel, sae: Sae
) -> None:
    batch = prompts(any_lm)
    plans = [make_plan(edit(scope)) for scope in ("prompt", "assistant", "last_user")]
    for plan in [*plans, some_fire(any_lm, sae, batch)]:
        assert_same(run(any_lm, sae, plan, batch, **WAYS[way]), run(any_lm, sae, plan, batch))


@pytest.mark.parametrize("guess", ["prompt lookup", "assistant"])
def test_guesses_that_are_rejected_are_not_counted(guess: str, any_lm: LanguageModel, sae: Sae) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if guess == "assistant":
        other = build("llama", seed=3)
        options = {"assistant_model": other, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"}
    batch = prompts(any_lm, TEXTS[:1])
    for plan in (make_plan(edit("generated")), make_plan(edit("assistant")), make_plan(edit(), gate=gate(-99.0))):
        assert_same(run(any_lm, sae, plan, batch, **options), run(any_lm, sae, plan, batch))


def test_rows_that_end_early_are_counted_as_if_alone(sae: Sae) -> None:
    """The library goes on feeding them padding until the longest reply ends."""
    lm = tiny_llama(seed=4)
    texts = [f"w{i} w{i + 7}" for i in range(12)]
    plan = make_plan(edit("generated", 0.5))
    _, together = run(lm, sae, plan, prompts(lm, texts), max_new_tokens=24)
    alone = [run(lm, sae, plan, prompts(lm, [text]), max_new_tokens=24)[1][0] for text in texts]
    assert [r.tokens_touched for r in together] == [r.tokens_touched for r in alone]
    assert len({r.tokens_touched for r in alone}) > 2, "this case shows nothing"


def test_several_sampled_replies_to_a_prompt_are_rows_of_their_own(lm: LanguageModel, sae: Sae) -> None:
    batch = prompts(lm, TEXTS[:2])
    twice = Batch(*(t.repeat_interleave(2, 0) for t in (batch.input_ids, batch.attention_mask)))
    for plan in (make_plan(edit("last_user")), some_fire(lm, sae, prompts(lm))):
        for options in ({}, {"prefill_chunk_size": 3}):
            torch.manual_seed(0)
            found = run(lm, sae, plan, batch, do_sample=True, num_return_sequences=2, **options)
            torch.manual_seed(0)
            assert_same(found, run(lm, sae, plan, twice, do_sample=True))


# ---- turns on one cache ------------------------------------------------------------------------------------------


def forward(lm: LanguageModel, sae: Sae, ids: list[int], steered: list[bool]) -> Tensor:
    """Logits [pos, vocab] from one pass over everything, with the plain formula at the columns that are steered."""
    delta = STRENGTH * sae.W_dec[5] * torch.tensor(steered, dtype=torch.float32)[:, None]

    def add(_module: Any, _args: Any, output: Any) -> Any:
        return output + delta if isinstance(output, Tensor) else (output[0] + delta, *output[1:])

    handle = lm.layout.blocks[1].register_forward_hook(add)
    logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def plain_turn(lm: LanguageModel, sae: Sae, ids: list[int], steered: list[bool], reply: bool) -> tuple[list[int], Any]:
    """A greedy reply, token by token; `steered` is known of the prompt, `reply` of what is fed after it."""
    start = len(ids)
    while len(ids) < start + NEW and (len(ids) == start or ids[-1] not in lm.eos_ids):
        flags = steered + [reply] * (len(ids) - start)
        ids = [*ids, int(forward(lm, sae, ids, flags)[-1].argmax())]
    return ids, steered + [reply] * (len(ids) - start - 1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", [*SCOPES, "gated"])
def test_a_second_turn_on_the_first_ones_cache_has_a_prompt_a_verdict_and_a_receipt_of_its_own(
    kind: str, name: str, sae: Sae
) -> None:
    """Against passes over everything with a twin of the model, the plain formula at the columns that should be steered.
    What an earlier turn did to its columns stays."""
    lm, twin = family(name), family(name)
    turns = [encode(lm, [Message("user", "w11 w12")]), [5, 2, 7, 45, 20, 33, 44, 5, 3], [5, 2, 12, 9, 5, 3]]

    def score(ids: list[int]) -> float:
        with steer(twin, make_plan(edit(), gate=gate()), sae) as steering:
            twin.model(torch.tensor([ids]))
            (receipt,) = steering.receipts()
        assert receipt is not None and receipt.gate_score is not None
        return receipt.gate_score

    threshold = score(turns[0]) + 1e-3  # the first turn stays unsteered
    plan = make_plan(edit(), gate=gate(threshold)) if kind == "gated" else make_plan(edit(kind))
    cache, past, ids, flags, fired = DynamicCache(config=lm.model.config), 0, [], [], []
    with steer(lm, plan, sae, require_reach=False) as steering:
        for more in turns:
            prompt = ids + more
            fires = kind != "gated" or score(prompt) > threshold
            own, reply = covered(kind, prompt[past:], fires)
            ids, flags = plain_turn(twin, sae, prompt, flags + own, reply)
            options = {"attention_mask": torch.ones(1, len(prompt)), "max_new_tokens": NEW, "do_sample": False}
            ends = sorted(lm.eos_ids)
            out = lm.model.generate(torch.tensor([prompt]), past_key_values=cache, eos_token_id=ends, **options)
            (receipt,) = steering.receipts()
            assert out[0].tolist() == ids
            assert receipt is not None and receipt.tokens_touched == sum(flags[past:])
            if kind == "gated":
                assert (receipt.gate_fired, receipt.gate_score) == (fires, pytest.approx(score(prompt), abs=1e-3))
            past, fired = len(ids) - 1, [*fired, fires]
    assert kind != "gated" or name != "llama" or fired == [False, True, True], "this case shows nothing"


def covered(kind: str, new: list[int], fires: bool) -> tuple[list[bool], bool]:
    """Which of a prompt's new columns a scope covers, and whether it covers the reply. Ids below 6 are special."""
    words = [token >= 6 for token in new]
    end = len(words) - words[::-1].index(True)
    start = end - [*words[:end][::-1], False].index(False)
    inside = {
        "all": range(len(new)),
        "gated": range(len(new) if fires else 0),
        "prompt": range(len(new)),
        "generated": range(0),
        "assistant": range(len(new) - 1, len(new)),
        "last_user": range(start, end),
    }[kind]
    return [i in inside for i in range(len(new))], kind in ("all", "generated", "assistant") or (
        kind == "gated" and fires
    )


def test_a_second_turn_by_hand_is_what_it_is_through_generate(lm: LanguageModel, sae: Sae) -> None:
    first, more = encode(lm, [Message("user", "w1 w2")]), [5, 2, 7, 20, 33, 5, 3]
    for plan in (make_plan(edit("prompt")), make_plan(edit(), gate=gate(-99.0)), make_plan(edit("last_user"))):
        with steer(lm, plan, sae) as steering:
            options = {"do_sample": False, "past_key_values": DynamicCache(config=lm.model.config)}
            out = lm.model.generate(torch.tensor([first]), min_new_tokens=4, max_new_tokens=4, **options)
            whole = torch.cat([out, torch.tensor([more])], dim=1)
            mask = torch.ones_like(whole)
            wanted = lm.model.generate(whole, attention_mask=mask, max_new_tokens=1, **options)[0, -1]
            (proof,) = steering.receipts()
        with steer(lm, plan, sae) as steering:
            cache = lm.model(torch.tensor([first]), use_cache=True).past_key_values
            for token in out[0, len(first) : -1]:
                lm.model(token.view(1, 1), past_key_values=cache)
            logits = lm.model(whole[:, cache.get_seq_length() :], past_key_values=cache).logits
            assert int(logits[0, -1].argmax()) == int(wanted)
            assert steering.receipts() == [proof]


# ---- padding -----------------------------------------------------------------------------------------------------


def right_padded(batch: Batch, spare: int = 2) -> tuple[Batch, list[slice]]:
    """The same prompts, padded behind, and where each one's tokens are."""
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    width = max(map(len, rows)) + spare
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Batch(ids, mask), [slice(0, len(row)) for row in rows]


@pytest.mark.parametrize("kind", [*SCOPES, "gated"])
def test_a_pass_over_right_padded_prompts_is_that_over_left_padded_ones(
    kind: str, any_lm: LanguageModel, sae: Sae
) -> None:
    batch = prompts(any_lm)
    plan = some_fire(any_lm, sae, batch) if kind == "gated" else make_plan(edit(kind))
    found: list[Done] = []
    padded, places = right_padded(batch)
    for shown in (batch, padded):
        positions = (shown.attention_mask.cumsum(1) - 1).clamp(min=0)
        with steer(any_lm, plan, sae, require_reach=False) as steering:
            logits = any_lm.model(shown.input_ids, attention_mask=shown.attention_mask, position_ids=positions).logits
            found.append((logits, [r for r in steering.receipts() if r]))
    rows = zip(found[0][0], found[1][0], places, strict=True)
    for left, right, place in rows:
        torch.testing.assert_close(right[place], left[-place.stop :], atol=1e-4, rtol=1e-4)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one.tokens_touched, one.gate_fired) == (other.tokens_touched, other.gate_fired)
        assert (one.gate_score or 0.0) == pytest.approx(other.gate_score or 0.0, abs=1e-4)


def test_padding_is_what_the_mask_says_and_not_what_a_token_looks_like(lm: LanguageModel, sae: Sae) -> None:
    ids = torch.tensor([[0, 0, 7, 8], [0, 9, 10, 11]])
    masks = {"none": (None, [4, 4]), "plain": (torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), [3, 4])}
    square = torch.tril(torch.ones(4, 4, dtype=torch.bool)).expand(2, 1, 4, 4).clone()
    square[0, :, :, 0] = False
    masks["by query and key"] = (square, [3, 4])
    for mask, touched in masks.values():
        with steer(lm, make_plan(edit()), sae) as steering:
            lm.model(ids, attention_mask=mask)
            assert [r.tokens_touched for r in steering.receipts() if r] == touched


# ---- hidden states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured_before", [False, True])
@pytest.mark.parametrize("site", [SITE, "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_hidden_states_are_the_steered_ones_whoever_hooked_the_model_first(
    site: str, captured_before: bool, any_lm: LanguageModel
) -> None:
    name = type(any_lm.model).__name__  # a model that nobody has hooked yet
    lm = family({"Qwen3ForCausalLM": "qwen3"}.get(name, "gemma3"))
    ids = torch.tensor([[1, 7, 8, 9]])
    seen: list[Tensor] = []
    sinks_at(lm, [Site.parse(site)])  # a pass of its own, the first time that a site is steered
    if captured_before:
        lm.model(ids, output_hidden_states=True)  # the library puts its hooks on at the first such call, for good
        lm.layout.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    vector = tuple((torch.arange(32) % 5 - 2.0).tolist())
    add = Edit(site=site, operator="add_direction", vector="v", strengths=(0.5,))
    with steer(lm, make_plan(add, vectors={"v": vector})):
        steered = lm.model(ids, output_hidden_states=True).hidden_states
    plain = lm.model(ids, output_hidden_states=True).hidden_states
    if not site.endswith("mlp_out"):
        torch.testing.assert_close(steered[2], plain[2] + 0.5 * torch.tensor(vector))
    assert torch.equal(steered[1], plain[1]) and not torch.allclose(steered[2], plain[2])
    if captured_before:
        assert torch.equal(seen[0], steered[2])


# ---- models inside others ----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """What a package for adapters puts around a model: it hands calls on to the model inside."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]


class Int8Linear(nn.Module):
    """A weight in 8 bits with a scale per row, as quantised models have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight_int8 = (linear.weight / self.scale).round().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight_int8 * self.scale).T


@pytest.mark.parametrize("wrapped", ["adapter", "quantised"])
def test_adapters_and_quantised_weights_leave_everything_as_it_is(wrapped: str, sae: Sae) -> None:
    inner = tiny_llama()
    if wrapped == "quantised":
        for block in inner.layout.blocks:
            block.mlp.up_proj = Int8Linear(block.mlp.up_proj)  # type: ignore[union-attr,arg-type]
    outer = Adapted(inner.model) if wrapped == "adapter" else inner.model
    lm = LanguageModel(outer, inner.tokenizer, inner.layout, "tiny", "r0")  # type: ignore[arg-type]
    batch = prompts(inner)
    for plan in (make_plan(edit("assistant")), some_fire(inner, sae, batch)):
        wanted = run(inner, sae, plan, batch)
        for options in ({}, {"prefill_chunk_size": 3}, {"use_cache": False}):
            assert_same(run(lm, sae, plan, batch, **options), wanted)
    assert "generate" not in vars(inner.model), "the wrapper is gone with the block"


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance_scale": 1.5}, "guidance"),
        ({"num_beams": 2}, "beams"),
        ({"custom_generate": "somewhere/loop"}, "custom_generate"),
        ({"cache_implementation": "paged"}, "packs requests"),
        ({"token_healing": True}, "token_healing"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"assistant_early_exit": 1, "prompt_lookup_num_tokens": None}, "assistant_early_exit"),
    ],
)
def test_a_way_of_decoding_that_cannot_be_followed_is_refused_before_anything_runs(
    options: dict[str, Any], says: str, lm: LanguageModel, sae: Sae
) -> None:
    with pytest.raises(SteeringNotAppliedError, match=says):
        run(lm, sae, make_plan(edit()), prompts(lm, TEXTS[:1]), **options)
    if "num_beams" in options:
        with steer(lm, None):
            lm.model.generate(prompts(lm).input_ids, max_new_tokens=2, **options)


def refused(error: type[Exception], says: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=says):
        call()


def test_what_generate_cannot_answer_rightly_is_refused(lm: LanguageModel, sae: Sae) -> None:
    batch, plan = prompts(lm), make_plan(edit())
    padded, _ = right_padded(batch)
    refused(SteeringNotAppliedError, "end in padding", lambda: run(lm, sae, plan, padded))
    holed = batch.attention_mask.clone()
    holed[:, -3] = 0
    refused(SteeringNotAppliedError, "holes", lambda: run(lm, sae, plan, Batch(batch.input_ids, holed)))
    refused(
        SteeringNotAppliedError,
        "inside another call",
        lambda: run(lm, sae, plan, prompts(lm, TEXTS[:1]), assistant_model=lm.model),
    )


def test_a_loop_of_ones_own_that_can_be_read_in_two_ways_is_an_error(lm: LanguageModel, sae: Sae) -> None:
    ids = prompts(lm, TEXTS[:1]).input_ids

    def loop(plan: Plan, *widths: int, cache: bool = True, cut: int = 0, **told: Any) -> list[Receipt | None]:
        """Passes of these widths, with a cache that is cut by `cut` columns after the second."""
        with steer(lm, plan, sae, require_reach=False, **told) as steering:
            kept, start = DynamicCache(config=lm.model.config) if cache else None, 0
            for i, width in enumerate(widths):
                shown = ids[:, start : start + width] if cache else ids[:, :width]
                lm.model(shown, past_key_values=kept, use_cache=cache)
                start += width
                if i == 1 and cut and kept is not None:
                    kept.crop(-cut)
                    start -= cut
            return steering.receipts()

    tells, alike = make_plan(edit("prompt")), make_plan(edit())
    gated = make_plan(edit(), gate=gate(-99.0))
    refused(SteeringNotAppliedError, "next piece", lambda: loop(tells, 4, 3))
    refused(SteeringNotAppliedError, "next piece", lambda: loop(gated, 4, 3))
    refused(SteeringNotAppliedError, "one token more", lambda: loop(tells, 4, 5, cache=False))
    refused(SteeringNotAppliedError, "one token more", lambda: loop(gated, 4, 5, cache=False))
    refused(SteeringNotAppliedError, "guesses", lambda: loop(alike, 4, 1, 2, cut=1))
    refused(SteeringNotAppliedError, "only 4", lambda: loop(gated, 4, 3, prompt_width=7))
    refused(SteeringNotAppliedError, "only 4", lambda: loop(make_plan(edit("last_user")), 4, 3, prompt_width=7))
    touched = {
        "pieces that are alike": (loop(alike, 4, 3, 2), 9),
        "pieces of a told prompt": (loop(tells, 4, 3, 1, prompt_width=7), 7),
        "a given reply": (loop(tells, 4, 3, prompt_width=4), 4),
        "no cache, alike": (loop(alike, 4, 5, 6, cache=False), 6),
        "no cache, told": (loop(tells, 4, 5, 6, cache=False, prompt_width=4), 4),
        "a token taken back": (loop(alike, 4, 1, 1, cut=1), 5),
        "guesses taken back": (loop(alike, 4, 3, 2, cut=2, prompt_width=4), 7),
    }
    assert {name: receipts[0] and receipts[0].tokens_touched for name, (receipts, _) in touched.items()} == {
        name: wanted for name, (_, wanted) in touched.items()
    }


def test_a_cache_that_this_block_did_not_fill_is_an_error(lm: LanguageModel, sae: Sae) -> None:
    ids, plan = prompts(lm, TEXTS[:1]).input_ids, make_plan(edit())

    def filled() -> Any:
        return lm.model(ids[:, :-1], use_cache=True).past_key_values

    def go_on(by_hand: bool) -> None:
        cache = filled()
        with steer(lm, plan, sae):
            if by_hand:
                lm.model(ids[:, -1:], past_key_values=cache)
            else:
                lm.model.generate(ids, past_key_values=cache, max_new_tokens=2)

    refused(SteeringNotAppliedError, "did not compute", lambda: go_on(by_hand=True))
    refused(SteeringNotAppliedError, "did not compute", lambda: go_on(by_hand=False))

    def another() -> None:
        cache = filled()
        with steer(lm, plan, sae):
            lm.model(ids[:, :-1], use_cache=True)
            lm.model(ids[:, -1:], past_key_values=cache)

    refused(SteeringNotAppliedError, "did not compute", another)


def test_a_loop_that_is_given_to_generate_is_followed_too(lm: LanguageModel, sae: Sae) -> None:
    """`custom_generate` takes a function: its passes are placed by the cache, like any others."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        cache = DynamicCache(config=model.config)
        shown, mask = input_ids, kwargs["attention_mask"]
        for _ in range(NEW):
            token = model(shown, past_key_values=cache, attention_mask=mask).logits[:, -1:].argmax(-1)
            input_ids, shown = torch.cat([input_ids, token], 1), token
            mask = mask if mask is None else torch.cat([mask, torch.ones_like(token)], 1)
        return input_ids

    def elsewhere(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        model(input_ids, use_cache=True)
        return model(input_ids.flip(1), use_cache=True).logits.argmax(-1)

    batch = prompts(lm, TEXTS[:1])
    for plan in (make_plan(edit("generated")), make_plan(edit(), gate=gate(-99.0))):
        wanted = run(lm, sae, plan, batch, eos_token_id=99)
        assert_same(run(lm, sae, plan, batch, custom_generate=loop, eos_token_id=99), wanted)
        refused(
            SteeringNotAppliedError, "something else", lambda p=plan: run(lm, sae, p, batch, custom_generate=elsewhere)
        )


def test_embeddings_instead_of_tokens_are_steered_where_no_token_is_asked_for(lm: LanguageModel, sae: Sae) -> None:
    batch = prompts(lm)
    embeds = lm.model.get_input_embeddings()(batch.input_ids)

    def by_embeddings(plan: Plan, **options: Any) -> list[Receipt]:
        with steer(lm, plan, sae) as steering:
            found = lm.model.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                max_new_tokens=NEW,
                do_sample=False,
                **options,
            )
            assert torch.equal(found, wanted[0][:, -found.shape[1] :])
            return [r for r in steering.receipts() if r]

    for scope in ("all", "prompt", "generated"):
        wanted = run(lm, sae, make_plan(edit(scope)), batch)
        assert [r.tokens_touched for r in by_embeddings(make_plan(edit(scope)))] == [
            r.tokens_touched for r in wanted[1]
        ]
    refused(ScopeError, "inputs_embeds", lambda: by_embeddings(make_plan(edit("assistant"))))
    refused(ScopeError, "inputs_embeds", lambda: by_embeddings(make_plan(edit(), gate=gate())))
