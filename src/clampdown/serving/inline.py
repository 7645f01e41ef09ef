"""Edits that clients send: from a feature and a strength to a plan, within bounds that the server sets.

1. At start the residual is read once on calibration prompts and kept: no request runs the model for its units.
2. A strength in multiples becomes raw units by the feature's 99th percentile there, and every edit is measured: how far
   it moves the residual, mean ||x' - x|| / ||x||.
3. What goes beyond the bounds is refused with the figure and the bound, never cut down to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clampdown.errors import PromptSetError, RequestError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource, check_features
from clampdown.serving.plans import INLINE
from clampdown.serving.schemas import InlineEdit
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.steering.program import check_plan
from clampdown.steering.units import Calibration, Strength, Unit, calibrate, measured, resolve
from clampdown.types import Prompt

CALIBRATION_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Bounds:
    """The strongest edit that a client may ask for: |strength| in multiples of the feature's p99 (where it has one; a
    factor for 'scale'), and how far the residual may move on average over the tokens that change."""

    max_multiple: float = 4.0
    max_edit_norm: float = 4.0


@dataclass(frozen=True)
class InlineEdits:
    """Makes plans of clients' edits. `calibrations` hold the residual at each SAE's site."""

    lm: LanguageModel
    saes: Mapping[str, FeatureSource]
    calibrations: Mapping[str, Calibration]
    bounds: Bounds

    @classmethod
    def measured_on(
        cls, lm: LanguageModel, saes: Mapping[str, FeatureSource], prompts: Sequence[Prompt], bounds: Bounds
    ) -> InlineEdits:
        """Read the residual on the prompts. Raises `PromptSetError` without any."""
        if not prompts:
            raise PromptSetError("edits in requests need calibration prompts", hint="--prompts FILE, or --no-inline")
        read = {
            name: calibrate(lm, sae.cfg.site, sae.select([0]), prompts, max_tokens=CALIBRATION_TOKENS)
            for name, sae in saes.items()
        }
        return cls(lm, saes, read, bounds)

    def __call__(self, edit: InlineEdit, gate: Plan | None) -> Plan:
        """The plan. Raises `RequestError` beyond the bounds, `FeatureIndexError` and kin for what does not exist."""
        site = self._site(edit.site)
        calibration = self._calibration(site, edit.indices)
        unit = Unit.RAW if edit.multiple is None else Unit.P99
        asked = Strength(_given(edit), unit)
        strengths = resolve([asked], edit.operator, calibration)
        self._check(edit, strengths, calibration)
        made = Edit(site=site, operator=edit.operator, features=edit.indices, strengths=strengths, scope=edit.scope)
        plan = self._plan(measured(made, calibration), str(asked), gate)
        check_plan(plan, self.lm, self.saes)
        return plan

    def _site(self, asked: str | None) -> str:
        if asked is None and len(self.saes) == 1:
            return next(iter(self.saes))
        if asked is None or asked not in self.saes:
            raise RequestError(
                f"`site` must be one of: {', '.join(self.saes)}", param="steering.site", code="site_not_found"
            )
        return asked

    def _calibration(self, site: str, features: Sequence[int]) -> Calibration:
        sae, residual = self.saes[site], self.calibrations[site].residual
        view = sae.select(check_features(features, sae.cfg.d_sae))
        return Calibration(view, residual, view.read(residual[None])[0].float())

    def _check(self, edit: InlineEdit, strengths: Sequence[float], calibration: Calibration) -> None:
        units = calibration.p99 if edit.operator != "scale" else (1.0,) * len(strengths)
        largest = max((abs(s) / unit for s, unit in zip(strengths, units, strict=True) if unit > 0), default=0.0)
        if largest > self.bounds.max_multiple:
            what = "a factor of" if edit.operator == "scale" else "times the feature's p99:"
            raise _too_strong(f"{largest:.3g} {what}", self.bounds.max_multiple)
        moved = calibration.edit_norm(edit.operator, strengths) or 0.0
        if not moved <= self.bounds.max_edit_norm:
            raise _too_strong(f"{moved:.3g} times the residual's length:", self.bounds.max_edit_norm)

    def _plan(self, edit: Edit, asked: str, gate: Plan | None) -> Plan:
        sae = self.saes[edit.site]
        refs = {ref.site: ref for ref in gate.saes} if gate else {}
        refs[edit.site] = SaeRef.of(sae)
        if gate is not None and gate.gate is None:
            raise RequestError(f"plan '{gate.name}' has no gate to borrow", param="steering.gate", code="no_gate")
        return Plan(
            name=INLINE,
            model=ModelRef.of(self.lm),
            saes=tuple(refs.values()),
            edits=(edit,),
            gate=gate.gate if gate else None,
            vectors=gate.vectors if gate else {},
            provenance={"asked": asked},
        )


def _given(edit: InlineEdit) -> float:
    value = edit.strength if edit.multiple is None else edit.multiple
    assert value is not None, "the schema asks for one of the two"
    return value


def _too_strong(said: str, bound: float) -> RequestError:
    return RequestError(
        f"this edit is too strong for this server: {said} at most {bound:g} is allowed",
        code="steering_too_strong",
        param="steering",
    )
