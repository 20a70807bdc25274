"""Planners of one strength: none takes more of the model than its budget, all take about as much time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from mbrl.envs import make_world
from mbrl.errors import ContractError, UnknownName, UnsupportedProblem
from mbrl.experiments import contenders
from mbrl.experiments.cells import ANALYTIC, problem_of
from mbrl.experiments.contenders import CONTENDERS, calibrated, contender, size_for
from mbrl.problem import Plan
from tests.jobs import CELL


def problem_for(name: str, env: str = "cart-pole", horizon: int = 10) -> Any:
    world = make_world(env)
    cell = CELL.__class__(**{**vars(CELL), "env": env, "model": ANALYTIC, "horizon": horizon})
    return problem_of(cell, world, contender(name, 1))[0]


@pytest.mark.parametrize("budget", [700, 2_000])
@pytest.mark.parametrize("name", CONTENDERS)
def test_no_plan_takes_more_than_its_budget_and_sampling_takes_nearly_all(name: str, budget: int) -> None:
    problem = problem_for(name)
    planner = contender(name, size_for(name, budget, problem))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.tensor([[0.1, 0.2, 0.0, 0.0], [0.0, 3.0, 0.1, 0.0]], dtype=torch.float64)
    plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=generator), generator=generator)
    taken = torch.as_tensor(plan.info["model_steps"])
    assert 0 < float(taken.max()) <= budget
    if hasattr(planner, "population"):
        assert float(taken.min()) > 0.8 * budget


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_budget_that_is_too_small_is_told(name: str) -> None:
    with pytest.raises(ContractError, match=rf"{name} needs at least .* steps of the model .* budget is 60"):
        size_for(name, 60, problem_for(name))


def test_unknown_planners_are_told() -> None:
    with pytest.raises(UnknownName, match="Did you mean icem"):
        contender("ice-m", 3)


class Slow:
    """A plan takes overhead + each × size milliseconds, by a clock of its own and with noise of 3 %."""

    def __init__(self, overhead: float, each: float, most: int = 10**9, seed: int = 0):
        self.overhead, self.each, self.most, self.now = overhead, each, most, 0.0
        self.random = np.random.default_rng(seed)

    def of(self, name: str, size: int) -> Any:
        clock = self

        class Sized:
            def init(self, problem: Any, x0: Any, *, generator: Any) -> None:
                pass

            def plan(self, problem: Any, x0: Any, state: None, *, generator: Any) -> tuple[Plan, None]:
                made = min(size, clock.most)
                clock.now += 1e-3 * clock.mean(made) * (1 + 0.03 * clock.random.standard_normal())
                return Plan(torch.zeros(1, 1, 1), torch.zeros(1), info={"iterations": made}), None

        return Sized()

    def mean(self, size: int) -> float:
        return self.overhead + self.each * size


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("overhead", "each"), [(1.0, 0.5), (0.0, 4.0), (8.0, 0.01), (10.0, 0.02), (19.0, 0.02), (30.0, 1.0)]
)
def test_sizes_follow_the_clock(
    overhead: float, each: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(overhead, each, seed=seed)
    monkeypatch.setattr(contenders, "contender", slow.of)
    monkeypatch.setattr(time, "perf_counter", lambda: slow.now)
    size = calibrated("any", 20.0, None, torch.zeros(1, 1), generator=torch.Generator())  # type: ignore[arg-type]
    if overhead + each > 20.0:
        assert size == 1  # nothing smaller can be had
    else:
        assert slow.mean(size) < 1.1 * 20.0
        assert slow.mean(2 * size) > 0.85 * 20.0


def test_a_solver_that_converges_is_given_room_but_not_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(0.1, 0.5, most=6)
    monkeypatch.setattr(contenders, "contender", slow.of)
    monkeypatch.setattr(time, "perf_counter", lambda: slow.now)
    size = calibrated("any", 20.0, None, torch.zeros(1, 1), generator=torch.Generator())  # type: ignore[arg-type]
    assert size == 18


def test_descent_through_what_has_no_gradient_is_refused() -> None:
    world = make_world("cart-pole")
    problem, planner = world.problem(4, threads=1), contender("gradient-shooting", 3)
    x0 = torch.zeros(1, problem.dynamics.nx, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UnsupportedProblem, match="no gradient comes through MujocoDynamics"):
        planner.plan(problem, x0, planner.init(problem, x0, generator=generator), generator=generator)
