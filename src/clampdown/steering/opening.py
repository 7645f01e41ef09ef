"""While a reply is written: show its tokens to the gates that are read again, and note which open where."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.steering.program import GateProgram
from clampdown.steering.turn import Tally, Turn


def reply_columns(
    ids: Int[Tensor, "rows pos"] | None, real: Bool[Tensor, "rows pos"], turn: Turn, endings: Int[Tensor, " n"]
) -> Bool[Tensor, "rows pos"]:
    """Which columns of this pass are tokens of a reply: what ends or pads one is none."""
    written = real & (torch.arange(turn.start, turn.seen, device=real.device) >= turn.prompt_width)
    return written if ids is None else written & ~torch.isin(ids, endings)


def read_on(turn: Turn, tally: Tally, site: str, x: Float[Tensor, "rows pos d_model"]) -> bool:
    """Show a site's gates what this pass holds of the replies. Returns whether one opened."""
    skipped = max(turn.prompt_width - turn.start, 0)
    if turn.reply is None or skipped >= turn.reply.shape[1]:
        return False
    content, written = turn.reply[:, skipped:], x[:, skipped:]
    written = written[turn.prompt_of] if turn.narrow else written
    first = turn.start + skipped
    length = torch.arange(first, turn.seen, device=x.device) - turn.prompt_width + 1
    opens = False
    checks = dict(turn.checks)
    for i, check in turn.checks.items():
        if check.gate.site.name == site:
            checks[i], pooled = check.on(written, content)
            recheck = check.gate.recheck[:, None]
            due = content & (recheck > 0) & (length % recheck.clamp(min=1) == 0)
            if bool(due.any()):
                opens |= _check(turn, tally, check.gate, check.gate.scores_along(pooled), due, first)
    turn.checks = checks
    return opens


def _check(
    turn: Turn,
    tally: Tally,
    gate: GateProgram,
    scores: Float[Tensor, "rows pos"],
    due: Bool[Tensor, "rows pos"],
    first: int,
) -> bool:
    """Open the gates that a check finds above their threshold, from that column on. `first` is the first column."""
    best = scores.masked_fill(~due, -torch.inf).amax(1)
    tally.gate_score[gate.branch, turn.alive] = tally.gate_score[gate.branch, turn.alive].maximum(best)
    above = due & (scores > gate.threshold[:, None])
    opens = above.any(1) & ~turn.opened[gate.branch]
    if turn.since is None or not bool(opens.any()):
        return False
    turn.since[gate.branch] = torch.where(opens, above.int().argmax(1) + first, turn.since[gate.branch])
    turn.opened[gate.branch] |= opens
    tally.fired[:, turn.alive] = turn.fired
    return True
