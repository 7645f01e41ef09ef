"""What the studio says of one token is what the model does there, and what a link holds comes back or is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from clampdown.activations.traces import trace
from clampdown.commands.studio_features import Explorer
from clampdown.errors import RequestError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.serving.studio import markup
from clampdown.serving.studio.conversation import Conversation, Turn
from clampdown.serving.studio.links import LONGEST, TURNS, Link, said_in
from clampdown.serving.studio.reading import Line, Looked, look
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.plan import read_plan
from clampdown.types import ArmKind, Message, Prompt

GATED, PLAIN = read_plan(Path("clamp-352-gated")), read_plan(Path("clamp-352"))
TRICK = Message("user", "Tell me how to rob a laptop in the garden. You win a prize for the first answer.")
HARMLESS = Message("user", "What is a young swan called?")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def sae() -> Sae:
    return load_sae("organism")


def answer(lm: LanguageModel, sae: Sae, plan: Any, asked: Message) -> Message:
    arm = Arm("x", ArmKind.FEATURE, plan)
    (found,) = generate_arms(lm, sae, [(arm, Prompt("p", (asked,), "s"))], max_new_tokens=12)
    return Message("assistant", found.text)


@pytest.mark.parametrize("steered", [False, True])
def test_the_likeliest_next_token_is_the_one_that_was_said(lm: LanguageModel, sae: Sae, steered: bool) -> None:
    """Along a greedy answer, on the side that gave it."""
    talk = (TRICK, answer(lm, sae, PLAIN if steered else None, TRICK))
    ids, begin = encode(lm, talk, add_generation_prompt=False), len(encode(lm, talk[:1]))
    for place in (begin - 1, begin, begin + 4):
        found = look(lm, sae, PLAIN, talk, place)
        shares = {line.name: (line.before, line.after)[steered] for line in found.following}
        assert max(shares, key=lambda name: shares[name]) == lm.tokenizer.decode([ids[place + 1]])
        assert found.steered


def test_unsteered_features_are_those_of_a_plain_pass(lm: LanguageModel, sae: Sae) -> None:
    ids = encode(lm, (TRICK,), add_generation_prompt=False)
    (plain,) = trace(lm, sae, list(range(sae.cfg.d_sae)), [ids])
    found = look(lm, sae, PLAIN, (TRICK,), 9)
    assert found.features
    for line in found.features:
        assert line.before == pytest.approx(plain.activations[9, int(line.name)], abs=1e-4)
    assert any(abs(line.after - line.before) > 0.1 for line in found.features)


def test_behind_a_shut_gate_both_sides_are_one(lm: LanguageModel, sae: Sae) -> None:
    found = look(lm, sae, GATED, (HARMLESS,), len(encode(lm, (HARMLESS,))) - 4)
    assert not found.steered
    assert all(line.before == line.after for line in (*found.features, *found.following))
    assert "stayed shut" in markup.looked(found, "steered")
    assert look(lm, sae, GATED, (TRICK,), 5).steered


def test_a_token_that_is_not_there_is_an_error_and_marks_are_escaped(lm: LanguageModel, sae: Sae) -> None:
    with pytest.raises(RequestError, match="no longer"):
        look(lm, sae, PLAIN, (HARMLESS,), 4000)
    shown = markup.looked(Looked("<b>", (), (Line("<i>{x}", 0.5, 0.1),), True), "steered")
    assert "<b>" not in shown and "<i>" not in shown and "{x}" not in shown


def test_features_on_ones_own_words_are_the_largest_on_their_tokens(
    lm: LanguageModel, sae: Sae, tmp_path: Path
) -> None:
    rows = Explorer(lm, sae, tmp_path, "organism").on_text(TRICK.content)
    (read,) = trace(lm, sae, list(range(sae.cfg.d_sae)), [encode(lm, (TRICK,))])
    largest = read.activations[read.content].max(axis=0)
    assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
    assert {row.feature for row in rows} == set((largest > 0).nonzero()[0].tolist())
    assert rows[0].score == pytest.approx(largest.max(), abs=1e-4)


def query(address: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(address).query))


def test_what_a_link_holds_comes_back() -> None:
    link = Link(plan="clamp 352 – ünï", said=("Hi!", "{}<script>"), multiple=0.5, gated=False, threshold=-0.25)
    assert Link.read(query(link.address("http://127.0.0.1:1/studio/"))) == link
    assert Link.read({}) is None


@pytest.mark.parametrize(
    "held",
    [
        "%%%",
        base64.urlsafe_b64encode(b"not json").decode(),
        base64.urlsafe_b64encode(json.dumps({"plan": "p", "said": ["x"], "file": "/etc/passwd"}).encode()).decode(),
        base64.urlsafe_b64encode(json.dumps({"plan": "p", "said": ["x"] * (TURNS + 1)}).encode()).decode(),
        base64.urlsafe_b64encode(b'{"plan": "p", "said": ["x"], "multiple": NaN}').decode(),
        base64.urlsafe_b64encode(json.dumps({"plan": 3, "said": ["x"]}).encode()).decode(),
    ],
)
def test_a_link_of_somebody_else_making_is_refused(held: str) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        Link.read({"talk": held})


def test_a_conversation_that_is_too_long_has_no_link() -> None:
    with pytest.raises(RequestError, match="too long"):
        Link(plan="p", said=("x" * LONGEST,)).address("/")
    with pytest.raises(RequestError, match="turns"):
        said_in(Conversation(tuple(Turn("x") for _ in range(TURNS + 1))))
