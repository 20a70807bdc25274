"""MuJoCo as a model: bit-exact against the environments, honest about failures."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import (
    Box,
    ContractError,
    Problem,
    UnknownName,
    UnsupportedProblem,
    check_dynamics,
    check_task,
    evaluate,
)
from mbrl.envs import (
    Layout,
    MujocoDynamics,
    RandomizedMujoco,
    World,
    gym_world,
    load_mjcf,
    make_world,
    mjcf_world,
    read_state,
    scaled_model,
    write_state,
)
from mbrl.envs.gym_tasks import TASKS
from mbrl.planners import CEM
from tests.problems import Quadratic, box, seeded

CART = """
<mujoco model="cart">
  <option timestep="0.01"/>
  <worldbody>
    <body name="cart">
      <joint name="slide" type="slide" axis="1 0 0"/>
      <geom size="0.1" mass="1"/>
      <body name="pole" pos="0 0 0.1">
        <joint name="hinge" type="hinge" axis="0 1 0"/>
        <geom type="capsule" fromto="0 0 0 0 0 0.5" size="0.02" mass="0.2"/>
        <site name="tip" pos="0 0 0.5"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor name="push" joint="slide" ctrlrange="-1 1" gear="10"/></actuator>
  <sensor><framepos name="where" objtype="site" objname="tip"/></sensor>
</mujoco>
"""


class Upright:
    """Keep the tip high, the cart near the middle."""

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return 1.0 - y_next[..., 0].square() - y_next[..., 1].square() - 0.01 * u.square().sum(-1)

    def terminated(self, y_next: Tensor) -> Tensor:
        return y_next[..., 1].abs() > 0.5


def cart(fields: tuple[str, ...] = ("qpos", "qvel", "site_xpos/tip"), threads: int = 1) -> MujocoDynamics:
    model = load_mjcf(CART)
    return MujocoDynamics(model, Layout(model, fields), frame_skip=2, threads=threads)


def state(dynamics: MujocoDynamics, qpos: list[float], qvel: list[float]) -> Tensor:
    data = mujoco.MjData(dynamics.model)
    data.qpos[:], data.qvel[:] = qpos, qvel
    mujoco.mj_forward(dynamics.model, data)
    return torch.from_numpy(read_state(dynamics.model, data, dynamics.layout))


def actions(world: World, n: int, seed: int = 0) -> Tensor:
    share = torch.rand(n, world.actions.nu, generator=seeded(seed), dtype=torch.float64)
    return world.actions.low + share * (world.actions.high - world.actions.low)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_predictions_equal_the_environment(name: str) -> None:
    """State bit for bit at 1 and 2 threads; reward, end and observation to 1e-9, under float64 actions."""
    world = gym_world(name)
    models = [
        MujocoDynamics(world.model, world.layout, frame_skip=world.frame_skip, threads=threads)
        for threads in (1, 2)
    ]
    env = world.make()
    _, info = env.reset(seed=3)
    try:
        for u in actions(world, 20).float().double():
            x = torch.as_tensor(info["state"])
            obs, reward, terminated, _, info = env.step(u.numpy())
            x_next = torch.as_tensor(info["state"])
            for model in models:
                # Among other rows, at another place in the batch.
                batch = model.step(x.expand(3, -1), torch.stack([0 * u, u, u]), 0)
                assert torch.equal(batch[1], x_next) and torch.equal(batch[2], x_next)
            y, y_next = models[0].output(x), models[0].output(x_next)
            assert float(world.task.reward(y, u, y_next)) == pytest.approx(float(reward), rel=1e-9, abs=1e-9)
            assert bool(world.task.terminated(y_next)) == terminated
            torch.testing.assert_close(world.observe(y_next), torch.as_tensor(obs), rtol=1e-9, atol=1e-9)
            if terminated:
                _, info = env.reset()
    finally:
        env.close()


@pytest.mark.parametrize("name", ["Hopper-v5", "Ant-v5"])
def test_rolled_out_plans_equal_the_environment(name: str) -> None:
    """A whole plan, open loop: the cost that a planner sees is what the environment pays."""
    world = gym_world(name, terminate_when_unhealthy=False)
    problem = world.problem(15, threads=2)
    env = world.make()
    _, info = env.reset(seed=1)
    x0 = torch.as_tensor(info["state"])[None]
    plan = actions(world, 15, seed=2).float().double()
    result = evaluate(problem, problem.dynamics, x0, plan[None, None], keep_states=True)
    paid = 0.0
    for u in plan.float():
        _, reward, _, _, info = env.step(u.numpy())
        paid += float(reward)
    env.close()
    assert result.states is not None
    assert torch.equal(result.states[0, 0, -1], torch.as_tensor(info["state"]))
    assert float(result.cost) == pytest.approx(-paid, rel=1e-6)  # the environment adds up in float32


@pytest.mark.parametrize("name", ["HalfCheetah-v5", "Ant-v5"])
def test_contract(name: str) -> None:
    world = gym_world(name)
    env = world.make()
    starts = [torch.as_tensor(env.reset(seed=seed)[1]["state"]) for seed in range(4)]
    env.close()
    check_dynamics(world.dynamics(threads=2), torch.stack(starts), actions(world, 4))


def test_contract_of_the_cart() -> None:
    dynamics = cart()
    x = torch.stack([state(dynamics, [0.1 * i, 0.2], [0.0, -0.1 * i]) for i in range(3)])
    check_dynamics(dynamics, x, torch.tensor([[0.5], [-1.0], [0.0]], dtype=torch.float64))


def test_a_loop_of_mj_step_by_hand() -> None:
    dynamics = cart()
    data = mujoco.MjData(dynamics.model)
    data.qpos[:] = [0.0, 0.3]
    mujoco.mj_forward(dynamics.model, data)
    x = torch.from_numpy(read_state(dynamics.model, data, dynamics.layout))
    for k in range(10):
        u = torch.tensor([0.3 * (-1) ** k], dtype=torch.float64)
        x = dynamics.step(x, u, k)
        data.ctrl[:] = u.numpy()
        mujoco.mj_step(dynamics.model, data, nstep=2)
        assert torch.equal(x, torch.from_numpy(read_state(dynamics.model, data, dynamics.layout)))
    assert torch.equal(dynamics.output(x)[:2], torch.from_numpy(data.qpos))
    assert dynamics.dt == pytest.approx(0.02)


def test_actions_are_rounded_as_the_environment_rounds_them() -> None:
    model = load_mjcf(CART)
    layout = Layout(model, ("qpos", "qvel"))
    fine, rough = (
        MujocoDynamics(model, layout, threads=1, action_dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    x, u = state(fine, [0.0, 0.1], [0.0, 0.0]), torch.tensor([1 / 3], dtype=torch.float64)
    assert torch.equal(rough.step(x, u, 0), fine.step(x, u.float().double(), 0))
    assert not torch.equal(rough.step(x, u, 0), fine.step(x, u, 0))


@pytest.mark.parametrize("name", ["cart", "HalfCheetah-v5"])
def test_plans_in_float64_are_rounded_alike_by_planner_and_environment(name: str) -> None:
    world = mjcf_world("cart", CART, Upright()) if name == "cart" else gym_world(name)
    env = world.make()
    _, info = env.reset(seed=0)
    u = torch.full_like(world.actions.high, 1 / 3)
    predicted = world.dynamics(threads=1).step(torch.as_tensor(info["state"]), u)
    _, _, _, _, info = env.step(u.numpy())
    env.close()
    assert torch.equal(predicted, torch.as_tensor(info["state"]))


def test_diverged_rows_are_nan_and_only_those() -> None:
    dynamics = cart(threads=2)
    good = state(dynamics, [0.0, 0.1], [0.0, 0.0])
    wild = state(dynamics, [0.0, 0.1], [1e15, 0.0])
    u = torch.zeros(3, 1, dtype=torch.float64)
    wanted = dynamics.step(good, u[0], 0)
    result = dynamics.step(torch.stack([good, wild, good]), u, 0)
    assert torch.isnan(result[1]).all()
    assert torch.equal(result[0], wanted) and torch.equal(result[2], wanted)
    # The failure is forgotten by the next call.
    assert torch.equal(dynamics.step(good.expand(3, -1), u, 0), wanted.expand(3, -1))


def test_rows_that_are_not_finite_are_skipped() -> None:
    dynamics = cart()
    x = state(dynamics, [0.0, 0.1], [0.0, 0.0]).repeat(4, 1)
    u = torch.zeros(4, 1, dtype=torch.float64)
    wanted = dynamics.step(x[0], u[0], 0)
    x[1, 3], u[2] = torch.inf, torch.nan
    result = dynamics.step(x, u, 0)
    assert torch.isnan(result[1:3]).all()
    assert torch.equal(result[0], wanted) and torch.equal(result[3], wanted)
    assert torch.isnan(dynamics.step(x * torch.nan, u, 0)).all()


def test_a_diverged_environment_says_so() -> None:
    world = mjcf_world("cart", CART, Upright())
    env: Any = world.make()
    _, info = env.reset(seed=0)
    assert info["diverged"] is False
    env.unwrapped.data.qvel[0] = 1e15
    _, reward, _, truncated, info = env.step(np.zeros(1, dtype=np.float32))
    assert truncated and info["diverged"]
    assert np.isnan(reward) and np.isfinite(info["reward"])  # the jump to the default pose must not count
    env.reset()
    _, reward, _, truncated, info = env.step(np.zeros(1, dtype=np.float32))
    assert np.isfinite(reward) and "reward" not in info
    assert not truncated and not info["diverged"]


def test_a_diverged_step_passes_through_the_wrappers_of_gymnasium() -> None:
    world = gym_world("HalfCheetah-v5")
    env: Any = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.ClipReward(world.make(), -1, 1))
    env.reset(seed=0)
    env.unwrapped.data.qvel[0] = 1e15
    _, reward, _, truncated, info = env.step(np.zeros(6, dtype=np.float32))
    assert truncated and info["diverged"] and np.isnan(reward) and np.isnan(info["episode"]["r"])
    env.close()


def test_a_reward_may_be_nan_where_the_physics_diverged() -> None:
    class Speed(Upright):
        def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
            return (y_next[..., 0] - y[..., 0]) / (1e15 - y[..., 2]) / 0.0

    env: Any = mjcf_world("cart", CART, Speed()).make()
    env.reset(seed=0)
    env.unwrapped.data.qvel[0] = 1e15
    _, reward, _, truncated, info = env.step(np.zeros(1, dtype=np.float32))
    assert truncated and np.isnan(reward) and not np.isfinite(info["reward"])


@pytest.mark.parametrize("action", [[np.nan], [np.inf], [0.0, 0.0], 0.0])
def test_the_environment_refuses_actions_that_mujoco_would_zero(action: Any) -> None:
    env = mjcf_world("cart", CART, Upright()).make()
    env.reset(seed=0)
    with pytest.raises(ContractError, match=r"needs finite actions of shape \(1,\)"):
        env.step(np.asarray(action, dtype=np.float32))


def test_broadcasting_and_growth() -> None:
    dynamics = cart()
    a, b = state(dynamics, [0.0, 0.1], [0.0, 0.0]), state(dynamics, [0.5, -0.1], [0.1, 0.0])
    u = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    small = dynamics.step(a, u[0], 0)
    grid = dynamics.step(torch.stack([a, b])[:, None], u, 0)
    assert grid.shape == (2, 3, dynamics.nx)
    large = dynamics.step(torch.stack([a, b]).expand(40, 2, -1), u[2], 0)
    assert large.shape == (40, 2, dynamics.nx)
    # One batch of the largest size serves the small calls that follow, with the same result.
    assert torch.equal(dynamics.step(a, u[0], 0), small)
    assert torch.equal(dynamics.step(torch.stack([a, b])[:, None], u, 0), grid)
    assert torch.equal(grid[1, 2], large[7, 1])
    assert dynamics.step(torch.empty(0, dynamics.nx, dtype=torch.float64), u[:0], 0).shape == (0, dynamics.nx)


def test_wrong_sizes_are_named() -> None:
    dynamics = cart()
    x = state(dynamics, [0.0, 0.0], [0.0, 0.0])
    with pytest.raises(ContractError, match=rf"x \(\.\.\., {dynamics.nx}\) and u \(\.\.\., 1\)"):
        dynamics.step(x, torch.zeros(2, dtype=torch.float64), 0)
    with pytest.raises(ContractError, match="but got"):
        dynamics.step(x[:-1], torch.zeros(1, dtype=torch.float64), 0)
    with pytest.raises(ContractError, match="frame_skip ≥ 1"):
        MujocoDynamics(dynamics.model, dynamics.layout, frame_skip=0)
    with pytest.raises(ContractError, match="threads ≥ 0"):
        MujocoDynamics(dynamics.model, dynamics.layout, threads=-1)


@pytest.mark.parametrize("flag", ["sleep", "ipc"])
def test_steps_that_depend_on_more_than_the_state_are_refused(flag: str) -> None:
    option = '<option timestep="0.01"'
    odd = CART.replace(option + "/>", f'{option} integrator="discrete"><flag {flag}="enable"/></option>')
    with pytest.raises(ContractError, match=f'this one has <flag {flag}="enable"/>. Remove it'):
        mjcf_world("cart", odd, Upright()).dynamics()


@pytest.mark.parametrize("fields", [("qpos", "qvel"), ("qpos", "qvel", "cfrc_ext")])
def test_each_particle_has_its_own_model(fields: tuple[str, ...]) -> None:
    nominal = cart(fields)
    scales = {"body_mass": (0.5, 2.0), "actuator_gear": (0.8, 1.2)}
    uncertain = RandomizedMujoco(nominal, scales, 3, generator=seeded(1))
    x = state(nominal, [0.0, 0.2], [0.1, 0.0])
    u = torch.tensor([[0.7], [-0.2]], dtype=torch.float64)

    first = uncertain.realize((3, 1, 1), 5, generator=seeded(2))
    second = uncertain.realize((3, 1, 1), 5, generator=seeded(3))
    assert sorted(first.pick.ravel().tolist()) == [0, 1, 2]  # P = n particles see every model once
    assert first.pick.ravel().tolist() != second.pick.ravel().tolist()
    # Two draws at once, in turn, at several shapes.
    for drawn in (first, second, first):
        result = drawn.step(x.expand(3, 1, 2, -1), u, 0)
        for p, i in enumerate(drawn.pick.ravel().tolist()):
            own = MujocoDynamics(uncertain.models[i], nominal.layout, frame_skip=2, threads=1)
            assert torch.equal(result[p, 0], own.step(x, u, 0))
        assert drawn.step(x.expand(3, 4, 1, -1), u[0], 0).shape == (3, 4, 1, nominal.nx)
    masses = [float(model.body_mass[1]) for model in uncertain.models]
    assert len(set(masses)) == 3 and all(0.5 <= mass <= 2.0 for mass in masses)
    assert float(nominal.model.body_mass[1]) == 1.0  # untouched
    check_dynamics(uncertain, torch.stack([x, x + 0.0]), u)


def test_more_particles_than_models_are_balanced() -> None:
    uncertain = RandomizedMujoco(cart(), {"body_mass": (0.5, 2.0)}, 3, generator=seeded())
    pick = uncertain.realize((7, 1, 1), 2, generator=seeded()).pick.ravel()
    assert sorted(pick.bincount(minlength=3).tolist()) == [2, 2, 3]


def test_a_world_has_one_particle_per_model_unless_told_otherwise() -> None:
    world = mjcf_world("cart", CART, Upright())
    uncertain = RandomizedMujoco(world.dynamics(threads=1), {"body_mass": (0.5, 2.0)}, 3, generator=seeded())
    assert world.problem(4, dynamics=uncertain).particles == 3
    assert world.problem(4, dynamics=uncertain, particles=2).particles == 2
    assert world.problem(4, threads=1).particles == 1
    with pytest.raises(ContractError, match="at least 1 model, but got n = 0"):
        RandomizedMujoco(uncertain.nominal, {"body_mass": (0.5, 2.0)}, 0, generator=seeded())


def test_more_rows_than_models_are_refused() -> None:
    dynamics = cart()
    x, u = state(dynamics, [0.0, 0.1], [0.0, 0.0]), torch.ones(1, dtype=torch.float64)
    heavy = scaled_model(dynamics.model, {"body_mass": 2.0})
    dynamics._set_models([heavy, heavy])
    assert dynamics.step(x.expand(2, -1), u, 0).shape == (2, dynamics.nx)
    with pytest.raises(ContractError, match="has 2 models, but got 3 rows"):
        dynamics.step(x.expand(3, -1), u, 0)


def test_a_plan_under_uncertain_masses() -> None:
    nominal = cart(("qpos", "qvel"))
    uncertain = RandomizedMujoco(nominal, {"body_mass": (0.5, 2.0)}, 4, generator=seeded())
    cost = Quadratic((1.0, 0.1, 0.0, 0.0), (0.1,), (1.0,) * 4)
    problem = Problem(uncertain, cost, box(1, 1.0), 4, particles=4)
    x0 = state(nominal, [0.4, 0.0], [0.0, 0.0])[None]
    plan, _ = CEM().plan(problem, x0, CEM().init(problem, x0, generator=seeded()), generator=seeded())
    assert torch.isfinite(plan.cost).all()
    assert float(plan.actions[0, 0, 0]) < 0.0  # back to the middle


def test_scaled_models() -> None:
    model = load_mjcf(CART)
    heavy = scaled_model(model, {"body_mass": 2.0, "geom_friction": 0.5})
    np.testing.assert_allclose(heavy.body_mass, 2 * model.body_mass)
    np.testing.assert_allclose(heavy.body_inertia, 2 * model.body_inertia)
    np.testing.assert_allclose(heavy.geom_friction[:, 0], 0.5 * model.geom_friction[:, 0])
    np.testing.assert_allclose(heavy.geom_friction[:, 1:], model.geom_friction[:, 1:])
    assert heavy.dof_M0[0] == pytest.approx(2 * model.dof_M0[0])  # a derived constant
    with pytest.raises(UnknownName, match="body_mass"):
        scaled_model(model, {"body_mas": 2.0})
    for factor in (-1.0, np.nan, np.inf):
        with pytest.raises(ContractError, match=f"factors ≥ 0, but got {factor} for body_mass"):
            scaled_model(model, {"body_mass": factor})
    for name in ("opt", "nq", "geom_type", "names"):
        with pytest.raises(UnknownName, match=f"no MjModel field of floats called '{name}'"):
            scaled_model(model, {name: 1.1})


def test_write_state_is_what_read_state_reads() -> None:
    dynamics = cart()
    x = dynamics.step(state(dynamics, [0.1, 0.2], [0.3, 0.4]), torch.ones(1, dtype=torch.float64), 0)
    data = mujoco.MjData(dynamics.model)
    write_state(dynamics.model, data, x)
    assert data.qpos.tolist() == dynamics.output(x)[:2].tolist()
    assert data.time == pytest.approx(0.02)


def test_layout_reads_what_its_names_say() -> None:
    model = load_mjcf(CART)
    names = (
        "qpos/hinge",
        "qvel",
        "xpos/pole",
        "site_xpos/tip",
        "sensordata/where",
        "time",
        "qvel/slide",
        "xpos/0",
    )
    layout = Layout(model, names)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = [0.3, 0.4], [1.0, 2.0]
    mujoco.mj_forward(model, data)
    y = np.empty(layout.size)
    layout.read(data, y)
    wanted = {
        "qpos/hinge": [0.4],
        "qvel": [1.0, 2.0],
        "xpos/pole": data.body("pole").xpos,
        "site_xpos/tip": data.site("tip").xpos,
        "sensordata/where": data.sensor("where").data,
        "time": [0.0],
        "qvel/slide": [1.0],
        "xpos/0": [0.0, 0.0, 0.0],
    }
    for name, values in wanted.items():
        assert name in layout
        np.testing.assert_array_equal(y[layout[name]], values)
    assert sum(y[layout[name]].size for name in names) == layout.size


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (("qpos", "qposs"), UnknownName, "no MjData field called 'qposs'. Did you mean qpos"),
        (("site_xpos/tipp",), UnknownName, "no site called 'tipp'. Did you mean tip"),
        (("xpos/wheel",), UnknownName, "no body called 'wheel'"),
        (("sensordata/gyro",), UnknownName, "no sensor called 'gyro'"),
        (("qpos/slid",), UnknownName, "slide"),
        (("xpos/9",), UnknownName, "9"),
        (("qpos/9",), UnknownName, "9"),
        (("qacc/slide",), ContractError, "'qacc' has no rows by name"),
        (("qpos", "qpos"), ContractError, "each field once"),
        ("qpos", ContractError, "a sequence of fields, .* but got 'qpos'"),
        ((), ContractError, "a sequence of fields"),
        (("mocap_pos/cart",), ContractError, "'cart' is none; those that are: goal"),
    ],
)
def test_layout_errors_name_what_is_there(names: tuple[str, ...], error: type[Exception], text: str) -> None:
    model = CART.replace("<worldbody>", '<worldbody><body name="goal" mocap="true"/>')
    with pytest.raises(error, match=text):
        Layout(load_mjcf(model), names)


def test_layout_lists_its_own_fields() -> None:
    layout = Layout(load_mjcf(CART), ("qpos", "site_xpos/tip"))
    with pytest.raises(UnknownName, match="Did you mean site_xpos/tip"):
        layout["site_xpos/top"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("<mujoco><worldbody><geom/></worldbody></mujoco>", r"(?s)in geom.*line 1"),
        ("<mujoco>\n<worldbody>\n<body><joint tipe='hinge'/></body></worldbody></mujoco>", "line 3"),
        ("<mujoco><worldbody>", "cannot load the model"),
        ("nowhere/robot.xml", "in nowhere/robot.xml"),
        (mujoco.MjSpec.from_string(CART.replace('size="0.1"', 'size="-1"')), "geom"),
    ],
)
def test_mjcf_errors_name_the_world_the_element_and_line(source: Any, text: str) -> None:
    with pytest.raises(ContractError, match=text) as caught:
        mjcf_world("lost-robot", source, Upright())
    assert "cannot load the model of lost-robot" in str(caught.value)


class Endless:
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return y_next[..., 0]


@pytest.mark.parametrize(
    ("source", "task", "options", "text"),
    [
        (
            CART,
            Endless(),
            {},
            r"reward\(y, u, y_next\) and terminated\(y_next\), but Endless lacks terminated",
        ),
        (CART, lambda model, layout: Endless(), {}, "Endless lacks terminated"),
        (CART, 3, {}, "int lacks reward and terminated"),
        (CART, Upright, {}, r"but the class Upright takes nothing. Give Upright\(\)"),
        (CART, Upright(), {"frame_skip": 0}, "cart needs frame_skip ≥ 1, but got 0"),
        ("<mujoco/>", Upright(), {}, "no actuators"),
        (CART, Upright(), {"actions": box(2, 1.0)}, "actions of size 1, but got a Box of size 2"),
    ],
)
def test_worlds_refuse_what_cannot_work(source: str, task: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ContractError, match=text):
        mjcf_world("cart", source, task, **options)


def test_unknown_worlds_suggest_near_names() -> None:
    with pytest.raises(UnknownName, match="Did you mean .*HalfCheetah-v5"):
        make_world("HalfCheeta-v5")
    with pytest.raises(UnknownName, match="Did you mean .*Ant-v5"):
        gym_world("Ant-v4")


def test_controls_without_bounds() -> None:
    free = CART.replace(' ctrlrange="-1 1"', "")
    with pytest.raises(ContractError, match="actuator push has no ctrlrange"):
        mjcf_world("cart", free, Upright())
    bounds = Box(torch.tensor([-2.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64))
    world = mjcf_world("cart", free, Upright(), actions=bounds)
    assert torch.equal(world.actions.low, bounds.low) and torch.equal(world.actions.high, bounds.high)
    endless = mjcf_world("cart", free, Upright(), actions=box(1, torch.inf))
    with pytest.raises(UnsupportedProblem, match="not all finite"):
        CEM().check(endless.problem(3))
    with pytest.raises(ContractError, match="check_task draws actions, so it needs finite bounds"):
        check_task(endless)


@pytest.mark.parametrize("explicit", [False, True])
def test_float32_actions_stay_inside_the_bounds(explicit: bool) -> None:
    bounds = Box(*torch.tensor([[-0.1], [0.1]], dtype=torch.float64))
    source = CART.replace("-1 1", "-5 5" if explicit else "-0.1 0.1")
    world = mjcf_world("cart", source, Upright(), actions=bounds if explicit else None)
    space: Any = world.make().action_space
    assert torch.equal(world.actions.high, torch.from_numpy(space.high).double())
    assert torch.equal(world.actions.low, torch.from_numpy(space.low).double())
    assert bounds.low < world.actions.low < -0.1 + 1e-8 and 0.1 - 1e-8 < world.actions.high < bounds.high
    # No float32 lies between these; and some bounds are beyond all.
    point = Box(*torch.tensor([[0.1], [0.1]], dtype=torch.float64))
    world = mjcf_world("cart", CART, Upright(), actions=point)
    assert torch.equal(world.actions.low, world.actions.high) and float(world.actions.low) < 0.1
    assert mjcf_world("cart", CART, Upright(), actions=box(1, 1e300)).actions.bounded


def test_planning_models_may_number_their_sites_differently() -> None:
    other = '<site name="base" pos="0 0 0.1"/>'
    tip = '<site name="tip" pos="0 0 0.5"/>'
    world = mjcf_world("cart", CART.replace(tip, tip + other), Upright(), ("qpos", "site_xpos/tip"))
    swapped = load_mjcf(CART.replace(tip, other + tip))
    _, info = world.make().reset(seed=0)
    x, u = torch.as_tensor(info["state"]), torch.ones(1, dtype=torch.float64)
    wanted = world.dynamics(threads=1).step(x, u)
    assert torch.equal(world.dynamics(threads=1, model=swapped).step(x, u), wanted)
    with pytest.raises(UnknownName, match="no site called 'tip'"):
        world.dynamics(model=load_mjcf(CART.replace('"tip"', '"top"')))
    sensor = '<framepos name="where" objtype="site" objname="tip"/>'
    sensing = mjcf_world("cart", CART, Upright(), ("qpos", "sensordata"))
    with pytest.raises(ContractError, match="'sensordata' has 3 numbers in one and 6 in the other"):
        sensing.dynamics(model=load_mjcf(CART.replace(sensor, sensor + sensor.replace("where", "too"))))


@pytest.mark.parametrize("name", ["cart", "HalfCheetah-v5"])
def test_another_plant_is_acted_in_and_planned_with(name: str) -> None:
    world = mjcf_world("cart", CART, Upright()) if name == "cart" else gym_world(name)
    heavy = scaled_model(world.model, {"body_mass": 2.0})
    u = world.actions.high.float()
    reached = []
    for other in (world.with_model(heavy), dataclasses.replace(world, model=heavy)):
        env = other.make()
        _, info = env.reset(seed=0)
        x = torch.as_tensor(info["state"])
        _, _, _, _, info = env.step(u.numpy())
        env.close()
        reached.append(torch.as_tensor(info["state"]))
        assert torch.equal(other.dynamics(threads=1).step(x, u), reached[-1])
        assert other.problem(3, threads=1).dynamics.model is heavy
    assert torch.equal(*reached)
    assert not torch.equal(world.dynamics(threads=1).step(x, u), reached[0])
    assert world.with_model(heavy, world.model).problem(3, threads=1).dynamics.model is world.model
    check_task(world.with_model(heavy), steps=5)


def test_another_plant_has_the_same_state_and_time_step() -> None:
    world = mjcf_world("cart", CART, Upright())
    with pytest.raises(ContractError, match="time step 0.01 s, but has 0.005 s"):
        world.with_model(load_mjcf(CART.replace('timestep="0.01"', 'timestep="0.005"')))
    with pytest.raises(ContractError, match="A plant for cart needs"):
        world.with_model(load_mjcf(CART.replace('<joint name="hinge" type="hinge" axis="0 1 0"/>', "")))


ARMS = """
<mujoco>
  <option gravity="0 0 0"/>
  <worldbody>
    <body name="A"><joint name="A" axis="0 1 0"/><geom size="0.1"/></body>
    <body name="B"><joint name="B" axis="0 1 0"/><geom size="0.1"/></body>
  </worldbody>
  <actuator><motor joint="A" ctrlrange="-1 1"/><motor joint="B" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ('body name="A"', "bodies in the plant's order, world, A, B, but has world, B, A"),
        ('joint name="A"', "joints in the plant's order, A, B, but has B, A"),
        ('motor joint="A"', "actuators in the plant's order, one on A, one on B, but has one on B, one on A"),
    ],
)
def test_other_models_number_their_joints_and_actuators_alike(part: str, text: str) -> None:
    world = mjcf_world("arms", ARMS, Upright())
    other = part.replace("A", "B")
    swapped = load_mjcf(ARMS.replace(part, "@").replace(other, part).replace("@", other))
    with pytest.raises(ContractError, match=f"A plant for arms needs the plant's {text}"):
        world.with_model(swapped)
    with pytest.raises(ContractError, match=f"A planning model for arms needs the plant's {text}"):
        world.dynamics(model=swapped)


def test_planning_models_may_differ_in_what_the_state_does_not_show() -> None:
    world = mjcf_world("cart", CART, Upright(), frame_skip=2)
    fine = load_mjcf(CART.replace('timestep="0.01"', 'timestep="0.005"'))
    assert world.dynamics(model=fine, threads=1).frame_skip == 4
    assert world.dynamics(model=scaled_model(world.model, {"body_mass": 2.0})).dt == pytest.approx(0.02)
    with pytest.raises(ContractError, match="divides the control step"):
        world.dynamics(model=load_mjcf(CART.replace('timestep="0.01"', 'timestep="0.015"')))
    with pytest.raises(ContractError, match="nq, nv"):
        world.dynamics(model=load_mjcf(CART.replace('<joint name="hinge" type="hinge" axis="0 1 0"/>', "")))


def test_worlds_of_mjcf_take_no_options_that_they_would_ignore() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'render_mode'"):
        mjcf_world("cart", CART, Upright()).make(render_mode="human")


def test_tasks_may_be_made_from_the_model_and_layout() -> None:
    class Tip(Upright):
        def __init__(self, model: mujoco.MjModel, layout: Layout):
            self.tip = layout["site_xpos/tip"]

    world = mjcf_world("cart", CART, Tip, ("qpos", "qvel", "site_xpos/tip"), max_steps=3)
    assert isinstance(world.task, Tip)
    env = world.make()
    env.reset(seed=0)
    flags = [env.step(np.zeros(1, dtype=np.float32))[3] for _ in range(3)]
    assert flags == [False, False, True]


def test_episodes_start_from_the_keyframe_or_as_told() -> None:
    keyed = CART.replace("<actuator>", '<keyframe><key qpos="0.5 0.1"/></keyframe><actuator>')
    env: Any = mjcf_world("cart", keyed, Upright()).make()
    obs, _ = env.reset(seed=0)
    assert obs[:2].tolist() == [0.5, 0.1]

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[:] = rng.uniform(-0.2, 0.2, 2)

    env = mjcf_world("cart", CART, Upright(), reset=start).make()
    first, again, other = (env.reset(seed=seed)[0] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
