"""Nonlinear MPC: known optima in every transcription and solver, derivatives, closed loops, and all that goes wrong."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import casadi
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import (
    MPC,
    Box,
    Constraint,
    ContractError,
    Discrete,
    MbrlError,
    Plan,
    PlanWarning,
    Problem,
    UnknownName,
    UnsupportedProblem,
    check_planner,
    evaluate,
)
from mbrl.envs.systems import CartPole, Discretized, Pendulum, System
from mbrl.estimators import Observed
from mbrl.planners import CEM, ILQR, NMPC, nmpc_program
from mbrl.planners import generated as code
from mbrl.planners.nlp_solver import Solver
from mbrl.planners.nmpc import NMPCState
from mbrl.planners.nmpc_program import NMPCProgram
from mbrl.planners.separable import Called, Interpreted, Part, Separable, element
from mbrl.previous_action import WithPreviousAction
from mbrl.problem import Integral
from mbrl.symbolic import Symbolic
from tests.optimal_control import BRYSON_DENHAM, KNOWN, STEERING, VAN_DER_POL, Known
from tests.problems import lq_problem, riccati, seeded

GENERATOR = seeded()


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solve(planner: NMPC, problem: Problem[Any, Any, Any], x0: Tensor, guess: Plan | None = None) -> Plan:
    planner.check(problem)
    state = planner.init(problem, x0, generator=GENERATOR, guess=guess)
    plan, _ = planner.plan(problem, x0, state, generator=GENERATOR)
    return plan


def value(plan: Plan, name: str) -> float:
    found = plan.info[name]
    assert isinstance(found, Tensor)
    return float(found[0])


@dataclass(frozen=True)
class SwingUp:
    """Of the cart-pole; p, if given, is where the cart should be."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        away = y[..., 0] if p is None else y[..., 0] - p[..., 0]
        return away**2 + 10 * (1 + y[..., 1].cos()) + 0.01 * u[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        away = y[..., 0] if p is None else y[..., 0] - p[..., 0]
        return away**2 + 10 * (1 + y[..., 1].cos())


@dataclass(frozen=True)
class Track:
    limit: float

    def __call__(self, y: Tensor, u: Tensor | None, k: Any, p: Tensor | None) -> Tensor:
        return torch.stack([y[..., 0] - self.limit, -self.limit - y[..., 0]], -1)


def cart_pole(
    horizon: int = 25, limit: float | None = 0.6, *, soft: float | None = None, **options: Any
) -> Problem[Any, Any, Any]:
    constraints = () if limit is None else (Constraint(Track(limit), soft=soft, name="track"),)
    box = Box(tensor(-20.0), tensor(20.0))
    dynamics = Symbolic(Discretized(CartPole(), 0.05))
    return Problem(dynamics, SwingUp(), box, horizon, constraints=constraints, **options)


def symbolic_lq(horizon: int = 6, limit: float = 10.0, **options: Any) -> Problem[Any, Any, Any]:
    problem: Problem[Any, Any, Any] = lq_problem(horizon, limit, **options)
    return dataclasses.replace(problem, dynamics=Symbolic(problem.dynamics))


NEAR_UPRIGHT = tensor(0.0, math.pi - 0.4, 0.0, 0.0)[None]


# Known answers


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_known_optima_by_hermite_simpson(known: Known) -> None:
    planner = NMPC(
        transcription="hermite-simpson", solver="ipopt", final_time=known.final_time, iterations=500
    )
    plan = solve(planner, known.problem(), known.start(), known.guess())
    assert value(plan, "status") == 0
    assert value(plan, "objective") == pytest.approx(known.value, rel=known.tolerance)
    if known.final_time is not None:
        assert float(plan.cost) == value(plan, "objective") and value(plan, "violation") < 1e-6
        assert plan.states is not None
        torch.testing.assert_close(plan.states[0, 0], known.start()[0])


@pytest.mark.parametrize("known", [k for k in KNOWN if k.final_time is None], ids=lambda known: known.name)
@pytest.mark.parametrize("solver", ["fatrop", "ipopt"])
def test_held_controls_reach_the_optimum_of_the_same_program_written_by_hand(
    known: Known, solver: Any
) -> None:
    planner = NMPC(solver=solver, iterations=500, tolerance=1e-8)
    plan = solve(planner, known.problem(), known.start(), known.guess())
    assert value(plan, "status") == 0
    assert value(plan, "objective") == pytest.approx(known.held, rel=1e-6)
    assert value(plan, "violation") < 1e-5


@pytest.mark.parametrize("points", ["radau", "legendre"])
@pytest.mark.parametrize("known", [STEERING, VAN_DER_POL, BRYSON_DENHAM], ids=lambda known: known.name)
def test_collocation_reaches_the_optimum_of_held_controls(known: Known, points: Any) -> None:
    planner = NMPC(transcription=points, solver="ipopt", final_time=known.final_time, iterations=500)
    plan = solve(planner, known.problem(), known.start(), known.guess())
    assert value(plan, "objective") == pytest.approx(known.held, rel=2e-5)
    if known.final_time is not None:
        assert value(plan, "final_time") == pytest.approx(known.held, rel=2e-5)


@pytest.mark.parametrize("qp", ["qrqp", "osqp", "piqp"])
@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
def test_sqp(qp: Any, hessian: Any) -> None:
    planner = NMPC(solver="sqp", qp=qp, hessian=hessian)
    plan = solve(planner, VAN_DER_POL.problem(), VAN_DER_POL.start(), VAN_DER_POL.guess())
    assert value(plan, "objective") == pytest.approx(VAN_DER_POL.held, rel=1e-5)


@pytest.mark.parametrize("transcription", ["shooting"])
@pytest.mark.parametrize("solver", ["fatrop", "ipopt", "sqp"])
def test_linear_quadratic(solver: Any, transcription: Any) -> None:
    problem = symbolic_lq(limit=math.inf)
    x0 = torch.randn(3, 2, generator=seeded(), dtype=torch.float64)
    cost, actions = riccati(lq_problem(limit=math.inf), x0)
    plan = solve(NMPC(solver=solver, transcription=transcription, tolerance=1e-9), problem, x0)
    torch.testing.assert_close(plan.actions, actions, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plan.cost, cost, atol=1e-8, rtol=1e-8)
    iterations = plan.info["iterations"]
    assert isinstance(iterations, Tensor) and int(iterations.max()) <= 3


def test_agrees_with_ilqr_where_there_are_no_constraints() -> None:
    problem = cart_pole(limit=None)
    state = ILQR().init(problem, NEAR_UPRIGHT, generator=GENERATOR)
    other, _ = ILQR().plan(problem, NEAR_UPRIGHT, state, generator=GENERATOR)
    plan = solve(NMPC(), problem, NEAR_UPRIGHT)
    torch.testing.assert_close(plan.cost, other.cost, rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.actions, other.actions, rtol=0, atol=1e-3)


def test_a_discount_and_parameters_per_problem() -> None:
    goal = tensor(0.0, 0.2, -0.3)[:, None, None].expand(3, 26, 1)
    problem = cart_pole(limit=None, params=goal.contiguous(), discount=0.97)
    x0 = NEAR_UPRIGHT.expand(3, -1)
    plan = solve(NMPC(), problem, x0)
    fresh = evaluate(problem, problem.dynamics, x0, plan.actions[:, None]).cost[:, 0]
    torch.testing.assert_close(plan.cost, fresh)
    objective = plan.info["objective"]
    assert isinstance(objective, Tensor)
    torch.testing.assert_close(objective, fresh, rtol=1e-6, atol=0)
    for row in range(3):
        alone = dataclasses.replace(problem, params=goal[row])
        torch.testing.assert_close(
            solve(NMPC(), alone, x0[:1]).actions[0], plan.actions[row], atol=1e-6, rtol=0
        )


def test_a_terminal_value() -> None:
    problem = cart_pole(limit=None, terminal_value=lambda x: 7 * x.square().sum(-1))
    plan = solve(NMPC(), problem, NEAR_UPRIGHT)
    fresh = evaluate(problem, problem.dynamics, NEAR_UPRIGHT, plan.actions[:, None]).cost[:, 0]
    torch.testing.assert_close(plan.cost, fresh)
    assert value(plan, "objective") == pytest.approx(float(fresh), rel=1e-6)


# Constraints


@pytest.mark.parametrize("solver", ["fatrop", "ipopt"])
def test_a_track_limit_is_held_and_costs(solver: Any) -> None:
    free = solve(NMPC(solver=solver), cart_pole(limit=None), NEAR_UPRIGHT)
    assert free.states is not None
    reach = float(free.states[..., 0].abs().max())
    tight = solve(NMPC(solver=solver), cart_pole(limit=0.8 * reach), NEAR_UPRIGHT)
    assert tight.states is not None
    assert float(tight.states[:, :-1, 0].abs().max()) <= 0.8 * reach + 1e-6
    assert float(tight.cost) > float(free.cost)
    assert value(tight, "violation") < 1e-6


def test_a_soft_constraint_is_exact_where_its_weight_suffices_and_yields_where_nothing_else_helps() -> None:
    free = solve(NMPC(), cart_pole(limit=None), NEAR_UPRIGHT)
    assert free.states is not None
    limit = 0.8 * float(free.states[..., 0].abs().max())
    hard = solve(NMPC(), cart_pole(limit=limit), NEAR_UPRIGHT)
    soft = solve(NMPC(), cart_pole(limit=limit, soft=1e3), NEAR_UPRIGHT)
    torch.testing.assert_close(soft.cost, hard.cost, rtol=1e-4, atol=0)
    outside = tensor(1.5, math.pi, 0.0, 0.0)[None]
    plan = solve(NMPC(), cart_pole(limit=0.5, soft=1e2), outside)
    assert value(plan, "status") == 0 and plan.states is not None
    # Outside for as short as it can be: it comes back, and the penalty is in the objective only.
    assert float(plan.states[0, -1, 0]) < 0.51
    assert value(plan, "objective") > float(plan.cost)


@pytest.mark.parametrize("soft", [None, 50.0])
def test_equality_constraints_along_the_path(soft: float | None) -> None:
    """A double integrator whose speed is bound to its place: ẋ = −x / 2."""
    bound = Constraint(lambda y, u, k, p: y[..., 1:] + y[..., :1] / 2, "eq", soft=soft, name="bound")
    problem = symbolic_lq(8, constraints=(bound,))
    plan = solve(NMPC(), problem, tensor(1.0, -0.5)[None])
    assert plan.states is not None
    x = plan.states[0, 1:-1]
    torch.testing.assert_close(x[:, 1], -x[:, 0] / 2, atol=1e-5, rtol=0)


def test_rates_are_limited_through_the_previous_action() -> None:
    dynamics = Symbolic(WithPreviousAction(Discretized(CartPole(), 0.05)))

    @dataclass(frozen=True)
    class Rate:
        def __call__(self, y: Tensor, u: Tensor, k: Any, p: Tensor | None) -> Tensor:
            change = u - y[..., 4:]
            return torch.cat([change - 3.0, -3.0 - change], -1)

    problem = dataclasses.replace(
        cart_pole(limit=None), dynamics=dynamics, constraints=(Constraint(Rate(), name="rate"),)
    )
    x0 = torch.cat([NEAR_UPRIGHT, tensor(1.0)[None]], -1)
    for planner in (
        NMPC(),
        NMPC(transcription="radau"),
        NMPC(solver="ipopt", transcription="legendre", degree=2),
    ):
        plan = solve(planner, problem, x0)
        assert value(plan, "status") == 0
        change = torch.diff(torch.cat([tensor(1.0), plan.actions[0, :, 0]]))
        assert 2.9 < float(change.abs().max()) <= 3.0 + 1e-6


# Derivatives


def _elements() -> list[tuple[str, NMPCProgram, Problem[Any, Any, Any]]]:
    cases = []
    for name, planner in {
        "shooting": NMPC(),
        "radau": NMPC(transcription="radau", degree=2),
        "hermite-simpson": NMPC(transcription="hermite-simpson", solver="ipopt"),
        "free time": NMPC(transcription="hermite-simpson", solver="ipopt", final_time=(1.0, 2.0)),
    }.items():
        problem = dataclasses.replace(
            cart_pole(4, soft=3.0), cost=Integral(_Rate(), 0.05), params=torch.ones(5, 1, dtype=torch.float64)
        )
        planner.check(problem)
        cases.append((name, planner._program(problem), problem))
    return cases


@dataclass(frozen=True)
class _Rate:
    def rate(self, y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        assert p is not None
        return p[..., 0] * (y[..., 0] * y[..., 1]).sin() + u[..., 0] ** 2 * y[..., 2]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return y.prod(-1)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("lanes", [Interpreted, Called])
def test_derivatives_of_programs(case: int, lanes: Any) -> None:
    _, built, _ = _elements()[case]
    program = built.control.program
    program = _again(program, lanes)
    rng = np.random.default_rng(case)
    z, p = 0.5 * rng.normal(size=program.nz), rng.uniform(0.5, 1.0, program.np)
    sigma, multipliers = np.array([0.7]), rng.normal(size=program.ng)
    program.give(p)

    def lagrangian_slope(z: np.ndarray) -> np.ndarray:
        _, _, slope, jacobian = program.slopes(z)
        J = casadi.DM(program.jacobian, jacobian).full()
        return np.asarray(sigma * slope + J.T @ multipliers)

    f, g, slope, jacobian = (part.copy() for part in program.slopes(z))
    assert np.allclose(f, program.values(z)[0]) and np.allclose(g, program.values(z)[1])
    J = casadi.DM(program.jacobian, jacobian).full()
    H = casadi.DM(program.hessian, program.curvature(z, sigma, multipliers).copy()).full()
    eps = 1e-6
    for i in range(program.nz):
        e = np.zeros(program.nz)
        e[i] = eps
        up, down = ([part.copy() for part in program.values(z + s * e)] for s in (1, -1))
        assert slope[i] == pytest.approx(float(up[0][0] - down[0][0]) / (2 * eps), abs=1e-7)
        np.testing.assert_allclose(J[:, i], (up[1] - down[1]) / (2 * eps), atol=1e-7)
        bent = (lagrangian_slope(z + e) - lagrangian_slope(z - e)) / (2 * eps)
        np.testing.assert_allclose(H[:, i], bent, atol=1e-6)


def _again(program: Separable, lanes: Any) -> Separable:
    """The same program, evaluated in another way."""
    other: Separable = object.__new__(Separable)
    other.__dict__.update(program.__dict__, _lanes=lanes, _made={}, _at={})
    return other


def test_places_that_share_a_variable_add_up() -> None:
    """Σₗ (z_shared · zₗ)² with g = z_shared + zₗ at three places, by hand."""
    v, q, theta = casadi.SX.sym("v", 2), casadi.SX.sym("q", 0), casadi.SX.sym("theta", 0)
    made = element(v, q, theta, v[0] + v[1], (v[0] * v[1]) ** 2)
    part = Part(made, np.array([[0, 0, 0], [1, 2, 3]]), np.array([[0, -1, 1]]))
    nothing = np.empty(0, dtype=np.int64)
    program = Separable([part], (nothing, nothing), nz=4, ng=2, lanes=Interpreted)
    program.give(np.empty(0))
    z = np.array([2.0, 1.0, 3.0, 4.0])
    f, g, slope, jacobian = program.slopes(z)
    assert f == 4 * (1 + 9 + 16) and g.tolist() == [3.0, 6.0]
    assert slope.tolist() == [2 * 2 * 26, 8.0, 24.0, 32.0]
    assert casadi.DM(program.jacobian, jacobian).full().tolist() == [[1, 1, 0, 0], [1, 0, 0, 1]]
    H = casadi.DM(program.hessian, program.curvature(z, np.ones(1), np.zeros(2))).full()
    assert H[0].tolist() == [2 * 26.0, 8.0, 24.0, 32.0] and np.allclose(H, H.T)


def test_gauss_newton_leaves_out_the_curvature_of_the_dynamics() -> None:
    """Of a quadratic cost it is Jᵀ Q J, positive semidefinite; the optimum is that of the exact Hessian."""
    problem = cart_pole(10, limit=None)
    cost = dataclasses.replace(VAN_DER_POL.cost, Q=(1.0, 10.0, 0.1, 0.1), R=(0.01,))
    problem = dataclasses.replace(problem, cost=Integral(cost, 0.05))
    planner = NMPC(solver="ipopt", hessian="gauss-newton")
    built = planner._program(problem)
    program = built.control.program
    program.give(np.ones(program.np))
    rng = np.random.default_rng(0)
    z, multipliers = rng.normal(size=program.nz), rng.normal(size=program.ng)
    H = casadi.DM(program.hessian, program.curvature(z, np.ones(1), multipliers).copy()).full()
    assert np.linalg.eigvalsh(H).min() > -1e-9
    exact, rough = (
        solve(NMPC(solver="ipopt", hessian=h), problem, NEAR_UPRIGHT) for h in ("exact", "gauss-newton")
    )
    assert value(rough, "objective") == pytest.approx(value(exact, "objective"), rel=1e-6)


# The contract


def test_contract() -> None:
    problem = cart_pole(10)
    x0 = NEAR_UPRIGHT + 0.05 * torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    check_planner(NMPC(), problem, x0)
    check_planner(NMPC(solver="sqp", iterations=5), problem, x0)
    check_planner(NMPC(transcription="radau", degree=2), problem, x0)


def test_built_once_for_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Solver.__init__

    def counted(self: Solver, *args: Any, **options: Any) -> None:
        made.append(1)
        plain(self, *args, **options)

    monkeypatch.setattr(Solver, "__init__", counted)
    for i in range(3):
        p = tensor(1.0, 0.3 + 0.1 * i, 0.5, 9.81)
        dynamics = Symbolic(Discretized(CartPole(), 0.05, p=p))
        box = Box(tensor(-15.0 - i), tensor(15.0 + i))
        problem = Problem(
            dynamics, SwingUp(), box, 13, params=torch.full((14, 1), 0.1 * i, dtype=torch.float64)
        )
        plan = solve(NMPC(), problem, NEAR_UPRIGHT + 0.1 * i)
        fresh = evaluate(problem, dynamics, NEAR_UPRIGHT + 0.1 * i, plan.actions[:, None]).cost[:, 0]
        torch.testing.assert_close(plan.cost, fresh)  # of the new numbers
    assert len(made) == 1


def test_a_shifted_plan_is_nearly_optimal_for_the_next_problem() -> None:
    problem = cart_pole()
    planner = NMPC()
    state = planner.init(problem, NEAR_UPRIGHT, generator=GENERATOR)
    plan, state = planner.plan(problem, NEAR_UPRIGHT, state, generator=GENERATOR)
    cold = value(plan, "iterations")
    x = problem.dynamics.step(NEAR_UPRIGHT, plan.actions[:, 0], 0)
    moved = planner.shift(state, plan.actions[:, :1], x)
    assert plan.states is not None
    torch.testing.assert_close(moved.states[:, :-1], plan.states[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(moved.rest[:, :-2, :1], plan.actions[:, 1:], atol=1e-6, rtol=0)
    warm, _ = planner.plan(problem, x, moved, generator=GENERATOR)
    assert value(warm, "iterations") < cold
    for n in (3, 25):  # several steps, and all of them
        later = planner.shift(state, plan.actions[:, :n], x)
        assert [getattr(later, f.name).shape for f in dataclasses.fields(NMPCState)] == [
            getattr(state, f.name).shape for f in dataclasses.fields(NMPCState)
        ]


def test_closed_loop_holds_the_track_and_resumes_from_a_checkpoint() -> None:
    problem = cart_pole(limit=0.45)
    plant = problem.dynamics

    def controller() -> MPC:
        return MPC(problem, NMPC(), estimator=Observed(), generator=seeded())

    policy, x, states = controller(), NEAR_UPRIGHT, []
    for step in range(40):
        if step == 20:
            saved = policy.state_dict()
            policy = controller()
            policy.load_state_dict(saved)
        x = plant.step(x, policy(x), 0)
        states.append(x[0])
    path = torch.stack(states)
    assert float(path[:, 0].abs().max()) <= 0.45 + 1e-6
    assert float((path[-1, 1] - math.pi).abs()) < 0.05
    assert policy.fallbacks == 0
    again, x = controller(), NEAR_UPRIGHT
    for row in path:
        x = plant.step(x, again(x), 0)
        assert torch.equal(x[0], row)


def test_real_time_iteration_recovers_at_nearly_the_cost_of_the_optimum() -> None:
    costs = []
    for planner in (NMPC(), NMPC(solver="sqp", iterations=1, hessian="gauss-newton")):
        problem = cart_pole(40, limit=None)
        first = solve(NMPC(), problem, NEAR_UPRIGHT)
        policy = MPC(problem, planner, estimator=Observed(), generator=seeded(), guess=first)
        x, total = NEAR_UPRIGHT, 0.0
        for _ in range(40):
            u = policy(x)
            total += float(SwingUp().stage(x, u, x, 0, None))
            x = problem.dynamics.step(x, u, 0)
        costs.append(total)
        assert policy.fallbacks == 0
    assert costs[1] <= 1.01 * costs[0]


# What goes wrong


@pytest.mark.parametrize("solver", ["fatrop", "ipopt", "sqp"])
def test_contradictory_constraints_are_named_and_an_action_is_left(solver: Any) -> None:
    problem = cart_pole(limit=-0.1)  # x ≤ −0.1 and x ≥ 0.1
    planner = NMPC(solver=solver, iterations=60)
    plan = solve(planner, problem, NEAR_UPRIGHT)
    assert value(plan, "status") == 2 and float(plan.cost) == math.inf
    assert "track" in str(plan.info["explanation"]) and "violated by" in str(plan.info["explanation"])
    assert problem.actions.contains(plan.actions).all()
    policy = MPC(problem, planner, estimator=Observed(), generator=seeded(), safe_action=tensor(3.0))
    with pytest.warns(PlanWarning, match=r"not followed.*track.*violated"):
        action = policy(NEAR_UPRIGHT)
    assert action.tolist() == [[3.0]] and policy.fallbacks == 1 and policy.followed["safe"] == 1


def test_an_infeasible_start_falls_back_and_recovers() -> None:
    """Beyond the track, then back on it: the old plan, then new ones."""
    problem = cart_pole(limit=0.5)
    policy = MPC(problem, NMPC(iterations=50), estimator=Observed(), generator=seeded())
    policy(NEAR_UPRIGHT)
    with pytest.warns(PlanWarning, match="track"):
        action = policy(NEAR_UPRIGHT + tensor(3.0, 0.0, 0.0, 0.0))
    assert policy.report is not None and bool(policy.report.fallback[0])
    assert problem.actions.contains(action).all() and policy.followed["plan"] == 2
    policy(NEAR_UPRIGHT)
    assert not bool(policy.report.fallback[0])


def test_states_that_are_not_finite() -> None:
    problem = cart_pole()
    x0 = torch.cat([NEAR_UPRIGHT, NEAR_UPRIGHT])
    x0[1, 2] = math.nan
    plan = solve(NMPC(), problem, x0)
    assert torch.isfinite(plan.cost).tolist() == [True, False]
    assert "problem 1: the initial state is not finite" in str(plan.info["explanation"])
    assert problem.actions.contains(plan.actions).all()


@dataclass(frozen=True)
class Tank(Pendulum):
    """A level that falls with its root, and something at rest."""

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return torch.stack([u[..., 0] - x[..., 0].sqrt(), 0 * x[..., 1]], -1)


@pytest.mark.parametrize(
    "options", [{}, {"solver": "ipopt"}, {"solver": "sqp"}, {"transcription": "radau"}], ids=str
)
def test_a_first_state_outside_of_the_models_domain_is_forgotten(options: Any) -> None:
    box = Box(tensor(-1.0), tensor(1.0))
    problem = Problem(Symbolic(Discretized(Tank(), 0.1)), VAN_DER_POL.problem().cost, box, 5)
    policy = MPC(problem, NMPC(**options), estimator=Observed(), generator=seeded())
    outside, good = tensor(-0.01, 0.0)[None], tensor(0.5, 0.0)[None]
    with pytest.warns(PlanWarning, match="finite"):
        policy(outside)
    assert policy.fallbacks == 1
    policy(good)
    assert policy.fallbacks == 1 and policy.followed["plan"] == 1


@pytest.mark.parametrize("solver", ["fatrop", "ipopt", "sqp"])
def test_after_an_absurd_state_it_goes_on(solver: Any) -> None:
    """Of numbers whose squares are not finite, fatrop would never return."""
    policy = MPC(symbolic_lq(), NMPC(solver=solver), estimator=Observed(), generator=seeded())
    x = tensor(1.0, 0.0)[None]
    policy(x)
    with pytest.warns(PlanWarning, match="finite"):
        policy(1e200 * x)
    policy(x)
    assert policy.fallbacks == 1


def test_a_constraint_of_no_rows() -> None:
    problem = dataclasses.replace(cart_pole(5), constraints=(Constraint(lambda y, u, k, p: y[..., :0]),))
    assert value(solve(NMPC(), problem, NEAR_UPRIGHT), "status") == 0


def test_dynamics_that_explode_are_reported() -> None:
    @dataclass(frozen=True)
    class Blast(Pendulum):
        def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
            return (x * 1e3).exp() + u

    box = Box(tensor(-1.0), tensor(1.0))
    problem = Problem(Symbolic(Discretized(Blast(), 0.1)), VAN_DER_POL.problem().cost, box, 5)
    plan = solve(NMPC(iterations=20), problem, tensor(2.0, 2.0)[None])
    assert float(plan.cost) == math.inf and value(plan, "status") == 3
    assert problem.actions.contains(plan.actions).all()
    assert "finite" in str(plan.info["explanation"])


@pytest.mark.parametrize("solver", ["ipopt", "sqp"])
def test_a_deadline_stops_the_solver_and_what_is_feasible_is_used(solver: Any) -> None:
    problem = cart_pole(40, limit=None)
    hanging = tensor(0.0, 0.1, 0.0, 0.0)[None]
    full = solve(NMPC(solver=solver), problem, hanging)
    plan = solve(NMPC(solver=solver, budget_ms=1e-3), problem, hanging)
    assert value(plan, "iterations") <= 2 < value(full, "iterations")
    assert value(plan, "status") == 1 and "time ran out" in str(plan.info["explanation"])
    assert math.isfinite(float(plan.cost))


def test_a_horizon_of_one_step() -> None:
    for planner in (NMPC(), NMPC(solver="ipopt"), NMPC(solver="sqp"), NMPC(transcription="radau")):
        plan = solve(planner, cart_pole(1), NEAR_UPRIGHT)
        assert value(plan, "status") == 0 and plan.actions.shape == (1, 1, 1)
    one = cart_pole(1)
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64)[None, :, None, None]
    best = evaluate(one, one.dynamics, NEAR_UPRIGHT, grid).cost.min()
    assert float(solve(NMPC(), one, NEAR_UPRIGHT).cost) == pytest.approx(float(best), abs=1e-6)


def test_code_is_generated_kept_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if code.compiler() is None:
        with pytest.warns(RuntimeWarning, match="C compiler"):
            solve(NMPC(generate_code=True), cart_pole(7), NEAR_UPRIGHT)
        return
    for solver in ("fatrop", "ipopt", "sqp"):
        problem = cart_pole(7, soft=10.0)
        plain = solve(NMPC(solver=solver), problem, NEAR_UPRIGHT)
        compiled = solve(NMPC(solver=solver, generate_code=True), problem, NEAR_UPRIGHT)
        torch.testing.assert_close(compiled.actions, plain.actions, atol=1e-9, rtol=0)
    assert len(list((tmp_path / "mbrl-kit").glob("*.so"))) == 4  # three solvers' functions, and rollouts
    assert np.full(8, 5e-324).max() * 1.0 > 0  # loading code has not changed how this process computes
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "mbrl-kit").iterdir()}
    nmpc_program._built.cache_clear()
    solve(NMPC(generate_code=True), cart_pole(7, soft=10.0), NEAR_UPRIGHT)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "mbrl-kit").iterdir()}


def test_without_a_compiler_expressions_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "compiler", lambda: None)
    with pytest.warns(RuntimeWarning, match=r"needs a C compiler.*interpreted"):
        plan = solve(NMPC(generate_code=True), cart_pole(6), NEAR_UPRIGHT)
    assert value(plan, "status") == 0


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="no such luck"):
        plan = solve(NMPC(generate_code=True), cart_pole(8), NEAR_UPRIGHT)
    assert value(plan, "status") == 0


def test_a_solver_that_casadi_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbrl.planners import nlp_solver

    monkeypatch.setitem(nlp_solver._PLUGINS, "ipopt", "worhp")
    with pytest.raises(MbrlError, match=r"cannot load the solver 'ipopt'.*Choose another"):
        solve(NMPC(solver="ipopt"), cart_pole(9), NEAR_UPRIGHT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "worhp"}, "no solver called 'worhp'"),
        ({"transcription": "simpson"}, "no transcription called 'simpson'"),
        ({"qp": "proxqp"}, "no qp called 'proxqp'"),
        ({"hessian": "bfgs"}, "no hessian called 'bfgs'"),
    ],
)
def test_unknown_names(options: Any, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        NMPC(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations ≥ 1"),
        ({"degree": 10}, "degree of 1 to 9"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"budget_ms": -1.0}, "budget_ms"),
        ({"budget_ms": 10.0}, "cannot stop the solver fatrop"),
        ({"final_time": (2.0, 1.0), "solver": "ipopt"}, "shortest ≤ longest"),
        ({"transcription": "hermite-simpson"}, 'solver="ipopt"'),
        ({"final_time": (1.0, 2.0), "transcription": "radau"}, 'solver="ipopt"'),
        ({"final_time": (1.0, 2.0), "solver": "ipopt"}, "any length"),
    ],
)
def test_bad_settings(options: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        NMPC(**options)


def test_problems_that_it_cannot_have() -> None:
    problem = cart_pole()
    with pytest.raises(UnsupportedProblem, match="tree search"):
        NMPC().check(dataclasses.replace(problem, actions=Discrete(tensor(0.0, 1.0)[:, None])))
    with pytest.raises(UnsupportedProblem, match=r"expression, theta.*Symbolic\(dynamics\)"):
        NMPC().check(dataclasses.replace(problem, dynamics=Discretized(CartPole(), 0.05)))
    with pytest.raises(UnsupportedProblem, match="Constraint"):
        NMPC().check(dataclasses.replace(problem, terminated=lambda y: y[..., 0] > 1))
    with pytest.raises(UnsupportedProblem, match=r"only has steps.*shooting"):
        NMPC(transcription="radau").check(symbolic_lq())
    with pytest.raises(ContractError, match="frozen"):
        NMPC().check(dataclasses.replace(problem, cost=_Mutable()))
    with pytest.raises(ContractError, match=r'kind "le" or "eq"'):
        Constraint(Track(1.0), kind="ge")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="soft > 0"):
        Constraint(Track(1.0), soft=0.0)


@dataclass
class _Mutable:
    weight: float = 1.0

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.weight * u[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return y[..., 0]


def test_a_guess_from_another_planner_leads_out_of_a_saddle() -> None:
    """At rest below, nothing says which way to swing: the start of a sampled plan does."""
    problem = cart_pole(40, limit=None)
    hanging = tensor(0.0, 0.0, 0.0, 0.0)[None]
    stuck = solve(NMPC(), problem, hanging)
    planner = CEM(iterations=10)
    guess, _ = planner.plan(
        problem, hanging, planner.init(problem, hanging, generator=seeded()), generator=seeded()
    )
    led = solve(NMPC(), problem, hanging, guess)
    assert float(led.cost) < 0.6 * float(stuck.cost)


# What was once solved wrongly


@dataclass(frozen=True)
class Rayleigh(System):
    """x1' = x2, x2' = −x1 + x2 (1.4 − 0.14 x2²) + 4 u."""

    nx, nu, nq = 2, 1, 0

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([b, -a + b * (1.4 - 0.14 * b**2) + 4 * u[..., 0]], -1)


@dataclass(frozen=True)
class Effort:
    def rate(self, y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        return u[..., 0] ** 2 + y[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros_like(y[..., 0])


def mixed(y: Tensor, u: Tensor, k: Any, p: Tensor | None) -> Tensor:
    g = u[..., 0] + y[..., 0] / 6
    return torch.stack([g, -1 - g], -1)


@pytest.mark.parametrize("soft", [None, 100.0])
def test_limits_on_controls_hold_in_the_middle_of_steps_too(soft: float | None) -> None:
    """Rayleigh's problem with −1 ≤ u + x₁/6 ≤ 0 (Maurer and Augustin 2001). If only the nodes are asked, the free controls
    between them take what they want, and the cost is a sixth too low."""
    H, start, box = 60, tensor(-5.0, -5.0)[None], Box(tensor(-50.0), tensor(50.0))
    dynamics, constraints = Symbolic(Discretized(Rayleigh(), 4.5 / H)), (Constraint(mixed, soft=soft),)
    problem = Problem(dynamics, Integral(Effort(), 4.5 / H), box, H, constraints=constraints)
    plans = [
        solve(NMPC(transcription=name, solver="ipopt"), problem, start)
        for name in ("hermite-simpson", "radau")
    ]
    quadratic, held = (value(plan, "objective") for plan in plans)
    assert quadratic == pytest.approx(held, rel=6e-3) and quadratic < held
    states, actions = plans[0].states, plans[0].actions
    assert states is not None and mixed(states[:, :-1], actions, 0, None).max() < 0.05


def test_more_equations_than_variables_are_refused_for_fatrop() -> None:
    def too_much(y: Tensor, u: Tensor, k: Any, p: Tensor | None) -> Tensor:
        return torch.stack([y[..., 0], y[..., 1] - math.pi, y[..., 2], y[..., 3], y[..., 1].sin()], -1)

    constraint = Constraint(too_much, "eq", "terminal", name="still")
    problem = dataclasses.replace(cart_pole(20), constraints=(constraint,))
    with pytest.raises(UnsupportedProblem, match='the end there are 5 .* 4 states.*solver="ipopt"'):
        NMPC().check(problem)
    start = tensor(0.0, math.pi - 0.05, 0.0, 0.0)[None]
    assert math.isfinite(float(solve(NMPC(solver="ipopt"), problem, start).cost))


def test_states_and_plans_of_other_sizes_are_refused() -> None:
    planner, problem = NMPC(), cart_pole(6)
    with pytest.raises(ContractError, match=r"\(M, 4\), but got \(1, 3\)"):
        planner.init(problem, NEAR_UPRIGHT[:, :3], generator=GENERATOR)
    state = planner.init(problem, NEAR_UPRIGHT, generator=GENERATOR)
    with pytest.raises(ContractError, match=r"\(M, 4\), but got \(4,\)"):
        planner.plan(problem, NEAR_UPRIGHT[0], state, generator=GENERATOR)
    with pytest.raises(ContractError, match="horizon 7, but got one of 6"):
        planner.plan(cart_pole(7), NEAR_UPRIGHT, state, generator=GENERATOR)


def test_costs_of_two_numbers_or_of_missing_params_are_refused() -> None:
    class Two(SwingUp):
        def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
            return y[..., :2]

    with pytest.raises(ContractError, match=r"Two must return a tensor of 1 number .*shape \(2,\)"):
        NMPC().check(dataclasses.replace(cart_pole(5), cost=Two()))

    class Asks(SwingUp):
        def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
            return y[..., 0] - p[..., 0]  # type: ignore[index]

    with pytest.raises(ContractError, match="Asks is called with tensors.*NoneType"):
        NMPC().check(dataclasses.replace(cart_pole(5), cost=Asks()))
