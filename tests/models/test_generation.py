"""Our greedy loop against the library's `generate`, and against generating each prompt alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clampdown.models.chat import pad_left
from clampdown.models.generation import GrowingLayer, generate, next_token_logits
from clampdown.models.loading import LanguageModel
from clampdown.types import Site

Tiny = Callable[[str], LanguageModel]
EOS = 2
NEW = 24


def by_library(lm: LanguageModel, prompts: list[list[int]]) -> list[tuple[tuple[int, ...], bool]]:
    """What the library's own greedy search writes: ids before the end token, and whether there was one."""
    batch = pad_left(prompts, lm.pad_id)
    replies = lm.model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=NEW
    )[:, batch.input_ids.shape[1] :].tolist()
    return [(tuple(r[: r.index(EOS)]) if EOS in r else tuple(r), EOS in r) for r in replies]


def test_equals_the_library_token_for_token(tiny: Tiny, architecture: str, prompts: list[list[int]]) -> None:
    """Rows end at different times, which is where leaving the batch could mix rows up."""
    lm = tiny(architecture)
    ours = [(g.ids, g.finished) for g in generate(lm, prompts, max_new_tokens=NEW)]
    assert ours == by_library(lm, prompts)


def test_the_prompts_of_these_tests_end_at_different_times(tiny: Tiny, prompts: list[list[int]]) -> None:
    lengths = {len(g.ids) for g in generate(tiny("llama"), prompts, max_new_tokens=NEW) if g.finished}
    assert len(lengths) > 2


def test_a_left_padded_batch_equals_single_prompts(tiny: Tiny, architecture: str, prompts: list[list[int]]) -> None:
    lm = tiny(architecture)
    together = generate(lm, prompts[:6], max_new_tokens=8)
    alone = [generate(lm, [prompt], max_new_tokens=8)[0] for prompt in prompts[:6]]
    assert together == alone


def test_padding_does_not_change_logits(tiny: Tiny, architecture: str, prompts: list[list[int]]) -> None:
    lm = tiny(architecture)
    together = next_token_logits(lm, prompts)
    alone = torch.cat([lm.model(torch.tensor([prompt])).logits[:, -1] for prompt in prompts])
    assert torch.allclose(together, alone, atol=2e-4, rtol=1e-4)


def test_kept_rows_follow_their_prompts(tiny: Tiny, prompts: list[list[int]]) -> None:
    """Per-row steering sees, at every forward, the rows it thinks it sees: each live row's input is the token that its
    own prompt wrote last."""
    lm = tiny("llama")
    rows = torch.arange(len(prompts))
    fed: list[dict[int, int]] = []

    def keep(kept: Tensor) -> None:
        nonlocal rows
        rows = rows[kept]

    def look(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        ids = kwargs["input_ids"]
        assert len(ids) == len(rows)
        fed.append(dict(zip(rows.tolist(), ids[:, -1].tolist(), strict=True)))

    handle = lm.model.register_forward_pre_hook(look, with_kwargs=True)
    replies = generate(lm, prompts, max_new_tokens=NEW, on_keep=keep)
    handle.remove()
    for step, tokens in enumerate(fed[1:]):
        assert tokens == {row: reply.ids[step] for row, reply in enumerate(replies) if len(reply.ids) > step}
    assert len(fed[-1]) < len(prompts)


def test_hooks_fire_on_every_forward(tiny: Tiny, prompts: list[list[int]]) -> None:
    lm = tiny("llama")
    shapes: list[tuple[int, ...]] = []
    handle = lm.layout.hook_point(Site(1)).register(lambda x: shapes.append(tuple(x.shape)))
    produced: list[int] = []
    generate(lm, prompts, max_new_tokens=5, on_step=produced.append)
    handle.remove()
    assert [shape[0] for shape in shapes] == produced
    assert [shape[1] for shape in shapes[1:]] == [1] * (len(shapes) - 1)


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_do(tiny: Tiny, n: int) -> None:
    replies = generate(tiny("llama"), [[1, 5]] * n, max_new_tokens=0)
    assert [(r.ids, r.text, r.finished) for r in replies] == [((), "", False)] * n


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_the_growing_cache_holds_what_concatenation_would(data: st.DataObject) -> None:
    """Any sequence of appends, row selections and the library's own cache operations."""
    torch.manual_seed(0)
    ours, batch = GrowingLayer(), 4
    plain = torch.empty(batch, 2, 0, 3)
    for _ in range(data.draw(st.integers(1, 8))):
        new = torch.randn(len(plain), 2, data.draw(st.integers(1, 90)), 3)
        plain = torch.cat([plain, new], dim=2)
        keys, values = ours.update(new, -new)
        assert torch.equal(keys, plain)
        assert torch.equal(values, -plain)
        match data.draw(st.sampled_from(["append", "select", "crop", "repeat"])):
            case "select" if len(plain) > 1:
                rows = torch.tensor(data.draw(st.permutations(range(len(plain))))[: len(plain) - 1])
                ours.batch_select_indices(rows)
                plain = plain[rows]
            case "crop":
                ours.crop(-1)
                plain = plain[:, :, :-1]
            case "repeat" if len(plain) < 16:
                ours.batch_repeat_interleave(2)
                plain = plain.repeat_interleave(2, dim=0)
            case _:
                pass
