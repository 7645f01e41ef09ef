"""lm-evaluation-harness's model `steered`, by its own loader and loop, against ours, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clampdown.errors import ExportError, SteeringFileError
from clampdown.interop.exports.exporting import import_plan
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan
from tests.interop.exports.conftest import (
    ORGANISM_DIRECTORY,
    SITE,
    add,
    dense,
    prompt_ids,
    random_vector,
    steered_replies,
    written,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]


def harness_replies(path: Path, lm: LanguageModel, tokens: int = 24) -> list[tuple[int, ...]]:
    """What the harness's own steered model generates, from its own files."""
    from lm_eval.models.hf_steered import SteeredModel

    model = SteeredModel(str(ORGANISM_DIRECTORY), str(path), device="cpu", dtype="float32")
    found = []
    for ids in prompt_ids(lm):
        context = torch.tensor([ids])
        output: Any = model._model_generate(context, max_length=len(ids) + tokens, stop=["<none>"])
        reply = []
        for token in output[0, len(ids) :].tolist():
            if token in lm.eos_ids:
                break
            reply.append(token)
        found.append(tuple(reply))
    return found


ORTHOGONAL = {"v": random_vector(128, 3), "w": random_vector(128, 4, 25.0)}


@pytest.mark.parametrize("kind", ["features and a vector", "ablation", "projection set", "inside blocks"])
def test_the_harness_generates_what_the_plan_does(tmp_path: Path, lm: LanguageModel, sae: Sae, kind: str) -> None:
    edits = {
        "features and a vector": [add(), dense("add_direction", vector="w")],
        "ablation": [dense("ablate_direction")],
        "projection set": [dense("ablate_direction"), dense("add_direction", strength=30.0)],
        "inside blocks": [dense("add_direction", "blocks.1.hook_attn_out", "w"),
                          dense("ablate_direction", "blocks.2.hook_mlp_out")],
    }[kind]  # fmt: skip
    plan = Plan.of(lm, [sae], edits, kind, vectors=ORTHOGONAL)
    path = written(lm, plan, "lm-eval", tmp_path / "v.pt", sae).path
    torch.load(path, weights_only=True)
    expected = steered_replies(lm, plan, sae)
    assert harness_replies(path, lm) == expected
    assert steered_replies(lm, import_plan(str(path), lm)) == expected
    if kind != "ablation":  # of a random direction: it need not change any reply
        assert expected != steered_replies(lm, None)


@pytest.mark.parametrize(
    "edits",
    [
        [dense("ablate_direction", strength=0.5)],
        [dense("ablate_direction"), dense("ablate_direction", vector="w")],
        [dense("ablate_direction"), dense("add_direction", vector="w")],
    ],
    ids=["half", "two", "aslant"],
)
def test_what_one_hookpoint_cannot_do_is_refused(tmp_path: Path, lm: LanguageModel, edits: list) -> None:
    plan = Plan.of(lm, [], edits, "x", vectors=ORTHOGONAL)
    with pytest.raises(ExportError, match="one thing at a hookpoint"):
        written(lm, plan, "lm-eval", tmp_path / "v.pt")


def test_a_clamp_of_the_harness_s_is_an_ablation_and_an_addition(tmp_path: Path, lm: LanguageModel) -> None:
    vector, bias = torch.tensor(random_vector(128, 5, 4.0)), torch.tensor(random_vector(128, 6, 9.0))
    entry = {
        "steering_vector": vector,
        "steering_coefficient": 20.0,
        "action": "clamp",
        "bias": bias,
        "head_index": None,
    }
    torch.save({"layers.3": entry}, tmp_path / "c.pt")
    plan = import_plan(str(tmp_path / "c.pt"), lm)
    assert [edit.operator for edit in plan.edits] == ["ablate_direction", "add_direction"]
    assert steered_replies(lm, plan) == harness_replies(tmp_path / "c.pt", lm) != steered_replies(lm, None)


class Bomb:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("exploded"),))  # type: ignore[return-value]


def test_a_file_that_is_more_than_vectors_is_refused_and_not_run(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"steering_vector": torch.ones(128), "steering_coefficient": 1.0, "action": "add"}
    for content, message in [
        ({"layers.3": {**good, "x": Bomb()}}, "would run code"),
        ({"layers.77": good}, "no place"),
        ({"layers.3": {**good, "head_index": 1}}, "attention head"),
        ({"layers.3": {**good, "action": "explode"}}, "action 'explode'"),
        ({"layers.3": {**good, "steering_vector": torch.ones(64)}}, "64 numbers"),
        ({"layers.3": {**good, "action": "clamp", "steering_vector": torch.zeros(128)}}, "length 0"),
        ([1], "not a dictionary"),
    ]:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(SteeringFileError, match=message):
            import_plan("x.pt", lm)
    assert not Path("exploded").exists()


@pytest.fixture(scope="module")
def sparsify_directory(tmp_path_factory: pytest.TempPathFactory, sae: Sae) -> Path:
    """A random SAE in sparsify's own files, named by its hookpoint."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sparsify") / "layers.3"
    SparseCoder(128, SparseCoderConfig(num_latents=64, k=8), device="cpu").save_to_disk(path)
    return path


def test_feature_rows_name_the_vector_that_the_harness_derives(
    tmp_path: Path, lm: LanguageModel, sparsify_directory: Path
) -> None:
    from lm_eval.models.hf_steered import SteeredModel

    from clampdown.saes.checkpoints import load_sae
    from clampdown.types import Site

    loaded = load_sae(sparsify_directory, site=Site.parse(SITE))
    plan = Plan.of(lm, [loaded], [add((5,), (80.0,))], "feature 5")
    path = written(lm, plan, "lm-eval-csv", tmp_path / "f.csv", loaded).path
    derived = SteeredModel.derive_steer_config(str(path))["layers.3"]
    assert (derived["action"], derived["steering_coefficient"]) == ("add", 80.0)
    torch.testing.assert_close(derived["steering_vector"].detach(), loaded.W_dec[5])
    back = import_plan(str(path), lm)
    assert [(e.operator, e.features, e.strengths) for e in back.edits] == [("add", (5,), (80.0,))]
    assert steered_replies(lm, back) == steered_replies(lm, plan, loaded)


def test_a_clamped_row_acts_as_in_the_harness(tmp_path: Path, lm: LanguageModel, sparsify_directory: Path) -> None:
    rows = f"loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n\
sparsify,clamp,{sparsify_directory.parent},layers.3,9,25.0,,,,\n"
    (tmp_path / "c.csv").write_text(rows)
    plan = import_plan(str(tmp_path / "c.csv"), lm)
    assert steered_replies(lm, plan) == harness_replies(tmp_path / "c.csv", lm) != steered_replies(lm, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("sparsify,add,X,layers.3,five,1.0,,,,", "line 2: 'five'"),
        ("sparsify,add,X,layers.3,5,loud,,,,", "line 2: 'loud'"),
        ("magic,add,X,layers.3,5,1.0,,,,", "line 2: loader 'magic'"),
        ("sparsify,add,X,layers.3,5,1.0,2,,,", "line 2: one attention head"),
        ("sparsify,grow,X,layers.3,5,1.0,,,,", "line 2: action 'grow'"),
        ("sparsify,add,X,layers.3,5,1.0,,,,\nsparsify,add,X,layers.3,6,1.0,,,,", "line 3: the harness would keep"),
        ("", "holds no rows"),
    ],
)
def test_mistakes_in_feature_rows_name_their_line(
    tmp_path: Path, lm: LanguageModel, sparsify_directory: Path, row: str, message: str
) -> None:
    header = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n"
    (tmp_path / "f.csv").write_text(header + row.replace("X", str(sparsify_directory.parent)))
    with pytest.raises(SteeringFileError, match=message):
        import_plan(str(tmp_path / "f.csv"), lm)


def test_features_that_the_harness_cannot_find_or_would_lose_are_refused(tmp_path: Path, lm, sae: Sae) -> None:
    for edit, message in [(add((352,), (1.0,)), "the harness finds SAEs"), (add(), "keeps the last row")]:
        with pytest.raises(ExportError, match=message):
            written(lm, Plan.of(lm, [sae], [edit], "x"), "lm-eval-csv", tmp_path / "f.csv", sae)
