"""Gradient shooting and polishing: optima that are known, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import Autodiff, Box, ContractError, Plan, Problem, UnsupportedProblem, check_planner
from mbrl.envs import gym_world
from mbrl.planners import CEM, ICEM, ILQR, GradientShooting, Polish
from tests.problems import DoubleIntegrator, Noisy, Quadratic, box, lq_problem, name, riccati, seeded
from tests.test_ilqr import swing_up

ADAM = GradientShooting(iterations=150)
LBFGS = GradientShooting(iterations=10, method="lbfgs")


def solve(planner: Any, problem: Problem[Any, Any, Box], x0: Tensor, guess: Plan | None = None) -> Plan:
    planner.check(problem)
    state = planner.init(problem, x0, generator=seeded(), guess=guess)
    plan: Plan = planner.plan(problem, x0, state, generator=seeded())[0]
    return plan


@pytest.mark.parametrize(
    "planner",
    [
        GradientShooting(),
        GradientShooting(method="lbfgs"),
        Polish(),
        Polish(planner=CEM(), by=GradientShooting()),
    ],
    ids=name,
)
def test_planners_keep_the_contract(planner: Any) -> None:
    check_planner(planner)


@pytest.mark.parametrize("planner", [ADAM, LBFGS], ids=["adam", "lbfgs"])
def test_lq_optimum(planner: GradientShooting) -> None:
    x0 = torch.tensor([[1.0, 0.5], [-2.0, 0.0]], dtype=torch.float64)
    cost, actions = riccati(lq_problem(horizon=8), x0)
    plan = solve(planner, lq_problem(horizon=8), x0)
    torch.testing.assert_close(plan.cost, cost, rtol=1e-2 if planner is ADAM else 1e-5, atol=0)
    torch.testing.assert_close(plan.actions, actions, rtol=0, atol=0.2 if planner is ADAM else 1e-2)


def test_bounds_are_kept_and_used() -> None:
    """The optimum of iLQR with bounds, by projection."""
    x0 = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    problem = Problem(Autodiff(DoubleIntegrator()), Quadratic(), box(1, 0.8), 8)
    wanted = solve(ILQR(), problem, x0)
    plan = solve(ADAM, problem, x0)
    assert bool((plan.actions.abs() <= 0.8).all()) and int((plan.actions.abs() == 0.8).sum()) >= 3
    assert float(plan.cost) == pytest.approx(float(wanted.cost), rel=1e-3)


def test_particles_share_one_draw() -> None:
    """A plan for a random wind is that for no wind on average."""
    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    problem = Problem(Noisy(0.3), Quadratic(), box(1, 10.0), 6, particles=100)
    plan = solve(ADAM, problem, x0)
    _, actions = riccati(lq_problem(), x0)
    assert float((plan.actions - actions).abs().max()) < 0.4


def test_what_has_no_gradient_is_refused() -> None:
    world = gym_world("InvertedPendulum-v5")
    _, info = world.make().reset(seed=0)
    with pytest.raises(UnsupportedProblem, match="no gradient comes through MujocoDynamics"):
        solve(GradientShooting(), world.problem(5), torch.as_tensor(info["state"])[None])
    with pytest.raises(UnsupportedProblem, match="finite bounds"):
        GradientShooting().check(lq_problem(limit=torch.inf))
    for options in ({"iterations": 0}, {"rate": 0.0}, {"method": "sgd"}, {"budget_ms": -1.0}):
        with pytest.raises(ContractError):
            GradientShooting(**options)


def test_polish_finds_the_floor_of_the_valley_that_a_search_finds() -> None:
    """From hanging still iLQR alone stays, the search alone is rough; row by row it is never worse than the search."""
    problem, x0 = swing_up(), torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    search = ICEM(population=60, iterations=3)
    both = Polish(planner=search, by=ILQR(iterations=50))
    plan, alone = solve(both, problem, x0), solve(ILQR(iterations=50), problem, x0)
    searched = plan.info["searched"]
    assert isinstance(searched, Tensor)
    assert bool((plan.cost < 0.9 * searched).all()) and float(plan.cost[0]) < 0.2 * float(alone.cost[0])
    state = both.init(problem, x0, generator=seeded())
    _, state = both.plan(problem, x0, state, generator=seeded())
    rough = replace(both, by=ILQR(iterations=1))
    later, _ = rough.plan(problem, x0, state, generator=seeded(1))
    assert bool((later.cost < 0.5 * searched).all())  # the search goes on around the refined plan
