"""Every kind of gate scores as its formula says, and a two-sided plan does one thing, the other, or neither."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clampdown.errors import PlanError, SteeringNotAppliedError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering import gate_kinds
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, Guarantee, ModelRef, Plan, SaeRef, read_plan, write_plan
from clampdown.store import to_jsonable
from clampdown.types import Message, Receipt

TEXTS = ["w1 w2 w3", "w9 w8 w7 w6 w5 w4", "w11 w12", "w20 w3 w21 w30"]
VECTOR = tuple(((-1) ** i) * (i % 5 + 1) / 3 for i in range(32))
OTHER = tuple((i % 7) / 2 - 1.0 for i in range(32))
SITE = "blocks.1.hook_resid_post"


def gate_of(kind: str, site: str, threshold: float = 0.0, **fields: object) -> Gate:
    own: dict[str, object] = {
        "feature": {"features": (5,), "weights": (1.0,), "poolings": ("max",)},
        "probe": {"features": (5, 9, 5), "weights": (1.0, -0.5, 2.0), "poolings": ("max", "mean", "assistant_start")},
        "dense": {"vectors": ("v", "u"), "weights": (1.0, 0.5), "poolings": ("mean", "assistant_start"), "bias": 0.3},
        "cosine": {"vectors": ("v",), "weights": (1.0,), "poolings": ("mean",)},
    }[kind]  # type: ignore[assignment]
    return Gate(kind=kind, site=site, threshold=threshold, **{**own, **fields})  # type: ignore[arg-type]


def prompts(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    return [encode(lm, [Message("user", text)]) for text in texts]


def run(lm: LanguageModel, sae: Sae, plan: object, texts: list[str]) -> tuple[Tensor, list[Receipt]]:
    with steer(lm, plan, sae) as steering:  # type: ignore[arg-type]
        logits = next_token_logits(lm, prompts(lm, texts))
        return logits, [receipt for receipt in steering.receipts() if receipt]


def residuals(lm: LanguageModel, text: str) -> tuple[Tensor, Tensor]:
    """The unsteered residual after block 1 at one prompt's tokens, alone, and which are content."""
    batch = pad_left(prompts(lm, [text]), lm.pad_id)
    with torch.no_grad():
        states = lm.model(**vars_of(batch), output_hidden_states=True).hidden_states
    return states[2][0], lm.chat.content_mask(batch.input_ids, batch.attention_mask)[0]


def vars_of(batch: object) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}  # type: ignore[attr-defined]


def by_hand(kind: str, lm: LanguageModel, sae: Sae, text: str) -> float:
    x, content = residuals(lm, text)
    a, mean, last = sae.encode(x), x[content].mean(0), x[-1]
    v, u = torch.tensor(VECTOR), torch.tensor(OTHER)
    return {
        "feature": lambda: a[content, 5].max(),
        "probe": lambda: a[content, 5].max() - 0.5 * a[content, 9].mean() + 2 * a[-1, 5],
        "dense": lambda: mean @ v + 0.5 * (last @ u) + 0.3,
        "cosine": lambda: torch.cosine_similarity(mean, v, dim=0),
    }[kind]().item()


@pytest.fixture(scope="module")
def edit(site: str) -> Edit:
    return Edit(site=site, operator="add", features=(3,), strengths=(6.0,))


@pytest.mark.parametrize("kind", ["feature", "probe", "dense", "cosine"])
def test_each_kind_scores_by_its_formula_per_row(
    kind: str, lm: LanguageModel, sae: Sae, site: str, edit: Edit, plan_of: Callable[..., Plan]
) -> None:
    wanted = [by_hand(kind, lm, sae, text) for text in TEXTS]
    threshold = sum(sorted(wanted)[1:3]) / 2
    vectors = {"v": VECTOR, "u": OTHER}
    plan = plan_of(edit, gate=gate_of(kind, site, threshold), vectors=vectors)
    plain, _ = run(lm, sae, None, TEXTS)
    steered, receipts = run(lm, sae, plan, TEXTS)
    assert [receipt.gate_score for receipt in receipts] == pytest.approx(wanted, abs=1e-4)
    for row, score in enumerate(wanted):
        assert receipts[row].gate_fired is (score > threshold)
        assert torch.equal(steered[row], plain[row]) is not receipts[row].gate_fired


def test_rows_with_gates_of_different_kinds_share_a_batch(
    lm: LanguageModel, sae: Sae, site: str, edit: Edit, plan_of: Callable[..., Plan]
) -> None:
    kinds = ["feature", "probe", "dense", "cosine"]
    plans = [plan_of(edit, gate=gate_of(kind, site), vectors={"v": VECTOR, "u": OTHER}) for kind in kinds]
    _, receipts = run(lm, sae, plans, TEXTS)
    wanted = [by_hand(kind, lm, sae, text) for kind, text in zip(kinds, TEXTS, strict=True)]
    assert [receipt.gate_score for receipt in receipts] == pytest.approx(wanted, abs=1e-4)


@pytest.fixture
def scorer() -> Iterator[list[str]]:
    """A registered scorer that counts words, and the texts that it was shown."""
    seen: list[str] = []

    def words(text: str) -> float:
        seen.append(text)
        return float(len(text.split()))

    gate_kinds.register_scorer("words", words)
    yield seen
    gate_kinds._SCORERS.pop("words")


def test_an_external_score_is_read_from_the_prompts_text_anew_for_every_turn(
    scorer: list[str], lm: LanguageModel, sae: Sae, edit: Edit, plan_of: Callable[..., Plan]
) -> None:
    plan = plan_of(edit, gate=Gate(kind="external", scorer="words", threshold=3.5))
    with steer(lm, plan, sae) as steering:
        next_token_logits(lm, prompts(lm, TEXTS))
        fired = [receipt.gate_fired for receipt in steering.receipts() if receipt]
        next_token_logits(lm, prompts(lm, TEXTS[:1]))
        again = [receipt.gate_score for receipt in steering.receipts() if receipt]
    assert fired == [False, True, False, True]
    assert again == [3.0]
    assert scorer == [*TEXTS, TEXTS[0]]
    plain, _ = run(lm, sae, None, TEXTS)
    steered, _ = run(lm, sae, plan, TEXTS)
    assert [torch.equal(a, b) for a, b in zip(steered, plain, strict=True)] == [True, False, True, False]


def test_a_plan_whose_scorer_is_missing_or_gives_no_number_is_an_error(
    lm: LanguageModel, sae: Sae, edit: Edit, plan_of: Callable[..., Plan], scorer: list[str]
) -> None:
    with pytest.raises(PlanError, match="no scorer of that name"):
        run(lm, sae, plan_of(edit, gate=Gate(kind="external", scorer="nobody", threshold=0.0)), TEXTS)
    gate_kinds.register_scorer("words", lambda _text: float("nan"))
    with pytest.raises(SteeringNotAppliedError, match="gave nan"):
        run(lm, sae, plan_of(edit, gate=Gate(kind="external", scorer="words", threshold=0.0)), TEXTS)


def test_a_two_sided_plan_does_one_thing_or_the_other_or_nothing(
    lm: LanguageModel, sae: Sae, site: str, edit: Edit, plan_of: Callable[..., Plan]
) -> None:
    """Each row equals the one-sided plan of the branch that fired, or the unsteered model, bit for bit."""
    first = [by_hand("feature", lm, sae, text) for text in TEXTS]
    second = [by_hand("cosine", lm, sae, text) for text in TEXTS]
    ranked = sorted(range(len(TEXTS)), key=lambda i: first[i])
    upper = (first[ranked[-1]] + first[ranked[-2]]) / 2
    rest = sorted(second[i] for i in ranked[:-1])
    down = Edit(site=site, operator="add", features=(7,), strengths=(-9.0,))
    gates = gate_of("feature", site, upper), gate_of("cosine", site, (rest[-1] + rest[-2]) / 2)
    plan = plan_of(edit, gate=gates[0], otherwise=Branch(gate=gates[1], edits=(down,)), vectors={"v": VECTOR})
    expected = ["edits" if f > upper else "otherwise" if s > gates[1].threshold else "none"
                for f, s in zip(first, second, strict=True)]  # fmt: skip
    assert sorted(expected) == ["edits", "none", "none", "otherwise"]
    steered, receipts = run(lm, sae, plan, TEXTS)
    alone = {"edits": run(lm, sae, plan_of(edit), TEXTS)[0], "otherwise": run(lm, sae, plan_of(down), TEXTS)[0],
             "none": run(lm, sae, None, TEXTS)[0]}  # fmt: skip
    for row, branch in enumerate(expected):
        assert receipts[row].branch == branch
        assert receipts[row].gate_fired is (branch != "none")
        assert receipts[row].otherwise_score == pytest.approx(second[row], abs=1e-4)
        assert torch.equal(steered[row], alone[branch][row])


def test_arms_that_share_a_prompts_pass_share_the_rows_where_no_branch_fired(
    lm: LanguageModel, sae: Sae, site: str, edit: Edit, plan_of: Callable[..., Plan]
) -> None:
    second = sorted(by_hand("dense", lm, sae, text) for text in TEXTS)
    gates = gate_of("cosine", site, 2.0), gate_of("dense", site, second[1])
    plan = plan_of(
        edit, gate=gates[0], otherwise=Branch(gate=gates[1], edits=(edit,)), vectors={"v": VECTOR, "u": OTHER}
    )
    separate, alone = run(lm, sae, plan, TEXTS)
    prompt_of = torch.arange(len(TEXTS)).repeat_interleave(2)
    with steer(lm, [None, plan] * len(TEXTS), sae, prompt_of=prompt_of) as steering:
        logits = next_token_logits(lm, prompts(lm, TEXTS))
        receipts, row_of = steering.receipts(), steering.row_map.row_of.tolist()
    for i, own in enumerate(alone):
        shared = receipts[2 * i + 1]
        assert shared is not None and (shared.branch, shared.gate_fired) == (own.branch, own.gate_fired)
        assert shared.otherwise_score == pytest.approx(own.otherwise_score, abs=1e-5)
        assert (row_of[2 * i] == row_of[2 * i + 1]) is (own.branch == "none")
        torch.testing.assert_close(logits[row_of[2 * i + 1]], separate[i], atol=1e-5, rtol=1e-5)


# ---- the file ----------------------------------------------------------------------------------------------------


def plain_plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "name": "p",
        "model": ModelRef(name="m", revision="r"),
        "saes": (SaeRef(site=SITE, name="s", revision="x"),),
        "edits": (Edit(site=SITE, operator="clamp", features=(3,), strengths=(2.5,)),),
    }
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


def test_plans_of_the_first_schema_keep_their_digests_and_their_version(tmp_path: Path) -> None:
    """Digests as clampdown wrote them before there were kinds and branches."""
    promise = Guarantee(budget=0.01, confidence=0.95, n=300, triggered=0, bound=0.00994)
    gate = Gate(site=SITE, features=(1,), poolings=("max",), weights=(0.5,), bias=-1.0, threshold=0.25,
                guarantee=promise)  # fmt: skip
    plans = [plain_plan(), plain_plan(gate=gate)]
    assert [plan.digest for plan in plans] == ["72ed235cda330c0f", "54e79e4bd241fc29"]
    for plan in plans:
        write_plan(tmp_path / "plan.toml", plan)
        assert "schema_version = 1\n" in (tmp_path / "plan.toml").read_text()
        assert "otherwise" not in (tmp_path / "plan.toml").read_text()


def test_two_sided_plans_read_back_equal(tmp_path: Path) -> None:
    second = Branch(
        gate=gate_of("dense", SITE),
        edits=(Edit(site=SITE, operator="scale", features=(4,), strengths=(0.0,)),),
    )
    plan = plain_plan(gate=gate_of("cosine", SITE), otherwise=second, vectors={"v": (0.5, 0.25), "u": (1.0, 2.0)})
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    assert "schema_version = 2\n" in (tmp_path / "plan.toml").read_text()
    one_sided = plan.model_copy(update={"otherwise": None})
    assert plan.digest != one_sided.digest
    assert json.dumps(to_jsonable(plan.model_dump(mode="json")))


EXTERNAL = Gate(kind="external", scorer="x", threshold=0.0)
ABOVE = "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: plain_plan(otherwise=Branch(gate=EXTERNAL, edits=())), "no use for it"),
        (lambda: plain_plan(gate=gate_of("cosine", SITE)), "vector 'v' is not among"),
        (lambda: plain_plan(gate=gate_of("cosine", ABOVE), vectors={"v": VECTOR}), "too late"),
        (
            lambda: plain_plan(
                gate=EXTERNAL, otherwise=Branch(gate=gate_of("cosine", ABOVE), edits=()), vectors={"v": VECTOR}
            ),
            "too late",
        ),
        (lambda: gate_of("cosine", SITE, poolings=("max",)), "cannot pool by 'max'"),
        (
            lambda: gate_of("feature", SITE, features=(1, 2), weights=(1, 1), poolings=("max", "max")),
            "reads one feature",
        ),
        (lambda: gate_of("dense", SITE, features=(1,)), "reads vectors and nothing else"),
        (lambda: Gate(kind="external", threshold=0.0), "needs `scorer`"),
    ],
)  # fmt: skip
def test_gates_that_mean_nothing_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()
