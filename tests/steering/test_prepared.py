"""Permanent hooks do what `steer` does, in compiled models and static caches, and trace nothing again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from clampdown.errors import PlanError, ScopeError, SteeringNotAppliedError
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.steering.prepared import Capacity, prepare
from clampdown.types import Message

PlanOf = Callable[..., Plan]
PROMPTS = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5", "w11 w12"]
SCOPES = ("all", "prompt", "generated", "assistant", "last_user")
CAPACITY = Capacity(rows=4, features=6, directions=2, gate_features=4, prompt=32)


@pytest.fixture
def own_lm() -> LanguageModel:
    """A model that a test may compile and hook for good."""
    from tests.steering.conftest import tiny_llama

    return tiny_llama()


@pytest.fixture
def traceable() -> Iterator[None]:
    """The shape checks of the test suite wrap every function, and a tracer cannot look through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch._dynamo.reset()


def prompts(lm: LanguageModel) -> Batch:
    return pad_left([encode(lm, [Message("user", text)]) for text in PROMPTS], lm.pad_id)


def edit_of(site: str, operator: str = "add", strength: float = 6.0, **fields: object) -> Edit:
    return Edit(site=site, operator=operator, features=(5,), strengths=(strength,), **fields)  # type: ignore[arg-type]


def hf_generate(lm: LanguageModel, batch: Batch, **options: object) -> Tensor:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return lm.model.generate(**inputs, max_new_tokens=8, do_sample=False, **options)


def logits(lm: LanguageModel, batch: Batch) -> Tensor:
    return lm.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    ).logits


def mixed_plans(site: str, plan_of: PlanOf) -> list[Plan | None]:
    """Every operator, several scopes and slots, dense directions, a row without a plan."""
    vector = {"v": tuple(torch.randn(32, generator=torch.Generator().manual_seed(3)).tolist())}
    dense = Edit(site=site, operator="ablate_direction", vector="v", strengths=(1.0,))
    added = Edit(site=site, operator="add_direction", vector="v", strengths=(0.5,), scope="assistant")
    two = Edit(site=site, operator="clamp", features=(9, 5), strengths=(4.0, 1.0), scope="prompt")
    live = Edit(site=site, operator="clamp_active", features=(11,), strengths=(3.0,))
    return [
        plan_of(edit_of(site), edit_of(site, "scale", -2.0, scope="assistant")),
        None,
        plan_of(dense, added, edit_of(site, "floor", 2.0, scope="last_user"), vectors=vector),
        plan_of(two, live),
    ]


@pytest.mark.parametrize("sae_config", [{}, {"architecture": "topk", "k": 8}, {"normalize_activations": "layer_norm"}])
def test_a_prepared_model_does_what_steer_does(
    own_lm: LanguageModel, sae_of: Callable[..., Sae], site: str, plan_of: PlanOf, sae_config: dict
) -> None:
    sae, batch, plans = sae_of(**sae_config), prompts(own_lm), mixed_plans(site, plan_of)
    with steer(own_lm, plans, sae) as plain:
        expected = logits(own_lm, batch)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plans, batch) as steering:
        found = logits(own_lm, batch)
        receipts = steering.receipts()
    real = batch.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
    for receipt, proof in zip(receipts, plain.receipts(), strict=True):
        assert (receipt is None) == (proof is None)
        if receipt and proof:
            assert receipt.tokens_touched == proof.tokens_touched
            assert receipt.edit_norm == pytest.approx(proof.edit_norm, rel=1e-3)


class Counting:
    """A compiler backend that runs the traced graph as it is, and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


def test_a_compiled_model_steers_and_changing_the_plan_traces_nothing(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, traceable: None
) -> None:
    batch, plans = prompts(own_lm), mixed_plans(site, plan_of)
    unsteered = logits(own_lm, batch)
    with steer(own_lm, plans, sae):
        expected = logits(own_lm, batch)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    backend = Counting()
    own_lm.model.forward = torch.compile(own_lm.model.forward, backend=backend, fullgraph=True)
    assert torch.equal(logits(own_lm, batch), unsteered)
    traced = backend.graphs
    assert traced > 0
    with prepared.steer(plans, batch) as steering:
        real = batch.attention_mask.bool()
        torch.testing.assert_close(logits(own_lm, batch)[real], expected[real], atol=1e-4, rtol=1e-4)
        assert [r and r.tokens_touched > 0 for r in steering.receipts()] == [True, None, True, True]
    with prepared.steer([None, *plans[:3]], batch):
        assert not torch.equal(logits(own_lm, batch)[1], unsteered[1])
    with prepared.steer(plan_of(edit_of(site, strength=0.0), edit_of(site, "scale", 1.0, scope="prompt")), batch):
        assert torch.equal(logits(own_lm, batch), unsteered)
    assert torch.equal(logits(own_lm, batch), unsteered)
    assert backend.graphs == traced


def compiling() -> dict[str, object]:
    """Options that make `generate` compile its decode step, as it does by itself on a GPU with a static cache."""
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def graphs_traced() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_generate_compiles_its_decode_step_once_and_is_steered_in_every_scope(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, traceable: None
) -> None:
    """The library's own way to a compiled model: the prefill runs as it is, decoding runs the graph."""
    batch, plans = prompts(own_lm), [plan_of(edit_of(site, scope=scope)) for scope in SCOPES]
    expected, touched = [hf_generate(own_lm, batch)], [[]]
    for plan in plans:
        with steer(own_lm, plan, sae) as steering:
            expected.append(hf_generate(own_lm, batch))
        touched.append([r.tokens_touched for r in steering.receipts() if r])
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    for plan, wanted, tokens in zip([None, *plans], expected, touched, strict=True):
        with prepared.steer(plan, batch) as steering:
            assert torch.equal(hf_generate(own_lm, batch, **compiling()), wanted)
            assert [r.tokens_touched for r in steering.receipts() if r] == tokens
    assert torch.equal(hf_generate(own_lm, batch, **compiling()), expected[0])
    assert graphs_traced() == 1


@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["dynamic", "no cache"])
@pytest.mark.parametrize("scope", SCOPES)
def test_prepared_scopes_hold_with_a_growing_cache_and_without(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, options: dict, scope: str
) -> None:
    batch, plan = prompts(own_lm), plan_of(edit_of(site, scope=scope))
    with steer(own_lm, plan, sae):
        expected = hf_generate(own_lm, batch, **options)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plan, batch):
        assert torch.equal(hf_generate(own_lm, batch, **options), expected)


def test_prepared_gates_decide_as_those_of_steer_and_hold_for_the_turn(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch = prompts(own_lm)
    pools = ("max", "max", "assistant_start", "mean")

    def gated(threshold: float) -> Plan:
        gate = Gate(
            site=site,
            features=(5, 7, 9, 9),
            poolings=pools,
            weights=(1.0, 1.0, -0.5, 2.0),
            bias=0.5,
            threshold=threshold,
        )
        return plan_of(edit_of(site), gate=gate)

    with steer(own_lm, gated(0.0), sae) as plain:
        hf_generate(own_lm, batch)
        scores = [r.gate_score for r in plain.receipts() if r and r.gate_score is not None]
    plan = gated(sum(sorted(scores)[1:3]) / 2)
    with steer(own_lm, plan, sae) as plain:
        expected = hf_generate(own_lm, batch)
    unsteered = hf_generate(own_lm, batch)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    for options in ({}, {"use_cache": False}):
        with prepared.steer([plan, plan, None, plan], batch) as steering:
            found = hf_generate(own_lm, batch, **options)
            receipts = steering.receipts()
        for row, (receipt, proof) in enumerate(zip(receipts, plain.receipts(), strict=True)):
            if receipt is None or proof is None:
                assert torch.equal(found[row], unsteered[row])
                continue
            assert receipt.gate_score == pytest.approx(proof.gate_score, abs=1e-4)
            assert receipt.gate_fired == proof.gate_fired
            assert torch.equal(found[row], expected[row])


def test_rows_that_leave_take_their_plans_with_them(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    """The generator drops rows as their replies end and moves others into their places."""
    batch, plans = prompts(own_lm), mixed_plans(site, plan_of)
    ids = [encode(own_lm, [Message("user", text)]) for text in PROMPTS]
    with steer(own_lm, plans, sae) as plain:
        expected = generate(own_lm, ids, max_new_tokens=24, on_keep=plain.keep_rows)
    assert len({len(reply.ids) for reply in expected}) > 1
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plans, batch) as steering:
        found = generate(own_lm, ids, max_new_tokens=24, on_keep=steering.keep_rows)
        receipts = steering.receipts()
    assert found == expected
    assert [r and r.tokens_touched for r in receipts] == [r and r.tokens_touched for r in plain.receipts()]


def test_what_a_prepared_model_cannot_do_is_an_error(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch = prompts(own_lm)
    prepared = prepare(own_lm, sae, capacity=Capacity(rows=4, features=1, directions=0, gate_features=0, prompt=8))

    def refused(error: type[Exception], plans: Plan | list[Plan | None], match: str) -> None:
        with pytest.raises(error, match=match), prepared.steer(plans, batch):
            logits(own_lm, batch)

    plan = plan_of(edit_of(site))
    refused(PlanError, plan_of(edit_of(site), edit_of(site, "scale")), "prepared for 1")
    refused(PlanError, plan_of(edit_of(site, error_term="drop")), "keeps the SAE's error term")
    refused(PlanError, [plan, None], "2 plans for 4 prompts")
    refused(ScopeError, plan_of(edit_of(site, scope="generated")), "never covered")
    vector = {"v": tuple([1.0] * 32)}
    dense = Edit(site="blocks.0.hook_resid_post", operator="add_direction", vector="v", strengths=(1.0,))
    refused(PlanError, plan_of(dense, vectors=vector), "was not prepared")
    gate = Gate(site=site, features=(5,), poolings=("max",), weights=(1.0,), bias=0.0, threshold=0.0)
    refused(PlanError, plan_of(edit_of(site), gate=gate), "gate reads")
    with pytest.raises(PlanError, match="batch has 2 rows"), prepared.steer(plan, batch):
        own_lm.model(batch.input_ids[:2])
    with pytest.raises(SteeringNotAppliedError, match="no forward pass"), prepared.steer(plan, batch):
        pass
    with prepared.steer(plan, batch):
        with pytest.raises(PlanError, match="already"), prepared.steer(plan, batch):
            pass
        logits(own_lm, batch)
    plain = logits(own_lm, batch)
    prepared.detach()
    assert torch.equal(logits(own_lm, batch), plain)


def test_a_generation_that_raises_leaves_a_prepared_model_unsteered(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch = prompts(own_lm)
    plain = logits(own_lm, batch)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)

    def fail() -> None:
        with prepared.steer(plan_of(edit_of(site)), batch):
            logits(own_lm, batch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(logits(own_lm, batch), plain)
    with prepared.steer(plan_of(edit_of(site)), batch):
        assert not torch.equal(logits(own_lm, batch), plain)


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward", "one block"])
def test_hooks_on_a_model_that_was_compiled_before_are_refused(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, how: str
) -> None:
    lm = own_lm
    if how == "wrapped":
        lm = replace(lm, model=torch.compile(lm.model, backend="eager"))
    elif how == "in place":
        lm.model.compile(backend="eager")
    elif how == "forward":
        lm.model.forward = torch.compile(lm.model.forward, backend="eager")
    else:
        lm.layout.blocks[1].compile(backend="eager")  # type: ignore[operator]
    with pytest.raises(SteeringNotAppliedError, match="compiled already"):
        prepare(lm, sae)
    with (
        pytest.raises(SteeringNotAppliedError, match="compiled already"),
        steer(lm, plan_of(edit_of(site)), sae),
    ):
        pass
    with steer(lm, None):
        pass


def test_a_decode_graph_that_never_saw_the_hooks_is_found_out(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, traceable: None
) -> None:
    """`generate` compiled its decode step in an unsteered run: the prefill is steered, the rest would not be."""
    batch = prompts(own_lm)
    hf_generate(own_lm, batch, **compiling())
    with (
        pytest.raises(SteeringNotAppliedError, match="without steering"),
        steer(own_lm, plan_of(edit_of(site)), sae),
    ):
        hf_generate(own_lm, batch, **compiling())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_decode_step_follows_the_plan() -> None:
    """Needs a GPU: the step is captured once without a plan, and replayed with and without one."""
    from tests.steering.conftest import make_plan, random_sae, tiny_llama

    lm = tiny_llama()
    lm.model.cuda()
    sae, batch = random_sae().to("cuda"), prompts(lm)
    batch = Batch(batch.input_ids.cuda(), batch.attention_mask.cuda())
    prepared = prepare(lm, sae, capacity=CAPACITY)
    plan = make_plan(edit_of(sae.site.name, scope="generated"))
    step = CapturedStep(lm, batch)
    unsteered = step.replay()
    with prepared.steer(plan, batch):
        step.rewind()
        steered = step.replay()
    with prepared.steer(plan, batch):
        step.rewind()
        expected = step.forward()
    torch.testing.assert_close(steered, expected)
    step.rewind()
    assert torch.equal(step.replay(), unsteered)
    assert not torch.equal(steered, unsteered)


class CapturedStep:
    """One decode step over a static cache, captured in a CUDA graph after the prompt has been read."""

    def __init__(self, lm: LanguageModel, batch: Batch) -> None:
        self.lm, self.width = lm, batch.input_ids.shape[1]
        self.cache = StaticCache(config=lm.model.config, max_cache_len=self.width + 8)
        lm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=self.cache,
        )
        room = torch.ones(len(batch.input_ids), 8, dtype=torch.long, device="cuda")
        self.mask = torch.cat([batch.attention_mask, room], dim=1)
        self.ids = torch.full((len(batch.input_ids), 1), 7, device="cuda")
        self.positions = batch.position_ids[:, -1:] + 1
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forward()
                self.rewind()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.forward()
        self.rewind()

    def forward(self) -> Tensor:
        return self.lm.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
        ).logits

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.width)

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.out.clone()


def test_a_seat_is_not_given_after_rows_have_left(own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    batch = prompts(own_lm)
    plan = plan_of(edit_of(site))
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plan, batch) as steering:
        logits(own_lm, batch)
        steering.keep_rows(torch.tensor([2, 3]))
        with pytest.raises(PlanError, match="seats have moved"):
            steering.seat(1, plan, [1, 2, 7])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prefill_chunk_size": 3}, "in pieces"),
        ({"guidance_scale": 1.5}, "other tokens|twice"),
        ({"prompt_lookup_num_tokens": 3}, "several tokens|twice"),
    ],
)
def test_passes_that_are_not_those_of_the_prompts_are_an_error(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf, options: dict, says: str
) -> None:
    gate = Gate(site=site, features=(5,), poolings=("max",), weights=(1.0,), bias=0.0, threshold=-9.0)
    plan = plan_of(edit_of(site), gate=gate)
    one = pad_left([encode(own_lm, [Message("user", "w1 w2 w3 w1 w2 w3 w1 w2")])], own_lm.pad_id)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    with prepared.steer(plan, one) as steering:
        hf_generate(own_lm, one)
        assert [r.gate_fired for r in steering.receipts() if r] == [True]
    with pytest.raises(SteeringNotAppliedError, match=says), prepared.steer(plan, one):
        hf_generate(own_lm, one, **options)


def test_a_prompt_without_a_gate_may_come_in_pieces_to_a_prepared_model(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch = prompts(own_lm)
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    for scope in SCOPES:
        found = []
        for options in ({}, {"prefill_chunk_size": 3}):
            with prepared.steer(plan_of(edit_of(site, scope=scope)), batch) as steering:
                found.append((hf_generate(own_lm, batch, **options).tolist(), steering.receipts()))
        assert found[0][0] == found[1][0]
        assert [r.tokens_touched for r in found[0][1] if r] == [r.tokens_touched for r in found[1][1] if r]


def test_turns_padding_and_caches_that_a_prepared_model_was_not_told_of_are_errors(
    own_lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf
) -> None:
    batch, plan = prompts(own_lm), plan_of(edit_of(site))
    prepared = prepare(own_lm, sae, capacity=CAPACITY)
    one = Batch(batch.input_ids[2:3], batch.attention_mask[2:3])
    behind = Batch(batch.input_ids.flip(1), batch.attention_mask.flip(1))

    def run(turns: Sequence[list[int]], *, fill_outside: bool = False) -> None:
        cache = own_lm.model(one.input_ids, use_cache=True).past_key_values if fill_outside else None
        with prepared.steer(plan, one):
            for ids in turns:
                cache = own_lm.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).past_key_values

    prompt = one.input_ids[0].tolist()
    run([prompt, [7], [8]])
    with pytest.raises(SteeringNotAppliedError, match="several tokens"):
        run([prompt, [7], [5, 2, 9, 5, 3]])
    with pytest.raises(SteeringNotAppliedError, match="outside this block"):
        run([[7], [8]], fill_outside=True)
    with pytest.raises(SteeringNotAppliedError, match="other tokens"):
        run([prompt[::-1]])
    with pytest.raises(PlanError, match="ends in padding"), prepared.steer(plan, behind):
        pass
    with pytest.raises(SteeringNotAppliedError, match="other tokens"), prepared.steer(plan, batch):
        logits(own_lm, behind)


def test_a_token_that_several_sites_change_is_counted_once(own_lm: LanguageModel, site: str, plan_of: PlanOf) -> None:
    def at(name: str, scope: str) -> Edit:
        return Edit(site=name, operator="add_direction", vector="v", strengths=(1.0,), scope=scope)

    batch, other = prompts(own_lm), "blocks.2.hook_resid_post"
    for scopes in (("all", "all"), ("prompt", "generated"), ("all", "last_user")):
        plan = plan_of(at(site, scopes[0]), at(other, scopes[1]), vectors={"v": (0.1,) * 32})
        with steer(own_lm, plan) as steering:
            hf_generate(own_lm, batch)
            plain = steering.receipts()
        prepared = prepare(own_lm, sites=[site, other], capacity=CAPACITY)
        with prepared.steer(plan, batch) as steering:
            out = hf_generate(own_lm, batch)
            receipts = steering.receipts()
        prepared.detach()
        columns = batch.attention_mask.sum(1) + out.shape[1] - batch.input_ids.shape[1] - 1
        for receipt, proof, n in zip(receipts, plain, columns.tolist(), strict=True):
            assert receipt and proof and receipt.tokens_touched == proof.tokens_touched <= n
