"""A steered model against SAELens's own: its bridge to the same weights, with its SAE spliced in and its features set.

Nothing is shared but the files: blocks, hook names, encoder, decoder and error term are theirs on one side and ours on
the other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from clampdown.config import embedded_sae
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from tests.models.conftest import WIDTH, IdTokenizer, build

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

IDS = torch.tensor([[1, 5, 9, 20, 33, 7, 41], [1, 8, 30, 30, 12, 50, 3]])
FEATURES, VALUES = (3, 17, 0), (2.5, -1.0, 4.0)


def plan_for(lm: LanguageModel, sae_path: Path) -> Plan:
    sae = load_sae(sae_path)
    return Plan(
        name="clamp",
        model=ModelRef(name=lm.name, revision=lm.revision),
        saes=(SaeRef(site=sae.site.name, name=str(sae_path), revision=sae.revision),),
        edits=(Edit(site=sae.site.name, operator="clamp", features=FEATURES, strengths=VALUES),),
    )


def by_us(lm: LanguageModel, sae_path: Path, ids: Tensor) -> Tensor:
    with steer(lm, plan_for(lm, sae_path)):
        return lm.model(ids).logits


def by_saelens(model_path: Path, sae_path: Path, ids: Tensor, *, centred: bool = False) -> Tensor:
    """The SAE spliced in with its error term, and a hook that sets the features in its code. `centred`: into the model
    as TransformerLens centres it."""
    import sae_lens
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge: Any = SAETransformerBridge.boot_transformers(str(model_path), device="cpu")
    if centred:
        bridge.enable_compatibility_mode(center_unembed=False)
    sae = sae_lens.SAE.load_from_disk(sae_path)
    bridge.add_sae(sae, use_error_term=True)

    def clamp(code: Tensor, hook: Any) -> Tensor:
        code[..., FEATURES] = torch.tensor(VALUES)
        return code

    return bridge.run_with_hooks(ids, fwd_hooks=[(bridge.get_sae_hook_name(sae), clamp)])


def saved(model: Any, root: Path) -> Path:
    """A model's directory, with a tokenizer, which the bridge wants to see."""
    model.save_pretrained(root)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 64)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(root)
    return root


def saved_sae(architecture: str, hook: str, root: Path) -> Path:
    """A random SAE that SAELens made and wrote."""
    import sae_lens

    cfg = {"architecture": architecture, "d_in": WIDTH, "d_sae": 40, "dtype": "float32", "device": "cpu"}
    cfg |= {"metadata": {"model_name": "toy", "hook_name": hook}, "normalize_activations": "none"}
    cfg |= {"k": 5, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    sae = sae_lens.SAE.from_dict({**cfg, "apply_b_dec_to_input": True})
    draw = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        value = torch.randn(parameter.shape, generator=draw) * 0.3
        parameter.data = value.abs() if "threshold" in name else value
    sae.save_model(root)
    return root


# grouped queries; sliding window and norms after the sublayers; experts; parallel blocks
@pytest.mark.parametrize(
    ("name", "architecture", "hook"),
    [
        ("llama", "jumprelu", "blocks.1.hook_resid_post"),
        ("gemma2", "standard", "blocks.1.hook_mlp_out"),
        ("gemma3", "topk", "blocks.1.hook_resid_post"),
        ("qwen3_moe", "gated", "blocks.1.hook_mlp_out"),
        ("mistral", "standard", "blocks.2.hook_attn_out"),
        ("gpt_neox", "jumprelu", "blocks.1.hook_resid_pre"),
    ],
)
@torch.no_grad()
def test_a_clamped_model_answers_as_saelens_makes_it(name: str, architecture: str, hook: str, tmp_path: Path) -> None:
    model = build(name)
    sae_path = saved_sae(architecture, hook, tmp_path / "sae")
    lm = LanguageModel(model, IdTokenizer(), find_layout(model), name, "random")
    ours, theirs = by_us(lm, sae_path, IDS), by_saelens(saved(model, tmp_path / "model"), sae_path, IDS)
    scale = theirs.abs().max()
    assert not torch.allclose(ours, model(IDS).logits, atol=1e-3 * scale)
    assert torch.allclose(ours / scale, theirs / scale, atol=1e-5)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"])
@torch.no_grad()
def test_an_sae_of_a_centred_model_clamps_the_plain_one_as_saelens_clamps_the_centred(hook: str, tmp_path) -> None:
    model = build("gpt2")
    sae_path = saved_sae("jumprelu", hook, tmp_path / "sae")
    theirs = by_saelens(saved(model, tmp_path / "model"), sae_path, IDS, centred=True)
    lm = LanguageModel(model, IdTokenizer(), find_layout(model), "gpt2", "random")
    scale = theirs.abs().max()
    assert not torch.allclose(by_us(lm, sae_path, IDS) / scale, theirs / scale, atol=1e-3)
    config = json.loads((sae_path / "cfg.json").read_text())
    config["metadata"]["model_from_pretrained_kwargs"] = {"center_writing_weights": True, "fold_ln": True}
    (sae_path / "cfg.json").write_text(json.dumps(config))
    assert torch.allclose(by_us(lm, sae_path, IDS) / scale, theirs / scale, atol=1e-5)


@torch.no_grad()
def test_the_embedded_model_and_its_sae(tmp_path: Path) -> None:
    lm, sae_path = load_model("organism"), embedded_sae("organism")
    assert sae_path is not None
    ids = torch.randint(300, 1400, (2, 24), generator=torch.Generator().manual_seed(0))
    copy = Path(shutil.copytree(sae_path.parent / "model", tmp_path / "model"))
    ours, theirs = by_us(lm, sae_path, ids), by_saelens(copy, sae_path, ids)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)
