"""Whether this plan steers this model: a few short passes at start-up, before anybody relies on it.

The edits are tried on one short prompt, at every token and without their gate, so that what is tested is the edit and
not whether this prompt happens to trigger it:

1. the hook fires once per pass at every edited site;
2. strength zero is the identity, bit for bit;
3. the residual changes by what the operators' formulas say (methods: x' = x + coefficient * d_f), computed here from
   the SAE's own features and none of the batch machinery;
4. the logits change;
5. the receipt counts exactly the tokens that changed;
6. the gate, where there is one, gives a finite score, and the strength that grows with it is what the plan says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.activations.sinks import Sinks, sinks_at
from clampdown.errors import SteeringNotAppliedError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.hook_order import attach_in_order, hook_point
from clampdown.steering.hooks import resolve_saes, steer
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import angles, contradict, pass_on_otherwise
from clampdown.types import Message, Receipt, Site

PROMPT = "Hello, how are you?"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried: its name, whether it held, and the figure that shows it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class _Pass:
    """One forward pass: logits, and the residual before and after each edited site."""

    logits: Float[Tensor, "1 pos vocab"]
    before: Mapping[str, list[Tensor]]
    after: Mapping[str, list[Tensor]]
    receipt: Receipt | None


def self_test(
    lm: LanguageModel, plan: Plan, saes: FeatureSource | Sequence[FeatureSource] | None = None
) -> tuple[Check, ...]:
    """Try the plan on the model. Raises `PlanMismatchError` and its kin when the plan is for something else."""
    sources = resolve_saes([plan], saes, lm.device)
    ids = torch.tensor([encode(lm, [Message("user", PROMPT)])], device=lm.device)
    bare = plan.ungated().changed(edits=_everywhere(plan, plan.edits))
    zero = bare.changed(edits=_everywhere(plan, [_zero(edit) for edit in plan.edits]))
    try:
        plain = _run(lm, None, plan, sources, ids)
        identity = _run(lm, zero, plan, sources, ids)
        steered = _run(lm, bare, plan, sources, ids)
        gated = None if plan.gate is None else _run(lm, plan.changed(edits=bare.edits), plan, sources, ids)
    except SteeringNotAppliedError as error:
        return (Check("the hook fires at its site", False, error.message),)
    sinks = sinks_at(lm, [Site.parse(name) for name in steered.before])
    checks = [
        _fires(steered),
        Check(
            "strength zero is the identity, bit for bit",
            torch.equal(identity.logits, plain.logits),
            f"largest change of a logit {_largest(identity.logits - plain.logits):.3g}",
        ),
        _as_predicted(bare, sources, steered, sinks),
        _moves_logits(bare, plain, steered),
        _counted(steered),
    ]
    if gated is not None:
        checks.append(_gate(gated))
        checks += [_grows(plan, gated.receipt)] if plan.gate and plan.gate.full is not None and gated.receipt else []
    checks += [_spares(steered, each) for each in sinks.values() if each and plan.sinks == "leave_out"]
    return tuple(checks)


def require_self_test(lm: LanguageModel, plan: Plan, saes: FeatureSource | Sequence[FeatureSource] | None) -> None:
    """`self_test` at start-up. Raises `SteeringNotAppliedError` with the first check that did not hold."""
    for check in self_test(lm, plan, saes):
        if not check.passed:
            raise SteeringNotAppliedError(
                f"self-test of plan '{plan.name}' failed: {check.name} ({check.detail})",
                hint="nothing was answered; `clampdown check PLAN` shows every check",
            )


def _everywhere(plan: Plan, edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits at every token. Of those that then do the same to the same channel, or would
    contradict each other there, one is tried."""
    seen: set[tuple[object, ...]] = set()
    kept: list[Edit] = []
    cosine = angles(plan, plan.edits)
    for edit in edits:
        channels = {(edit.site, edit.operator, channel) for channel in edit.features or (edit.vector,)}
        if not channels & seen and not any(
            contradict(edit, other, cosine) or pass_on_otherwise(edit, other) for other in kept
        ):
            kept.append(edit.changed(scope="all"))
            seen |= channels
    return tuple(kept)


def _zero(edit: Edit) -> Edit:
    """The same channels with an operator and strength that add exactly nothing."""
    operator = "add_direction" if OPERATORS[edit.operator].dense else "add"
    return edit.keeping_error().changed(operator=operator, strengths=(0.0,) * len(edit.strengths))


@torch.no_grad()
def _run(
    lm: LanguageModel,
    plan: Plan | None,
    sites_of: Plan,
    sources: Mapping[str, FeatureSource],
    ids: Int[Tensor, "1 pos"],
) -> _Pass:
    names = sorted({edit.site for edit in sites_of.edits})
    before: dict[str, list[Tensor]] = {name: [] for name in names}
    after: dict[str, list[Tensor]] = {name: [] for name in names}
    handles: list[Any] = []
    try:
        # These lie on either side of the edit's hooks, which come first of those that are there when they are put on.
        with steer(lm, plan, list(sources.values())) as steering:
            handles += attach_in_order(lm, [(Site.parse(name), before[name].append) for name in names])
            handles += [hook_point(lm, Site.parse(name)).register(after[name].append) for name in names]
            logits = lm.model(ids).logits
            (receipt,) = steering.receipts()
    finally:
        for handle in handles:
            handle.remove()
    return _Pass(logits, before, after, receipt)


def _fires(steered: _Pass) -> Check:
    counts = {name: len(seen) for name, seen in steered.after.items()}
    return Check(
        "the hook fires at its site",
        all(count == 1 for count in counts.values()),
        ", ".join(f"{name}: {count} per pass" for name, count in counts.items()),
    )


def _spares(steered: _Pass, sinks: Sinks) -> Check:
    (x,), (changed,) = steered.before[sinks.site.name], steered.after[sinks.site.name]
    same = (x == changed).all(-1) | sinks.outside(x)
    return Check("attention sinks stay as they are", bool(same.all()), sinks.in_words)


def _as_predicted(
    plan: Plan, sources: Mapping[str, FeatureSource], steered: _Pass, sinks: Mapping[Site, Sinks]
) -> Check:
    worst, allowed = 0.0, 0.0
    for name, (x,) in steered.before.items():
        (changed,) = steered.after[name]
        predicted = predicted_delta([e for e in plan.edits if e.site == name], plan, sources, x.float())
        if plan.sinks == "leave_out":
            predicted *= sinks[Site.parse(name)].outside(x).unsqueeze(-1)
        error = _largest(changed.float() - x.float() - predicted)
        # Two roundings to the residual's dtype: that of the delta and that of the sum.
        room = 2 * torch.finfo(x.dtype).eps * (_largest(changed) + _largest(predicted)) + 1e-4 * _largest(predicted)
        worst, allowed = max(worst, error), max(allowed, room)
    return Check(
        "the residual changes as the formula says", worst <= allowed, f"off by {worst:.2g}, at most {allowed:.2g}"
    )


def predicted_delta(
    edits: Sequence[Edit], plan: Plan, sources: Mapping[str, FeatureSource], x: Float[Tensor, "1 pos d_model"]
) -> Float[Tensor, "1 pos d_model"]:
    """What the operators' formulas add to x at one site: channel by channel, from the SAE as it is."""
    total = torch.zeros_like(x)
    for edit in edits:
        operator = OPERATORS[edit.operator]
        if edit.vector is not None:
            row = torch.tensor(plan.vectors[edit.vector], device=x.device)
            row = row / row.norm() if operator.unit_row else row
            strength = torch.full((1, 1, 1), edit.strengths[0], device=x.device)
            total += operator.coefficient((x @ row).unsqueeze(-1), strength) * row
            continue
        for feature, value in zip(edit.features, edit.strengths, strict=True):
            view = sources[edit.site].select([feature])
            strength = torch.full((1, 1, 1), value, device=x.device)
            total += view.write(operator.coefficient(view.read(x).float(), strength), x)
    changed = next((edit for edit in edits if edit.error_term != "keep"), None)
    if changed is not None:
        error = x - sources[changed.site].whole().reconstruct(x)
        total -= error
        for name in changed.correction:
            along = torch.tensor(plan.vectors[name], device=x.device)
            total += (error @ along).unsqueeze(-1) * along
    return total


def _moves_logits(plan: Plan, plain: _Pass, steered: _Pass) -> Check:
    moved = _largest(steered.logits - plain.logits)
    if plan.is_identity:
        return Check("neutral strengths leave the logits alone", moved == 0.0, f"largest change {moved:.3g}")
    return Check("the plan changes the logits", moved > 0.0, f"largest change {moved:.3g}")


def _counted(steered: _Pass) -> Check:
    moved = [(steered.after[name][0] != steered.before[name][0]).any(-1) for name in steered.after]
    changed = int(torch.stack(moved).any(0).sum())
    counted = steered.receipt.tokens_touched if steered.receipt else -1
    return Check(
        "the receipt counts the tokens that changed", counted == changed, f"{counted} counted, {changed} changed"
    )


def _gate(gated: _Pass) -> Check:
    score = gated.receipt.gate_score if gated.receipt else None
    read = score is not None and bool(torch.tensor(score).isfinite())
    verdict = "fires" if gated.receipt and gated.receipt.gate_fired else "does not fire"
    return Check(
        "the gate reads the prompt", read, f"score {score:.3g}, {verdict}" if score is not None else "no score"
    )


def _grows(plan: Plan, receipt: Receipt) -> Check:
    """Against the plan's own formula, from the score."""
    assert plan.gate is not None, "only a gate's score makes strength grow"
    score, found = receipt.gate_score, receipt.factor
    wanted = plan.gate.factor(score) if receipt.gate_fired and score is not None else None
    same = found == wanted if found is None or wanted is None else abs(found - wanted) <= 1e-5
    return Check("the strength is what the gate's score says", same, f"factor {found}, by the formula {wanted}")


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
