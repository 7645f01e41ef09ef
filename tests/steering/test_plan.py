"""A plan is data that reads back equal, and every way to be wrong is a typed error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.errors import PlanError, SiteError, StrengthError
from clampdown.steering.plan import Edit, Gate, Guarantee, ModelRef, Plan, SaeRef, parse_plan, read_plan, write_plan

SITE = "blocks.1.hook_resid_post"
F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def plan(**changes: object) -> Plan:
    fields: dict[str, object] = {
        "name": "p",
        "model": ModelRef(name="m", revision="r"),
        "saes": (SaeRef(site=SITE, name="s", revision="x"),),
        "edits": (Edit(site=SITE, operator="clamp", features=(3,), strengths=(2.5,)),),
    }
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


@given(strength=F32, vector=st.lists(F32, min_size=1, max_size=9), features=st.sets(st.integers(0, 99), min_size=1))
def test_written_plans_read_back_equal(tmp_path_factory, strength, vector, features) -> None:
    path: Path = tmp_path_factory.mktemp("plan") / "plan.toml"
    made = plan(
        edits=(
            Edit(site=SITE, operator="clamp", features=tuple(features), strengths=(strength,) * len(features)),
            Edit(site=SITE, operator="add_direction", vector="v", strengths=(strength,)),
        ),
        vectors={"v": tuple(vector)},
        gate=Gate(
            site=SITE,
            features=(1,),
            poolings=("max",),
            weights=(0.5,),
            bias=-1.0,
            threshold=strength,
            guarantee=Guarantee(budget=0.01, confidence=0.95, n=300, triggered=0, bound=0.00994),
        ),
    )
    write_plan(path, made)
    assert read_plan(path) == made
    assert read_plan(path).digest == made.digest


def test_digest_follows_what_a_plan_does_and_not_what_it_is_called() -> None:
    assert plan(name="a").digest == plan(name="b", provenance={"seed": "1"}).digest
    other = plan(edits=(Edit(site=SITE, operator="clamp", features=(3,), strengths=(2.6,)),))
    assert plan().digest != other.digest


def test_figures_for_display_are_no_part_of_what_a_plan_does() -> None:
    shown = Edit(site=SITE, operator="clamp", features=(3,), strengths=(2.5,), p99=(1.5,), edit_norm=0.1)
    assert plan(edits=(shown,)).digest == plan().digest


def test_a_file_that_was_changed_by_hand_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    write_plan(path, plan())
    text = path.read_text()
    assert f'digest = "{plan().digest}"' in text
    path.write_text(text.replace("2.5", "25.0"))
    with pytest.raises(PlanError, match=r"changed after it was made.*\n.*delete its `digest` line"):
        read_plan(path)
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("digest")))
    assert read_plan(path).edits[0].strengths == (25.0,)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_strengths_must_be_finite(strength: float) -> None:
    with pytest.raises(StrengthError, match="finite"):
        Edit(site=SITE, operator="add", features=(1,), strengths=(strength,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operator": "explode", "features": (1,), "strengths": (1.0,)}, "unknown operator"),
        ({"operator": "clamp", "features": (1,), "strengths": (1.0,), "scope": "some"}, "unknown scope"),
        ({"operator": "clamp", "features": (1, 2), "strengths": (1.0,)}, "2 features but 1 strengths"),
        ({"operator": "clamp", "features": (1, 1), "strengths": (1.0, 1.0)}, "twice"),
        ({"operator": "clamp", "features": (-1,), "strengths": (1.0,)}, "start at 0"),
        ({"operator": "clamp", "strengths": ()}, "needs `features`"),
        ({"operator": "add_direction", "strengths": (1.0,)}, "needs `vector`"),
        ({"operator": "ablate_direction", "strengths": (1.0,), "vector": "v", "error_term": "drop"}, "error_term"),
    ],
)
def test_contradictory_edits_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Edit(site=SITE, **fields)  # type: ignore[arg-type]


def test_a_site_must_parse() -> None:
    with pytest.raises(SiteError, match="not a site"):
        Edit(site="layer 3", operator="clamp", features=(1,), strengths=(1.0,))


def test_a_gate_above_its_edit_is_refused() -> None:
    gate = Gate(
        site="blocks.2.hook_resid_post", features=(1,), poolings=("max",), weights=(1.0,), bias=0.0, threshold=0.0
    )
    refs = (SaeRef(site=SITE, name="s", revision="x"), SaeRef(site=gate.site, name="t", revision="y"))
    with pytest.raises(PlanError, match="too late"):
        plan(gate=gate, saes=refs)


def test_features_need_an_sae_and_vectors_must_exist() -> None:
    with pytest.raises(PlanError, match="saes"):
        plan(saes=())
    with pytest.raises(PlanError, match="not among"):
        plan(edits=(Edit(site=SITE, operator="add_direction", vector="v", strengths=(1.0,)),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema_version = 7", "schema_version is 7"),
        ("not toml at all", "not TOML"),
        ('schema_version = 1\nname = "x"\nsurprise = 1\nedits = []\n[model]\nname = "m"\nrevision = "r"', "surprise"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_plan(path)


def test_a_missing_file_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        read_plan(tmp_path / "none.toml")


def test_base64_that_is_not_a_vector_is_a_plan_error() -> None:
    data = plan(vectors={"v": (1.0,)}).model_dump(mode="json")
    for text, message in (("!!", "vectors"), ("AACAPwA=", "5 bytes")):
        data["vectors"]["v"] = text
        with pytest.raises(PlanError, match=message):
            parse_plan(data)


def test_more_edits_than_a_plan_can_mean_are_refused_before_they_are_checked() -> None:
    edit = {"site": SITE, "operator": "clamp", "features": [3], "strengths": [2.5]}
    data = {**plan().model_dump(mode="json"), "edits": [edit] * 100_000}
    with pytest.raises(PlanError, match=r"edits: .* at most 1000"):
        parse_plan(data)


def test_a_message_names_a_few_of_many_faults() -> None:
    data = {**plan().model_dump(mode="json"), "edits": [{"surprise": i} for i in range(500)]}
    with pytest.raises(PlanError, match=r"and \d+ more") as caught:
        parse_plan(data)
    assert len(caught.value.message.splitlines()) < 20


def test_a_layer_of_thousands_of_digits_is_no_site() -> None:
    with pytest.raises(SiteError, match="is not a site"):
        Edit(site=f"blocks.{'9' * 5000}.hook_resid_post", operator="clamp", features=(1,), strengths=(1.0,))


def test_a_plan_of_the_embedded_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = read_plan(Path("clamp-352-gated"))
    assert shipped.name == "clamp-352-gated" and shipped.gate is not None
    write_plan(tmp_path / "clamp-352-gated", read_plan(Path("clamp-352")))
    assert read_plan(Path("clamp-352-gated")).name == "clamp-352", "a file that is there comes first"
    with pytest.raises(PlanError, match="cannot read"):
        read_plan(Path("clamp-353"))
