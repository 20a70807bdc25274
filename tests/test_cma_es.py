"""CMA-ES against the package `cma`, its author's own software."""

from __future__ import annotations

import math
from collections.abc import Callable

import cma
import pytest
import torch
from torch import Tensor

from mbrl.planners import CMAES
from mbrl.planners.cma_es import CMAESState, Constants
from tests.problems import seeded

N = 10
TARGET = 1e-6


@pytest.mark.filterwarnings("ignore")  # cma warns about the population sizes tried here
@pytest.mark.parametrize(("n", "population"), [(10, 10), (4, 20), (30, 20), (90, 20), (10, 50)])
def test_strategy_constants(n: int, population: int) -> None:
    options = {"popsize": population, "CMA_active": False, "verbose": -9}
    oracle = cma.CMAEvolutionStrategy(n * [0.1], 0.3, options)
    ours = Constants.of(n, population, separable=False)
    assert ours.weights == pytest.approx(list(oracle.sp.weights.positive_weights), rel=1e-12)
    assert ours.mu_eff == pytest.approx(oracle.sp.weights.mueff, rel=1e-12)
    assert ours.c_c == pytest.approx(oracle.sp.cc, rel=1e-12)
    assert ours.c_1 == pytest.approx(oracle.sp.c1, rel=1e-12)
    assert ours.c_mu == pytest.approx(oracle.sp.cmu, rel=1e-12)
    assert ours.chi_n == pytest.approx(oracle.const.chiN, rel=1e-12)
    # cma has step-size constants of its own by now; these are the tutorial's, table 1.
    assert ours.c_sigma == pytest.approx((ours.mu_eff + 2) / (n + ours.mu_eff + 5))
    extra = max(0.0, math.sqrt((ours.mu_eff - 1) / (n + 1)) - 1)
    assert ours.d_sigma == pytest.approx(1 + 2 * extra + ours.c_sigma)


@pytest.mark.parametrize(("n", "population"), [(2, 40), (10, 10), (300, 20)])
def test_separable_constants(n: int, population: int) -> None:
    full, diagonal = (Constants.of(n, population, separable=separable) for separable in (False, True))
    assert diagonal.c_1 == pytest.approx(full.c_1 * (n + 2) / 3)
    assert diagonal.c_mu == pytest.approx(min(1 - diagonal.c_1, full.c_mu * (n + 2) / 3))
    assert 0 < diagonal.c_1 + diagonal.c_mu <= 1


def sphere(z: Tensor) -> Tensor:
    return (z - 0.3).square().sum(-1)


def ellipsoid(z: Tensor) -> Tensor:
    axes = 10 ** (6 * torch.arange(N, dtype=z.dtype) / (N - 1))
    return (axes * (z - 0.3).square()).sum(-1)


def rosenbrock(z: Tensor) -> Tensor:
    w = 2 * z  # the optimum, all ones, lies inside the bounds
    return (100 * (w[..., 1:] - w[..., :-1].square()).square() + (1 - w[..., :-1]).square()).sum(-1)


def evaluations(function: Callable[[Tensor], Tensor], planner: CMAES, runs: int = 15) -> Tensor:
    """Evaluations until `function` falls below the target, (runs,)."""
    generator = seeded()
    state = planner.start(torch.zeros(runs, N, 1, dtype=torch.float64), torch.zeros(runs, dtype=torch.long))
    used = torch.full((runs,), torch.inf)
    for i in range(1500):
        knots = planner.propose(state, i, False, generator=generator).clamp(-1, 1)
        cost = function(knots[..., 0])
        state, _ = planner.update(state, knots, cost)
        used = torch.where(
            (cost.min(-1).values < TARGET) & torch.isinf(used), (i + 1) * planner.population, used
        )
        if torch.isfinite(used).sum() > runs // 2:
            break
    return used


# Median evaluations of cma 4.5.0 from mean 0, σ = 0.3, λ = 10, over seeds 1 to 11, with CMA_active=False
# and CMA_diagonal=True for the separable variant, whose constants differ (Ros & Hansen 2008 here).
@pytest.mark.parametrize(
    ("function", "full", "median"),
    [
        (sphere, True, 890),
        (ellipsoid, True, 5050),
        (rosenbrock, True, 5710),
        (sphere, False, 810),
        (ellipsoid, False, 2430),
    ],
)
def test_as_few_evaluations_as_cma(function: Callable[[Tensor], Tensor], full: bool, median: int) -> None:
    planner = CMAES(population=10, knot_spacing=1, std=0.3, full_below=N if full else N - 1)
    # The median run has just succeeded when the search stops.
    used = evaluations(function, planner)
    ours = float(used.sort().values[len(used) // 2])
    assert median / 1.5 < ours < 1.5 * median


@pytest.mark.parametrize("full", [True, False])
def test_rows_of_a_batch_equal_single_rows(full: bool) -> None:
    planner = CMAES(population=8, full_below=100 if full else 0)
    M, K, nu = 3, 4, 2
    batch = planner.start(torch.zeros(M, K, nu, dtype=torch.float64), torch.zeros(M, dtype=torch.long))
    singles = [
        planner.start(torch.zeros(1, K, nu, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
        for _ in range(M)
    ]
    scale = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    for i in range(25):
        knots = planner.propose(batch, i, False, generator=seeded(i))
        cost = (knots.reshape(M, 8, K * nu) - 0.2).square().sum(-1) * scale[:, None]
        batch, weights = planner.update(batch, knots, cost)
        for m in range(M):
            singles[m], alone = planner.update(singles[m], knots[m : m + 1], cost[m : m + 1])
            torch.testing.assert_close(alone[0], weights[m])
    for m in range(M):
        for field in ("solution", "sigma", "C", "p_sigma", "p_c", "generation"):
            torch.testing.assert_close(getattr(singles[m], field)[0], getattr(batch, field)[m])


def updated(planner: CMAES, cost: Tensor) -> tuple[CMAESState, CMAESState, Tensor]:
    state = planner.start(torch.full((1, 3, 1), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    knots = planner.propose(state, 0, True, generator=seeded())
    after, weights = planner.update(state, knots, cost)
    return state, after, weights


def test_too_few_finite_candidates_change_nothing() -> None:
    planner = CMAES(population=8)
    cost = torch.full((1, 8), torch.inf, dtype=torch.float64)
    cost[0, :3] = torch.tensor([1.0, 2.0, 3.0])  # μ = 4 are needed
    before, after, weights = updated(planner, cost)
    for field in ("solution", "sigma", "C", "p_sigma", "p_c", "generation"):
        assert torch.equal(getattr(before, field), getattr(after, field))
    assert (weights == 0).all()
    cost[0, 3] = 4.0
    before, after, weights = updated(planner, cost)
    assert not torch.equal(before.solution, after.solution)
    assert float(weights.sum()) == pytest.approx(1.0) and (weights[0, 4:] == 0).all()


def test_a_new_control_step_starts_the_covariance_anew() -> None:
    planner = CMAES(population=8, std=0.4)
    _, after, _ = updated(planner, torch.arange(8.0, dtype=torch.float64)[None])
    moved = planner.advance(after, lambda knots: knots + 1.0)
    assert torch.equal(moved.solution, after.solution + 1.0)
    assert moved.sigma.tolist() == [0.4] and moved.generation.tolist() == [0]
    assert torch.equal(moved.C[0], torch.eye(3, dtype=torch.float64))
    assert (moved.p_c == 0).all() and (moved.p_sigma == 0).all()
