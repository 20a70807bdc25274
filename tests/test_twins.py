"""Worlds that a simulator and an expression describe alike: the pendulum, the acrobot, the double integrator."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import MPC, check_dynamics, check_task
from mbrl.envs import World, make_world
from mbrl.estimators import Measured
from mbrl.experiments import cli
from mbrl.expressions import Expressible
from mbrl.planners import ILQR, NMPC
from tests.problems import seeded

NAMES = ("acrobot", "double-integrator", "pendulum")
every_world = pytest.mark.parametrize("name", NAMES)


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random_actions(world: World, n: int) -> Tensor:
    """(n, nu), as the environment rounds them."""
    share = torch.rand(n, world.actions.nu, generator=seeded(), dtype=torch.float64)
    return (world.actions.low + share * (world.actions.high - world.actions.low)).float().double()


@pytest.mark.parametrize("name", [*NAMES, "cart-pole"])
def test_the_expression_is_the_simulator_over_a_whole_episode(name: str) -> None:
    """Step by step, and rolled out on its own from the first state on."""
    world, env = make_world(name), make_world(name).make()
    assert world.analytic is not None
    alone, actions = world.measure(*env.reset(seed=3)), random_actions(world, 200)
    seen = [alone]
    for k, u in enumerate(actions):
        obs, _, _, _, info = env.step(u.float().numpy())
        seen.append(world.measure(obs, info))
        alone = world.analytic.step(alone, u[None], k)
        torch.testing.assert_close(alone, seen[-1], rtol=0, atol=1e-6)
    env.close()
    y = torch.cat(seen)
    torch.testing.assert_close(world.analytic.step(y[:-1], actions, 0), y[1:], rtol=0, atol=1e-9)
    assert y.abs().max() > 0.5
    assert world.analytic.dt == pytest.approx(0.05) and world.dynamics(threads=1).dt == pytest.approx(0.05)
    found = np.array(
        world.analytic.expression.step(y[-2].numpy(), actions[-1].numpy(), 0, world.analytic.theta)
    )
    np.testing.assert_allclose(found[:, 0], y[-1], atol=1e-9)


@every_world
def test_contracts(name: str) -> None:
    world = make_world(name)
    assert check_task(world, steps=60) == []
    assert isinstance(world.analytic, Expressible)
    y = torch.randn(4, world.layout.size, generator=seeded(), dtype=torch.float64)
    check_dynamics(world.analytic, y, random_actions(world, 4))


@every_world
def test_checked_from_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-env", name, "--steps", "20"]) == 0
    assert f"{name} passed the check with 0 warnings." in capsys.readouterr().out


@every_world
@pytest.mark.parametrize("planner", ["icem", "ilqr", "nmpc"])
def test_planned_in_from_the_command_line(name: str, planner: str, tmp_path: Path) -> None:
    options = ["--planner.population", "12"] if planner == "icem" else []
    words = ["mpc", "--env", name, "--planner", planner, *options, "--horizon", "6", "--steps", "2"]
    assert cli.main([*words, "--no-video", "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and float(rows[-1]["state_error"]) < 1e-9


@pytest.mark.parametrize(("name", "reach"), [("acrobot", 0.1), ("double-integrator", 1.0), ("pendulum", 0.1)])
def test_episodes_start_where_the_seed_says_and_last_200_steps(name: str, reach: float) -> None:
    env = make_world(name).make()
    starts = np.array([env.reset(seed=seed)[0] for seed in range(40)])
    assert (np.abs(starts) <= reach).all() and (starts.std(0) > 0.4 * reach).all()
    np.testing.assert_array_equal(starts[0], env.reset(seed=0)[0])
    still = np.zeros(1, dtype=np.float32)
    ends = [env.step(still)[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]
    env.close()


@pytest.mark.parametrize(
    ("name", "y", "u", "reward"),
    [
        ("pendulum", (0.0, 0.0), 0.0, -20.0),
        ("pendulum", (-3 * np.pi, 0.0), 0.0, 0.0),
        ("pendulum", (np.pi / 2, 2.0), 4.0, -(10 + 0.4 + 0.16)),
        ("acrobot", (0.0, 0.0, 0.0, 0.0), 0.0, -40.0),
        ("acrobot", (np.pi, 2 * np.pi, 0.0, 0.0), 0.0, 0.0),
        ("acrobot", (np.pi, np.pi / 2, 1.0, -2.0), 5.0, -(10 + 0.5 + 0.25)),
        ("double-integrator", (0.0, 0.0), 0.0, 0.0),
        ("double-integrator", (2.0, -1.0), 3.0, -0.5 * (4 + 0.1 + 0.9)),
    ],
)
def test_rewards(name: str, y: tuple[float, ...], u: float, reward: float) -> None:
    paid = make_world(name).task.reward(tensor(*y), tensor(u), torch.full((len(y),), torch.nan))
    assert float(paid) == pytest.approx(reward, abs=1e-9)


@pytest.mark.parametrize(("name", "angles"), [("acrobot", 2), ("pendulum", 1), ("double-integrator", 0)])
def test_learned_models_see_no_difference_between_an_angle_and_the_same_after_a_turn(
    name: str, angles: int
) -> None:
    features = make_world(name).features
    y = torch.randn(5, features.ny, generator=seeded(), dtype=torch.float64)
    turned = y.clone()
    turned[:, :angles] += 2 * torch.pi
    torch.testing.assert_close(features.inputs(turned), features.inputs(y))
    assert features.inputs(y).shape[1] == features.ny + angles
    torch.testing.assert_close(features.advance(y, features.targets(y, turned)), turned)


def test_the_motor_of_the_pendulum_alone_does_not_lift_it() -> None:
    world = make_world("pendulum")
    assert world.analytic is not None
    y, highest = torch.zeros(1, 2, dtype=torch.float64), 0.0
    for k in range(200):
        y = world.analytic.step(y, world.actions.high[None], k)
        highest = max(highest, float(y[0, 0]))
    assert 0.7 < highest < 1.0  # rad
    assert float(y[0, 0]) == pytest.approx(np.radians(24), abs=0.1)


def episode(world: World, planner: Any, horizon: int, seed: int, steps: int) -> np.ndarray:
    """The observations (steps, ny)."""
    problem = dataclasses.replace(world.problem(horizon, dynamics=world.analytic), terminated=None)
    estimator = Measured(world.measure, torch.float64)
    policy = MPC(problem, planner, estimator=estimator, generator=seeded(seed))
    env, seen = world.make(), []
    obs, info = env.reset(seed=seed)
    for _ in range(steps):
        obs, _, _, _, info = env.step(policy(obs, info)[0].numpy().astype(np.float32))
        seen.append(obs)
    env.close()
    assert policy.fallbacks == 0
    return np.array(seen)


@pytest.mark.parametrize("planner", [NMPC(), ILQR(iterations=3)], ids=["nmpc", "ilqr"])
def test_the_pendulum_swings_up_and_is_held(planner: Any) -> None:
    seen = episode(make_world("pendulum"), planner, 30, seed=1, steps=100)
    assert (np.cos(seen[-20:, 0]) < -0.999).all() and (np.abs(seen[-20:, 1]) < 0.05).all()


@pytest.mark.parametrize("planner", [NMPC(), ILQR(iterations=3)], ids=["nmpc", "ilqr"])
def test_the_acrobot_swings_up_and_balances_if_plans_see_two_seconds(planner: Any) -> None:
    """One and a half let the elbow bend and the tip sink again: straightening it costs more than they see it gain."""
    tips = {}
    for horizon in (40, 30):
        seen = episode(make_world("acrobot"), planner, horizon, seed=1, steps=130)
        tips[horizon] = -np.cos(seen[:, 0]) - np.cos(seen[:, 0] + seen[:, 1])  # m above the shoulder
        if horizon == 40:
            assert (np.abs(seen[-30:, 2:]) < 0.1).all()
    assert (tips[40][-30:] > 1.999).all() and tips[30].max() < 1.95 and tips[30][-1] < 1
