"""The plan nearest to a given one among those that a format can say: constants in the place of what reads the token.

An edit whose amount depends on the token (a clamp, an ablation, a scale) becomes the same rows added in their mean
amount over all tokens of prompts: the constant with the least squared difference from what the edit adds there. What is
conditional becomes unconditional. How far the two then differ is not guessed but measured (`difference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.capture import capture
from clampdown.activations.sinks import sinks_at
from clampdown.interop.exports.forms import SCALED_BY_INPUT, Bound, Words, spared_sinks
from clampdown.models.chat import encode
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import Directions, View
from clampdown.types import Prompt, Site


def nearest(bound: Bound, words: Words, prompts: Sequence[Prompt]) -> Plan:
    """The plan that a lossy export writes, for a plan at places that the format has."""
    plan = bound.plan
    vectors = dict(plan.vectors)
    edits = []
    for number, edit in enumerate(plan.edits):
        scope = edit.scope if edit.scope in words.scopes else "all"
        kept = edit.keeping_error().changed(scope=scope)
        instead = words.near(kept, bound)
        if instead is not None:
            edits += [one for one in instead if not any(_same(one, other) for other in edits)]
            continue
        scaled = edit.features and bound.saes[edit.site].cfg.normalize_activations in SCALED_BY_INPUT
        if edit.operator not in words.operators or scaled:
            kept = _constant(kept, bound, words, prompts, vectors, f"mean {number}")
        edits.append(kept)
    used = {name: vectors[name] for edit in edits if (name := edit.vector) is not None}
    return plan.changed(
        name=f"{plan.name}, as exported",
        edits=tuple(edits),
        gate=None,
        otherwise=None,
        vectors=used,
        sinks="include" if spared_sinks(bound) else plan.sinks,
        saes=tuple(ref for ref in plan.saes if any(edit.features and edit.site == ref.site for edit in edits)),
    )


def _same(one: Edit, other: Edit) -> bool:
    """Whether two edits do the same thing at the same place: two ablations of one direction are one."""
    return (one.site, one.operator, one.vector, one.scope) == (other.site, other.operator, other.vector, other.scope)


def _constant(
    edit: Edit,
    bound: Bound,
    words: Words,
    prompts: Sequence[Prompt],
    vectors: dict[str, tuple[float, ...]],
    name: str,
) -> Edit:
    """The edit's rows in their mean amount: as features where the format knows features, else as one vector."""
    amounts, vector = mean_effect(edit, bound, prompts)
    plain = edit.features and bound.saes[edit.site].cfg.normalize_activations not in SCALED_BY_INPUT
    if plain and "add" in words.operators:
        strengths = tuple(amounts.tolist())
        return Edit(site=edit.site, scope=edit.scope, operator="add", features=edit.features, strengths=strengths)
    vectors[name] = tuple(vector.tolist())
    return Edit(site=edit.site, scope=edit.scope, operator="add_direction", vector=name, strengths=(1.0,))


@torch.no_grad()
def mean_effect(
    edit: Edit, bound: Bound, prompts: Sequence[Prompt]
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " d_model"]]:
    """The mean amount of each row that an edit adds, and the mean vector that it adds, over the prompts' tokens. Sinks
    count only where the plan steers them."""
    site = Site.parse(edit.site)
    view, strengths = _channels(edit, bound)
    outside = sinks_at(bound.lm, [site])[site].outside
    amounts, vectors, n = torch.zeros(strengths.shape[-1]), torch.zeros(bound.lm.d_model), 0
    ids = [encode(bound.lm, prompt.messages) for prompt in prompts]
    for found in capture(bound.lm, ids, site):
        x, real = found.residuals[site], found.batch.attention_mask.bool()
        kept = real if bound.plan.sinks == "include" else real & outside(x)
        shared = strengths.to(x.device).expand(len(x), 1, -1)
        coefficient = OPERATORS[edit.operator].coefficient(view.read(x).float(), shared)
        amounts += coefficient[kept].sum(0).cpu()
        vectors += view.write(coefficient, x)[kept].float().sum(0).cpu()
        n += int(kept.sum())
    return amounts / n, vectors / n


def _channels(edit: Edit, bound: Bound) -> tuple[View, Float[Tensor, "1 1 channels"]]:
    strengths = torch.tensor(edit.strengths)[None, None]
    if edit.features:
        return bound.saes[edit.site].select(edit.features), strengths
    row = torch.tensor(bound.plan.vectors[edit.vector or ""], device=bound.lm.device)
    unit = row / row.norm() if OPERATORS[edit.operator].unit_row else row
    return Directions(unit[None].to(bound.lm.dtype)), strengths
