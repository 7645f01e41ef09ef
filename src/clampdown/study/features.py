"""`clampdown features list|show|compare`: look at what finders found, at one feature, and at two rankings."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.cards import Card, read_card
from clampdown.discovery.agreement import compare_sets, counterparts
from clampdown.errors import FeatureIndexError, FeatureSetError, FeatureSetMismatchError, PromptSetError
from clampdown.evaluation.suites import read_suites
from clampdown.featuresets import Agreement, check_made_for, check_same_sae, merge
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_features
from clampdown.store import read_feature_set
from clampdown.study.card import make_card
from clampdown.study.progress import Stages
from clampdown.study.study import load_pair
from clampdown.types import FeatureScore, FeatureSet, Prompt, Split

DEFAULT_SETS = Path("runs/discover")

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(?P<score>[^<>=]+?)\s*(?P<how>>=|<=|>|<)\s*(?P<value>\S+)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound on a score, as in `firing_rate_harmful>=0.1`. A feature without the score does not meet it."""

    score: str
    how: str
    value: float

    def __call__(self, score: FeatureScore) -> bool:
        found = score.scores.get(self.score, math.nan)
        return _OPERATORS[self.how](found, self.value)


def parse_condition(text: str) -> Condition:
    """Read SCORE>=NUMBER (or <=, >, <). Raises `FeatureSetError`."""
    match = _CONDITION.fullmatch(text)
    try:
        value = float(match["value"]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        raise FeatureSetError(f"'{text}' is not a condition", hint="for example: --where 'firing_rate_harmful>=0.1'")
    return Condition(match["score"], match["how"], value)


def read_sets(path: Path) -> list[FeatureSet]:
    """A file's set, or all sets of a directory (or its `features/`). Raises `FeatureSetError` when there is none."""
    if path.is_file():
        return [read_feature_set(path)]
    files = sorted(path.glob("*.json")) or sorted((path / "features").glob("*.json"))
    if not files:
        raise FeatureSetError(f"no feature sets at {path}", hint="make some: clampdown discover")
    return [read_feature_set(file) for file in files]


def list_features(path: Path, sort: str | None, where: Sequence[Condition], *, ascending: bool = False) -> FeatureSet:
    """The features of a file, or of all files of a directory merged: as kept by the finder, or sorted by a score.

    Sorting looks at every feature of the SAE that has the score, kept or not. Raises `FeatureSetError` for unknown
    scores and `FeatureSetMismatchError` for sets about different SAEs.
    """
    found = functools.reduce(merge, read_sets(path))
    for name in (*(condition.score for condition in where), *([sort] if sort else [])):
        if name not in found.score_names:
            raise FeatureSetError(f"no score is called '{name}'", hint=f"one of: {', '.join(found.score_names)}")
    rows = list(every_feature(found)) if sort else list(found.features)
    if sort:
        rows = [row for row in rows if sort in row.scores]
        rows.sort(key=lambda row: row.scores[sort] if ascending else -row.scores[sort])
    kept = tuple(row for row in rows if all(condition(row) for condition in where))
    return dataclasses.replace(found, features=kept, ranked_by=sort or found.ranked_by)


def every_feature(found: FeatureSet) -> list[FeatureScore]:
    """All features with their scores, in index order; those that no finder kept come without tokens."""
    kept = {score.feature: score for score in found.features}
    columns = {name: found.column(name) for name in found.score_names}
    width = max(map(len, columns.values()), default=0)
    rows = []
    for feature in range(width):
        scores = {n: c[feature] for n, c in columns.items() if feature < len(c) and math.isfinite(c[feature])}
        rows.append(dataclasses.replace(kept.get(feature, FeatureScore(feature, {})), scores=scores))
    return rows


@dataclass(frozen=True, slots=True)
class ShowRequest:
    """What to put on a card: prompts from `prompts` (else the embedded suites, `limit` of each), scores from `sets`
    (else from the default directory, where it has sets about this SAE)."""

    prompts: Path | None = None
    sets: tuple[Path, ...] = ()
    limit: int = 60
    seed: int = 0


def show(which: str, model: str, sae: str, request: ShowRequest, stages: Stages) -> Card:
    """The card of feature number `which`, or the card in a file of that name, which needs no model."""
    if not which.strip().lstrip("-").isdigit():
        if Path(which).suffix != ".json":
            raise FeatureIndexError(f"'{which}' is not a feature", hint="give its index, or a card's .json file")
        return read_card(Path(which))
    with stages.stage("Loading"):
        lm, loaded = load_pair(model, sae)
    check_features([int(which)], loaded.cfg.d_sae)  # before prompts are drawn
    sets = _sets_about(loaded, request)
    prompts = prompts_of(request)
    with stages.stage("Reading prompts") as tick:
        return make_card(lm, loaded, int(which), prompts, sets, on_progress=tick)


def _sets_about(sae: Sae, request: ShowRequest) -> list[FeatureSet]:
    """The sets asked for, which must be about this SAE; else those of the default directory that are."""
    site, asked = sae.cfg.site.name, bool(request.sets)
    paths = request.sets or ((DEFAULT_SETS,) if any(DEFAULT_SETS.glob("*.json")) else ())
    kept = []
    for found in (each for path in paths for each in read_sets(path)):
        try:
            check_made_for(found, sae=sae.name, revision=sae.revision, site=site)
        except FeatureSetMismatchError:
            if asked:
                raise
        else:
            kept.append(found)
    return kept


def prompts_of(request: ShowRequest) -> list[Prompt]:
    """Prompts of a file, else of the embedded suites' discovery split: looking at cards is part of choosing features,
    so prompts that decide or test must not be on them."""
    if request.prompts is not None:
        # Only the texts are read here: prompts without a label are as good as those with one.
        suites = read_suites(request.prompts, harmful=False)
        if not suites:
            raise PromptSetError(f"{request.prompts} holds no prompts")
        return [prompt for suite in suites for prompt in suite.prompts]
    from clampdown.organism.suites import suites as embedded

    return [p for suite in embedded(Split.DISCOVERY, request.limit, request.seed) for p in suite.prompts]


def compare(first: Path, second: Path, scores: Sequence[str]) -> Agreement:
    """Two rankings: of one SAE's features, or of two SAEs' with features matched by their decoder rows.

    `scores` names a score for both, or one for each; by default each set's own ranking score.
    """
    a, b = (functools.reduce(merge, read_sets(path)) for path in (first, second))
    chosen = (scores[0], scores[-1]) if scores else (a.ranked_by, b.ranked_by)
    return compare_sets(a, b, chosen, _matched(a, b))


def _matched(first: FeatureSet, second: FeatureSet) -> dict[int, int] | None:
    """None for one SAE; else which feature of the second is which of the first, by decoder cosine."""
    try:
        check_same_sae(first, second)
    except FeatureSetMismatchError:
        if first.site != second.site or first.provenance.model_revision != second.provenance.model_revision:
            raise  # decoder rows of other sites or models lie in other spaces
    else:
        return None
    a, b = (_its_sae(found).W_dec.float().cpu().numpy() for found in (first, second))
    return counterparts(a, b)


def _its_sae(found: FeatureSet) -> Sae:
    sae = load_sae(found.provenance.sae or "")
    check_made_for(found, sae=sae.name, revision=sae.revision, site=sae.cfg.site.name)
    return sae
