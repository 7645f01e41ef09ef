"""Features by their pages on Neuronpedia, and EasySteer's specification."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from clampdown.errors import ExportError, SteeringFileError
from clampdown.interop.exports.exporting import import_plan
from clampdown.interop.exports.neuronpedia import Page, model_of_page, page_of
from clampdown.models.loading import LanguageModel
from clampdown.saes.catalog import RELEASES, find_release, release_of_page
from clampdown.saes.sae import Sae
from clampdown.steering.plan import ModelRef, Plan, SaeRef
from clampdown.study.plan import lines
from tests.interop.exports.conftest import SITE, add, dense, random_vector, steered_replies, written

PAGE = "https://www.neuronpedia.org/llama3-8b-it/25-res-jh/35831"


@pytest.mark.parametrize(
    "text", [PAGE, PAGE + "?embed=true", PAGE.replace("www.", "") + "/", "llama3-8b-it/25-res-jh/35831"]
)
def test_an_address_is_an_sae_and_a_feature(text: str) -> None:
    assert page_of(text) == Page("llama3-8b-it/25-res-jh", 35831)
    assert release_of_page("llama3-8b-it/25-res-jh") == "llama-3-8b-it-res-jh:blocks.25.hook_resid_post"
    assert model_of_page(text) == "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize("text", ["plan.toml", "https://example.org/llama3-8b-it/25-res-jh/1", "a/b/c", "a/25-x/-1"])
def test_other_text_is_no_page(text: str) -> None:
    assert page_of(text) is None


def test_every_row_with_pages_is_found_by_them() -> None:
    paged = [row for row in RELEASES if row.neuronpedia]
    assert len(paged) > 100
    for row in paged:
        address = row.address(row.example)
        found = release_of_page(address.neuronpedia_id)
        assert found is not None, row.name
        assert find_release(found).neuronpedia_id == address.neuronpedia_id


def test_a_plan_shows_its_features_pages() -> None:
    plan = Plan(
        name="x",
        model=ModelRef(name="meta-llama/Meta-Llama-3-8B-Instruct", revision="r"),
        saes=(SaeRef(site=SITE, name="llama-3-8b-it-res-jh:blocks.25.hook_resid_post", revision="r"),),
        edits=(add((35831,), (4.0,)),),
    )
    assert ("page", PAGE) in list(lines(plan))


@pytest.fixture
def paged(sae: Sae, tmp_path: Path) -> Path:
    """The embedded SAE in a directory of its own that says where its pages would be."""
    from clampdown.config import embedded_sae

    source, target = embedded_sae("organism"), tmp_path / "paged"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "cfg.json").read_text())
    config["metadata"]["neuronpedia_id"] = "organism/3-res-cd"
    (target / "cfg.json").write_text(json.dumps(config))
    return target


def test_a_page_becomes_a_plan_and_the_plan_a_list_of_pages(tmp_path: Path, lm: LanguageModel, paged: Path) -> None:
    plan = import_plan("organism/3-res-cd/352", lm, sae=str(paged), strength="40")
    assert [(e.operator, e.features, e.strengths, e.scope) for e in plan.edits] == [("add", (352,), (40.0,), "all")]
    content = json.loads(written(lm, plan, "neuronpedia", tmp_path / "f.json").path.read_text())
    assert content["features"] == [{"modelId": "organism", "layer": "3-res-cd", "index": 352, "strength": 40.0}]
    assert content["pages"] == ["https://www.neuronpedia.org/organism/3-res-cd/352"]
    assert (content["strength_multiplier"], content["steer_special_tokens"]) == (1, True)
    clamped = import_plan("organism/3-res-cd/352", lm, sae=str(paged), strength="40", operator="clamp", scope="prompt")
    assert (clamped.edits[0].operator, clamped.edits[0].scope) == ("clamp", "prompt")


def test_what_a_page_leaves_open_is_asked_for(lm: LanguageModel, paged: Path) -> None:
    for wanted, message in [
        ({"sae": str(paged)}, "how strongly"),
        ({"strength": "4"}, "no SAE of the catalogue"),
        ({"sae": str(paged), "strength": "4", "source": "organism/4-other/1"}, "pages of SAE"),
    ]:
        source = wanted.pop("source", "organism/3-res-cd/352")
        with pytest.raises(SteeringFileError, match=message):
            import_plan(source, lm, **wanted)
    with pytest.raises(SteeringFileError, match="does not say which model"):
        import_plan("organism/3-res-cd/352", None)


def test_only_published_features_have_pages(tmp_path: Path, lm: LanguageModel, sae: Sae) -> None:
    with pytest.raises(ExportError, match="not known to have pages"):
        written(lm, Plan.of(lm, [sae], [add()], "x"), "neuronpedia", tmp_path / "f.json", sae)


def test_a_specification_says_scopes_and_ablations_and_comes_back(tmp_path: Path, lm, sae: Sae) -> None:
    edits = [add(scope="prompt"), dense("ablate_direction"), dense("add_direction", "blocks.1.hook_resid_post", "w")]
    plan = Plan.of(lm, [sae], edits, "x", vectors={"v": random_vector(128, 1), "w": random_vector(128, 2, 5.0)})
    found = written(lm, plan, "easysteer", tmp_path / "s.json", sae)
    assert not found.left_out
    content = json.loads(found.path.read_text())
    assert content["conflict"] == "sequential"
    said = [(one["algorithm"], one["layers"], one["apply"]) for one in content["vectors"]]
    assert said == [
        ("erase", [3], {"prompt": "all", "generation": "all"}),
        ("direct", [3], {"prompt": "all"}),
        ("direct", [1], {"prompt": "all", "generation": "all"}),
    ]
    back = import_plan(str(found.path), lm)
    assert steered_replies(lm, back) == steered_replies(lm, plan, sae) != steered_replies(lm, None)


def test_a_specification_s_vectors_carry_their_checksum(tmp_path: Path, lm, sae: Sae) -> None:
    plan = Plan.of(lm, [sae], [add((352,), (3.0,))], "x")
    wire = json.loads(written(lm, plan, "easysteer", tmp_path / "s.json", sae).path.read_text())["vectors"][0]["data"]
    raw = base64.b64decode(wire["tensors"]["layer.3"]["data"])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), 3 * sae.W_dec[352].numpy(), rtol=1e-6)
    assert wire["sha256"] == hashlib.sha256(b"direction:1" + b"layer.3" + b"(128,)" + raw).hexdigest()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algorithm": "loreft"}, "no plan can"),
        ({"normalize": True}, "no plan can"),
        ({"apply": {"prompt_positions": [-1]}}, "no plan can"),
        ({"data": None, "source": "x.gguf"}, "does not hold its directions"),
        ({"scale": "big"}, "scale is no number"),
    ],
)
def test_a_specification_that_a_plan_cannot_say_is_refused(tmp_path: Path, lm, sae: Sae, changed, message) -> None:
    path = written(lm, Plan.of(lm, [sae], [add()], "x"), "easysteer", tmp_path / "s.json", sae).path
    content = json.loads(path.read_text())
    content["vectors"][0].update(changed)
    path.write_text(json.dumps(content))
    with pytest.raises(SteeringFileError, match=message):
        import_plan(str(path), lm)
