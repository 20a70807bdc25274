"""Analytic systems: ordinary differential equations, each written once in torch.

They are batched, differentiable and, wrapped in `Symbolic`, CasADi expressions as well. `Discretized` makes them
dynamics. SI units; angles in rad, 0 hanging down.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mbrl import quaternions
from mbrl.errors import ContractError, UnknownName

Integrator = Literal["euler", "semi-implicit", "rk4"]


class System(ABC):
    """ẋ = f(x, u; p). The fields of a system are its parameters p, in their order.

    Attributes:
        nx, nu: sizes of state and control.
        nq: how many leading numbers of x are positions; the rest are velocities. For semi-implicit integration.
    """

    nx: ClassVar[int]
    nu: ClassVar[int]
    nq: ClassVar[int]

    @abstractmethod
    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        """ẋ (..., nx) of x (..., nx) and u (..., nu) of one leading shape, and p (..., np), the system's own unless given."""

    @property
    def p(self) -> Tensor:
        """The parameters (np,), float64."""
        return torch.tensor([getattr(self, f.name) for f in dataclasses.fields(self)], dtype=torch.float64)  # type: ignore[arg-type]

    def _parameters(self, p: Tensor | None) -> Any:
        if p is None:
            return [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        return p.unbind(-1)

    def project(self, x: Tensor) -> Tensor:
        """x, back on its manifold after a step of integration."""
        return x


@dataclass(frozen=True)
class DoubleIntegrator(System):
    """A point of `mass` kg on a line, pushed by u N. x = (position, velocity)."""

    mass: float = 1.0
    nx, nu, nq = 2, 1, 1

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        (mass,) = self._parameters(p)
        return torch.stack([x[..., 1], u[..., 0] / mass], -1)


@dataclass(frozen=True)
class Pendulum(System):
    """A point on a massless rod, driven by a torque u at the pivot. x = (angle, rate)."""

    mass: float = 1.0
    length: float = 1.0
    gravity: float = 9.81
    damping: float = 0.1
    nx, nu, nq = 2, 1, 1

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        mass, length, gravity, damping = self._parameters(p)
        angle, rate = x.unbind(-1)
        torque = u[..., 0] - damping * rate - mass * gravity * length * angle.sin()
        return torch.stack([rate, torque / (mass * length**2)], -1)


@dataclass(frozen=True)
class CartPole(System):
    """A pole on a cart that a force u pushes. x = (cart, angle, cart's velocity, rate).

    Reference: Kelly 2017, "An introduction to trajectory optimization", appendix E.
    """

    cart: float = 1.0
    pole: float = 0.3
    length: float = 0.5
    gravity: float = 9.81
    nx, nu, nq = 4, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        cart, pole, length, gravity = self._parameters(p)
        _, angle, velocity, rate = x.unbind(-1)
        sin, cos, force = angle.sin(), angle.cos(), u[..., 0]
        whole = cart + pole * sin**2
        push = (length * pole * sin * rate**2 + force + pole * gravity * cos * sin) / whole
        swing = length * pole * cos * sin * rate**2 + force * cos + (cart + pole) * gravity * sin
        return torch.stack([velocity, rate, push, -swing / (length * whole)], -1)


@dataclass(frozen=True)
class Acrobot(System):
    """Two links with a torque u at the elbow. x = (shoulder, elbow, their rates); the elbow's is relative.

    Reference: Spong 1995, "The swing up control problem for the acrobot"; parameters as in Gymnasium's Acrobot.
    """

    mass: float = 1.0
    length: float = 1.0
    inertia: float = 1.0
    gravity: float = 9.8
    nx, nu, nq = 4, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        m, l, inertia, g = self._parameters(p)
        c = l / 2  # centres of mass
        a, b, da, db = x.unbind(-1)
        cos, sin = b.cos(), b.sin()
        m11 = m * c**2 + m * (l**2 + c**2 + 2 * l * c * cos) + 2 * inertia
        m12 = m * (c**2 + l * c * cos) + inertia
        m22 = m * c**2 + inertia
        h = m * l * c * sin
        gravity_elbow = m * c * g * (a + b).sin()
        gravity_shoulder = (m * c + m * l) * g * a.sin() + gravity_elbow
        rest1 = h * db**2 + 2 * h * da * db - gravity_shoulder
        rest2 = u[..., 0] - h * da**2 - gravity_elbow
        det = m11 * m22 - m12 * m12
        return torch.stack([da, db, (m22 * rest1 - m12 * rest2) / det, (m11 * rest2 - m12 * rest1) / det], -1)


@dataclass(frozen=True)
class Unicycle(System):
    """A wheel that rolls and turns. x = (x, y, heading), u = (speed, turning rate)."""

    nx, nu, nq = 3, 2, 3

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        heading = x[..., 2]
        speed, turn = u.unbind(-1)
        return torch.stack([speed * heading.cos(), speed * heading.sin(), turn], -1)


@dataclass(frozen=True)
class PlanarQuadrotor(System):
    """Two rotors on a bar in a vertical plane. x = (x, z, tilt, their rates), u = (right, left) thrust in N."""

    mass: float = 0.5
    inertia: float = 0.01
    arm: float = 0.2
    gravity: float = 9.81
    nx, nu, nq = 6, 2, 3

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        mass, inertia, arm, gravity = self._parameters(p)
        _, _, tilt, vx, vz, rate = x.unbind(-1)
        right, left = u.unbind(-1)
        lift = (right + left) / mass
        turn = arm * (right - left) / inertia
        return torch.stack([vx, vz, rate, -lift * tilt.sin(), lift * tilt.cos() - gravity, turn], -1)


@dataclass(frozen=True)
class Quadrotor(System):
    """Four rotors in a cross. x = (position, quaternion, velocity, body rates), u = thrusts in N, front first, anticlockwise.

    The tangent space has 12 numbers: of the attitude, a rotation vector in the body's frame.
    """

    mass: float = 0.5
    inertia: float = 0.0023
    inertia_z: float = 0.004
    arm: float = 0.17
    drag: float = 0.025
    gravity: float = 9.81
    nx, nu, nq = 13, 4, 7

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        mass, inertia, inertia_z, arm, drag, gravity = self._parameters(p)
        q, v, w = x[..., 3:7], x[..., 7:10], x[..., 10:]
        front, left, back, right = u.unbind(-1)
        none = torch.zeros_like(front)
        thrust = quaternions.rotate(q, torch.stack([none, none, (front + left + back + right) / mass], -1))
        down = torch.stack([thrust[..., 0], thrust[..., 1], thrust[..., 2] - gravity], -1)
        wx, wy, wz = w.unbind(-1)
        twist = torch.stack(
            [
                (arm * (left - right) - (inertia_z - inertia) * wy * wz) / inertia,
                (arm * (back - front) - (inertia - inertia_z) * wx * wz) / inertia,
                drag * (front - left + back - right) / inertia_z,
            ],
            -1,
        )
        spin = 0.5 * quaternions.multiply(q, torch.cat([torch.zeros_like(w[..., :1]), w], -1))
        return torch.cat([v, spin, down, twist], -1)

    def project(self, x: Tensor) -> Tensor:
        q = x[..., 3:7]
        return torch.cat([x[..., :3], q / q.norm(dim=-1, keepdim=True), x[..., 7:]], -1)

    @property
    def ndx(self) -> int:
        return 12

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        moved = quaternions.retract(x[..., 3:7], dx[..., 3:6])
        parts = [x[..., :3] + dx[..., :3], moved, x[..., 7:] + dx[..., 6:]]
        return torch.cat(parts, -1)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        turn = quaternions.difference(x[..., 3:7], y[..., 3:7])
        return torch.cat([y[..., :3] - x[..., :3], turn, y[..., 7:] - x[..., 7:]], -1)


@dataclass(frozen=True)
class Car:
    """Tassa's car, whose axles roll without slipping over one step. x = (x, y, heading, front wheels' speed).

    u = (steering angle, acceleration). A map from step to step, not an ODE.

    Reference: Tassa et al. 2014, "Control-limited differential dynamic programming", section V, and demo_car.m.
    """

    dt: float = 0.03
    wheelbase: float = 2.0
    nx: int = 4
    nu: int = 2
    ny: int = 4

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        x, u = _broadcast(x, u)
        px, py, heading, speed = x.unbind(-1)
        steer, acceleration = u.unbind(-1)
        front = self.dt * speed
        back = self.wheelbase + front * steer.cos()
        back = back - (self.wheelbase**2 - (front * steer.sin()) ** 2).sqrt()
        turned = heading + (steer.sin() * front / self.wheelbase).asin()
        faster = speed + self.dt * acceleration
        return torch.stack([px + back * heading.cos(), py + back * heading.sin(), turned, faster], -1)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Discretized:
    """A system as dynamics, under a control that is held for one step; y = x.

    Attributes:
        system: the ODE.
        dt: seconds per step.
        integrator: "euler" and "semi-implicit" (velocities first, then positions with them) of order 1, "rk4" of order 4.
        substeps: steps of integration in one of control.
        p: (np,) or (..., np), other parameters than the system's own.

    Raises:
        UnknownName: no such integrator.
        ContractError: dt or substeps are not positive, or p has another size.
    """

    system: System
    dt: float
    integrator: Integrator = "rk4"
    substeps: int = 1
    p: Tensor | None = None

    def __post_init__(self) -> None:
        if self.integrator not in get_args(Integrator):
            raise UnknownName("integrator", self.integrator, get_args(Integrator))
        if not self.dt > 0 or self.substeps < 1:
            raise ContractError(
                f"Discretized needs dt > 0 s and substeps ≥ 1, but got {self.dt} and {self.substeps}."
            )
        if self.p is not None and self.p.shape[-1:] != self.system.p.shape:
            raise ContractError(
                f"{type(self.system).__name__} has {len(self.system.p)} parameters, but p is {tuple(self.p.shape)}."
            )

    @property
    def nx(self) -> int:
        return self.system.nx

    @property
    def nu(self) -> int:
        return self.system.nu

    @property
    def ny(self) -> int:
        return self.system.nx

    @property
    def ndx(self) -> int:
        return int(getattr(self.system, "ndx", self.system.nx))

    def output(self, x: Tensor) -> Tensor:
        return x

    def ode(self, x: Tensor, u: Tensor) -> Tensor:
        """ẋ (..., nx)."""
        return self.system.ode(x, u, None if self.p is None else self.p.to(x))

    def at(self, p: Tensor | None) -> Discretized:
        """The same with other parameters."""
        return dataclasses.replace(self, p=p)

    def with_integral(self, rate: Callable[[Tensor, Tensor], Tensor]) -> Discretized:
        """The same with one more state, the integral of rate(x, u), integrated in the same way."""
        return dataclasses.replace(self, system=_WithIntegral(self.system, rate))

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        own: Any = getattr(self.system, "retract", None)
        return x + dx if own is None else own(x, dx)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        own: Any = getattr(self.system, "difference", None)
        return y - x if own is None else own(x, y)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        h, f, p, nq = self.dt / self.substeps, self.system.ode, self.p, self.system.nq
        p = p if p is None else p.to(x)
        x, u = _broadcast(x, u)
        for _ in range(self.substeps):
            if self.integrator == "euler":
                x = x + h * f(x, u, p)
            elif self.integrator == "semi-implicit":
                v = x[..., nq:] + h * f(x, u, p)[..., nq:]
                x = torch.cat([x[..., :nq] + h * f(torch.cat([x[..., :nq], v], -1), u, p)[..., :nq], v], -1)
            else:
                a = f(x, u, p)
                b = f(x + h / 2 * a, u, p)
                c = f(x + h / 2 * b, u, p)
                d = f(x + h * c, u, p)
                x = x + h / 6 * (a + 2 * b + 2 * c + d)
            x = self.system.project(x)
        return x


class _WithIntegral(System):
    """A system whose last state is the integral of a rate of the others."""

    def __init__(self, system: System, rate: Callable[[Tensor, Tensor], Tensor]):
        self.system, self.rate = system, rate
        self.nx, self.nu, self.nq = system.nx + 1, system.nu, system.nq  # type: ignore[misc]

    @property
    def p(self) -> Tensor:
        return self.system.p

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return torch.cat([self.system.ode(x[..., :-1], u, p), self.rate(x[..., :-1], u)[..., None]], -1)

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([self.system.project(x[..., :-1]), x[..., -1:]], -1)


def _broadcast(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """x and u with one leading shape."""
    rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1])
    return x.expand(*rows, -1), u.expand(*rows, -1)
