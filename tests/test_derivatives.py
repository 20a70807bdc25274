"""Derivatives of dynamics: tangent spaces, automatic and finite differences, and MuJoCo against its own functions."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import Autodiff, Box, ContractError, FiniteDifference, check_dynamics, quaternions
from mbrl.envs import Layout, MujocoDynamics, World, gym_world
from tests.problems import DoubleIntegrator, Noisy, seeded

TUMBLER = """
<mujoco>
  <worldbody>
    <body name="trunk" pos="0 0 3">
      <freejoint/><geom size=".2 .1 .1" type="box"/>
      <body name="arm" pos=".3 0 0">
        <joint name="shoulder" type="ball" damping=".1"/><geom size=".05 .2" type="capsule"/>
        <body pos="0 0 .3"><joint name="elbow" axis="0 1 0"/><geom size=".05"/></body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor joint="elbow"/>
    <general joint="elbow" dyntype="filter" dynprm=".1"/>
  </actuator>
</mujoco>
"""


def tumbler() -> MujocoDynamics:
    """A free and a ball joint, a hinge, and an actuator with an activation."""
    model = mujoco.MjModel.from_xml_string(TUMBLER)
    return MujocoDynamics(model, Layout(model, ("qpos", "qvel", "xpos/arm")), frame_skip=3, threads=1)


def random_states(dynamics: MujocoDynamics, n: int) -> Tensor:
    data = mujoco.MjData(dynamics.model)
    x = torch.zeros(n, dynamics.nx, dtype=torch.float64)
    row = mujoco.mj_stateSize(dynamics.model, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_getState(dynamics.model, data, x[0, :row].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
    dx = torch.randn(n, dynamics.ndx, generator=seeded(), dtype=torch.float64)
    return dynamics.refreshed(dynamics.retract(x[:1].expand(n, -1), dx))


def test_tangent_space_is_mujocos() -> None:
    """retract and difference against mj_integratePos and mj_differentiatePos, quaternions included."""
    dynamics = tumbler()
    model = dynamics.model
    x = random_states(dynamics, 20)
    dx = torch.randn(20, dynamics.ndx, generator=seeded(1), dtype=torch.float64)
    y = dynamics.retract(x, dx)
    assert dynamics.ndx == 2 * model.nv + 1
    for i in range(20):
        q = x[i, 1 : 1 + model.nq].numpy().copy()
        mujoco.mj_integratePos(model, q, dx[i, : model.nv].numpy(), 1.0)
        np.testing.assert_allclose(y[i, 1 : 1 + model.nq], q, atol=1e-12)
        v = np.empty(model.nv)
        mujoco.mj_differentiatePos(model, v, 1.0, x[i, 1 : 1 + model.nq].numpy(), q)
        np.testing.assert_allclose(dynamics.difference(x, y)[i, : model.nv], v, atol=1e-9)


def test_quaternions_are_smooth_at_the_identity() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    one = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    J = torch.func.jacrev(quaternions.exp)(zero)
    torch.testing.assert_close(J[1:], 0.5 * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(
        torch.func.jacrev(lambda q: quaternions.difference(one, q))(one)[:, 1:], 2 * J[1:] * 2
    )
    r = torch.randn(50, 3, generator=seeded(), dtype=torch.float64)
    r = r * (torch.pi / r.norm(dim=-1, keepdim=True)).clamp(max=1.0) * 0.999
    v = torch.randn(50, 3, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(quaternions.log(quaternions.exp(r)), r)
    K = torch.linalg.matrix_exp(
        torch.stack([torch.linalg.cross(r, e.expand_as(r)) for e in torch.eye(3).double()], -1)
    )
    torch.testing.assert_close(quaternions.rotate(quaternions.exp(r), v), (K @ v[..., None])[..., 0])


def test_simulator_with_quaternions_keeps_the_contract() -> None:
    """check_dynamics compares with central differences of its own."""
    dynamics = FiniteDifference(tumbler())
    u = torch.randn(6, 2, generator=seeded(2), dtype=torch.float64)
    check_dynamics(dynamics, random_states(dynamics.dynamics, 6), u)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["HalfCheetah-v5", "Hopper-v5", "Reacher-v5", "Ant-v5"])
def visited(request: pytest.FixtureRequest) -> tuple[World, Tensor, Tensor]:
    """A world with states (n, nx) that random actions visit, and the actions (n, nu) taken there."""
    world = gym_world(request.param)
    env = world.make()
    _, info = env.reset(seed=0)
    rng = np.random.default_rng(0)
    states, actions = [], []
    for _ in range(24):
        u = rng.uniform(-0.8, 0.8, world.actions.nu).astype(np.float32)
        u *= world.actions.high.numpy().astype(np.float32)
        states.append(info["state"])
        actions.append(u.astype(np.float64))
        *_, info = env.step(u)
    return world, torch.tensor(np.array(states[::3])), torch.tensor(np.array(actions[::3]))


def serial(world: World, x: Tensor, u: Tensor) -> Tensor:
    """The next state by a plain loop over mj_step."""
    spec, model = mujoco.mjtState.mjSTATE_INTEGRATION, world.model
    data = mujoco.MjData(model)
    row = np.empty(mujoco.mj_stateSize(model, spec))
    rows = []
    for state, control in zip(x.numpy(), u.numpy(), strict=True):
        mujoco.mj_setState(model, data, state[: len(row)], spec)
        data.ctrl[:] = control
        for _ in range(world.frame_skip):
            mujoco.mj_step(model, data)
        mujoco.mj_getState(model, data, row, spec)
        rows.append(row.copy())
    return torch.tensor(np.array(rows))


def test_robots_against_a_loop_over_the_simulator(visited: tuple[World, Tensor, Tensor]) -> None:
    """Another step (1e-5) and another code path: the median error is 2e-5 at most."""
    world, x, u = visited
    plant = world.dynamics(threads=1)
    fx, fu = FiniteDifference(plant, world.actions).linearize(x, u, 0)
    ndx, eps = plant.ndx, 1e-5
    columns = []
    for d in eps * torch.eye(ndx, dtype=torch.float64):
        ends = [serial(world, plant.retract(x, sign * d.expand(len(x), -1)), u) for sign in (1, -1)]
        columns.append(plant.difference(ends[1], ends[0]) / (2 * eps))
    for d in eps * torch.eye(world.actions.nu, dtype=torch.float64):
        columns.append(plant.difference(serial(world, x, u - d), serial(world, x, u + d)) / (2 * eps))
    wanted, got = torch.stack(columns, -1), torch.cat([fx, fu], -1)
    error = (got - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert float(error.median()) <= 2e-5, error


def test_outputs_of_robots_move_with_the_state(visited: tuple[World, Tensor, Tensor]) -> None:
    """The columns of G against the positions that MuJoCo computes at a state that was moved."""
    world, x, _ = visited
    plant = world.dynamics(threads=1)
    G = FiniteDifference(plant).linearize_output(x)
    assert G.shape == (len(x), plant.ny, plant.ndx)
    data = mujoco.MjData(world.model)
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(world.model, spec)
    names = [name for name in world.layout.names if name.startswith(("qpos", "qvel", "xpos", "site_xpos"))]
    where = torch.cat([torch.arange(plant.ny)[world.layout[name]] for name in names])

    def at(state: Tensor) -> np.ndarray:
        mujoco.mj_setState(world.model, data, state.numpy()[:size], spec)
        mujoco.mj_forward(world.model, data)
        y = np.empty(plant.ny)
        world.layout.read(data, y)
        return y

    eps = 1e-5
    for i, d in enumerate(eps * torch.eye(plant.ndx, dtype=torch.float64)):
        slope = (at(plant.retract(x[0], d)) - at(plant.retract(x[0], -d))) / (2 * eps)
        np.testing.assert_allclose(G[0, where, i], slope[where], atol=1e-6)
    if world.name == "Reacher-v5":
        fingertip = G[:, world.layout["xpos/fingertip"]]
        assert bool((fingertip.abs().amax((-1, -2)) > 0.05).all())


def test_at_its_limit_an_action_keeps_its_derivative() -> None:
    """Beyond its range an actuator does nothing: a centred difference at the limit is half the truth."""
    world = gym_world("HalfCheetah-v5")
    _, info = world.make().reset(seed=0)
    x, u = torch.tensor(info["state"])[None], world.actions.high[None]
    plant = world.dynamics(threads=1)
    inside = FiniteDifference(plant, world.actions).linearize(x, u - 1e-3, 0)[1]
    at_limit = FiniteDifference(plant, world.actions).linearize(x, u, 0)[1]
    blind = FiniteDifference(plant).linearize(x, u, 0)[1]
    assert float((at_limit - inside).norm() / inside.norm()) < 0.05
    assert float((blind - inside).norm() / inside.norm()) > 0.4


def test_a_lost_state_has_no_derivatives() -> None:
    dynamics = FiniteDifference(tumbler())
    x = random_states(tumbler(), 3)
    x[1] = torch.nan
    fx, _ = dynamics.linearize(x, torch.zeros(3, 2, dtype=torch.float64), 0)
    assert bool(fx[1].isnan().all()) and bool(fx[[0, 2]].isfinite().all())
    assert bool(dynamics.linearize_output(x)[1].isnan().all())


class Bent:
    """x' = (x₀ + x₁², sin(u) x₀), y = (x₀ x₁, x₁): everything curved; k is added to the first number."""

    nx, nu, ny, dt = 2, 1, 2, 0.1

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        a, b = x[..., 0] + 0 * u[..., 0], x[..., 1]
        return torch.stack([a + b**2 + k, u[..., 0].sin() * a], -1)

    def output(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., 0] * x[..., 1], x[..., 1]], -1)


def test_automatic_derivatives_of_both_orders() -> None:
    dynamics, different = Autodiff(Bent()), FiniteDifference(Bent(), eps=1e-5)
    x = torch.randn(4, 3, 2, generator=seeded(), dtype=torch.float64)
    u = torch.randn(4, 3, 1, generator=seeded(1), dtype=torch.float64)
    k = torch.arange(3)
    check_dynamics(dynamics, x[:, 0], u[:, 0])
    check_dynamics(different, x[:, 0], u[:, 0])
    for got, wanted in zip(dynamics.linearize(x, u, k), different.linearize(x, u, k), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)
    fzz, Gxx = dynamics.curvature(x, u, k), dynamics.curvature_output(x)
    assert fzz.shape == (4, 3, 2, 3, 3) and Gxx.shape == (4, 3, 2, 2, 2)
    torch.testing.assert_close(fzz[..., 0, 1, 1], torch.full_like(x[..., 0], 2.0))
    torch.testing.assert_close(fzz[..., 1, 2, 2], -u[..., 0].sin() * x[..., 0])
    torch.testing.assert_close(fzz[..., 1, 0, 2], u[..., 0].cos())
    torch.testing.assert_close(Gxx[..., 0, 0, 1], torch.ones_like(x[..., 0]))


def test_what_cannot_be_differentiated_is_refused() -> None:
    with pytest.raises(ContractError, match="must be drawn first"):
        Autodiff(Noisy())  # type: ignore[arg-type]
    box = Box(-torch.ones(1), torch.ones(1))
    assert FiniteDifference(DoubleIntegrator(), box).ndx == 2
