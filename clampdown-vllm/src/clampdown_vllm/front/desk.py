"""Everything that the front end decides about a request, without any way to run one: no engine is known here.

A request's course:

1. `course` finds the plan by its name, where its edits reach in this prompt, and what its gates have to read.
2. Gates read windows (decision 0008): each user turn alone, or the prompt as it stands. `readings` are the passes that
   are needed first; what a window scored is remembered. A prompt that is one window may also be read in its own pass
   (an armed gate), if its gate is one that the worker can decide.
3. `order` says what the worker is to do. Where every gate is shut there is none: the reply is the unsteered model's.
4. An armed gate may turn out to have decided too late, when tokens it would have edited had gone by: then `settle` says
   that the reply must be made again, with the verdict known.
5. `receipt` is what was done.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clampdown.errors import ClampdownError, SteeringNotAppliedError
from clampdown.models.chat import content_texts, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.serving.intake import given_reply
from clampdown.serving.plans import Choice
from clampdown.serving.replies import receipt_fields
from clampdown.steering.gate_kinds import external_score
from clampdown.steering.plan import Gate, Plan
from clampdown.steering.receipts import TurnsRead, make_receipt
from clampdown.steering.seating import PromptSpan, prompt_spans
from clampdown.steering.turn_reading import GateReading, judge
from clampdown.steering.windows import Conversation, LoneTurn, Window, conversation
from clampdown.store import content_hash
from clampdown_vllm.book import Book
from clampdown_vllm.front.ledger import Ledger
from clampdown_vllm.order import Order, runs
from clampdown_vllm.settings import Settings

REMEMBERED = 1 << 16
"""Scores of windows that are kept."""

OFF = "off"


@dataclass(frozen=True, slots=True)
class Reading:
    """A window to be read by some of a plan's gates before anything else."""

    window: Window
    order: Order


class Unknown(ClampdownError):
    """A request names a plan that is not here, or asks for what steering cannot do: the client's mistake."""


@dataclass
class Desk:
    """The plans of a server, and what has been read of its conversations."""

    book: Book
    lm: LanguageModel
    settings: Settings
    budget: int
    ledger: Ledger
    controls: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    _scores: OrderedDict[tuple[str, tuple[int, ...]], float] = field(default_factory=OrderedDict)
    _keys: dict[tuple[int, int], str] = field(default_factory=dict)

    def plan(self, name: str) -> Plan:
        """Raises `Unknown`."""
        if name not in self.book.plans:
            raise Unknown(self.missing(name))
        return self.book.plans[name]

    def missing(self, name: str) -> str:
        """What to say to who asks for it."""
        return f"there is no plan '{name[:80]}' here; there are: {', '.join(self.book.plans)}"

    def course(self, name: str, ids: Sequence[int], *, scored: bool = False) -> Course:
        """`scored`: what follows the template's last assistant header is a given reply, whose likelihood is asked for.

        Raises `Unknown`, also for a prompt in which the plan's scopes cannot be found.
        """
        plan = self.plan(name)
        try:
            given = given_reply(self.lm, ids) if scored else 0
            (span,) = prompt_spans(self.lm, [plan], pad_left([list(ids[: len(ids) - given])], 0), one_window=False)
            return Course(self, name, plan, span, [self._conversation(gate, span) for gate in plan.gates], len(ids))
        except ClampdownError as error:
            raise Unknown(f"plan '{name}' cannot be applied to this prompt: {error.message}") from error

    def _conversation(self, gate: Gate, span: PromptSpan) -> Conversation:
        if not gate.window:
            return Conversation((Window(span.ids, span.content, 0),), whole=True)
        return conversation(LoneTurn.of(self.lm), span.ids, span.content, gate.window)

    # ---- scores of windows -----------------------------------------------------------------------------------

    def score(self, plan: Plan, gate: Gate, window: Window) -> float | None:
        """What is known of a window, or can be known without the model."""
        if gate.scorer:
            return external_score(gate.scorer, self._text(gate, window))
        return self._scores.get((self._key(plan, gate), window.ids))

    def learn(self, plan: Plan, gate: Gate, window: Window, score: float) -> None:
        self._scores[self._key(plan, gate), window.ids] = score
        while len(self._scores) > REMEMBERED:
            self._scores.popitem(last=False)

    def _text(self, gate: Gate, window: Window) -> str:
        if not gate.window:
            ids, inside = torch.tensor([window.ids]), torch.tensor([window.content])
            return content_texts(self.lm, ids, inside)[0]
        inside = [token for token, counted in zip(window.ids, window.content, strict=True) if counted]
        return self.lm.tokenizer.decode(inside, skip_special_tokens=True)

    def _key(self, plan: Plan, gate: Gate) -> str:
        """Everything that makes a score, for one server's model and SAEs."""
        key = (id(plan), id(gate))
        if key not in self._keys:
            reads = {"site", "kind", "features", "weights", "bias", "poolings"}
            vectors = [plan.vectors[name] for name in gate.vectors]
            self._keys[key] = content_hash([gate.model_dump(include=reads), vectors, plan.sinks])
        return self._keys[key]


@dataclass
class Course:
    """One request's way from a plan's name to a receipt."""

    desk: Desk
    name: str
    plan: Plan
    span: PromptSpan
    talks: Sequence[Conversation]
    n_prompt: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    one_pass: bool = False

    # ---- gates -----------------------------------------------------------------------------------------------

    def readings(self) -> list[Reading]:
        """The passes that have to be made first. None where an armed gate will read the prompt in its own pass."""
        return [] if self._may_arm() else [Reading(w, self._read(w, b)) for w, b in self._unread().items()]

    def _unread(self) -> dict[Window, tuple[int, ...]]:
        found: dict[Window, tuple[int, ...]] = {}
        for branch, (gate, talk) in enumerate(zip(self.plan.gates, self.talks, strict=True)):
            for window in talk.windows:
                if self.desk.score(self.plan, gate, window) is None:
                    same = next((w for w in found if w.ids == window.ids), window)
                    found[same] = (*found.get(same, ()), branch)
        return found

    def _may_arm(self) -> bool:
        """One gate on features that is still unread, one window that is the prompt, and room for it in one pass."""
        gates = self.plan.gates
        return (
            self.desk.settings.one_pass
            and len(gates) == 1
            and gates[0].kind in ("feature", "probe")
            and self.talks[0].whole
            and self.span.length <= self.desk.budget
            and bool(self._unread())
        )

    def _read(self, window: Window, branches: tuple[int, ...]) -> Order:
        return Order(
            id=uuid.uuid4().hex,
            plan=self.name,
            digest=self.desk.book.digests[self.name],
            mode="read",
            length=len(window.ids),
            content=runs(window.content),
            branches=branches,
        )

    def learn(self, reading: Reading, found: Mapping[str, Any] | None) -> None:
        """What a reading's pass said. Raises `SteeringNotAppliedError` when a gate has not seen it whole."""
        if found is None or not found["decided"] or found["missed"] or found["cached"]:
            raise SteeringNotAppliedError("a gate did not read its window: whether to steer is unknown")
        for branch, score in found["scores"].items():
            self.desk.learn(self.plan, self.plan.gates[int(branch)], reading.window, score)

    def verdicts(self) -> list[GateReading] | None:
        """Per branch, once everything has been read."""
        found = []
        for gate, talk in zip(self.plan.gates, self.talks, strict=True):
            scores = [self.desk.score(self.plan, gate, window) for window in talk.windows]
            if any(score is None for score in scores):
                return None
            found.append(_judged(gate, talk, [score for score in scores if score is not None]))
        return found

    # ---- the prompt's own request ----------------------------------------------------------------------------

    def order(self) -> Order | None:
        """What the worker is to do; None for a conversation on which every gate is shut."""
        verdicts = self.verdicts()
        self.one_pass = verdicts is None
        self.id = uuid.uuid4().hex
        if verdicts is None:
            return self._order("armed", 0)
        acting = _acting(self.plan, verdicts)
        return None if acting is None else self._order("act", acting)

    def _order(self, mode: Any, branch: int) -> Order:
        scopes = self.span.scopes
        reach = tuple((scopes[edit.scope].low, scopes[edit.scope].high) for edit in self.plan.branches[branch])
        armed = mode == "armed"
        return Order(
            id=self.id,
            plan=self.name,
            digest=self.desk.book.digests[self.name],
            mode=mode,
            length=self.span.length,
            branch=branch,
            reach=reach,
            content=runs(self.span.content) if armed else (),
            branches=(0,) if armed else (),
        )

    def settle(self, found: Mapping[str, Any] | None) -> bool:
        """Whether the reply stands: False when an armed gate opened too late, so that it must be made again.

        Raises `SteeringNotAppliedError` for a reply of which nobody knows how it was made.
        """
        if not self.one_pass:
            return True
        if found is None or not found["decided"] or found["cached"]:
            raise SteeringNotAppliedError("the plan's gate did not read the whole prompt")
        score = next(iter(found["scores"].values()))
        self.desk.learn(self.plan, self.plan.gates[0], self.talks[0].windows[0], score)
        opens = _opens(score, self.plan.gates[0])
        if not found["late"] and opens != found["fired"]:
            raise SteeringNotAppliedError("what the gate scored and what was done are not the same")
        return not (found["late"] and opens)

    # ---- what was done ---------------------------------------------------------------------------------------

    def receipt(self, found: Mapping[str, Any] | None) -> dict[str, Any]:
        """From what the worker counted; None where it was told to do nothing.

        Raises `SteeringNotAppliedError` for a reply of which a part went past the hooks.
        """
        if found is not None and found["missed"]:
            raise SteeringNotAppliedError("a part of this reply was computed without going through the steered sites")
        verdicts = self.verdicts() or []
        acting = _acting(self.plan, verdicts)
        if found is None and acting is not None:
            raise SteeringNotAppliedError("the engine has no record of what it did to this reply")
        fired = [acting == branch for branch in range(max(len(verdicts), 1))]
        touched, norm = (found["touched"], found["norm"]) if found and acting is not None else (0, 0.0)
        receipt = make_receipt(self.plan, touched, norm, [v.score for v in verdicts], fired, self._turns(verdicts))
        reused = found["reused"] if found and acting is not None else 0
        return {
            **receipt_fields(Choice(self.name, self.plan), receipt),
            "tokens_reused": reused,
            "one_pass": self.one_pass,
        }

    def _turns(self, verdicts: Sequence[GateReading]) -> TurnsRead | None:
        if not self.plan.gates or not self.plan.gates[0].window or self.talks[0].whole:
            return None
        return TurnsRead(verdicts[0].turns, verdicts[0].turn, verdicts[0].beyond)


def _judged(gate: Gate, talk: Conversation, scores: Sequence[float]) -> GateReading:
    if gate.window and not talk.whole:
        return judge(gate, talk, scores)
    return GateReading(scores[0], 0, 1, False, _opens(scores[0], gate))


def _opens(score: float, gate: Gate) -> bool:
    """Of a prompt that is read as it stands: compared in float32, as wherever a pass decides."""
    return bool(np.float32(score) > np.float32(gate.threshold))


def _acting(plan: Plan, verdicts: Sequence[GateReading]) -> int | None:
    """The branch whose edits act. A plan without a gate always acts; a second branch where the first stayed shut."""
    if not plan.gates:
        return 0
    return next((branch for branch, verdict in enumerate(verdicts) if verdict.opens), None)
