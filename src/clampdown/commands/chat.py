"""`clampdown chat`: the baseline's and the steered answer to the same conversation, side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from clampdown.config import ORGANISM
from clampdown.errors import ChatTemplateError
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import OpenedSae, open_sae
from clampdown.steering.arms import BASELINE, Arm, Reply, generate_arms
from clampdown.steering.plan import Plan, read_plan
from clampdown.steering.program import check_plan
from clampdown.steering.selftest import require_self_test
from clampdown.types import ArmKind, Message, Prompt, Receipt, Site

SIDE_BY_SIDE_WIDTH = 72


@dataclass
class Session:
    """One conversation. Each side keeps its own history: after a refusal the two may go different ways."""

    lm: LanguageModel
    saes: list[OpenedSae]
    arms: tuple[Arm, ...]
    system: str | None
    max_new_tokens: int
    histories: dict[str, list[Message]] = field(default_factory=dict)

    def ask(self, text: str) -> list[Reply]:
        """Both answers to the next user turn, generated in one batch."""
        pairs = [(arm, self._prompt(arm, text)) for arm in self.arms]
        replies = generate_arms(self.lm, self.saes, pairs, max_new_tokens=self.max_new_tokens)
        for reply in replies:
            history = self.histories.setdefault(reply.arm.name, [])
            history += [Message("user", text), Message("assistant", reply.text)]
        return sorted(replies, key=lambda reply: self.arms.index(reply.arm))

    def _prompt(self, arm: Arm, text: str) -> Prompt:
        start = [Message("system", self.system)] if self.system else []
        messages = (*start, *self.histories.get(arm.name, []), Message("user", text))
        return Prompt(id=arm.name, messages=messages, suite="chat")


def open_session(
    model: str | None, sae: str | None, plan_file: Path | None, *, system: str | None, max_new_tokens: int
) -> Session:
    """Load what the chat needs, and try the plan on it.

    Raises `PlanMismatchError` when it was made for something else, `SteeringNotAppliedError` when it does not act.
    """
    if plan_file is None:
        return Session(load_model(model or ORGANISM), [], (BASELINE,), system, max_new_tokens)
    plan = read_plan(plan_file)
    lm = load_model(model or plan.model.name)
    saes = [open_sae(sae or ref.name, device=str(lm.device), site=Site.parse(ref.site)) for ref in plan.saes]
    check_plan(plan, lm, {loaded.cfg.site.name: loaded for loaded in saes})
    require_self_test(lm, plan, saes)
    return Session(lm, saes, (BASELINE, steered_arm(plan)), system, max_new_tokens)


def steered_arm(plan: Plan) -> Arm:
    """The plan's side. Histories and titles go by name, so a plan cannot have the baseline's."""
    name = f"{plan.name} (steered)" if plan.name == BASELINE.name else plan.name
    return Arm(name, ArmKind.FEATURE, plan)


def side_by_side(replies: list[Reply], width: int) -> RenderableType:
    """Both answers; under one another where the terminal is narrow."""
    panels = [Panel(_body(reply), title=Text(reply.arm.name), border_style=_colour(reply)) for reply in replies]
    if width < SIDE_BY_SIDE_WIDTH or len(panels) == 1:
        return Group(*panels)
    grid = Table.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _colour(reply: Reply) -> str:
    return "cyan" if reply.arm.plan else "white"


def _body(reply: Reply) -> RenderableType:
    return Group(Text(reply.text or "(empty)"), Text(_proof(reply.receipt), style="dim"))


def _proof(receipt: Receipt | None) -> str:
    """What the receipt says, in words."""
    if receipt is None:
        return "not steered"
    gate = "" if receipt.gate_fired is None else f"gate {'fired' if receipt.gate_fired else 'did not fire'}, "
    if not receipt.tokens_touched:
        return f"{gate}no token changed"
    gate += "" if receipt.factor is None else f"at {receipt.factor:.0%} of its strength, "
    return f"{gate}{receipt.tokens_touched} tokens changed by {receipt.edit_norm:.0%} on average"


def talk(session: Session, console: Console) -> None:
    """Read turns until an empty line, /quit or end of input. /new starts over."""
    console.print("[dim]An empty line or /quit ends; /new starts a new conversation.[/dim]")
    while True:
        try:
            text = console.input("[bold]you[/bold] ").strip()
        except EOFError:
            return
        if text in ("", "/quit"):
            return
        if text == "/new":
            session.histories.clear()
            continue
        try:
            console.print(side_by_side(session.ask(text), console.width))
        except ChatTemplateError as error:
            console.print(Text(error.message, style="red"))
