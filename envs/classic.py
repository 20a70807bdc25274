"""A pendulum, an acrobot and a double integrator: a simulator each, and the same physics as an expression."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from torch import Tensor

from mbrl.envs import systems
from mbrl.envs.twins import Endless, twin_world
from mbrl.envs.world import World
from mbrl.features import Features

_PENDULUM = """
<body name="pole">
  <inertial pos="0 0 -{system.length}" mass="{system.mass}" diaginertia="1e-12 1e-12 1e-12"/>
  <joint name="hinge" axis="0 -1 0" damping="{system.damping}"/>
  <geom name="rod" type="capsule" size="0.02" fromto="0 0 0 0 0 -{system.length}" rgba="0.1 0.6 0.6 1"/>
  <geom name="bob" size="0.07" pos="0 0 -{system.length}" rgba="0.1 0.6 0.6 1"/>
</body>
<geom name="pivot" size="0.04" rgba="0.3 0.3 0.7 1"/>
"""  # a point has no inertia of its own, but MuJoCo wants some
_ACROBOT = """
<body name="upper">
  <inertial pos="0 0 -{centre}" mass="{system.mass}" diaginertia="{system.inertia} {system.inertia} {system.inertia}"/>
  <joint name="shoulder" axis="0 -1 0"/>
  <geom name="upper" type="capsule" size="0.05" fromto="0 0 0 0 0 -{system.length}" rgba="0.1 0.6 0.6 1"/>
  <body name="lower" pos="0 0 -{system.length}">
    <inertial pos="0 0 -{centre}" mass="{system.mass}" diaginertia="{system.inertia} {system.inertia} {system.inertia}"/>
    <joint name="elbow" axis="0 -1 0"/>
    <geom name="lower" type="capsule" size="0.04" fromto="0 0 0 0 0 -{system.length}" rgba="0.7 0.7 0.8 1"/>
  </body>
</body>
<geom name="pivot" size="0.07" rgba="0.3 0.3 0.7 1"/>
"""
_POINT = """
<geom name="rail" type="capsule" size="0.015" fromto="-3 0 0 3 0 0" rgba="0.3 0.3 0.7 1"/>
<geom name="goal" type="box" size="0.01 0.06 0.06" rgba="0.1 0.6 0.1 1"/>
<body name="point">
  <inertial pos="0 0 0" mass="{system.mass}" diaginertia="1 1 1"/>
  <joint name="slider" type="slide" axis="1 0 0"/>
  <geom name="point" size="0.08" rgba="0.1 0.6 0.6 1"/>
</body>
"""


@dataclass(frozen=True)
class PendulumSwingUp(Endless):
    """Swing the pendulum up and hold it; never ends.

    reward = −(10 (1 + cos θ) + 0.1 θ̇² + 0.01 u²), of the state before the step.

    y = (θ, θ̇); the pendulum hangs at θ = 0.
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -(10 * (1 + y[..., 0].cos()) + 0.1 * y[..., 1] ** 2 + 0.01 * u[..., 0] ** 2)

    @property
    def features(self) -> Features:
        return Features(2, angles=(0,))


@dataclass(frozen=True)
class AcrobotSwingUp(Endless):
    """Swing both links up and hold them; never ends.

    reward = −(10 (2 + cos θ₁ + cos(θ₁ + θ₂)) + 0.1 (θ̇₁² + θ̇₂²) + 0.01 u²), of the state before the step.

    y = (θ₁, θ₂, θ̇₁, θ̇₂), shoulder and elbow; the links hang at 0, and the tip is at its highest for θ₁ = π, θ₂ = 0.
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        low = 2 + y[..., 0].cos() + (y[..., 0] + y[..., 1]).cos()
        return -(10 * low + 0.1 * (y[..., 2] ** 2 + y[..., 3] ** 2) + 0.01 * u[..., 0] ** 2)

    @property
    def features(self) -> Features:
        return Features(4, angles=(0, 1))


@dataclass(frozen=True)
class Regulate(Endless):
    """Bring a point to rest at 0; never ends.

    reward = −½ (p² + 0.1 v² + 0.1 u²), of the state before the step.   y = (p, v)
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -0.5 * (y[..., 0] ** 2 + 0.1 * y[..., 1] ** 2 + 0.1 * u[..., 0] ** 2)


def pendulum() -> World:
    """A point of 1 kg on a rod of 1 m, with up to 4 N m at the pivot, which hold it 24° from hanging: 20 Hz, 200 steps.

    It starts within 0.1 rad of hanging, at up to 0.1 rad/s.
    """

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[:], data.qvel[:] = rng.uniform(-0.1, 0.1, (2, 1))

    system = systems.Pendulum()
    return twin_world(
        "pendulum",
        system,
        PendulumSwingUp(),
        bodies=_PENDULUM.format(system=system),
        actuator='<motor name="torque" joint="hinge" ctrlrange="-4 4"/>',
        reset=start,
        camera={"distance": 4.0, "azimuth": 90.0, "elevation": -10.0, "lookat": [0.0, 0.0, 0.0]},
        gravity=system.gravity,
    )


def acrobot() -> World:
    """Two links of 1 kg and 1 m, with up to 10 N m at the elbow and none at the shoulder: 20 Hz, 200 steps.

    They start within 0.1 rad of hanging, at up to 0.1 rad/s. Plans that see 2 s ahead swing them up and balance them.

    Reference: Spong 1995, "The swing up control problem for the acrobot".  Differs: with Gymnasium's parameters.
    """

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        data.qpos[:], data.qvel[:] = rng.uniform(-0.1, 0.1, (2, 2))

    system = systems.Acrobot()
    return twin_world(
        "acrobot",
        system,
        AcrobotSwingUp(),
        bodies=_ACROBOT.format(system=system, centre=system.length / 2),
        actuator='<motor name="torque" joint="elbow" ctrlrange="-10 10"/>',
        reset=start,
        camera={"distance": 7.0, "azimuth": 90.0, "elevation": -10.0, "lookat": [0.0, 0.0, 0.0]},
        gravity=system.gravity,
    )


def double_integrator() -> World:
    """A point of 1 kg on a line, pushed by up to 5 N: 20 Hz, 200 steps; linear, and its reward quadratic.

    It starts anywhere on p² + v² = 1, in m and m/s. The best controls need less than 5 N, so they are linear feedback.
    """

    def start(model: mujoco.MjModel, data: mujoco.MjData, rng: np.random.Generator) -> None:
        phase = rng.uniform(-np.pi, np.pi)
        data.qpos[:], data.qvel[:] = np.cos(phase), np.sin(phase)

    system = systems.DoubleIntegrator()
    return twin_world(
        "double-integrator",
        system,
        Regulate(),
        bodies=_POINT.format(system=system),
        actuator='<motor name="force" joint="slider" ctrlrange="-5 5"/>',
        reset=start,
        camera={"distance": 4.0, "azimuth": 90.0, "elevation": -10.0, "lookat": [0.0, 0.0, 0.0]},
    )
