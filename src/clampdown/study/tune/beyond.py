"""What `clampdown tune` searches beside sets of features: cones of directions, the error term, growing strength.

1. Directions of refusal are found once, and the first k of them are raised together as one more candidate.
2. The SAE's error on benign text is fitted once; a plan behind a gate may pass on that part of it and no more.
3. A gate's score at which edits reach their full strength is read off harmful discovery prompts, once per gate.

None of it multiplies the search: the first is a few candidates more, the others are settings of plans behind gates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clampdown.discovery.error_subspace import ErrorSubspace, fit_error_subspace
from clampdown.discovery.subspace import Subspace, find_subspace
from clampdown.documents import read_json
from clampdown.errors import NotEnoughDataError, StoreError
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.plan import Plan
from clampdown.steering.turn_reading import read_prompts
from clampdown.steering.units import Strength, Unit
from clampdown.store import write_json
from clampdown.study.along import Along, plan_along
from clampdown.study.correcting import RANK
from clampdown.study.progress import Stages
from clampdown.study.study import Study
from clampdown.study.tune.gates import GateKey
from clampdown.study.tune.prompts import PromptSets, harmful
from clampdown.study.tune.search import Combination
from clampdown.types import Prompt

OPERATOR = "floor_direction"
READ = 40
"""Prompts per harmful suite that say where strength is full, and benign ones that the error is fitted on."""


@dataclass(frozen=True, slots=True)
class Beyond:
    """Directions (None: the prompts have none), the error's subspace (None: it is not searched), and by gate the score
    from which on strength is full."""

    subspace: Subspace | None = None
    error: ErrorSubspace | None = None
    full: Mapping[GateKey, float] = field(default_factory=dict)

    def plan(self, study: Study, combination: Combination, multiple: float) -> Plan:
        """The first directions raised to a number of gaps."""
        assert self.subspace is not None, "the space has directions only where some were found"
        k, found = combination.directions, self.subspace
        first = Subspace(found.site, found.directions[:k], found.harmless[:k], found.gap[:k])
        asked = Along(combination.operator, Strength(multiple, Unit.GAP), combination.scope)
        return plan_along(study.lm, study.sae, first, asked, (), f"{combination} x{multiple:g}")


def cones(found: Beyond, asked: Sequence[int], scopes: Sequence[str]) -> list[Combination]:
    """Every number of directions that there are, at every scope."""
    most = 0 if found.subspace is None else len(found.subspace)
    return [Combination((), OPERATOR, scope, k) for k in asked if k <= most for scope in scopes]


def find_beyond(
    study: Study,
    sets: PromptSets,
    tempting: Sequence[Prompt],
    directions: Sequence[int],
    error: bool,
    path: Path,
    stages: Stages,
) -> Beyond:
    """Fit what is asked for on discovery prompts, or read it back. `tempting` are plain harmful ones."""
    if not path.exists():
        benign = sets.benign_of(sets.discovery) or sets.calibration.prompts
        with stages.stage("Finding directions"):
            subspace = _most(study, tempting, benign, directions)
            fitted = (
                fit_error_subspace(study.lm, study.sae, benign[:READ], min(RANK, study.lm.d_model)) if error else None
            )
        write_json(path, {"subspace": _rows(subspace), "error": _error_rows(fitted)})
    return _read(study, path)


def _most(
    study: Study, tempting: Sequence[Prompt], benign: Sequence[Prompt], directions: Sequence[int]
) -> Subspace | None:
    """As many directions as were asked for and there are."""
    for k in sorted(directions, reverse=True):
        try:
            return find_subspace(study.lm, tempting, benign, study.site, k)
        except NotEnoughDataError:
            continue
    return None


def _rows(found: Subspace | None) -> dict[str, Any] | None:
    names = ("directions", "harmless", "gap")
    return None if found is None else {name: getattr(found, name).tolist() for name in names}


def _error_rows(found: ErrorSubspace | None) -> dict[str, Any] | None:
    return found and {"directions": found.directions.tolist(), "fvu": found.fvu, "dropped": found.dropped}


def _read(study: Study, path: Path) -> Beyond:
    raw = read_json(path)
    try:
        lines, error = raw["subspace"], raw["error"]
        subspace = lines and Subspace(study.site, *(np.array(lines[n]) for n in ("directions", "harmless", "gap")))
        fitted = error and ErrorSubspace(torch.tensor(error["directions"]), error["fvu"], error["dropped"])
    except (KeyError, TypeError, ValueError) as problem:
        raise StoreError(
            f"{path} does not hold directions: {problem!r}", hint="delete it to find them again"
        ) from problem
    return Beyond(subspace or None, fitted or None)


def full_scores(study: Study, sets: PromptSets, gates: Mapping[GateKey, FittedGate]) -> dict[GateKey, float]:
    """By gate, the median score of the harmful discovery prompts on which it fires; gates that fire on none have none.
    What a prompt scored is remembered, so that gates of one kind cost one reading."""
    prompts = [prompt for suite in harmful(sets.discovery) for prompt in suite.prompts[:READ]]
    found: dict[GateKey, float] = {}
    for key, fitted in gates.items():
        read = read_prompts(study.lm, fitted.gate, fitted.vectors, study.sae, prompts)
        scores = np.array([reading.score for reading in read], dtype=float)
        try:
            full = fitted.growing(scores, 0.0).gate.full
        except NotEnoughDataError:
            continue
        if full is not None:
            found[key] = full
    return found
