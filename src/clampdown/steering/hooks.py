"""`with steer(lm, plan):` steers every forward pass of the model inside the block, and proves it.

What happens inside is in `steering_block.py`; here a block is opened and closed: plans are checked against the model
and the SAEs before anything runs, and afterwards that they had the chance to act.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from clampdown.activations.sinks import sinks_at
from clampdown.errors import ScopeError
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource
from clampdown.steering.compiled import refuse_compiled
from clampdown.steering.ownership import aside, owning
from clampdown.steering.plan import Plan
from clampdown.steering.program import check_plan
from clampdown.steering.scopes import LOCAL
from clampdown.steering.steering_block import Steering
from clampdown.types import Site

__all__ = ["Steering", "can_resume", "resolve_saes", "steer"]


def can_resume(plan: Plan | None) -> bool:
    """Whether what a plan does to a prompt's beginning holds however the prompt goes on."""
    return plan is None or (plan.gate is None and all(edit.scope in LOCAL for edit in plan.edits))


def resolve_saes(
    plans: Sequence[Plan | None], saes: FeatureSource | Sequence[FeatureSource] | None, device: torch.device
) -> dict[str, FeatureSource]:
    """SAEs by site: the ones given, else opened by the name that the plan states, of which only features are read."""
    given = [saes] if isinstance(saes, FeatureSource) else list(saes or ())
    found = {sae.cfg.site.name: sae for sae in given}
    for plan in plans:
        for ref in plan.saes if plan is not None else ():
            if ref.site not in found:
                found[ref.site] = open_sae(ref.name, device=str(device), site=Site.parse(ref.site))
    return found


@contextmanager
def steer(
    lm: LanguageModel,
    plans: Plan | Sequence[Plan | None] | None,
    saes: FeatureSource | Sequence[FeatureSource] | None = None,
    *,
    prompt_width: int | None = None,
    prompt_of: Int[Tensor, " rows"] | None = None,
    require_reach: bool = True,
    resumed: bool = False,
) -> Iterator[Steering]:
    """Steer every forward pass of `lm` inside the block: HF `generate`, a plain call, or clampdown's own loops.

    `plans` is one plan for all rows, or one (or None) per row of the batch; None steers nothing.
    `saes` defaults to the SAEs that the plans name, of which only the features they use are read.
    `prompt_width` is the number of prompt columns when the first pass holds more than the prompt (teacher forcing); by
    default the first pass is the prompt.
    With `prompt_of` the model is called with distinct prompts and row r of `plans` steers prompt `prompt_of[r]`: what
    no edit can reach is computed once per prompt, and `Steering.row_map` says which output row answers which row.
    `require_reach=False` accepts that a scope covered no token (a reply that ended at once).
    With `resumed` the first pass goes on from a cache that holds the prompts' beginnings, computed with the same plans;
    only plans without a gate and with scopes that are `LOCAL` can.

    Raises `PlanMismatchError` and its kin before anything runs, `SteeringNotAppliedError` or `ScopeError` when the
    plan could not act. No hook outlives the block.
    """
    distinct = list({id(p): p for p in (plans if isinstance(plans, Sequence) else [plans])}.values())
    by_site = resolve_saes(distinct, saes, lm.device)
    for plan in distinct:
        if plan is not None:
            check_plan(plan, lm, by_site)
    if any(plan is not None for plan in distinct):
        refuse_compiled(lm)
    if resumed and not all(map(can_resume, distinct)):
        raise ScopeError("a plan with a gate, or a scope that depends on the whole prompt, cannot go on from a cache")
    with aside(id(lm.layout.decoder)):  # another thread may be steering this model
        sinks_at(lm, sorted({Site.parse(s) for plan in distinct if plan is not None for s in plan.sites}))
    steering = Steering(lm, plans, by_site, prompt_width, prompt_of, resumed)
    with owning(id(lm.layout.decoder), steering, steering.attach):
        yield steering
        steering.check_it_happened(require_reach=require_reach)
