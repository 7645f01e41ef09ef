"""Gates that read each turn alone: what they read, and what holds over turns, places and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from clampdown.errors import PlanError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import PLANS_DIR
from clampdown.organism.suites import one_suite
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.gate_kinds import register_scorer
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, Plan, read_plan
from clampdown.steering.prepared import prepare
from clampdown.steering.turn_promise import conversation_maxima, provable_turns
from clampdown.steering.turn_reading import read_prompts
from clampdown.types import Message, Prompt, Receipt, Split
from tests.steering.test_gate_kinds import OTHER, VECTOR, gate_of

TURNS = ("w1 w2 w3", "w9 w8 w7", "w20 w3 w21")
KINDS = ("feature", "probe", "dense", "cosine", "external")


def talk(*texts: str, system: str = "", begun: str = "") -> list[Message]:
    """User turns with replies between them."""
    found = [Message("system", system)] if system else []
    for text in texts:
        found += [Message("user", text), Message("assistant", "w30 w31")]
    return [*found[:-1], *([Message("assistant", begun)] if begun else [])]


@pytest.fixture(scope="module")
def windowed(site: str, plan_of: Callable[..., Plan]) -> dict[str, Plan]:
    register_scorer("sum", lambda text: float(sum(int(word[1:]) for word in text.split())))
    edit = Edit(site=site, operator="add", features=(3,), strengths=(6.0,))
    gates = {k: gate_of(k, site, window=8) for k in KINDS[:-1]} | {
        "external": Gate(kind="external", scorer="sum", threshold=0.0, window=8)
    }
    return {kind: plan_of(edit, gate=gate, vectors={"v": VECTOR, "u": OTHER}) for kind, gate in gates.items()}


def receipts(lm: LanguageModel, sae: Sae, plan: Plan, *talks: list[Message]) -> list[Receipt]:
    with steer(lm, plan, sae) as steering:
        next_token_logits(lm, [encode(lm, messages) for messages in talks])
        return [receipt for receipt in steering.receipts() if receipt]


def scores(lm: LanguageModel, sae: Sae, plan: Plan, *talks: list[Message]) -> list[float]:
    found = [receipt.gate_score for receipt in receipts(lm, sae, plan, *talks)]
    return [score for score in found if score is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_scores_as_its_worst_turn_alone(
    kind: str, lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    plan = windowed[kind]
    alone = scores(lm, sae, plan, *([Message("user", turn)] for turn in TURNS))
    (found,) = receipts(lm, sae, plan, talk(*TURNS))
    assert found.gate_score == pytest.approx(max(alone), abs=1e-4)
    assert (found.turns_read, found.worst_turn) == (3, int(np.argmax(alone)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_one_turn_scores_as_it_does_without_a_window(
    kind: str, lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    plan = windowed[kind]
    assert plan.gate
    plain = plan.model_copy(update={"gate": plan.gate.model_copy(update={"window": 0})})
    alone = [Message("user", TURNS[0])]
    assert scores(lm, sae, plan, alone) == scores(lm, sae, plain, alone)


def test_a_long_turn_is_read_in_overlapping_windows(lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]) -> None:
    plan, words = windowed["dense"], [f"w{i}" for i in range(20)]
    parts = [" ".join(words[at : at + 4]) for at in range(0, 18, 2)]
    alone = scores(lm, sae, plan, *([Message("user", part)] for part in parts))
    (found,) = receipts(lm, sae, plan, [Message("user", " ".join(words))])
    assert found.gate_score == pytest.approx(max(alone), abs=1e-4)
    assert found.turns_read == 1


def test_system_message_and_begun_reply_are_read_with_their_turn(
    lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    plan = windowed["external"]
    assert scores(lm, sae, plan, talk("w1", "w2", system="w30")) == [31.0]
    ids = encode(lm, talk("w1", "w2", begun="w39"), add_generation_prompt=False)[:-1]  # without the end of the turn
    with steer(lm, plan, sae) as steering:
        next_token_logits(lm, [ids])
        assert [r.gate_score for r in steering.receipts() if r] == [41.0]


def test_rows_whose_gate_stays_shut_are_the_baselines_bit_for_bit(
    lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    shut = windowed["probe"]
    assert shut.gate
    shut = shut.model_copy(update={"gate": shut.gate.model_copy(update={"threshold": 1e9})})
    prompts = [encode(lm, talk(*TURNS)), encode(lm, talk(*TURNS[:2]))]
    with steer(lm, [shut, None], sae):
        steered = next_token_logits(lm, prompts)
    assert torch.equal(steered, next_token_logits(lm, prompts))


def test_more_turns_than_calibrated_are_said_and_may_be_steered(
    lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    plan = windowed["probe"]
    assert plan.gate
    fields = {"threshold": 1e9, "turns_calibrated": 2}
    careful = {**fields, "when_in_doubt": "steer"}
    reads, steers = (plan.model_copy(update={"gate": plan.gate.model_copy(update=f)}) for f in (fields, careful))
    talks = [talk(*TURNS[:2]), talk(*TURNS)]
    found = receipts(lm, sae, reads, *talks)
    assert [(r.beyond_calibration, r.gate_fired) for r in found] == [(False, False), (True, False)]
    assert [r.gate_fired for r in receipts(lm, sae, steers, *talks)] == [False, True]


def test_a_gate_that_steers_down_reads_the_last_turn_and_keeps_its_mildest_window(
    lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]
) -> None:
    plan = windowed["external"]
    assert plan.gate
    down = Branch(gate=plan.gate.model_copy(update={"turns": "last", "threshold": 5.0}), edits=plan.edits)
    high = plan.gate.model_copy(update={"threshold": 1e9})
    two = Plan.model_validate({**dict(plan), "gate": high, "otherwise": down})
    found = receipts(lm, sae, two, talk("w39", "w1"), talk("w1", "w39"), talk("w1", "w39 " * 9 + "w0 " * 8))
    assert [(r.otherwise_score, r.branch) for r in found] == [(1.0, "none"), (39.0, "otherwise"), (0.0, "none")]


def test_changed_weights_are_read_again(lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]) -> None:
    plan = windowed["dense"]
    before = scores(lm, sae, plan, talk(*TURNS))
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(2.0)
        after = scores(lm, sae, plan, talk(*TURNS))
        weight.mul_(0.5)
    assert after != before
    assert scores(lm, sae, plan, talk(*TURNS)) == before


def test_a_prepared_model_refuses_what_it_cannot_read(sae: Sae, windowed: dict[str, Plan]) -> None:
    from tests.steering.conftest import tiny_llama

    own = tiny_llama()
    prepared = prepare(own, [sae])
    ok, refused = ([encode(own, talk(*TURNS[:n]))] for n in (1, 2))
    with prepared.steer(windowed["probe"], ok) as steering:
        next_token_logits(own, ok)
        assert steering.receipts()[0].turns_read == 1  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="each turn of a conversation"), prepared.steer(windowed["probe"], refused):
        pass
    prepared.detach()


def test_maxima_are_of_whole_conversations_and_never_share_a_prompt() -> None:
    values, owner = np.arange(9.0), np.array([0, 1, 2, 2, 2, 2, 3, 4, 5])
    assert conversation_maxima(values, owner, 3).tolist() == [2.0, 8.0]
    assert conversation_maxima(values, owner, 1).tolist() == [0.0, 1.0, 5.0, 6.0, 7.0, 8.0]
    assert provable_turns(np.arange(236 * 4), 0.02, 0.95, most=9) == 4
    assert provable_turns(np.arange(100), 0.02, 0.95, most=9) == 1


def test_the_promise_holds_for_every_shorter_conversation() -> None:
    """A conversation's worst turn is no better than that of its beginning."""
    rng, broken = np.random.default_rng(0), np.zeros(9)
    for _ in range(40):
        turns = rng.standard_normal((300, 9))
        threshold = np.sort(turns.max(1))[-3]
        fresh = np.maximum.accumulate(rng.standard_normal((2000, 9)), axis=1)
        rates = (fresh > threshold).mean(0)
        assert (np.diff(rates) >= 0).all()
        broken += rates
    assert broken[0] < broken[-1]


def test_prompts_are_read_as_they_are_when_steered(lm: LanguageModel, sae: Sae, windowed: dict[str, Plan]) -> None:
    plan = windowed["cosine"]
    assert plan.gate
    prompts = [Prompt("a", tuple(talk(*TURNS)), "s"), Prompt("b", (Message("user", TURNS[1]),), "s")]
    read = read_prompts(lm, plan.gate, {"v": VECTOR, "u": OTHER}, None, prompts)
    steered = scores(lm, sae, plan, *(list(prompt.messages) for prompt in prompts))
    assert [reading.score for reading in read] == pytest.approx(steered, abs=1e-5)


def test_harm_is_found_wherever_it_stands_among_benign_turns() -> None:
    """The shipped probe on the embedded model; read in context it loses harm after a few turns and fires on talk."""
    organism, trained = load_model("organism"), load_sae("organism")
    plan = read_plan(PLANS_DIR / "clamp-352-gated.toml")
    assert plan.gate
    gate = plan.gate.model_copy(update={"window": 40})
    harmful = one_suite("harmful", Split.TEST, 20).prompts
    benign = [p for p in one_suite("benign", Split.TEST, 120).prompts if len(p.messages) == 1]

    def talked(k: int, at: int, among: int) -> list[Prompt]:
        found = []
        for number, prompt in enumerate(harmful):
            turns = [benign[(among + number * k + i) % len(benign)].text for i in range(k)]
            turns.insert(at, prompt.text)
            found.append(Prompt(prompt.id, tuple(talk(*turns)), "s"))
        return found

    def fired(prompts: Sequence[Prompt]) -> list[bool]:
        return [read.opens for read in read_prompts(organism, gate, {}, trained, prompts)]

    alone = fired(harmful)
    assert sum(alone) >= 19
    for k, at in ((1, 0), (4, 2), (8, 0), (8, 4), (8, 8)):
        assert all(now or not before for now, before in zip(fired(talked(k, at, 7 * k)), alone, strict=True))
    quiet = [Prompt(str(i), tuple(talk(*(p.text for p in benign[i : i + 2]))), "s") for i in range(40)]
    assert sum(fired(quiet)) <= 4
