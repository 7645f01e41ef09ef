"""Recipes: every file passes its dry run offline, what is wrong is named by its field, and the two pipelines run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clampdown.errors import ClampdownError, PromptSetError, RecipeError, StoreError
from clampdown.results.run import Run
from clampdown.steering.plan import read_plan
from clampdown.study.progress import Stages
from clampdown.study.recipes.dry_run import OK, TO_GIVE, dry_run, n_arms, shown
from clampdown.study.recipes.run import run_recipe
from clampdown.study.recipes.schema import (
    PUBLISHED,
    ContrastRefine,
    Recipe,
    SinglePromptClamp,
    parse_recipe,
    published,
    read_recipe,
)
from clampdown.study.recipes.sources import Source

FILES = sorted(PUBLISHED.glob("*.toml"))
CLAMP, CONTRAST = PUBLISHED / "obrien2024-organism.toml", PUBLISHED / "bhargav2025-organism.toml"


def test_the_recipes_of_the_issue_are_there() -> None:
    names = {
        "obrien2024-phi3",
        "obrien2024-llama31",
        "bhargav2025-llama3",
        "obrien2024-organism",
        "bhargav2025-organism",
    }
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_passes_its_dry_run_offline(path: Path) -> None:
    recipe = read_recipe(path)
    found = dry_run(recipe)
    found.raise_if_wrong()
    assert recipe.name == path.stem
    assert {c.field for c in found.checks if c.state != OK} <= {"sae.id", "multiturn.attacker"}
    assert all(work.n for work in found.work)
    console = Console(file=io.StringIO(), width=80)
    console.print(shown(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in text.splitlines())
    assert recipe.paper in " ".join(text.split())


def test_what_nobody_published_is_to_be_given_and_never_made_up() -> None:
    recipe = read_recipe(PUBLISHED / "obrien2024-phi3.toml")
    assert recipe.sae.id is None
    (check,) = [c for c in dry_run(recipe).checks if c.field == "sae.id"]
    assert check.state == TO_GIVE
    given = read_recipe(PUBLISHED / "obrien2024-phi3.toml", ["sae.id=no/such directory"])
    assert [c.field for c in dry_run(given).wrong] == ["sae.id"]


def test_a_run_with_something_to_give_stops_before_it_loads_anything(tmp_path: Path) -> None:
    recipe = read_recipe(CLAMP)
    open_sae = recipe.model_copy(
        update={"sae": recipe.sae.model_copy(update={"id": None, "to_be_given": "no one has it"})}
    )
    with pytest.raises(RecipeError, match=r"sae\.id is to be given: no one has it"):
        run_recipe(open_sae, tmp_path, Stages(Console(file=io.StringIO())))
    assert not list(tmp_path.iterdir())


MALFORMED = [
    ("model.depth=3", "model.depth"),
    ("schema=2", "schema"),
    ("sae.site=layer 3", "sae.site"),
    ("prompts.test.harmful=organism:harmful[5:2]", "prompts.test"),
    ("prompts.validation={harmful = 'organism:harmful[:4]'}", "benign"),
    ("method.kind=magic", "method"),
    ("method.scope=everywhere", "method.single-prompt-clamp.scope"),
    ("method.operator=explode", "method.single-prompt-clamp.operator"),
    ("method.operator=add_direction", "method.single-prompt-clamp.operator"),
    ("method.value=nan", "not a finite number"),
    ("method.value=5%", "a clamp is a raw value"),
    ("method.value=3max", "what was chosen is measured"),
    ("controls.match=size", "controls.match"),
    ("gate.budget=0", "gate.budget"),
    ("gate.confidence=1.5", "gate.confidence"),
    ("prompts.calibration={}", "prompts.calibration.benign"),
    ("multiturn={objectives = 'harmbench'}", "to_be_given"),
    ("measure.max_new_tokens=inf", "measure.max_new_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "named"), MALFORMED, ids=[setting for setting, _ in MALFORMED])
def test_a_malformed_field_is_named_by_its_path(setting: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(CLAMP, [setting])
    assert named in str(caught.value)
    assert CLAMP.name in str(caught.value)


UNKNOWN = [
    ("model.id=not a model", "model"),
    ("model.type=mamba", "model"),
    ("model.layers=6", "model"),
    ("sae.id=llama-3-8b-it-res-jh:blocks.24.hook_resid_post", "sae.id"),
    ("sae.id=llama_scope_lxr_8x:l4r_8x", "sae.id"),
    ("sae.features=1024", "sae.id"),
    ("sae.site=blocks.5.hook_resid_post", "sae.site"),
    ("judges.verdicts=oracle", "judges.verdicts"),
    ("judges.verdicts=llm:xstest:nobody", "judges.verdicts"),
    ("judges.refusals=rules:5", "judges.refusals"),
    ("prompts.test.harmful=organism:evil[:4]", "prompts.test.harmful"),
    ("prompts.test.harmful=xstest-both", "prompts.test.harmful"),
    ("prompts.test.harmful=xtest", "prompts.test.harmful"),
    ("prompts.test.harmful=gsm8k=missing.jsonl", "prompts.test.harmful"),
    ("prompts.calibration.benign=organism:benign[:100]", "gate.budget"),
    ("multiturn.attacker=ghost", "multiturn.attacker"),
    ("multiturn.attacker=llm:m@http://localhost:1/v1", "multiturn.attacker"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "field"), UNKNOWN, ids=[setting for setting, _ in UNKNOWN])
def test_a_name_that_means_nothing_is_wrong_in_the_dry_run(setting: str, field: str) -> None:
    found = dry_run(read_recipe(CLAMP, [setting]))
    assert field in {check.field for check in found.wrong}
    with pytest.raises(RecipeError, match=field.replace(".", r"\.")):
        found.raise_if_wrong()


def test_prompts_of_two_roles_may_not_overlap() -> None:
    llama = PUBLISHED / "bhargav2025-llama3.toml"
    found = dry_run(read_recipe(llama, ["prompts.test.benign=openhermes[499:700]"]))
    assert [check.field for check in found.wrong] == ["prompts.test.benign"]
    assert not dry_run(read_recipe(llama, ["prompts.test.benign=openhermes[500:1000]"])).wrong


slices = st.builds(
    lambda start, more, step: (start, start + more, step), st.integers(0, 30), st.integers(1, 30), st.integers(1, 5)
)


@given(slices, st.integers(0, 40))
def test_a_slice_reads_what_python_reads(cut: tuple[int, int, int], n: int) -> None:
    start, stop, step = cut
    source = Source.parse(f"gsm8k[{start}:{stop}:{step}]")
    assert list(source.positions(n)) == list(range(n))[start:stop:step]
    assert Source.parse(str(source)) == source


@given(slices, slices)
def test_overlap_is_a_common_row(a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    one, other = (Source("gsm8k", *cut) for cut in (a, b))
    assert one.overlaps(other) == bool({*range(*a)} & {*range(*b)})
    assert not one.overlaps(Source("mmlu", *b))


@pytest.mark.parametrize("text", ["", "gsm8k[1]", "gsm8k[:-1]", "gsm8k[::0]", "gsm8k[3:3]", "[1:2]"])
def test_text_of_another_form_is_no_source(text: str) -> None:
    with pytest.raises(PromptSetError):
        Source.parse(text)


def test_settings_are_toml_or_text() -> None:
    recipe = read_recipe(CLAMP, ["seed=3", "model.id=org/m", "method.clamps=['1max', '2max']"])
    assert (recipe.seed, recipe.model.id) == (3, "org/m")
    assert isinstance(recipe.method, SinglePromptClamp)
    assert recipe.method.clamps == ("1max", "2max")
    for wrong in ("seed", "=3", "seed.x=3"):
        with pytest.raises(RecipeError):
            read_recipe(CLAMP, [wrong])


def test_an_option_is_its_settings_and_is_kept_with_who_says_so() -> None:
    phi = PUBLISHED / "obrien2024-phi3.toml"
    named = ("reported-features", "reported-prompts", "reported-topics")
    recipe = read_recipe(phi, ["sae.id=org/repo:blocks.6.hook_resid_post", "multiturn.limit=7"], named)
    assert isinstance(recipe.method, SinglePromptClamp) and recipe.controls is not None
    assert (recipe.method.feature, recipe.controls.unrelated, recipe.method.clamps) == (22373, 216, ("12",))
    assert recipe.prompts.validation["harmful"] == "wildguardtrain-harmful-plain[:250]"
    assert recipe.multiturn is not None and recipe.multiturn.limit == 7
    assert recipe.chosen == named
    assert all("third parties" in recipe.options[name].source for name in named)
    dry_run(recipe).raise_if_wrong()
    with pytest.raises(RecipeError, match="no option 'magic'"):
        read_recipe(phi, [], ["magic"])
    with pytest.raises(RecipeError, match="raw values"):
        read_recipe(CLAMP, ["method.feature=3"])


@pytest.mark.parametrize("name", ["sae-analist", "sae-nev", "sae-coai"])
def test_public_saes_of_the_paper_s_model_are_options(name: str) -> None:
    recipe = read_recipe(PUBLISHED / "obrien2024-phi3.toml", [], [name])
    dry_run(recipe).raise_if_wrong()
    assert recipe.sae.id is not None and "not seen by us" in recipe.options[name].source


def test_a_file_that_is_none_is_a_typed_error(tmp_path: Path) -> None:
    broken = tmp_path / "r.toml"
    broken.write_text("schema = ")
    for path in (broken, tmp_path / "none.toml", tmp_path):
        with pytest.raises(ClampdownError):
            read_recipe(path)
    with pytest.raises(RecipeError):
        parse_recipe({})


# --- the pipelines, on the embedded model -------------------------------------------------------------------------


SMALLER = (
    "prompts.test={harmful='organism:harmful[:4]', benign='organism:benign[:4]', sums='organism:arithmetic[:3]'}",
    "controls.random=1",
    "controls.texts=3",
    "measure.max_new_tokens=12",
    "measure.kl_prompts=4",
)
"""The recipes are small; a test needs only that every step happens."""


def ran(path: Path, out: Path, *settings: str) -> tuple[Recipe, dict[str, Any], dict[str, Any]]:
    recipe = read_recipe(path, [*SMALLER, *settings])
    run_recipe(recipe, out, Stages(Console(file=io.StringIO())))
    Run.read(out)
    return recipe, *(json.loads((out / name).read_text()) for name in ("summary.json", "pipeline.json"))


def test_the_first_papers_pipeline(tmp_path: Path) -> None:
    recipe, summary, pipeline = ran(CLAMP, tmp_path, "method.candidates=12", "multiturn.limit=2")
    assert isinstance(recipe.method, SinglePromptClamp)
    chosen = read_plan(tmp_path / "ungated.toml").edits[0]
    assert chosen.operator == "clamp"
    assert chosen.scope == "all"
    # Of the finalists, the one that refused most on validation prompts was kept.
    records = [json.loads(line) for line in (tmp_path / "validation" / "records.jsonl").read_text().splitlines()]
    refusals = {f"clamp {f}": 0 for f in pipeline["finalists"]}
    for record in records:
        if record["arm"] in refusals:
            refusals[record["arm"]] += record["verdict"] == "refused"
    assert pipeline["note"] or refusals[f"clamp {chosen.features[0]}"] == max(refusals.values())
    # The test sees that feature at every clamp, in the proportions that the recipe gives.
    arms = {arm["name"]: arm for arm in summary["arms"]}
    curve = [arms[f"clamp {chosen.features[0]} at {text}"]["strength"] for text in recipe.method.clamps]
    multiples = [float(text.removesuffix("max")) for text in recipe.method.clamps]
    assert [s / curve[0] for s in curve] == pytest.approx([m / multiples[0] for m in multiples])
    gated = arms[summary["chosen"]["gated_arm"]]
    assert gated["plan"] == read_plan(tmp_path / "plan.toml").digest
    assert gated["gate_fired"]["benign"]["n"] == gated["suites"]["benign"]["refused"]["n"]
    (gate,) = gated["gates"]
    assert gate["guarantee"]["budget"] == recipe.gate.budget  # type: ignore[union-attr]
    for suite, scores in gate["scores"].items():
        fired = sum(score > gate["threshold"] for score in scores) / len(scores)
        assert fired == pytest.approx(gated["gate_fired"][suite]["value"]), suite
    assert len(arms) <= n_arms(recipe)
    attacks = json.loads((tmp_path / "multiturn" / "summary.json").read_text())
    assert len(attacks["arms"]) == 3
    assert read_recipe(tmp_path / "recipe.toml") == recipe
    # Other settings in the same directory leave the file that says what was measured alone.
    with pytest.raises(StoreError, match="another recipe"):
        run_recipe(recipe.model_copy(update={"seed": 1}), tmp_path, Stages(Console(file=io.StringIO())))
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_named_feature_takes_the_place_of_the_search_and_a_named_control_that_of_the_unrelated_one(
    tmp_path: Path,
) -> None:
    recipe = read_recipe(CLAMP, SMALLER, ["reported-features"])
    run_recipe(
        recipe.model_copy(update={"multiturn": None, "gate": None}), tmp_path, Stages(Console(file=io.StringIO()))
    )
    summary, pipeline = (json.loads((tmp_path / name).read_text()) for name in ("summary.json", "pipeline.json"))
    assert pipeline["finalists"] == [352]
    arms = {arm["name"]: arm for arm in summary["arms"]}
    assert arms["clamp 352 at 60"]["strength"] == 60 and arms["clamp 352 at 120"]["strength"] == 120
    (unrelated,) = [arm for name, arm in arms.items() if name.startswith("unrelated feature")]
    assert unrelated["edits"][0]["features"] == [7]


def test_the_second_papers_pipeline(tmp_path: Path) -> None:
    recipe, summary, pipeline = ran(
        CONTRAST, tmp_path, "method.features=2", "method.rounds=1", "method.multiples=[-1, -0.5, 0.5, 1]"
    )
    assert isinstance(recipe.method, ContrastRefine)
    best = pipeline["refined"]
    assert best["outcome"]["cost"] <= recipe.method.kl_budget
    costed = [row for row in pipeline["tried"] if row["cost"] is not None]
    within = [row for row in costed if row["cost"] <= recipe.method.kl_budget]
    assert best["outcome"]["gain"] >= max(row["gain"] for row in within) - recipe.method.min_gain
    assert within and len(costed) < len(pipeline["tried"])
    signs = {strength > 0 for row in pipeline["tried"] for strength in row["clamps"]["strengths"]}
    assert signs == {True, False}
    arms = {arm["name"]: arm for arm in summary["arms"]}
    up, down = (arms[name]["edits"][0] for name in ("refined", "refined, signs turned"))
    assert up["features"] == best["clamps"]["features"]
    assert down["strengths"] == [-strength for strength in up["strengths"]]
    # The best-scored feature is added at every multiple of its own largest activation.
    features = json.loads((tmp_path / "features" / "contrast.json").read_text())["features"]
    first = features[0]
    assert first["scores"]["composite"] == 1.0
    for multiple in recipe.method.multiples:
        arm = arms[f"best-scored {first['feature']} x{multiple:g}"]
        assert arm["strength"] == pytest.approx(multiple * first["scores"]["max_activation"])
        assert arm["operator"] == "add"
    assert len(arms) <= n_arms(recipe)


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [read_recipe(Path(name)).name for name in published()] == [path.stem for path in FILES]
    (tmp_path / "obrien2024-organism").write_text(CONTRAST.read_text())
    assert read_recipe(Path("obrien2024-organism")).name == CONTRAST.stem, "a file that is there comes first"
    (prompts := tmp_path / "harmful.csv").write_text("prompt\nHello\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"(?s)no study's file.*--harmful FILE"):
        read_recipe(prompts)
    with pytest.raises(RecipeError, match="did you mean obrien2024-phi3"):
        read_recipe(Path("obrien2024-phi"))
    with pytest.raises(RecipeError, match="no recipe at"):
        read_recipe(Path(f"../published/{CLAMP.stem}"))
