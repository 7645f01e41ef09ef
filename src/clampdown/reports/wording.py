"""Numbers as people read them, and the plain-language verdict.

The verdict is generated, so it must be right for any run: a change counts as one only when the interval of the paired
difference on the same prompts excludes zero, and a sentence whose numbers are missing is left out. `**` marks what the
page sets in bold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clampdown.reports.comparison import controls, headline
from clampdown.results.points import UNSEEN_JAILBREAKS, Point, Sides, change, mean, point, suite_change
from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import ArmKind, Interval

MISSING = "n/a"
UNIT = "\u00a0%"
DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
CLOSE = 0.02
MANY_CONTROLS = 4
CLAMPING = frozenset({"clamp", "clamp_active", "floor"})

SUITE_TITLES = {
    "harmful": "harmful",
    "jailbroken_seen": "jailbreaks, seen families",
    "jailbroken_unseen": "jailbreaks, unseen families",
    "multi_turn": "multi-turn attacks",
    "borderline": "borderline but safe",
    "about_harm": "questions about harm",
    "benign": "benign",
}

KIND_TITLES = {
    ArmKind.BASELINE: "baseline",
    ArmKind.FEATURE: "clamped feature",
    ArmKind.DIRECTION: "dense direction",
    ArmKind.CONTROL: "control",
    ArmKind.GATED: "conditional",
    ArmKind.TUNED: "tuned plan",
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of the verdict and the word that stands beside it."""

    label: str
    text: str


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


def short_name(arm: ArmResult) -> str:
    """What the tiles call an arm."""
    names = {ArmKind.BASELINE: "Baseline", ArmKind.GATED: "Conditional"}
    if arm.kind is ArmKind.FEATURE:
        return "Clamp" if steering_word(arm) == "Clamping" else "Steered"
    return names.get(arm.kind, "Tuned" if arm.kind is ArmKind.TUNED else arm.name)


def title(run: Run, sides: Sides) -> str:
    """The whole run in one line, claimed only as far as the intervals carry it."""
    found = headline(run, sides)
    if found.baseline is None or found.clamp is None:
        return "What each arm refuses, and what it can still do"
    before, clamp = point(found.baseline, sides), point(found.clamp, sides)
    what = steering_word(found.clamp)
    if _direction(_key_change(found.clamp, found.baseline, sides)) <= 0:
        return f"{what} did not measurably raise refusals of attacks"
    if not _is_worse(clamp, before):
        return f"{what} raises refusals; no cost was measured"
    resolved = found.tuned or found.gated
    if resolved is None:
        return f"{what} trades good answers for refusals"
    return _resolved_title(what, point(resolved, sides), before)


def steering_word(arm: ArmResult) -> str:
    """What the arm does, to begin a sentence with: not every operator clamps."""
    return "Clamping" if arm.operator is None or arm.operator in CLAMPING else "Steering"


def _resolved_title(doing: str, after: Point, before: Point) -> str:
    what = "the tuned plan" if after.arm.kind is ArmKind.TUNED else "conditional steering"
    start = f"{doing} trades good answers for refusals; {what}"
    if _direction(change(after, before, "refusal")) <= 0:
        return f"{start} loses the gain"
    capability = change(after, before, "capability").value
    if capability is not None and capability < -CLOSE:
        return f"{start} lowers the price"
    if _direction(change(after, before, "over_refusal")) > 0:
        return f"{start} spares capability, not every borderline prompt"
    return f"{start} keeps both"


def verdict(run: Run, sides: Sides) -> list[Sentence]:
    """The trade-off in two to five labelled sentences, with n and intervals."""
    found = headline(run, sides)
    if found.baseline is None:
        text = "This run has no baseline arm, so nothing can be compared; the tables below show each arm by itself."
        return [Sentence("Note", text)]
    before = point(found.baseline, sides)
    sentences = []
    if found.clamp is not None:
        sentences += [
            Sentence("Gain", _gain(run, found.clamp, found.baseline, sides)),
            _cost(point(found.clamp, sides), before),
        ]
    for arm, label in ((found.gated, "Conditional"), (found.tuned, "Tuned")):
        if arm is not None:
            sentences.append(Sentence(label, _resolved(point(arm, sides), before)))
    sentences.append(Sentence("Controls", _control_sentence(run, sides)))
    kept = [sentence for sentence in sentences if sentence.text]
    return kept or [Sentence("Note", "This run holds the baseline only: nothing was steered.")]


def key_refusal(arm: ArmResult, sides: Sides) -> Interval:
    """The refusal rate that the page leads with: unseen jailbreaks, or the harmful side's mean without them."""
    return arm.rate(UNSEEN_JAILBREAKS) or mean(arm.rate(suite) for suite in sides.harmful)


def key_refusal_title(sides: Sides) -> str:
    return "unseen jailbreaks" if UNSEEN_JAILBREAKS in sides.harmful else "harmful prompts"


def _gain(run: Run, clamp: ArmResult, baseline: ArmResult, sides: Sides) -> str:
    before, after = key_refusal(baseline, sides), key_refusal(clamp, sides)
    gained = _key_change(clamp, baseline, sides)
    verb = {1: "raises", -1: "lowers", 0: "does not measurably change"}[_direction(gained)]
    return (
        f"{_subject(run, clamp)} {verb} refusals of {key_refusal_title(sides)}: "
        f"**{percent(before.value)} → {full(after, with_n=False)}**{_points(gained)} "
        f"(n = {after.n}; brackets are 95{UNIT} intervals)."
    )


def _subject(run: Run, arm: ArmResult) -> str:
    if steering_word(arm) != "Clamping":
        return f"The arm “{arm.name}”"
    what = f"feature {arm.feature}" if arm.feature else f"by “{arm.name}”"
    if arm.strength is None:
        return f"Clamping {what} everywhere"
    note = run.chosen.strength_note if arm.strength == run.chosen.strength else ""
    said = "; ".join(filter(None, (run.strength_unit, note)))
    unit = f" ({said})" if said else ""
    return f"Clamping {what} to {number(arm.strength)}{unit} on every prompt"


def _cost(after: Point, before: Point) -> Sentence:
    parts = [part for part in (_over_refusal_change(after, before), _capability_change(after, before)) if part]
    text = f"{_capitalised(' and '.join(parts))}{_not_refusals(after, before)}." if parts else ""
    return Sentence("Price" if _is_worse(after, before) else "No price", text)


def _is_worse(after: Point, before: Point) -> bool:
    over, capability = change(after, before, "over_refusal"), change(after, before, "capability")
    return _direction(over) > 0 or _direction(capability) < 0


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _over_refusal_change(after: Point, before: Point) -> str:
    if after.over_refusal.value is None or before.over_refusal.value is None:
        return ""
    return (
        f"refusals of safe prompts go **{percent(before.over_refusal.value)} → "
        f"{full(after.over_refusal, with_n=False)}** (n = {after.over_refusal.n})"
    )


def _capability_change(after: Point, before: Point) -> str:
    if after.capability.value is None or before.capability.value is None:
        return ""
    text = (
        f"mean capability goes **{percent(before.capability.value)} → {full(after.capability, with_n=False)}** "
        f"(n = {after.capability.n}"
    )
    name = worst_capability(after.arm, before.arm)
    if name is None or len(after.arm.capability) < 2:
        return text + ")"
    if not is_lower(after.arm, before.arm, name):
        return text + "; no suite measurably worse)"
    old, new = before.arm.capability[name].value, after.arm.capability[name].value
    return f"{text}; worst {suite_title(name)}, {percent(old)} → {percent(new)})"


def _not_refusals(after: Point, before: Point) -> str:
    """The first paper's point, when it holds here: capability is lost, and not to refusals."""
    refused = mean(after.arm.refused_capability.values())
    if refused.value is None or _direction(change(after, before, "capability")) >= 0:
        return ""
    return f"; {percent(refused.value)} of the capability answers are refusals"


def worst_capability(after: ArmResult, before: ArmResult) -> str | None:
    """The capability suite that fell most, or None when none can be compared."""
    losses = {name: suite_change(after, before, name).value for name in after.capability if name in before.capability}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return min(known, key=lambda name: known[name]) if known else None


def _resolved(after: Point, before: Point) -> str:
    """The sentence on a conditional or tuned arm: what it refuses, and whether answers were left alone."""
    sides_refusal = after.arm.rate(UNSEEN_JAILBREAKS) or after.refusal
    what = "The conditional arm steers only when its gate fires: it"
    if after.arm.kind is ArmKind.TUNED:
        what = "The tuned plan"
    text = f"{what} refuses **{full(sides_refusal, with_n=False)}** of the same attacks"
    if after.over_refusal.value is not None:
        text += f", **{percent(after.over_refusal.value)}** of safe prompts"
        text += f" (baseline {percent(before.over_refusal.value)})"
    return text + f", {_kept(after, before)}."


def _kept(after: Point, before: Point) -> str:
    moved = change(after, before, "capability")
    if moved.value is None:
        return "with capability not measured"
    rate = f"**{percent(after.capability.value)}** (baseline {percent(before.capability.value)})"
    if abs(moved.value) <= CLOSE:
        return f"and keeps mean capability at {rate}"
    verb = "lowers" if moved.value < 0 else "raises"
    return f"and {verb} mean capability to {rate}"


def _control_sentence(run: Run, sides: Sides) -> str:
    """What the baselines of the literature and the controls do on the attacks, at which capability."""
    arms = [arm for arm in controls(run) if key_refusal(arm, sides).value is not None]
    dense = [arm for arm in arms if arm.kind is ArmKind.DIRECTION]
    plain = [arm for arm in arms if arm.kind is ArmKind.CONTROL]
    parts = [_strongest_of(dense, sides)] if dense else []
    if len(plain) > MANY_CONTROLS:
        parts.append(_range_of(plain, sides))
    else:
        parts += [f"{arm.name} {_pair(arm, sides)}" for arm in plain]
    return f"On the same attacks: {'; '.join(parts)}." if parts else ""


def _strongest_of(arms: Sequence[ArmResult], sides: Sides) -> str:
    best = max(arms, key=lambda arm: key_refusal(arm, sides).value or 0.0)
    return f"{best.name} {_pair(best, sides)}"


def _range_of(arms: Sequence[ArmResult], sides: Sides) -> str:
    """Many controls as the range of both numbers."""
    refusals = [key_refusal(arm, sides).value for arm in arms]
    capabilities = [point(arm, sides).capability.value for arm in arms]
    return f"{len(arms)} controls refuse {_extent(refusals)} at {_extent(capabilities)} mean capability"


def _extent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    return f"{percent(min(known), unit='')} to {percent(max(known))}"


def _pair(arm: ArmResult, sides: Sides) -> str:
    rate, capability = key_refusal(arm, sides).value, point(arm, sides).capability.value
    return f"refuses {percent(rate)} at {percent(capability)} mean capability"


def is_lower(after: ArmResult, before: ArmResult, suite: str) -> bool:
    """Whether a suite's rate fell measurably."""
    return _direction(suite_change(after, before, suite)) < 0


def _key_change(after: ArmResult, before: ArmResult, sides: Sides) -> Interval:
    """Change of the refusal rate that the page leads with."""
    if after.rate(UNSEEN_JAILBREAKS):
        return suite_change(after, before, UNSEEN_JAILBREAKS)
    return change(point(after, sides), point(before, sides), "refusal")


def _points(moved: Interval) -> str:
    """A paired difference in percentage points with its interval, or nothing without bounds."""
    if moved.value is None or moved.low is None or moved.high is None:
        return ""
    value, low, high = (f"{100 * part:+.0f}".replace("-", MINUS) for part in (moved.value, moved.low, moved.high))
    return f", {value} points [{low} to {high}] on the same prompts"


def _direction(moved: Interval) -> int:
    """1 or -1 when the difference's interval excludes zero, else 0. Without bounds the sign of the value decides."""
    if moved.value is None:
        return 0
    low = moved.value if moved.low is None else moved.low
    high = moved.value if moved.high is None else moved.high
    return 1 if low > 0 else -1 if high < 0 else 0
