"""Published SAEs by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from clampdown.errors import CheckpointError
from clampdown.saes.catalog import RELEASES, Address, find_release, why_not
from clampdown.saes.checkpoints import load_sae


def test_the_papers_sae_has_an_address_and_pages() -> None:
    assert find_release("llama-3-8b-it-res-jh:blocks.25.hook_resid_post") == Address(
        "Juliushanhanhan/llama-3-8b-it-res",
        "blocks.25.hook_resid_post",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama3-8b-it/25-res-jh",
    )


def test_every_rows_example_resolves() -> None:
    for row in RELEASES:
        address = find_release(f"{row.name}:{row.example}")
        assert address is not None
        assert (address.repo, address.model) == (row.repo, row.model)
        assert "\\" not in address.path


def test_any_hub_repository_can_be_given() -> None:
    assert find_release("EleutherAI/sae-llama-3-8b-32x:layers.25") == Address(
        "EleutherAI/sae-llama-3-8b-32x", "layers.25"
    )


@pytest.mark.parametrize("name", ["no-colon", "release:", "/a/directory"])
def test_other_text_is_no_release(name: str) -> None:
    assert find_release(name) is None


def test_an_unknown_id_says_what_ids_look_like() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_release("llama_scope_lxr_8x:layer 5")
    assert "l15r_8x" in str(caught.value)


def test_an_unknown_release_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_release("no-such-release:id")
    assert "llama-3-8b-it-res-jh" in str(caught.value)


@pytest.mark.parametrize("name", ["llama-3-8b-it-res-jh:blocks.25.hook_resid_post", "nobody/nothing:x"])
def test_without_network_a_release_is_a_readable_error(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot get SAE") as caught:
        load_sae(name)
    assert caught.value.hint


def saelens_list() -> dict[str, Any]:
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SAELens is not installed")
    import yaml

    text = (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text()
    return yaml.load(text, Loader=yaml.CSafeLoader)


FOLLOWED = ("gemma-scope-", "qwen-scope-", "llama_scope_lx", "goodfire-", "llama-3")


def test_the_table_has_every_release_of_the_families_that_it_follows() -> None:
    """A release that SAELens adds is a row here, or it is said why not."""
    own = {row.name for row in RELEASES}
    followed = [name for name in saelens_list() if name.startswith(FOLLOWED)]
    assert len(followed) > 80
    assert not [name for name in followed if name not in own and why_not(name) is None]
    assert not [name for name in own if why_not(name)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-scope-2-1b-it-att:layer_7_width_16k_l0_small", "hook_z"),
        ("gemma-scope-2-4b-pt-transcoders-all:layer_7_width_16k_l0_small", "transcoders"),
        ("mwhanna-qwen3-4b-transcoders:layer_3", "transcoders"),
    ],
)
def test_a_release_that_cannot_steer_says_why(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_sae(name)


def test_the_table_agrees_with_saelens_list() -> None:
    """Every id that SAELens lists for our releases resolves to its repository, path and page."""
    listed = saelens_list()
    checked = 0
    for name in {row.name for row in RELEASES}:
        assert name in listed, name
        for entry in listed[name]["saes"]:
            if entry["path"].startswith("embedding"):
                continue  # reads the token embedding, which is no site
            address = find_release(f"{name}:{entry['id']}")
            assert address is not None
            assert (address.repo, address.path) == (listed[name]["repo_id"], entry["path"])
            if address.neuronpedia_id and entry.get("neuronpedia"):
                assert address.neuronpedia_id == entry["neuronpedia"]
            checked += 1
        overrides = set(listed[name].get("config_overrides") or {})
        assert not overrides & {"normalize_activations", "architecture", "hook_name"}, name
    assert checked > 1000
