"""The model and SAEs that plans name, loaded once and checked against every plan."""

from __future__ import annotations

from collections.abc import Sequence

from clampdown.activations.fit import warn_unless_fitting
from clampdown.config import ORGANISM
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.placing import Placing
from clampdown.models.threads import choose_threads
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.steering.plan import Plan
from clampdown.steering.program import check_plan
from clampdown.types import Site


def load_for(
    plans: Sequence[Plan], model: str | None = None, placing: Placing | None = None
) -> tuple[LanguageModel, tuple[Sae, ...]]:
    """The model (by default the one that the first plan names, else the embedded one) and the plans' SAEs.

    Raises `PlanMismatchError` and its kin for a plan that was made for something else.
    """
    lm = load_model(model or (plans[0].model.name if plans else ORGANISM), placing=placing)
    choose_threads(lm)
    return lm, saes_of(plans, lm)


def saes_of(plans: Sequence[Plan], lm: LanguageModel) -> tuple[Sae, ...]:
    """The SAEs that the plans name, by site, each loaded once."""
    names = {ref.site: ref.name for plan in plans for ref in plan.saes}
    by_site = {site: load_sae(name, device=str(lm.device), site=Site.parse(site)) for site, name in names.items()}
    for sae in by_site.values():
        check_fits(sae, lm.d_model, lm.n_layers)
        warn_unless_fitting(lm, sae)
    for plan in plans:
        check_plan(plan, lm, by_site)
    return tuple(by_site.values())
