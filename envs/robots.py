"""Robots as worlds: our own small quadruped, and Unitree's Go2."""

from __future__ import annotations

import copy
import dataclasses
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.legged import StandUp, Walk
from mbrl.envs.mjcf import load_mjcf, mjcf_world
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
    return round(CONTROL_STEP / model.opt.timestep)


def pup_walk(*, speed: float = 0.4, **weights: Any) -> World:
    """Our own small quadruped walks at `speed` m/s; weights are fields of `Walk`."""
    model = load_mjcf(Path(__file__).parent / "assets" / "pup.xml")

    def task(model: mujoco.MjModel, layout: Layout) -> Walk:
        return Walk(
            layout,
            _joints(model),
            tuple(f"geom_xpos/{foot}" for foot in FEET),
            ground=float(model.geom("FL").size[0]),
            height=float(model.key("home").qpos[2]),
            speed=speed,
            **({"period": 0.4, "lift": 0.035, "height_scale": 0.02} | weights),
        )

    world = mjcf_world(
        "pup-walk",
        model,
        task,
        ("qpos", "qvel", "time", *(f"geom_xpos/{foot}" for foot in FEET)),
        frame_skip=_steps(model),
        reset=_jitter,
        max_steps=500,
        camera={"trackbodyid": model.body("torso").id, "distance": 1.2, "elevation": -15.0, "azimuth": 130.0},
    )
    coarse = copy.copy(model)
    coarse.opt.timestep = 0.01
    return dataclasses.replace(world, planning_model=coarse)
