"""Control vectors in the programs that they are for: llama.cpp and repeng give the logits and replies that we give.

Neither package is among the project's own: the tests are skipped where they are not installed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from tests.interop.exports.conftest import (
    ORGANISM_DIRECTORY,
    add,
    dense,
    plain_replies,
    random_vector,
    steered_replies,
    written,
)
from tests.models.gguf_files import LAYERS, WIDTH, random_llama, write_gguf

IDS = [0, 5, 9, 33, 70, 44, 21]


def test_repeng_generates_what_the_plan_does(
    tmp_path: Path, lm: LanguageModel, sae: Sae, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 is of the time before numpy 2
    repeng = pytest.importorskip("repeng", reason="repeng is not installed (pip install --no-deps repeng)")
    edits = [add(), dense("add_direction", "blocks.1.hook_resid_post", strength=8.0)]
    plan = Plan.of(lm, [sae], edits, "x", vectors={"v": random_vector(128, 7)})
    vector = repeng.ControlVector.import_gguf(written(lm, plan, "gguf", tmp_path / "v.gguf", sae).path)
    plain = AutoModelForCausalLM.from_pretrained(str(ORGANISM_DIRECTORY), dtype=torch.float32).eval()
    model = repeng.ControlModel(plain, list(vector.directions))
    model.set_control(vector)
    assert plain_replies(model, lm) == steered_replies(lm, plan, sae) != steered_replies(lm, None)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLAMPDOWN_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf", random_llama())


def test_llama_cpp_computes_what_the_plan_does(tmp_path: Path, file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lm = load_model(file)
    plan = Plan.of(lm, [], [dense("add_direction", "blocks.1.hook_resid_post")], "x",
                   vectors={"v": random_vector(WIDTH, 1, 6.0)}, sinks="include")  # fmt: skip
    control = control_buffer(written(lm, plan, "gguf", tmp_path / "v.gguf").path)
    llama = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1)
    low: Any = llama_cpp.llama_cpp
    pointer = control.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert low.llama_set_adapter_cvec(llama.ctx, pointer, control.size, WIDTH, 1, LAYERS - 1) == 0
    llama.eval(IDS)
    with torch.no_grad(), steer(lm, plan):
        ours = lm.model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(torch.tensor(np.array(llama.scores[: len(IDS)])), ours, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(ours, lm.model(torch.tensor([IDS])).logits[0], atol=0.1)
    assert greedy(llama, 12) == reply(lm, plan)


def control_buffer(path: Path) -> np.ndarray:
    """The file's directions as llama.cpp's loader lays them out: one after the other, from block 1."""
    import gguf

    found = np.zeros((LAYERS - 1, WIDTH), dtype=np.float32)
    for tensor in gguf.GGUFReader(path).tensors:
        found[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    return found.reshape(-1)


def greedy(llama: Any, n: int) -> list[int]:
    """Greedy tokens after what was evaluated, up to the end of the turn."""
    found: list[int] = []
    for _ in range(n):
        token = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        if token == 1:
            break
        found.append(token)
        llama.eval([token])
    return found


def reply(lm: LanguageModel, plan: Plan) -> list[int]:
    with steer(lm, plan) as steering:
        return list(generate(lm, [IDS], max_new_tokens=12, on_keep=steering.keep_rows)[0].ids)
