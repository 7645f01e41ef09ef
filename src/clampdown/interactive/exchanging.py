"""Plans for other tools, and from their files."""

from __future__ import annotations

from pathlib import Path

from clampdown.interactive.given import plan_of, progress
from clampdown.interactive.loading import KNOWN_SAES, AnyPlan, Model, load
from clampdown.interop.exports import exporting
from clampdown.interop.exports.exporting import Exported, Lossy
from clampdown.steering.plan import Plan
from clampdown.study.prompts import StudyPrompts


def export(
    plan: AnyPlan,
    to: str,
    out: str | Path | None = None,
    *,
    lm: Model | None = None,
    lossy: bool = False,
    data: StudyPrompts | None = None,
    judge: str | None = None,
) -> Exported:
    """Write a plan in another tool's format (`clampdown export PLAN --to list` names them): exactly, or not at all.

    With `lossy` the nearest that the format can say is written, and measured against the plan on `data`'s prompts.
    Raises `ExportError`.
    """
    found = plan_of(plan)
    model = load(lm or found.model.name)
    known = [KNOWN_SAES[ref.site, ref.revision] for ref in found.saes if (ref.site, ref.revision) in KNOWN_SAES]
    asked = Lossy(data, judge) if lossy else None
    return exporting.export(
        exporting.bind(found, model, known), to, None if out is None else Path(out), progress(), asked
    )


def import_plan(
    source: str | Path,
    lm: Model | None = None,
    *,
    sae: str | None = None,
    strength: str | float | None = None,
    operator: str | None = None,
    scope: str = "all",
    name: str | None = None,
) -> Plan:
    """A plan of another tool's file, or of the address of a feature's page on Neuronpedia. Raises `SteeringFileError`.

    `strength` multiplies vectors; a feature's page needs one, and takes an `operator` (add by default).
    """
    asked = None if strength is None else str(strength)
    model = None if lm is None else load(lm)
    return exporting.import_plan(str(source), model, sae=sae, strength=asked, operator=operator, scope=scope, name=name)
