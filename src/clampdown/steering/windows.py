"""What a gate reads of a conversation: each user turn alone, in windows no longer than what it was calibrated on.

A probe reads a model's own representation, and that of a turn is another after six benign turns: on the embedded model
a gate that is read in context finds 7 of 30 harmful questions there, and 29 of 30 at once. So a gate with a `window`
reads each user turn as if it had been the whole conversation, and keeps the worst:

1. The prompt's token ids give its messages: runs of content tokens. A run behind the template's assistant header is a
   reply and is not read, except one that the model is to go on with: that is read in context with its question.
2. A turn of more than `window` tokens is cut into windows of half that length, which overlap by half: in longer ones
   harm is diluted by what stands beside it. Each gets the template of a lone user turn. A prompt that is one such
   window is its own reading: it costs no pass, and scores as it always did.
3. A system message is read with the first turn, in context, and the turn is read alone as well.

This needs ids only, and is a function of them. The passes are in `turn_reading.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from clampdown.errors import ChatTemplateError, PlanError
from clampdown.models.chat import Ids, encode, token_owners
from clampdown.models.loading import LanguageModel
from clampdown.steering.plan import Plan
from clampdown.types import Message

_WORD = "zebra quilt"


@dataclass(frozen=True, slots=True)
class LoneTurn:
    """What a template puts around a user turn that is the whole conversation, and before a reply in a longer one."""

    before: Ids
    after: Ids
    reply_header: Ids

    @classmethod
    def of(cls, lm: LanguageModel) -> LoneTurn:
        """Derived once per tokenizer. Raises `ChatTemplateError` when it cannot render a user turn."""
        if lm.tokenizer not in _LONE:
            _LONE[lm.tokenizer] = cls(*_around(lm), _reply_header(lm))
        return _LONE[lm.tokenizer]


_LONE: WeakKeyDictionary[object, LoneTurn] = WeakKeyDictionary()


def _around(lm: LanguageModel) -> tuple[Ids, Ids]:
    turn = [Message("user", _WORD)]
    ids, owners = encode(lm, turn), token_owners(lm, turn)
    inside = [i for i, owner in enumerate(owners) if owner == 0]
    return tuple(ids[: inside[0]]), tuple(ids[inside[-1] + 1 :])


def _reply_header(lm: LanguageModel) -> Ids:
    """The tokens before a reply that do not also stand before a user turn; none if the template has one turn only."""
    turns = [Message("user", _WORD), Message("assistant", _WORD), Message("user", _WORD)]
    try:
        ids, owners = encode(lm, turns), token_owners(lm, turns)
    except ChatTemplateError:
        return ()
    to_reply, to_user = (_gap(ids, owners, i) for i in (0, 1))
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(to_reply, to_user, strict=False)))
    return to_reply[same:]


def _gap(ids: Sequence[int], owners: Sequence[int | None], message: int) -> Ids:
    """What stands between a message and the next."""
    inside = [[i for i, owner in enumerate(owners) if owner == each] for each in (message, message + 1)]
    return tuple(ids[inside[0][-1] + 1 : inside[1][0]]) if all(inside) else ()


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids that are read by themselves, which of them are content, and the number of the user turn."""

    ids: Ids
    content: tuple[bool, ...]
    turn: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """The windows of one prompt. `whole` says that the prompt is its only window, `cut` that a turn is longer than one
    window."""

    windows: tuple[Window, ...]
    whole: bool
    cut: bool = False

    @property
    def turns(self) -> int:
        return self.windows[-1].turn + 1


def conversation(lone: LoneTurn, ids: Sequence[int], content: Sequence[bool], size: int) -> Conversation:
    """A prompt, without padding, as windows of at most `size` content tokens."""
    ids = tuple(ids)
    runs = _runs(content)
    asked = [run for run in runs if not _is_reply(lone, ids, run)]
    everything = Window(ids, tuple(content), 0)
    if not asked or (len(runs) == 1 and asked[0][1] - asked[0][0] <= size and _lone(lone, ids, asked[0])):
        return Conversation((everything,), whole=True)
    first = asked[0][0]
    has_system = ids[:first] != lone.before
    opening = [] if not has_system else [_opening(lone, ids, content, asked)]
    turns = asked[1:] if has_system and len(asked) > 1 else asked
    windows = [window for number, run in enumerate(turns) for window in _cut(lone, ids, run, size, number)]
    begun = [] if runs[-1] == asked[-1] else [_begun(lone, ids, content, asked[-1][0], len(turns) - 1)]
    return Conversation((*opening, *windows, *begun), whole=False, cut=len(windows) > len(turns))


def _runs(content: Sequence[bool]) -> list[tuple[int, int]]:
    """The unbroken runs of content, as [start, stop)."""
    groups = itertools.groupby(range(len(content)), key=lambda i: content[i])
    found = [list(group) for inside, group in groups if inside]
    return [(run[0], run[-1] + 1) for run in found]


def _is_reply(lone: LoneTurn, ids: Ids, run: tuple[int, int]) -> bool:
    header = lone.reply_header
    return bool(header) and ids[max(run[0] - len(header), 0) : run[0]] == header


def _lone(lone: LoneTurn, ids: Ids, run: tuple[int, int]) -> bool:
    return ids[: run[0]] == lone.before and ids[run[1] :] == lone.after


def _opening(lone: LoneTurn, ids: Ids, content: Sequence[bool], asked: Sequence[tuple[int, int]]) -> Window:
    """Everything up to the first reply: a system message with the first turn; also text without a template."""
    stop = asked[min(1, len(asked) - 1)][1]
    if len(asked) == 1 or len(ids) == stop + len(lone.after):
        return Window(ids, tuple(content), 0)
    return Window((*ids[:stop], *lone.after), (*content[:stop], *(False for _ in lone.after)), 0)


def _begun(lone: LoneTurn, ids: Ids, content: Sequence[bool], start: int, turn: int) -> Window:
    """The last turn and the beginning of a reply to it."""
    outside = (False for _ in lone.before)
    return Window((*lone.before, *ids[start:]), (*outside, *content[start:]), turn)


def _cut(lone: LoneTurn, ids: Ids, run: tuple[int, int], size: int, turn: int) -> list[Window]:
    start, stop = run
    if stop - start <= size:
        return [_alone(lone, ids[start:stop], turn)]
    half = max(size // 2, 1)
    starts = [*range(start, stop - half, max(half // 2, 1)), stop - half]
    return [_alone(lone, ids[at : at + half], turn) for at in starts]


def _alone(lone: LoneTurn, text: Ids, turn: int) -> Window:
    outside = (False for _ in lone.before), (False for _ in lone.after)
    return Window((*lone.before, *text, *lone.after), (*outside[0], *(True for _ in text), *outside[1]), turn)


def require_one_window(lm: LanguageModel, plan: Plan | None, ids: Sequence[int], content: Sequence[bool]) -> None:
    """For engines that read gates in the prompt's pass only. Raises `PlanError` for a prompt of several windows."""
    for gate in plan.gates if plan is not None else ():
        if gate.window and not conversation(LoneTurn.of(lm), ids, content, gate.window).whole:
            raise PlanError(
                "the plan's gate reads each turn of a conversation by itself, which a prepared model cannot do",
                hint="use steer(...) on a model that is not compiled",
            )
