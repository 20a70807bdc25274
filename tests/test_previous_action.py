"""The last action in the state: all that the dynamics can, and a rate that an MPC really limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import (
    MPC,
    Box,
    ContractError,
    Observed,
    Problem,
    WithLastAction,
    WithPreviousAction,
    check_dynamics,
)
from mbrl.envs.systems import CartPole, Discretized, Quadrotor, Unicycle
from mbrl.expressions import Expressible
from mbrl.models import Ensemble, Exported, LinearModel, MeanDynamics
from mbrl.planners import CEM
from mbrl.symbolic import Symbolic
from tests.problems import DoubleIntegrator, Noisy, Quadratic, box, seeded

CART = Discretized(CartPole(), 0.05)


def states(dynamics: Any, n: int = 4) -> tuple[Tensor, Tensor]:
    x, u = (
        torch.randn(n, size, generator=seeded(size), dtype=torch.float64)
        for size in (dynamics.nx, dynamics.nu)
    )
    if isinstance(getattr(dynamics.dynamics, "dynamics", None), Discretized):
        x = dynamics.retract(x, torch.zeros(n, dynamics.ndx, dtype=torch.float64))
    return x, u


def learned() -> Exported:
    return Exported(MeanDynamics(Ensemble(3, 2, 0.1, hidden=(8,), generator=seeded()).double()))


WRAPPED: dict[str, Any] = {
    "plain": DoubleIntegrator(),
    "symbolic": Symbolic(CART),
    "manifold": Symbolic(Discretized(Quadrotor(), 0.02)),
    "learned": learned(),
    "linear": LinearModel(2, 1, 0.1),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_keeps_the_contract(name: str) -> None:
    dynamics = WithPreviousAction(WRAPPED[name])
    assert hasattr(dynamics, "linearize") == (name != "plain")
    check_dynamics(dynamics, *states(dynamics), tolerance=1e-6)


def test_what_it_is() -> None:
    dynamics = WithPreviousAction(DoubleIntegrator())
    assert (dynamics.nx, dynamics.ndx, dynamics.nu, dynamics.ny, dynamics.dt) == (3, 3, 1, 3, 0.2)
    x, u = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0])
    x_next = dynamics.step(x, u, 0)
    assert x_next.tolist() == [*DoubleIntegrator().step(x[:2], u, 0).tolist(), 3.0]
    assert dynamics.output(x).tolist() == [1.0, 2.0, 9.0]
    for ability in ("linearize", "linearize_output", "curvature", "curvature_output", "ode", "with_integral"):
        assert not hasattr(dynamics, ability)
    assert not isinstance(dynamics, Expressible) and dynamics.p is None
    with pytest.raises(ContractError, match="Noisy must be drawn first"):
        WithPreviousAction(Noisy())


@pytest.mark.parametrize("name", ["symbolic", "manifold"])
def test_curvatures_are_those_of_the_whole(name: str) -> None:
    inside: Any = WithPreviousAction(WRAPPED[name])
    outside = Symbolic(WithPreviousAction(WRAPPED[name].dynamics))
    x, u = states(inside)
    torch.testing.assert_close(inside.curvature(x, u, 0), outside.curvature(x, u, 0))
    torch.testing.assert_close(inside.curvature_output(x), outside.curvature_output(x))


def symbols(function: casadi.Function) -> list[casadi.MX]:
    return [casadi.MX.sym(f"i{i}", function.numel_in(i)) for i in range(function.n_in())]


@pytest.mark.parametrize(
    "wrapped", [Symbolic(WithPreviousAction(CART)), WithPreviousAction(Symbolic(CART))], ids=str
)
def test_as_an_expression(wrapped: Any) -> None:
    expression = wrapped.expression
    assert expression is wrapped.expression and expression.scalar and (expression.nx, expression.nu) == (5, 1)
    x, u = torch.randn(5, generator=seeded(), dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    given = x.numpy(), u.numpy()
    np.testing.assert_allclose(
        np.array(expression.step(*given, 0, wrapped.theta))[:, 0], wrapped.step(x, u, 0)
    )
    np.testing.assert_allclose(np.array(expression.output(x.numpy()))[:, 0], wrapped.output(x))
    assert expression.ode.numel_out(0) == 4
    np.testing.assert_allclose(
        np.array(expression.ode(*given, wrapped.theta))[:, 0], CartPole().ode(x[:4], u)
    )
    assert expression.step.n_instructions() < Symbolic(CART).expression.step.n_instructions() + 10


def test_parameters_stay_apart() -> None:
    p = CartPole().p * 1.1
    dynamics = Symbolic(WithPreviousAction(Discretized(CartPole(), 0.05, p=p)))
    other = Symbolic(WithPreviousAction(Discretized(CartPole(), 0.05, p=CartPole().p)))
    assert dynamics.expression is other.expression
    np.testing.assert_array_equal(dynamics.theta, p.numpy())
    x, u = torch.ones(5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = dynamics.expression.step(x.numpy(), u.numpy(), 0, dynamics.theta)
    np.testing.assert_allclose(np.array(found)[:, 0], dynamics.step(x, u, 0))


def test_integrals_see_the_last_action() -> None:
    """∫ x₀ + (u − u_prev)² of the unicycle that drives straight on, in closed form."""
    dynamics = Symbolic(WithPreviousAction(Discretized(Unicycle(), 0.5)))

    def rate(y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        assert p is not None
        return y[..., 0] + p[..., 0] * (u[..., 0] - y[..., 3]) ** 2

    quadrature = dynamics.expression.quadrature
    assert quadrature is not None
    integral = quadrature(rate, 1)
    found = float(integral([1, 0, 0, 3, 0], [2, 0], 0, dynamics.theta, [10.0]))
    assert found == pytest.approx(0.5 * 1 + 2 * 0.5**2 / 2 + 10 * 0.5 * (2 - 3) ** 2)
    # batches too, and the whole augmented state
    both = WithPreviousAction(Discretized(Unicycle(), 0.5)).with_integral(lambda y, u: y[..., 3])
    x = torch.tensor([[1.0, 0, 0, 3, 0, 0], [0, 0, 0, 5, 0, 1]])
    reached = both.step(x, torch.tensor([2.0, 0.0]), 0)
    torch.testing.assert_close(reached[:, 3:], torch.tensor([[2.0, 0, 1.5], [2.0, 0, 3.5]]))


def test_learned_dynamics_as_an_expression() -> None:
    dynamics = WithPreviousAction(learned())
    assert (
        isinstance(dynamics, Expressible) and dynamics.expression is WithPreviousAction(learned()).expression
    )
    x, u = (v[0] for v in states(dynamics))
    lam = torch.randn(5, generator=seeded(), dtype=torch.float64)
    found = dynamics.expression.step(x.numpy(), u.numpy(), 0, dynamics.theta)
    np.testing.assert_allclose(np.array(found)[:, 0], dynamics.step(x, u, 0).detach(), rtol=1e-10)
    batch, step = dynamics.expression.batch, dynamics.expression.step
    assert batch is not None
    sx, su, sk, st = (casadi.MX.sym(f"i{i}", step.numel_in(i)) for i in range(4))
    s, value = casadi.vertcat(sx, su), step(sx, su, sk, st)
    bend, slope = casadi.hessian(casadi.dot(lam.numpy(), value), s)[0], casadi.jacobian(value, s)
    derived = casadi.Function("derived", [sx, su, sk, st], [value.T, slope, bend])
    point = x.numpy(), u.numpy(), 0, dynamics.theta
    given = (v.numpy()[None] for v in (x, u))
    found = batch(*given, dynamics.theta, lam.numpy()[None], order=2)
    for a, b in zip(found, derived(*point), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), np.array(b), rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Smooth(Quadratic):
    """Changes of the action beyond 0.3 are dear."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        excess = ((u - y[..., 2:]).abs() - 0.3).clamp(min=0).sum(-1)
        return super().stage(y[..., :2], u, y_next[..., :2], k, p) + 1e3 * excess

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return super().terminal(y[..., :2], p)


def test_a_closed_loop_limits_rates() -> None:
    problem: Problem[Any, Any, Box] = Problem(
        WithPreviousAction(DoubleIntegrator()), Smooth(), box(1, 2.0), 8
    )
    first = torch.tensor([1.0], dtype=torch.float64)
    planner = CEM(population=400, elites=20, iterations=12)
    mpc = MPC(problem, planner, estimator=WithLastAction(Observed(), first), generator=seeded())
    x, actions = torch.tensor([[2.0, 0.0]], dtype=torch.float64), [first[None]]
    for _ in range(8):
        actions.append(mpc(x))
        x = DoubleIntegrator().step(x, actions[-1], 0)
    steps = torch.cat(actions).diff(dim=0).abs()
    assert float(steps.max()) < 0.35 and float(torch.cat(actions).min()) < -0.5


def test_the_last_action_of_rows_that_start_afresh() -> None:
    estimator = WithLastAction(Observed(), torch.tensor([0.5]))
    obs, last = torch.zeros(2, 3), torch.tensor([[7.0], [8.0]])
    assert estimator(obs, None, None)[:, 3].tolist() == [0.5, 0.5]
    assert estimator(obs, None, last)[:, 3].tolist() == [7.0, 8.0]
    estimator.reset(torch.tensor([False, True]))
    assert estimator(obs, None, last)[:, 3].tolist() == [7.0, 0.5]
    assert estimator(obs, None, last)[:, 3].tolist() == [7.0, 8.0]
    estimator.reset(torch.tensor([False, True]))
    estimator.reset(torch.tensor([True, False]))
    assert estimator(obs, None, last)[:, 3].tolist() == [0.5, 0.5]
    estimator.reset(torch.tensor([True, True]))
    estimator.reset()
    assert estimator(obs, None, last)[:, 3].tolist() == [7.0, 8.0]
    with pytest.raises(ContractError, match=r"first \(nu,\)"):
        WithLastAction(Observed(), torch.tensor(0.5))
