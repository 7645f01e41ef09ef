"""What the page's events do, as Gradio calls them: values of components in, values or updates of components out.

Errors that a user can do something about are shown where the result would have been; nothing else is caught.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any

from clampdown.errors import ClampdownError
from clampdown.extras import extra
from clampdown.serving.studio import figures, markup
from clampdown.serving.studio.conversation import Conversation
from clampdown.serving.studio.handlers import LISTED, Controls, Handlers
from clampdown.serving.studio.links import Link
from clampdown.serving.studio.newest import Newest
from clampdown.serving.studio.settings import AS_PLANNED, operators_for
from clampdown.serving.studio.workbench import Tick, Workbench
from clampdown.steering.plan import Plan

with extra("studio", "the studio's page"):
    import gradio as gr

N_LOADED = 8
"""How many values `Actions.loaded` gives."""


class Actions:
    """The page's events on a workbench."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.handlers = Handlers(bench)
        self._ends = (0.0, 0.0)

    def threshold_range(self, plan: Plan) -> dict[str, Any]:
        """The threshold slider for a plan, in numbers that can be read; the plan's own threshold to its step.

        The ends never shrink: a browser may still send where the slider stood under the plan before, and Gradio refuses
        a value beyond the ends that have just been sent.
        """
        self._ends = _spanning(self._ends, self.handlers.span(plan))
        low, high = self._ends
        own, step = plan.gate.threshold if plan.gate else 0.0, self.handlers.step(plan)
        rounded = round(math.floor(low / step) * step, 3), round(math.ceil(high / step) * step, 3)
        return {"minimum": rounded[0], "maximum": rounded[1], "step": step, "value": round(own, 3)}

    def names(self, plan: Plan) -> list[str]:
        return list(dict.fromkeys((plan.name, *self.bench.plans.names())))

    # ---- the plan -----------------------------------------------------------------------------------

    def say_words(self, plan: Plan, *controls: Any) -> str:
        return self.handlers.words(plan, Controls(*controls))

    def load_named(self, name: str) -> list[Any]:
        try:
            return self.loaded(self.bench.plans.plan(name))
        except ClampdownError as error:
            return [gr.skip()] * (N_LOADED - 1) + [markup.notice(error.message, error.hint)]

    def loaded(self, plan: Plan) -> list[Any]:
        """Everything that shows a plan, for a plan just chosen: the controls go back to neutral."""
        own = plan.gate.threshold if plan.gate else 0.0
        controls = Controls(1.0, AS_PLANNED, AS_PLANNED, plan.gate is not None, own)
        return [
            plan,
            1.0,
            gr.update(choices=list(operators_for(plan)), value=AS_PLANNED),
            AS_PLANNED,
            gr.update(value=plan.gate is not None, interactive=plan.gate is not None),
            gr.update(**self.threshold_range(plan)),
            gr.update(choices=self.names(plan), value=plan.name),
            self.handlers.words(plan, controls),
        ]

    # ---- chat ---------------------------------------------------------------------------------------

    async def ask(self, said: str, talk: Conversation, plan: Plan, *rest: Any) -> AsyncIterator[list[Any]]:
        """Both answers to what was said, as they come. What went wrong is shown and the words are given back."""
        *controls, coloured, feature = rest
        if not said.strip():
            yield [talk, gr.skip(), gr.skip(), said]
            return
        by = int(feature) if coloured and feature is not None else None
        try:
            async for shown in self.handlers.ask(said.strip(), talk, plan, Controls(*controls), by):
                yield [shown.talk, shown.transcript, shown.legend, ""]
        except ClampdownError as error:
            before = markup.transcript(talk, starters=self.bench.starters)
            yield [talk, before, markup.notice(error.message, error.hint), said]

    async def ask_starter(
        self, event: gr.EventData, said: str, talk: Conversation, plan: Plan, *rest: Any
    ) -> AsyncIterator[list[Any]]:
        said = str(getattr(event, "say", None) or "")
        if not said:  # a click on something else in the transcript
            yield [gr.skip()] * 4
            return
        async for drawn in self.ask(said, talk, plan, *rest):
            yield drawn

    def look(self, event: gr.EventData, talk: Conversation, plan: Plan, *controls: Any) -> str:
        """The token that was clicked; nothing changes for a click on something else."""
        token = str(getattr(event, "token", None) or "")
        if not token:
            return gr.skip()  # type: ignore[return-value]
        try:
            return self.handlers.look(talk, plan, Controls(*controls), token)
        except ClampdownError as error:
            return markup.notice(error.message, error.hint)

    async def open_link(self, request: gr.Request, plan: Plan) -> AsyncIterator[list[Any]]:
        """What a link in the page's address asks for: its plan, its controls, and the questions, asked anew."""
        nothing = [gr.skip()] * (N_LOADED + 4)
        try:
            link = Link.read(dict(request.query_params))
            if link is None:
                yield nothing
                return
            found, controls = self.handlers.opened(link)
        except ClampdownError as error:
            yield [*nothing[:-2], markup.notice(error.message, error.hint), gr.skip()]
            return
        talk = Conversation()
        yield [*self._with_controls(found, controls), talk, *[gr.skip()] * 3]
        for said in link.said:
            async for drawn in self.ask(said, talk, found, *vars_of(controls), False, None):
                yield [*[gr.skip()] * N_LOADED, *drawn[:3], gr.skip()]
                talk = drawn[0]

    def _with_controls(self, plan: Plan, controls: Controls) -> list[Any]:
        """As `loaded`, with the controls where a link has them."""
        given = self.loaded(plan)
        given[1] = controls.multiple
        given[2] = gr.update(choices=list(operators_for(plan)), value=controls.operator)
        given[3] = controls.scope
        given[4] = gr.update(value=controls.gated, interactive=plan.gate is not None)
        at = self.threshold_range(plan)
        given[5] = gr.update(**{**at, "value": min(max(controls.threshold, at["minimum"]), at["maximum"])})
        given[7] = self.handlers.words(plan, controls)
        return given

    async def ask_again(self, said: str, talk: Conversation, plan: Plan, *rest: Any) -> AsyncIterator[list[Any]]:
        """The last question once more, with the controls as they are now, in place of its answers."""
        if talk.turns:
            last, earlier = talk.turns[-1].said, Conversation(talk.turns[:-1], talk.system)
            async for drawn in self.ask(last, earlier, plan, *rest):
                yield [*drawn[:3], said]

    def start_over(self) -> list[Any]:
        return [Conversation(), markup.transcript(Conversation(), starters=self.bench.starters), ""]

    def recolour(self, talk: Conversation, coloured: bool, feature: float | None) -> list[Any]:
        try:
            shown = self.handlers.show(talk, int(feature) if coloured and feature is not None else None)
        except ClampdownError as error:
            return [gr.skip(), markup.notice(error.message, error.hint)]
        return [shown.transcript, shown.legend]

    # ---- features -----------------------------------------------------------------------------------

    def open_features(self, query: str, sort: str | None, newest: Newest, at: float) -> list[Any]:
        newest.ask(at)
        return self._listed(query, sort, newest, at)

    def _listed(self, query: str, sort: str | None, newest: Newest, at: float) -> list[Any]:
        """How the list can be sorted, and the list. One that came late leaves the order that was chosen meanwhile."""
        explorer = self.bench.explorer
        if explorer is None:
            return [gr.skip(), '<p class="empty">There is no SAE here. Start with --sae.</p>']
        scores = list(explorer.scores)
        chosen = sort if sort in scores else next(iter(scores), None)
        order = gr.update(choices=scores) if sort and newest.passed(at) else gr.update(choices=scores, value=chosen)
        return [order, self.list_features(query, chosen, newest, at)]

    def list_features(self, query: str, sort: str | None, newest: Newest, at: float) -> str:
        newest.ask(at)
        if self.bench.explorer is None:
            return ""
        rows = self.bench.explorer.listed(query, sort or "")
        return newest.shows(at, markup.feature_list(rows[:LISTED], sort or "index", len(rows)))

    def features_on(self, words: str, newest: Newest, at: float) -> str:
        """Features that are active on somebody's own words."""
        explorer = self.bench.explorer
        if explorer is None or not words.strip():
            return gr.skip()  # type: ignore[return-value]
        newest.ask(at)
        try:
            rows = explorer.on_text(words.strip())
        except ClampdownError as error:
            return newest.shows(at, markup.notice(error.message, error.hint))
        return newest.shows(at, markup.feature_list(rows[:LISTED], "their largest activation on your words", len(rows)))

    def find_features(
        self,
        query: str,
        sort: str | None,
        newest: Newest,
        at: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        newest.ask(at)
        if self.bench.explorer is None:
            return self._listed(query, sort, newest, at)
        try:
            self.bench.explorer.find(ticking(progress, "Scoring features"))
        except ClampdownError as error:
            return [gr.skip(), newest.shows(at, markup.notice(error.message, error.hint))]
        return self._listed(query, sort if newest.passed(at) else None, newest, at)

    def show_card(self, event: gr.EventData, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        feature = int(getattr(event, "feature", 0))
        ready = gr.update(interactive=True)
        try:
            assert self.bench.explorer is not None, "without an explorer no feature is listed"
            card = self.bench.explorer.card(feature, ticking(progress, "Reading prompts"))
        except ClampdownError as error:
            return [markup.notice(error.message, error.hint), feature, ready, ready]
        return [markup.card_frame(card, feature), feature, ready, ready]

    def steer_with(self, feature: int, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        assert self.bench.explorer is not None, "without an explorer no feature is listed"
        try:
            return self.loaded(self.bench.explorer.steer(feature, ticking(progress, "Calibrating")))
        except ClampdownError as error:
            return [gr.skip()] * (N_LOADED - 1) + [markup.notice(error.message, error.hint)]

    # ---- frontier -----------------------------------------------------------------------------------

    def open_frontier(self, run: str | None) -> list[Any]:
        names = [found.name for found in self.bench.runs.runs()]
        chosen = run if run in names else next(iter(names), None)
        return [gr.update(choices=names, value=chosen), self.draw_frontier(chosen)]

    def draw_frontier(self, run: str | None, chosen: str = "") -> str:
        found = next((each for each in self.bench.runs.runs() if each.name == run), None)
        if found is None:
            return '<p class="empty">No runs yet. Make one: <code>clampdown demo --out runs/demo</code></p>'
        return figures.frontier(found, chosen)

    def load_point(self, run: str, event: gr.EventData) -> list[Any]:
        arm = str(getattr(event, "arm", ""))
        try:
            plan = self.bench.runs.plan(run, arm)
        except ClampdownError as error:
            return [gr.skip()] * N_LOADED + [markup.notice(error.message, error.hint)]
        return [*self.loaded(plan), self.draw_frontier(run, arm)]

    # ---- gate and keeping ---------------------------------------------------------------------------

    def draw_gate(self, plan: Plan, threshold: float) -> str:
        return self.handlers.gate_panel(plan, threshold)

    def read_scores(self, plan: Plan, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        try:
            self.handlers.read_scores(plan, ticking(progress, "Reading prompts"))
        except ClampdownError as error:
            return [markup.notice(error.message, error.hint), gr.skip()]
        at = self.threshold_range(plan)
        return [self.handlers.gate_panel(plan, at["value"]), gr.update(**at)]

    def keep(self, name: str, plan: Plan, *controls: Any) -> list[Any]:
        try:
            kept, said = self.handlers.save(name, plan, Controls(*controls))
        except ClampdownError as error:
            return [gr.skip()] * N_LOADED + [markup.notice(error.message, error.hint)]
        return [*self.loaded(kept), f'<p class="done" role="status">{markup.text(said)}</p>']

    def show_code(self, plan: Plan, *rest: Any) -> tuple[str, str, str]:
        *controls, talk = rest
        try:
            code = self.handlers.code(plan, Controls(*controls), talk)
        except ClampdownError as error:
            code = f"# {error.message}", f"# {error.message}"
        try:
            return *code, self.handlers.link(talk, plan, Controls(*controls))
        except ClampdownError as error:
            return *code, f"{error.message}: {error.hint}" if error.hint else error.message


def vars_of(controls: Controls) -> tuple[Any, ...]:
    """The controls in the order in which the page sends them."""
    return tuple(getattr(controls, each.name) for each in fields(controls))


def _spanning(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """From the lower of both ends to the higher."""
    return min(one[0], other[0]), max(one[1], other[1])


def ticking(progress: gr.Progress, what: str) -> Tick:
    """Gradio's progress as the jobs know it."""

    def tick(done: int, total: int) -> None:
        progress((done, total), desc=what)

    progress(0.0, desc=what)
    return tick
