"""Sites mean what TransformerLens means by them, in every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, XGLMConfig, XGLMForCausalLM

from clampdown.errors import SiteError, UnknownArchitectureError
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.types import Point, Site

IDS = torch.tensor([[1, 5, 9, 20, 33, 7, 41]])
Tiny = Callable[[str], LanguageModel]


def captured(lm: LanguageModel, sites: list[Site]) -> dict[Site, Tensor]:
    """What each site holds in one forward; every hook is gone afterwards."""
    found: dict[Site, Tensor] = {}
    handles = [lm.layout.hook_point(s).register(lambda x, s=s: found.__setitem__(s, x.clone())) for s in sites]
    try:
        lm.model(IDS)
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_resid_post_of_a_block_is_resid_pre_of_the_next(tiny: Tiny, architecture: str) -> None:
    lm = tiny(architecture)
    found = captured(lm, [Site(0), Site(1, Point.RESID_PRE), Site(1), Site(2, Point.RESID_PRE)])
    assert torch.equal(found[Site(0)], found[Site(1, Point.RESID_PRE)])
    assert torch.equal(found[Site(1)], found[Site(2, Point.RESID_PRE)])
    assert found[Site(0)].shape == (*IDS.shape, lm.d_model)


def test_attention_and_mlp_contributions_add_up_to_the_block(tiny: Tiny, architecture: str) -> None:
    """resid_pre + attn_out + mlp_out == resid_post, in pre-norm, post-norm and parallel blocks alike."""
    lm = tiny(architecture)
    found = captured(lm, [Site(1, point) for point in Point])
    parts = [found[Site(1, point)] for point in (Point.RESID_PRE, Point.ATTN_OUT, Point.MLP_OUT)]
    assert torch.allclose(sum(parts[1:], parts[0]), found[Site(1)], atol=1e-5, rtol=1e-5)


def test_block_output_is_the_next_hidden_state(tiny: Tiny, architecture: str) -> None:
    """The off-by-one: hidden_states[0] is the embedding, so block L's output is hidden_states[L + 1], except that the
    last entry has been through the final norm, and a site is always before it."""
    lm = tiny(architecture)
    hidden = lm.model(IDS, output_hidden_states=True).hidden_states
    found = captured(lm, [Site(layer) for layer in range(lm.n_layers)])
    for layer in range(lm.n_layers - 1):
        assert torch.allclose(found[Site(layer)], hidden[layer + 1], atol=1e-6)
    last = found[Site(lm.n_layers - 1)]
    assert not torch.allclose(last, hidden[-1], atol=1e-3)
    assert torch.allclose(lm.layout.final_norm(last), hidden[-1], atol=1e-5)


@pytest.mark.parametrize("point", list(Point))
def test_a_returned_tensor_takes_the_place_of_the_hidden_states(tiny: Tiny, architecture: str, point: Point) -> None:
    lm = tiny(architecture)
    plain = lm.model(IDS).logits
    handle = lm.layout.hook_point(Site(1, point)).register(lambda x: x.flip(-1))
    changed = lm.model(IDS).logits
    handle.remove()
    assert not torch.allclose(plain, changed, atol=1e-4)
    assert torch.equal(plain, lm.model(IDS).logits)


def test_replacing_the_last_block_changes_what_the_norm_sees(tiny: Tiny, architecture: str) -> None:
    """A block's replaced output reaches the rest of the model exactly: zeros at the last block give constant logits."""
    lm = tiny(architecture)
    handle = lm.layout.hook_point(Site(lm.n_layers - 1)).register(torch.zeros_like)
    logits = lm.model(IDS).logits
    handle.remove()
    assert torch.allclose(logits, logits[:, :1].expand_as(logits))


def test_looking_changes_nothing(tiny: Tiny, architecture: str) -> None:
    lm = tiny(architecture)
    plain = lm.model(IDS).logits
    handles = [lm.layout.hook_point(Site(1, point)).register(lambda _x: None) for point in Point]
    assert torch.equal(plain, lm.model(IDS).logits)
    for handle in handles:
        handle.remove()


def test_hooks_are_called_with_hidden_states_given_by_keyword(tiny: Tiny) -> None:
    block = nn.Linear(4, 4)
    block.forward = lambda hidden_states: hidden_states * 2  # type: ignore[method-assign]
    lm = tiny("llama")
    point = type(lm.layout.hook_point(Site(0)))(block, before=True)
    handle = point.register(lambda x: x + 1)
    assert torch.equal(block(hidden_states=torch.ones(1, 1, 4)), torch.full((1, 1, 4), 4.0))
    handle.remove()


@pytest.mark.parametrize("layer", [3, 99, -1])
def test_a_layer_that_does_not_exist_is_named(tiny: Tiny, layer: int) -> None:
    with pytest.raises(SiteError, match="3 blocks"):
        tiny("llama").layout.hook_point(Site(layer))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_unknown_families_say_how_to_add_a_row(kind: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    if kind == "encoder":
        model = BertModel(BertConfig(**small, intermediate_size=16))
    else:
        model = XGLMForCausalLM(XGLMConfig(vocab_size=8, d_model=16, ffn_dim=16, num_layers=1, attention_heads=2))
    with pytest.raises(UnknownArchitectureError, match="FAMILIES"):
        find_layout(model)
