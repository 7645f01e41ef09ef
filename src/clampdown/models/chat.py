"""Chat templates as token ids: encoding conversations, and telling content from template.

1. `encode` keeps what people wrote apart from what the template writes: a content never holds a control token, whatever
   was typed, and a content that the template drops is an error (`template.py`, `control.py`). Where nothing of the kind
   was typed, the ids are those of the tokenizer itself.
2. Which tokens of a prompt are *content* is asked by engines that have ids only. For them the template's own runs of
   tokens, the *scaffolds*, are derived by rendering probe conversations, once for a template: role headers, end-of-turn
   marks, a default system prompt. The probes begin and end in whitespace or punctuation, because tokenizers merge such
   characters with the template's own newlines and then a scaffold is a token shorter.
3. Templates that write the date are probed on several days. What changes between days is not a scaffold; it is what
   lies between the two ends of one (`Dated`), on any day.
4. In a prompt, a token is scaffold when it is a control token or lies in an occurrence of a scaffold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clampdown.errors import ChatTemplateError, ModelError, ScopeError
from clampdown.models.control import Token
from clampdown.models.template import Rendered, located, source, writes_the_day
from clampdown.models.voice import WORDS, Voice, tokens_of
from clampdown.replies import THINKING
from clampdown.types import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clampdown.models.loading import LanguageModel

Ids = tuple[int, ...]  # never empty in a scaffold

# Roles of the probes, and whether the assistant's turn is opened behind them.
_SHAPES: tuple[tuple[tuple[Role, ...], bool], ...] = (
    (("user",), True),
    (("user", "assistant", "user"), True),
    (("system", "user"), True),
    (("system", "user", "assistant", "user"), True),
    (("user", "assistant"), False),
)
_ANSWERED: tuple[tuple[Role, ...], ...] = (("user", "assistant"), ("user", "assistant", "user"))
_STARTS = ("", "\n", "  ", "(", "7 ")
_ENDS = ("", ".", "?", ")", "\n", " ")
# Days that differ in the first and the last letter of all that is written of a date or a time.
_DAYS = (
    datetime(1987, 12, 31, 23, 59, 58, tzinfo=UTC),
    datetime(2046, 1, 2, 4, 5, 6, tzinfo=UTC),
    datetime(2019, 9, 16, 11, 37, 43, tzinfo=UTC),
)


@dataclass(frozen=True, slots=True)
class Dated:
    """A scaffold of which the middle changes with the day: its two ends, and how long the middle may be.

    `after` is empty where a content follows the date itself.
    """

    before: Ids
    after: Ids
    longest: int


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """What a tokenizer's chat template puts around messages, as token ids.

    `generation_prompt` opens the assistant's turn; `scaffolds` are the template's id sequences, `dated` those that
    change with the day; `special_ids` are all control tokens, padding and BOS among them. `opening` is the mark that
    the template itself writes to open the assistant's thoughts ("" where it does not, or closes them again), and
    `end_ids` are the tokens with which it ends the assistant's turn.
    """

    generation_prompt: Ids
    scaffolds: tuple[Ids, ...]
    special_ids: frozenset[int]
    dated: tuple[Dated, ...] = ()
    opening: str = ""
    end_ids: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Derive the format. Raises `ChatTemplateError` when there is no template or it cannot render a user turn."""
        voice = Voice.of(tokenizer)
        special = voice.control.numbers
        days = _DAYS if writes_the_day(source(tokenizer)) else _DAYS[:1]
        runs: dict[Ids, None] = {}
        dated: dict[Dated, None] = {}
        for roles, opened in _SHAPES:
            for messages in _probes(roles):
                seen = [_scaffold_runs(tokenizer, voice, messages, opened, day) for day in days]
                for run in zip(*seen, strict=False):
                    if len(set(run)) == 1:
                        runs[run[0]] = None
                    else:
                        dated[_dated(run)] = None
        # A single ordinary token (a newline, say) also occurs inside messages: it cannot mark a template.
        scaffolds = tuple(run for run in runs if len(run) > 1 or set(run) <= special)
        return cls(
            _generation_prompt(tokenizer, voice),
            scaffolds,
            special,
            tuple(dated),
            _opening(tokenizer, voice),
            _end_ids(tokenizer, voice),
        )

    @staticmethod
    def kept(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """The tokenizer's format, derived once, and again when its template changes. Raises `ChatTemplateError`."""
        voice = Voice.of(tokenizer)
        if voice.format is None:
            voice.format = ChatFormat.of(tokenizer)
        return voice.format

    def content_mask(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"]
    ) -> Bool[Tensor, "batch pos"]:
        """True for tokens of message contents: not padding, not special, not part of the template."""
        special = torch.tensor(sorted(self.special_ids), device=input_ids.device)
        real = attention_mask.bool()
        outside = ~real | torch.isin(input_ids, special)
        for scaffold in self.scaffolds:
            outside |= _covered(_starts(input_ids, scaffold), len(scaffold))
        for dated in self.dated:
            outside |= self._between(dated, input_ids, real)
        return ~outside

    def _between(
        self, dated: Dated, input_ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
    ) -> Bool[Tensor, "batch pos"]:
        """Positions of a dated scaffold, from its first end to the nearest second one.

        A beginning that anybody can type counts at the beginning of the prompt only: else what follows it could hide.
        """
        starts = _starts(input_ids, dated.before)
        if not set(dated.before) & self.special_ids:
            starts &= real & (real.cumsum(1) == 1)
        covered = torch.zeros_like(starts)
        row_of, at = (found.tolist() for found in starts.nonzero(as_tuple=True))
        for row, start in zip(row_of, at, strict=True):
            begin = start + len(dated.before)
            ids = input_ids[row, begin : begin + dated.longest + len(dated.after)].tolist()
            length = _find(ids, dated.after) if dated.after else min(len(ids), dated.longest)
            if length is not None:
                covered[row, start : begin + length + len(dated.after)] = True
        return covered

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


def _starts(input_ids: Int[Tensor, "batch pos"], run: Ids) -> Bool[Tensor, "batch pos"]:
    """True where an occurrence of `run` begins."""
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    last = input_ids.shape[1] - len(run) + 1
    if last <= 0:
        return found
    found[:, :last] = True
    for offset, token_id in enumerate(run):
        found[:, :last] &= input_ids[:, offset : offset + last] == token_id
    return found


def _covered(starts: Bool[Tensor, "batch pos"], length: int) -> Bool[Tensor, "batch pos"]:
    """True at every position covered by a run of this length."""
    covered = starts.clone()
    for offset in range(1, length):
        covered[:, offset:] |= starts[:, : starts.shape[1] - offset]
    return covered


def _find(ids: Sequence[int], run: Ids) -> int | None:
    return next((i for i in range(len(ids) - len(run) + 1) if tuple(ids[i : i + len(run)]) == run), None)


# ---- encoding ----------------------------------------------------------------------------------------------------


def _rendered(lm: LanguageModel, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[Voice, Rendered]:
    voice = Voice.of(lm.tokenizer)
    return voice, located(lm.tokenizer, voice.skeletons, messages, add_generation_prompt=add_generation_prompt)


def encode(lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, BOS included when the template writes it. What looks like a control token in a
    message stays text.

    Raises `ChatTemplateError`, also when a message's content would not be in the prompt.
    """
    voice, rendered = _rendered(lm, messages, add_generation_prompt)
    return _within(lm, voice.ids(lm.tokenizer, rendered))


def plain(lm: LanguageModel, text: str) -> list[int]:
    """Token ids of a text alone, in which nothing is a control token. Raises `ChatTemplateError`."""
    voice = Voice.of(lm.tokenizer)
    rendered = Rendered(text, ((0, len(text), 0),))
    return _within(lm, voice.ids(lm.tokenizer, rendered))


def control_tokens(lm: LanguageModel, ids: Sequence[int]) -> int:
    """How many of these ids are control tokens: what somebody who sends ids, or a raw text, can write and a message
    cannot."""
    try:
        numbers = lm.chat.special_ids
    except ChatTemplateError:
        numbers = frozenset(lm.tokenizer.all_special_ids)
    return sum(token in numbers for token in ids)


def _within(lm: LanguageModel, ids: list[int]) -> list[int]:
    """The ids, if the model has an embedding for each of them."""
    model = getattr(lm, "model", None)
    if model is None or not ids or (largest := max(ids)) < model.get_input_embeddings().num_embeddings:
        return ids
    token = lm.tokenizer.convert_ids_to_tokens(largest)
    raise ModelError(
        f"the tokenizer knows a token {token!r} ({largest}) for which the model has no embedding",
        hint="the tokenizer belongs to another model, or the model was not resized with it",
    )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The conversation as the template writes it. Raises `ChatTemplateError` when it has or can do no such thing."""
    skeletons = Voice.of(tokenizer).skeletons
    return located(tokenizer, skeletons, messages, add_generation_prompt=add_generation_prompt).text


def token_texts(lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[str]:
    """The piece of the rendered conversation that each token of `encode` stands for; joined they are the whole text.

    A character that takes several tokens is the first one's; the others are empty. Raises `ChatTemplateError`.
    """
    voice, rendered = _rendered(lm, messages, add_generation_prompt)
    pieces, cursor = [], 0
    for token in voice.read(lm.tokenizer, rendered):
        pieces.append(rendered.text[cursor : max(cursor, token.end)])
        cursor = max(cursor, token.end)
    return pieces


def token_owners(
    lm: LanguageModel, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int | None]:
    """For each token of `encode`, the index of the message that it is a part of; None for the template's tokens."""
    voice, rendered = _rendered(lm, messages, add_generation_prompt)
    return [_owner(rendered, token) for token in voice.read(lm.tokenizer, rendered)]


def _owner(rendered: Rendered, token: Token) -> int | None:
    return next((i for begin, end, i in rendered.places if token.begin < end and token.end > begin), None)


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


# ---- derivation of the format ------------------------------------------------------------------------------------


def _probes(roles: Sequence[Role]) -> Iterator[list[Message]]:
    """Conversations of these roles with every pair of a beginning and an end of message."""
    for start, end in itertools.product(_STARTS, _ENDS):
        yield [Message(role, f"{start}{word}{end}") for role, word in zip(roles, WORDS, strict=False)]


def _scaffold_runs(
    tokenizer: PreTrainedTokenizerBase, voice: Voice, messages: Sequence[Message], opened: bool, day: datetime
) -> list[Ids]:
    """The runs of tokens that lie outside every message. None when the template cannot express the probe, unless it is
    a plain user turn, which every chat template must express."""
    try:
        rendered = located(tokenizer, voice.skeletons, messages, add_generation_prompt=opened, moment=day)
    except ChatTemplateError:
        if len(messages) == 1:
            raise
        return []
    tokens = [(token.id, _owner(rendered, token) is None) for token in tokens_of(tokenizer, rendered.text)]
    runs = itertools.groupby(tokens, key=lambda token: token[1])
    return [tuple(token for token, _ in run) for outside, run in runs if outside]


def _dated(runs: Sequence[Ids]) -> Dated:
    """One scaffold on several days: what they begin and end with, and twice the longest middle."""
    shortest = min(map(len, runs))
    same = [len(set(column)) == 1 for column in zip(*(run[:shortest] for run in runs), strict=True)]
    begin = same.index(False) if False in same else shortest
    backwards = [len({run[-i] for run in runs}) == 1 for i in range(1, shortest - begin + 1)]
    end = backwards.index(False) if False in backwards else len(backwards)
    middle = max(map(len, runs)) - begin - end
    return Dated(runs[0][:begin], runs[0][len(runs[0]) - end :], 2 * middle if end else middle)


def _generation_prompt(tokenizer: PreTrainedTokenizerBase, voice: Voice) -> Ids:
    """The ids that open the assistant's turn. Templates such as Llama 2's have no separate opening: for them it is
    whatever follows the last user message."""
    opened, start = _opened_at(tokenizer, voice)
    return tuple(token.id for token in tokens_of(tokenizer, opened) if token.begin >= start)


def _opened_at(tokenizer: PreTrainedTokenizerBase, voice: Voice) -> tuple[str, int]:
    """A user turn with the assistant's opened, as text, and where the opening begins."""
    probe = [Message("user", WORDS[0])]
    opened = located(tokenizer, voice.skeletons, probe, add_generation_prompt=True, moment=_DAYS[0])
    closed = located(tokenizer, voice.skeletons, probe, add_generation_prompt=False, moment=_DAYS[0]).text
    if opened.text.startswith(closed) and len(opened.text) > len(closed):
        return opened.text, len(closed)
    return opened.text, opened.places[-1][1]


def _opening(tokenizer: PreTrainedTokenizerBase, voice: Voice) -> str:
    """The mark of a thought that the generation prompt opens and does not close."""
    text, start = _opened_at(tokenizer, voice)
    for marks in THINKING:
        _, opened, inside = text[start:].rpartition(marks.opening)
        if opened and marks.closing not in inside:
            return marks.opening
    return ""


def _end_ids(tokenizer: PreTrainedTokenizerBase, voice: Voice) -> frozenset[int]:
    """The tokens that end the assistant's turn: the first control token behind it, as the last turn and within."""
    found = set()
    for roles in _ANSWERED:
        probe = [Message(role, word) for role, word in zip(roles, WORDS, strict=False)]
        try:
            rendered = located(tokenizer, voice.skeletons, probe, add_generation_prompt=False, moment=_DAYS[0])
        except ChatTemplateError:
            continue
        end = next(end for _, end, i in rendered.places if i == 1)
        behind = (token.id for token in tokens_of(tokenizer, rendered.text) if token.begin >= end)
        found |= {next((token for token in behind if token in voice.control.numbers), None)}
    return frozenset(found - {None})


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
