"""Facts beside a model's weights are honoured or named errors: never the bare base model under another's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from clampdown.errors import ClampdownError, ModelError, translated
from clampdown.models.beside import check_tokens
from clampdown.models.loading import directory_revision, load_model
from tests.models.test_model_loading import save

LORA = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def with_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def with_tensors(directory: Path, more: dict[str, torch.Tensor]) -> None:
    file = directory / "model.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_a_model_is_refused(file: str, checkpoint: Path) -> None:
    (checkpoint / file).write_text(json.dumps(LORA))
    with pytest.raises(ModelError, match=rf"adapter \({file}\)") as caught:
        load_model(checkpoint)
    assert "merge" in (caught.value.hint or "")


def test_a_directory_with_the_adapter_alone_says_that_it_is_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    with pytest.raises(ModelError, match="holds an adapter"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight",
     "model.layers.7.mlp.up_proj.weight", "score.weight", "steering.bias"],
)  # fmt: skip
def test_tensors_that_would_not_be_used_are_refused(name: str, checkpoint: Path) -> None:
    with_tensors(checkpoint, {name: torch.ones(4, 16)})
    with pytest.raises(ModelError, match="would not be used") as caught:
        load_model(checkpoint)
    assert ("merge" in (caught.value.hint or "")) is ("lora" in name)


def test_tables_that_models_compute_anew_are_no_leftovers(checkpoint: Path) -> None:
    with_tensors(checkpoint, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    load_model(checkpoint)


PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}


@pytest.mark.parametrize("method", PACKAGES)
def test_a_quantised_model_without_its_package_names_it(method: str, checkpoint: Path) -> None:
    with_config(checkpoint, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    with pytest.raises(ModelError, match=f"needs the package '{PACKAGES[method]}'"):
        load_model(checkpoint)


@pytest.mark.parametrize("stated", [{"quant_method": "origami"}, {"quant_method": ["gptq"]}, 5, "int3", [4]])
def test_a_quantisation_that_the_library_would_pass_over_is_refused(stated: object, checkpoint: Path) -> None:
    with_config(checkpoint, quantization_config=stated)
    with pytest.raises(ModelError):
        load_model(checkpoint)


def test_a_token_without_a_row_is_an_error_at_load(checkpoint: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<|zzz|>", "<|yyy|>", "<|xxx|>"], special_tokens=True)  # 8 rows for 9 tokens
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match=r"'<\|xxx\|>' of id 8, the model has 8 embeddings"):
        load_model(checkpoint)


def test_a_token_that_stands_for_pictures_needs_no_row(checkpoint: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    check_tokens(tokenizer, 6, "m")


@pytest.mark.parametrize(
    "file", ["vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "additional_chat_templates/tool.jinja"]
)
def test_the_revision_covers_whatever_makes_tokens_of_texts(file: str, checkpoint: Path) -> None:
    before = directory_revision(checkpoint)
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text("a")
    first = directory_revision(checkpoint)
    (checkpoint / file).write_text("b")
    assert len({before, first, directory_revision(checkpoint)}) == 3


BROKEN = {
    "5,000 brackets": "[" * 5000,
    "a list": "[]",
    "a number": "5",
    "text for a size": {"hidden_size": "x"},
    "half a layer": {"num_hidden_layers": 1.5},
    "no heads": {"num_attention_heads": 0},
    "5,000 digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "a list for a name": {"model_type": []},
    "an unknown activation": {"hidden_act": "origami"},
    "ropes of text": {"rope_parameters": "x"},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_whatever_a_library_raises_is_one_typed_error(file: str, change: Any, checkpoint: Path) -> None:
    if isinstance(change, dict) and file != "config.json":
        pytest.skip("fields of another file")
    if isinstance(change, dict):
        with_config(checkpoint, **change)
    else:
        (checkpoint / file).write_text(change)
    with pytest.raises(ClampdownError):
        load_model(checkpoint)


def test_a_cut_file_of_weights_is_a_typed_error(checkpoint: Path) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    for kept in (0, 4, 100, len(weights) // 2):
        (checkpoint / "model.safetensors").write_bytes(weights[:kept])
        with pytest.raises(ModelError):
            load_model(checkpoint)


@pytest.mark.parametrize("raised", [ValueError("no"), RecursionError(), ImportError("x"), AssertionError(), OSError(5)])
def test_a_librarys_exception_stays_the_cause(raised: Exception) -> None:
    with pytest.raises(ModelError, match="it failed") as caught, translated(ModelError, "it failed"):
        raise raised
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError(), ModelError("own")])
def test_an_interrupt_want_of_memory_and_errors_of_ours_pass(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, translated(ModelError, "it failed"):
        raise raised
    assert caught.value is raised


def test_shards_load_as_one_file_and_a_missing_one_is_named(checkpoint: Path, tmp_path: Path) -> None:
    lm = load_model(checkpoint)
    sharded = tmp_path / "sharded"
    shutil.copytree(checkpoint, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    lm.model.save_pretrained(sharded, max_shard_size="2KB")
    ids = torch.tensor([[0, 2, 4]])
    assert torch.equal(load_model(sharded).model(ids).logits, lm.model(ids).logits)
    sorted(sharded.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(ModelError):
        load_model(sharded)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.filterwarnings("ignore")
def test_a_method_that_needs_no_package_gives_the_files_numbers_or_an_error(method: str, checkpoint: Path) -> None:
    ids = torch.tensor([[0, 2, 4]])
    plain = load_model(checkpoint).model(ids).logits
    with_config(checkpoint, quantization_config={"quant_method": method})
    try:
        found = load_model(checkpoint).model(ids).logits
    except ModelError:
        return
    assert torch.allclose(found.float(), plain, atol=0.02), "the library de-quantises into 16 bit"
