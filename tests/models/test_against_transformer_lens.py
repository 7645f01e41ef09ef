"""Sites mean what TransformerLens means by the same names, on the same weights. It comes with SAELens, in `dev`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from clampdown.models.layout import find_layout
from clampdown.types import Point, Site
from tests.models.conftest import ARCHITECTURES, BLOCKS, build

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

IDS = torch.tensor([[1, 5, 9, 20, 33, 7, 41]])
SITES = [Site(layer, point) for layer in range(BLOCKS) for point in Point]


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gemma3_multimodal"}))
@torch.no_grad()
def test_the_same_name_is_the_same_place(name: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = build(name)
    model.save_pretrained(tmp_path)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 64)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    ).save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    _, cache = bridge.run_with_cache(IDS)
    layout = find_layout(model)
    for site in SITES:
        found: list[torch.Tensor] = []
        handle = layout.hook_point(site).register(lambda x, found=found: found.append(x))
        model(IDS)
        handle.remove()
        assert torch.allclose(found[0], cache[site.name], atol=1e-4), site.name
