"""Intervals and tests for proportions, differences and means. Pure functions of counts and values.

    proportion                  Wilson (1927); exact: Clopper & Pearson (1934)
    proportion, clustered       Wilson on the effective sample size (Korn & Graubard 1998; Dean & Pagano 2015)
    difference, same prompts    Bonett & Price (2012), a Wald interval with one added to each discordant cell
    difference, other prompts   Newcombe (1998), square-and-add of two Wilson intervals
    difference of scores        percentile bootstrap over pairs, or over clusters of them
    same prompts, yes / no      exact McNemar
    same prompts, scores        permutation of the two sides within pairs (Fisher 1935), for any statistic of means
    several tests               Benjamini & Hochberg (1995); Holm (1979) where no false alarm at all is wanted

Too little data gives no bounds or no value, never 0.0. A proportion needs 1 observation (Wilson holds at any n),
clustered bounds `MIN_CLUSTERS` clusters, bootstrap bounds `MIN_RESAMPLED` pairs or clusters, Student's interval 2
values.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from clampdown.types import Interval

CONFIDENCE = 0.95
NO_DATA = Interval(None, None, None, 0)
MIN_CLUSTERS = 5
MIN_RESAMPLED = 10
RESAMPLES = 9999
_CHUNK = 1 << 20
_ALL_SWAPS = 13
"""Units up to which every way of swapping is tried, and not a sample of them."""

Statistic = Callable[[Float[np.ndarray, "... dims"]], Float[np.ndarray, "..."]]
"""Of the means of what observations contribute: the mean of one number itself, or what follows from several means."""


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Proportion with its Wilson score interval; no data when `n` is 0. Raises `ValueError` for impossible counts."""
    return Interval.of_rate(successes, n, confidence)


def _check_counts(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Proportion with its exact binomial two-sided interval (conservative: coverage is at least `confidence`).

    The one-sided bound that a gate's guarantee uses is `steering.gates.upper_bound`.
    """
    _check_counts(successes, n)
    if n == 0:
        return NO_DATA
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.isf(tail, successes + 1, n - successes))
    return Interval(successes / n, low, high, n)


def clustered(flags: Sequence[bool], clusters: Sequence[Hashable], confidence: float = CONFIDENCE) -> Interval:
    """Proportion whose observations are alike within clusters; with clusters of one it is Wilson's interval.

    The effective sample size is p(1-p) over the linearised between-cluster variance, corrected for few clusters by
    (z / t)^2, and at most n. When all observations agree there is nothing to estimate it from: a cluster counts as one.
    """
    n, found = len(flags), _codes(clusters)
    n_clusters = int(found.max()) + 1 if n else 0
    if n_clusters == n:
        return wilson(sum(flags), n, confidence)
    rate = sum(flags) / n
    if n_clusters < MIN_CLUSTERS:
        return Interval(rate, None, None, n)
    residuals = np.bincount(found, np.asarray(flags, dtype=float) - rate)
    variance = n_clusters / (n_clusters - 1) * float((residuals**2).sum()) / n**2
    effective = _effective(rate, variance, n, n_clusters, confidence)
    return Interval.of_rate(sum(flags), n, confidence, effective=effective)


def _effective(rate: float, variance: float, n: int, n_clusters: int, confidence: float) -> float:
    if rate in (0.0, 1.0):
        return n_clusters
    if variance == 0:
        return n
    tail = (1 + confidence) / 2
    correction = float(stats.norm.ppf(tail)) / float(stats.t.ppf(tail, n_clusters - 1))
    return min(n, rate * (1 - rate) / variance * correction**2)


def _codes(clusters: Sequence[Hashable]) -> Int[np.ndarray, " n"]:
    """Clusters as 0, 1, 2, ... in order of first appearance."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(cluster, len(number)) for cluster in clusters], dtype=np.int64)


def paired_difference(gained: int, lost: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Difference of two proportions on the same `n` prompts, of which `gained` have the outcome the second time only.

    Bonett & Price (2012, eq. 3). Unlike a bootstrap it has a width when no pair differs: absence of a difference in 20
    prompts is no proof that there is none.
    """
    if not 0 <= gained + lost <= n or min(gained, lost) < 0:
        raise ValueError(f"{gained} gained and {lost} lost out of {n}")
    if n == 0:
        return NO_DATA
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    centre = up - down
    return Interval((gained - lost) / n, max(-1.0, float(centre - half)), min(1.0, float(centre + half)), n)


def unpaired_difference(second: Interval, first: Interval) -> Interval:
    """second - first for proportions of different prompts, from their own intervals (Newcombe 1998, method 10)."""
    n = min(second.n, first.n)
    if second.value is None or first.value is None:
        return Interval(None, None, None, n)
    value = second.value - first.value
    bounds = (second.low, second.high, first.low, first.high)
    if any(bound is None for bound in bounds):
        return Interval(value, None, None, n)
    low2, high2, low1, high1 = (float(bound or 0.0) for bound in bounds)
    low = value - float(np.hypot(second.value - low2, high1 - first.value))
    return Interval(value, low, value + float(np.hypot(high2 - second.value, first.value - low1)), n)


def mcnemar(gained: int, lost: int) -> float | None:
    """Exact two-sided McNemar p-value from the discordant counts; None when the arms never differed."""
    if gained + lost == 0:
        return None
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def benjamini_hochberg(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """q-values: the smallest false discovery rate at which each test is significant. None is no test and stays None."""
    known = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(known).tolist() if known else [])
    return tuple(None if p is None else float(next(adjusted)) for p in p_values)


def holm(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """Adjusted p-values: the smallest chance of any false alarm among all tests at which each is significant.

    None is a comparison in which nothing differed. It was looked at, so it counts among the tests, and stays None.
    """
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i] or 0.0)
    found: dict[int, float] = {}
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * (p_values[i] or 0.0)))
        found[i] = largest
    return tuple(found.get(i) for i in range(len(p_values)))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean with Student's interval; no bounds below two values."""
    if not values:
        return NO_DATA
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    error = float(np.std(values, ddof=1)) / np.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * float(error)
    return Interval(mean, mean - half, mean + half, n)


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Mean of `second - first` with a percentile interval over resampled pairs, or over resampled clusters of pairs.

    Raises `ValueError` when the sequences are not pairs.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores are not pairs")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    if differences.size == 0:
        return NO_DATA
    codes = _codes(range(differences.size) if clusters is None else clusters)
    sums, counts = np.bincount(codes, differences), np.bincount(codes)
    value = float(differences.mean())
    if len(sums) < MIN_RESAMPLED:
        return Interval(value, None, None, differences.size)
    drawn = [sums[i].sum(1) / counts[i].sum(1) for i in _resampled(len(sums), seed)]
    low, high = _percentiles(np.concatenate(drawn), confidence)
    return Interval(value, low, high, differences.size)


def statistic_of(values: Float[np.ndarray, "n dims"], statistic: Statistic) -> float:
    """The statistic of the observations' means."""
    return float(statistic(values.mean(0, keepdims=True))[0])


def statistic_bootstrap(
    first: Float[np.ndarray, "n dims"],
    second: Float[np.ndarray, "n dims"],
    statistic: Statistic,
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Difference of a statistic of means between two sides of the same observations, with a percentile interval over
    resampled observations, or clusters of them. With the mean itself it is `paired_bootstrap`."""
    n = len(first)
    if n == 0:
        return NO_DATA
    value = statistic_of(second, statistic) - statistic_of(first, statistic)
    codes = _codes(range(n) if clusters is None else clusters)
    counts = np.bincount(codes).astype(float)
    if len(counts) < MIN_RESAMPLED:
        return Interval(value, None, None, n)
    sums = [_sums(side, codes) for side in (first, second)]
    drawn = []
    for i in _resampled(len(counts), seed):
        total = counts[i].sum(1)[:, None]
        before, after = (np.stack([column[i].sum(1) for column in side.T], 1) / total for side in sums)
        drawn.append(statistic(after) - statistic(before))
    low, high = _percentiles(np.concatenate(drawn), confidence)
    return Interval(value, low, high, n)


def swap_test(
    first: Float[np.ndarray, "n dims"],
    second: Float[np.ndarray, "n dims"],
    statistic: Statistic,
    *,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> float | None:
    """Two-sided p-value of that difference: were the sides nothing but labels, either could be the first, for every
    observation (or cluster) by itself. All swaps are tried for few observations, else a sample. None when the sides
    never differ."""
    differences = _sums(second, codes := _codes(range(len(first)) if clusters is None else clusters))
    differences -= _sums(first, codes)
    n, moved = len(first), differences.any(1)
    if not moved.any():
        return None
    changes, before, after = differences[moved], first.mean(0), second.mean(0)
    seen = abs(statistic_of(second, statistic) - statistic_of(first, statistic))
    swaps, exact = _swaps(len(changes), seed)
    shifts = swaps @ changes / n
    found = np.abs(statistic(after - shifts) - statistic(before + shifts)) >= seen - 1e-12 * max(1.0, seen)
    return float(found.mean()) if exact else float((1 + found.sum()) / (1 + len(found)))


def _sums(values: Float[np.ndarray, "n dims"], codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, "clusters dims"]:
    """What the observations of each cluster contribute together."""
    return np.stack([np.bincount(codes, column) for column in values.T], 1)


def _swaps(n: int, seed: int) -> tuple[Float[np.ndarray, "ways n"], bool]:
    """Which of `n` units change sides, each way a row, and whether these are all ways."""
    if n <= _ALL_SWAPS:
        return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(float), True
    return np.random.default_rng(seed).integers(0, 2, (RESAMPLES, n)).astype(float), False


def clustered_bootstrap(
    flags: Sequence[bool],
    on_second: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Rate on the second side minus rate on the first, resampling clusters that may hold observations of both sides.

    `n` is the smaller side's number of observations.
    """
    codes, second = _codes(clusters), np.asarray(on_second, dtype=bool)
    sides = (second, ~second)
    n = min(int(side.sum()) for side in sides)
    if n == 0:
        return NO_DATA
    hits = [np.bincount(codes, np.asarray(flags, dtype=float) * side) for side in sides]
    totals = [np.bincount(codes, side.astype(float)) for side in sides]
    value = float(hits[0].sum() / totals[0].sum() - hits[1].sum() / totals[1].sum())
    if len(totals[0]) < MIN_RESAMPLED:
        return Interval(value, None, None, n)
    drawn = []
    for i in _resampled(len(totals[0]), seed):
        after, before = totals[0][i].sum(1), totals[1][i].sum(1)
        both = (after > 0) & (before > 0)  # a sample that happens to hold one side only says nothing
        drawn.append((hits[0][i].sum(1)[both] / after[both]) - (hits[1][i].sum(1)[both] / before[both]))
    low, high = _percentiles(np.concatenate(drawn), confidence)
    return Interval(value, low, high, n)


def _resampled(n: int, seed: int) -> Iterator[Int[np.ndarray, "chunk n"]]:
    """Which of `n` units each bootstrap sample draws, in chunks that stay small whatever `n`."""
    generator = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // n)
    for start in range(0, RESAMPLES, chunk):
        yield generator.integers(0, n, (min(chunk, RESAMPLES - start), n))


def _percentiles(values: Float[np.ndarray, " resamples"], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
