"""`clampdown discover --dry-run`: what it would take, for Llama-3-8B's shape without one of its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clampdown.cli import main as cli
from clampdown.config import ORGANISM_WEIGHTS
from tests.saes.test_serving import huge_sae

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def shape_of_llama(root: Path) -> Path:
    """A directory with a config and a tokenizer, and no weights."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(LLAMA_3_8B))
    for path in (ORGANISM_WEIGHTS / "model").iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (root / path.name).write_bytes(path.read_bytes())
    return root


def prompts_in(path: Path, n: int) -> Path:
    path.write_text(
        "".join(json.dumps({"id": f"{path.stem}{i}", "prompt": f"What is {i} + 2?"}) + "\n" for i in range(n))
    )
    return path


def run(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["clampdown", "discover", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


def test_llama_3_8b_before_its_weights_are_there(monkeypatch, capsys, tmp_path):
    (tmp_path / "sae").mkdir()
    model, sae = shape_of_llama(tmp_path / "model"), huge_sae(tmp_path / "sae")
    harmful, harmless = prompts_in(tmp_path / "a.jsonl", 30), prompts_in(tmp_path / "b.jsonl", 50)
    files = ("--harmful", harmful, "--harmless", harmless)
    run(monkeypatch, "--model", model, "--sae", sae, *files, "--dry-run", "--out", tmp_path / "out")
    shown = capsys.readouterr().out
    for expected in (
        "14 prompts",  # those of the discovery split: the others decide or test
        "26 blocks",
        "TFLOP",
        "assumed",
        "bfloat16",
        "of memory beyond the weights",
        "on disk",
    ):
        assert expected in shown
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_is_probed(monkeypatch, capsys, tmp_path):
    harmful, harmless = prompts_in(tmp_path / "a.jsonl", 8), prompts_in(tmp_path / "b.jsonl", 8)
    run(monkeypatch, "--harmful", harmful, "--harmless", harmless, "--dry-run", "--out", tmp_path / "out")
    assert "measured on" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
