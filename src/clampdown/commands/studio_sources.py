"""What the studio shows that lies outside the server: kept plans, past runs, and a gate's scores on prompts.

Names come from a browser. They are looked up in what was found on disk by listing it; no path is made of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.config import ORGANISM
from clampdown.errors import ClampdownError, PlanError, PromptSetError
from clampdown.evaluation.suites import read_suites
from clampdown.models.loading import LanguageModel
from clampdown.results.run import Run
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.serving.plans import PlanTable, slug
from clampdown.serving.studio.frontier import PastRun
from clampdown.serving.studio.gates import GateScores, SuiteScores
from clampdown.steering.gate_fitting import FittedGate, Pooled, gate_reading
from clampdown.steering.plan import Gate, Plan, read_plan, write_plan
from clampdown.steering.program import check_plan
from clampdown.steering.selftest import require_self_test
from clampdown.steering.turn_promise import conversation_maxima
from clampdown.steering.turn_reading import read_prompts, window_scores
from clampdown.types import Site, Split, Suite

LAST_RUNS = 12
BENIGN_PROMPTS, SHOWN_PROMPTS = 1600, 60
Tick = Callable[[int, int], None]


@dataclass
class Saes:
    """Whole SAEs by site, loaded when they are first asked for."""

    names: Mapping[str, str]
    device: str
    _loaded: dict[str, Sae] = field(default_factory=dict)

    def at(self, site: str) -> Sae | None:
        """The SAE at a site, if the server has one there."""
        if site in self.names and site not in self._loaded:
            self._loaded[site] = load_sae(self.names[site], device=self.device, site=Site.parse(site))
        return self._loaded.get(site)

    def of(self, plan: Plan) -> dict[str, Sae]:
        """The SAEs that a plan needs. Raises `PlanError` for one that is not here."""
        found = {ref.site: self.at(ref.site) for ref in plan.saes}
        for ref in plan.saes:
            if found[ref.site] is None:
                raise PlanError(f"the plan needs the SAE '{ref.name}' at {ref.site}, which is not loaded here")
        return {site: sae for site, sae in found.items() if sae is not None}


@dataclass
class PlanFolder:
    """The server's plans, and a directory in which new ones are kept. `lm` is for trying them."""

    table: PlanTable
    folder: Path
    lm: LanguageModel
    saes: Saes
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> tuple[str, ...]:
        return tuple(plan.name for _, plan in self.table)

    def plan(self, name: str) -> Plan:
        """Raises `PlanError` for a name that no plan has."""
        for key, plan in self.table:
            if name in (key, plan.name):
                return plan
        raise PlanError(f"there is no plan '{name}' here")

    def offered(self, plan: Plan) -> str | None:
        """Its own name, where that is what the server calls it; else that of a plan which does the same."""
        same = [key for key, each in self.table if each.digest == plan.digest]
        return next((key for key in same if key == slug(plan.name)), next(iter(same), None))

    def save(self, name: str, plan: Plan) -> str:
        """Try the plan, write it, and offer it; returns the file's name. A name is never given to a second plan."""
        key, saes = slug(name), self.saes.of(plan)
        check_plan(plan, self.lm, saes)
        require_self_test(self.lm, plan, list(saes.values()))
        path = self.folder / f"{key}.toml"
        with self._lock:
            if path.exists() and read_plan(path).digest != plan.digest:
                raise PlanError(f"there is another plan of the name '{key}'", hint="choose another name")
            self.table.add(plan, key)
            write_plan(path, plan)
        return f"{self.folder.name}/{path.name}"


@dataclass
class RunFolder:
    """Past runs about this model: directories with a `summary.json` and the plans of its arms."""

    folder: Path
    lm: LanguageModel
    saes: Saes
    _read: dict[tuple[Path, float], PastRun | None] = field(default_factory=dict)

    def runs(self) -> tuple[PastRun, ...]:
        """The last ones, newest first. What cannot be read, or is about another model, is not one."""
        files = [(path.stat().st_mtime, path) for path in self.folder.glob("*/summary.json")]
        found = (self._run(path, changed) for changed, path in sorted(files, reverse=True)[:LAST_RUNS])
        return tuple(past for past in found if past is not None and _revision(past.run) == self.lm.revision)

    def plan(self, run: str, arm: str) -> Plan:
        """A point's plan, which must fit what is loaded. Raises `PlanError` and kin."""
        found = next((each for each in self.runs() if each.name == run), None)
        row = found.arm(arm) if found else None
        if found is None or row is None or row.plan is None or not found.loadable(row):
            raise PlanError(f"there is no plan to load for '{arm}'", hint="runs made before plans were kept have none")
        plan = read_plan(_stored(self.folder / run)[row.plan])
        named = plan.named(arm)
        check_plan(named, self.lm, self.saes.of(named))
        return named

    def _run(self, path: Path, changed: float) -> PastRun | None:
        key = (path, changed)
        if key not in self._read:
            self._read[key] = _parsed(path)
        return self._read[key]


def _parsed(path: Path) -> PastRun | None:
    try:
        return PastRun(path.parent.name, Run.read(path.parent), frozenset(_stored(path.parent)))
    except ClampdownError:
        return None


def _revision(run: Run) -> str | None:
    return run.provenance.model_revision if run.provenance else None


def _stored(run: Path) -> dict[str, Path]:
    """The plans of a run by digest. Runs that were made before every plan was kept have `plan.toml` only."""
    found = {path.stem: path for path in (run / "plans").glob("*.toml")}
    if (run / "plan.toml").exists():
        found.setdefault(read_plan(run / "plan.toml").digest, run / "plan.toml")
    return found


@dataclass(frozen=True)
class GateReader:
    """Scores of a plan's first gate on benign calibration prompts and on validation prompts, in one pass."""

    lm: LanguageModel
    saes: Saes
    model: str
    prompts: Path | None = None

    def __call__(self, plan: Plan, tick: Tick) -> GateScores:
        """Raises `PlanError` for a gate that reads no activations, `PromptSetError` without prompts."""
        gate = plan.gate
        if gate is None or not gate.site:
            raise PlanError("only gates that read the model's activations have scores to show here")
        benign, shown = self._suites()
        if gate.window:
            return self._turn_by_turn(gate, plan, benign, shown)
        prompts = [prompt for suite in (*benign, *shown) for prompt in suite.prompts]
        reading = gate_reading(Site.parse(gate.site), self.saes.at(gate.site))
        scores = _scores(gate, plan, Pooled.of(collect(plan_pass(self.lm, [reading], prompts), tick)))
        cuts = np.cumsum([len(suite.prompts) for suite in (*benign, *shown)])[:-1]
        parts = [tuple(part.tolist()) for part in np.split(scores, cuts)]
        calibration = tuple(score for part in parts[: len(benign)] for score in part)
        suites = zip(shown, parts[len(benign) :], strict=True)
        return GateScores(calibration, tuple(SuiteScores(s.name, s.harmful, part) for s, part in suites))

    def _turn_by_turn(self, gate: Gate, plan: Plan, benign: Sequence[Suite], shown: Sequence[Suite]) -> GateScores:
        """A gate that reads turn by turn promises something of conversations: theirs are the benign scores."""
        reading = (self.lm, gate, plan.vectors, self.saes.at(gate.site))
        scores, owner = window_scores(*reading, [prompt for suite in benign for prompt in suite.prompts])
        maxima = conversation_maxima(scores, owner, max(gate.turns_calibrated, 1))
        if not len(maxima):  # too few prompts for one conversation of that length: they count as they are
            maxima = conversation_maxima(scores, owner, 1)
        suites = (
            SuiteScores(s.name, s.harmful, tuple(read.score for read in read_prompts(*reading, s.prompts)))
            for s in shown
        )
        return GateScores(tuple(maxima.tolist()), tuple(suites))

    def _suites(self) -> tuple[Sequence[Suite], Sequence[Suite]]:
        """(benign calibration prompts, validation prompts)."""
        if self.prompts is not None:
            every = read_suites(self.prompts)
            return _of_split(every, Split.CALIBRATION, harmless=True), _of_split(every, Split.VALIDATION)
        if self.model != ORGANISM:
            raise PromptSetError(
                "there are no prompts here to read the gate on",
                hint="start with --prompts FILE: columns prompt, suite, harmful, split",
            )
        from clampdown.organism.suites import suites

        benign = [s for s in suites(Split.CALIBRATION, BENIGN_PROMPTS) if s.name == "benign"]
        return benign, suites(Split.VALIDATION, SHOWN_PROMPTS)


def _of_split(every: Sequence[Suite], split: Split, *, harmless: bool = False) -> list[Suite]:
    kept = [Suite(s.name, s.kind, s.harmful, tuple(p for p in s.prompts if p.split is split)) for s in every]
    return [s for s in kept if s.prompts and not (harmless and s.harmful)]


def _scores(gate: Gate, plan: Plan, pooled: Pooled) -> np.ndarray:
    return FittedGate(gate, {name: plan.vectors[name] for name in gate.vectors}).scores(pooled)
