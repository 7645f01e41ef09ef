"""A GGUF file loads as the model that it was written from, once de-quantised, and says what it is."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from clampdown.errors import ModelError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.gguf import directory_of
from clampdown.models.loading import load_model
from clampdown.types import Message
from tests.models.gguf_files import CHAT, random_llama, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLAMPDOWN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def test_a_file_of_full_precision_gives_the_logits_of_its_model(tmp_path: Path) -> None:
    model = random_llama()
    lm = load_model(write_gguf(tmp_path / "tiny.gguf", model))
    ids = torch.tensor([[0, 5, 9, 33, 70, 1]])
    torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert lm.tokenizer.chat_template == CHAT
    assert lm.eos_ids == {1}
    assert lm.tokenizer("hello", add_special_tokens=False).input_ids == [
        lm.tokenizer.convert_tokens_to_ids(token) for token in ("hel", "l", "o")
    ]
    assert len(generate(lm, [encode(lm, [Message("user", "hello")])], max_new_tokens=3)) == 1


def test_quantised_weights_are_those_that_the_format_defines(tmp_path: Path) -> None:
    model = random_llama()
    lm = load_model(write_gguf(tmp_path / "tiny.gguf", model, Kind.Q8_0))
    stated = model.state_dict()["model.layers.1.mlp.down_proj.weight"].numpy()
    defined = torch.from_numpy(gguf.dequantize(gguf.quantize(stated, Kind.Q8_0), Kind.Q8_0).astype(np.float32))
    loaded = lm.model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(loaded, defined.bfloat16().float(), atol=0, rtol=0)
    assert float((loaded - torch.from_numpy(stated)).abs().max()) > 0, "quantised, it is another model"


def test_sixteen_bits_stay_sixteen_bits_on_disk_and_any_dtype_loads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_llama(), Kind.F16)
    directory, _ = directory_of(path)
    assert load_file(directory / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float16
    assert load_model(path).dtype == torch.float32
    assert load_model(path, dtype="bfloat16").dtype == torch.bfloat16


def test_a_file_is_de_quantised_once_and_named_by_its_content(tmp_path: Path, cache: Path) -> None:
    first = write_gguf(tmp_path / "tiny.gguf", random_llama())
    directory, sha256 = directory_of(first)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "elsewhere.gguf"
    copy.write_bytes(first.read_bytes())
    assert directory_of(copy) == (directory, sha256)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    revision = load_model(first).revision
    assert sha256[:16] in revision
    assert load_model(write_gguf(tmp_path / "other.gguf", random_llama(1))).revision != revision
    assert sorted(path.name for path in (cache / "gguf").iterdir()) == sorted(
        [sha256, directory_of(tmp_path / "other.gguf")[1]]
    ), "nothing half made is left behind"


def test_positions_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="stretches its positions"):
        load_model(write_gguf(tmp_path / "tiny.gguf", random_llama(), stretched=True))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_file_that_is_no_gguf_is_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model("/no/such/model.gguf")
