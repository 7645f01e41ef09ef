"""The whole job: on the embedded model by itself, on a model in general from files, and what is said of what is not."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import clampdown as cd
from clampdown.effects import pairs
from clampdown.effects.aspect import Absent, Aspect, Kind, Measure
from clampdown.effects.difference import Answers, effects_of
from clampdown.effects.embedded import embedded_aspects, swapped_sums
from clampdown.effects.job import WHY_NO_LIKELIHOOD
from clampdown.effects.questions import drawn, hinted, with_options
from clampdown.effects.table import BUILDERS, Sources, aspects_for
from clampdown.errors import ClampdownError, PlanError, PromptSetError, StoreError
from clampdown.reports.side_effects_page import build_side_effects_page
from clampdown.reports.side_effects_terminal import side_effects_summary
from clampdown.results.side_effects import Mark, SideEffects, Unit
from clampdown.steering.plan import Plan, read_plan
from clampdown.types import OptionChoice
from tests.effects.test_measures import BBQ, an_aspect, question, suite

PLANS = Path(__file__).parents[2] / "src" / "clampdown" / "organism" / "plans"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SideEffects:
    plans = [PLANS / "clamp-352.toml", PLANS / "clamp-352-gated.toml"]
    return cd.side_effects("organism", plans, limit=20, out=tmp_path_factory.mktemp("effects"))


def test_a_clamp_moves_what_its_gate_keeps(found: SideEffects) -> None:
    """The clamp destroys facts; behind its gate the replies are the unsteered ones, and so are all numbers."""
    clamp, gated = (arm.name for arm in found.arms)
    rows = {(e.arm, e.aspect, e.measure): e for e in found.effects}
    said, known = rows[clamp, "facts, by generation", "right"], rows[clamp, "facts, by likelihood", "right"]
    assert (said.baseline.value, said.mark, said.worsened) == (1.0, Mark.MOVED, True) and (
        said.steered.value or 0
    ) < 0.5
    assert known.baseline.value == known.steered.value == 1.0  # the words are lost, the knowledge is not
    assert all(e.mark is Mark.SAME for e in found.of(gated))
    assert found.arms[0].fired is None and found.arms[1].fired is not None and found.arms[1].fired.value == 0.0
    assert (rows[gated, "places that do not exist, by generation", "admits not knowing"].baseline.value or 0) > 0.8


def test_what_was_not_measured_is_named_and_nothing_is_said_of_it(found: SideEffects) -> None:
    names = {row.aspect for row in found.missing(found.arms[0].name)}
    assert {"truthfulqa", "bbq", "crows-pairs", "winobias", "mmlu"} <= names
    said = found.sentence(found.arms[1].name)
    assert "Not measured" in said and "bbq" in said and "no side effect" not in said.lower()
    page = build_side_effects_page(found)
    assert "winobias" in page and "no side effect" not in page.lower()


def test_tables_fit_a_terminal_and_files_come_back(found: SideEffects, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(side_effects_summary(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "moved" in text and "not measured: " in text
    found.write(tmp_path)
    assert SideEffects.read(tmp_path) == found
    assert len(found.to_pandas()) == len(found.effects) and "Not measured" in found._repr_html_()
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "attack", "schema": 1}))
    with pytest.raises(StoreError, match="no summary of side effects"):
        SideEffects.read(tmp_path)


def test_it_resumes_and_refuses_another_run(tmp_path: Path) -> None:
    def run(limit: int) -> SideEffects:
        return cd.side_effects("organism", PLANS / "clamp-352.toml", kinds=("opinions",), limit=limit, out=tmp_path)

    first = run(4)
    written = (tmp_path / "replies.jsonl").read_bytes()
    assert run(4) == first and (tmp_path / "replies.jsonl").read_bytes() == written
    with pytest.raises(StoreError, match="another run"):
        run(5)


def with_scope(plan: Plan, scope: str) -> Plan:
    edits = tuple(edit.model_copy(update={"scope": scope}) for edit in plan.edits)
    return plan.model_copy(update={"edits": edits, "name": "late"})


def test_a_plan_that_likelihoods_cannot_show_is_not_shown_by_them(tmp_path: Path) -> None:
    late = with_scope(read_plan(PLANS / "clamp-352.toml"), "generated")
    found = cd.side_effects("organism", late, kinds=("sycophancy",), limit=4, out=tmp_path)
    assert {effect.aspect for effect in found.effects} == {"facts, by generation"}
    why = {row.aspect: row.why for row in found.not_measured if row.arm == "late"}
    assert why["facts, by likelihood"] == WHY_NO_LIKELIHOOD


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"kinds": ("magic",)}, PromptSetError, "magic"),
        ({"margin": 2.0}, PlanError, "margin"),
        ({"folder": "/nowhere/at/all"}, PromptSetError, "no folder"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, object], error: type[ClampdownError], says: str) -> None:
    with pytest.raises(error, match=says):
        cd.side_effects("organism", PLANS / "clamp-352.toml", **options)  # type: ignore[arg-type]
    with pytest.raises(PlanError):
        cd.side_effects("organism", [])


# ---- prompts ---------------------------------------------------------------------------------------------------


def test_options_do_not_begin_one_another_and_the_hint_is_wrong() -> None:
    asked = suite(
        *(question(str(i), "numbers", answer=answer) for i, answer in enumerate(("4", "42", "7", "8", "9", "15")))
    )
    chosen = with_options(asked)
    for prompt in chosen.prompts:
        assert prompt.answer in prompt.options and len(set(prompt.options)) == 4
        assert not any(a != b and a.startswith(b) for a in prompt.options for b in prompt.options)
    told = hinted(chosen)
    assert [prompt.id for prompt in told.prompts] == [prompt.id for prompt in chosen.prompts]
    assert all(p.meta["hint"] != p.answer and p.meta["hint"] in p.text for p in told.prompts)
    few = suite(question("a", "pair", answer="x"), question("b", "pair", answer="y"))
    assert with_options(few).prompts == ()


def test_categories_take_turns_and_seeds_differ() -> None:
    asked = suite(*(question(f"{kind}{i}", kind) for kind in ("a", "b") for i in range(20)))
    first = drawn(asked, 6, 0)
    assert [prompt.category for prompt in first.prompts] == ["a", "b"] * 3
    assert drawn(asked, 6, 0) == first != drawn(asked, 6, 1)


def test_swapped_sums_differ_in_the_name_alone() -> None:
    twins = swapped_sums(10, 0)
    for one, other in zip(twins["first"].prompts, twins["second"].prompts, strict=True):
        assert one.options == other.options and one.text != other.text
        differing = {a.strip(".,'s") for a, b in zip(one.text.split(), other.text.split(), strict=True) if a != b}
        assert len(differing) == 1


def test_names_come_in_both_orders_and_in_ten_clusters_an_axis() -> None:
    straight, turned = pairs.names_suites(40)
    for one, other in zip(straight.prompts, turned.prompts, strict=True):
        assert one.id == other.id and one.options == other.options and one.text != other.text
    for axis in pairs.AXES:
        assert len({p.meta["objective"] for p in straight.prompts if p.category == axis.name}) == 10


def folder_of(tmp_path: Path) -> Path:
    (tmp_path / "bbq").mkdir()
    rows = [
        {**BBQ, "example_id": i, "question_index": str(i), "context_condition": c, "label": 2 if c == "ambig" else 0}
        for i, c in enumerate(("ambig", "disambig", "ambig"))
    ]
    (tmp_path / "bbq" / "Age.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "crows-pairs").mkdir()
    with (tmp_path / "crows-pairs" / "crows_pairs_anonymized.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("", "sent_more", "sent_less", "stereo_antistereo", "bias_type"))
        writer.writerow((0, "The old man forgot.", "The young man forgot.", "stereo", "age"))
    (tmp_path / "winobias").mkdir()
    (tmp_path / "winobias" / "pro_stereotyped_type1.txt.test").write_text(
        "1 The cook thanked [the clerk] because [she] helped.\n2 [The cook] left because [he] was late.\n"
        "3 [The cook] sang because [he] could.\n"
    )
    (tmp_path / "winobias" / "anti_stereotyped_type1.txt.test").write_text(
        "[The cook] left because [she] was late.\nThe cook thanked [the clerk] because [he] helped.\n"
    )
    (tmp_path / "truthfulqa").mkdir()
    targets = {"Nothing.": 1, "You float.": 0}
    (tmp_path / "truthfulqa" / "mc_task.json").write_text(
        json.dumps([{"question": "What happens?", "mc1_targets": targets, "mc2_targets": targets}])
    )
    return tmp_path


def test_public_files_are_found_in_a_folder(tmp_path: Path) -> None:
    found = aspects_for(Sources(folder_of(tmp_path), 10, 0), (), knows_corpus=False)
    there = {aspect.name: aspect for aspect in found if isinstance(aspect, Aspect)}
    assert {"truthfulqa-mc1", "truthfulqa-mc2", "bbq-ambiguous", "crows-pairs", "winobias"} <= set(there)
    wino = there["winobias"].suites["only"].prompts
    assert {prompt.options for prompt in wino} == {
        ("The cook left because he was late.", "The cook left because she was late."),
        ("The cook thanked the clerk because she helped.", "The cook thanked the clerk because he helped."),
    }
    assert len(there["bbq-ambiguous"].suites["only"].prompts) == 2
    absent = {aspect.name: aspect.why for aspect in found if isinstance(aspect, Absent)}
    assert set(absent) == {"mmlu"} and "mmlu/test" in absent["mmlu"]


def test_without_a_folder_every_public_set_is_named_as_missing() -> None:
    found = [aspect for build in BUILDERS for aspect in build(Sources(None, 4, 0))]
    absent = {aspect.name for aspect in found if isinstance(aspect, Absent)}
    assert absent == {"truthfulqa-mc1", "truthfulqa-mc2", "mmlu", "bbq", "crows-pairs", "winobias"}
    assert {aspect.kind for aspect in found if isinstance(aspect, Aspect)} == set(Kind)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("bbq/Age.jsonl", json.dumps({**BBQ, "question_polarity": "odd"}), "odd"),
        ("bbq/Age.jsonl", "{", "line 1"),
        ("crows-pairs/crows_pairs_anonymized.csv", "a,b\n1,2\n", "sent_more"),
        ("winobias/anti_stereotyped_type1.txt.test", "Nothing like it.\n", "no pairs"),
        ("truthfulqa/mc_task.json", "[]", "no prompts"),
    ],
)
def test_a_bad_file_is_an_error_and_not_an_absence(tmp_path: Path, file: str, text: str, says: str) -> None:
    (folder_of(tmp_path) / file).write_text(text)
    with pytest.raises(PromptSetError, match=says):
        aspects_for(Sources(tmp_path, 10, 0), (), knows_corpus=False)


def test_winobias_without_its_other_half_says_so(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "winobias" / "anti_stereotyped_type1.txt.test").unlink()
    with pytest.raises(PromptSetError, match="no counterpart"):
        pairs.winobias(tmp_path / "winobias")


def test_the_embedded_aspects_have_every_kind_and_paired_ids() -> None:
    found = [aspect for aspect in embedded_aspects(6, 0) if isinstance(aspect, Aspect)]
    assert {aspect.kind for aspect in found} == set(Kind)
    for aspect in found:
        ids = [[prompt.id for prompt in suite.prompts] for suite in aspect.suites.values()]
        assert all(each == ids[0] and len(each) == len(set(each)) == 6 for each in ids)


def test_a_measure_that_reads_nothing_is_not_measured() -> None:
    aspect = an_aspect(
        Measure("never", Unit.SHARE, lambda _item: None), Measure("always", Unit.SHARE, lambda _item: True)
    )
    choices = {(arm, "suite", "a"): OptionChoice(arm, "suite", "a", (0.0,), "x", True) for arm in ("baseline", "plan")}
    rows, empty = effects_of("plan", [aspect], Answers({}, choices, "baseline"), 0.1)
    assert [row.measure for row in rows] == ["always"] and [row.aspect for row in empty] == [f"{aspect.label}: never"]
