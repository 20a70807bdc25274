"""The worlds of PETS, so that returns can be compared with published ones.

The numbers are those of the paper's software, github.com/kchua/handful-of-trials, which ran on MuJoCo 1.31.
The same: geometry, masses, inertias, dampings, ranges, gears, time steps, integrators, starts, goals, rewards
and episode lengths. Different: MuJoCo 4 computes the forces of contacts and joint limits in another way, and
actions are float32. Published returns are sums of these rewards, action costs included.

MuJoCo took mass and inertia of a capsule to be those of a cylinder one radius longer until version 2.1.2,
whose change log says so; `old_capsules` does that here.

Reference: Chua, Calandra, McAllister & Levine 2018; handful-of-trials, dmbrl/env and dmbrl/config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.mjcf import load_mjcf, mjcf_world
from mbrl.envs.world import World, gym_world
from mbrl.features import Features, indices

_ASSETS = Path(__file__).parent / "assets"
_POLE = 0.6  # m
_SHOULDER = (0.0, -0.188, 0.0)  # m, of Reacher3D
_LINKS = (0.1, 0.4, 0.321, 0.16828)  # m: to the lift joint, the elbow, the wrist, between the fingertips


@dataclass(frozen=True)
class CartPole:
    """Swing the pole up and hold it over the middle of the rail; never ends.

    reward = exp(−d²/l²) − 0.01 u²,   d = |tip − (0, l)|,   l = 0.6 m

    y = (x, θ, ẋ, θ̇); the pole hangs at θ = 0.
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        x, angle = y_next[..., 0], y_next[..., 1]
        gap = (x - _POLE * angle.sin()) ** 2 + (_POLE * angle.cos() + _POLE) ** 2
        return torch.exp(-gap / _POLE**2) - 0.01 * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    @property
    def features(self) -> Features:
        return Features(4, angles=(1,))


@dataclass(frozen=True)
class Reacher3D:
    """Bring the tip of a seven-joint arm to a goal in space; never ends.

    reward = −|tip − goal|² − 0.01 |u|²

    y = (joint angles, joint velocities, goal). The paper's net also sees and predicts the goal.
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -_square(arm_tip(y_next[..., :7]) - y_next[..., 14:]) - 0.01 * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    @property
    def features(self) -> Features:
        goal = (14, 15, 16)
        return Features(17, hidden=goal, constant=goal)


@dataclass(frozen=True)
class Pusher:
    """Push a cylinder to the goal with a seven-joint arm; never ends.

    reward = −1.25 |object − goal|₁ − 0.5 |object − tip|₁ − 0.1 |u|²

    The positions are those before the step, as in the paper's environment. A plan of H steps thus sees what
    H − 1 of its actions do; the paper's planner, which scores predictions itself, sees all H.

    The paper's net does not see the object's velocity, which it needs: it decays in 80 ms, two steps.
    """

    layout: Layout

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        tip, cylinder, goal = (
            y[..., self.layout[name]] for name in ("site_xpos/tip", "xpos/object", "xpos/goal")
        )
        near, far = (cylinder - tip).abs().sum(-1), (cylinder - goal).abs().sum(-1)
        return -1.25 * far - 0.5 * near - 0.1 * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    @property
    def features(self) -> Features:
        goal = indices(self.layout["xpos/goal"])
        joints = (7, 8)  # of the object, whose position is also there as a point
        return Features(self.layout.size, hidden=joints + goal, constant=goal)


def arm_tip(q: Tensor) -> Tensor:
    """Where Reacher3D's tip is (..., 3), m, at the joint angles q (..., 7), rad.

    From the tip back to the shoulder. MuJoCo's own position would lag the angles by a physics step.
    """
    offset, upper, fore, hand = _LINKS
    zero = torch.zeros_like(q[..., 0])
    x, y, z = zero + hand, zero, zero
    z, x = _turn(z, x, q[..., 5])
    y, z = _turn(y, z, q[..., 4])
    z, x = _turn(z, x + fore, q[..., 3])
    y, z = _turn(y, z, q[..., 2])
    z, x = _turn(z, x + upper, q[..., 1])
    x, y = _turn(x + offset, y, q[..., 0])
    return torch.stack([x, y, z], -1) + q.new_tensor(_SHOULDER)


def _turn(a: Tensor, b: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) turned from a towards b by `angle`, rad."""
    sin, cos = angle.sin(), angle.cos()
    return cos * a - sin * b, sin * a + cos * b


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1)


def _never(y: Tensor) -> Tensor:
    return torch.zeros(y.shape[:-1], dtype=torch.bool, device=y.device)


def old_capsules(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """The compiled model, with the masses and inertias that MuJoCo 1.31 gave capsules of their density.

    Each capsule hands its mass to a hidden cylinder, one radius longer than its own cylindrical part.
    """
    model = load_mjcf(spec)
    for geom, i in [(geom, geom.id) for geom in spec.geoms]:  # a new geom renumbers the others
        if model.geom_type[i] != mujoco.mjtGeom.mjGEOM_CAPSULE:
            continue
        radius, half, _ = model.geom_size[i]
        geom.parent.add_geom(
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            size=[radius, half + radius / 2, 0.0],
            pos=model.geom_pos[i],
            quat=model.geom_quat[i],
            density=geom.density,
            contype=0,
            conaffinity=0,
            group=3,
        )
        geom.mass = 0.0
    return load_mjcf(spec)


def _asset(name: str) -> mujoco.MjModel:
    return old_capsules(mujoco.MjSpec.from_file(str(_ASSETS / name)))


def pets_cartpole() -> World:
    """PETS's cart-pole: 25 Hz, 200 steps. The pole starts near hanging, N(0, 0.1²) in y."""

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[:] = rng.normal(0.0, 0.1, 2)
        data.qvel[:] = rng.normal(0.0, 0.1, 2)

    return mjcf_world(
        "pets-cartpole",
        _asset("pets_cartpole.xml"),
        CartPole(),
        frame_skip=2,
        reset=start,
        max_steps=200,
        camera={"distance": 4.0, "azimuth": 90.0, "elevation": -10.0, "lookat": [0.0, 0.0, 0.0]},
    )


def pets_reacher3d() -> World:
    """PETS's Reacher3D: 50 Hz, 150 steps. The goal is drawn from N((0, 0.25, 0), 0.1²), m."""

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.mocap_pos[0] = rng.normal((0.0, 0.25, 0.0), 0.1)

    return mjcf_world(
        "pets-reacher3d",
        _asset("pets_reacher3d.xml"),
        Reacher3D(),
        ("qpos", "qvel", "mocap_pos/goal"),
        frame_skip=2,
        reset=start,
        max_steps=150,
        camera={"distance": 2.5, "azimuth": 270.0, "elevation": -30.0, "lookat": [0.2, 0.0, 0.0]},
    )


def pets_pusher() -> World:
    """PETS's pusher: 25 Hz, 150 steps. The object starts at N((0.15, −0.25), 0.025²) m from the goal.

    The joint speeds of the arm start in ±0.005 rad/s.
    """

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[7:] = rng.normal((-0.25, 0.15), 0.025)
        data.qvel[:7] = rng.uniform(-0.005, 0.005, 7)

    return mjcf_world(
        "pets-pusher",
        _asset("pets_pusher.xml"),
        lambda _, layout: Pusher(layout),
        ("qpos", "qvel", "site_xpos/tip", "xpos/object", "xpos/goal"),
        frame_skip=4,
        reset=start,
        max_steps=150,
        camera={"distance": 3.0, "azimuth": 150.0, "elevation": -35.0, "lookat": [0.3, -0.1, -0.2]},
    )


def pets_halfcheetah() -> World:
    """PETS's half-cheetah: 20 Hz, 1,000 steps, at rest up to 0.001.

    Model, reward and frame skip are those of Gymnasium's HalfCheetah-v5. The paper's observation begins with
    the mean speed over the last step, which its net predicts but does not see; here that is the change of
    y's first number. Start positions are uniform in ±0.001; the paper's are N(0, 0.001²).
    """
    world = gym_world("HalfCheetah-v5", reset_noise_scale=0.001)
    path = files("gymnasium.envs.mujoco") / "assets/half_cheetah.xml"
    spec = mujoco.MjSpec.from_file(str(path))
    total, spec.compiler.settotalmass = spec.compiler.settotalmass, -1.0  # MuJoCo 4 would warn of it
    model = old_capsules(spec)
    mujoco.mj_setTotalmass(model, total)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return dataclasses.replace(world.with_model(model), name="pets-halfcheetah")
