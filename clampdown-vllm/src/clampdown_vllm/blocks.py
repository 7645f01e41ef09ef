"""The prefix cache: a block's key says what is done to its own tokens, the chain of keys what was done before.

So a plan that edits replies only shares the whole prompt with the unsteered model, a plan that edits prompts shares
with itself, and no request ever reads keys and values of another treatment. Blocks that nothing is done to have no key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clampdown_vllm.order import within
from clampdown_vllm.settings import KEY


def done_to(extra: Mapping[str, Any] | None, start: int, end: int) -> tuple[str, str] | None:
    """The extra key of the block of positions [start, end): a pair, as vLLM publishes the second half of each."""
    given = (extra or {}).get(KEY)
    if given is None or given["mode"] in ("read", "measure"):
        return None
    cut = within(given["reach"], start, end)
    if not cut:
        return None
    # What an armed gate will say is not known when its blocks are named: they are nobody else's.
    own = given["id"] if given["mode"] == "armed" else ""
    return (KEY, f"{given['digest']}:{given['branch']}:{own}:{cut}")


def install() -> None:
    """Add the key to vLLM's own. `block_pool` holds the function under its own name as well."""
    from vllm.v1.core import block_pool, kv_cache_utils

    before = kv_cache_utils.generate_block_hash_extra_keys

    def generate_block_hash_extra_keys(request: Any, start: int, end: int, start_mm_idx: int) -> Any:
        keys, mm = before(request, start, end, start_mm_idx)
        params = request.sampling_params
        own = done_to(params.extra_args, start, end) if params is not None else None
        return ((*(keys or ()), own) if own else keys), mm

    for module in (kv_cache_utils, block_pool):
        assert hasattr(module, before.__name__), "a vLLM of another shape"
        setattr(module, before.__name__, generate_block_hash_extra_keys)
