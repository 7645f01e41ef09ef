"""A direction in the residual that passes by the clamp, after 2606.18322: what the SAE does not read of a plan's
features stays in its error term, and a plan that keeps the error term hands it on.

One vector v is added to the residual at the plan's first site, at every token, before the edit. It is kept at right
angles to the encoder of every steered feature, so the edit acts exactly as it did, and it is no longer than `SIZE` of
the residual. It is found by gradient descent over all objectives at once. A plan's gates must still open with v in
place: success with the gate shut is no success of this attack.

Nobody who only talks to a model can do this. It says how much of the refusal the clamp does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.attacks.arms import Defence
from clampdown.attacks.budget import Budget, Clock
from clampdown.attacks.objective import Objective
from clampdown.attacks.suffix import Progress
from clampdown.attacks.surrogate import Slot, Surrogate, gates_of
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan
from clampdown.types import Site

SIZE = 0.5
"""Length of v, as a share of the residual's mean length at the site."""
RATE = 0.05
"""Step of Adam, as a share of v's longest length."""


@dataclass(frozen=True, slots=True)
class Found:
    """The vector, its length as a share of the residual's, and by how much of its length the SAE's error term moves
    (None without an SAE): near 1, the reconstruction hardly knows of it."""

    site: Site
    vector: Float[Tensor, " d_model"]
    share: float
    in_error: float | None

    def added(self, x: Float[Tensor, "rows pos d_model"]) -> Float[Tensor, "rows pos d_model"]:
        return x + self.vector.to(x)


def edit_site(plan: Plan) -> Site:
    """The lowest site of a plan's edits."""
    return min(Site.parse(edit.site) for edit in plan.edits)


def fit_error_direction(
    surrogate: Surrogate,
    defence: Defence,
    attacked: Plan,
    places: Sequence[tuple[Objective, Slot]],
    budget: Budget,
    clock: Clock,
    tick: Progress,
) -> Found:
    """For one arm: the plan's edits act, its gate is to stay open. `attacked` names the site and what v may not touch
    also for the arms without a plan."""
    site = edit_site(attacked)
    up = defence.plan.raising() if defence.plan is not None else None
    plan, gates = up and up.ungated(), gates_of(surrogate.lm, up, surrogate.saes, fire=True)
    sae = next((sae for sae in surrogate.saes if sae.cfg.site == site), None)
    rows = [(place, ()) for _, place in places]
    x = _residual(surrogate, rows, site)
    hidden = _read_by(attacked, site, sae).to(x.device) if sae is not None else x.new_zeros(0, x.shape[-1])
    longest = SIZE * float(x.norm(dim=-1).mean())
    v = torch.zeros(x.shape[-1], device=x.device, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=RATE * longest)
    best, least = v.detach().clone(), float("inf")
    edited = replace(surrogate, plan=plan, gates=gates, before_edits=((site, lambda h: h + v.to(h)),))
    for step in range(1, budget.steps + 1):
        if clock.over():
            break
        loss = edited.losses(rows).total.mean()
        if (now := float(loss.detach())) < least:
            best, least = v.detach().clone(), now
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            v -= hidden.T @ (hidden @ v)
            v *= min(1.0, longest / max(float(v.norm()), 1e-12))
        tick(step, budget.steps)
    share = float(best.norm()) / max(float(x.norm(dim=-1).mean()), 1e-12)
    return Found(site, best, share, _in_error(sae, x, best))


def _read_by(plan: Plan, site: Site, sae: Sae) -> Float[Tensor, "n d_model"]:
    """An orthonormal basis of the encoder columns that the plan's edits read at the site."""
    features = sorted({f for edit in plan.all_edits if edit.site == site.name for f in edit.features})
    return torch.linalg.qr(sae.W_enc[:, features].float()).Q.T.contiguous()


@torch.no_grad()
def _residual(
    surrogate: Surrogate, rows: Sequence[tuple[Slot, Sequence[int]]], site: Site
) -> Float[Tensor, "tokens d_model"]:
    """Of the bare model at the prompts' last tokens, which every prompt has."""
    seen: list[Tensor] = []
    bare = replace(surrogate, plan=None, gates=(), before_edits=((site, lambda h: seen.append(h)),))
    bare.losses(rows)
    return torch.cat([x[:, -8:].flatten(0, 1) for x in seen]).float()


@torch.no_grad()
def _in_error(sae: Sae | None, x: Float[Tensor, "tokens d_model"], v: Float[Tensor, " d_model"]) -> float | None:
    if sae is None or not float(v.norm()):
        return None
    moved = sae.reconstruct((x + v).to(sae.dtype)) - sae.reconstruct(x.to(sae.dtype))
    return float(((v - moved.float()).norm(dim=-1) / v.norm()).mean())
