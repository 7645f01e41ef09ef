"""The other half of a truncated forward: run a model from a block on, with everything below it already known.

Measuring many edits at one site repeats the blocks below it for nothing. Inside `continued(lm, prefix)` every forward
pass of the model skips them:

1. The last block of the prefix returns the known residual, the blocks before it hand on whatever they get.
2. Masks, position embeddings, the blocks above, the final norm and the unembedding are the model's own, so nothing is
   reimplemented and every architecture works. Hooks fire as always: `steer` edits what the stand-in returns.
3. Gradients flow from the logits to the known residual and stop there.

For measuring loops that own the model: blocks are replaced for everybody while the block is open. A pass with a KV
cache is refused, because the skipped blocks would leave theirs empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clampdown.activations.capture import forward_to
from clampdown.models.chat import Batch
from clampdown.models.loading import LanguageModel
from clampdown.types import Point, Site


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a batch's pass through the blocks up to `layer` gave."""

    batch: Batch
    layer: int
    residual: Float[Tensor, "batch pos d_model"]

    def widened(self, copies: int) -> Prefix:
        """The whole batch `copies` times over: row i of copy c is row c * rows + i."""
        return replace(self, batch=repeated(self.batch, copies), residual=self.residual.repeat(copies, 1, 1))


def repeated(batch: Batch, copies: int) -> Batch:
    """The whole batch `copies` times over."""
    return Batch(batch.input_ids.repeat(copies, 1), batch.attention_mask.repeat(copies, 1))


def last_shared_layer(sites: Sequence[Site]) -> int | None:
    """The highest block that computes the same whatever is done at these sites: an edit of a block's output leaves the
    block itself alone. None when even the first block depends on an edit."""
    lowest = min(site.layer if site.point is Point.RESID_POST else site.layer - 1 for site in sites)
    return lowest if lowest >= 0 else None


def read_prefix(lm: LanguageModel, batch: Batch, layer: int) -> Prefix:
    """Run a batch through the blocks up to `layer` and no further. Raises `SiteError` for a layer that is not there."""
    site = Site(layer)
    return Prefix(batch, layer, forward_to(lm, batch, [site])[site])


@contextmanager
def continued(lm: LanguageModel, prefix: Prefix) -> Iterator[None]:
    """Inside, forward passes over exactly the prefix's rows and columns start behind its last block.

    A pass with a cache, or of another shape, raises `ValueError`.
    """
    with ExitStack() as undo:
        for i in range(prefix.layer + 1):
            known = prefix.residual if i == prefix.layer else None
            _replace_forward(lm.layout.blocks[i], _stand_in(known), undo)
        yield


def _stand_in(known: Tensor | None) -> Callable[..., Tensor]:
    """A block's forward that computes nothing: it returns what is known, or what it got. A bare tensor, as every
    family's blocks do in transformers 5."""

    def forward(hidden_states: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise ValueError("a pass that goes on from a prefix cannot fill a KV cache: use_cache=False")
        if known is not None and hidden_states.shape[:2] != known.shape[:2]:
            raise ValueError(
                f"the pass has {tuple(hidden_states.shape[:2])} tokens, {tuple(known.shape[:2])} are known"
            )
        return hidden_states if known is None else known

    return forward


def _replace_forward(block: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Hide the block's forward behind an attribute of the instance; put back what was there (others wrap it too)."""
    before = block.__dict__.get("forward")
    object.__setattr__(block, "forward", forward)
    if before is None:
        undo.callback(block.__dict__.pop, "forward")
    else:
        undo.callback(object.__setattr__, block, "forward", before)


def forward_logits(lm: LanguageModel, batch: Batch, *, keep: int = 1) -> Float[Tensor, "batch kept vocab"]:
    """Logits at the last `keep` columns, without a cache."""
    output = lm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=keep,
    )
    return output.logits


def continue_logits(lm: LanguageModel, prefix: Prefix, *, keep: int = 1) -> Float[Tensor, "batch kept vocab"]:
    """Logits at the last `keep` columns, from the prefix on; differentiable in its residual."""
    with continued(lm, prefix):
        return forward_logits(lm, prefix.batch, keep=keep)
