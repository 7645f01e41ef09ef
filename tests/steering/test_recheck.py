"""A gate that is read again while a reply is written opens where a plain computation says, and steers from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from clampdown.errors import PlanError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.serving.engine import Engine
from clampdown.serving.requests import Request, Sampling
from clampdown.steering.decoding import Decoding
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, Plan, read_plan, write_plan
from clampdown.steering.prepared import Capacity, prepare
from clampdown.types import Message, Receipt, Site
from tests.steering.conftest import tiny_llama

TEXTS = ["w1 w2 w3", "w9 w8 w7 w6 w5 w4", "w11 w12", "w20 w3 w21 w30", "w5", "w33 w7 w31"]
VECTOR = tuple(((-1) ** i) * (i % 5 + 1) / 3 for i in range(32))
NEW = 14
STRENGTH = 6.0
SITE = Site.parse("blocks.1.hook_resid_post")


def gate_of(kind: str, threshold: float, recheck: int) -> Gate:
    own: dict[str, Any] = {
        "probe": {"features": (5, 9, 5), "weights": (1.0, -0.5, 2.0), "poolings": ("max", "mean", "assistant_start")},
        "cosine": {"vectors": ("v",), "weights": (1.0,), "poolings": ("mean",)},
    }[kind]
    return Gate(kind=kind, site=SITE.name, threshold=threshold, recheck=recheck, **own)  # type: ignore[arg-type]


class Plain(NamedTuple):
    """What a reply should be: its tokens, every score that was looked at, and the column from which it was steered."""

    ids: list[int]
    scores: list[float]
    since: int | None


def ids_of(lm: LanguageModel, texts: Sequence[str] = TEXTS) -> list[list[int]]:
    return [encode(lm, [Message("user", text)]) for text in texts]


def forward(lm: LanguageModel, ids: list[int], since: int | None, row: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [pos, vocab] with the row added after block 1 from column `since` on, and the residual before that."""
    seen: list[Tensor] = []

    def add(_module: Any, _args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        seen.append(x[0].clone())
        x = x.clone()
        if since is not None:
            x[:, since:] += STRENGTH * row
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = lm.layout.blocks[1].register_forward_hook(add)
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits, seen[0]


def score(kind: str, lm: LanguageModel, sae: Sae, prompt: list[int], reply: list[int]) -> float:
    """The gate's formula over the whole sequence, from the unsteered model and the SAE as it is."""
    batch = pad_left([prompt], lm.pad_id)
    content = lm.chat.content_mask(batch.input_ids, batch.attention_mask)[0]
    content = torch.cat([content, torch.ones(len(reply), dtype=torch.bool)])
    _, x = forward(lm, prompt + reply, None, torch.zeros(32))
    if kind == "cosine":
        return float(torch.cosine_similarity(x[content].mean(0), torch.tensor(VECTOR), dim=0))
    a = sae.encode(x)
    return float(a[content, 5].max() - 0.5 * a[content, 9].mean() + 2 * a[len(prompt) - 1, 5])


def plain(lm: LanguageModel, sae: Sae, plan: Plan, prompt: list[int]) -> Plain:
    """Token by token, each from a pass over everything."""
    gate = plan.gate
    assert gate is not None
    row = sae.W_dec[3]
    reply: list[int] = []
    scores = [score(gate.kind, lm, sae, prompt, [])]
    since = 0 if scores[0] > gate.threshold else None
    for _ in range(NEW):
        if reply and gate.recheck and len(reply) % gate.recheck == 0:
            scores.append(score(gate.kind, lm, sae, prompt, reply))
            if since is None and scores[-1] > gate.threshold:
                since = len(prompt) + len(reply) - 1
        token = int(forward(lm, prompt + reply, since, row)[0][-1].argmax())
        if token in lm.eos_ids:
            break
        reply.append(token)
    return Plain(reply, scores, since)


def run(lm: LanguageModel, sae: Sae, plans: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[Receipt]]:
    with steer(lm, plans, sae, require_reach=False) as steering:
        found = generate(lm, prompts, max_new_tokens=NEW, on_keep=steering.keep_rows)
        return [list(one.ids) for one in found], [r for r in steering.receipts() if r]


@pytest.fixture(scope="module")
def make(plan_of: Callable[..., Plan]) -> Callable[..., Plan]:
    edit = Edit(site=SITE.name, operator="add", features=(3,), strengths=(STRENGTH,))

    def of(kind: str, threshold: float, recheck: int, **fields: object) -> Plan:
        return plan_of(edit, gate=gate_of(kind, threshold, recheck), vectors={"v": VECTOR}, **fields)

    return of


CASES = [("probe", 3.0, 2), ("probe", 3.0, 5), ("cosine", 0.15, 1), ("cosine", 0.15, 3)]


@pytest.mark.parametrize(("kind", "threshold", "recheck"), CASES)
def test_a_gate_opens_where_a_plain_computation_says_and_steers_from_there(
    kind: str, threshold: float, recheck: int, lm: LanguageModel, sae: Sae, make: Callable[..., Plan]
) -> None:
    """Rows open on the prompt, while the reply is written, or never, and leave the batch at different times."""
    plan = make(kind, threshold, recheck)
    wanted = [plain(lm, sae, plan, prompt) for prompt in ids_of(lm)]
    replies, receipts = run(lm, sae, plan, ids_of(lm))
    assert replies == [one.ids for one in wanted]
    for one, prompt, receipt in zip(wanted, ids_of(lm), receipts, strict=True):
        assert receipt.gate_score == pytest.approx(max(one.scores), abs=1e-3)
        assert receipt.gate_fired is (one.since is not None)
        columns = len(prompt) + len(one.ids) - (len(one.ids) == NEW)  # the last token of a full reply is never fed
        assert receipt.tokens_touched == (0 if one.since is None else columns - one.since)
    opened = [one.since and one.since >= len(prompt) for one, prompt in zip(wanted, ids_of(lm), strict=True)]
    assert any(opened) and not all(opened), "this case shows nothing"


def test_what_opened_stays_open(lm: LanguageModel, sae: Sae, make: Callable[..., Plan]) -> None:
    plan = make("cosine", 0.15, 1)
    one = plain(lm, sae, plan, ids_of(lm)[1])
    assert one.since and one.since >= len(ids_of(lm)[1]) and one.scores[-1] < 0.15, "this case shows nothing"
    replies, (receipt,) = run(lm, sae, plan, [ids_of(lm)[1]])
    assert (replies, receipt.gate_fired) == ([one.ids], True)
    assert receipt.tokens_touched == len(ids_of(lm)[1]) + NEW - 1 - one.since


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_library_opens_the_same_with_and_without_a_cache(
    use_cache: bool, lm: LanguageModel, sae: Sae, make: Callable[..., Plan]
) -> None:
    plan, batch = make("probe", 3.0, 2), pad_left(ids_of(lm), lm.pad_id)
    wanted, receipts = run(lm, sae, plan, ids_of(lm))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with steer(lm, plan, sae) as steering:
        found = lm.model.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=use_cache)
        proofs = [r for r in steering.receipts() if r]
    for row, reply in enumerate(wanted):
        assert found[row, batch.input_ids.shape[1] :][: len(reply)].tolist() == reply
        assert proofs[row].gate_fired is receipts[row].gate_fired
        assert proofs[row].gate_score == pytest.approx(receipts[row].gate_score, abs=1e-3)


def test_a_given_reply_is_steered_from_the_token_at_which_decoding_would_have(
    lm: LanguageModel, sae: Sae, make: Callable[..., Plan]
) -> None:
    plan = make("probe", 3.0, 2)
    for prompt in ids_of(lm):
        one = plain(lm, sae, plan, prompt)
        wanted, _ = forward(lm, prompt + one.ids, one.since, sae.W_dec[3])
        with steer(lm, plan, sae, prompt_width=len(prompt)) as steering, torch.no_grad():
            found = lm.model(torch.tensor([prompt + one.ids]), use_cache=False).logits[0]
            (receipt,) = steering.receipts()
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert receipt and receipt.gate_fired is (one.since is not None)


def test_rows_with_and_without_rechecks_share_a_batch_and_a_prompts_pass(
    lm: LanguageModel, sae: Sae, make: Callable[..., Plan]
) -> None:
    """What a plan does beside others is what it does alone, also where the arms of one prompt begin as one row."""
    probe, neutral = make("probe", 3.0, 2), Edit(site=SITE.name, operator="add", features=(3,), strengths=(0.0,))
    plans = [None, probe, make("probe", 3.0, 0), make("cosine", 0.15, 3), probe.model_copy(update={"name": "again"})]
    plans.append(probe.model_copy(update={"edits": (neutral,)}))
    prompts = [ids_of(lm)[i] for i in (0, 3, 4)]
    rows = [(prompt, plan) for prompt in range(len(prompts)) for plan in plans]
    prompt_of = torch.tensor([prompt for prompt, _ in rows])
    with steer(lm, [plan for _, plan in rows], sae, prompt_of=prompt_of, require_reach=False) as steering:
        kept = steering.keep_rows
        found = generate(lm, prompts, max_new_tokens=NEW, on_keep=kept, widened=lambda: steering.spread.prompt_of)
        receipts = steering.receipts()
    outputs = steering.spread.row_of.tolist()
    assert len(set(outputs)) < len(rows), "no row was shared"
    for (prompt, plan), output, receipt in zip(rows, outputs, receipts, strict=True):
        (alone,), proofs = run(lm, sae, plan, [prompts[prompt]])
        assert list(found[output].ids) == alone
        if receipt and plan:
            assert (receipt.tokens_touched, receipt.gate_fired) == (proofs[0].tokens_touched, proofs[0].gate_fired)
            assert receipt.gate_score == pytest.approx(proofs[0].gate_score, abs=1e-3)


def test_a_branch_that_acts_is_not_replaced_by_one_that_opens_later(
    lm: LanguageModel, sae: Sae, make: Callable[..., Plan]
) -> None:
    other = Branch(
        gate=gate_of("cosine", -1.0, 0),
        edits=(Edit(site=SITE.name, operator="add", features=(8,), strengths=(2.0,)),),
    )
    plan, prompts = make("probe", 3.0, 2, otherwise=other), ids_of(lm)
    _, receipts = run(lm, sae, plan, prompts)
    first = [score("probe", lm, sae, prompt, []) > 3.0 for prompt in prompts]
    assert [receipt.branch for receipt in receipts] == ["edits" if fires else "otherwise" for fires in first]


def test_recheck_is_in_the_digest_only_where_it_is_used(tmp_path: Any, make: Callable[..., Plan]) -> None:
    never, often = make("probe", 3.0, 0), make("probe", 3.0, 4)
    assert (never.schema_version, often.schema_version) == (1, 2)
    assert never.digest != often.digest != make("probe", 3.0, 5).digest
    write_plan(tmp_path / "never.toml", never)
    write_plan(tmp_path / "often.toml", often)
    assert "recheck" not in (tmp_path / "never.toml").read_text()
    assert "recheck = 4" in (tmp_path / "often.toml").read_text()
    back = read_plan(tmp_path / "often.toml")
    assert (back.gate, back.digest) == (often.gate, often.digest)


def test_what_cannot_be_checked_again_is_refused(
    lm: LanguageModel, sae: Sae, make: Callable[..., Plan], plan_of: Callable[..., Plan]
) -> None:
    deaf = Edit(site=SITE.name, operator="add", features=(3,), strengths=(1.0,), scope="prompt")
    with pytest.raises(PlanError, match="none of its edits acts on generated"):
        plan_of(deaf, gate=gate_of("probe", 0.0, 2))
    with pytest.raises(PlanError, match="judges the prompt's text"):
        Gate(kind="external", scorer="x", threshold=0.0, recheck=2)
    with pytest.raises(PlanError, match="a number of tokens"):
        gate_of("probe", 0.0, -1)
    plan = make("probe", 3.0, 2)
    request = Request("r", tuple(ids_of(lm)[0]), plan, Sampling(max_tokens=2))
    with pytest.raises(PlanError, match="not done here"):
        Engine(lm, (sae,)).submit(request)
    with steer(lm, plan, sae) as steering:
        generate(lm, ids_of(lm)[:1], max_new_tokens=1)
        seats = steering.seats()
    with pytest.raises(PlanError, match="not done here"):
        Decoding(lm, lambda _: [sae]).join(seats)
    prepared = prepare(tiny_llama(), sae, capacity=Capacity(rows=1, gate_features=4))
    with pytest.raises(PlanError, match="not done here"), prepared.steer([plan], pad_left(ids_of(lm)[:1], lm.pad_id)):
        pass
