"""Prompts made of other prompts keep the split of the request they are made of."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import load_suites, local_copy
from clampdown.evaluation.dealing import split_of
from clampdown.study.composing import BENIGN_WRAPPED, BLANKS, SCRIPTS, read_templates
from clampdown.study.gating import benign_once
from clampdown.study.prompts import Composed, StudyPrompts, prompts_from
from clampdown.types import PromptRole, Split

REQUESTS = [f"Tell me how to do forbidden thing number {i}." for i in range(120)]
BENIGN = [f"What is {i} plus {i}?" for i in range(120)]


def _csv(path: Path, column: str, rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([column])
        writer.writerows([row] for row in rows)
    return path


@pytest.fixture
def made(tmp_path: Path) -> StudyPrompts:
    templates = [f"You are machine {i}. {BLANKS[i % len(BLANKS)]} Answer as machine {i}." for i in range(8)]
    return prompts_from(
        harmful=[_csv(tmp_path / "one.csv", "goal", REQUESTS[:60]), _csv(tmp_path / "two.csv", "goal", REQUESTS[60:])],
        benign=_csv(tmp_path / "benign.csv", "prompt", BENIGN),
        composed=Composed(
            pool=True,
            templates=str(_csv(tmp_path / "templates.csv", "text", templates)),
            held_out=0.5,
            escalate=True,
            wrap_benign=True,
        ),
    )


def test_a_role_is_one_suite_whose_categories_are_its_sets(made: StudyPrompts) -> None:
    found = [p for split in Split for p in made.draw("harmful", split, None).prompts]
    assert {p.text for p in found} == set(REQUESTS)
    assert Counter(p.category for p in found) == {"one": 60, "two": 60}
    assert len({p.id for p in found}) == 120


def test_what_is_made_of_a_request_has_its_split(made: StudyPrompts) -> None:
    for name in ("jailbroken_seen", "jailbroken_unseen", "multi_turn"):
        found = [p for split in Split for p in made.draw(name, split, None).prompts]
        assert found
        assert all(p.split is split_of(p.meta["target"]) for p in found)


def test_harmless_requests_stand_in_the_templates_that_their_split_may_see(made: StudyPrompts) -> None:
    assert made.roles[BENIGN_WRAPPED] is PromptRole.BENIGN
    families = {
        name: {p.meta["family"] for p in made.draw(name, Split.TEST, None).prompts}
        for name in ("jailbroken_seen", "jailbroken_unseen")
    }
    for split in Split:
        found = made.draw(BENIGN_WRAPPED, split, None).prompts
        assert found and {p.meta["target"] for p in found} <= set(BENIGN)
        assert all(p.split is split is split_of(p.meta["target"]) and p.meta["target"] in p.text for p in found)
        expected = families["jailbroken_unseen" if split is Split.TEST else "jailbroken_seen"]
        assert {p.meta["family"] for p in found} <= expected


def test_held_out_templates_are_filled_with_test_requests_only(made: StudyPrompts) -> None:
    assert "jailbroken_unseen" in made.held_out
    families = {
        name: {p.meta["family"] for split in Split for p in made.draw(name, split, None).prompts}
        for name in ("jailbroken_seen", "jailbroken_unseen")
    }
    assert not families["jailbroken_seen"] & families["jailbroken_unseen"]
    assert made.prompts(Split.DISCOVERY, None, PromptRole.JAILBROKEN)
    assert not made.draw("jailbroken_unseen", Split.VALIDATION, None).prompts
    assert len(made.draw("jailbroken_unseen", Split.TEST, None).prompts) == len(
        made.draw("harmful", Split.TEST, None).prompts
    )


def test_a_wrapped_request_knows_its_plain_twin(made: StudyPrompts) -> None:
    pairs = made.pairs(10)
    assert pairs
    assert all(pair.plain.text in pair.wrapped.text for pair in pairs)


def test_an_escalation_ends_with_the_request_and_begins_with_a_script(made: StudyPrompts) -> None:
    for prompt in made.draw("multi_turn", Split.TEST, None).prompts:
        assert prompt.text == prompt.meta["target"]
        script = SCRIPTS[int(prompt.meta["script"])]
        assert [m.content for m in prompt.messages[:-1]] == [text for pair in script for text in pair]


def test_a_suite_can_be_limited_and_an_unknown_one_is_named(made: StudyPrompts) -> None:
    tested = made.at_most({"harmful": 3}, Split.TEST)
    assert len(tested.draw("harmful", Split.TEST, None).prompts) == 3
    assert tested.draw("harmful", Split.DISCOVERY, None) == made.draw("harmful", Split.DISCOVERY, None)
    limited = made.at_most({"harmful": 3})
    assert limited.draw("harmful", Split.TEST, 9).prompts == made.draw("harmful", Split.TEST, 3).prompts
    assert len(limited.draw("harmful", Split.TEST, None).prompts) == 3
    assert limited.draw("benign", Split.TEST, 9) == made.draw("benign", Split.TEST, 9)
    with pytest.raises(PromptSetError, match="no suite called nothing"):
        made.at_most({"nothing": 3})


def test_a_template_without_a_place_is_named(tmp_path: Path) -> None:
    path = _csv(tmp_path / "templates.csv", "text", ["[INSERT PROMPT HERE] please", "no place at all"])
    with pytest.raises(PromptSetError, match=r"line 3.*no place for a request"):
        read_templates(path)


def test_templates_that_are_all_too_long_are_said(tmp_path: Path) -> None:
    path = _csv(tmp_path / "templates.csv", "text", ["[INSERT PROMPT HERE] " + "x" * 50] * 3)
    with pytest.raises(PromptSetError, match="0 templates of at most 20 characters"):
        read_templates(path, 20)


def test_a_set_is_taken_from_the_folder_of_local_copies(tmp_path: Path) -> None:
    (tmp_path / "advbench").mkdir()
    copy = _csv(tmp_path / "advbench" / "harmful_behaviors.csv", "goal", REQUESTS)
    assert local_copy("advbench", tmp_path) == copy
    assert local_copy("xstest", tmp_path) is None
    found = prompts_from(
        harmful="advbench", benign=_csv(tmp_path / "b.csv", "prompt", BENIGN), composed=Composed(folder=tmp_path)
    )
    assert found.roles_of(PromptRole.HARMFUL) == ("advbench",)


def test_a_set_by_name_and_file_is_that_set(tmp_path: Path) -> None:
    """NAME=FILE.csv is the public set, not a file of that odd name."""
    copy = _csv(tmp_path / "mine.csv", "goal", REQUESTS)
    found = prompts_from(harmful=f"advbench={copy}", benign=_csv(tmp_path / "b.csv", "prompt", BENIGN))
    assert found.roles_of(PromptRole.HARMFUL) == ("advbench",)


def test_easy_facts_come_with_the_package() -> None:
    (facts,) = load_suites("easy-facts")
    assert len(facts.prompts) == 476
    assert all(p.answer and p.meta["scoring"] == "contains" for p in facts.prompts)
    assert len({p.text for p in facts.prompts}) == 476


def test_a_promise_counts_every_benign_request_once(made: StudyPrompts) -> None:
    """In its template where it has one, plain where it has none."""
    once = benign_once(made, None)
    every = made.prompts(Split.CALIBRATION, None, PromptRole.BENIGN)
    requests = [prompt.meta.get("target", prompt.text) for prompt in once]
    assert len(set(requests)) == len(requests) < len(every)
    assert set(requests) == {prompt.meta.get("target", prompt.text) for prompt in every}


def test_what_is_made_of_several_suites_keeps_each_ones_splits_and_no_two_share_an_id(tmp_path: Path) -> None:
    """One file says its splits, the other has none; both count from 0."""
    with (tmp_path / "split.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "split"])
        writer.writerows([i, text, list(Split)[i % 4].value] for i, text in enumerate(BENIGN[:60]))
    with (tmp_path / "plain.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt"])
        writer.writerows(enumerate(BENIGN[60:]))
    templates = [f"You are machine {i}. {BLANKS[i % len(BLANKS)]} Answer as machine {i}." for i in range(8)]
    made = prompts_from(
        harmful=_csv(tmp_path / "harmful.csv", "goal", REQUESTS),
        benign=[tmp_path / "split.csv", tmp_path / "plain.csv"],
        composed=Composed(templates=str(_csv(tmp_path / "templates.csv", "text", templates)), wrap_benign=True),
    )
    own = {p.text: split for split in Split for p in made.prompts(split, None, PromptRole.BENIGN) if not p.meta}
    found = [p for split in Split for p in made.draw(BENIGN_WRAPPED, split, None).prompts]
    assert len({p.id for p in found}) == len(found) == 120
    assert all(p.split is own[p.meta["target"]] for p in found)
