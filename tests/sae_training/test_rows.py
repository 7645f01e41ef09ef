"""What is learnt from: no sinks, no endless repeats, and held-out texts that stay held out."""

from __future__ import annotations

import pytest
import torch

from clampdown.errors import NotEnoughDataError
from clampdown.sae_training.rows import MOST_REPEATS, choose_rows
from clampdown.sae_training.shards import Collected


def collected(texts: list[list[int]], *, sink_at: int | None = None) -> Collected:
    """A residual says which token it is of: a constant that gives it its length, and the id in two digits."""
    token = torch.tensor([t for text in texts for t in text], dtype=torch.int32)
    position = torch.tensor([i for text in texts for i in range(len(text))], dtype=torch.int32)
    residual = torch.stack([torch.full_like(token, 500), token // 128, token % 128], dim=1).float()
    residual[position == 0] *= 100
    if sink_at is not None:
        residual[position == sink_at] *= 50
    return Collected(residual.half(), token, position)


def texts(n: int, first: int = 0) -> list[list[int]]:
    return [[1, 2, 3, 10 + first + i, 4000 + first + i] for i in range(n)]


def test_sinks_are_left_out_wherever_they_are() -> None:
    rows = choose_rows(collected(texts(2000), sink_at=3))
    assert rows.dropped["sinks"] == 4000
    assert float(rows.train.float().max()) < rows.longest


def test_an_opening_that_all_texts_share_is_taken_a_few_times() -> None:
    rows = choose_rows(collected(texts(2000)))
    kept = torch.cat([rows.train, rows.held_out]).float()
    opening = int(((kept[:, 1] == 0) & (kept[:, 2] < 10)).sum())
    assert opening == 2 * MOST_REPEATS, "two shared positions after the sink"
    assert len(kept) == opening + 2 * 2000, "what differs is kept whole"


def test_held_out_texts_are_whole_and_do_not_move() -> None:
    few, many = choose_rows(collected(texts(2000))), choose_rows(collected([*texts(2000, 9000), *texts(2000)[::-1]]))
    assert 0.03 < len(few.held_out) / (len(few.train) + len(few.held_out)) < 0.07
    own = {tuple(row) for row in few.held_out.tolist() if row[1] > 0 or row[2] > 9}
    assert own <= {tuple(row) for row in many.held_out.tolist()}
    assert not own & {tuple(row) for row in many.train.tolist()}


def test_too_little_is_an_error() -> None:
    with pytest.raises(NotEnoughDataError, match="too few"):
        choose_rows(collected(texts(20)))
