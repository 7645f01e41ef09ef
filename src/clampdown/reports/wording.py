"""Numbers and names as the report and the terminal tables write them."""

from __future__ import annotations

from collections.abc import Iterable

from clampdown.results.rows import ArmResult
from clampdown.types import ArmKind, Interval

MISSING = "n/a"
UNIT = "\u00a0%"
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
SUITE_TITLES = {
    "harmful": "harmful",
    "jailbroken_seen": "jailbreaks, seen families",
    "jailbroken_unseen": "jailbreaks, unseen families",
    "multi_turn": "multi-turn attacks",
    "borderline": "borderline but safe",
    "about_harm": "questions about harm",
    "benign": "benign",
}

SYSTEM_PROMPT = "system prompt"

KIND_TITLES = {
    ArmKind.BASELINE: "baseline",
    ArmKind.FEATURE: "steered feature",
    ArmKind.DIRECTION: "dense direction",
    ArmKind.CONTROL: "control",
    ArmKind.GATED: "behind a gate",
    ArmKind.TUNED: "tuned plan",
}


def suite_title(name: str) -> str:
    return SUITE_TITLES.get(name, name.replace("_", " "))


def percent(value: float | None, *, unit: str = UNIT, digits: int = 0) -> str:
    """A share as a percentage. 100 and 0 are said only of exact ones and zeros: 0.998 is >99 %, 0.001 is <1 %."""
    if value is None:
        return MISSING
    step = 10.0**-digits
    shown = round(100 * value, digits)
    if shown >= 100 and value < 1:
        return f">{100 - step:.{digits}f}{unit}"
    if shown <= 0 < value:
        return f"<{step:.{digits}f}{unit}"
    return f"{shown:.{digits}f}{unit}"


def span(interval: Interval, *, digits: int = 0) -> str:
    """The interval's bounds as percentages without the unit, or nothing when they are unknown."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{100 * interval.low:.{digits}f}{DASH}{100 * interval.high:.{digits}f}"


def full(interval: Interval, *, with_n: bool = True) -> str:
    """A share with its interval and n: 95 % [91 to 97], n = 240, with a dash."""
    text = percent(interval.value)
    if span(interval):
        text += f" [{span(interval)}]"
    return f"{text}, n = {interval.n}" if with_n and interval.n else text


def sample_sizes(intervals: Iterable[Interval | None]) -> str:
    """n = 120, or a range when the intervals differ in n."""
    sizes = sorted({interval.n for interval in intervals if interval is not None})
    if not sizes:
        return ""
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]}{DASH}{sizes[-1]}"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without trailing noise; whole numbers from a thousand on."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


def what_it_is(arm: ArmResult) -> str:
    """The kind of an arm in words. Asking in a system prompt is the control that anybody can try: it has its own."""
    return SYSTEM_PROMPT if is_asked(arm) else KIND_TITLES[arm.kind]


def is_asked(arm: ArmResult) -> bool:
    """Whether the model was only asked, in a system prompt."""
    return arm.system_prompt is not None and arm.plan is None
