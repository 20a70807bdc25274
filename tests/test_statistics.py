"""Statistics of few runs, against independent computations and by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from mbrl.experiments.statistics import (
    estimate,
    iqm,
    mean,
    pareto,
    performance_profile,
    probability_of_improvement,
)

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("n", [1, 3, 4, 10, 23, 60])
def test_the_interquartile_mean_is_that_of_the_middle_half(n: int) -> None:
    scores = RNG.normal(size=n)
    cut = n // 4
    assert iqm(scores) == pytest.approx(sum(sorted(scores)[cut : n - cut]) / (n - 2 * cut))


def test_the_interquartile_mean_ignores_outliers_and_keeps_shapes() -> None:
    scores = RNG.normal(size=(5, 20))
    wild = scores.copy()
    wild[:, 3] = 1e9
    assert np.abs(iqm(wild) - iqm(scores)).max() < 1.0
    assert iqm(scores, axis=0).shape == (20,)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng, size: rng.normal(size=size), 0.0),
        (lambda rng, size: rng.lognormal(0.0, 0.7, size=size), 1.0425),  # of ten at a time, by simulation
        (lambda rng, size: rng.standard_t(3, size=size), 0.0),
    ],
    ids=["normal", "skewed", "heavy tails"],
)
@pytest.mark.parametrize("tasks", [1, 6])
def test_intervals_cover_the_truth_as_often_as_they_say(draw: Any, truth: float, tasks: int) -> None:
    rng = np.random.default_rng(3)
    trials, inside = 900, 0
    for _ in range(trials):
        found = estimate(list(draw(rng, (tasks, 10))), resamples=300)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= truth <= found.high
    assert abs(inside / trials - 0.95) < 0.02


@pytest.mark.parametrize(("seeds", "tasks"), [(10, 1), (20, 1), (10, 6)])
def test_so_do_those_of_a_mean_of_normal_runs(seeds: int, tasks: int) -> None:
    rng, inside = np.random.default_rng(4), 0
    for _ in range(900):
        found = estimate(list(rng.normal(size=(tasks, seeds))), mean, resamples=600)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0 <= found.high
    assert abs(inside / 900 - 0.95) < 0.02


def test_strata_are_resampled_by_themselves() -> None:
    """Tasks that differ but hardly spread leave hardly any doubt, where pooled resampling would see much."""
    strata = [task + 0.01 * RNG.normal(size=10) for task in (0.0, 5.0, 100.0)]
    found = estimate(strata, mean)
    assert found.value == pytest.approx(35.0, abs=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.02


def test_an_interval_is_that_of_the_mean_for_normal_runs() -> None:
    scores = RNG.normal(size=200)
    found = estimate([scores], mean)
    half = scipy.stats.t.ppf(0.975, 199) * scores.std(ddof=1) / np.sqrt(200)
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("strata", [[[3.0]], [[1.0, 2.0], [5.0]], [[2.0, 2.0, 2.0]]])
def test_runs_that_say_nothing_about_their_spread_have_no_interval(strata: list[list[float]]) -> None:
    found = estimate([np.array(scores) for scores in strata])
    assert found.low is None
    assert found.high is None
    assert np.isfinite(found.value)


def test_probability_of_improvement_is_the_scaled_rank_sum() -> None:
    ours, theirs = RNG.normal(0.4, size=12), np.round(RNG.normal(size=9), 1)
    ours[0] = theirs[0]  # a tie
    found = probability_of_improvement([ours], [theirs])
    statistic = scipy.stats.mannwhitneyu(ours, theirs).statistic
    assert found.value == pytest.approx(statistic / (12 * 9))
    back = probability_of_improvement([theirs], [ours])
    assert found.value + back.value == pytest.approx(1.0)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high


def test_every_task_weighs_the_same_in_improvement_and_profiles() -> None:
    ours, theirs = [np.ones(4), np.zeros(100)], [np.zeros(4), np.ones(100)]
    assert probability_of_improvement(ours, theirs).value == 0.5
    assert performance_profile(ours, np.array([-0.5, 0.5, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_the_pareto_front_is_what_nothing_beats() -> None:
    cost, value = [3.0, 1.0, 2.0, 2.0, 5.0, 1.0], [4.0, 1.0, 3.0, 2.0, 4.0, 0.5]
    assert pareto(cost, value) == [1, 2, 0]
    assert pareto([], []) == []
