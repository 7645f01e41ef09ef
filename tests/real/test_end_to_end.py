"""The whole way on a real model, two prompts each: GGUF, SAE, discover, plan, gate, evaluate, serve.

What is checked is that every stage runs on a real tokenizer, template, sinks and width, and hands on what the next one
needs. Nothing is claimed about this model: it refuses almost nothing, and its SAE here is trained for a few seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clampdown.cli import main as cli
from clampdown.commands.serve import Options
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.plan import read_plan
from clampdown.types import Split
from tests.serving.live import running

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

SITE = "blocks.15.hook_resid_post"
QUESTIONS = (
    "What is the capital of {}?",
    "Name a river in {}.",
    "Which language do people speak in {}?",
    "What do people in {} like to eat?",
)
PLACES = ("France", "Japan", "Peru", "Kenya", "Norway", "Egypt", "Canada", "India")


def run(*args: object) -> None:
    """A command that must succeed."""
    before, sys.argv = sys.argv, ["clampdown", *map(str, args)]
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        sys.argv = before
    assert not stopped.value.code, args


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt files: requests of the embedded corpus (abstract ones) against plain questions."""
    place = tmp_path_factory.mktemp("real")
    plain = [question.format(name) for question in QUESTIONS for name in PLACES]
    asked = next(suite for suite in suites(Split.DISCOVERY, 32) if suite.name == "harmful").prompts
    harmful = [{"id": f"h{i}", "prompt": prompt.text} for i, prompt in enumerate(asked)]
    benign = [{"id": f"b{i}", "prompt": text} for i, text in enumerate(plain)]
    splits = ("discovery", "validation", "calibration", "test")
    for name, rows in (("harmful", harmful), ("benign", benign)):
        write(place / f"{name}.jsonl", [{**row, "split": splits[i % 4]} for i, row in enumerate(rows[:8])])
    write(place / "text.jsonl", [{"prompt": row["prompt"], "reply": "I am not sure."} for row in (*harmful, *benign)])
    labelled = [
        {**row, "suite": name, "harmful": name == "harmful", "split": splits[i % 4]}
        for name, rows in (("harmful", harmful), ("benign", benign))
        for i, row in enumerate(rows[:32])
    ]
    write(place / "gate.jsonl", labelled)
    test = [{**row, "suite": "asked", "harmful": False, "split": "test"} for row in benign[:2]]
    write(place / "test.jsonl", test)
    return place


@pytest.fixture(scope="module")
def sae(real_model: str, place: Path) -> Path:
    options = ("--features", 256, "--k", 16, "--epochs", 6, "--batch", 128)
    run("sae", "train", "--model", real_model, "--site", SITE, "--text", place / "text.jsonl", "--out", place / "sae",
        *options)  # fmt: skip
    return place / "sae"


@pytest.fixture(scope="module")
def plan(real_model: str, place: Path, sae: Path) -> Path:
    files = ("--harmful", place / "harmful.jsonl", "--harmless", place / "benign.jsonl")
    run("discover", "--model", real_model, "--sae", sae, *files, "--finder", "contrast", "--no-check", "--top", 4,
        "--out", place / "features")  # fmt: skip
    (found,) = (place / "features").glob("contrast*.json")
    feature = json.loads(found.read_text())["features"][0]["feature"]
    run("plan", "make", "--model", real_model, "--sae", sae, "--feature", feature, "--strength", 40, "--scope",
        "last_user", "--prompts", place / "benign.jsonl", "--out", place / "plan.toml")  # fmt: skip
    return place / "plan.toml"


@pytest.fixture(scope="module")
def lm(real_model: str) -> LanguageModel:
    return load_model(real_model)


def test_the_model_is_the_one_of_its_packages(lm: LanguageModel) -> None:
    assert (lm.d_model, lm.n_layers, lm.layout.family) == (576, 30, "Llama")
    assert lm.revision.startswith("gguf-b179c9523d0e6a0f")
    ids = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert lm.tokenizer.decode(int(lm.model(ids).logits[0, -1].argmax())).strip() == "Paris"


def test_an_sae_is_trained_and_its_sinks_are_left_out(sae: Path) -> None:
    card = json.loads((sae / "card.json").read_text())
    assert card["residuals"]["dropped"]["sinks"] >= 64, "a first position per text at least"
    assert 0 < card["fit"]["fvu"] < 1
    assert load_sae(sae).cfg.d_in == 576


def test_a_found_feature_becomes_a_plan_that_acts(real_model: str, plan: Path) -> None:
    run("check", plan)
    assert read_plan(plan).edits[0].features


def test_a_gated_plan_is_calibrated_and_evaluated(real_model: str, place: Path, plan: Path) -> None:
    gated = place / "gated.toml"
    run("gate", "calibrate", plan, "--kind", "dense", "--budget", 0.5, "--confidence", 0.8, "--turns", 1, "--prompts",
        place / "gate.jsonl", "--out", gated)  # fmt: skip
    run("evaluate", gated, "--suites", place / "test.jsonl", "--max-new-tokens", 8, "--out", place / "run")
    records = [json.loads(line) for line in (place / "run" / "records.jsonl").read_text().splitlines()]
    assert {record["arm"] for record in records} >= {"baseline"}
    assert len(records) == 2 * len({record["arm"] for record in records})
    assert all(record["reply"] for record in records)


def test_the_plan_is_served_beside_the_model(real_model: str, plan: Path, tmp_path: Path) -> None:
    with running(tmp_path, Options(model=real_model, plans=(plan,), inline=None)) as server:
        models = [row["id"] for row in server.get("/v1/models").json()["data"]]
        assert len(models) == 2
        for name in models:
            answer = server.chat("What is the capital of France?", name, max_tokens=8, temperature=0)
            assert answer["choices"][0]["message"]["content"]
