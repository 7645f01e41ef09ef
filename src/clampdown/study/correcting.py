"""An edit that passes the SAE's error on within a few fitted directions only (`discovery/error_subspace.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from clampdown.discovery.error_subspace import ErrorSubspace, fit_error_subspace
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Plan
from clampdown.types import Prompt

RANK = 32
VECTOR = "error{}"


def correct(lm: LanguageModel, sae: Sae, plan: Plan, benign: Sequence[Prompt], rank: int = RANK) -> Plan:
    """The plan with the error of its edits on that SAE's features corrected. Raises as `fit_error_subspace`."""
    return corrected(plan, sae, fit_error_subspace(lm, sae, benign, rank))


def corrected(plan: Plan, sae: Sae, found: ErrorSubspace) -> Plan:
    """With a subspace that was fitted. What a second side does keeps its error."""
    site = sae.cfg.site.name
    vectors = {VECTOR.format(i): tuple(row) for i, row in enumerate(found.directions.tolist())}
    change = {"error_term": "correct", "correction": tuple(vectors), "edit_norm": None}
    edits = tuple(e.changed(**change) if e.features and e.site == site else e for e in plan.edits)
    share = {
        "passed on of the SAE's error": f"{len(vectors)} directions; FVU {found.fvu:.3f}, dropped {found.dropped:.3f}"
    }
    return plan.changed(edits=edits, vectors={**plan.vectors, **vectors}, provenance={**plan.provenance, **share})
