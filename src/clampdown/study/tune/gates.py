"""The gates that `clampdown tune` searches: each kind fitted once, then calibrated for every promise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clampdown.activations.collect import collect_to
from clampdown.activations.stream import plan_pass
from clampdown.documents import read_json
from clampdown.errors import NotEnoughDataError, StoreError
from clampdown.steering.gate_fitting import FITTERS, FittedGate, Pooled, fit_gate, fit_probe_of, gate_reading
from clampdown.steering.plan import Gate
from clampdown.steering.turn_promise import Turnwise, longest_turn
from clampdown.store import content_hash
from clampdown.study.gating import Lessons
from clampdown.study.progress import Stages
from clampdown.study.study import Study
from clampdown.study.tune.prompts import PromptSets, prompts_of
from clampdown.types import Prompt

Promise = tuple[float, float]
"""A benign budget, and how sure it is."""
GateKey = tuple[str, float, float]
"""A kind and its promise."""


def known_gates() -> str:
    return ", ".join("probe or probeN (at most N features)" if kind == "probe" else kind for kind in FITTERS)


def kind_of(name: str) -> tuple[str, int]:
    """`probe10` as ("probe", 10); other kinds have no number."""
    match = re.fullmatch(r"probe(\d+)", name)
    return ("probe", int(match[1])) if match and int(match[1]) else (name, 40)


def fit_gates(
    study: Study, sets: PromptSets, kinds: Sequence[str], promises: Sequence[Promise], out: Path, stages: Stages
) -> dict[GateKey, FittedGate]:
    """Each kind fitted once on discovery prompts, then calibrated for each promise that the calibration prompts can
    prove. Raises `NotEnoughDataError` without any."""
    sides = [[p for s in sets.discovery if s.harmful is harmful for p in s.prompts] for harmful in (True, False)]
    learnt, benign = Lessons.of(study, *sides, wrapped=0), sets.calibration.prompts
    pooled = read_pooled(study, learnt.turns, out, stages, "Reading prompts for gates")
    window = longest_turn(study.lm, [*prompts_of(sets.discovery), *learnt.turns, *benign])
    found: dict[GateKey, FittedGate] = {}
    last = NotEnoughDataError("no gate was asked for")
    with stages.stage("Fitting gates") as tick:
        for done, kind in enumerate(kinds, 1):
            try:
                fitted = _fit(kind, pooled, learnt.harmful, study.seed)
                within = calibrated(study, fitted, window, benign, promises)
                found |= {(kind, *promise): each for promise, each in within.items()}
            except NotEnoughDataError as error:
                last = error
            tick(done, len(kinds))
    if not found:
        raise last
    return found


def calibrated(
    study: Study, fitted: FittedGate, window: int, benign: Sequence[Prompt], promises: Iterable[Promise]
) -> dict[Promise, FittedGate]:
    """A gate with each promise that the prompts can prove. Raises `NotEnoughDataError` when they can prove none."""
    found: dict[Promise, FittedGate] = {}
    last: NotEnoughDataError | None = None
    for budget, confidence in promises:
        try:
            found[budget, confidence] = Turnwise(study.lm, study.sae, window, confidence).within(fitted, benign, budget)
        except NotEnoughDataError as error:
            last = error
    if last and not found:
        raise last
    return found


def _fit(kind: str, pooled: Pooled, positive: np.ndarray, seed: int) -> FittedGate:
    name, most = kind_of(kind)
    if name != "probe":
        return fit_gate(name, pooled, positive, seed=seed)
    return fit_probe_of(pooled, positive, max_features=most, seed=seed)


def read_pooled(study: Study, prompts: Sequence[Prompt], out: Path, stages: Stages, name: str) -> Pooled:
    """One pass over the prompts at the SAE's site, in a directory of its own: a repeated command reads it back."""
    job = plan_pass(study.lm, [gate_reading(study.sae.cfg.site, study.sae)], prompts)
    with stages.stage(name) as tick:
        store = collect_to(job, out / "activations" / content_hash(job.key), tick)
    assert store is not None, "all batches were asked for"
    return Pooled.of(store)


def gate_row(key: GateKey, fitted: FittedGate) -> dict[str, Any]:
    named = dict(zip(("kind", "budget", "confidence"), key, strict=True))
    return {**named, "gate": fitted.gate.model_dump(mode="json"), "vectors": fitted.vectors}


def cached_gates(path: Path) -> dict[GateKey, FittedGate] | None:
    if not path.exists():
        return None
    try:
        return {
            (row["kind"], row["budget"], row["confidence"]): FittedGate(
                Gate.model_validate(row["gate"]), {name: tuple(v) for name, v in row["vectors"].items()}
            )
            for row in read_json(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} does not hold gates: {error!r}", hint="delete it to fit them again") from error
