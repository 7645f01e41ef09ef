"""The page's HTML, made of values. Everything that a user or a model wrote is escaped here and nowhere else.

Colours are shares (`--share`) that the style sheet mixes, so that light and dark keep their own contrast, and what a
colour says is also said in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from clampdown.serving.studio.conversation import BASELINE, STEERED, Answer, Conversation, Turn
from clampdown.serving.studio.reading import Line, Looked
from clampdown.serving.studio.tokens import Colours, Piece
from clampdown.serving.studio.workbench import FeatureRow
from clampdown.steering.plan import Gate, Plan
from clampdown.types import Receipt

Byside = Mapping[str, Colours]


_TEMPLATE_MARKS = {"{": "&#123;", "}": "&#125;", "`": "&#96;", "$": "&#36;", "\\": "&#92;"}


def text(words: str, *, breaks: bool = True) -> str:
    """Escaped, with line breaks; braces and backquotes too, because the page's own templates know them."""
    escaped = "".join(_TEMPLATE_MARKS.get(char, char) for char in escape(words))
    return escaped.replace("\n", "<br>") if breaks else escaped


def transcript(talk: Conversation, colours: Byside | None = None, *, starters: Sequence[str] = ()) -> str:
    """The whole conversation. `colours` are by side; without turns, what one could ask."""
    if not talk.turns:
        return _empty(starters)
    busy = any(not answer.done for answer in talk.turns[-1].answers.values())
    turns = "".join(_turn(talk, i, colours or {}) for i in range(len(talk.turns)))
    return f'<div class="talk" role="log" aria-live="polite" aria-busy="{str(busy).lower()}">{turns}</div>'


def _empty(starters: Sequence[str]) -> str:
    buttons = "".join(f'<button type="button" data-say="{text(words)}">{text(words)}</button>' for words in starters)
    return (
        '<div class="talk empty"><p>Ask something. The same words go to the unsteered model and to the steered one.</p>'
        f'<div class="starters">{buttons}</div></div>'
    )


def _turn(talk: Conversation, index: int, colours: Byside) -> str:
    turn = talk.turns[index]
    place = index * 2 + bool(talk.system)
    said = _coloured(BASELINE, colours.get(BASELINE), place) or text(turn.said)
    answers = "".join(_answer(side, turn, colours.get(side), place + 1) for side in (BASELINE, STEERED))
    return f'<article class="turn"><p class="said">{said}</p><div class="pair">{answers}</div></article>'


def _answer(side: str, turn: Turn, colours: Colours | None, place: int) -> str:
    answer = turn.answers[side]
    body = _coloured(side, colours, place) if answer.done else ""
    shown = body or text(answer.text) or ('<span class="waiting">…</span>' if not answer.done else "(empty)")
    cut = ' <span class="cut" title="the reply was cut at its longest">[cut]</span>' if answer.cut else ""
    title = f"<h4>{side}{f' <small>{text(answer.plan)}</small>' if answer.plan else ''}</h4>"
    proof = f'<p class="receipt">{receipt_line(answer)}</p>' if answer.done else ""
    return f'<section class="answer {side}" aria-label="{side} answer">{title}<p>{shown}{cut}</p>{proof}</section>'


def receipt_line(answer: Answer) -> str:
    """What was done, in words."""
    return "not steered" if answer.receipt is None else text(proof(answer.receipt))


def proof(receipt: Receipt) -> str:
    """A receipt in words: the gate's score and verdict, how many tokens were changed, and how far."""
    parts = []
    if receipt.gate_fired is not None:
        score = "" if receipt.gate_score is None else f" (score {receipt.gate_score:.2f})"
        parts.append(f"gate {'fired' if receipt.gate_fired else 'stayed shut'}{score}")
    if receipt.factor is not None:
        parts.append(f"at {receipt.factor:.0%} of its strength")
    if receipt.branch == "otherwise":
        parts.append("the second branch acted")
    if receipt.tokens_touched:
        parts.append(f"{receipt.tokens_touched} tokens changed by {receipt.edit_norm:.0%} on average")
    else:
        parts.append("no token changed: the baseline's answer, bit for bit")
    return " · ".join(parts)


def _coloured(side: str, colours: Colours | None, place: int) -> str:
    """One message's tokens in colour, the template's tokens before it in small; nothing without colours for it. Each is
    a button that shows what the model holds there."""
    if colours is None or place >= len(colours.messages) or not colours.messages[place]:
        return ""
    scale = colours.largest
    header = "".join(_token(side, piece, scale) for piece in colours.before[place] if piece.text.strip())
    return f'<span class="template">{header}</span>' + "".join(
        _token(side, piece, scale) for piece in colours.messages[place]
    )


def _token(side: str, piece: Piece, scale: float) -> str:
    share = min(1.0, abs(piece.value) / scale) if scale else 0.0
    kind = "off" if not share else "hot" if piece.value > 0 else "cold"
    return (
        f'<span role="button" tabindex="0" data-token="{side}:{piece.place}" class="tok {kind}" '
        f'style="--share:{share:.3f}" title="{piece.value:.3g}">{text(piece.text)}</span>'
    )


def looked(found: Looked, side: str) -> str:
    """What the model holds at a token, as two small tables."""
    acts = "with the plan" if found.steered else "with the plan (its gate stayed shut, or it acts elsewhere)"
    return (
        f'<div class="looked" role="status"><p>At <code>{text(found.token)}</code> on the {side} side, '
        f"without the plan and {acts}:</p>"
        f"{_lines('feature', found.features, '{:.3g}')}{_lines('next token', found.following, '{:.1%}')}</div>"
    )


def _lines(heading: str, lines: Sequence[Line], form: str) -> str:
    rows = "".join(
        f'<tr{_moved(line)}><th scope="row">{text(line.name)}</th><td>{form.format(line.before)}</td>'
        f"<td>{form.format(line.after)}</td></tr>"
        for line in lines
    )
    head = f'<tr><th scope="col">{heading}</th><th scope="col">without</th><th scope="col">with</th></tr>'
    return f'<table class="points"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def _moved(line: Line) -> str:
    """Marks what the plan changes by more than a tenth of itself."""
    return ' class="chosen"' if abs(line.after - line.before) > 0.1 * max(line.after, line.before) else ""


def legend(colours: Iterable[Colours]) -> str:
    """What the colours mean, and the strongest token in words."""
    found = [(c, c.strongest) for c in colours]
    live = [(c, piece) for c, piece in found if piece]
    if not found:
        return ""
    feature = found[0][0].feature
    if not live:
        return f'<p class="legend">Feature {feature} is silent on every word of this conversation.</p>'
    best = max((piece for _, piece in live), key=lambda piece: piece.value)
    return (
        f'<p class="legend"><span class="ramp" aria-hidden="true"></span>Feature {feature}, as the unsteered model '
        f"reads it: full colour is {best.value:.3g}, on “{text(best.text.strip())}”. Values are in the tips.</p>"
    )


def notice(message: str, hint: str | None = None) -> str:
    """An error that the user can do something about."""
    more = f" <span>{text(hint)}</span>" if hint else ""
    return f'<p class="notice" role="alert">{text(message)}{more}</p>'


def plan_words(plan: Plan, edits: Sequence[str]) -> str:
    """What a plan does, as a short list."""
    lines = [f"<li>{text(words)}</li>" for words in edits]
    if plan.otherwise:
        lines.append("<li>otherwise, behind a second gate: another edit</li>")
    gate = "no gate: every conversation is steered" if plan.gate is None else _gate_words(plan.gate)
    items = "".join([*lines, f"<li>{gate}</li>"])
    return f'<div class="plan" role="status"><strong>{text(plan.name)}</strong><ul>{items}</ul></div>'


def _gate_words(gate: Gate) -> str:
    promise = gate.guarantee
    bound = "" if promise is None else f", on at most {promise.bound:.1%} of benign prompts"
    return f"behind a {gate.kind} gate that fires above {gate.threshold:.3g}{bound}"


def stated_guarantee(gate: Gate) -> str:
    """What the plan's file says of its threshold, before any score was read here."""
    if gate.guarantee is None:
        return '<p class="promise">This plan states no guarantee for its threshold. Read the prompts to see one.</p>'
    promise = gate.guarantee
    return (
        f'<p class="promise" role="status">The plan states: {promise.triggered} of {promise.n} benign calibration '
        f"prompts trigger it; at {promise.confidence:.0%} confidence at most <strong>{promise.bound:.2%}</strong> "
        "of such prompts do.</p>"
    )


def feature_list(rows: Sequence[FeatureRow], score: str, total: int) -> str:
    """Features as buttons, best first."""
    if not rows:
        return '<p class="empty">No feature matches.</p>'
    items = "".join(_feature_item(row) for row in rows)
    more = f'<p class="more">{len(rows)} of {total} shown, sorted by {text(score.replace("_", " "))}.</p>'
    return f'<ul class="features">{items}</ul>{more}'


def _feature_item(row: FeatureRow) -> str:
    score = "" if row.score is None else f'<span class="score">{row.score:.3g}</span>'
    tokens = "".join(f"<code>{text(token.strip() or token)}</code>" for token in row.promoted[:6])
    return (
        f'<li><button type="button" data-feature="{row.feature}"><b>{row.feature}</b>{score}'
        f'<span class="promotes">{tokens}</span></button></li>'
    )


def card_frame(page: str, feature: int) -> str:
    """A card's own page inside this one: with its own style, without scripts."""
    inside = text(page, breaks=False)
    return f'<iframe class="card" sandbox title="card of feature {feature}" srcdoc="{inside}"></iframe>'
