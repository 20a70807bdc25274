"""All sampling planners: the contract, the Riccati optimum, the budget."""

from __future__ import annotations

import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import mbrl.planners
from mbrl import (
    Box,
    Constraint,
    ContractError,
    Discrete,
    Evaluation,
    Plan,
    Problem,
    UnsupportedProblem,
    check_planner,
    evaluate,
)
from mbrl.planners import (
    CEM,
    CMAES,
    ICEM,
    MPPI,
    PredictiveSampling,
    RandomShooting,
    SamplingPlanner,
    SamplingState,
    sampling,
)
from tests.problems import (
    PLANNERS,
    DoubleIntegrator,
    Noisy,
    Quadratic,
    box,
    lq_problem,
    name,
    riccati,
    seeded,
)

every = pytest.mark.parametrize("planner", PLANNERS, ids=name)


def test_every_exported_planner_is_listed() -> None:
    exported = [getattr(mbrl.planners, item) for item in mbrl.planners.__all__]
    algorithms = {
        item
        for item in exported
        if inspect.isclass(item) and issubclass(item, SamplingPlanner) and not inspect.isabstract(item)
    }
    assert algorithms == {type(planner) for planner in PLANNERS}


@every
def test_contract(planner: SamplingPlanner[Any]) -> None:
    check_planner(planner)


@every
@pytest.mark.parametrize("order", ["zero", "linear", "cubic"])
def test_contract_with_every_spline(planner: SamplingPlanner[Any], order: Any) -> None:
    check_planner(replace(planner, knot_spacing=3, spline=order))


@every
def test_contract_with_particles(planner: SamplingPlanner[Any]) -> None:
    problem = Problem(Noisy(), Quadratic(), box(1, 2.0), horizon=5, particles=3)
    check_planner(planner, problem, torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.3, 0.3]], dtype=torch.float64))


@every
def test_one_particle_is_enough(planner: SamplingPlanner[Any]) -> None:
    problem = Problem(Noisy(), Quadratic(), box(1, 2.0), horizon=5)
    x0 = torch.zeros(2, 2, dtype=torch.float64)
    plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())
    assert plan.states is not None and plan.states.shape == (2, 6, 2)
    assert torch.isfinite(plan.cost).all()


# Median relative gap to the optimum of 16 searches, at growing (population, iterations). MPPI keeps its
# sampling noise, predictive sampling its deviation and random shooting its breadth, hence their thresholds.
@pytest.mark.parametrize(
    ("planner", "threshold"),
    [
        (
            planner,
            {"CEM": 1e-3, "CMAES": 1e-5, "ICEM": 2e-3, "MPPI": 0.01, "PredictiveSampling": 0.03}.get(
                name(planner), 0.12
            ),
        )
        for planner in PLANNERS
    ],
    ids=[name(planner) for planner in PLANNERS],
)
def test_gap_to_riccati_closes(planner: SamplingPlanner[Any], threshold: float) -> None:
    problem = lq_problem(horizon=6, limit=4.0)
    x0 = torch.tensor([[1.0, -0.5]], dtype=torch.float64).expand(16, 2).contiguous()
    optimum, actions = riccati(problem, x0)
    assert actions.abs().max() < 3.0  # the bounds are not active
    gaps = []
    for population, iterations in ((40, 1), (100, 4), (300, 16)):
        if isinstance(planner, RandomShooting):
            population, iterations = population * iterations, 1
        sized = replace(planner, population=population, iterations=iterations, knot_spacing=1, spline="zero")
        generator = seeded(1)
        plan, _ = sized.plan(problem, x0, sized.init(problem, x0, generator=generator), generator=generator)
        assert (plan.cost >= optimum - 1e-9).all()
        gaps.append(float(((plan.cost - optimum) / optimum).median()))
    assert gaps[0] > gaps[1] > gaps[2], gaps
    assert gaps[2] < threshold, gaps


def test_riccati_actions_cost_what_the_recursion_says() -> None:
    problem = lq_problem(horizon=9)
    x0 = torch.tensor([[1.0, -0.5], [0.2, 2.0]], dtype=torch.float64)
    optimum, actions = riccati(problem, x0)
    torch.testing.assert_close(evaluate(problem, problem.dynamics, x0, actions[:, None]).cost[:, 0], optimum)


@every
def test_a_guess_is_where_the_search_starts(planner: SamplingPlanner[Any]) -> None:
    problem = lq_problem(horizon=6, limit=4.0)
    x0 = torch.tensor([[1.0, -0.5], [-1.0, 0.2]], dtype=torch.float64)
    optimum, actions = riccati(problem, x0)
    exact = replace(planner, knot_spacing=1, spline="zero")
    state = exact.init(problem, x0, generator=seeded(), guess=Plan(actions, optimum))
    torch.testing.assert_close(4.0 * state.solution, actions)


@every
def test_a_rough_guess_stays_inside(planner: SamplingPlanner[Any]) -> None:
    problem = lq_problem(horizon=17, limit=4.0)
    x0 = torch.zeros(3, 2, dtype=torch.float64)
    rough = 8.0 * torch.rand(3, 17, 1, generator=seeded(), dtype=torch.float64) - 4.0
    smooth = replace(planner, knot_spacing=7, spline="cubic")
    state = smooth.init(problem, x0, generator=seeded(), guess=Plan(rough, torch.zeros(3)))
    assert state.solution.abs().max() <= 1.0


@every
def test_budget_is_kept(planner: SamplingPlanner[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own, by which scoring takes 10 ms: no test may depend on who else uses the processor."""
    clock = [0.0]

    def slow(*given: Any, **options: Any) -> Evaluation:
        clock[0] += 0.010
        return evaluate(*given, **options)

    monkeypatch.setattr(sampling, "evaluate", slow)
    monkeypatch.setattr(sampling, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    problem = lq_problem(horizon=10)
    x0 = torch.zeros(1, 2, dtype=torch.float64)
    # One of the scorings is the final one, one a probe of how long that takes.
    for budget, iterations in ((5.0, 1), (45.0, 2), (85.0, 6)):
        timed = replace(planner, budget_ms=budget)
        state = timed.init(problem, x0, generator=seeded())
        plan, _ = timed.plan(problem, x0, state, generator=seeded())
        assert plan.info["iterations"] == iterations


@every
def test_a_budget_too_small_still_gives_one_iteration(planner: SamplingPlanner[Any]) -> None:
    problem, x0 = lq_problem(), torch.ones(1, 2, dtype=torch.float64)
    hurried = replace(planner, budget_ms=1e-6)
    plan, _ = hurried.plan(problem, x0, hurried.init(problem, x0, generator=seeded()), generator=seeded())
    assert plan.info["iterations"] == 1


@every
def test_health_numbers(planner: SamplingPlanner[Any]) -> None:
    problem, x0 = lq_problem(horizon=6), torch.ones(4, 2, dtype=torch.float64)
    plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())
    effective = plan.info["effective_samples"]
    assert isinstance(effective, Tensor) and effective.shape == (4,)
    assert ((effective >= 1 - 1e-9) & (effective <= planner.population)).all()
    if not isinstance(planner, ICEM):  # its population shrinks
        # and the nominal plan and the new one, scored once more at the end
        assert plan.info["model_steps"] == (planner.population * planner.iterations + 2) * 6
    assert (torch.as_tensor(plan.info["diverged"]) == 0).all()


@every
def test_what_is_missing_is_named(planner: SamplingPlanner[Any]) -> None:
    discrete = Problem(DoubleIntegrator(), Quadratic(), Discrete(torch.tensor([[-1.0], [1.0]])), 3)
    with pytest.raises(UnsupportedProblem, match=r"needs Box actions.*tree search"):
        planner.check(discrete)
    infinite = Problem(DoubleIntegrator(), Quadratic(), box(1, torch.inf), 3)
    with pytest.raises(UnsupportedProblem, match="not all finite"):
        planner.check(infinite)
    with pytest.raises(UnsupportedProblem, match="ignores constraints. Use a planner that holds them"):
        planner.check(lq_problem(constraints=(Constraint(lambda y, u, k, p: y[..., 0]),)))

    class Stepless:
        nx, nu, ny, dt = 2, 1, 2, 0.1

        def output(self, x: Tensor) -> Tensor:
            return x

    stepless: Any = Stepless()
    with pytest.raises(UnsupportedProblem, match="dynamics with step, but Stepless lacks it"):
        planner.check(Problem(stepless, Quadratic(), box(1, 1.0), 3))


@every
def test_states_that_are_not_finite_are_refused(planner: SamplingPlanner[Any]) -> None:
    problem, x0 = lq_problem(), torch.zeros(2, 2, dtype=torch.float64)
    state = planner.init(problem, x0, generator=seeded())
    x0[1, 0] = torch.nan
    with pytest.raises(ContractError, match="finite states"):
        planner.plan(problem, x0, state, generator=seeded())


def test_predictive_sampling_never_gets_worse_on_a_deterministic_model() -> None:
    problem, x0 = lq_problem(horizon=10), torch.ones(8, 2, dtype=torch.float64)
    planner = PredictiveSampling(population=5)
    generator = seeded()
    state = planner.init(problem, x0, generator=generator)
    costs = []
    for _ in range(10):
        plan, state = planner.plan(problem, x0, state, generator=generator)
        costs.append(plan.cost)
    assert all((after <= before + 1e-12).all() for before, after in itertools.pairwise(costs))


def test_random_shooting_keeps_the_best_of_all_iterations() -> None:
    problem, x0 = lq_problem(horizon=4), torch.ones(3, 2, dtype=torch.float64)
    seen: list[Tensor] = []

    planner = RandomShooting(population=20, iterations=5)
    state = planner.init(problem, x0, generator=seeded())
    for i in range(5):
        knots = planner.propose(state, i, i == 4, generator=seeded(i))
        cost = knots.square().sum((-1, -2))
        seen.append(cost.min(-1).values)
        state, _ = planner.update(state, knots, cost)
    lowest = torch.stack(seen).min(0).values
    torch.testing.assert_close(state.solution.square().sum((-1, -2)), lowest)


def test_random_shooting_carries_nothing_over() -> None:
    """A plan for another start does not depend on the plan before it, shifted or not."""
    problem, x0 = lq_problem(horizon=4), torch.ones(2, 2, dtype=torch.float64)
    planner = RandomShooting(population=50)
    fresh = planner.init(problem, x0, generator=seeded())
    _, used = planner.plan(problem, x0, fresh, generator=seeded(1))
    first, _ = planner.plan(problem, -2 * x0, fresh, generator=seeded(2))
    second, _ = planner.plan(problem, -2 * x0, used, generator=seeded(2))
    torch.testing.assert_close(first.actions, second.actions)


@every
def test_a_guess_or_start_of_a_wrong_shape_is_refused(planner: SamplingPlanner[Any]) -> None:
    problem, x0 = lq_problem(horizon=8), torch.ones(3, 2, dtype=torch.float64)
    for shape in ((3, 4, 1), (3, 12, 1), (1, 8, 1)):
        guess = Plan(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0]))
        with pytest.raises(ContractError, match=r"guess with actions \(M, H, nu\) = \(3, 8, 1\)"):
            planner.init(problem, x0, generator=seeded(), guess=guess)
    with pytest.raises(ContractError, match=r"x0 \(M, nx\)"):
        planner.init(problem, x0[0], generator=seeded())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CEM(elites=1), "2 ≤ elites ≤ population"),
        (lambda: CEM(elites=50), "2 ≤ elites ≤ population"),
        (lambda: ICEM(elites=21), "elites ≤ population / 2"),
        (lambda: ICEM(decay=0.5), r"decay in \[1, 1000\]"),
        (lambda: ICEM(keep=1.5), r"keep in \[0, 1\]"),
        (lambda: CEM(std=0.0), "std in"),
        (lambda: CEM(alpha=float("nan")), "alpha in"),
        (lambda: ICEM(std=float("nan")), "std in"),
        (lambda: MPPI(std=0.0), "std in"),
        (lambda: CMAES(std=0.0), "std in"),
        (lambda: PredictiveSampling(wide_share=2.0), "wide_share in"),
        (lambda: CEM(budget_ms=float("inf")), "finite budget_ms"),
        (lambda: CEM(budget_ms=float("nan")), "finite budget_ms"),
        (lambda: CEM(budget_ms=-5.0), "finite budget_ms"),
        (lambda: MPPI(temperature=0.0), "temperature in"),
        (lambda: MPPI(temperature=1e-320), "temperature in"),
        (lambda: MPPI(temperature=float("inf")), "temperature in"),
        (lambda: MPPI(beta=-1.0), r"beta in \[0, 10\]"),
        (lambda: ICEM(beta=float("nan")), r"beta in \[0, 10\]"),
        (lambda: ICEM(beta=1e3), r"beta in \[0, 10\]"),
        (lambda: MPPI(effective_share=1.0), "effective_share"),
        (lambda: RandomShooting(population=1), "population ≥ 2"),
        (lambda: RandomShooting(knot_spacing=0), "knot_spacing ≥ 1"),
    ],
)
def test_settings_without_sense_are_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ContractError, match=text):
        make()


# The checker must fail where a planner breaks its contract; each of these is a mistake that was made before.


@dataclass(frozen=True, kw_only=True)
class Broken(RandomShooting):
    """The base of the mistakes below."""


@dataclass(frozen=True, kw_only=True)
class GlobalDraw(Broken):
    def propose(self, state: Any, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        return 2 * torch.rand(M, self.population, K, nu, dtype=state.solution.dtype) - 1


@dataclass(frozen=True, kw_only=True)
class RowsMixed(Broken):
    def update(self, state: Any, knots: Tensor, cost: Tensor) -> tuple[Any, Tensor]:
        return super().update(state, knots, cost.mean(0, keepdim=True).expand_as(cost))


@dataclass(frozen=True, kw_only=True)
class PrefersNaN(Broken):
    def update(self, state: Any, knots: Tensor, cost: Tensor) -> tuple[Any, Tensor]:
        return super().update(state, knots, torch.where(torch.isfinite(cost), cost, -1e10))


@dataclass(frozen=True, kw_only=True)
class OldCost(Broken):
    def plan(self, problem: Any, x0: Tensor, state: Any, *, generator: Generator) -> tuple[Plan, Any]:
        plan, state = super().plan(problem, x0, state, generator=generator)
        return replace(plan, cost=plan.cost * 0.99), state


@dataclass(frozen=True, kw_only=True)
class OutOfBounds(Broken):
    def plan(self, problem: Any, x0: Tensor, state: Any, *, generator: Generator) -> tuple[Plan, Any]:
        plan, state = super().plan(problem, x0, state, generator=generator)
        return replace(plan, actions=plan.actions * 1.5), state


@dataclass(frozen=True, kw_only=True)
class MutatesX(Broken):
    def plan(self, problem: Any, x0: Tensor, state: Any, *, generator: Generator) -> tuple[Plan, Any]:
        result = super().plan(problem, x0, state, generator=generator)
        x0 += 1e-3
        return result


@dataclass(frozen=True, kw_only=True)
class FlatActions(Broken):
    def plan(self, problem: Any, x0: Tensor, state: Any, *, generator: Generator) -> tuple[Plan, Any]:
        plan, state = super().plan(problem, x0, state, generator=generator)
        return replace(plan, actions=plan.actions[0]), state


@dataclass(frozen=True, kw_only=True)
class DoublePrecision(Broken):
    def plan(self, problem: Any, x0: Tensor, state: Any, *, generator: Generator) -> tuple[Plan, Any]:
        plan, state = super().plan(problem, x0, state, generator=generator)
        return replace(plan, actions=plan.actions.double()), state


@dataclass(frozen=True)
class ScalarState(SamplingState):
    rounds: Any = 0


@dataclass(frozen=True, kw_only=True)
class KeepsAScalar(PredictiveSampling):
    def start(self, solution: Tensor, phase: Tensor) -> SamplingState:
        return ScalarState(solution, phase, torch.tensor(0.0))


@dataclass(frozen=True, kw_only=True)
class ShiftsAway(CEM):
    def advance(self, state: Any, move: Callable[[Tensor], Tensor]) -> Any:
        return replace(state, solution=torch.ones_like(state.solution), std=torch.full_like(state.std, 0.1))


@pytest.mark.parametrize(
    ("planner", "text"),
    [
        (GlobalDraw(), "the global state of torch moved"),
        (RowsMixed(), "another x0 in row 1 changed the plan of row 0"),
        (PrefersNaN(), "never to choose a plan whose cost is not finite"),
        (OldCost(), "the cost of exactly the actions that are returned"),
        (OutOfBounds(), "actions inside the bounds"),
        (MutatesX(), "to leave x0 alone"),
        (FlatActions(), r"actions \(M, H, nu\)"),
        (DoublePrecision(), "dtype and device of x0"),
        (KeepsAScalar(), "its field rounds has shape"),
        (ShiftsAway(), "a warm start that is not worse"),
    ],
    ids=lambda value: name(value) if isinstance(value, SamplingPlanner) else "",
)
def test_the_checker_finds(planner: SamplingPlanner[Any], text: str) -> None:
    with pytest.raises(ContractError, match=text):
        check_planner(planner)


def test_the_checker_wants_a_frozen_dataclass() -> None:
    class Plain:
        pass

    plain: Any = Plain()
    with pytest.raises(ContractError, match="a frozen dataclass of hyper-parameters"):
        check_planner(plain)


def test_the_checker_passes_refusals_on() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Picky(RandomShooting):
        def check(self, problem: Problem[Any, Any, Any]) -> None:
            raise UnsupportedProblem("Picky needs more.")

    with pytest.raises(UnsupportedProblem, match="Picky needs more"):
        check_planner(Picky())


def test_actions_without_room() -> None:
    low = torch.tensor([0.3], dtype=torch.float64)
    problem = Problem(DoubleIntegrator(), Quadratic(), Box(low, low.clone()), 5)
    x0 = torch.ones(2, 2, dtype=torch.float64)
    for planner in PLANNERS:
        plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())
        assert (plan.actions == 0.3).all()
