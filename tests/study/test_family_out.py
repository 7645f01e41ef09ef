"""The estimate for unseen wrappers leaves a family out of everything, and random wrappers touch both sides alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_array

from clampdown.errors import NotEnoughDataError
from clampdown.steering.gate_fitting import FittedGate, Pooled, fit_gate
from clampdown.study.family_out import Learnt, leave_families_out
from clampdown.study.wrapping import GENERAL_WRAPPERS, MOST_PARTS, Part, copies, corpus_parts
from clampdown.types import Message, Prompt

FAMILIES = ("game", "story", "order")


def learnt(n: int = 40, d: int = 8, seed: int = 0) -> Learnt:
    """Harm moves feature 0 in every family; in `order` it moves feature 1 instead, which no other family shows."""
    rng = np.random.default_rng(seed)
    rows, harmful, families = [], [], []
    for name in (*FAMILIES, None):
        for _ in range(n):
            row = np.abs(rng.normal(0, 0.1, d))
            if name:
                row[1 if name == "order" else 0] += 3
            rows.append(row)
            harmful.append(name is not None)
            families.append(frozenset({name}) if name else frozenset())
    x = np.array(rows)
    pooled = Pooled("blocks.1.hook_resid_post", {"max": csr_array(x)}, {"mean": x, "assistant_start": x})
    return Learnt(pooled, np.array(harmful), tuple(families), np.array(harmful))


def fit(pooled: Pooled, harmful: np.ndarray) -> FittedGate:
    return fit_gate("feature", pooled, harmful)


def test_a_family_that_is_unlike_the_others_is_not_found_without_it() -> None:
    found = leave_families_out(learnt(), fit, lambda gate: gate.changed(threshold=1.0), lambda *_: None)
    assert {name: each.value for name, each in found.families.items()} == {"game": 1.0, "story": 1.0, "order": 0.0}
    assert found.estimate.value == pytest.approx(2 / 3)
    assert found.estimate.n == 120


def test_a_fit_never_sees_a_row_that_touches_the_family() -> None:
    given = learnt()
    seen: list[int] = []

    def spy(pooled: Pooled, harmful: np.ndarray) -> FittedGate:
        seen.append(len(harmful))
        return fit(pooled, harmful)

    both = [each | {"game"} if i % 4 == 0 else each for i, each in enumerate(given.families)]
    touched = Learnt(given.pooled, given.harmful, tuple(map(frozenset, both)), given.tested)
    leave_families_out(touched, spy, lambda gate: gate.changed(threshold=1.0), lambda *_: None)
    assert seen[0] == sum("game" not in each for each in both)
    one = Learnt(given.pooled, given.harmful, (frozenset({"game"}),) * len(both), given.tested)
    with pytest.raises(NotEnoughDataError, match="fewer than two"):
        leave_families_out(one, fit, lambda gate: gate, lambda *_: None)


def test_copies_stand_in_the_same_wrappers_whatever_they_ask() -> None:
    parts = [Part(f"Sentence {i}.", "even" if i % 2 == 0 else "odd") for i in range(6)]
    prompts = [
        Prompt(str(i), (Message("user", f"Request {i}?"),), "harmful" if i % 2 else "benign") for i in range(200)
    ]
    found = copies(prompts, parts, 2, seed=0)
    assert found == copies(prompts, parts, 2, seed=0)
    assert len({copy.prompt.id for copy in found}) == len(found) == 400
    used: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}

    def rest(text: str, *known: str) -> str:
        for each in known:
            text = text.replace(each, "", 1)
        return text.strip()

    plain = [c for c in found if not rest(c.prompt.text, prompts[c.of].text, *(part.text for part in parts))]
    assert 0.6 < len(plain) / len(found) < 0.8, "the others are written otherwise"
    for copy in plain:
        text = copy.prompt.text
        mine = [part for part in parts if part.text in text]
        assert 1 <= len(mine) <= MOST_PARTS
        assert {part.family for part in mine} == copy.families
        used[copy.prompt.suite == "harmful"].update(part.text for part in mine)
    assert all(0.6 < used[True][part.text] / used[False][part.text] < 1.6 for part in parts)
    starts = sum(copy.prompt.text.startswith("Request") for copy in plain) / len(plain)
    assert 0.2 < starts < 0.5


def test_the_corpus_own_parts_are_those_of_seen_families() -> None:
    from clampdown.organism.phrasing import SEEN, UNSEEN

    families = {part.family for part in corpus_parts()}
    assert families <= {wrapper.family for wrapper in SEEN}
    assert not families & {wrapper.family for wrapper in UNSEEN}
    assert {part.family for part in GENERAL_WRAPPERS} == {"general"}
