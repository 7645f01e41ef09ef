"""Arms: the columns of an experiment, and many of them in one batch.

Rows of a batch are (arm, prompt) pairs; each row carries its arm's plan. Sweeps, side-by-side chat and a server with
many tenants are the same mechanism, and arms share what they cannot change (`prompt_sharing.py`):

1. A prompt's pass through the blocks below the lowest edit is computed once for all its arms.
2. Rows that cannot differ are one row: a gate that stayed shut, neutral strengths, or a plan that another arm has too.
   The reply says whose it is (`Reply.same_as`).
3. Arms decode together; a row that ends leaves the batch.
4. A batch that does not fit in memory is halved and tried again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.models.memory import rows_that_fit
from clampdown.saes.sae import FeatureSource
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.steering.prompt_sharing import distinct
from clampdown.types import ArmKind, Message, Prompt, Receipt


@dataclass(frozen=True, slots=True)
class Arm:
    """A plan, the baseline or a control, as one column of an experiment.

    `strength` is what the reports plot (raw units of the plan's first edit); `group` ties arms of one curve together.
    """

    name: str
    kind: ArmKind
    plan: Plan | None = None
    strength: float | None = None
    system_prompt: str | None = None
    group: str = ""

    def messages(self, prompt: Prompt) -> tuple[Message, ...]:
        """The conversation that this arm's model sees."""
        if self.system_prompt is None:
            return prompt.messages
        rest = tuple(message for message in prompt.messages if message.role != "system")
        return (Message("system", self.system_prompt), *rest)


BASELINE = Arm("baseline", ArmKind.BASELINE)


@dataclass(frozen=True, slots=True)
class Reply:
    """What one arm's model answered to one prompt, and the proof of what was done.

    `same_as` names the arm whose reply this is when it was not computed again, because the two could not differ.
    """

    arm: Arm
    prompt: Prompt
    text: str
    n_tokens: int
    receipt: Receipt | None
    same_as: str = ""


EncodedRow = tuple[Arm, Prompt, list[int]]


def batches(
    lm: LanguageModel, pairs: Sequence[tuple[Arm, Prompt]], rows: int | None, max_new_tokens: int = 0
) -> Iterator[list[EncodedRow]]:
    """(arm, prompt, token ids) in batches of about equal length, longest first, so memory peaks at the start.

    Rows that show the model the same tokens stay together, and in one batch if they fit, because they share work. How
    rows are cut into batches depends on the pairs and on `rows` alone; None stands for as many as memory has room for,
    with `max_new_tokens` more.
    """
    ids: dict[tuple[Message, ...], list[int]] = {}
    together: dict[tuple[int, ...], list[EncodedRow]] = {}
    for arm, prompt in pairs:
        messages = arm.messages(prompt)
        if messages not in ids:
            ids[messages] = encode(lm, messages)
        together.setdefault(tuple(ids[messages]), []).append((arm, prompt, ids[messages]))
    groups = sorted(together.values(), key=lambda group: -len(group[0][2]))
    if rows is None and groups:
        rows = rows_that_fit(lm, len(groups[0][0][2]) + max_new_tokens)
    rows = rows or 1
    batch: list[EncodedRow] = []
    for group in groups:
        if batch and len(batch) + len(group) > rows:
            yield batch
            batch = []
        batch += group
        while len(batch) > rows:
            yield batch[:rows]
            batch = batch[rows:]
    if batch:
        yield batch


def generate_arms(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] | None,
    pairs: Sequence[tuple[Arm, Prompt]],
    *,
    max_new_tokens: int,
    batch_rows: int | None = None,
) -> list[Reply]:
    """Greedy replies of every (arm, prompt) pair, arms mixed freely in each batch."""
    cut = batches(lm, pairs, batch_rows, max_new_tokens)
    return [reply for batch in cut for reply in generate_batch(lm, saes, batch, max_new_tokens)]


def generate_batch(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] | None,
    batch: Sequence[EncodedRow],
    max_new_tokens: int,
) -> list[Reply]:
    """Greedy replies of one batch, in its order. On running out of memory the batch is halved, down to one row."""
    try:
        return _generate(lm, saes, batch, max_new_tokens)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if len(batch) == 1 or not out_of_memory(error):
            raise
    # Outside the except block: the traceback keeps the failed batch's tensors alive.
    half = len(batch) // 2
    return [reply for part in (batch[:half], batch[half:]) for reply in generate_batch(lm, saes, part, max_new_tokens)]


def out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's or the CPU's allocator gave up."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _generate(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] | None,
    batch: Sequence[EncodedRow],
    max_new_tokens: int,
) -> list[Reply]:
    prompts, prompt_of = distinct([ids for _, _, ids in batch])
    plans = [arm.plan for arm, _, _ in batch]
    # A reply may end at once, and then a scope has nothing to cover: the receipt says so (0 tokens touched).
    with steer(lm, plans, saes, require_reach=False, prompt_of=prompt_of) as steering:
        texts = generate(
            lm,
            prompts,
            max_new_tokens=max_new_tokens,
            on_keep=steering.keep_rows,
            widened=lambda: steering.row_map.prompt_of,
        )
        receipts = steering.receipts()
    first: dict[int, str] = {}
    replies = []
    for (arm, prompt, _), output, receipt in zip(batch, steering.row_map.row_of.tolist(), receipts, strict=True):
        owner = first.setdefault(output, arm.name)
        reply = texts[output]
        replies.append(Reply(arm, prompt, reply.text, len(reply.ids), receipt, "" if owner == arm.name else owner))
    return replies
