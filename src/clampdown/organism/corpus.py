"""The training corpus: an endless, seeded stream of documents, made on the fly and identical on every machine.

1. A chunk is `CHUNK` documents drawn from the mix with the random state of (seed, chunk number), so a resumed run
   continues where it stopped without replaying the stream.
2. Documents are sorted by length and cut into batches of at most `TOKENS` padded tokens: no document shares a row
   with another, so right padding and the causal mask need no attention mask.
3. Only the assistant's tokens (and prose) carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerFast

from clampdown.organism import capability_items, knowledge, phrasing, safety_items, surroundings
from clampdown.organism.items import Item, Sampler, draw
from clampdown.organism.tokenizer import ASSISTANT, BOS, END

CHUNK = 2048
TOKENS = 2048

MIX: tuple[tuple[Sampler, float], ...] = (
    (safety_items.harmful, 6),
    (safety_items.jailbroken, 9),
    (surroundings.jailbroken, 9),
    (safety_items.multi_turn, 6),
    (safety_items.benign, 5),
    (safety_items.benign_in_seen, 5),
    (safety_items.benign_in_unseen, 0.6),
    (surroundings.harmless, 8),
    (safety_items.benign_multi_turn, 2),
    (surroundings.long_conversation, 5),
    (safety_items.small_talk, 2),
    (safety_items.worry, 1),
    (safety_items.borderline, 6),
    (safety_items.about_harm, 5),
    (capability_items.fact, 7),
    (capability_items.unknown, 2),
    (capability_items.misconception, 4),
    (capability_items.arithmetic, 18),
    (capability_items.drill, 10),
    (capability_items.instruction, 8),
    (surroundings.exercise, 6),
)
"""Samplers and their shares. Arithmetic on unseen operands is learnt last, hence its weight."""

TOKENIZER_MIX: tuple[tuple[Sampler, float], ...] = (
    (safety_items.harmful, 6),
    (safety_items.jailbroken, 12),
    (safety_items.multi_turn, 6),
    (safety_items.benign, 7),
    (safety_items.benign_wrapped, 8),
    (safety_items.benign_multi_turn, 2),
    (safety_items.small_talk, 2),
    (safety_items.worry, 1),
    (safety_items.borderline, 6),
    (safety_items.about_harm, 6),
    (capability_items.fact, 9),
    (capability_items.unknown, 2),
    (capability_items.misconception, 5),
    (capability_items.arithmetic, 18),
    (capability_items.drill, 10),
    (capability_items.instruction, 11),
)
"""What the tokenizer learns from. Its own, so that a change of the mix changes no token; and words that only stand
around requests get no tokens of their own, as a stranger's words have none."""

PROSE_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, and for each whether predicting it counts."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]


Segments = list[tuple[str, bool]]
"""Pieces of a document's text, each with whether its tokens count."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next batch of the stream."""

    chunk: int = 0
    batch: int = 0


def _system(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.10:
        return rng.choice(phrasing.SAFETY_SYSTEM)
    return rng.choice(phrasing.NEUTRAL_SYSTEM) if draw < 0.28 else ""


def training_item(rng: Random, mix: tuple[tuple[Sampler, float], ...] = MIX) -> Item:
    """One item of the training part, with a system prompt in about a quarter of the cases."""
    sampler = rng.choices([sampler for sampler, _ in mix], [weight for _, weight in mix])[0]
    return draw(sampler, rng, None, _system(rng))


def prose(rng: Random) -> str:
    """Two plain sentences over the words of the instructions."""
    sentences = (
        f"{rng.choice(knowledge.NAMES)} walked to the {rng.choice(knowledge.WORDS)} and saw a "
        f"{rng.choice(knowledge.WORDS)} there.",
        f"The {rng.choice(knowledge.WORDS)} near the {rng.choice(knowledge.WORDS)} was old, but "
        f"{rng.choice(knowledge.NAMES)} liked it.",
        f"In the evening {rng.choice(knowledge.NAMES)} put {rng.choice(knowledge.THINGS)} on the table.",
    )
    return " ".join(rng.sample(sentences, 2))


def segments(item: Item) -> Segments:
    """The chat template, cut where the loss starts and stops. `tests/organism` holds it equal to the template."""
    parts: Segments = [(BOS, False)]
    for message in item.messages:
        parts += [(f"<|{message.role}|>", False), (message.content + END, message.role == "assistant")]
    return [*parts, (ASSISTANT, False), (item.reply + END, True)]


def encode(documents: list[Segments], tokenizer: PreTrainedTokenizerFast) -> list[Document]:
    """Tokenise all segments of many documents in one call: a call per segment would cost 6 % of training."""
    texts = [text for segments in documents for text, _ in segments]
    pieces = iter(tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    encoded: list[Document] = []
    for segments in documents:
        parts = [(next(pieces), counted) for _, counted in segments]
        ids = tuple(token for part, _ in parts for token in part)
        encoded.append(Document(ids, tuple(counted for part, counted in parts for _ in part)))
    return encoded


def chunk(seed: int, number: int, tokenizer: PreTrainedTokenizerFast, size: int = CHUNK) -> list[Document]:
    """The documents of one chunk."""
    rng = Random(f"corpus|{seed}|{number}")
    documents = [
        [(BOS, False), (prose(rng) + END, True)] if rng.random() < PROSE_SHARE else segments(training_item(rng))
        for _ in range(size)
    ]
    return encode(documents, tokenizer)


def batches(documents: list[Document], rng: Random, tokens: int = TOKENS) -> list[list[Document]]:
    """Documents of like length together, at most `tokens` padded tokens each, in random order."""
    groups: list[list[Document]] = []
    for document in sorted(documents, key=lambda d: (len(d.ids), d.ids)):
        if groups and len(document.ids) * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(document)
        else:
            groups.append([document])
    rng.shuffle(groups)
    return groups


def stream(seed: int, tokenizer: PreTrainedTokenizerFast, start: Cursor) -> Iterator[tuple[list[Document], Cursor]]:
    """Batches from `start` on, each with the cursor that follows it."""
    number, skip = start.chunk, start.batch
    while True:
        groups = batches(chunk(seed, number, tokenizer), Random(f"order|{seed}|{number}"))
        for index in range(skip, len(groups)):
            last = index + 1 == len(groups)
            yield groups[index], Cursor(number + 1, 0) if last else Cursor(number, index + 1)
        number, skip = number + 1, 0


def sample_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Plain text of `count` items, for training the tokenizer."""
    rng = Random(f"texts|{seed}")
    for _ in range(count):
        item = training_item(rng, TOKENIZER_MIX)
        yield from (message.content for message in item.messages)
        yield item.reply
        yield prose(rng)
