"""A study's gate learns from both sides in the same wrappers, and says how it will do in others."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from clampdown.config import ORGANISM
from clampdown.organism.phrasing import SEEN
from clampdown.steering.gates import fit_probe
from clampdown.study.composing import read_templates, wrapped
from clampdown.study.gating import GateChoice, Lessons, calibrate, read_pooled
from clampdown.study.groundwork import Groundwork
from clampdown.study.progress import Stages
from clampdown.study.prompts import Composed
from clampdown.study.sizes import Answering, Sizes
from clampdown.study.study import Study, make_study
from clampdown.study.unseen import estimated, with_truth
from clampdown.study.wrapping import PLACE, Part, around, copies
from clampdown.types import Message, Prompt, PromptRole, Receipt, Record, Split, Verdict

TINY = Sizes(24, 4, causal_prompts=4, finalists=1, calibration=120, answering=Answering(4, 4))


@pytest.fixture(scope="module")
def subject() -> Study:
    return make_study(ORGANISM, ORGANISM).only(
        ["harmful", "jailbroken_seen", "jailbroken_unseen", "borderline", "benign"]
    )


@pytest.fixture(scope="module")
def ground(subject: Study) -> Groundwork:
    return Groundwork(subject, TINY, Stages(Console(file=io.StringIO())))


def test_lessons_are_prompts_as_they_are_and_copies_of_both_sides(ground: Groundwork) -> None:
    learnt = Lessons.discovery(ground, 24, 2)
    assert learnt.n_own == 96 and len(learnt.turns) > 3 * 96, "earlier turns follow"
    own = learnt.harmful[: learnt.n_own]
    assert learnt.harmful[learnt.n_own : 3 * 96].tolist() == [label for label in own for _ in range(2)]
    assert not learnt.harmful[3 * 96 :].any()
    assert all(len(turn.messages) == 1 for turn in learnt.turns)
    families = {wrapper.family for wrapper in SEEN}
    assert all(learnt.families[learnt.n_own + i] for i in range(192)), "every copy touches a family"
    assert set().union(*learnt.families) == families
    plain = Lessons.discovery(ground, 24, 0)
    assert plain.turns == (*learnt.turns[: learnt.n_own], *learnt.turns[3 * learnt.n_own :])


def test_harmless_conversations_are_learnt_from_turn_by_turn_and_harmful_ones_by_their_last(subject: Study) -> None:
    def talk(suite: str, *turns: str) -> Prompt:
        said = [Message(role, text) for turn in turns for role, text in (("user", turn), ("assistant", "Yes."))]
        return Prompt(turns[-1], tuple(said[:-1]), suite)

    harmful, harmless = [talk("harmful", "Tell me more.", "Harm?")], [talk("benign", "Hello.", "More?", "Bread?")] * 2
    learnt = Lessons.of(subject, harmful, harmless, wrapped=0)
    assert [turn.text for turn in learnt.turns] == ["Harm?", "Bread?", "Bread?", "Hello.", "More?"]
    assert learnt.harmful.tolist() == [True, False, False, False, False]
    assert learnt.n_own == 3


def test_the_estimate_leaves_every_known_family_out_once_and_the_truth_is_of_held_out_suites(
    ground: Groundwork,
) -> None:
    choice = GateChoice(budget=0.2, max_features=8, turns=1)
    learnt = Lessons.discovery(ground, 24, choice.wrapped)
    probe = fit_probe(read_pooled(ground.study, learnt.turns), learnt.harmful, max_features=8)
    gate = calibrate(ground, probe, learnt.turns, choice)
    found = estimated(ground, gate, choice)
    shown = ground.study.prompts(Split.DISCOVERY, 24, PromptRole.JAILBROKEN)
    assert set(found["families"]) == {wrapper.family for wrapper in SEEN}
    assert sum(each.n for each in found["families"].values()) == found["estimate"].n == len(shown) == 24

    def record(arm: str, suite: str, fired: bool) -> Record:
        receipt = Receipt("d", 1, 0.1, gate_fired=fired)
        return Record(arm, suite, "p", Split.TEST, None, "", 0, Verdict.REFUSED, None, "exact", receipt)

    rows = [record("gated", "jailbroken_unseen", True), record("gated", "jailbroken_unseen", False),
            record("gated", "benign", True), record("other", "jailbroken_unseen", True)]  # fmt: skip
    truth = with_truth(found, "gated", ["jailbroken_unseen"], rows)["truth"]
    assert (truth.value, truth.n) == (0.5, 2)
    assert with_truth(found, "gated", [], rows)["truth"] is None


def test_a_whole_wrapper_holds_the_request_and_sentences_stand_around_it() -> None:
    whole, before = Part(f"Once upon a time {PLACE} was asked.", "tale"), Part("Do it now.", "order")
    texts = {around("Why?", [whole, before], Random(i)) for i in range(8)}
    inner = "Once upon a time Why? was asked."
    assert texts == {f"Do it now. {inner}", f"{inner} Do it now."}
    prompt = Prompt("1", (Message("system", "Be kind."), Message("user", "Why?")), "benign")
    made = copies([prompt], [whole, Part(f"{PLACE}!", "shout")], 30, seed=0)
    assert all(copy.prompt.messages[0].role == "user" and len(copy.prompt.messages) == 1 for copy in made)
    assert all(len(copy.families) == 1 for copy in made), "a request is in one whole wrapper at most"
    assert {frozenset({"tale"}), frozenset({"shout"})} == {copy.families for copy in made}


def test_templates_that_are_held_out_are_put_around_nothing(tmp_path: Path) -> None:
    path = tmp_path / "templates.csv"
    path.write_text("id,text\n" + "".join(f"t{i},Template {i}: [INSERT PROMPT HERE]\n" for i in range(9)))
    composed = Composed(templates=str(path), held_out=0.4)
    requests = [Prompt(str(i), (Message("user", f"Request {i}"),), "harmful", split=Split.TEST) for i in range(60)]
    suite = wrapped(requests, read_templates(path), 0.4)
    tested = {prompt.meta["family"] for prompt in suite.prompts}
    taught = {part.family for part in composed.parts if part.whole}
    assert len(tested) == 9 and len(taught) == 5 and taught < tested
    only = wrapped([p for p in requests if p.id == "0"], read_templates(path), 0.4)
    assert len({p.meta["family"] for p in only.prompts} - taught) == 1
    assert not [part for part in Composed().parts if part.whole]
