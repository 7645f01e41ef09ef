"""A model that is spread over places answers as one that lies in one, and what a placing needs is asked for first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass, read_sae
from clampdown.errors import MissingPackageError, ModelError
from clampdown.models.chat import encode
from clampdown.models.fingerprint import weights_fingerprint
from clampdown.models.generation import generate
from clampdown.models.layout import HookPoint
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.memory import devices_of
from clampdown.models.placing import Placing, home_of, input_device
from clampdown.organism.suites import one_suite
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import check_plan
from clampdown.types import Split

PROMPTS = one_suite("harmful", Split.TEST, 6).prompts


@pytest.fixture(scope="module")
def whole() -> LanguageModel:
    return load_model("organism")


@pytest.fixture(scope="module")
def spread(whole: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The embedded model with two of its blocks left on disk, the steered one among them."""
    directory = tmp_path_factory.mktemp("spread")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = {name: "cpu" for name in names}
    places |= {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(whole.n_layers)}
    (directory / "map.json").write_text(json.dumps(places))
    placing = Placing(device_map=str(directory / "map.json"), offload=str(directory / "offload"))
    return load_model("organism", placing=placing)


def test_weights_on_disk_are_the_same_model(whole: LanguageModel, spread: LanguageModel) -> None:
    assert any(parameter.device.type == "meta" for parameter in spread.model.parameters()), "something is on disk"
    assert (spread.device, spread.dtype, spread.revision) == (whole.device, whole.dtype, whole.revision)
    assert weights_fingerprint(spread.model) == weights_fingerprint(whole.model)
    assert (home_of(whole.model), home_of(spread.model)) == (None, torch.device("cpu"))
    assert devices_of(spread) == {torch.device("cpu")}


def test_a_spread_model_is_read_and_steered_like_a_whole_one(whole: LanguageModel, spread: LanguageModel) -> None:
    sae = load_sae("organism")
    edit = Edit(site=sae.cfg.site.name, operator="clamp", features=(352,), strengths=(6.0,))
    plan = Plan.of(whole, [sae], [edit], "clamped")
    said, read = [], []
    for lm in (whole, spread):
        check_plan(plan, lm, {sae.cfg.site.name: sae})
        ids = [encode(lm, prompt.messages) for prompt in PROMPTS]
        plans = [None if i % 2 else plan for i in range(len(ids))]
        with steer(lm, plans, sae) as steering:
            said.append([reply.text for reply in generate(lm, ids, max_new_tokens=10, on_keep=steering.keep_rows)])
            assert [bool(r and r.tokens_touched) for r in steering.receipts()] == [one is not None for one in plans]
        read.append(collect(plan_pass(lm, [read_sae(sae)], PROMPTS)))
    assert said[0] == said[1]
    for pooling in ("max", "assistant_start"):
        assert (read[0].matrix(pooling) != read[1].matrix(pooling)).nnz == 0


def test_a_site_is_brought_home_and_taken_back() -> None:
    """Two accelerators that are not there: the tensors know their device, and nothing may mix them."""
    with FakeTensorMode():
        here, there = torch.device("cuda:0"), torch.device("cuda:1")
        block = nn.Identity()
        own = torch.ones(4, device=here)
        seen: list[torch.device] = []

        def edit(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(hidden.device)
            return hidden + own

        for before in (True, False):
            handle = HookPoint(block, before, here).register(edit)
            assert block(torch.ones(1, 2, 4, device=there)).device == there
            handle.remove()
        assert seen == [here, here]


@pytest.mark.parametrize(
    ("placing", "message"),
    [
        (Placing(device="cpu", device_map="auto"), "says it again"),
        (Placing(offload="x"), "device map"),
        (Placing(quantise="3bit"), "not a quantisation"),
        (Placing(device_map="everywhere"), "not a device map"),
        (Placing(device_map="nothing.json"), "nothing.json"),
        (Placing(device="abacus"), "not a device"),
        (Placing(dtype="float3"), "not a dtype"),
    ],
)
def test_placings_that_are_none(placing: Placing, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model("organism", placing=placing)


@pytest.mark.parametrize("text", ["{}", '{"model": true}', '{"model": [1]}', "[]"])
def test_maps_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(ModelError):
        load_model("organism", placing=Placing(device_map=str(tmp_path / "map.json")))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingPackageError, match="bitsandbytes"):
        load_model("organism", placing=Placing(quantise="4bit"))


def test_a_quantised_model_is_another_revision(whole: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Placing(quantise="4bit").marked("abc") == "abc+4bit"
    assert Placing().marked("abc") == "abc"


def test_what_was_not_spread_is_where_it_was(whole: LanguageModel) -> None:
    assert input_device(whole.model) == whole.model.device and whole.layout.home is None
