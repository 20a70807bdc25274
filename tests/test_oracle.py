"""The optimum of linear-quadratic worlds is earned by its own feedback in the real environment, and by nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import MPC, ContractError
from mbrl.envs import World, make_world
from mbrl.envs.twins import Endless
from mbrl.estimators import Measured
from mbrl.experiments.oracle import lq_regulator, riccati_optimum
from mbrl.planners import ICEM, ILQR, NMPC
from mbrl.planners.lqr import finite_lqr
from tests.problems import seeded

STEPS = 200
PHASE = torch.linspace(0, 2 * torch.pi, 25, dtype=torch.float64)
STARTS = torch.stack([PHASE.cos(), PHASE.sin()], -1)
"""Over all that an episode may start from, (25, 2)."""


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("double-integrator")


def returns(world: World, y: Tensor, u: Tensor) -> Tensor:
    """What u (..., H, nu) earns from y (..., ny) in the analytic model, (...)."""
    assert world.analytic is not None
    total = torch.zeros(u.shape[:-2], dtype=torch.float64)
    y = y.expand(*u.shape[:-2], -1)
    for k in range(u.shape[-2]):
        y_next = world.analytic.step(y, u[..., k, :], k)
        total = total + world.task.reward(y, u[..., k, :], y_next)
        y = y_next
    return total


def best_actions(world: World, y: Tensor, steps: int) -> Tensor:
    """(M, H, nu) from y (M, ny)."""
    assert world.analytic is not None
    regulator, actions = lq_regulator(world, steps), list[Tensor]()
    for k in range(steps):
        actions.append(regulator.act(y, k))
        y = world.analytic.step(y, actions[-1], k)
    return torch.stack(actions, 1)


def test_the_regulator_is_that_of_a_point_whose_force_is_held_for_a_step(world: World) -> None:
    """p' = p + h v + ½ h² u and v' = v + h u, which MuJoCo's step is: by central differences of the simulator."""
    h = 0.05
    A = torch.tensor([[1.0, h], [0.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[h * h / 2], [h]], dtype=torch.float64)
    Q, R = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), 0.1 * torch.ones_like(B[:1])
    known = finite_lqr(A, B, Q, R, horizon=STEPS, final=torch.zeros_like(A))
    regulator = lq_regulator(world, STEPS)
    torch.testing.assert_close(regulator.K, known.K)
    torch.testing.assert_close(regulator.P, known.P)
    assert torch.equal(regulator.s, torch.zeros(STEPS + 1).double()) and not regulator.k.any()

    simulator = world.dynamics(threads=1).unrounded
    moved = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    states = torch.zeros(6, simulator.nx, dtype=torch.float64)
    start = mujoco.mj_stateSize(world.model, mujoco.mjtState.mjSTATE_TIME)
    states[:, start : start + 2] = moved[:, :2]
    y = simulator.output(simulator.step(states, moved[:, 2:], 0))
    torch.testing.assert_close((y[:3] - y[3:]).T / 2, torch.cat([A, B], 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_its_feedback_earns_the_optimum_in_the_real_environment(world: World, seed: int) -> None:
    env, regulator, total = world.make(), lq_regulator(world, STEPS), 0.0
    obs, info = env.reset(seed=seed)
    y = world.measure(obs, info)
    optimum = float(riccati_optimum(world, y, STEPS)[0])
    for k in range(STEPS):
        obs, reward, _, truncated, info = env.step(regulator.act(y, k)[0].float().numpy())
        total += float(reward)
        y = world.measure(obs, info)
    env.close()
    assert truncated and optimum < -1
    assert total == pytest.approx(optimum, rel=1e-6)


def test_no_other_controls_earn_more(world: World) -> None:
    """It is their only maximum: the return is flat there, and its curvature negative in all directions."""
    H = 60
    optimum, u = riccati_optimum(world, STARTS, H), best_actions(world, STARTS, H)
    torch.testing.assert_close(returns(world, STARTS, u), optimum, rtol=1e-12, atol=0)
    for size in (1e-3, 0.1, 3.0):
        change = size * torch.randn(30, *u.shape, generator=seeded(), dtype=torch.float64)
        assert (returns(world, STARTS, u + change) < optimum).all()

    def earned(v: Tensor) -> Tensor:
        return returns(world, STARTS[0], v[:, None])

    assert torch.linalg.eigvalsh(torch.func.hessian(earned)(u[0, :, 0])).max() < -1e-2
    assert torch.func.grad(earned)(u[0, :, 0]).abs().max() < 1e-12


def test_the_optimum_lies_within_the_bounds_from_every_start(world: World) -> None:
    """Controls are linear in the start, so those of a step are within the length of what the unit starts take."""
    unit = best_actions(world, torch.eye(2, dtype=torch.float64), STEPS)[..., 0]  # (2, H)
    assert 3.9 < unit.norm(dim=0).max() < float(world.actions.high)


@pytest.mark.parametrize(
    ("planner", "share"), [(ILQR(iterations=3), 0.02), (NMPC(), 0.02), (ICEM(population=20), 2.0)], ids=["ilqr", "nmpc", "icem"]
)  # fmt: skip
def test_no_planner_earns_more(world: World, planner: Any, share: float) -> None:
    """Plans go on for 30 steps even where the episode ends after 40; at most `share` of the optimum is lost."""
    problem = world.problem(30, dynamics=world.analytic)
    if isinstance(planner, NMPC):
        problem = dataclasses.replace(problem, terminated=None)
    env, total = world.make(), 0.0
    policy = MPC(problem, planner, estimator=Measured(world.measure, torch.float64), generator=seeded())
    obs, info = env.reset(seed=0)
    optimum = float(riccati_optimum(world, world.measure(obs, info), 40)[0])
    for _ in range(40):
        obs, reward, _, _, info = env.step(policy(obs, info)[0].float().numpy())
        total += float(reward)
    env.close()
    assert (1 + share) * optimum < total < optimum * (1 - 1e-12)


class Shifted(Endless):
    """Everything that a quadratic reward can hold, of both states and the control."""

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        error = y_next[..., 0] - 0.5
        return 3 - (error**2 + 0.3 * y[..., 0] * u[..., 0] + (u[..., 0] - 0.2) ** 2 + 0.1 * y[..., 1])


def test_the_reward_may_hold_slopes_products_and_constants(world: World) -> None:
    shifted = dataclasses.replace(world, task=Shifted())
    y, H = STARTS[:1], 7

    def earned(v: Tensor) -> Tensor:
        return returns(shifted, y[0], v[:, None])

    zero = torch.zeros(H, dtype=torch.float64)
    best = -torch.linalg.solve(torch.func.hessian(earned)(zero), torch.func.grad(earned)(zero))
    assert float(riccati_optimum(shifted, y, H)[0]) == pytest.approx(float(earned(best)), rel=1e-12)
    np.testing.assert_allclose(best_actions(shifted, y, H)[0, :, 0], best, atol=1e-12)


class Ends(Endless):
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -(y[..., 0] ** 2 + u[..., 0] ** 2)

    def terminated(self, y_next: Tensor) -> Tensor:
        return y_next[..., 0] > 5


class Free(Endless):
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -(y[..., 0] ** 2)


class Quartic(Endless):
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -(y[..., 0] ** 4 + u[..., 0] ** 2)


def test_what_has_no_such_optimum_is_told(world: World) -> None:
    def refused(other: World, message: str, y0: Tensor = STARTS, steps: int = 5) -> None:
        with pytest.raises(ContractError, match=message):
            riccati_optimum(other, y0, steps)

    refused(
        world.with_model(world.model), "needs the plant as an expression, world.analytic, but it has none"
    )
    refused(make_world("pendulum"), "the slope of its step changes from place to place")
    refused(dataclasses.replace(world, task=Quartic()), "the curvature of its reward changes")
    refused(dataclasses.replace(world, task=Ends()), "episodes of 5 steps, but its task may end them earlier")
    refused(dataclasses.replace(world, task=Free()), "positive definite")
    refused(
        world,
        r"within \[-5.0\] and \[5.0\], but from these states it takes up to 117 at step 0",
        30 * STARTS,
        50,
    )
    refused(world, r"y0 of shape \(M, 2\), but got \(2,\)", STARTS[0])
    refused(world, "needs steps ≥ 1, but got 0", steps=0)
