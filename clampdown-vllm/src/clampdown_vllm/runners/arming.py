"""A worker's model becomes steerable: buffers, and hooks at the sites, once its weights are loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clampdown_vllm.book import open_book
from clampdown_vllm.settings import settings_of
from clampdown_vllm.worker import op
from clampdown_vllm.worker.state import Capacity, State


def arm(runner: Any, positions: Tensor) -> None:
    """`positions` is the runner's own buffer of each token's position."""
    config = runner.vllm_config
    settings = settings_of(config)
    if settings is None:
        return
    device = str(runner.device)
    scheduler, hf = config.scheduler_config, config.model_config.hf_text_config
    capacity = Capacity(
        # A request that is preempted keeps its seat: there may be more of them than run at once.
        rows=max(4 * scheduler.max_num_seqs, 64),
        tokens=positions.shape[0],
        longest=config.model_config.max_model_len + 1,
        block=config.cache_config.block_size,
    )
    book = open_book(settings, device)
    runner.clampdown = State(book, hf.hidden_size, capacity, positions, device)
    op.attach(runner.model, hf.model_type, runner.clampdown)
