"""Making a plan of what another tool's file says: what was asked for, and the plan of vectors at sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from clampdown.config import CODE_VERSION
from clampdown.errors import SteeringFileError, StrengthError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.plan import Edit, Plan
from clampdown.types import Prompt, Site


@dataclass(frozen=True, slots=True)
class Wanted:
    """A plan for `lm` of what `source` says. `strength` multiplies vectors and is the strength of a feature; `operator`
    is for features alone. `prompts` are what a strength in other units than raw is resolved on."""

    source: str
    lm: LanguageModel
    sae: str | None = None
    strength: str | None = None
    operator: str | None = None
    scope: str = "all"
    name: str | None = None
    prompts: tuple[Prompt, ...] = ()

    @property
    def path(self) -> Path:
        return Path(self.source)

    @property
    def title(self) -> str:
        return self.name or self.path.stem

    @property
    def provenance(self) -> dict[str, str]:
        return {"imported": self.source, "code": CODE_VERSION}

    def factor(self) -> float:
        """What vectors are multiplied by. Raises `StrengthError`."""
        try:
            found = float(self.strength or 1.0)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise StrengthError(f"'{self.strength}' is no factor", hint="a vector is multiplied by a plain number")
        return found

    def refuse_operator(self) -> None:
        """Raises `SteeringFileError` when an operator was asked for: the file's vectors say what is done with them."""
        if self.operator is not None:
            raise SteeringFileError(
                f"{self.source} says what its vectors do", hint="--operator is for the address of a feature"
            )


def plan_of_vectors(wanted: Wanted, directions: Mapping[Site, Float[Tensor, " d_model"]]) -> Plan:
    """The plan that adds a vector at each site, to every token, as other tools do. Raises `SteeringFileError`."""
    wanted.refuse_operator()
    if not directions:
        raise SteeringFileError(f"{wanted.source} holds no vectors")
    factor = wanted.factor()
    edits, vectors = [], {}
    for site, vector in directions.items():
        name = site.name
        vectors[name] = checked(wanted, site, vector)
        edits.append(Edit(site=name, operator="add_direction", vector=name, strengths=(factor,), scope=wanted.scope))
    return plan_of(wanted, edits, vectors)


def plan_of(
    wanted: Wanted, edits: list[Edit], vectors: Mapping[str, tuple[float, ...]], saes: tuple[FeatureSource, ...] = ()
) -> Plan:
    """A plan of edits that were read. Sinks are steered like any token: other tools do not know them."""
    more = {"vectors": dict(vectors), "provenance": wanted.provenance, "sinks": "include"}
    return Plan.of(wanted.lm, saes, edits, wanted.title, **more)


def checked(wanted: Wanted, site: Site, vector: Float[Tensor, " width"]) -> tuple[float, ...]:
    """A vector that fits the model at the site. Raises `SteeringFileError`."""
    if vector.shape != (wanted.lm.d_model,):
        raise SteeringFileError(
            f"{wanted.source}: the vector for {site} has {vector.numel()} numbers, the model's residual stream "
            f"has {wanted.lm.d_model}",
            hint="it was made for another model: name that one with --model",
        )
    if site.layer >= wanted.lm.n_layers:
        raise SteeringFileError(f"{wanted.source} steers block {site.layer}, the model has {wanted.lm.n_layers} blocks")
    if not bool(vector.isfinite().all()):
        raise SteeringFileError(f"{wanted.source}: the vector for {site} holds numbers that are not finite")
    return tuple(vector.float().tolist())
