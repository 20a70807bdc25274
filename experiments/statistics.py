"""What a few runs can tell: interquartile means, intervals, probabilities of improvement, performance profiles.

Scores come in strata, one array (n,) of runs for each task; resampling never moves a run to another task.

Reference: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.stats

Array = npt.NDArray[np.float64]
RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; no interval where the runs say nothing about one."""

    value: float
    low: float | None = None
    high: float | None = None


def iqm(scores: Array, axis: int = -1) -> Array:
    """The interquartile mean: of what is left without the lowest and the highest quarter."""
    found: Array = scipy.stats.trim_mean(scores, 0.25, axis=axis)
    return found


def mean(scores: Array, axis: int = -1) -> Array:
    found: Array = np.mean(scores, axis=axis)
    return found


def estimate(
    strata: Sequence[Array],
    statistic: Callable[..., Array] = iqm,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A statistic of all runs together, with a stratified percentile bootstrap interval.

    The deviations of a resample from its stratum's mean are stretched by √(n / (n − 1)), for those of n values are
    too small by that factor on average, which shows with ten seeds or fewer. The interval of a mean is widened as well,
    to what Student's t asks for in place of the normal; that of the interquartile mean is wide enough without, see
    the coverage benchmark.

    Args:
        strata: of each task, (n,) scores; n may differ, and a stratum of one run says nothing about its spread.
        statistic: of scores (..., N), along `axis`.

    Reference: Efron & Tibshirani 1993, "An introduction to the bootstrap", chapter 13; Rao & Wu 1988, "Resampling
        inference with complex survey data", for the stretch; Hesterberg 2015, "What teachers should know about the
        bootstrap", section 5.3, for the widening (expanded percentile interval).
    """
    strata = [np.asarray(scores, dtype=np.float64) for scores in strata]
    value = float(statistic(np.concatenate(strata)))
    if min(map(len, strata)) < 2 or all(np.ptp(scores) == 0 for scores in strata):
        return Estimate(value)

    if statistic is mean:
        freedom = sum(len(scores) - 1 for scores in strata)
        confidence = 1 - 2 * scipy.stats.norm.sf(scipy.stats.t.ppf((1 + confidence) / 2, freedom))

    def stretched(*resampled: Array, axis: int = -1) -> Array:
        parts = []
        for own, scores in zip(strata, resampled, strict=True):
            center, n = own.mean(), len(own)
            parts.append(center + (scores - center) * np.sqrt(n / (n - 1)))
        return statistic(np.concatenate(parts, axis=axis), axis=axis)

    found = scipy.stats.bootstrap(
        strata,
        stretched,
        n_resamples=resamples,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))


def probability_of_improvement(
    ours: Sequence[Array], theirs: Sequence[Array], *, confidence: float = 0.95, resamples: int = RESAMPLES
) -> Estimate:
    """How likely a run of ours beats one of theirs on a task drawn at random; a tie counts half.

    Args:
        ours, theirs: of each task, (n,) and (m,) scores.
    """
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(ours, theirs, strict=True)
    ]
    value = float(np.mean([_wins(a, b) for a, b in pairs]))
    if min(min(len(a), len(b)) for a, b in pairs) < 2:
        return Estimate(value)
    rng, total = np.random.default_rng(0), np.zeros(resamples)
    for a, b in pairs:
        total += _wins(rng.choice(a, (resamples, len(a))), rng.choice(b, (resamples, len(b))))
    low, high = np.quantile(total / len(pairs), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def _wins(a: Array, b: Array) -> Array:
    """The share of pairs (...) in which a (..., n) is above b (..., m)."""
    above = a[..., :, None] > b[..., None, :]
    equal = a[..., :, None] == b[..., None, :]
    return np.asarray((above + 0.5 * equal).mean((-1, -2)))


def performance_profile(strata: Sequence[Array], thresholds: Array) -> Array:
    """The share of runs above each threshold (n,), every task weighing the same: (n,)."""
    shares = [(np.asarray(scores)[:, None] > thresholds).mean(0) for scores in strata]
    found: Array = np.mean(shares, 0)
    return found


def pareto(cost: Sequence[float], value: Sequence[float]) -> list[int]:
    """Indices of those that no other beats at lower or equal cost, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -value[i])):
        if not front or value[i] > value[front[-1]]:
            front.append(i)
    return front
