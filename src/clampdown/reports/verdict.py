"""The verdict: a run in a title and a few labelled sentences, for any run.

A change counts as one only when the interval of the paired difference on the same prompts excludes zero. What was not
measured is said to be unknown, never to be unharmed. `**` marks what the page sets in bold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.reports.comparison import controls, headline
from clampdown.reports.price import CLOSE, Price, PriceState, direction, price_of
from clampdown.reports.wording import MINUS, MISSING, UNIT, full, number, percent
from clampdown.results.points import UNSEEN_JAILBREAKS, Point, Sides, change, mean, point, suite_change
from clampdown.results.rows import ArmResult, LeftOut
from clampdown.results.run import Run
from clampdown.types import ArmKind, Interval

MANY_CONTROLS = 4
MOSTLY_BROKEN = 0.5
CLAMPING = frozenset({"clamp", "clamp_active", "floor"})


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence of the verdict and the word that stands beside it."""

    label: str
    text: str


def title(run: Run, sides: Sides) -> str:
    """The whole run in one line, claimed only as far as the intervals carry it."""
    found = headline(run, sides)
    lead = found.lead
    if found.baseline is None:
        return "What each arm refuses, and what it can still do"
    if lead is None:
        return "What the unsteered model refuses, and what it can do"
    before, after = point(found.baseline, sides), point(lead, sides)
    what, price = steering_word(lead), price_of(after, before)
    if (after.degenerate.value or 0.0) >= MOSTLY_BROKEN and price.worse("broken replies"):
        return f"{what} breaks {percent(after.degenerate.value)} of the replies"
    start = f"{what} {_gain_words(after, before, sides)}"
    resolved = found.resolved
    gained = direction(_key_change(lead, found.baseline, sides)) > 0
    if not gained or price.state is not PriceState.FOUND or resolved is None or resolved is lead:
        return f"{start}{_price_words(price, gained=gained)}"
    traded = _traded(price) or "the wording of benign text"
    return f"{what} trades {traded} for refusals; “{resolved.name}” {_kept_words(point(resolved, sides), before)}"


def _gain_words(after: Point, before: Point, sides: Sides) -> str:
    if key_refusal(after.arm, sides).value is None:
        return "was measured without harmful prompts"
    moved = direction(_key_change(after.arm, before.arm, sides))
    return {1: "raises refusals", 0: "did not measurably raise refusals of attacks", -1: "lowers refusals"}[moved]


def _price_words(price: Price, *, gained: bool) -> str:
    if price.state is PriceState.FOUND:
        traded = _traded(price)
        return f"{'' if gained else ','} and {f'costs {traded}' if traded else 'rewords benign text'}"
    return "; what it costs is not settled" if price.state is PriceState.UNCLEAR else "; no cost was found"


GOOD_ANSWERS = ("mean capability", "right answers by likelihood", "refusals of safe prompts")


def _traded(price: Price) -> str:
    """What was lost, most telling first; empty where only the wording of benign text moved."""
    if price.worse(*GOOD_ANSWERS):
        return "good answers"
    return "unbroken replies" if price.worse("broken replies") else ""


def _kept_words(after: Point, before: Point) -> str:
    """What became of the gain and of what it cost, under a plan that is to spare good answers."""
    price = price_of(after, before)
    if direction(change(after, before, "refusal")) <= 0:
        return "loses the gain"
    if price.worse("broken replies"):
        return "breaks replies"
    fell = change(after, before, "capability").value or 0.0
    if fell < -CLOSE or price.worse(*GOOD_ANSWERS[:2]):
        return "lowers the price"
    if price.worse("refusals of safe prompts"):
        return "spares capability, not every borderline prompt"
    if price.worse("KL on benign text"):
        return "lowers the price"
    return f"keeps the gain; {price.missing[0]}" if price.missing else "keeps both"


def steering_word(arm: ArmResult) -> str:
    """What the arm does, to begin a sentence with: not every operator clamps."""
    return "Clamping" if arm.operator is None or arm.operator in CLAMPING else "Steering"


def verdict(run: Run, sides: Sides) -> list[Sentence]:
    """The trade-off in a few labelled sentences, with n and intervals."""
    found = headline(run, sides)
    left_out = [Sentence("Not shown", _left_out(each)) for each in run.left_out]
    if found.baseline is None:
        text = "This run has no baseline arm, so nothing can be compared; the tables below show each arm by itself."
        return [Sentence("Note", text), *left_out]
    lead = found.lead
    if lead is None:
        return [Sentence("Note", _baseline_only(found.baseline, sides)), *left_out]
    before = point(found.baseline, sides)
    sentences = [Sentence("Gain", _gain(run, lead, found.baseline, sides)), _cost(point(lead, sides), before)]
    for arm, label in ((found.gated, "Behind a gate"), (found.tuned, "Tuned")):
        if arm is not None and arm is not lead:
            sentences.append(Sentence(label, _resolved(point(arm, sides), before, sides)))
    sentences += [Sentence("Controls", _control_sentence(run, sides)), *left_out]
    return [sentence for sentence in sentences if sentence.text]


def _left_out(part: LeftOut) -> str:
    """What could not be shown, and how many prompts would do."""
    enough = "" if part.needed is None else f"; {part.needed} {part.role or ''} prompts would do".replace("  ", " ")
    return f"{part.stage}: {part.reason}{enough}."


def _baseline_only(baseline: ArmResult, sides: Sides) -> str:
    at = point(baseline, sides)
    parts = [(key_refusal(baseline, sides), f"of {key_refusal_title(sides)} refused"), (at.over_refusal, "of safe "
             "prompts refused"), (at.capability, "right answers"), (at.degenerate, "broken replies")]  # fmt: skip
    said = ", ".join(f"**{full(rate, with_n=False)}** {what} (n = {rate.n})" for rate, what in parts if rate.n)
    return f"This run holds the baseline only: nothing was steered. {said[:1].upper()}{said[1:]}".strip()


def key_refusal(arm: ArmResult, sides: Sides) -> Interval:
    """The refusal rate that the page leads with: unseen jailbreaks, or the harmful side's mean without them."""
    return arm.rate(UNSEEN_JAILBREAKS) or mean(arm.rate(suite) for suite in sides.harmful)


def key_refusal_title(sides: Sides) -> str:
    return "unseen jailbreaks" if UNSEEN_JAILBREAKS in sides.harmful else "harmful prompts"


def _gain(run: Run, lead: ArmResult, baseline: ArmResult, sides: Sides) -> str:
    before, after = key_refusal(baseline, sides), key_refusal(lead, sides)
    if after.value is None or before.value is None:
        return f"{_subject(run, lead)} was not asked harmful prompts: what it gains is not known."
    gained = _key_change(lead, baseline, sides)
    verb = {1: "raises", -1: "lowers", 0: "does not measurably change"}[direction(gained)]
    return (
        f"{_subject(run, lead)} {verb} refusals of {key_refusal_title(sides)}: "
        f"**{percent(before.value)} → {full(after, with_n=False)}**{_points(gained)} "
        f"(n = {after.n}; brackets are 95{UNIT} intervals)."
    )


def _subject(run: Run, arm: ArmResult) -> str:
    """The arm by its name, and by what it does where one feature's strength says it."""
    if steering_word(arm) != "Clamping" or arm.gates:
        return f"“{arm.name}”"
    what = f"feature {arm.feature}" if arm.feature and " + " not in arm.feature else f"“{arm.name}”"
    if arm.strength is None or what.startswith("“"):
        return what if what.startswith("“") else f"Clamping {what} everywhere"
    note = run.chosen.strength_note if arm.strength == run.chosen.strength else ""
    said = "; ".join(filter(None, (run.strength_unit, note)))
    unit = f" ({said})" if said else ""
    return f"“{arm.name}”, clamping {what} to {number(arm.strength)}{unit} on every prompt,"


def _cost(after: Point, before: Point) -> Sentence:
    """Everything that was measured of the price, then what is not known of it."""
    price = price_of(after, before)
    shown = [each.words for each in price.findings if _worth_saying(each.measure, price)]
    text = f"{_capitalised('; '.join(shown))}." if shown else ""
    if price.state is PriceState.UNCLEAR:
        text += f" Not settled: {price.doubts}."
    elif price.missing:
        text += f" {_capitalised('; '.join(price.missing))}."
    return Sentence(price.state.value, text.strip())


def _worth_saying(measure: str, price: Price) -> bool:
    """Likelihoods repeat what generation says unless they fell or stand alone."""
    alone = not any(each.measure == "mean capability" for each in price.findings)
    return measure != "right answers by likelihood" or alone or price.worse(measure)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _resolved(after: Point, before: Point, sides: Sides) -> str:
    """The sentence on a gated or tuned arm: what it refuses, and whether answers were left alone."""
    arm, refused = after.arm, key_refusal(after.arm, sides)
    text = f"“{arm.name}”{' steers only when its gate fires: it' if arm.gates else ''} refuses "
    text += f"**{full(refused, with_n=False)}** of the same attacks" if refused.n else "attacks that nobody asked"
    if after.over_refusal.value is not None:
        text += f", **{percent(after.over_refusal.value)}** of safe prompts"
        text += f" (baseline {percent(before.over_refusal.value)})"
    price = price_of(after, before)
    also = [each.words for each in price.findings if each.worse and each.measure in ALSO_SAID]
    return f"{text}, {_kept(after, before)}{''.join(f'; {each}' for each in also)}."


ALSO_SAID = ("broken replies", "right answers by likelihood", "KL on benign text")


def _kept(after: Point, before: Point) -> str:
    moved = change(after, before, "capability")
    if moved.value is None:
        return "with capability not measured" if after.likelihood.value is None else _likely(after, before)
    rate = f"**{percent(after.capability.value)}** (baseline {percent(before.capability.value)})"
    if abs(moved.value) <= CLOSE:
        return f"and keeps mean capability at {rate}"
    verb = "lowers" if moved.value < 0 else "raises"
    return f"and {verb} mean capability to {rate}"


def _likely(after: Point, before: Point) -> str:
    old, new = percent(before.likelihood.value), percent(after.likelihood.value)
    return f"and answers **{new}** right by the options' likelihood (baseline {old}; nothing was generated)"


def _control_sentence(run: Run, sides: Sides) -> str:
    """What the baselines of the literature and the controls do on the attacks, at which capability."""
    arms = [arm for arm in controls(run) if key_refusal(arm, sides).value is not None]
    dense = [arm for arm in arms if arm.kind is ArmKind.DIRECTION]
    plain = [arm for arm in arms if arm.kind is ArmKind.CONTROL]
    parts = [_strongest_of(dense, sides)] if dense else []
    if len(plain) > MANY_CONTROLS:
        asked = [arm for arm in plain if arm.system_prompt is not None]
        parts += [f"{arm.name} {_pair(arm, sides)}" for arm in asked]
        parts.append(_range_of([arm for arm in plain if arm not in asked], sides))
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
    at = f" at {_extent(capabilities)} mean capability" if any(c is not None for c in capabilities) else ""
    return f"{len(arms)} other controls refuse {_extent(refusals)}{at}"


def _extent(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    low, high = percent(min(known)), percent(max(known))
    return high if low == high else f"{low.removesuffix(UNIT)} to {high}"


def _pair(arm: ArmResult, sides: Sides) -> str:
    at = point(arm, sides)
    said = f"refuses {percent(key_refusal(arm, sides).value)}"
    if at.capability.value is not None:
        said += f" at {percent(at.capability.value)} mean capability"
    broken = at.degenerate.value or 0.0
    return f"{said} and breaks {percent(broken)} of replies" if broken > MOSTLY_BROKEN / 10 else said


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
