"""Twins: worlds whose physics is a simulator and an expression at once, and what they have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbrl.envs.mjcf import Reset, mjcf_world
from mbrl.envs.systems import Discretized, System
from mbrl.envs.world import World
from mbrl.symbolic import Symbolic

_DT = 0.05  # s, the control step
_XML = """
<mujoco model="{name}">
  <option timestep="{timestep}" integrator="RK4" gravity="0 0 -{gravity}">
    <flag contact="disable"/>
  </option>
  <visual><headlight ambient="0.5 0.5 0.5"/></visual>
  <worldbody>{bodies}</worldbody>
  <actuator>{actuator}</actuator>
</mujoco>
"""


class Endless(ABC):
    """A task that never ends."""

    @abstractmethod
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        """(...) of y (..., ny), u (..., nu) and y_next (..., ny)."""

    def terminated(self, y_next: Tensor) -> Tensor:
        return torch.zeros(y_next.shape[:-1], dtype=torch.bool, device=y_next.device)


def twin_world(
    name: str,
    system: System,
    task: Endless,
    *,
    bodies: str,
    actuator: str,
    reset: Reset,
    camera: Mapping[str, Any],
    gravity: float = 0.0,
    substeps: int = 1,
) -> World:
    """A system in MuJoCo, with the system itself as `analytic`: 20 Hz, 200 steps; y = (qpos, qvel) is the system's x.

    Both hold the control for a step, and integrate it by the same classical Runge-Kutta method.

    Args:
        bodies, actuator: MJCF; what they weigh and where must be what the system says. Nothing collides.
        gravity: m/s², downwards.
        substeps: of the integration in one step of control.
    """
    xml = _XML.format(name=name, timestep=_DT / substeps, gravity=gravity, bodies=bodies, actuator=actuator)
    world = mjcf_world(name, xml, task, frame_skip=substeps, reset=reset, max_steps=200, camera=camera)
    analytic = Symbolic(Discretized(system, _DT, "rk4", substeps))
    return dataclasses.replace(world, analytic=analytic)
