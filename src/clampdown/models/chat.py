"""Chat templates as token ids: encoding conversations, and telling content from template.

Which tokens of a prompt are *content* (what somebody wrote) and which belong to the template is derived once per
tokenizer, by rendering probe conversations:

1. Render conversations whose messages are marked words, tokenize with offsets, and cut out the runs of tokens that lie
   outside every message: the *scaffolds* (role headers, end-of-turn marks, a default system prompt).
2. Repeat with messages that begin and end in whitespace or punctuation, because tokenizers merge such characters with
   the template's own newlines and then a scaffold is a token shorter.
3. In a prompt, a token is scaffold when it is special or lies in an occurrence of a scaffold. This needs ids only, so
   every engine can ask, whether or not it tokenized the prompt itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from jinja2.exceptions import TemplateError
from torch import Tensor

from clampdown.errors import ChatTemplateError, ScopeError
from clampdown.types import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clampdown.models.loading import LanguageModel

Ids = tuple[int, ...]  # never empty in a scaffold

_SHAPES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)
_STARTS = ("", "\n", "  ", "(", "7 ")
_ENDS = ("", ".", "?", ")", "\n", " ")
# Words that no template contains, one per message, so that contents are found again in the rendered text.
_WORDS = ("zebra quilt", "marble otter", "walnut comet", "velvet tulip")


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a tokenizer's chat template puts around messages, as token ids.

    `generation_prompt` opens the assistant's turn; `scaffolds` are the template's id sequences; `special_ids` are all
    special tokens, padding and BOS among them.
    """

    generation_prompt: Ids
    scaffolds: tuple[Ids, ...]
    special_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Derive the format. Raises `ChatTemplateError` when there is no template or it cannot render a user turn."""
        special = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        runs = {run: None for probe in _probes() for run in _scaffold_runs(tokenizer, probe)}
        # A single ordinary token (a newline, say) also occurs inside messages: it cannot mark a template.
        scaffolds = tuple(run for run in runs if len(run) > 1 or set(run) <= special)
        return cls(_generation_prompt(tokenizer), scaffolds, special)

    def content_mask(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]
    ) -> Bool[Tensor, "batch pos"]:
        """True for tokens of message contents: not padding, not special, not part of the template."""
        special = torch.tensor(sorted(self.special_ids), device=input_ids.device)
        outside = ~attention_mask.bool() | torch.isin(input_ids, special)
        for scaffold in self.scaffolds:
            outside |= _occurrences(input_ids, scaffold)
        return ~outside

    def assistant_start(self, input_ids: Int[Tensor, "batch pos"]) -> int:
        """Position where the generation prompt begins: rows are left padded, so it is the same for all of them.

        Raises `ScopeError` when a row does not end with the generation prompt.
        """
        width = len(self.generation_prompt)
        start = input_ids.shape[1] - width
        expected = torch.tensor(self.generation_prompt, device=input_ids.device)
        if start < 0 or not bool((input_ids[:, start:] == expected).all()):
            raise ScopeError(
                "a prompt does not end with the template's assistant header",
                hint="encode prompts with add_generation_prompt=True, or choose a scope that does not need it",
            )
        return start


def _occurrences(input_ids: Int[Tensor, "batch pos"], run: Ids) -> Bool[Tensor, "batch pos"]:
    """True at every position covered by an occurrence of `run`."""
    covered = torch.zeros_like(input_ids, dtype=torch.bool)
    length, last = len(run), input_ids.shape[1] - len(run) + 1
    if last <= 0:
        return covered
    starts = torch.ones_like(covered[:, :last])
    for offset, token_id in enumerate(run):
        starts &= input_ids[:, offset : offset + last] == token_id
    for offset in range(length):
        covered[:, offset : offset + last] |= starts
    return covered


def _probes() -> Iterator[list[Message]]:
    """Conversations of every shape with every pair of a beginning and an end of message."""
    for shape, start, end in itertools.product(_SHAPES, _STARTS, _ENDS):
        yield [Message(role, f"{start}{word}{end}") for role, word in zip(shape, _WORDS, strict=False)]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation as the template writes it. Raises `ChatTemplateError` when it has or can do no such thing."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template",
            hint="use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(message.role for message in messages) or "none"
        raise ChatTemplateError(
            f"the chat template cannot express this conversation (turns: {roles}): {error}",
            hint="some templates know no system turn, and most want user and assistant to alternate",
        ) from error


def _scaffold_runs(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Iterator[Ids]:
    """The runs of tokens that lie outside every message. Nothing when the template cannot express the probe, unless it
    is a plain user turn, which every chat template must express."""
    try:
        text = render(tokenizer, messages, add_generation_prompt=True)
    except ChatTemplateError:
        if len(messages) == 1:
            raise
        return
    spans = _content_spans(text, messages)
    encoded = _encode_with_offsets(tokenizer, text)
    run: list[int] = []
    for token_id, (begin, end) in encoded:
        if any(begin < span_end and end > span_begin for span_begin, span_end in spans):
            if run:
                yield tuple(run)
            run = []
        else:
            run.append(token_id)
    if run:
        yield tuple(run)


def _content_spans(text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where the messages' contents lie in the rendered text, in characters."""
    return [span for span in _spans_by_message(text, messages) if span is not None]


def _spans_by_message(text: str, messages: Sequence[Message]) -> list[tuple[int, int] | None]:
    """Where each message's content lies in the rendered text, in characters; None for a turn that the template drops or
    moves. Templates may strip contents."""
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for message in messages:
        content = message.content
        begin = text.find(content, cursor)
        if begin < 0:
            content = content.strip()
            begin = text.find(content, cursor)
        if begin >= 0:
            cursor = begin + len(content)
        spans.append((begin, cursor) if begin >= 0 else None)
    return spans


def _encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, tuple[int, int]]]:
    try:
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ChatTemplateError(
            "this tokenizer cannot say where its tokens lie in the text", hint="a fast tokenizer is needed"
        ) from error
    return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids that open the assistant's turn. Templates such as Llama 2's have no separate opening: for them it is
    whatever follows the last user message."""
    probe = [Message("user", _WORDS[0])]
    opened = render(tokenizer, probe, add_generation_prompt=True)
    closed = render(tokenizer, probe, add_generation_prompt=False)
    if opened.startswith(closed) and len(opened) > len(closed):
        start = len(closed)
    else:
        start = _content_spans(opened, probe)[0][1]
    return tuple(token_id for token_id, (begin, _end) in _encode_with_offsets(tokenizer, opened) if begin >= start)


def encode(lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, BOS included when the template writes it. Raises `ChatTemplateError`."""
    text = render(lm.tokenizer, messages, add_generation_prompt=add_generation_prompt)
    encoded: Any = lm.tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def token_texts(lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[str]:
    """The piece of the rendered conversation that each token of `encode` stands for; joined they are the whole text.

    A character that takes several tokens is the first one's; the others are empty. Raises `ChatTemplateError`.
    """
    text = render(lm.tokenizer, messages, add_generation_prompt=add_generation_prompt)
    pieces, cursor = [], 0
    for _token, (_begin, end) in _encode_with_offsets(lm.tokenizer, text):
        pieces.append(text[cursor : max(cursor, end)])
        cursor = max(cursor, end)
    return pieces


def token_owners(
    lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int | None]:
    """For each token of `encode`, the index of the message that it is a part of; None for the template's tokens."""
    text = render(lm.tokenizer, messages, add_generation_prompt=add_generation_prompt)
    spans = _spans_by_message(text, messages)
    owners: list[int | None] = []
    for _token, (begin, end) in _encode_with_offsets(lm.tokenizer, text):
        mine = (i for i, span in enumerate(spans) if span and begin < span[1] and end > span[0])
        owners.append(next(mine, None))
    return owners


def content_texts(
    lm: LanguageModel, ids: Int[Tensor, "prompts prompt"], content: Bool[Tensor, "prompts prompt"]
) -> list[str]:
    """What people wrote in each prompt, from its token ids: the runs of content tokens as text, joined by newlines."""
    texts = []
    for row, inside in zip(ids.tolist(), content.tolist(), strict=True):
        runs = itertools.groupby(zip(row, inside, strict=True), key=lambda token: token[1])
        found = [[token for token, _ in run] for counted, run in runs if counted]
        texts.append("\n".join(lm.tokenizer.decode(run, skip_special_tokens=True) for run in found))
    return texts


@dataclass(frozen=True, slots=True)
class Batch:
    """Left-padded prompts. `attention_mask` is 1 for real tokens and 0 for padding."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions counted from each row's first real token; padding gets 0."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Stack sequences of ids, padded on the left to the longest."""
    width = max((len(sequence) for sequence in sequences), default=0)
    ids = [[pad_id] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return Batch(
        torch.tensor(ids, dtype=torch.long, device=device).view(len(sequences), width),
        torch.tensor(mask, dtype=torch.long, device=device).view(len(sequences), width),
    )
