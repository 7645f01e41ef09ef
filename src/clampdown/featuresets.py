"""Feature sets together: whether two are about the same SAE, and their scores side by side in one set."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clampdown.errors import FeatureSetMismatchError
from clampdown.types import FeatureScore, FeatureSet, ScoreColumns, ScoreSource


@dataclass(frozen=True, slots=True)
class Mover:
    """A feature (and its counterpart in the second set) whose place differs between two rankings; 1 is the best."""

    feature: int
    counterpart: int
    places: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two rankings compare over the `n` features that have both scores.

    `overlap[k]` is the share of the first's best k whose counterparts are among the second's best k; a k that either
    ranking does not reach is absent. `without_counterpart` counts ranked features that the second SAE has no like of.
    `spearman` is None when one of the scores is the same for all features.
    """

    labels: tuple[str, str]
    scores: tuple[str, str]
    n: int
    without_counterpart: int
    spearman: float | None
    overlap: Mapping[int, float]
    movers: tuple[Mover, ...]


def check_same_sae(first: FeatureSet, second: FeatureSet) -> None:
    """Raises `FeatureSetMismatchError` when a feature's index means different things in the two sets."""
    check_made_for(second, sae=first.provenance.sae, revision=first.sae_revision, site=first.site)


def check_made_for(found: FeatureSet, *, sae: str | None, revision: str | None, site: str) -> None:
    """Raises `FeatureSetMismatchError` when the set is about another SAE or site.

    What identifies an SAE is the hash of its files; its name may differ (a directory and a hub id are the same SAE).
    Names are compared only when a hash was not recorded.
    """
    known = found.sae_revision is not None and revision is not None
    same = found.sae_revision == revision if known else found.provenance.sae == sae
    if found.site == site and same:
        return
    theirs = f"SAE '{sae}' ({revision}) at {site}"
    raise FeatureSetMismatchError(
        f"'{found.finder}' found features of SAE '{found.provenance.sae}' ({found.sae_revision}) at {found.site}, "
        f"not of {theirs}: the same index means another feature",
        hint="find features again with the SAE that is to be used",
    )


def merge(first: FeatureSet, second: FeatureSet) -> FeatureSet:
    """Both sets' scores in one. The first set ranks; features that only the second kept follow in its order.

    A score that both have with different values keeps its name for the first set and becomes `FINDER/NAME` for the
    second (with a number, should that be taken too). Sources stay with their scores.
    Raises `FeatureSetMismatchError` for sets about different SAEs, or columns of different lengths.
    """
    check_same_sae(first, second)
    if first.columns and second.columns and first.columns.n_features != second.columns.n_features:
        raise FeatureSetMismatchError("the sets have columns of different lengths, so they are not about the same SAE")
    names = _names(first, second)
    kept = {score.feature: score for score in first.features}
    for score in second.features:
        kept[score.feature] = _joined(kept.get(score.feature), score, names)
    columns = dict(first.columns) | {names[name]: values for name, values in second.columns.items()}
    return dataclasses.replace(
        first,
        finder=" + ".join(dict.fromkeys((*first.finder.split(" + "), *second.finder.split(" + ")))),
        features=tuple(kept.values()),
        columns=ScoreColumns(columns),
        sources=_sources(first, second, names),
    )


def _names(first: FeatureSet, second: FeatureSet) -> dict[str, str]:
    """What each score of the second set is called in the merged one."""
    taken, names = set(first.score_names), {}
    for name in second.score_names:
        fresh = next(n for n in _candidates(second.finder, name) if n not in taken or _same(first, n, second, name))
        names[name] = fresh
        taken.add(fresh)
    return names


def _candidates(finder: str, name: str) -> Iterator[str]:
    yield name
    yield f"{finder}/{name}"
    yield from (f"{finder}/{name} {number}" for number in itertools.count(2))


def _same(first: FeatureSet, name: str, second: FeatureSet, other: str) -> bool:
    """Whether two sets' scores are one and the same: of one source, and no feature has two values."""
    if name not in first.score_names or first.source(name) != second.source(other):
        return False
    if name in first.columns and other in second.columns:
        return first.columns[name].tobytes() == second.columns[other].tobytes()
    known = {score.feature: score.scores.get(name) for score in first.features}
    return all(
        known.get(score.feature) in (None, score.scores[other]) for score in second.features if other in score.scores
    )


def _joined(before: FeatureScore | None, score: FeatureScore, names: Mapping[str, str]) -> FeatureScore:
    renamed = {names[name]: value for name, value in score.scores.items()}
    if before is None:
        return dataclasses.replace(score, scores=renamed)
    return dataclasses.replace(
        before,
        scores={**renamed, **before.scores},
        top_prompts=before.top_prompts or score.top_prompts,
        promoted_tokens=before.promoted_tokens or score.promoted_tokens,
        demoted_tokens=before.demoted_tokens or score.demoted_tokens,
    )


def _sources(first: FeatureSet, second: FeatureSet, names: Mapping[str, str]) -> dict[str, ScoreSource]:
    """Every score's source by name: in a merged set no score can go without."""
    sources = {name: first.source(name) for name in first.score_names}
    return {names[name]: second.source(name) for name in second.score_names} | sources
