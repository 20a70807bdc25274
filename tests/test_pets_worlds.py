"""The worlds of PETS agree with the paper's software, and what learned models see of a world is declared."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import ContractError, Features, TrainingWorld, check_task
from mbrl.envs import Pendulum, World, gym_world, make_world
from mbrl.envs.gym_tasks import TASKS
from mbrl.envs.pets import arm_tip

PETS = ("pets-cartpole", "pets-reacher3d", "pets-pusher", "pets-halfcheetah")
EVERY = (*PETS, *TASKS, "Pendulum-v1")


def build(name: str) -> TrainingWorld:
    return Pendulum() if name == "Pendulum-v1" else make_world(name)


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {name: make_world(name) for name in PETS}


def walk(world: TrainingWorld, steps: int) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """y (steps, ny), u (steps, nu), y_next (steps, ny) and the environment's rewards of random actions."""
    env = world.make()
    env.action_space.seed(0)
    y = world.measure(*env.reset(seed=0))
    rows, rewards = [], []
    for _ in range(steps):
        action = env.action_space.sample()
        obs, reward, terminated, truncated, info = env.step(action)
        y_next = world.measure(obs, info)
        rows.append((y[0], torch.as_tensor(action, dtype=torch.float64), y_next[0]))
        rewards.append(float(reward))
        y = world.measure(*env.reset()) if terminated or truncated else y_next
    env.close()
    before, u, after = (torch.stack(column) for column in zip(*rows, strict=True))
    return before, u, after, rewards


# Shapes of the paper's assets (handful-of-trials, dmbrl/env/assets/*.xml), body by body: a capsule's radius and
# ends, or a sphere's radius and centre, in the frame of the body that the joints before it move.
Shape = tuple[float, tuple[float, ...], tuple[float, ...] | None]
SHOULDER: list[Shape] = [
    (0.05, (-0.06, 0.05, 0.2), None),
    (0.05, (0.06, 0.05, 0.2), None),
    (0.03, (-0.06, 0.09, 0.2), None),
    (0.03, (0.06, 0.09, 0.2), None),
    (0.1, (0, 0, -0.4), (0, 0, 0.2)),
]
UPPER: list[list[Shape]] = [
    [(0.1, (0, -0.1, 0), (0, 0.1, 0))],
    [(0.02, (-0.1, 0, 0), (0.1, 0, 0)), (0.06, (0, 0, 0), (0.4, 0, 0))],
    [(0.06, (0, -0.02, 0), (0, 0.02, 0))],
]
WRIST: list[Shape] = [(0.01, (0, -0.02, 0), (0, 0.02, 0))]
CARTPOLE: list[list[Shape]] = [
    [(0.1, (0, 0, -0.1), (0, 0, 0.1))],
    [(0.049, (0, 0, 0), (0.001, 0, -0.6))],
]
REACHER3D: list[list[Shape]] = [
    SHOULDER,
    *UPPER,
    [(0.02, (-0.1, 0, 0), (0.1, 0, 0)), (0.05, (0, 0, 0), (0.321, 0, 0))],
    WRIST,
    [
        (0.01, (-0.02, 0, 0), (0.02, 0, 0)),
        (0.05, (0.05, 0, -0.02), (0.05, 0, 0.02)),
        (0.01, (0.07691, 0.03, 0), (0.07691 + 0.09137, 0.03 + 0.00495, 0)),
        (0.01, (0.07691, -0.03, 0), (0.07691 + 0.09137, -0.03 - 0.00495, 0)),
        (0.01, (0.07691 + 0.09137, 0.03 + 0.00495, 0), (0.07691 + 2 * 0.09137, 0.03 + 0.00495, 0)),
        (0.01, (0.07691 + 0.09137, -0.03 - 0.00495, 0), (0.07691 + 2 * 0.09137, -0.03 - 0.00495, 0)),
    ],
]
PUSHER: list[list[Shape]] = [
    SHOULDER,
    *UPPER,
    [(0.02, (-0.1, 0, 0), (0.1, 0, 0)), (0.05, (0, 0, 0), (0.291, 0, 0))],
    WRIST,
    [
        (0.01, (0.1, -0.1, 0), None),
        (0.01, (0.1, 0.1, 0), None),
        (0.02, (0, -0.1, 0), (0, 0.1, 0)),
        (0.02, (0, -0.1, 0), (0.1, -0.1, 0)),
        (0.02, (0, 0.1, 0), (0.1, 0.1, 0)),
    ],
]


def mass_and_inertia(shapes: list[Shape], density: float) -> tuple[float, np.ndarray]:
    """Mass and principal inertias of a body, its capsules as cylinders one radius longer (MuJoCo 1.31)."""
    masses, centers, tensors = [], [], []
    for radius, start, end in shapes:
        a = np.array(start, dtype=float)
        if end is None:
            mass = density * 4 / 3 * math.pi * radius**3
            tensor = 0.4 * mass * radius**2 * np.eye(3)
        else:
            along = np.array(end) - a
            length = float(np.linalg.norm(along))
            axis, h = along / length, length + radius
            mass = density * math.pi * radius**2 * h
            across = mass * (3 * radius**2 + h**2) / 12
            tensor = across * np.eye(3) + (mass * radius**2 / 2 - across) * np.outer(axis, axis)
            a = a + along / 2
        masses.append(mass)
        centers.append(a)
        tensors.append(tensor)
    middle = np.average(centers, axis=0, weights=masses)
    total = sum(
        tensor + mass * ((c - middle) @ (c - middle) * np.eye(3) - np.outer(c - middle, c - middle))
        for tensor, mass, c in zip(tensors, masses, centers, strict=True)
    )
    return sum(masses), np.linalg.eigvalsh(total)


@pytest.mark.parametrize(
    ("name", "bodies", "density"),
    [("pets-cartpole", CARTPOLE, 1000), ("pets-reacher3d", REACHER3D, 1000), ("pets-pusher", PUSHER, 300)],
)
def test_masses_and_inertias_are_those_of_the_papers_assets(
    worlds: dict[str, World], name: str, bodies: list[list[Shape]], density: float
) -> None:
    model = worlds[name].model
    for i, shapes in enumerate(bodies, start=1):
        mass, inertia = mass_and_inertia(shapes, density)
        assert model.body_mass[i] == pytest.approx(mass, rel=1e-9)
        np.testing.assert_allclose(np.sort(model.body_inertia[i]), inertia, rtol=1e-7)


def test_the_object_is_as_heavy_to_push_as_the_papers(worlds: dict[str, World]) -> None:
    """A sphere and a cylinder of next to no mass on slides of armature 0.04."""
    mass = 1e-5 * (4 / 3 * math.pi * 0.05**3 + math.pi * 0.05**2 * 0.1)
    model = worlds["pets-pusher"].model
    np.testing.assert_allclose(model.dof_M0[7:], mass + 0.04, rtol=1e-6)
    np.testing.assert_allclose(model.dof_invweight0[7:], 25)


def joint_numbers(model: mujoco.MjModel) -> tuple[list[float], list[float], list[tuple[float, ...] | None]]:
    """Dampings (nv,), armatures (nv,) and ranges (nv,), None where free."""
    dampings = np.asarray(model.dof_damping).reshape(model.nv, -1)[:, 0].tolist()
    ranges = [tuple(row) if on else None for row, on in zip(model.jnt_range, model.jnt_limited, strict=True)]
    return dampings, model.dof_armature.tolist(), ranges


def test_joints_are_those_of_the_papers_assets(worlds: dict[str, World]) -> None:
    assert joint_numbers(worlds["pets-cartpole"].model) == ([1, 1], [0, 0], [(-2.5, 2.5), None])
    assert joint_numbers(worlds["pets-reacher3d"].model) == (
        [10, 10, 0.1, 1, 0.1, 0.1, 0.1],
        [0.04] * 7,
        [(-2.2854, 1.714602), (-0.5236, 1.3963), (-3.9, 0.8), (-2.3213, 0), None, (-2.094, 0), None],
    )
    turns: list[tuple[float, ...] | None] = [
        (-2.2854, 2.0), (-0.5236, 1.3963), (-1.5, 1.7), (-2.3213, 0), (-1.5, 1.5), (-1.094, 0), (-1.5, 1.5)
    ]  # fmt: skip
    slides: list[tuple[float, ...] | None] = [(-10.3213, 10.3)] * 2
    assert joint_numbers(worlds["pets-pusher"].model) == (
        [1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.5],
        [0.04] * 7 + [0, 0],  # the object's is its mass
        turns + slides,
    )


@pytest.mark.parametrize(
    ("name", "timestep", "frame_skip", "rk4", "gravity", "gears", "bound"),
    [
        ("pets-cartpole", 0.02, 2, True, -9.81, [100], 3),
        ("pets-reacher3d", 0.01, 2, True, 0, [1] * 7, 20),
        ("pets-pusher", 0.01, 4, False, 0, [1] * 7, 2),
        ("pets-halfcheetah", 0.01, 5, False, -9.81, [120, 90, 60, 120, 60, 30], 1),
    ],
)
def test_time_steps_and_actuators_are_those_of_the_paper(
    worlds: dict[str, World],
    name: str,
    timestep: float,
    frame_skip: int,
    rk4: bool,
    gravity: float,
    gears: list[float],
    bound: float,
) -> None:
    world = worlds[name]
    model = world.model
    assert model.opt.timestep == timestep and world.frame_skip == frame_skip
    kind = mujoco.mjtIntegrator.mjINT_RK4 if rk4 else mujoco.mjtIntegrator.mjINT_EULER
    assert model.opt.integrator == kind and model.opt.gravity.tolist() == [0, 0, gravity]
    assert model.actuator_gear[:, 0].tolist() == gears
    assert world.actions.low.tolist() == [-bound] * model.nu == (-world.actions.high).tolist()


def test_the_cheetah_weighs_14_kg_and_differs_from_gymnasium_in_its_capsules_only(
    worlds: dict[str, World],
) -> None:
    ours, theirs = worlds["pets-halfcheetah"].model, gym_world("HalfCheetah-v5").model
    assert ours.body_mass.sum() == pytest.approx(14) and theirs.body_mass.sum() == pytest.approx(14)
    assert 0.02 < np.abs(ours.body_mass[1:] / theirs.body_mass[1:] - 1).max() < 0.05
    radius, half = 0.046, 0.094  # of the back foot
    foot = math.pi * radius**2 * (2 * half + radius) * 1000
    thigh = math.pi * radius**2 * (2 * 0.145 + radius) * 1000
    assert ours.body("bfoot").mass / ours.body("bthigh").mass == pytest.approx(foot / thigh)
    for field in ("body_pos", "jnt_range", "jnt_stiffness", "dof_damping", "dof_armature", "actuator_gear"):
        np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("name", PETS)
def test_tasks_agree_with_their_environments(worlds: dict[str, World], name: str) -> None:
    assert check_task(worlds[name], steps=60) == []


def test_cartpole_rewards_are_the_papers(worlds: dict[str, World]) -> None:
    _, u, y_next, rewards = walk(worlds["pets-cartpole"], 50)
    x, angle = y_next.numpy()[:, :2].T
    tip = np.stack([x - 0.6 * np.sin(angle), -0.6 * np.cos(angle)], -1)
    gap = np.sum((tip - [0.0, 0.6]) ** 2, -1)
    np.testing.assert_allclose(rewards, np.exp(-gap / 0.6**2) - 0.01 * np.sum(u.numpy() ** 2, -1), atol=1e-12)


def test_reacher3d_rewards_are_the_papers(worlds: dict[str, World]) -> None:
    world = worlds["pets-reacher3d"]
    _, u, y_next, rewards = walk(world, 50)
    data = mujoco.MjData(world.model)
    for row, action, reward in zip(y_next.numpy(), u.numpy(), rewards, strict=True):
        data.qpos[:] = row[:7]
        mujoco.mj_forward(world.model, data)
        gap = data.site("tip").xpos - row[14:]
        assert reward == pytest.approx(-np.sum(gap**2) - 0.01 * np.sum(action**2), abs=1e-12)
        np.testing.assert_allclose(arm_tip(torch.as_tensor(row[:7])), data.site("tip").xpos, atol=1e-12)


def test_pusher_rewards_are_the_papers_of_the_positions_before_the_step(worlds: dict[str, World]) -> None:
    world = worlds["pets-pusher"]
    env = world.make()
    env.reset(seed=0)
    env.action_space.seed(0)
    bare: Any = env.unwrapped
    hand = [i for i in range(world.model.ngeom) if world.model.geom_bodyid[i] == world.model.body("hand").id]
    for _ in range(50):
        data = bare.data
        # The paper's tip is the centre of mass of the two spheres.
        tip = data.geom_xpos[hand[:2]].mean(0)
        body, goal = data.subtree_com[world.model.body("object").id], data.body("goal").xpos
        expected = -1.25 * np.abs(body - goal).sum() - 0.5 * np.abs(body - tip).sum()
        action = env.action_space.sample()
        _, reward, *_ = env.step(action)
        assert reward == pytest.approx(expected - 0.1 * np.sum(action.astype(float) ** 2), abs=1e-12)


def test_halfcheetah_rewards_are_the_papers(worlds: dict[str, World]) -> None:
    y, u, y_next, rewards = (torch.as_tensor(part).numpy() for part in walk(worlds["pets-halfcheetah"], 50))
    speed = (y_next[:, 0] - y[:, 0]) / 0.05
    np.testing.assert_allclose(rewards, speed - 0.1 * np.sum(u**2, -1), atol=1e-6)


@pytest.mark.parametrize(("name", "steps"), [*zip(PETS, (200, 150, 150, 1000), strict=True)])
def test_episodes_have_the_papers_length(worlds: dict[str, World], name: str, steps: int) -> None:
    env = worlds[name].make()
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape or (), dtype=np.float32)
    ends = [env.step(action)[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


def starts(world: World, n: int) -> np.ndarray:
    env = world.make()
    return np.stack([world.measure(*env.reset(seed=seed))[0].numpy() for seed in range(n)])


def test_starts_are_drawn_as_in_the_paper(worlds: dict[str, World]) -> None:
    n = 400

    def normal(sample: np.ndarray, mean: list[float], std: float) -> None:
        np.testing.assert_allclose(sample.mean(0), mean, atol=5 * std / math.sqrt(n))
        np.testing.assert_allclose(sample.std(0), std, rtol=0.2)

    normal(starts(worlds["pets-cartpole"], n), [0, 0, 0, 0], 0.1)
    reacher = starts(worlds["pets-reacher3d"], n)
    normal(reacher[:, 14:], [0, 0.25, 0], 0.1)
    assert not reacher[:, :14].any()
    pusher = starts(worlds["pets-pusher"], n)
    normal(pusher[:, 7:9], [-0.25, 0.15], 0.025)  # along y, along x
    assert not pusher[:, :7].any() and np.abs(pusher[:, 9:16]).max() < 0.005
    layout = worlds["pets-pusher"].layout
    gap = pusher[:, layout["xpos/object"]] - pusher[:, layout["xpos/goal"]]
    np.testing.assert_allclose(gap[:, :2], pusher[:, [8, 7]], atol=1e-12)
    assert np.abs(starts(worlds["pets-halfcheetah"], 20)).max() < 0.006


def test_goals_repeat_with_the_seed_and_hold_within_an_episode(worlds: dict[str, World]) -> None:
    world = worlds["pets-reacher3d"]
    first, again, other = (world.measure(*world.make().reset(seed=s))[0, 14:] for s in (0, 0, 1))
    assert torch.equal(first, again) and (first != other).all()
    y, _, y_next, _ = walk(world, 5)
    assert (y_next[:, 14:] == y[0, 14:]).all()


def test_the_fork_pushes_the_object(worlds: dict[str, World]) -> None:
    model = worlds["pets-pusher"].model
    data = mujoco.MjData(model)
    data.qpos[1] = 0.3  # the fork comes down to the object
    mujoco.mj_forward(model, data)
    gap = data.site("tip").xpos - data.body("object").xpos
    data.qpos[7:] = start = [gap[1] + 0.15, gap[0]]  # beside the fork
    data.ctrl[0] = 2.0
    mujoco.mj_step(model, data, nstep=60)
    assert data.qpos[7] > start[0] + 0.05 and np.abs(data.qvel[7:]).max() < 2


@pytest.mark.parametrize("name", EVERY)
def test_features_give_back_what_happened(name: str) -> None:
    world = build(name)
    features = world.features
    y, _, y_next, _ = walk(world, 12)
    answer = features.targets(y, y_next)
    assert answer.shape == (12, len(features.predicted))
    # Pendulum-v1 shows float32 numbers, so cos² + sin² is not quite 1.
    atol = 1e-6 if name == "Pendulum-v1" else 1e-12
    torch.testing.assert_close(features.advance(y, answer), y_next, rtol=0, atol=atol)
    torch.testing.assert_close(torch.func.vmap(features.advance)(y, answer), features.advance(y, answer))
    torch.testing.assert_close(torch.func.vmap(features.inputs)(y), features.inputs(y))
    assert torch.isfinite(features.inputs(y)).all()


@pytest.mark.parametrize("name", EVERY)
def test_features_hide_what_they_say_and_see_the_rest(name: str) -> None:
    world = build(name)
    features = world.features
    y = walk(world, 1)[0][0]
    slopes = torch.func.jacrev(features.inputs)(y)
    blind = tuple(torch.nonzero((slopes == 0).all(0))[:, 0].tolist())
    assert blind == tuple(sorted(features.hidden))
    turned = y.clone()
    turned[list(features.angles)] += 2 * math.pi
    torch.testing.assert_close(features.inputs(turned), features.inputs(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "inputs", "predicted"),
    [
        ("pets-cartpole", 5, 4),  # the paper's 6 and 4, with the action
        ("pets-reacher3d", 14, 14),  # 17 and 17 there, with the goal
        ("pets-pusher", 22, 24),  # 20 and 20 there, without the object's velocity
        ("pets-halfcheetah", 18, 18),  # as there
        ("HalfCheetah-v5", 18, 18),
        ("Hopper-v5", 12, 12),
        ("Walker2d-v5", 18, 18),
        ("Swimmer-v5", 9, 10),
        ("Ant-v5", 27, 29 + 13 * 6 + 6 + 3),
        ("Humanoid-v5", 45, 47 + 14 * 10 + 14 * 6 + 23 + 14 * 6 + 3),
        ("HumanoidStandup-v5", 45, 47 + 14 * 10 + 14 * 6 + 23 + 14 * 6),
        ("InvertedPendulum-v5", 5, 4),
        ("InvertedDoublePendulum-v5", 8, 12),
        ("Reacher-v5", 6, 7),
        ("Pusher-v5", 22, 24),
        ("Pendulum-v1", 3, 3),
    ],
)
def test_models_see_and_predict_what_physics_depends_on(name: str, inputs: int, predicted: int) -> None:
    world = build(name)
    y = walk(world, 1)[0]
    assert world.features.inputs(y).shape == (1, inputs)
    assert len(world.features.predicted) == predicted


@pytest.mark.parametrize("name", ["pets-halfcheetah", "HalfCheetah-v5", "Hopper-v5", "Swimmer-v5", "Ant-v5"])
def test_the_place_on_the_floor_is_not_seen(name: str) -> None:
    world = make_world(name)
    y = walk(world, 1)[0]
    moved = y.clone()
    moved[:, 0] += 7.0
    assert torch.equal(world.features.inputs(moved), world.features.inputs(y))


def test_features_name_each_number_once() -> None:
    y = torch.tensor([1.0, 2.0, 0.0, 1.0, 5.0, 9.0])
    features = Features(6, hidden=(0,), angles=(1,), constant=(5,), absolute=(4,), unit=((2, 3),))
    assert features.predicted == (0, 1, 2, 3, 4)
    torch.testing.assert_close(
        features.inputs(y), torch.tensor([0.0, 1.0, 5.0, 9.0, math.sin(2.0), math.cos(2.0)])
    )
    torch.testing.assert_close(
        features.advance(y, torch.tensor([1.0, 1.0, 3.0, 3.0, 8.0])),
        torch.tensor([2.0, 3.0, 0.6, 0.8, 8.0, 9.0]),
    )
    plain = Features(6)
    assert torch.equal(plain.inputs(y), y) and torch.equal(plain.advance(y, y), 2 * y)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": (3,)},
        {"hidden": (-1,)},
        {"hidden": (1,), "angles": (1,)},
        {"constant": (0, 0)},
        {"absolute": (1,), "unit": ((0, 1),)},
        {"unit": ((0, 2),)},
        {"unit": ((),)},
        {"hidden": (0, 1, 2)},
        {"constant": (0, 1, 2)},
    ],
)
def test_features_refuse_what_has_no_meaning(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="Features needs"):
        Features(3, **wrong)


def test_a_world_without_a_declaration_shows_and_predicts_everything() -> None:
    world = make_world("pup-walk")
    assert world.features == Features(world.layout.size)


@pytest.mark.parametrize("name", ["pets-reacher3d", "Pendulum-v1"])
def test_a_vector_of_environments_is_measured_at_once(name: str) -> None:
    world = build(name)
    vector = gymnasium.vector.SyncVectorEnv([world.make] * 3)
    single = world.make()
    y = world.measure(*vector.reset(seed=5))
    assert torch.equal(y[1:2], world.measure(*single.reset(seed=6)))
    action = np.full((3, world.actions.nu), 0.5, dtype=np.float32)
    obs, _, _, _, info = vector.step(action)
    y = world.measure(obs, info)
    assert y.dtype == torch.float64 and len(y) == 3
    obs, _, _, _, info = single.step(action[0])
    assert torch.equal(y[1:2], world.measure(obs, info))
    vector.close()


def test_pendulum_rewards_are_gymnasiums() -> None:
    world = Pendulum()
    y, u, y_next, rewards = walk(world, 1000)
    torch.testing.assert_close(
        world.task.reward(y, u, y_next), torch.tensor(rewards, dtype=torch.float64), rtol=1e-6, atol=2e-6
    )
    assert world.task.terminated(y_next).dtype == torch.bool and not world.task.terminated(y_next).any()
    bounds = world.make().action_space
    assert isinstance(bounds, gymnasium.spaces.Box)
    assert world.actions.low.tolist() == bounds.low.tolist()
    assert world.actions.high.tolist() == bounds.high.tolist()
    assert torch.equal(world.observe(y), y)
