"""Where in a rendered conversation each message's content lies, so that nothing is dropped and nothing mistaken.

1. The template is rendered with a mark in place of every content: the *skeleton*, what the template itself writes. It
   is the same for all conversations of one shape and is kept.
2. The conversation is rendered, and must be its skeleton with the contents in place of the marks. A template may trim a
   content, change its case or quote it; a content that is not there, or not as one of these, is an error.
3. Templates that write today's date get the day from here, so that both renderings have one day.

What is marked is not always the whole content. A template that thinks takes an assistant's thoughts out of its turn,
and some take words such as `/no_think` as orders: those stay as they are, for the template to see.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError
from markupsafe import escape

from clampdown.errors import ChatTemplateError
from clampdown.replies import THINKING
from clampdown.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch of their thoughts
_ORDERS = ("/no_think", "/think", "/system_override")
_MARK = re.compile("\ue000([0-9]+)\ue001")
_FORMAT = re.compile(r"""(["'])((?:(?!\1).)*?%[A-Za-z-](?:(?!\1).)*)\1""")
_KEPT_SHAPES = 512


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as its template writes it. `places` are (begin, end, index of the message) of its contents, in the
    order of the text."""

    text: str
    places: tuple[tuple[int, int, int], ...]

    @property
    def spans(self) -> list[Span]:
        return [(begin, end) for begin, end, _ in self.places]

    def outside(self) -> Iterator[str]:
        """The pieces of the text that are the template's own."""
        cursor = 0
        for begin, end in [*self.spans, (len(self.text), len(self.text))]:
            yield self.text[cursor:begin]
            cursor = end


@dataclass(frozen=True, slots=True)
class _Content:
    """A content with marks in place of what must be found again: `marked`, and what each mark stands for. `needed` is
    False for an assistant's thoughts, which templates leave out of later prompts."""

    marked: str
    parts: tuple[str, ...]
    needed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What a template writes around marks: `literals[i]` comes before mark `marks[i]`, the last one behind all."""

    literals: tuple[str, ...]
    marks: tuple[int, ...]


class Skeletons:
    """The skeletons of one tokenizer's template, by the shape of a conversation."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Skeleton | None] = {}

    def of(
        self, tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, str]], opened: bool
    ) -> _Skeleton | None:
        """None where the template cannot render the marks."""
        key = (template, opened, *((turn["role"], turn["content"]) for turn in turns))
        if key not in self._known:
            if len(self._known) >= _KEPT_SHAPES:
                self._known.clear()
            self._known[key] = _skeleton(tokenizer, template, turns, opened)
        return self._known[key]


def _skeleton(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, str]], opened: bool
) -> _Skeleton | None:
    try:
        pieces = _MARK.split(_apply(tokenizer, template, turns, opened))
    except ChatTemplateError:
        return None
    return _Skeleton(tuple(pieces[::2]), tuple(map(int, pieces[1::2])))


def source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's own text. Raises `ChatTemplateError` when there is none."""
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            "the tokenizer has no chat template",
            hint="use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer",
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ChatTemplateError(f"the tokenizer has no chat template to use: {error}") from error


def located(
    tokenizer: PreTrainedTokenizerBase,
    skeletons: Skeletons,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    moment: datetime | None = None,
) -> Rendered:
    """The conversation as the template writes it on the day of `moment` (None: today), and where its contents are.

    Raises `ChatTemplateError` when the template cannot express it, or when a message's content is not in it.
    """
    template = _on_day(source(tokenizer), moment or _now())
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = _apply(tokenizer, template, turns, add_generation_prompt)
    contents = _marked(messages, template)
    marked = [{"role": turn["role"], "content": content.marked} for turn, content in zip(turns, contents, strict=True)]
    skeleton = skeletons.of(tokenizer, template, marked, add_generation_prompt)
    owners = [i for i, content in enumerate(contents) for _ in content.parts]
    if skeleton is not None:
        _check_all_there(skeleton, messages, contents)
        found = _match(text, skeleton, [part for content in contents for part in content.parts])
        if found is not None:
            return Rendered(
                text, tuple((*span, owners[mark]) for span, mark in zip(found, skeleton.marks, strict=True))
            )
    return Rendered(text, tuple(_one_by_one(tokenizer, template, turns, text, add_generation_prompt)))


def _apply(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, str]], opened: bool) -> str:
    switches = {name: False for name in _SWITCHES if name in template}
    try:
        return str(
            tokenizer.apply_chat_template(
                list(map(dict, turns)),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=opened,
                **switches,  # type: ignore[arg-type]
            )
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise ChatTemplateError(
            f"the chat template cannot express this conversation (turns: {roles}): {error}",
            hint="some templates know no system turn, and most want user and assistant to alternate",
        ) from error


def _check_all_there(skeleton: _Skeleton, messages: Sequence[Message], contents: Sequence[_Content]) -> None:
    shown, mark = set(skeleton.marks), 0
    for number, (message, content) in enumerate(zip(messages, contents, strict=True), 1):
        for needed in content.needed:
            if needed and mark not in shown:
                raise _not_there(message.role, number)
            mark += 1


def _not_there(role: str, number: int) -> ChatTemplateError:
    return ChatTemplateError(
        f"the chat template drops message {number} (role '{role}'): the model would never see it",
        hint="use a template that writes this role, or put its text into the first user message",
    )


def _match(text: str, skeleton: _Skeleton, parts: Sequence[str]) -> list[Span] | None:
    """Where the contents lie in the text, if it is this skeleton with these contents in it."""
    if not text.startswith(skeleton.literals[0]):
        return None
    cursor, spans = len(skeleton.literals[0]), []
    for mark, after in zip(skeleton.marks, skeleton.literals[1:], strict=True):
        ends = (cursor + len(shown) for shown in _ways(parts[mark]) if text.startswith(shown, cursor))
        end = next((end for end in ends if text.startswith(after, end)), None)
        if end is None:
            return None
        spans.append((cursor, end))
        cursor = end + len(after)
    return spans if cursor == len(text) else None


# What templates do to a content. A new way is one row.
_WAYS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.upper,
    str.lower,
    str.capitalize,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: str(escape(text)),
    lambda text: _without_orders(text).strip(),
    lambda text: _without_orders(text).rstrip(),
)


def _without_orders(text: str) -> str:
    return re.sub("|".join(map(re.escape, _ORDERS)), "", text)


def _ways(content: str) -> Iterator[str]:
    """How a template may show a content, the likeliest first."""
    trimmed = (content, content.strip(), content.lstrip(), content.rstrip())
    yield from trimmed
    for way in _WAYS[1:]:
        yield from (way(text) for text in trimmed[:2])


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Mapping[str, str]], text: str, opened: bool
) -> list[tuple[int, int, int]]:
    """Where the contents lie in a conversation of which the template writes something else than of its skeleton: each
    is marked while the others are what they are."""
    found = []
    for i, turn in enumerate(turns):
        if not turn["content"].strip():
            continue
        marked = [*turns[:i], {**turn, "content": "\ue0000\ue001"}, *turns[i + 1 :]]
        pieces = _MARK.split(_apply(tokenizer, template, marked, opened))[::2]
        if len(pieces) == 1:
            raise _not_there(turn["role"], i + 1)
        spans = _match(text, _Skeleton(tuple(pieces), (0,) * (len(pieces) - 1)), [turn["content"]])
        if spans is None:
            raise ChatTemplateError(
                f"the chat template changes message {i + 1} (role '{turn['role']}'): its text is not in the prompt",
                hint="the template reads something in it as its own; write the message differently",
            )
        found += [(*span, i) for span in spans]
    return sorted(found)


# ---- what is marked ----------------------------------------------------------------------------------------------


def _marked(messages: Sequence[Message], template: str) -> list[_Content]:
    """Every content with its marks; marks are numbered through the conversation."""
    found: list[_Content] = []
    for message in messages:
        n = sum(len(content.parts) for content in found)
        found.append(_content(message, template, n))
    return found


def _content(message: Message, template: str, n: int) -> _Content:
    text = message.content
    if not text.strip():
        return _Content(text, (), ())
    if message.role == "assistant" and (thought := _thought(text, template)):
        before, thinking, between, answer = thought
        return _joined((before, between), (thinking, answer), (False, True), n)
    orders = "".join(f" {order}" for order in _ORDERS if order in text and order in template)
    return _Content(f"\ue000{n}\ue001{orders}", (text,), (True,))


def _thought(text: str, template: str) -> tuple[str, str, str, str] | None:
    """An assistant's turn that begins with thoughts as this template knows them, in four: up to the thoughts, the
    thoughts, what closes them, the answer."""
    for opening, closing in THINKING:
        head, closed, tail = text.partition(closing)
        if closed and closing in template:
            start = head.lstrip()
            inside = start.removeprefix(opening).strip()
            begin = head.index(inside, len(head) - len(start) + (len(opening) if start.startswith(opening) else 0))
            answer = tail.lstrip()
            return head[:begin], inside, text[begin + len(inside) : len(text) - len(answer)], answer
    return None


def _joined(around: tuple[str, str], parts: tuple[str, str], needed: tuple[bool, bool], n: int) -> _Content:
    """Two marks with what stands before each; what is empty has no mark."""
    marked, kept, wanted = "", [], []
    for before, part, need in zip(around, parts, needed, strict=True):
        marked += before
        if part.strip():
            marked += f"\ue000{n + len(kept)}\ue001"
            kept.append(part)
            wanted.append(need)
    return _Content(marked, tuple(kept), tuple(wanted))


# ---- the day -----------------------------------------------------------------------------------------------------


def writes_the_day(template: str) -> bool:
    """Whether a template asks for the date or the time."""
    return "strftime_now" in template


def _now() -> datetime:
    """The moment that templates are told: now, or what the environment holds it at, as for reproducible builds."""
    held = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(held), tz=UTC) if held.isdigit() else datetime.now()


def _on_day(template: str, moment: datetime) -> str:
    """The template with its clock stopped at a moment."""
    if not writes_the_day(template):
        return template
    formats = {found[2] for found in _FORMAT.finditer(template)}
    days = json.dumps({pattern: moment.strftime(pattern) for pattern in sorted(formats)})
    usual = json.dumps(moment.strftime("%d %b %Y"))
    return f"{{% macro strftime_now(format) %}}{{{{ {days}.get(format, {usual}) }}}}{{% endmacro %}}{template}"
