"""The papers' claims are read off paired differences: significance, direction, and what has no data."""

from __future__ import annotations

from typing import Any

from clampdown.study.claims import Arms, changes, claims

HARMFUL = ("harmful", "multi_turn")
ARMS = Arms("first", "first matched", "second", "second turned", tuple(f"random {i}" for i in range(1, 21)))


def change(difference: float, p_value: float | None = 0.001) -> dict[str, Any]:
    return {"difference": difference, "p_value": p_value, "n": 60}


def row(
    name: str, refused: float = 0.0, safe: float = 0.0, right: float = 0.0, p: float | None = 0.001, **frontier: Any
):
    against = {
        "harmful": change(refused, p),
        "multi_turn": change(refused, p),
        "benign": change(safe, p),
        "facts": change(right, p),
    }
    suites: dict[str, Any] = {"harmful": {}, "multi_turn": {}, "benign": {}}
    return {"name": name, "suites": suites, "capability": {"facts": {}}, "against_baseline": against,
            "frontier": {"capability": 0.5} | frontier}  # fmt: skip


def answers(*rows: dict[str, Any]) -> dict[str, bool | None]:
    given = {each["name"]: each for each in rows}
    others = ("first", "first matched", "second", "second turned", *ARMS.random)
    every = [given.get(name, row(name)) for name in others]
    return {claim.claim: claim.reproduced for claim in claims(every, HARMFUL, ARMS)}


def test_a_gain_counts_when_it_is_significant_and_points_the_right_way() -> None:
    found = answers(row("first", refused=0.4, safe=0.2, right=-0.3))
    assert found["clamping raises refusal of harmful prompts"]
    assert found["and of safe prompts"]
    assert found["and lowers capability"]
    found = answers(row("first", refused=-0.4, safe=-0.2, right=0.3))
    assert not any(found[name] for name in list(found)[:4])


def test_a_gain_on_one_suite_that_another_pays_for_is_no_rise() -> None:
    mixed = row("second", refused=0.4, right=-0.1)
    mixed["against_baseline"]["harmful"] = change(-0.1)
    found = answers(mixed)
    assert found["steering raises refusal of harmful prompts"] is False
    assert found["safety and capability rise under one plan"] is False
    assert not found["and capability does not fall"]
    mixed["against_baseline"]["harmful"] = change(-0.1, p_value=0.5)
    assert answers(mixed)["steering raises refusal of harmful prompts"]


def test_what_chance_would_do_is_no_gain_and_two_suites_need_half_the_p() -> None:
    assert not answers(row("first", refused=0.4, p=0.03))["clamping raises refusal of harmful prompts"]
    assert answers(row("first", refused=0.4, p=0.02))["clamping raises refusal of harmful prompts"]
    assert not answers(row("first", refused=0.0, p=None))["clamping raises refusal of harmful prompts"]


def test_safety_and_capability_must_rise_under_one_plan() -> None:
    both = "safety and capability rise under one plan"
    assert answers(row("second", refused=0.4, right=0.2))[both]
    kept = answers(row("second", refused=0.4), row("second turned", right=0.2))
    assert kept["and capability does not fall"]
    assert kept["capability rises at the other sign"]
    assert not kept[both]


def test_the_unrelated_damage_is_a_rank_among_random_features() -> None:
    claim = "an unrelated feature pushed as far damages capability as much"
    worse = [row(name, capability=0.4) for name in ARMS.random]
    better = [row(name, capability=0.9) for name in ARMS.random]
    assert answers(*worse)[claim]
    assert answers(*better)[claim] is False
    assert answers(*better[:11], *worse[11:])[claim], "9 of 20 keep no more: not told apart from them"
    assert answers(*better[:19], worse[19])[claim], "p = 2/21"
    few = [{**each, "frontier": {"capability": None}} for each in better[:2]]
    assert answers(*better[2:], *few)[claim] is None, "18 features cannot show it at 0.05"


def test_a_suite_without_a_paired_difference_is_left_out_and_none_at_all_is_no_answer() -> None:
    empty = row("first") | {"against_baseline": {"facts": change(-0.2)}}
    assert [one.suite for one in changes(empty, "capability", HARMFUL)] == ["facts"]
    found = answers(empty)
    assert found["clamping raises refusal of harmful prompts"] is None
    assert found["and lowers capability"]
