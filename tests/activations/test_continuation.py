"""Going on from a known prefix gives what the whole model gives, in every architecture, steered or not."""

from __future__ import annotations

import random

import pytest
import torch

from clampdown.activations.continuation import (
    continue_logits,
    continued,
    forward_logits,
    last_shared_layer,
    read_prefix,
    repeated,
)
from clampdown.errors import SiteError
from clampdown.models.chat import encode, pad_left
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit
from clampdown.types import Message, Point, Site
from tests.models.conftest import ARCHITECTURES, PAD, IdTokenizer, build
from tests.steering.conftest import SITE, make_plan, random_sae, tiny_llama


def tiny(architecture):
    model = build(architecture)
    return LanguageModel(model, IdTokenizer(), find_layout(model), architecture, "random")


def random_batch():
    draw = random.Random(0)
    return pad_left([[1] + [draw.randrange(3, 60) for _ in range(n)] for n in (3, 9, 6)], PAD)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_goes_on_where_it_stopped(architecture):
    lm, batch = tiny(architecture), random_batch()
    with torch.no_grad():
        whole = forward_logits(lm, batch, keep=2)
        for layer in range(2):
            prefix = read_prefix(lm, batch, layer)
            torch.testing.assert_close(continue_logits(lm, prefix, keep=2), whole)
            wide = continue_logits(lm, prefix.widened(2), keep=2)
            torch.testing.assert_close(wide, torch.cat([whole, whole]))
        torch.testing.assert_close(forward_logits(lm, batch, keep=2), whole)


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


@pytest.fixture(scope="module")
def batch(lm):
    return pad_left([encode(lm, [Message("user", text)]) for text in ("w1 w2 w3", "w7", "w9 w2")], lm.pad_id)


def test_blocks_below_are_not_computed(lm, batch):
    prefix, called = read_prefix(lm, batch, 1), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: called.append(i)) for i, block in enumerate(lm.layout.blocks)
    ]
    with torch.no_grad():
        continue_logits(lm, prefix)
    for handle in handles:
        handle.remove()
    assert called == [2]


def test_steering_edits_what_is_known(lm, batch):
    plan = make_plan(Edit(site=SITE.name, operator="clamp", features=(3,), strengths=(5.0,)))
    sae, prefix = random_sae(), read_prefix(lm, batch, SITE.layer)
    rows = [plan, None, plan, None, plan, None]
    with torch.no_grad():
        with steer(lm, rows, sae):
            whole = forward_logits(lm, repeated(batch, 2))
        with steer(lm, rows, sae):
            shared = continue_logits(lm, prefix.widened(2))
    torch.testing.assert_close(shared, whole)
    assert not torch.allclose(shared[0], shared[3])


def test_the_gradient_is_the_whole_models(lm, batch):
    """A finite difference through the whole model, with the residual moved by a hook."""
    prefix = read_prefix(lm, batch, 1)
    moved = torch.randn_like(prefix.residual)
    residual = prefix.residual.clone().requires_grad_()
    known = type(prefix)(prefix.batch, prefix.layer, residual)
    (gradient,) = torch.autograd.grad(continue_logits(lm, known)[:, -1, 7].sum(), residual)

    def value(step):
        handle = lm.layout.hook_point(Site(1)).register(lambda x: x + step * moved)
        with torch.no_grad():
            logits = forward_logits(lm, batch)[:, -1, 7].double().sum()
        handle.remove()
        return logits

    expected = (value(1e-2) - value(-1e-2)) / 2e-2
    assert (gradient * moved).sum().item() == pytest.approx(expected.item(), rel=2e-3)


def test_a_cache_or_another_batch_is_an_error_and_nothing_stays_replaced(lm, batch):
    prefix = read_prefix(lm, batch, 1)
    before = [dict(block.__dict__) for block in lm.layout.blocks]
    with pytest.raises(ValueError, match="cache"), continued(lm, prefix):
        lm.model(input_ids=batch.input_ids, use_cache=True)
    with pytest.raises(ValueError, match="known"), continued(lm, prefix):
        forward_logits(lm, repeated(batch, 2))
    assert [dict(block.__dict__) for block in lm.layout.blocks] == before
    with pytest.raises(SiteError):
        read_prefix(lm, batch, 9)


@pytest.mark.parametrize(
    ("sites", "layer"),
    [
        ([Site(2)], 2),
        ([Site(2, Point.RESID_PRE)], 1),
        ([Site(2, Point.MLP_OUT), Site(2)], 1),
        ([Site(2, Point.ATTN_OUT)], 1),
        ([Site(0, Point.RESID_PRE), Site(2)], None),
    ],
)
def test_what_is_shared_ends_below_the_lowest_edit(sites, layer):
    assert last_shared_layer(sites) == layer
