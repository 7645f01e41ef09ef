"""A baked checkpoint, run by plain transformers: the steered model's replies, token for token, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from clampdown.errors import ExportError
from clampdown.interop.exports.exporting import Lossy
from clampdown.interop.exports.forms import unsaid
from clampdown.interop.exports.table import FORMATS
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from tests.interop.exports.conftest import (
    add,
    bound,
    dense,
    plain_replies,
    prompt_ids,
    random_model,
    random_vector,
    steered_replies,
    written,
)

SIZES = {"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
MORE = {"bos_token_id": 1, "eos_token_id": 5, "pad_token_id": 0, "initializer_range": 0.3}
GPT2 = GPT2Config(vocab_size=1536, n_embd=64, n_layer=3, n_head=4, n_positions=128, **MORE)
NEOX = GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **MORE)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **MORE, tie_word_embeddings=True),
    "smollm3": SmolLM3Config(**SIZES, **MORE),
    "qwen2": Qwen2Config(**SIZES, **MORE, use_sliding_window=False),
    "mistral": MistralConfig(**SIZES, **MORE, sliding_window=None, head_dim=24),
    "gpt2": GPT2,
    "gpt_neox": NEOX,
    "qwen3": Qwen3Config(**SIZES, **MORE, head_dim=16),
    "phi3": Phi3Config(**SIZES, **MORE, sliding_window=None),
}
ADDS = ("llama", "smollm3", "qwen2", "mistral", "gpt2", "gpt_neox")


def orthogonal() -> dict[str, tuple[float, ...]]:
    one, other = torch.tensor(random_vector(64, 1)), torch.tensor(random_vector(64, 2, 3.0))
    return {"v": tuple(one.tolist()), "w": tuple((other - (other @ one) * one).tolist())}


VECTORS = orthogonal()


def everywhere(vector: str = "v") -> list[Edit]:
    """An ablation of everything that is written into the stream of three blocks."""
    sites = ["blocks.0.hook_resid_pre"]
    sites += [f"blocks.{block}.hook_{point}" for block in range(3) for point in ("attn_out", "mlp_out")]
    return [dense("ablate_direction", site, vector) for site in sites]


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_bakes(lm: LanguageModel, edits: list[Edit], path: Path) -> None:
    """Logits and replies of the written checkpoint are those of the steered model, and not those of the model."""
    plan = Plan.of(lm, [], edits, "x", vectors=VECTORS, sinks="include")
    model = plain(written(lm, plan, "checkpoint", path).path)
    ids = torch.tensor([prompt_ids(lm)[0]])
    with torch.no_grad():
        with steer(lm, plan):
            steered = lm.model(ids).logits
        torch.testing.assert_close(model(ids).logits, steered, atol=2e-4, rtol=1e-3)
        assert not torch.allclose(lm.model(ids).logits, steered, atol=1e-2)
    assert plain_replies(model, lm, 8) == steered_replies(lm, plan, tokens=8)


@pytest.mark.parametrize("family", ADDS)
def test_additions_become_biases(tmp_path: Path, lm: LanguageModel, family: str) -> None:
    edits = [dense("add_direction", "blocks.1.hook_resid_post", "w"), dense("add_direction", "blocks.0.hook_resid_pre")]
    edits += [dense("add_direction", "blocks.2.hook_mlp_out", strength=-2.0)]
    edits += [dense("add_direction", "blocks.1.hook_attn_out", strength=3.0)]
    assert_bakes(random_model(lm, CONFIGS[family]), edits, tmp_path / "baked")


def test_an_addition_needs_only_the_bias_of_its_own_matrix(tmp_path: Path, lm: LanguageModel) -> None:
    edits = [dense("add_direction", "blocks.1.hook_attn_out", "w"), dense("add_direction", "blocks.0.hook_resid_pre")]
    assert_bakes(random_model(lm, CONFIGS["qwen3"]), edits, tmp_path / "baked")


@pytest.mark.parametrize("family", list(CONFIGS))
def test_an_ablation_everywhere_is_one_of_matrices(tmp_path: Path, lm: LanguageModel, family: str) -> None:
    assert_bakes(random_model(lm, CONFIGS[family]), everywhere(), tmp_path / "baked")


def test_from_the_embeddings_on_the_stream_itself_can_be_ablated(tmp_path: Path, lm: LanguageModel) -> None:
    """Up to some block, both directions at once, and an addition that the next ablation takes out again."""
    sites = ["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_resid_post", "blocks.1.hook_attn_out",
             "blocks.2.hook_resid_pre"]  # fmt: skip
    edits = [dense("ablate_direction", site, vector) for site in sites for vector in ("v", "w")]
    edits += [dense("add_direction", "blocks.2.hook_resid_pre", "w"), dense("add_direction", "blocks.1.hook_mlp_out")]
    assert_bakes(random_model(lm, CONFIGS["llama"]), edits, tmp_path / "baked")
    parallel = [
        dense("ablate_direction", f"blocks.{i}.hook_resid_{p}") for i, p in ((0, "pre"), (0, "post"), (1, "post"))
    ]
    assert_bakes(random_model(lm, NEOX), parallel, tmp_path / "parallel")


def test_the_embedded_model_baked_replies_as_steered_and_loads_here_too(tmp_path: Path, lm, sae: Sae) -> None:
    plan = Plan.of(lm, [sae], [add()], "added")
    found = written(lm, plan, "checkpoint", tmp_path / "baked", sae)
    expected = steered_replies(lm, plan, sae)
    assert plain_replies(plain(found.path), lm) == expected != steered_replies(lm, None)
    assert steered_replies(load_model(found.path), None) == expected
    assert found.sidecar.parent == found.path
    with pytest.raises(ExportError, match="is there already"):
        written(lm, plan, "checkpoint", tmp_path / "baked", sae)


@pytest.mark.parametrize(
    ("family", "edits", "reason"),
    [
        ("llama", [dense("ablate_direction", "blocks.1.hook_resid_post")], "around its matrices"),
        ("llama", [*everywhere()[:-1], dense("ablate_direction", "blocks.2.hook_resid_post", "w")], "around"),
        ("qwen3", [dense("add_direction", "blocks.1.hook_resid_post")], "has no bias there"),
        ("phi3", [dense("add_direction", "blocks.1.hook_attn_out")], "has no bias there"),
    ],
)
def test_what_no_weights_can_do_is_refused(tmp_path: Path, lm, family: str, edits: list[Edit], reason: str) -> None:
    model = random_model(lm, CONFIGS[family])
    plan = Plan.of(model, [], edits, "x", vectors=VECTORS, sinks="include")
    with pytest.raises(ExportError, match=reason):
        written(model, plan, "checkpoint", tmp_path / "baked")
    assert not list(tmp_path.iterdir())


def test_an_ablation_at_one_site_is_written_as_one_everywhere_and_measured(tmp_path: Path, lm: LanguageModel) -> None:
    plan = Plan.of(lm, [], [dense("ablate_direction"), dense("ablate_direction", "blocks.4.hook_resid_post")], "x",
                   vectors={"v": random_vector(128, 5)})  # fmt: skip
    found = written(lm, plan, "checkpoint", tmp_path / "baked", lossy=Lossy(limit=1))
    assert len(found.plan.edits) == 1 + 2 * lm.n_layers
    assert found.difference is not None and found.difference.kl is not None and found.difference.kl > 0
    assert plain_replies(plain(found.path), lm) == steered_replies(lm, found.plan)


def test_a_family_with_norms_after_its_matrices_is_refused(lm: LanguageModel) -> None:
    from transformers import Gemma2Config

    model = random_model(lm, Gemma2Config(**SIZES, **MORE, head_dim=16))
    plan = Plan.of(model, [], [dense("add_direction", "blocks.1.hook_resid_post")], "x", vectors=VECTORS)
    assert any("no matrix" in one.why for one in unsaid(bound(model, plan), FORMATS["checkpoint"].words))
