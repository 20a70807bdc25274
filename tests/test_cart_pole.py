"""The cart-pole world: its simulator, and the same physics as an expression."""

from __future__ import annotations

import dataclasses

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import MPC, ContractError, check_dynamics, check_task
from mbrl.derivatives import FiniteDifference
from mbrl.envs import WORLDS, Within, World, make_world, scaled_model
from mbrl.estimators import Measured
from mbrl.expressions import Expressible
from mbrl.planners import ILQR, NMPC
from tests.problems import seeded


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("cart-pole")


def draws(n: int) -> tuple[Tensor, Tensor]:
    """Wild states (n, 4) and actions (n, 1)."""
    reach = torch.tensor([2.0, torch.pi, 4.0, 12.0], dtype=torch.float64)
    y = reach * (2 * torch.rand(n, 4, generator=seeded(), dtype=torch.float64) - 1)
    return y, 40 * torch.rand(n, 1, generator=seeded(1), dtype=torch.float64) - 20


def states(world: World, y: Tensor) -> Tensor:
    """x (n, nx) of the simulator at y (n, 4)."""
    x = torch.zeros(len(y), world.dynamics(threads=1).nx, dtype=torch.float64)
    start = mujoco.mj_stateSize(world.model, mujoco.mjtState.mjSTATE_TIME)
    x[:, start : start + 4] = x[:, -4:] = y
    return x


def test_the_analytic_model_is_the_simulator(world: World) -> None:
    assert world.analytic is not None
    y, u = draws(500)
    simulator = world.dynamics(threads=1).unrounded
    simulated = simulator.output(simulator.step(states(world, y), u, 0))
    torch.testing.assert_close(world.analytic.step(y, u, 0), simulated, rtol=0, atol=1e-9)
    assert world.analytic.dt == pytest.approx(simulator.dt) and world.analytic.ny == simulator.ny
    found = np.array(world.analytic.expression.step(y[0].numpy(), u[0].numpy(), 0, world.analytic.theta))
    np.testing.assert_allclose(found[:, 0], simulated[0], atol=1e-9)


def test_energy_is_that_of_a_point_on_a_massless_rod(world: World) -> None:
    """T + V of a cart of 1 kg and a point of 0.3 kg at 0.5 m, kept while nothing pushes."""
    y = torch.tensor([[0.3, 1.2, -0.4, 2.0]], dtype=torch.float64)
    simulator = world.dynamics(threads=1)
    x, energies = states(world, y), list[float]()
    for _ in range(40):
        _, angle, v, rate = simulator.output(x)[0]
        tip = torch.stack([v + 0.5 * rate * angle.cos(), 0.5 * rate * angle.sin()])
        energies.append(float(0.5 * v**2 + 0.15 * tip.square().sum() - 0.3 * 9.81 * 0.5 * angle.cos()))
        x = simulator.step(x, torch.zeros(1, 1, dtype=torch.float64), 0)
    assert max(energies) - min(energies) < 1e-3


def test_contracts(world: World) -> None:
    assert check_task(world, steps=60) == []
    y, u = draws(4)
    assert isinstance(world.analytic, Expressible)
    check_dynamics(world.analytic, y, u)


def test_the_track_is_a_constraint_that_the_simulator_does_not_enforce(world: World) -> None:
    (track,) = world.constraints
    y = torch.tensor([[0.0], [1.25], [-1.5]], dtype=torch.float64).expand(3, 4)
    g = track.fun(y, None, 0, None)
    assert g.tolist() == [[-1.0, -1.0], [0.25, -2.25], [-2.5, 0.5]] and track.label == "track"
    short = make_world("cart-pole", limit=0.5)
    assert float(short.constraints[0].fun(y[1], None, 0, None)[0]) == 0.75
    assert short.model.geom("left end").pos[0] == -0.5
    env = world.make()
    env.reset(seed=0)
    for _ in range(20):
        obs = env.step(np.array([20.0], dtype=np.float32))[0]
    env.close()
    assert obs[0] > 1.5
    with pytest.raises(ContractError, match="needs low < high, but got 1.0 and 0.0"):
        Within(0, 1.0, 0.0)


def test_constraints_and_the_analytic_model_stand_beside_the_problem(world: World) -> None:
    assert world.problem(5, threads=1).constraints == ()
    assert world.problem(5, threads=1, constraints=world.constraints).constraints == world.constraints
    other = world.with_model(scaled_model(world.model, {"body_mass": 1.5}))
    assert other.analytic is None and other.constraints == world.constraints


def test_worlds_are_listed_as_what_they_are() -> None:
    for name, entry in WORLDS.items():
        if not name.startswith(("go2", "g1", "panda")):  # of optional packages
            assert (make_world(name).analytic is not None) == entry.analytic, name


@pytest.mark.parametrize("seed", [0, 3])
def test_nmpc_swings_the_pole_up_within_the_track(world: World, seed: int) -> None:
    """Unconstrained plans use 1.5 m: the limit of 1 m is active."""
    reached = {}
    for name, constraints in (("held", world.constraints), ("free", ())):
        problem = world.problem(40, dynamics=world.analytic, constraints=constraints)
        policy = MPC(
            dataclasses.replace(problem, terminated=None),
            NMPC(),
            estimator=Measured(world.measure, torch.float64),
            generator=seeded(),
        )
        env = world.make()
        obs, info = env.reset(seed=seed)
        track = []
        for _ in range(70):
            obs, _, _, _, info = env.step(policy(obs, info)[0].numpy().astype(np.float32))
            track.append(abs(obs[0]))
        env.close()
        reached[name] = max(track)
        assert np.cos(obs[1]) < -0.99 and abs(obs[3]) < 0.1 and policy.fallbacks == 0
    assert 0.999 < reached["held"] < 1 + 1e-5 and reached["free"] > 1.2


def test_ilqr_plans_in_the_simulator_as_in_the_analytic_model(world: World) -> None:
    """One flag apart: the same optimum, the simulator's derivatives by finite differences."""
    y, _ = draws(1)
    y = 0.1 * y + torch.tensor([0.0, torch.pi, 0.0, 0.0], dtype=torch.float64)
    costs = []
    for dynamics, x0 in (
        (FiniteDifference(world.dynamics(threads=1), world.actions), states(world, y)),
        (world.analytic, y),
    ):
        problem = world.problem(20, dynamics=dynamics)
        planner = ILQR()
        plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())
        costs.append(float(plan.cost))
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
