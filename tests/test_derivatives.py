"""Derivatives of dynamics: tangent spaces, automatic and finite differences, and MuJoCo against its own functions."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import Autodiff, Box, ContractError, FiniteDifference, check_dynamics, quaternions
from mbrl.envs import Layout, MujocoDynamics, World, gym_world, smooth_contacts
from mbrl.rollout import rollout
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


BALL = """
<mujoco>
  <option timestep=".005"/>
  <worldbody>
    <geom type="plane" size="1 1 .1"/>
    <body pos="0 0 .1"><joint name="z" type="slide" axis="0 0 1" range="-1 .5"/><geom size=".1" mass="1"/></body>
  </worldbody>
  <actuator><motor joint="z"/></actuator>
</mujoco>
"""


def ball(*, smooth: bool) -> tuple[MujocoDynamics, Tensor]:
    """A ball of 10 cm that comes down at 1 m/s, at the height where it touches the floor."""
    model = mujoco.MjModel.from_xml_string(BALL)
    model = smooth_contacts(model) if smooth else model
    dynamics = MujocoDynamics(model, Layout(model, ("qpos", "qvel")), threads=1)
    x = torch.zeros(1, dynamics.nx, dtype=torch.float64)
    x[0, 2] = -1.0  # after the time and the height
    return dynamics, x


def test_smooth_contacts_have_a_slope_at_touch_down() -> None:
    """dv'/dz at ε = 1e-6 is the jump of the velocity over ε, unless the contact begins at (nearly) no force."""
    slopes, jumps = {}, {}
    for smooth in (False, True):
        dynamics, x = ball(smooth=smooth)
        u = torch.zeros(1, 1, dtype=torch.float64)
        slopes[smooth] = float(FiniteDifference(dynamics).linearize(x, u, 0)[0][0, 1, 0])
        touching = x.clone()
        touching[0, 1] = -1e-12
        jumps[smooth] = float(dynamics.step(touching, u)[0, 2] - dynamics.step(x, u)[0, 2])
    assert slopes[False] < -1e5 and -100 < slopes[True] < -10
    assert jumps[False] > 0.5 and jumps[True] < 1e-4  # m/s


def test_smooth_contacts_still_hold() -> None:
    """The ball comes to rest on the floor, a little deeper; the model given is left as it was."""
    depths = {}
    for smooth in (False, True):
        dynamics, x = ball(smooth=smooth)
        for _ in range(400):
            x = dynamics.step(x, x.new_zeros(1, 1))
        assert abs(float(x[0, 2])) < 1e-3
        depths[smooth] = -float(x[0, 1])
    assert depths[False] < depths[True] < 2e-3  # m
    model = mujoco.MjModel.from_xml_string(BALL)
    smooth_contacts(model)
    assert (model.geom_solimp[:, 0] == 0.9).all() and (model.jnt_solimp[:, 0] == 0.9).all()


def test_smooth_limits_of_joints_have_a_slope() -> None:
    for smooth, bound in ((False, (1e5, 1e7)), (True, (0.0, 100.0))):
        dynamics, x = ball(smooth=smooth)
        x[0, 1], x[0, 2] = 0.5, 1.0  # at the upper end of its rail, and upwards
        fx, _ = FiniteDifference(dynamics).linearize(x, x.new_zeros(1, 1), 0)
        assert bound[0] <= -float(fx[0, 1, 0]) <= bound[1]


class Counted:
    """Dynamics that count the states they step."""

    def __init__(self, dynamics: MujocoDynamics):
        self.dynamics, self.unrounded, self.rows = dynamics, self, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.dynamics, name)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        self.rows += x.expand(*u.shape[:-1], -1)[..., 0].numel()
        return self.dynamics.step(x, u)


def test_derivatives_between_key_frames_are_interpolated() -> None:
    """Two trajectories of a tumbling body: exact at every n-th step and the last, near in between, at less work."""
    plant = Counted(tumbler())
    H = 24
    u = torch.randn(2, 1, 2, generator=seeded(2), dtype=torch.float64).expand(2, H, 2) * 0.1
    x = rollout(tumbler(), random_states(tumbler(), 2), u)
    steps, rows, found = torch.arange(H), {}, {}
    for every in (1, 5, 100):
        dynamics = FiniteDifference(plant, every=every)  # type: ignore[arg-type]
        plant.rows = 0
        fx, fu = dynamics.linearize(x[:, :-1], u, steps)
        rows[every], found[every] = plant.rows, (fx, fu, dynamics.linearize_output(x))
    assert [rows[n] / rows[1] for n in (1, 5, 100)] == [1.0, 6 / H, 2 / H]  # steps 0, 5, …, 20 and 23
    for dense, sparse in zip(found[1], found[5], strict=True):
        last = dense.shape[1] - 1
        assert sparse.shape == dense.shape
        assert torch.equal(sparse[:, [0, 5, 10, 15, 20, last]], dense[:, [0, 5, 10, 15, 20, last]])
        change = (dense - dense[:, :1]).abs().amax()
        assert 0 < (sparse - dense).abs().amax() < 0.1 * change
    for dense, ends in zip(found[1], found[100], strict=True):
        middle = torch.lerp(dense[:, 0], dense[:, -1], 7 / (dense.shape[1] - 1))
        torch.testing.assert_close(ends[:, 7], middle)


def test_key_frames_take_the_parameters_of_their_own_step() -> None:
    """x' = x₀ + x₁² + k moves with k only where it is looked at: derivatives of a linear dependence are exact."""
    x, u, k = torch.zeros(9, 2).double(), torch.linspace(0, 0.8, 9).double()[:, None], torch.arange(9)
    x[:, 0] = 1.0
    dense, sparse = FiniteDifference(Bent()), FiniteDifference(Bent(), every=4)
    for want, got in zip(dense.linearize(x, u, k), sparse.linearize(x, u, k), strict=True):
        assert torch.equal(want[::4], got[::4])
        torch.testing.assert_close(want, got, atol=0.03, rtol=0)
    one = dense.linearize(x[:1], u[:1], k[:1]), sparse.linearize(x[:1], u[:1], k[:1])
    assert all(torch.equal(want, got) for want, got in zip(*one, strict=True))


@pytest.mark.parametrize(
    ("x", "k"),
    [
        (torch.zeros(2), torch.arange(1)),
        (torch.zeros(5, 2), 0),
        (torch.zeros(5, 2), torch.tensor(0)),
        (torch.zeros(5, 2), torch.arange(4)),
    ],
)
def test_key_frames_need_a_trajectory(x: Tensor, k: int | Tensor) -> None:
    dynamics = FiniteDifference(Bent(), every=3)
    with pytest.raises(ContractError, match=r"needs a trajectory.*take every=1"):
        dynamics.linearize(x.double(), torch.zeros(*x.shape[:-1], 1).double(), k)
    with pytest.raises(ContractError, match=r"needs a trajectory"):
        dynamics.linearize_output(torch.zeros(2).double())
    with pytest.raises(ContractError, match="every ≥ 1"):
        FiniteDifference(Bent(), every=0)
