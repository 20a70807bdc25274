"""Analytic systems: physics that is known, orders of integration, and the same function in torch and in CasADi."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mbrl import (
    Autodiff,
    Box,
    ContractError,
    Plan,
    Problem,
    UnknownName,
    check_dynamics,
    evaluate,
    quaternions,
)
from mbrl.envs import gym_world
from mbrl.envs.gym_tasks import TASKS
from mbrl.envs.reactor import CSTR
from mbrl.envs.systems import (
    Acrobot,
    Car,
    CartPole,
    Discretized,
    DoubleIntegrator,
    Pendulum,
    PlanarQuadrotor,
    Quadrotor,
    System,
    Unicycle,
)
from mbrl.experiments.benchmarks import plants, upside_down
from mbrl.horizon import AffinePolicy, TorchHorizon
from mbrl.planners import DDP, ILQR
from mbrl.symbolic import Symbolic
from mbrl.symbolic_horizon import SymbolicHorizon
from mbrl.tracing import trace
from tests.problems import name, seeded

SYSTEMS: list[System] = [
    *(
        DoubleIntegrator(),
        Pendulum(),
        CartPole(),
        Acrobot(),
        Unicycle(),
        PlanarQuadrotor(),
        Quadrotor(),
        CSTR(),
    ),
]
CVODES = (0.7974518301637168, 0.5427053798778804, 133.96044867116382, 131.36989831280374)  # mol/l, °C
EVERY = pytest.mark.parametrize("system", SYSTEMS, ids=name)


def states(system: System, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, system.nx, generator=seeded(seed), dtype=torch.float64)
    x = 1 + 0.1 * x if isinstance(system, CSTR) else x  # warm, and nothing below 0
    return system.project(x), torch.randn(n, system.nu, generator=seeded(seed + 1), dtype=torch.float64)


@EVERY
@pytest.mark.parametrize("integrator", ["euler", "semi-implicit", "rk4"])
def test_systems_keep_the_contract_and_are_the_same_in_casadi(system: System, integrator: Any) -> None:
    dynamics = Autodiff(Discretized(system, 0.05, integrator, substeps=2))
    x, u = states(system, 5)
    check_dynamics(dynamics, x, u)
    function = trace("step", dynamics.step, (system.nx,), (system.nu,), ())
    for a, b in zip(x, u, strict=True):
        np.testing.assert_allclose(
            np.array(function(a.numpy(), b.numpy(), 0)).ravel(), dynamics.step(a, b, 0), atol=1e-12
        )


@EVERY
@pytest.mark.parametrize(("integrator", "order"), [("euler", 1), ("semi-implicit", 1), ("rk4", 4)])
def test_order_of_integration(system: System, integrator: Any, order: int) -> None:
    """Half the step leaves 2^−order of the error."""
    x, u = states(system, 20)
    x = x if isinstance(system, (Quadrotor, CSTR)) else 0.5 * x

    def end(substeps: int, integrator: Any) -> Tensor:
        return Discretized(system, 0.4, integrator, substeps).step(x, u, 0)

    truth = end(400, "rk4")
    errors = [float((end(n, integrator) - truth).norm()) for n in (32, 64)]
    if errors[1] > 1e-12:  # else exact, as linear systems can be
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def energy(system: System, x: Tensor) -> Tensor:
    """Kinetic and potential energy of what swings freely."""
    if isinstance(system, Pendulum):
        swing = 0.5 * system.mass * system.length**2 * x[..., 1] ** 2
        return swing - system.mass * system.gravity * system.length * x[..., 0].cos()
    if isinstance(system, CartPole):
        _, angle, v, rate = x.unbind(-1)
        tip = (v + system.length * rate * angle.cos()) ** 2 + (system.length * rate * angle.sin()) ** 2
        high = -system.pole * system.gravity * system.length * angle.cos()
        return 0.5 * system.cart * v**2 + 0.5 * system.pole * tip + high
    assert isinstance(system, Acrobot)
    a, b, da, db = x.unbind(-1)
    m, l, c = system.mass, system.length, system.length / 2
    speed1 = (c * da) ** 2
    speed2 = (l * da) ** 2 + (c * (da + db)) ** 2 + 2 * l * c * da * (da + db) * b.cos()
    spin = system.inertia * (da**2 + (da + db) ** 2)
    high = -m * system.gravity * (c * a.cos() + l * a.cos() + c * (a + b).cos())
    return 0.5 * (m * speed1 + m * speed2 + spin) + high


@pytest.mark.parametrize("system", [Pendulum(damping=0.0), CartPole(), Acrobot()], ids=name)
def test_energy_of_free_motion_stays(system: System) -> None:
    x, _ = states(system, 10)
    dynamics, start = Discretized(system, 0.01), energy(system, x)
    for _ in range(200):
        x = dynamics.step(x, torch.zeros(10, system.nu, dtype=torch.float64), 0)
    torch.testing.assert_close(energy(system, x), start, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("system", [PlanarQuadrotor(), Quadrotor()], ids=name)
def test_quadrotors_hover(system: Any) -> None:
    x = torch.zeros(system.nx, dtype=torch.float64)
    if isinstance(system, Quadrotor):
        x[3] = 1.0
    u = torch.full((system.nu,), system.mass * system.gravity / system.nu, dtype=torch.float64)
    torch.testing.assert_close(Discretized(system, 0.1).step(x, u, 0), x)


def test_quadrotor_turns_as_a_free_body() -> None:
    """Without thrust its angular momentum stays in the world's frame, and gravity is all that accelerates it."""
    system = Quadrotor()
    x, _ = states(system, 5)
    J = torch.tensor([system.inertia, system.inertia, system.inertia_z], dtype=torch.float64)
    dynamics, none = Discretized(system, 0.002), torch.zeros(5, 4, dtype=torch.float64)
    from mbrl.quaternions import rotate

    before, fall = rotate(x[:, 3:7], J * x[:, 10:]), x[:, 7:10].clone()
    for _ in range(100):
        x = dynamics.step(x, none, 0)
    torch.testing.assert_close(rotate(x[:, 3:7], J * x[:, 10:]), before, atol=1e-9, rtol=1e-6)
    fall[:, 2] -= 0.2 * system.gravity
    torch.testing.assert_close(x[:, 7:10], fall)


@EVERY
def test_other_parameters(system: System) -> None:
    x, u = states(system, 3)
    own = Discretized(system, 0.05).step(x, u, 0)
    torch.testing.assert_close(Discretized(system, 0.05, p=system.p).step(x, u, 0), own)
    if isinstance(system, (CartPole, Acrobot, Quadrotor)):
        other = replace(system, gravity=1.0)
        got = Discretized(system, 0.05, p=torch.stack([system.p, other.p, system.p])).step(x, u, 0)
        torch.testing.assert_close(got[1], Discretized(other, 0.05).step(x, u, 0)[1])
        torch.testing.assert_close(got[0], own[0])
        assert not torch.allclose(got[1], own[1])


def test_reactor() -> None:
    """Where do-mpc's example starts, after one of its steps with its first inputs, by CVODES at 1e-10; and in other scenarios."""
    system, size, moves = CSTR(), np.array([1.0, 1.0, 100.0, 100.0]), np.array([100.0, 2000.0])
    x0 = torch.from_numpy(np.array(plants.REACTOR_START) / size)
    u = torch.from_numpy(np.array([10.207751680664673, -108.91380496253359]) / moves)
    reached = Discretized(system, plants.REACTOR_DT, substeps=20).step(x0, u, 0)
    wanted = np.array(CVODES) / size
    np.testing.assert_allclose(reached, wanted, rtol=1e-8)
    p = torch.tensor([[1.05, 0.9], [0.95, 1.1]], dtype=torch.float64)
    got = system.ode(x0.expand(2, -1), u.expand(2, -1), p)
    for row, scenario in zip(got, p.tolist(), strict=True):
        other = plants.reactor(plants.REACTOR_START, (u.numpy() * moves).tolist(), scenario, math.exp)
        np.testing.assert_allclose(row, np.array(other) / size, rtol=1e-9)


def test_swing_up_of_the_benchmarks_is_the_cart_pole() -> None:
    """Their angle is 0 upright."""
    x, u = states(CartPole(), 5)
    down = x + torch.tensor([0.0, math.pi, 0.0, 0.0], dtype=torch.float64)
    for row, other, push in zip(CartPole().ode(x, u), down.numpy(), u[:, 0].tolist(), strict=True):
        np.testing.assert_allclose(row, plants.cart_pole(other, push, math.sin, math.cos), atol=1e-12)


def test_bad_discretizations_are_refused() -> None:
    with pytest.raises(UnknownName, match="rk4"):
        Discretized(Pendulum(), 0.1, "rk5")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="dt > 0"):
        Discretized(Pendulum(), 0.0)
    with pytest.raises(ContractError, match="4 parameters"):
        Discretized(Pendulum(), 0.1, p=torch.ones(3))


@pytest.mark.parametrize("env", TASKS)
def test_rewards_of_robots_are_the_same_in_casadi(env: str) -> None:
    """The tasks are written in torch alone."""
    world = gym_world(env)
    ny, nu = world.layout.size, world.actions.nu
    reward = trace("reward", world.task.reward, (ny,), (nu,), (ny,))
    ends = trace("terminated", lambda y: world.task.terminated(y).double(), (ny,))
    for seed in range(3):
        y, y_next = torch.randn(2, ny, generator=seeded(seed), dtype=torch.float64)
        u = torch.randn(nu, generator=seeded(seed + 9), dtype=torch.float64)
        got = float(reward(y.numpy(), u.numpy(), y_next.numpy()))
        assert got == pytest.approx(float(world.task.reward(y, u, y_next)), rel=1e-12)
        assert bool(ends(y.numpy())) == bool(world.task.terminated(y))


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": lambda x: (
        torch.nn.functional.softplus(x) + torch.nn.functional.silu(x) * x.sigmoid() - x.tanh()
    ),
    "powers": lambda x: x**2 + x**3 - (1 + x.abs()) ** 1.5 + x.square().sum(-1, keepdim=True).rsqrt(),
    "choice": lambda x: torch.where((x > 0) & ~(x > 1), x.exp(), -x.abs().sqrt()).clamp(-0.5, 2.0),
    "logarithms": lambda x: (1 + x.abs()).log10() - (2 + x**2).log2() + torch.hypot(1 + x.abs(), x.flip(0)),
    "angles": lambda x: torch.atan2(x[..., :2], x[..., 1:3]) + torch.remainder(x[..., 2:4] + 3, 2.0),
    "sums": lambda x: torch.stack([x.norm(), x.mean(), x.prod(), x.amax(), x.cumsum(0)[2], x.amin()]),
    "shapes": lambda x: (x.reshape(2, 2) @ x.view(2, 2).T).flatten()[[0, 3]] + x.roll(1)[::2],
    "inplace": lambda x: x.clone().mul_(2.0).add_(x.flip(0)),
    "constants": lambda x: x @ torch.tensor([[1.0, 2.0]] * 4, dtype=torch.float64) + torch.eye(2).double()[0],
}


@settings(deadline=None, max_examples=15)
@given(x=st.lists(st.floats(-3, 3), min_size=4, max_size=4), kind=st.sampled_from(sorted(OPERATIONS)))
def test_traced_operations(x: list[float], kind: str) -> None:
    value = torch.tensor(x, dtype=torch.float64)
    wanted = OPERATIONS[kind](value)
    got = np.array(trace(kind, OPERATIONS[kind], (4,))(value.numpy())).ravel()
    np.testing.assert_allclose(got, wanted.flatten(), rtol=1e-9, atol=1e-9)


def test_what_cannot_be_traced_is_told() -> None:
    with pytest.raises(ContractError, match=r"sorted_step uses the torch operation sort.*Autodiff"):
        trace("sorted_step", lambda x: x.sort().values, (3,))
    with pytest.raises(ContractError, match="control flow"):
        trace("branch", lambda x: x if bool(x.sum() > 0) else -x, (3,))

    class Learned(nn.Module):
        nx, nu, ny, dt = 2, 1, 2, 0.1

        def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
            return x

        def output(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ContractError, match="weights"):
        Symbolic(Learned())


@dataclass(frozen=True)
class Reach:
    """Curved in all it reads, with parameters, a step and an end."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: Any, p: Tensor | None) -> Tensor:
        assert p is not None
        late = 1.0 + 0.1 * torch.as_tensor(k).to(y)
        return (
            late * (y_next - p).square().sum(-1).sqrt()
            + 0.1 * u.square().sum(-1)
            + y[..., 0].cos() * u[..., 0]
        )

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        assert p is not None
        return (y * p).sum(-1).square()


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("system", [CartPole(), Quadrotor()], ids=name)
def test_both_horizons_agree(system: Any, ends: bool, gaps: bool) -> None:
    """Costs, states and every derivative, of problems with parameters, discount, ends and a terminal value."""
    M, H, B = 3, 5, 2
    x0, u = states(system, M)[0], torch.randn(M, H, system.nu, generator=seeded(3), dtype=torch.float64)
    problem: Problem[Any, Any, Box] = Problem(
        Symbolic(Discretized(system, 0.05)),
        Reach(),
        Box(-0.8 * torch.ones(system.nu).double(), torch.ones(system.nu).double()),
        H,
        discount=0.9,
        params=torch.randn(M, H + 1, system.nx, generator=seeded(4), dtype=torch.float64),
        terminated=(lambda y: y[..., 0] > 0.1) if ends else None,
        termination_cost=7.0,
        terminal_value=lambda x: x[..., 1] ** 2 * x[..., 0],
    )
    dynamics = problem.dynamics
    nominal = evaluate(problem, dynamics, x0, u[:, None], keep_states=True).states
    assert nominal is not None
    x, rows = nominal[:, 0], np.array([0, 2])
    symbolic, plain = SymbolicHorizon(problem), TorchHorizon(problem)
    k = torch.randn(M, H, system.nu, generator=seeded(5), dtype=torch.float64)
    K = torch.randn(M, H, system.nu, dynamics.ndx, generator=seeded(6), dtype=torch.float64)
    low, high = problem.actions.low.numpy(), problem.actions.high.numpy()
    gap = np.zeros((M, 0, dynamics.ndx))
    if gaps:
        gap = 0.1 * torch.randn(M, H, dynamics.ndx, generator=seeded(7), dtype=torch.float64).numpy()
    policy = AffinePolicy(x.numpy(), u.numpy(), k.numpy(), K.numpy(), gap, low, high)
    shares = np.array([0.3, 0.0]), np.array([1.0, 0.0])
    start = (x0 if isinstance(system, Quadrotor) else x0 + 0.1).numpy()
    got, wanted = (h.roll(start, policy, *shares, rows) for h in (symbolic, plain))
    assert got.cost.shape == (2, B)
    for value, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-9, atol=1e-9)
    if ends and not gaps:
        assert (wanted.states[..., 1:, 0] > 0.1).any() and not (wanted.states[..., 0] > 0.1).all()
    for exact in (False, True):
        a, b = (h.expand(policy, rows, exact=exact) for h in (symbolic, plain))
        np.testing.assert_allclose(a.ends, b.ends, rtol=1e-8, atol=1e-8)
        N = dynamics.ndx + system.nu
        first = N * (dynamics.ndx + 1 + N)
        np.testing.assert_allclose(a.steps[..., :first], b.steps[..., :first], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(a.steps[..., first:], b.steps[..., first:], rtol=1e-7, atol=1e-7)


@dataclass(frozen=True)
class Parking:
    """Tassa's: effort, and distance from the origin, with a kink of width p that is rounded."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return 0.01 * (u[..., 0] ** 2 + 0.01 * u[..., 1] ** 2) + self.away(y)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        x, z, heading, speed = y.unbind(-1)
        end = (
            0.1 * rounded(x, 0.01)
            + 0.1 * rounded(z, 0.01)
            + rounded(heading, 0.01)
            + 0.3 * rounded(speed, 1.0)
        )
        return end + self.away(y)

    def away(self, y: Tensor) -> Tensor:
        return 0.001 * (rounded(y[..., 0], 0.1) + rounded(y[..., 1], 0.1))


def rounded(x: Tensor, p: float) -> Tensor:
    distance: Tensor = (x**2 + p**2).sqrt() - p
    return distance


def test_car_parking() -> None:
    """Tassa et al. 2014: J(0) = 5.807207128; the two minima that are known, 1.90516775 and 1.97403085."""
    high = torch.tensor([0.5, 2.0], dtype=torch.float64)
    problem = Problem(Symbolic(Car()), Parking(), Box(-high, high), 500)
    x0 = torch.tensor([[1.0, 1.0, 1.5 * math.pi, 0.0]], dtype=torch.float64)
    still = evaluate(problem, problem.dynamics, x0, torch.zeros(1, 1, 500, 2, dtype=torch.float64)).cost
    assert float(still) == pytest.approx(5.807207128, abs=1e-9)
    plan = park(ILQR(iterations=400), problem, x0)
    assert float(plan.cost) == pytest.approx(1.90516775, abs=1e-6)
    assert bool((plan.actions.abs() <= high).all())
    # DDP goes further in each step, so that last digits decide in which valley it arrives.
    starts = x0 + 1e-9 * torch.randn(8, 4, generator=seeded(1), dtype=torch.float64)
    costs = park(DDP(iterations=200), problem, starts).cost
    known = torch.tensor([1.90516775, 1.97403085], dtype=torch.float64)
    assert int(((costs[:, None] - known).abs() < 1e-5).any(1).sum()) >= 3 and float(costs.max()) < 2.4


def park(planner: ILQR, problem: Problem[Any, Any, Box], x0: Tensor) -> Plan:
    return planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())[0]


def test_a_quadrotor_rights_itself() -> None:
    """From three starts with the rotors below, which need no other guess than hovering thrust, within the limits."""
    config = upside_down.Config(iterations=120)
    x0 = upside_down.upside_down(6, generator=seeded())[[1, 4, 5]]
    up = quaternions.rotate(x0[:, 3:7], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(3, 3))
    assert (up[:, 2] < -0.5).all()
    thrust = torch.full((3, config.horizon, 4), upside_down.SHARE)
    plan = upside_down.fly(config, x0, thrust, generator=seeded())
    assert (upside_down.end(plan) <= 0.05).all()
    assert plan.actions.min() >= 0 and plan.actions.max() <= 2 * upside_down.SHARE
    x = x0
    for k in range(config.horizon):  # the plan's states are those of the system itself
        x = Discretized(upside_down.QUADROTOR, config.dt).step(x, plan.actions[:, k], k)
    assert (upside_down.distance(x) <= 0.05).all()


def test_a_constant_mask_picks_what_it_says() -> None:
    mask = torch.tensor([True, False, True])
    picked = trace("picked", lambda a: a[mask], (3,))
    assert np.array(picked([1.0, 2.0, 3.0])).ravel().tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("fun", "message"),
    [
        (lambda a: a[a > 0], "depends on values"),
        (lambda a: torch.div(a, 2, rounding_mode="floor"), "div with rounding_mode"),
        (lambda a: 1.0, "must return a tensor.*returned a float"),
        (lambda a: (a, a), "must return a tensor.*returned a tuple"),
        (lambda a: None, "must return a tensor.*returned a NoneType"),
        (lambda a: [1.0, 2.0][a[0]] * a, "fails: TypeError.*Problem.params"),
        (lambda a: a @ a[:2], "fails: RuntimeError"),
        (lambda a: a + torch.as_tensor(np.sin(a.detach().numpy())), "left torch"),
        (lambda a: a * a[0].long(), "left torch"),
        (lambda a: a * torch.rand(1), "torch operation rand"),
    ],
)
def test_what_cannot_be_traced_is_said_in_words(fun: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        trace("fun", fun, (3,))
