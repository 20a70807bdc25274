"""iLQR and DDP: published optima, orders of convergence, and what must end in a status instead of an error."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import (
    Autodiff,
    Box,
    ContractError,
    Discrete,
    Plan,
    Problem,
    UnsupportedProblem,
    check_planner,
    evaluate,
    quadratize,
)
from mbrl.experiments.benchmarks.ilqr_speed import bounded_lq
from mbrl.models import Ensemble, FitConfig, MeanDynamics, Trainer
from mbrl.planners import CEM, DDP, FDDP, ILQR
from mbrl.planners.ilqr import STATUS
from mbrl.symbolic import Symbolic
from tests.problems import DoubleIntegrator, Noisy, Quadratic, box, lq_problem, name, riccati, seeded

BOTH = pytest.mark.parametrize("planner", [ILQR(), ILQR(damp="state"), DDP()], ids=["ilqr", "state", "ddp"])


def solve(planner: ILQR, problem: Problem[Any, Any, Any], x0: Tensor, guess: Plan | None = None) -> Plan:
    planner.check(problem)
    state = planner.init(problem, x0, generator=seeded(), guess=guess)
    plan, _ = planner.plan(problem, x0, state, generator=seeded())
    fresh = evaluate(problem, problem.dynamics, x0, plan.actions[:, None]).cost[:, 0]
    torch.testing.assert_close(plan.cost, fresh, rtol=1e-9, atol=1e-9, equal_nan=True)
    return plan


def outcome(plan: Plan) -> list[str]:
    status = plan.info["status"]
    assert isinstance(status, Tensor)
    return [STATUS[i] for i in status.tolist()]


def count(plan: Plan) -> list[int]:
    iterations = plan.info["iterations"]
    assert isinstance(iterations, Tensor)
    return [int(i) for i in iterations]


@pytest.mark.parametrize("planner", [ILQR(), DDP(), FDDP()], ids=name)
def test_planner_keeps_the_contract(planner: ILQR) -> None:
    check_planner(planner)


@BOTH
def test_lq_problems_take_one_iteration(planner: ILQR) -> None:
    """And reach the Riccati optimum, with its gains."""
    problem = Problem(Autodiff(DoubleIntegrator()), Quadratic(), box(1, 1e3), 20)
    x0 = torch.tensor([[1.0, 0.5], [-2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    plan = solve(planner, problem, x0)
    cost, actions = riccati(lq_problem(horizon=20, limit=1e3), x0)
    assert count(plan) == [1, 1, 1] and outcome(plan) == ["converged"] * 3
    torch.testing.assert_close(plan.cost, cost)
    torch.testing.assert_close(plan.actions, actions)
    assert plan.K is not None
    torch.testing.assert_close((plan.K[:, 0] @ x0[..., None])[..., 0], actions[:, 0])


@BOTH
def test_bounded_lq(planner: ILQR) -> None:
    """63.8630422864 with 29 of 30 controls at a bound, as crocoddyl and L-BFGS-B find."""
    plan = solve(planner, bounded_lq(), torch.tensor([[3.0, 0.0]], dtype=torch.float64))
    assert float(plan.cost) == pytest.approx(63.8630422864, abs=1e-9)
    assert int((plan.actions.abs() == 1).sum()) == 29 and outcome(plan) == ["converged"]
    assert plan.K is not None
    assert bool(
        (plan.K[0, plan.actions[0, :, 0].abs() == 1] == 0).all()
    )  # a control at its bound has no feedback


@dataclass(frozen=True)
class Swing:
    """A damped pendulum, semi-implicit Euler. x = (θ, ω), θ = 0 hangs down."""

    dt: float = 0.05
    nx: int = 2
    nu: int = 1
    ny: int = 2

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        angle, speed = x.unbind(-1)
        speed = speed + self.dt * (u[..., 0] - 9.81 * angle.sin() - 0.1 * speed)
        return torch.stack([angle + self.dt * speed, speed], -1)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Upright:
    weight: float = 1e-2

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.weight * u[..., 0] ** 2 + 0.01 * (1 + y_next[..., 0].cos())

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return 100 * (1 + y[..., 0].cos()) + 5 * y[..., 1] ** 2


def swing_up(horizon: int = 40, limit: float = 30.0, **options: Any) -> Problem[Any, Any, Box]:
    return Problem(Autodiff(Swing()), Upright(), box(1, limit), horizon, **options)


def test_ddp_converges_quadratically_and_ilqr_linearly() -> None:
    """Near the optimum the error of the cost's slope is squared by DDP, and shrinks by a factor with iLQR."""
    problem, x0 = swing_up(), torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    rough = solve(ILQR(iterations=200, tolerance=0.1), problem, x0)
    exact = solve(DDP(iterations=100, tolerance=1e-13), problem, x0, guess=rough)

    def errors(planner: ILQR) -> list[float]:
        costs = solve(planner, problem, x0, guess=rough).info["costs"]
        assert isinstance(costs, Tensor)
        return [float(e) for e in (costs[0] - exact.cost).clamp(min=0.0).sqrt()]

    quick, slow = errors(DDP(iterations=4, tolerance=0.0)), errors(ILQR(iterations=8, tolerance=0.0))
    constants = [b / a**2 for a, b in pairwise(quick[:3])]
    assert quick[3] < 1e-6 and max(constants) < 4 * min(constants), quick
    factors = [b / a for a, b in pairwise(slow[2:])]
    assert slow[-1] > 1e-5 and max(factors) < 1.1 * min(factors) < 0.6, slow


@BOTH
def test_expansion_is_that_of_the_cost(planner: ILQR) -> None:
    """The slope that one sweep starts with, against differences of the cost itself; with discount and a value."""
    value = lambda x: x[..., 0] ** 2 * x[..., 1]
    problem = swing_up(6, discount=0.9, terminal_value=value)
    u = 0.3 * torch.randn(1, 6, 1, generator=seeded(), dtype=torch.float64)
    x0 = torch.tensor([[0.4, -0.2]], dtype=torch.float64)

    def cost(u: Tensor) -> Tensor:
        return evaluate(problem, problem.dynamics, x0, u[:, None]).cost[:, 0]

    states = evaluate(problem, problem.dynamics, x0, u[:, None], keep_states=True).states
    assert states is not None
    E = quadratize(problem, states[:, 0], u, exact=planner.exact)
    slope, bend, direct = E.lx[:, -1], E.lxx[:, -1], []
    for t in range(5, -1, -1):
        direct.append(E.lu[:, t] + (E.fu[:, t].mT @ slope[..., None])[..., 0])
        slope = E.lx[:, t] + (E.fx[:, t].mT @ slope[..., None])[..., 0]
    eps = 1e-6
    for t, got in zip(range(5, -1, -1), direct, strict=True):
        d = torch.zeros_like(u)
        d[:, t] = eps
        torch.testing.assert_close(got[:, 0], (cost(u + d) - cost(u - d)) / (2 * eps), atol=1e-7, rtol=1e-6)
    assert bend.shape == (1, 2, 2) and bool((bend == bend.mT).all())
    if planner.exact:  # the second derivative by the last control, all terms of it
        d = torch.zeros_like(u)
        d[:, -1] = 1e-4
        wanted = (cost(u + d) - 2 * cost(u) + cost(u - d)) / 1e-8
        assert E.fzz is not None and E.excess is not None
        H = E.luu[:, -1] + E.fu[:, -1].mT @ E.lxx[:, -1] @ E.fu[:, -1] + E.excess[:, -1, 2:, 2:]
        H = H + torch.einsum("mi,miab->mab", E.lx[:, -1], E.fzz[:, -1, :, 2:, 2:])
        torch.testing.assert_close(H[:, 0, 0], wanted, rtol=1e-4, atol=1e-6)


@BOTH
def test_many_problems_have_ends_of_their_own(planner: ILQR) -> None:
    """A batch gives what each problem gives alone, also where one is done long before another."""
    x0 = torch.tensor([[3.1, 0.0], [0.3, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    problem = swing_up(25)
    planner = replace(planner, iterations=30)
    together = solve(planner, problem, x0)
    for i in range(3):
        alone = solve(planner, problem, x0[i : i + 1])
        torch.testing.assert_close(together.actions[i : i + 1], alone.actions, atol=1e-7, rtol=1e-7)
        assert count(alone) == count(together)[i : i + 1]
    assert len(set(count(together))) > 1


def test_threads_change_nothing() -> None:
    """Forty problems, shared by two threads or not."""
    problem = Problem(Symbolic(Swing()), Upright(), box(1, 30.0), 60)
    x0 = 2 * torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    before, plans = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            plans.append(solve(ILQR(iterations=5), problem, x0))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(plans[0].actions, plans[1].actions, rtol=0, atol=0)
    torch.testing.assert_close(plans[0].cost, plans[1].cost, rtol=0, atol=0)


def test_a_guess_leaves_the_saddle() -> None:
    """Hanging still and pushing nothing is a saddle, where iLQR stays; the plan of a CEM leads out of it."""
    problem, x0 = swing_up(), torch.zeros(1, 2, dtype=torch.float64)
    unaided = solve(ILQR(), problem, x0)
    sampler = CEM(population=60, iterations=5)
    start = sampler.init(problem, x0, generator=seeded())
    guess, _ = sampler.plan(problem, x0, start, generator=seeded())
    aided = solve(ILQR(), problem, x0, guess=guess)
    assert float(unaided.cost) > 190 and float(aided.cost) < 25 and float(aided.cost) < float(guess.cost)


def test_gaps_of_an_lq_problem_close_in_one_iteration() -> None:
    """From states that no control leads to; the plan is the Riccati optimum."""
    problem = Problem(Autodiff(DoubleIntegrator()), Quadratic(), box(1, 1e3), 20)
    x0 = torch.tensor([[1.0, 0.5], [-2.0, 0.0]], dtype=torch.float64)
    states = torch.randn(2, 21, 2, generator=seeded(), dtype=torch.float64)
    guess = Plan(torch.randn(2, 20, 1, generator=seeded(1), dtype=torch.float64), torch.zeros(2), states)
    plan = solve(FDDP(), problem, x0, guess=guess)
    cost, actions = riccati(lq_problem(horizon=20, limit=1e3), x0)
    assert count(plan) == [1, 1] and outcome(plan) == ["converged"] * 2
    torch.testing.assert_close(plan.cost, cost)
    torch.testing.assert_close(plan.actions, actions)


def test_a_guess_of_states_leaves_the_saddle() -> None:
    """Turning up at constant speed is no motion of the pendulum, but leads to one; iLQR stays where it hangs."""
    problem, x0 = swing_up(), torch.zeros(3, 2, dtype=torch.float64)
    x0[1:, 0] = torch.tensor([0.2, -0.3])
    angle = x0[:, :1] + (torch.pi - x0[:, :1]) * torch.linspace(0, 1, 41, dtype=torch.float64)
    rate = torch.full_like(angle, torch.pi / 2)
    guess = Plan(torch.zeros(3, 40, 1, dtype=torch.float64), torch.zeros(3), torch.stack([angle, rate], -1))
    plan = solve(FDDP(), problem, x0, guess=guess)  # which also checks that its cost is that of its actions
    assert outcome(plan) == ["converged"] * 3 and float(plan.cost.max()) < 25
    assert float(solve(ILQR(), problem, x0[:1]).cost) > 190
    reached = evaluate(problem, problem.dynamics, x0, plan.actions[:, None], keep_states=True).states
    assert plan.states is not None and reached is not None
    torch.testing.assert_close(plan.states, reached[:, 0], atol=1e-9, rtol=1e-9)
    early = solve(FDDP(iterations=1), problem, x0, guess=guess)  # gaps are left, and rolled out
    assert bool(early.cost.isfinite().all()) and bool((early.cost >= plan.cost - 1e-9).all())


def test_a_noisy_guess_of_states_is_kept() -> None:
    """Of an unstable system: rolled from gap to gap, rounding would grow to many times the noise."""
    problem = replace(swing_up(horizon=200, limit=30.0), dynamics=Symbolic(Swing(dt=0.1)))
    states = 0.1 * torch.randn(1, 201, 2, generator=seeded(), dtype=torch.float64)
    states[..., 0] += torch.pi
    guess = Plan(torch.zeros(1, 200, 1, dtype=torch.float64), torch.zeros(1), states)
    plan = solve(FDDP(iterations=30), problem, states[:, 0], guess=guess)
    assert outcome(plan) == ["converged"] and count(plan)[0] < 12
    costs = plan.info["costs"]
    assert isinstance(costs, Tensor) and float(costs[0, 0]) < 20


def test_numbers_of_problems_must_agree() -> None:
    problem = replace(swing_up(), params=torch.zeros(2, 41, 1, dtype=torch.float64))
    with pytest.raises(ContractError, match="for M = 3 problems"):
        ILQR().init(problem, torch.zeros(3, 2), generator=seeded())


@dataclass
class Changeable:
    """A cost that could be changed after it was traced."""

    weight: float = 1.0

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.weight * u[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return y[..., 0] ** 2


def test_costs_that_can_change_are_not_traced() -> None:
    problem = Problem(Symbolic(Swing()), Changeable(), box(1, 30.0), 5)
    with pytest.raises(ContractError, match="Make its dataclass frozen"):
        solve(ILQR(), problem, torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("states", [torch.zeros(1, 40, 2), torch.full((1, 41, 2), torch.nan)])
def test_a_guess_of_states_must_fit(states: Tensor) -> None:
    guess = Plan(torch.zeros(1, 40, 1), torch.zeros(1), states)
    with pytest.raises(ContractError, match=r"finite states \(M, H\+1, nx\) = \(1, 41, 2\)"):
        FDDP().init(swing_up(), torch.zeros(1, 2), generator=seeded(), guess=guess)


@dataclass(frozen=True)
class Odd(DoubleIntegrator):
    """A double integrator that explodes at |u| > `limit`, or whose derivatives are not finite."""

    limit: float = torch.inf
    broken: bool = False

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        x_next = DoubleIntegrator.step(self, x, u, k)
        if self.broken:  # finite, with the slope of |a|^½ at a = 0
            x_next = x_next + (u * 0).abs().sqrt()
        return torch.where((u.abs() > self.limit).any(-1, keepdim=True), torch.nan, x_next)


@dataclass(frozen=True)
class Saddle(Quadratic):
    """Pays for effort: without bounds there is no optimum."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return super().stage(y, u, y_next, k, p) - 50 * u[..., 0] ** 2


@BOTH
def test_trouble_ends_in_a_status(planner: ILQR) -> None:
    """With the best plan so far, never an exception."""
    x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    lost = Problem(Autodiff(Odd(limit=-1.0)), Quadratic(), box(1, 5.0), 8)
    plan = solve(planner, lost, x0)
    assert outcome(plan) == [STATUS[4]] and bool(plan.cost.isinf()) and bool(plan.actions.isfinite().all())
    broken = Problem(Autodiff(Odd(broken=True)), Quadratic(), box(1, 5.0), 8)
    plan = solve(planner, broken, x0)
    assert outcome(plan) == [STATUS[3]] and bool(plan.cost.isfinite())
    indefinite = Problem(Autodiff(DoubleIntegrator()), Saddle(), box(1, 5.0), 8)
    plan = solve(planner, indefinite, x0, guess=Plan(torch.full((1, 8, 1), 0.1).double(), torch.zeros(1)))
    assert float(plan.cost) < -8 * 45 * 5**2 and bool(plan.actions.isfinite().all())
    free = replace(indefinite, actions=box(1, torch.inf))
    plan = solve(planner, free, x0)
    assert bool(plan.actions.isfinite().all()) and bool(plan.cost.isfinite())
    # Beyond |u| = 1 it explodes: the optimum of 5.3 at the bounds is not reachable, all steps stay inside.
    edge = Problem(Autodiff(Odd(limit=1.0)), Quadratic(), box(1, 5.0), 8)
    plan = solve(planner, edge, 3 * x0)
    assert bool(plan.cost.isfinite()) and float(plan.actions.abs().max()) <= 1.0
    start = solve(planner, edge, 3 * x0, guess=Plan(torch.full((1, 8, 1), 4.0).double(), torch.zeros(1)))
    assert bool(start.cost.isfinite())  # a guess that explodes is scaled down


def test_what_it_cannot_solve_is_refused() -> None:
    with pytest.raises(UnsupportedProblem, match="Autodiff"):
        ILQR().check(lq_problem())
    with pytest.raises(UnsupportedProblem, match="Box"):
        ILQR().check(Problem(Autodiff(DoubleIntegrator()), Quadratic(), Discrete(torch.zeros(2, 1)), 5))
    with pytest.raises(UnsupportedProblem, match="MeanDynamics"):
        ILQR().check(Problem(Noisy(), Quadratic(), box(1, 1.0), 5))
    for options in ({"iterations": 0}, {"tolerance": -1.0}, {"min_ratio": 1.0}, {"budget_ms": 0.0}):
        with pytest.raises(ContractError):
            ILQR(**options)


@dataclass(frozen=True)
class Printed(Quadratic):
    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return super().stage(y, u, y_next, k, p) * float(y.detach().sum() * 0 + 1)


def test_a_cost_that_torch_cannot_differentiate_is_told() -> None:
    problem = Problem(Autodiff(DoubleIntegrator()), Printed(), box(1, 1.0), 5)
    with pytest.raises(ContractError, match="Printed must be differentiable"):
        solve(ILQR(), problem, torch.ones(1, 2, dtype=torch.float64))


def test_a_budget_stops_it() -> None:
    x0 = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    plan = solve(ILQR(budget_ms=1e-3), swing_up(), x0)
    assert count(plan) == [1] and outcome(plan) == [STATUS[0]]


@pytest.fixture(scope="module")
def learned() -> Ensemble:
    """Three networks that have learned the pendulum from random steps."""
    g = seeded(5)
    y = torch.stack(
        [4 * torch.rand(3_000, generator=g) - 2, 12 * torch.rand(3_000, generator=g) - 6], -1
    ).double()
    u = (20 * torch.rand(3_000, 1, generator=g) - 10).double()
    model = Ensemble(2, 1, 0.05, members=3, hidden=(64, 64), probabilistic=False, generator=g)
    Trainer(model, FitConfig(epochs=30, batch=64)).fit(y, u, Swing().step(y, u, 0), generator=g)
    return model.double()


@pytest.mark.parametrize("members", [1, 3])
def test_ilqr_and_cem_agree_on_learned_models(learned: Ensemble, members: int) -> None:
    """On one network and on the mean of three: costs within 1 %, and no sampled plan is better by more."""
    dynamics = MeanDynamics(learned) if members == 3 else MeanDynamics(single(learned))
    problem = Problem(dynamics, Quadratic(Q=(1.0, 0.1), R=(0.01,), Qf=(10.0, 1.0)), box(1, 10.0), 12)
    x0 = torch.tensor([[1.0, 0.0], [-0.5, 2.0]], dtype=torch.float64)
    exact = solve(ILQR(), problem, x0)
    sampler = CEM(population=200, iterations=12, elites=20, min_std=1e-3)
    searched, _ = sampler.plan(problem, x0, sampler.init(problem, x0, generator=seeded()), generator=seeded())
    torch.testing.assert_close(exact.cost, searched.cost, rtol=0.01, atol=0)
    assert bool((exact.cost < searched.cost * 1.001).all())


def single(model: Ensemble) -> Ensemble:
    """Its first network alone."""
    one = copy.deepcopy(model)
    one.elites = torch.tensor([0])
    return one
