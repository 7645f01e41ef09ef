"""What happens when somebody uses the page. No component is named here: values in, values out (`page.py` wires them).

What a visitor did (the plan, the conversation, the run that is shown) lies in the page's own state, one per visitor.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from clampdown.errors import ClampdownError, PlanError, RequestError
from clampdown.models.chat import encode
from clampdown.serving.requests import Request, Sampling
from clampdown.serving.studio import figures, markup, snippets
from clampdown.serving.studio.conversation import BASELINE, SIDES, STEERED, Answer, Conversation, Turn, ask_both
from clampdown.serving.studio.gates import GateScores, promise
from clampdown.serving.studio.links import Link, said_in
from clampdown.serving.studio.reading import look
from clampdown.serving.studio.settings import AS_PLANNED, Settings, adjusted, checked_name, operators_for
from clampdown.serving.studio.tokens import Colours, colour
from clampdown.serving.studio.workbench import Tick, Workbench
from clampdown.steering.plan import Gate, Plan
from clampdown.steering.scopes import SCOPES
from clampdown.steering.units import in_words
from clampdown.store import content_hash

REDRAW_SECONDS = 0.08
LISTED = 60
MOST = 3.0


@dataclass(frozen=True, slots=True)
class Controls:
    """The controls' values as the page sends them."""

    multiple: float
    operator: str
    scope: str
    gated: bool
    threshold: float


@dataclass(frozen=True, slots=True)
class Shown:
    """What is drawn of a conversation: the transcript and the legend of its colours."""

    talk: Conversation
    transcript: str
    legend: str


class Handlers:
    """The page's actions on a workbench. Gate scores are read once per gate and kept."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self._scores: dict[str, GateScores] = {}
        self._reading = threading.Lock()

    # ---- the plan --------------------------------------------------------------------------------------------

    def steering(self, plan: Plan, controls: Controls) -> Plan:
        """The plan that the controls make. Raises `PlanError`."""
        moved = self.moved(plan, controls.threshold)
        scores = self.known_scores(plan)
        guarantee = promise(scores, controls.threshold).guarantee if moved and scores else None
        settings = Settings(
            controls.multiple,
            controls.operator,
            controls.scope,
            controls.gated,
            controls.threshold if moved else None,
            guarantee,
        )
        return adjusted(plan, settings)

    def moved(self, plan: Plan, threshold: float) -> bool:
        """Whether the slider was moved away from the plan's threshold, which it can only show to its own step."""
        return plan.gate is not None and abs(threshold - plan.gate.threshold) > self.step(plan)

    def step(self, plan: Plan) -> float:
        """The threshold slider's step: about a four-hundredth of its span, and a number that can be read."""
        low, high = self.span(plan)
        return max(0.001, round((high - low) / 400, 2) or round((high - low) / 400, 3))

    def span(self, plan: Plan) -> tuple[float, float]:
        """The threshold slider's ends: all scores that are known, and the plan's own threshold."""
        if plan.gate is None:
            return 0.0, 1.0
        scores, own = self.known_scores(plan), plan.gate.threshold
        low, high = scores.span if scores else (own - 1.0, own + 1.0)
        return min(low, own), max(high, own)

    def words(self, plan: Plan, controls: Controls) -> str:
        """What will be done, in words."""
        try:
            steering = self.steering(plan, controls)
        except ClampdownError as error:
            return markup.notice(error.message, error.hint)
        return markup.plan_words(steering, [in_words(edit) for edit in steering.edits])

    # ---- the conversation ------------------------------------------------------------------------------------

    async def ask(
        self, said: str, talk: Conversation, plan: Plan, controls: Controls, feature: int | None
    ) -> AsyncIterator[Shown]:
        """The conversation with one more turn, as its answers grow. `feature` colours the tokens of a whole one."""
        steering = self.steering(plan, controls)
        turn = Turn(said).with_answer(STEERED, Answer(plan=steering.name))
        talk = replace(talk, turns=(*talk.turns, turn))
        yield Shown(talk, markup.transcript(talk), "")
        plans = {BASELINE: None, STEERED: steering}
        requests = {side: self._request(talk, side, plans[side]) for side in SIDES}
        drawn = time.monotonic()
        async for grown in ask_both(self.bench.engine, requests, turn):
            talk = talk.with_last(grown)
            if time.monotonic() - drawn > REDRAW_SECONDS:
                yield Shown(talk, markup.transcript(talk), "")
                drawn = time.monotonic()
        yield self.show(talk, feature)

    def _request(self, talk: Conversation, side: str, plan: Plan | None) -> Request:
        prompt = tuple(encode(self.bench.lm, talk.messages(side)))
        return Request(f"studio-{uuid.uuid4().hex[:12]}", prompt, plan, Sampling(self.bench.max_tokens))

    def show(self, talk: Conversation, feature: int | None) -> Shown:
        """The conversation, in colour if a feature is given."""
        found = self.colours(talk, feature)
        legend = markup.legend(found.values())
        return Shown(talk, markup.transcript(talk, found, starters=self.bench.starters), legend)

    def colours(self, talk: Conversation, feature: int | None) -> dict[str, Colours]:
        """Activations on both sides. Raises `FeatureIndexError`, `PlanError` without an SAE."""
        if feature is None or not talk.turns:
            return {}
        if self.bench.sae is None:
            raise PlanError("there is no SAE here, so no feature to colour by", hint="start with --sae")
        return {side: colour(self.bench.lm, self.bench.sae, feature, talk.messages(side)) for side in SIDES}

    def look(self, talk: Conversation, plan: Plan, controls: Controls, token: str) -> str:
        """What the model holds at a token of the transcript, "side:number". Raises `PlanError`, `RequestError`."""
        side, _, place = token.partition(":")
        if self.bench.sae is None or side not in SIDES or not place.isdigit() or not talk.turns:
            raise PlanError("there is no such token here", hint="colour the tokens, and click one")
        with self._reading:
            found = look(self.bench.lm, self.bench.sae, self.steering(plan, controls), talk.messages(side), int(place))
        return markup.looked(found, side)

    def link(self, talk: Conversation, plan: Plan, controls: Controls) -> str:
        """The address of this conversation with its plan. Raises `PlanError` for a plan without a name here."""
        if plan.name not in self.bench.plans.names():
            raise PlanError("a link names its plan, and this one has no name here", hint="save it first")
        moved = controls.threshold if self.moved(plan, controls.threshold) else None
        held = Link(
            plan=plan.name,
            said=said_in(talk),
            multiple=float(controls.multiple),
            operator=controls.operator,
            scope=controls.scope,
            gated=controls.gated,
            threshold=moved,
        )
        return held.address(f"{self.bench.url}/studio/")

    def opened(self, link: Link) -> tuple[Plan, Controls]:
        """The plan and the controls that a link asks for. Raises `PlanError`, `RequestError` for controls that the page
        does not have."""
        plan = self.bench.plans.plan(link.plan)
        known = link.operator in operators_for(plan) and link.scope in (AS_PLANNED, *SCOPES)
        if not known or not 0 <= link.multiple <= MOST:
            raise RequestError("this link asks for controls that the page does not have")
        own = plan.gate.threshold if plan.gate else 0.0
        gated = link.gated and plan.gate is not None
        threshold = own if link.threshold is None else link.threshold
        return plan, Controls(link.multiple, link.operator, link.scope, gated, threshold)

    # ---- the gate --------------------------------------------------------------------------------------------

    def known_scores(self, plan: Plan) -> GateScores | None:
        return None if plan.gate is None else self._scores.get(_gate_key(plan, plan.gate))

    def read_scores(self, plan: Plan, tick: Tick) -> GateScores:
        """The gate's scores, read at the first call. Raises `PlanError` for a plan without a gate."""
        if plan.gate is None:
            raise PlanError("this plan has no gate: it steers every conversation", hint="choose a gated plan")
        key = _gate_key(plan, plan.gate)
        if key not in self._scores:
            self._scores[key] = self.bench.gate_scores(plan, tick)
        return self._scores[key]

    def gate_panel(self, plan: Plan, threshold: float) -> str:
        """The scores' picture and the guarantee at this threshold."""
        scores = self.known_scores(plan)
        if plan.gate is None:
            return '<p class="empty">This plan has no gate: it steers every conversation.</p>'
        if scores is None:
            return markup.stated_guarantee(plan.gate)
        moved = self.moved(plan, threshold)
        at = threshold if moved else plan.gate.threshold
        return figures.gate_scores(scores, at) + figures.gate_words(promise(scores, at), own=not moved)

    # ---- keeping it ------------------------------------------------------------------------------------------

    def save(self, name: str, plan: Plan, controls: Controls) -> tuple[Plan, str]:
        """Keep what the controls make under a name; returns it, and what to say."""
        steering = self.steering(plan, controls)
        kept = steering.named(checked_name(name))
        where = self.bench.plans.save(kept.name, kept)
        return kept, f"Saved as {where}."

    def code(self, plan: Plan, controls: Controls, talk: Conversation) -> tuple[str, str]:
        """curl and Python for what the controls make. Raises `PlanError`."""
        steering = self.steering(plan, controls)
        offered = self.bench.plans.offered(steering)
        same_gate = steering.gate is not None and plan.gate == steering.gate
        target = snippets.Target(
            self.bench.url, self.bench.model, offered, self.bench.plans.offered(plan) if same_gate else None
        )
        asked = talk.turns[-1].said if talk.turns else (self.bench.starters or ("Hello.",))[0]
        return snippets.curl(target, steering, asked), snippets.python(target, steering, asked)


def _gate_key(plan: Plan, gate: Gate) -> str:
    """What the scores depend on: everything of the gate but its threshold."""
    vectors = {name: plan.vectors[name] for name in gate.vectors}
    return content_hash([gate.model_dump(mode="json", exclude={"threshold", "guarantee"}), vectors])
