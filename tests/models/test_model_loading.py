"""Loading from a directory: what comes back, what identifies it, and what each broken checkpoint says."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clampdown.errors import ChatTemplateError, ModelError, PickleCheckpointError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import load_model
from clampdown.types import Message

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def save(directory: Path, *, dtype: torch.dtype = torch.bfloat16, template: str | None = TEMPLATE) -> Path:
    words = ["<bos>", "<eos>", "user", "assistant", "hello", "world"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="hello"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=template
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def test_a_directory_loads_ready_to_generate(checkpoint: Path) -> None:
    lm = load_model(checkpoint)
    assert (lm.d_model, lm.n_layers, lm.layout.family) == (16, 2, "Llama")
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.pad_id == 1, "without a padding token, the end token pads"
    assert lm.eos_ids == {1}
    assert len(generate(lm, [encode(lm, [Message("user", "hello world")])], max_new_tokens=3)) == 1


def test_sixteen_bit_weights_are_computed_in_32_bit_on_cpu(checkpoint: Path) -> None:
    assert load_model(checkpoint, device="cpu").dtype == torch.float32
    assert load_model(checkpoint, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_the_head_is_fed_contiguous_rows(checkpoint: Path) -> None:
    """Otherwise torch copies the head's weights once for every row: a prefill in 16 bit took 8 times as long."""
    lm = load_model(checkpoint)
    fed: list[torch.Tensor] = []
    hook = lm.model.get_output_embeddings().register_forward_hook(lambda _m, args, _o: fed.append(args[0]))
    generate(lm, [[0, 2, 4], [0, 2, 5, 3]], max_new_tokens=2)
    hook.remove()
    assert all(rows.is_contiguous() for rows in fed)
    assert {rows.shape[1] for rows in fed} == {1}


def test_the_revision_names_the_exact_weights_and_template(checkpoint: Path, tmp_path: Path) -> None:
    first = load_model(checkpoint).revision
    copy = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, copy)
    assert load_model(copy).revision == first
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load_model(copy).revision
    assert changed != first
    (copy / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert load_model(copy).revision not in (first, changed)


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_and_never_opened(checkpoint: Path, tmp_path: Path, file: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    (checkpoint / file).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(PickleCheckpointError, match="pickled"):
        load_model(checkpoint)
    assert not mark.exists()
    pickle.loads((checkpoint / file).read_bytes())
    assert mark.exists(), "the file does execute code when unpickled"


def test_a_missing_directory_is_named() -> None:
    with pytest.raises(ModelError, match="/no/such/model"):
        load_model("/no/such/model")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a model", "a/b/c"])
def test_a_name_that_cannot_be_fetched_is_a_readable_error(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "no .safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"not tensors"), "cannot be loaded"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "tokenizer"),
    ],
    ids=["no config", "broken config", "no weights", "broken weights", "broken tokenizer", "no tokenizer"],
)
def test_broken_checkpoints_are_readable_errors(checkpoint: Path, damage: object, says: str) -> None:
    damage(checkpoint)  # type: ignore[operator]
    with pytest.raises(ModelError, match=says):
        load_model(checkpoint)


def test_missing_tensors_are_not_filled_with_random_numbers(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        load_model(checkpoint)


def test_weights_of_another_shape_are_an_error(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 20}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(checkpoint)


def test_an_encoder_is_not_a_decoder(checkpoint: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_model(checkpoint)


def test_a_model_without_chat_template_loads_but_cannot_chat(tmp_path: Path) -> None:
    lm = load_model(save(tmp_path / "base", template=None))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encode(lm, [Message("user", "hello")])
    with pytest.raises(ChatTemplateError):
        _ = lm.chat


@pytest.mark.parametrize(("device", "dtype"), [("warp", "auto"), ("cpu", "float99"), ("cpu", "nn")])
def test_unknown_devices_and_dtypes_are_named(checkpoint: Path, device: str, dtype: str) -> None:
    with pytest.raises(ModelError, match=r"warp|float99|nn"):
        load_model(checkpoint, device=device, dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_a_device_that_this_machine_lacks_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="'cuda' cannot be used here"):
        load_model("organism", device="cuda")
