"""Writing a plan for another tool: exactly, or not at all, or knowingly something else with the difference beside it.

1. What the format cannot say is listed. Without `lossy` that is an error that names all of it.
2. With `lossy` the nearest plan that the format can say is made, written, and measured against the plan that was given.
3. Beside the file lies another, JSON, that says what was written: of which plan, exactly or not, and how far off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.config import CODE_VERSION
from clampdown.errors import ExportError, PromptSetError, SteeringFileError, translated
from clampdown.interop.exports.difference import Difference, difference
from clampdown.interop.exports.forms import Bound, Unsaid, unsaid
from clampdown.interop.exports.nearest import nearest
from clampdown.interop.exports.table import Format, format_named, format_of
from clampdown.interop.exports.wanted import Wanted
from clampdown.models.loading import LanguageModel, load_model
from clampdown.models.threads import choose_threads
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource, check_fits
from clampdown.steering.plan import Plan
from clampdown.steering.program import check_plan
from clampdown.store import write_json
from clampdown.study.progress import Stages
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.study import judge_for, knows_corpus
from clampdown.types import Prompt, PromptRole, Site, Split

SCHEMA_VERSION = 1
MEAN_PROMPTS, COMPARED_PROMPTS = 60, 24
"""Prompts of each suite that a mean effect is taken over, and on which an export is compared with its plan."""
_MEAN_OF = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BENIGN)
_COMPARED_ON = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BORDERLINE, PromptRole.BENIGN)


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the plan that the file says, what of the given one it does not, and how far the two differ."""

    path: Path
    sidecar: Path
    format: str
    plan: Plan
    left_out: tuple[Unsaid, ...]
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Lossy:
    """Consent to write something near the plan. `data` is what the difference is measured on, `judge` who judges."""

    data: StudyPrompts | None = None
    judge: str | None = None
    limit: int = COMPARED_PROMPTS


def bind(
    plan: Plan,
    lm: LanguageModel | str | None = None,
    saes: Sequence[FeatureSource] = (),
    sae: str | None = None,
) -> Bound:
    """The plan with its model and SAEs, checked against each other. Raises `PlanMismatchError` and its kin."""
    if not isinstance(lm, LanguageModel):
        lm = load_model(lm or plan.model.name)
        choose_threads(lm)
    given = {one.cfg.site.name: one for one in saes}
    found = {
        ref.site: given.get(ref.site) or open_sae(sae or ref.name, device=str(lm.device), site=Site.parse(ref.site))
        for ref in plan.saes
    }
    for source in found.values():
        check_fits(source, lm.d_model, lm.n_layers)
    check_plan(plan, lm, found)
    return Bound(plan, lm, found)


def export(bound: Bound, to: str, out: Path | None, stages: Stages, lossy: Lossy | None = None) -> Exported:
    """Write the plan in the format `to`. Raises `ExportError` for what it cannot say."""
    form = format_named(to)
    path = out or Path(_file_name(bound.plan.name) + form.suffix)
    if form.directory and path.exists():
        raise ExportError(f"{path} is there already", hint="--out names a new directory for the checkpoint")
    left_out = unsaid(bound, form.words)
    _refuse(bound.plan, form, left_out, lossy is not None)
    written, measured = bound.plan, None
    if lossy is not None and left_out:
        written, measured = _near(bound, form, lossy, stages)
    try:
        with stages.stage(f"Writing {path}"):
            form.write(bound.saying(written), path)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    sidecar = path / "clampdown_export.json" if form.directory else path.with_name(path.name + ".json")
    found = Exported(path, sidecar, form.name, written, tuple(left_out), measured)
    write_json(sidecar, _stated(found, bound))
    return found


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name).strip("-.") or "plan"


def _refuse(plan: Plan, form: Format, left_out: Sequence[Unsaid], lossy: bool) -> None:
    if plan.is_identity:
        raise ExportError(f"plan '{plan.name}' changes nothing: there is nothing to export")
    final = [one for one in left_out if one.instead is None]
    if not final and (lossy or not left_out):
        return
    listed = "\n  ".join(str(one) for one in (final if lossy else left_out))
    hint = "`clampdown serve` and the engines it names run plans as they are"
    if not final:
        near = "; ".join(dict.fromkeys(str(one.instead) for one in left_out))
        hint = f"--lossy writes something else, and measures the difference: {near}"
    raise ExportError(f"{form.of}: it cannot say what plan '{plan.name}' does\n  {listed}", hint=hint)


def _near(bound: Bound, form: Format, lossy: Lossy, stages: Stages) -> tuple[Plan, Difference]:
    if lossy.data is None and not knows_corpus(bound.lm.name, bound.lm):
        raise PromptSetError(
            "a lossy export is measured against its plan, and there are no prompts of our own for this model",
            hint="give --harmful FILE and --benign FILE (CSV, JSONL or txt), or public sets by name",
        )
    data = lossy.data or embedded_prompts()
    with stages.stage("Finding the nearest that can be said"):
        plan = nearest(bound, form.words, data.prompts(Split.DISCOVERY, MEAN_PROMPTS, *_MEAN_OF))
    still = unsaid(bound.saying(plan), form.words)
    if still:
        raise ExportError(f"{form.of}: nothing near plan '{bound.plan.name}' can be said\n  {still[0]}")
    with stages.stage("Measuring the difference"):
        judge = judge_for(lossy.judge, bound.lm, data)
        suites = data.known(Split.VALIDATION, lossy.limit, *_COMPARED_ON)
        return plan, difference(bound, plan, suites, judge)


def _stated(found: Exported, bound: Bound) -> dict[str, object]:
    """What the file beside an export says."""
    return {
        "schema_version": SCHEMA_VERSION,
        "format": found.format,
        "file": found.path.name,
        "plan": bound.plan.name,
        "plan_digest": bound.plan.digest,
        "model": bound.lm.name,
        "model_revision": bound.lm.revision,
        "saes": [f"{source.name}@{source.revision}" for source in bound.saes.values()],
        "exact": not found.left_out,
        "left_out": found.left_out,
        "difference": found.difference,
        "code": CODE_VERSION,
    }


# ---- import ------------------------------------------------------------------------------------------------------


def import_plan(
    source: str,
    lm: LanguageModel | str | None = None,
    form: str | None = None,
    **wanted: str | tuple[Prompt, ...] | None,
) -> Plan:
    """The plan that another tool's file or address says, for a model. `wanted` are fields of `Wanted`.

    Raises `SteeringFileError` and its kin.
    """
    row = format_named(form) if form else format_of(source)
    if row.read is None:
        raise SteeringFileError(f"format '{row.name}' is written and not read")
    name = lm or row.model(source)
    if name is None:
        raise SteeringFileError(f"{source} does not say which model it is for", hint="name one with --model")
    if not isinstance(name, LanguageModel):
        name = load_model(name)
        choose_threads(name)
    with translated(SteeringFileError, f"{source[:200]} cannot be read as {row.name}"):
        found = row.read(Wanted(source, name, **wanted))  # type: ignore[arg-type]
    check_plan(found, name, {ref.site: open_sae(ref.name, site=Site.parse(ref.site)) for ref in found.saes})
    return found
