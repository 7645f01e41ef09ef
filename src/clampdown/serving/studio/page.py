"""The page itself: components, and which of them wakes which handler.

Own HTML with buttons stands where Gradio's components would need a mouse or fetch something: lists, points and the
transcript. A click inside sends what the button holds (`data-...`), and nothing else of the page is known to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clampdown.extras import extra
from clampdown.serving.studio import markup
from clampdown.serving.studio.actions import Actions
from clampdown.serving.studio.conversation import Conversation
from clampdown.serving.studio.handlers import MOST, Controls
from clampdown.serving.studio.newest import ASKED, Newest
from clampdown.serving.studio.settings import AS_PLANNED, operators_for
from clampdown.serving.studio.workbench import Workbench
from clampdown.steering.scopes import SCOPES

with extra("studio", "the studio's page"):
    import gradio as gr

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUIET: dict[str, Any] = {**PRIVATE, "show_progress": "hidden"}
CLICKS = """
const send = (event) => {
  for (const key of '%(keys)s'.split(' ')) {
    const button = event.target.closest('[data-' + key + ']');
    if (button) { trigger('click', Object.fromEntries([[key, button.dataset[key]]])); return true; }
  }
  return false;
};
element.addEventListener('click', send);
element.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && event.target.tagName !== 'BUTTON' && send(event)) event.preventDefault();
});
"""


def clickable(keys: str, value: str, **options: Any) -> gr.HTML:
    """HTML whose buttons with `data-KEY`, of any of these keys, send what they hold."""
    return gr.HTML(value, js_on_load=CLICKS % {"keys": keys}, **options)


@dataclass(frozen=True, slots=True)
class Steering:
    """The controls of the plan, and what they say."""

    plan: gr.State
    chosen: gr.Dropdown
    words: gr.HTML
    multiple: gr.Slider
    operator: gr.Dropdown
    scope: gr.Dropdown
    gated: gr.Checkbox
    threshold: gr.Slider

    @property
    def values(self) -> list[Any]:
        """What handlers get to know the steering: the plan and the controls."""
        return [self.plan, self.multiple, self.operator, self.scope, self.gated, self.threshold]

    @property
    def loaded(self) -> list[Any]:
        """What changes when another plan is chosen."""
        return [*self.values, self.chosen, self.words]


def build(bench: Workbench) -> gr.Blocks:
    """The page. Nothing is read or computed before somebody asks for it."""
    page = Page(bench)
    with gr.Blocks(title="clampdown studio", analytics_enabled=False) as blocks:
        page.lay_out()
        page.wire(blocks)
    return blocks


class Page:
    """Components by name, made by `lay_out` and tied together by `wire`."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.act = Actions(bench)
        self.handlers = self.act.handlers

    # ---- layout ----------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        self.talk = gr.State(Conversation())
        sae = f" · SAE {self.bench.sae.name} at {self.bench.sae.cfg.site.name}" if self.bench.sae else ""
        gr.HTML(f'<header class="top"><h1>clampdown studio</h1><p>{markup.text(self.bench.lm.name + sae)}</p></header>')
        with gr.Row(elem_classes="desk"):
            with gr.Column(scale=5, min_width=300), gr.Tabs():
                with gr.Tab("Chat", id="chat"):
                    self._lay_out_chat()
                with gr.Tab("Features", id="features") as self.features_tab:
                    self._lay_out_features()
                with gr.Tab("Frontier", id="frontier") as self.frontier_tab:
                    self._lay_out_frontier()
                with gr.Tab("Gate", id="gate") as self.gate_tab:
                    self._lay_out_gate()
                with gr.Tab("Keep", id="keep") as self.keep_tab:
                    self._lay_out_keep()
            with gr.Column(scale=2, min_width=260, elem_classes="controls"):
                self._lay_out_steering()

    def _lay_out_chat(self) -> None:
        empty = markup.transcript(Conversation(), starters=self.bench.starters)
        self.transcript = clickable("say token", empty, elem_id="transcript")
        self.legend = gr.HTML("", elem_id="legend")
        self.looked = gr.HTML("", elem_id="looked")
        with gr.Row(elem_classes="ask"):
            self.said = gr.Textbox(
                placeholder="Ask both sides. Enter sends.",
                label="Your message",
                show_label=False,
                container=False,
                scale=6,
                min_width=160,
                elem_id="said",
            )
            self.send = gr.Button("Ask", variant="primary", scale=1, min_width=70, elem_id="send")
        with gr.Row(elem_classes="after"):
            self.again = gr.Button("Ask again", size="sm", min_width=90, elem_id="again")
            self.new = gr.Button("New conversation", size="sm", min_width=120, elem_id="new")
        with gr.Row(elem_classes="colour"):
            self.coloured = gr.Checkbox(label="Colour tokens by feature", scale=2, min_width=170, elem_id="coloured")
            first = next((f for edit in self.bench.first.edits for f in edit.features), 0)
            self.feature = gr.Number(
                first, label="Feature", show_label=False, container=False, precision=0, minimum=0, scale=1,
                min_width=90, elem_id="feature",
            )  # fmt: skip

    def _lay_out_features(self) -> None:
        self.newest, self.asked = gr.State(Newest()), gr.Number(0.0, visible=False)
        with gr.Row():
            self.query = gr.Textbox(
                label="Search", placeholder="a number, or a token it promotes", scale=3, min_width=150, elem_id="query"
            )
            self.sort = gr.Dropdown([], label="Sort by", scale=2, min_width=150, elem_id="sort")
        self.words = gr.Textbox(
            label="Or by your own words",
            placeholder="features that are active on what you type; Enter",
            max_length=2000,
            elem_id="by-words",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                self.features = clickable("feature", "", elem_id="features")
                self.find = gr.Button("Score the features", size="sm", elem_id="find")
            with gr.Column(scale=3, min_width=280):
                self.shown_feature = gr.State(None)
                self.card = gr.HTML('<p class="empty">Choose a feature to see its card.</p>', elem_id="card")
                with gr.Row():
                    self.colour_by = gr.Button("Colour tokens by it", size="sm", min_width=130, interactive=False)
                    self.steer_it = gr.Button("Steer with it", size="sm", min_width=110, interactive=False)

    def _lay_out_frontier(self) -> None:
        self.run = gr.Dropdown([], label="Run", elem_id="run")
        self.frontier = clickable("arm", "", elem_id="frontier")

    def _lay_out_gate(self) -> None:
        self.gate = gr.HTML("", elem_id="gate")
        at = self.act.threshold_range(self.bench.first)
        self.threshold = gr.Slider(**at, label="Threshold", interactive=True, elem_id="threshold")
        with gr.Row():
            self.read = gr.Button("Read the prompts", size="sm", min_width=130, elem_id="read")
            self.back = gr.Button("Back to the plan's", size="sm", min_width=130, elem_id="back")

    def _lay_out_keep(self) -> None:
        with gr.Row(elem_classes="keep"):
            self.name = gr.Textbox(
                label="Name", placeholder="a name for this plan", scale=3, min_width=160, elem_id="name"
            )
            self.save = gr.Button("Save the plan", variant="primary", scale=1, min_width=120, elem_id="save")
        self.saved = gr.HTML("", elem_id="saved")
        self.link = gr.Textbox(label="Link to this conversation", interactive=False, max_lines=3, elem_id="link")
        self.curl = gr.Code(label="curl", language="shell", interactive=False, elem_id="curl")
        self.python = gr.Code(label="Python", language="python", interactive=False, elem_id="python")

    def _lay_out_steering(self) -> None:
        plan = self.bench.first
        gr.HTML("<h2>Steering</h2>")
        controls = Controls(1.0, AS_PLANNED, AS_PLANNED, True, self.threshold.value)
        self.steering = Steering(
            plan=gr.State(plan),
            chosen=gr.Dropdown(self.act.names(plan), value=plan.name, label="Plan", elem_id="plan"),
            words=gr.HTML(self.handlers.words(plan, controls), elem_id="words"),
            multiple=gr.Slider(
                0, MOST, 1, step=0.05, label="Strength", info="times the plan's own", elem_id="multiple"
            ),
            operator=gr.Dropdown(list(operators_for(plan)), value=AS_PLANNED, label="Operator", elem_id="operator"),
            scope=gr.Dropdown([AS_PLANNED, *SCOPES], value=AS_PLANNED, label="Scope", elem_id="scope"),
            gated=gr.Checkbox(plan.gate is not None, label="Gate", interactive=plan.gate is not None, elem_id="gated"),
            threshold=self.threshold,
        )

    # ---- wiring ----------------------------------------------------------------------------------------------

    def wire(self, blocks: gr.Blocks) -> None:
        self._wire_steering()
        self._wire_chat()
        self._wire_features(blocks)
        self._wire_frontier(blocks)
        self._wire_gate()
        self._wire_keep()
        opened = [*self.steering.loaded, self.talk, self.transcript, self.legend, self.said]
        blocks.load(self.act.open_link, self.steering.plan, opened, concurrency_limit=None, **QUIET)

    def _wire_steering(self) -> None:
        s = self.steering
        for control in (s.multiple, s.operator, s.scope, s.gated, s.threshold):
            control.change(self.act.say_words, s.values, s.words, **QUIET)
        s.chosen.input(self.act.load_named, s.chosen, s.loaded, **QUIET)

    def _wire_chat(self) -> None:
        drawn = [self.talk, self.transcript, self.legend, self.said]
        given = [self.said, self.talk, *self.steering.values, self.coloured, self.feature]
        gr.on([self.said.submit, self.send.click], self.act.ask, given, drawn, concurrency_limit=None, **QUIET)
        self.transcript.click(self.act.ask_starter, given, drawn, concurrency_limit=None, **QUIET)
        self.transcript.click(self.act.look, [self.talk, *self.steering.values], self.looked, **QUIET)
        self.again.click(self.act.ask_again, given, drawn, concurrency_limit=None, **QUIET)
        self.new.click(self.act.start_over, None, drawn[:3], **QUIET)
        for control in (self.coloured.change, self.feature.change):
            control(self.act.recolour, [self.talk, self.coloured, self.feature], drawn[1:3], **QUIET)

    def _wire_features(self, blocks: gr.Blocks) -> None:
        asked = [self.newest, self.asked]
        given, listed = [self.query, self.sort, *asked], [self.sort, self.features]
        self.features_tab.select(self.act.open_features, given, listed, js=ASKED, **PRIVATE)
        for control in (self.query.change, self.sort.input):
            control(self.act.list_features, given, self.features, js=ASKED, **QUIET)
        card = [self.card, self.shown_feature, self.colour_by, self.steer_it]
        self.features.click(self.act.show_card, None, card, **PRIVATE)
        self.words.submit(self.act.features_on, [self.words, *asked], self.features, js=ASKED, **QUIET)
        self.find.click(self.act.find_features, given, listed, js=ASKED, **PRIVATE)
        self.colour_by.click(lambda f: (f, True), self.shown_feature, [self.feature, self.coloured], **QUIET)
        self.steer_it.click(self.act.steer_with, self.shown_feature, self.steering.loaded, **PRIVATE)

    def _wire_frontier(self, blocks: gr.Blocks) -> None:
        self.frontier_tab.select(self.act.open_frontier, self.run, [self.run, self.frontier], **QUIET)
        self.run.input(self.act.draw_frontier, self.run, self.frontier, **QUIET)
        self.frontier.click(self.act.load_point, self.run, [*self.steering.loaded, self.frontier], **QUIET)

    def _wire_gate(self) -> None:
        s = self.steering
        self.gate_tab.select(self.act.draw_gate, [s.plan, s.threshold], self.gate, **QUIET)
        s.threshold.change(self.act.draw_gate, [s.plan, s.threshold], self.gate, **QUIET)
        self.read.click(self.act.read_scores, s.plan, [self.gate, s.threshold], **PRIVATE)
        self.back.click(lambda plan: self.act.threshold_range(plan)["value"], s.plan, s.threshold, **QUIET)

    def _wire_keep(self) -> None:
        s = self.steering
        code = [self.curl, self.python, self.link]
        self.keep_tab.select(self.act.show_code, [*s.values, self.talk], code, **QUIET)
        for control in (s.multiple, s.operator, s.scope, s.gated):
            control.change(self.act.show_code, [*s.values, self.talk], code, **QUIET)
        gr.on(
            [self.save.click, self.name.submit], self.act.keep, [self.name, *s.values], [*s.loaded, self.saved], **QUIET
        ).then(self.act.show_code, [*s.values, self.talk], code, **QUIET)
