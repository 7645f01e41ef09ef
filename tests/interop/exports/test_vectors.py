"""Control vectors and `.svec` files: read back by the package of the format, and as the plan they came from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clampdown.errors import ExportError, SteeringFileError
from clampdown.interop.exports.exporting import import_plan
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan
from tests.interop.exports.conftest import SITE, add, dense, random_vector, steered_replies, written


@pytest.fixture
def plan(lm: LanguageModel, sae: Sae) -> Plan:
    """Features and a vector at one site, another vector below: what a control vector can say."""
    edits = [add(), dense("add_direction", strength=2.0), dense("add_direction", "blocks.2.hook_resid_pre", "w")]
    vectors = {"v": random_vector(128, 1), "w": random_vector(128, 2, 3.0)}
    return Plan.of(lm, [sae], edits, "both ways", vectors=vectors)


def summed(plan: Plan, sae: Sae) -> np.ndarray:
    """What the plan adds at its SAE's site, by hand."""
    directions = sae.W_dec[[352, 7]].numpy()
    return 40 * directions[0] - 15 * directions[1] + 2 * np.array(plan.vectors["v"], dtype=np.float32)


@pytest.mark.parametrize("form", ["gguf", "svec", "lm-eval"])
def test_an_exact_export_comes_back_as_a_plan_with_the_same_replies(
    tmp_path: Path, lm: LanguageModel, sae: Sae, plan: Plan, form: str
) -> None:
    suffix = {"gguf": "gguf", "svec": "svec", "lm-eval": "pt"}[form]
    found = written(lm, plan, form, tmp_path / f"v.{suffix}", sae)
    assert not found.left_out and json.loads(found.sidecar.read_text())["exact"]
    back = import_plan(str(found.path), lm)
    assert not back.saes
    assert steered_replies(lm, back) == steered_replies(lm, plan, sae) != steered_replies(lm, None)


def test_the_gguf_package_reads_the_sum_of_what_is_added(tmp_path: Path, lm, sae: Sae, plan: Plan) -> None:
    import gguf

    reader = gguf.GGUFReader(written(lm, plan, "gguf", tmp_path / "v.gguf", sae).path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: (t.tensor_type.name, len(t.shape)) for name, t in tensors.items()} == {
        "direction.1": ("F32", 1),
        "direction.3": ("F32", 1),
    }
    np.testing.assert_allclose(tensors["direction.3"].data, summed(plan, sae), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tensors["direction.1"].data, plan.vectors["w"], rtol=1e-6)


def test_cast_s_file_counts_layers_by_their_input(tmp_path: Path, lm, sae: Sae, plan: Plan) -> None:
    content = json.loads(written(lm, plan, "svec", tmp_path / "v.svec", sae).path.read_text())
    assert set(content) == {"model_type", "directions", "explained_variances"}
    assert set(content["directions"]) == set(content["explained_variances"]) == {"2", "4"}
    np.testing.assert_allclose(content["directions"]["4"], summed(plan, sae), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "site", "reason"),
    [
        ("gguf", "blocks.0.hook_resid_post", "begin at block 1"),
        ("gguf", "blocks.0.hook_resid_pre", "output of a block"),
        ("gguf", "blocks.2.hook_mlp_out", "output of a block"),
        ("svec", "blocks.4.hook_resid_post", "no block follows"),
        ("svec", "blocks.2.hook_attn_out", "input of a block"),
        ("lm-eval", "blocks.0.hook_resid_pre", "no block's output"),
    ],
)
def test_a_place_that_a_format_does_not_have_is_refused_lossy_or_not(
    tmp_path: Path, lm: LanguageModel, form: str, site: str, reason: str
) -> None:
    from clampdown.interop.exports.exporting import Lossy

    plan = Plan.of(lm, [], [dense("add_direction", site)], "x", vectors={"v": random_vector(128)})
    for lossy in (None, Lossy()):
        with pytest.raises(ExportError, match=reason):
            written(lm, plan, form, tmp_path / "v", lossy=lossy)
    assert not list(tmp_path.iterdir())


def test_vectors_that_fit_no_model_or_are_no_vectors_are_refused(tmp_path: Path, lm: LanguageModel) -> None:
    import gguf

    def control(name: str, tensor: np.ndarray, arch: str = "controlvector") -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    ones = np.ones(128, dtype=np.float32)
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "a.svec").write_text('{"directions": {"x": [1.0]}}')
    (tmp_path / "b.svec").write_text('{"directions": {"1": [1.0, true]}}')
    (tmp_path / "c.svec").write_text('{"directions": {"1": [1.0]}}')
    (tmp_path / "e.svec").write_text('{"directions": {"1": [1' + "0" * 400 + "]}}")
    (tmp_path / "d.svec").write_text("[]")
    for source, message in {
        control("direction.2", ones, "llama"): "is no control vector",
        control("direction.x", ones): "is not a direction",
        control("direction.2", ones.astype(np.float16)): "is not a direction",
        control("direction.2", np.ones((2, 64), dtype=np.float32)): "is not a direction",
        control("direction.2", ones[:64]): "64 numbers",
        control("direction.9", ones): "the model has 5 blocks",
        control("direction.2", ones * np.nan): "not finite",
        str(tmp_path / "junk.gguf"): "not a GGUF file|is no control vector",
        str(tmp_path / "no.gguf"): "no such file",
        str(tmp_path / "a.svec"): "not the number of a layer",
        str(tmp_path / "b.svec"): "not a list of numbers",
        str(tmp_path / "c.svec"): "1 numbers",
        str(tmp_path / "d.svec"): "JSON object",
        str(tmp_path / "e.svec"): "cannot be read as svec",
        str(tmp_path / "what.bin"): "no format",
    }.items():
        with pytest.raises(SteeringFileError, match=message):
            import_plan(source, lm)


def test_a_factor_multiplies_vectors(tmp_path: Path, lm: LanguageModel, sae: Sae) -> None:
    half = Plan.of(lm, [sae], [add(strengths=(20.0, -7.5))], "half")
    path = written(lm, half, "gguf", tmp_path / "v.gguf", sae).path
    whole = Plan.of(lm, [sae], [add()], "whole")
    back = import_plan(str(path), lm, strength="2", scope="prompt")
    assert {(edit.site, edit.scope, edit.strengths) for edit in back.edits} == {(SITE, "prompt", (2.0,))}
    assert back.sinks == "include"
    everywhere = import_plan(str(path), lm, strength="2")
    assert steered_replies(lm, everywhere) == steered_replies(lm, whole, sae)
    torch.testing.assert_close(torch.tensor(back.vectors[SITE]) * 2, torch.tensor(summed_half(sae)) * 2)


def summed_half(sae: Sae) -> list[float]:
    return (20 * sae.W_dec[352] - 7.5 * sae.W_dec[7]).tolist()


def test_from_python(tmp_path: Path, lm: LanguageModel, sae: Sae) -> None:
    import clampdown as cd

    plan = Plan.of(lm, [sae], [add()], "x")
    found = cd.export(plan, "gguf", tmp_path / "v.gguf", lm=lm)
    assert not found.left_out
    back = cd.import_plan(found.path, lm, strength=0.5)
    assert [edit.strengths for edit in back.edits] == [(0.5,)]
