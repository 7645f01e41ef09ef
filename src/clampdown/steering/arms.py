"""Arms: the columns of an experiment, and many of them in one batch.

Rows of a batch are (arm, prompt) pairs; each row carries its arm's plan. Sweeps, side-by-side chat and a server with
many tenants are the same mechanism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
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
    """What one arm's model answered to one prompt, and the proof of what was done."""

    arm: Arm
    prompt: Prompt
    text: str
    n_tokens: int
    receipt: Receipt | None


EncodedRow = tuple[Arm, Prompt, list[int]]


def batches(lm: LanguageModel, pairs: Sequence[tuple[Arm, Prompt]], rows: int) -> Iterator[list[EncodedRow]]:
    """(arm, prompt, token ids) in batches of about equal length, longest first, so memory peaks at the start.

    How rows are cut into batches depends on the pairs alone. Arms that show the model the same conversation share its
    token ids.
    """
    ids: dict[tuple[Message, ...], list[int]] = {}
    encoded: list[EncodedRow] = []
    for arm, prompt in pairs:
        messages = arm.messages(prompt)
        if messages not in ids:
            ids[messages] = encode(lm, messages)
        encoded.append((arm, prompt, ids[messages]))
    encoded.sort(key=lambda row: -len(row[2]))
    for start in range(0, len(encoded), rows):
        yield encoded[start : start + rows]


def generate_arms(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] | None,
    pairs: Sequence[tuple[Arm, Prompt]],
    *,
    max_new_tokens: int,
    batch_rows: int = 256,
) -> list[Reply]:
    """Greedy replies of every (arm, prompt) pair, arms mixed freely in each batch."""
    return [
        reply for batch in batches(lm, pairs, batch_rows) for reply in generate_batch(lm, saes, batch, max_new_tokens)
    ]


def generate_batch(
    lm: LanguageModel,
    saes: FeatureSource | Sequence[FeatureSource] | None,
    batch: Sequence[EncodedRow],
    max_new_tokens: int,
) -> list[Reply]:
    """Greedy replies of one batch, in its order."""
    plans = [arm.plan for arm, _, _ in batch]
    # A reply may end at once, and then a scope has nothing to cover: the receipt says so (0 tokens touched).
    with steer(lm, plans, saes, require_reach=False) as steering:
        texts = generate(lm, [ids for _, _, ids in batch], max_new_tokens=max_new_tokens, on_keep=steering.keep_rows)
        receipts = steering.receipts()
    return [
        Reply(arm, prompt, out.text, len(out.ids), receipt)
        for (arm, prompt, _), out, receipt in zip(batch, texts, receipts, strict=True)
    ]
