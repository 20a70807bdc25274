"""Swing up a pole on a cart, on a short track: a simulator, and the same physics as an expression."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import mujoco
import numpy as np
from torch import Tensor

from mbrl.envs import systems
from mbrl.envs.limits import Within
from mbrl.envs.twins import Endless, twin_world
from mbrl.envs.world import World
from mbrl.features import Features
from mbrl.problem import Constraint

_BODIES = """
<geom name="rail" type="capsule" size="0.015" fromto="-{limit} 0 0 {limit} 0 0" rgba="0.3 0.3 0.7 1"/>
<geom name="left end" type="box" size="0.01 0.06 0.06" pos="-{limit} 0 0" rgba="0.8 0.2 0.2 1"/>
<geom name="right end" type="box" size="0.01 0.06 0.06" pos="{limit} 0 0" rgba="0.8 0.2 0.2 1"/>
<body name="cart">
  <inertial pos="0 0 0" mass="{system.cart}" diaginertia="1 1 1"/>
  <joint name="slider" type="slide" axis="1 0 0"/>
  <geom name="cart" type="box" size="0.08 0.05 0.04" rgba="0.7 0.7 0.8 1"/>
  <body name="pole">
    <inertial pos="0 0 -{system.length}" mass="{system.pole}" diaginertia="1e-12 1e-12 1e-12"/>
    <joint name="hinge" axis="0 -1 0"/>
    <geom name="rod" type="capsule" size="0.012" fromto="0 0 0 0 0 -{system.length}" rgba="0.1 0.6 0.6 1"/>
    <geom name="bob" size="0.04" pos="0 0 -{system.length}" rgba="0.1 0.6 0.6 1"/>
  </body>
</body>
"""  # a point has no inertia of its own, but MuJoCo wants some


@dataclass(frozen=True)
class SwingUp(Endless):
    """Swing the pole up and hold it over the middle of the track; never ends.

    reward = −(x² + 10 (1 + cos θ) + 0.01 u²), of the state before the step.

    y = (x, θ, ẋ, θ̇); the pole hangs at θ = 0.
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -(y[..., 0] ** 2 + 10 * (1 + y[..., 1].cos()) + 0.01 * u[..., 0] ** 2)

    @property
    def features(self) -> Features:
        return Features(4, angles=(1,))


def cart_pole(*, limit: float = 1.0) -> World:
    """Kelly's cart-pole: 20 Hz, 200 steps, up to 20 N. The pole starts at rest, within 0.1 rad of hanging.

    Args:
        limit: of the track, m to either side of its middle. The simulator lets the cart drive over it: a plan keeps to
            it, or does not.

    Reference: Kelly 2017, "An introduction to trajectory optimization", appendix E.
    """

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[1] = rng.uniform(-0.1, 0.1)

    system = systems.CartPole()
    world = twin_world(
        "cart-pole",
        system,
        SwingUp(),
        bodies=_BODIES.format(limit=limit, system=system),
        actuator='<motor name="force" joint="slider" ctrlrange="-20 20"/>',
        reset=start,
        camera={"distance": 3.2, "azimuth": 90.0, "elevation": -10.0, "lookat": [0.0, 0.0, 0.0]},
        gravity=system.gravity,
        substeps=2,
    )
    track = Constraint(Within(0, -limit, limit, "cart's position (m)"), name="track")
    return dataclasses.replace(world, constraints=(track,))
