"""Optimal control problems with known optima, for whatever transcribes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbrl import Box, Constraint, Plan, Problem
from mbrl.envs.systems import CartPole, Discretized, DoubleIntegrator, System
from mbrl.problem import Integral
from mbrl.symbolic import Symbolic


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class VanDerPol(System):
    """x1' = (1 − x2²) x1 − x2 + u, x2' = x1."""

    nx, nu, nq = 2, 1, 0

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        a, b = x.unbind(-1)
        return torch.stack([(1 - b**2) * a - b + u[..., 0], a], -1)


@dataclass(frozen=True)
class Decay(System):
    """x' = −x + u."""

    nx, nu, nq = 1, 1, 0

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return u - x


@dataclass(frozen=True)
class Steered(System):
    """A mass in the plane under an acceleration of constant size, whose angle is u. x = (x, y, their rates)."""

    acceleration: float = 100.0
    nx, nu, nq = 4, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        (a,) = self._parameters(p)
        angle = u[..., 0]
        return torch.stack([x[..., 2], x[..., 3], a * angle.cos(), a * angle.sin()], -1)


@dataclass(frozen=True)
class RobotArm(System):
    """A rod that slides through a turning pivot. x = (length, azimuth, elevation from the pole, their rates)."""

    length: float = 5.0
    nx, nu, nq = 6, 3, 3

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        (length,) = self._parameters(p)
        reach, elevation = x[..., 0], x[..., 2]
        inertia = ((length - reach) ** 3 + reach**3) / 3
        push, turn, lift = u.unbind(-1)
        faster = [push / length, turn / (inertia * elevation.sin() ** 2), lift / inertia]
        return torch.cat([x[..., 3:], torch.stack(faster, -1)], -1)


@dataclass(frozen=True)
class Rocket(System):
    """Goddard's: upwards against drag and gravity, scaled. x = (height, speed, mass), u = (thrust,)."""

    drag: float = 310.0
    decay: float = 500.0
    exhaust: float = 0.5
    nx, nu, nq = 3, 1, 1

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        drag, decay, exhaust = self._parameters(p)
        height, speed, mass = x.unbind(-1)
        thrust = u[..., 0]
        air = drag * speed**2 * (-decay * (height - 1)).exp()
        return torch.stack([speed, (thrust - air) / mass - 1 / height**2, -thrust / exhaust], -1)


@dataclass(frozen=True)
class Lander(System):
    """Above the moon, in units of its gravity. x = (height, speed, mass), u = (thrust,)."""

    exhaust: float = 2.349
    nx, nu, nq = 3, 1, 1

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        (exhaust,) = self._parameters(p)
        _, speed, mass = x.unbind(-1)
        return torch.stack([speed, u[..., 0] / mass - 1, -u[..., 0] / exhaust], -1)


@dataclass(frozen=True)
class Bead(System):
    """On a wire without friction. x = (x, y, speed), y upwards; u = (angle of the wire from straight down,)."""

    gravity: float = 9.80665
    nx, nu, nq = 3, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        (gravity,) = self._parameters(p)
        speed, angle = x[..., 2], u[..., 0]
        return torch.stack([speed * angle.sin(), -speed * angle.cos(), gravity * angle.cos()], -1)


@dataclass(frozen=True)
class Walker(System):
    """A point that moves at a speed of 1 in the direction u. x = (x, y)."""

    nx, nu, nq = 2, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        return torch.stack([u[..., 0].cos(), u[..., 0].sin()], -1) + 0 * x


@dataclass(frozen=True)
class Glider(System):
    """A hang glider over a thermal. x = (x, y, their rates), u = (lift coefficient,)."""

    nx, nu, nq = 4, 1, 2

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        across, _, vx, vy = x.unbind(-1)
        lift = u[..., 0]
        ring = (across / 100 - 2.5) ** 2
        sink = vy - 2.5 * (1 - ring) * (-ring).exp()
        speed = (vx**2 + sink**2).sqrt()
        pressure = 0.5 * 1.13 * 14.0 / 100.0 * speed
        drag = 0.034 + 0.069662 * lift**2
        return torch.stack(
            [vx, vy, -pressure * (lift * sink + drag * vx), pressure * (lift * vx - drag * sink) - 9.81], -1
        )


@dataclass(frozen=True)
class Sum:
    """Σ Q y² + Σ R u² + rate, per second; Σ final y at the end."""

    Q: tuple[float, ...] = ()
    R: tuple[float, ...] = ()
    rate_of_time: float = 0.0
    final: tuple[float, ...] = ()

    def rate(self, y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        cost = torch.zeros_like(y[..., 0]) + self.rate_of_time
        for i, weight in enumerate(self.Q):
            cost = cost + weight * y[..., i] ** 2
        for i, weight in enumerate(self.R):
            cost = cost + weight * u[..., i] ** 2
        return cost

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        cost = torch.zeros_like(y[..., 0])
        for i, weight in enumerate(self.final):
            cost = cost + weight * y[..., i]
        return cost


TIME = Sum(rate_of_time=1.0)


@dataclass(frozen=True)
class At:
    """The numbers of y with these places are `goal`."""

    places: tuple[int, ...]
    goal: tuple[float, ...]

    def __call__(self, y: Tensor, u: Tensor | None, k: Any, p: Tensor | None) -> Tensor:
        return torch.stack([y[..., i] - goal for i, goal in zip(self.places, self.goal, strict=True)], -1)


@dataclass(frozen=True)
class Below:
    """y_place ≤ limit; with sign −1, y_place ≥ limit."""

    place: int
    limit: float
    sign: float = 1.0

    def __call__(self, y: Tensor, u: Tensor | None, k: Any, p: Tensor | None) -> Tensor:
        return self.sign * (y[..., self.place, None] - self.limit)


@dataclass(frozen=True)
class Outside:
    """Of a disc in the plane of the first two numbers of y."""

    center: tuple[float, float]
    radius: float

    def __call__(self, y: Tensor, u: Tensor | None, k: Any, p: Tensor | None) -> Tensor:
        away = (y[..., 0] - self.center[0]) ** 2 + (y[..., 1] - self.center[1]) ** 2
        return self.radius**2 - away[..., None]


def reaches(*goal: float, places: tuple[int, ...] | None = None) -> Constraint:
    return Constraint(At(places or tuple(range(len(goal))), goal), "eq", "terminal", name="goal")


def always(bound: Below | Outside) -> tuple[Constraint, Constraint]:
    """Along the path, and at its end."""
    return Constraint(bound, name="limit"), Constraint(bound, at="terminal", name="limit at the end")


def box(*limits: float, low: tuple[float, ...] | None = None) -> Box:
    high = tensor(*limits)
    return Box(-high if low is None else tensor(*low), high)


@dataclass(frozen=True)
class Known:
    """A problem and its optimum.

    Attributes:
        x0, end: the first state; the last of the guess, which is a straight line.
        u: the action of the guess.
        horizon: steps that suffice for `tolerance`.
        time: seconds of the horizon; of the guess, if the final time is free.
        final_time: between which it is free, or None.
        value: the least cost of all controls.
        tolerance: relative, of Hermite-Simpson collocation with so many steps against `value`.
        held: the least cost of controls that are held in each step, by shooting with four substeps of RK4 and the
            constraints at the steps. An NLP of numbers alone: to be met to 1e-6.
        source: of the problem and of `value`. All were solved with CasADi and ipopt, apart from what they test.
    """

    name: str
    system: System
    cost: Sum
    actions: Box
    x0: tuple[float, ...]
    end: tuple[float, ...]
    u: tuple[float, ...]
    horizon: int
    time: float
    value: float
    held: float
    source: str
    constraints: tuple[Constraint, ...] = ()
    final_time: tuple[float, float] | None = None
    tolerance: float = 1e-4

    def problem(self, horizon: int | None = None, substeps: int = 4) -> Problem[Symbolic, Integral, Box]:
        horizon = horizon or self.horizon
        dt = self.time / horizon
        dynamics = Symbolic(Discretized(self.system, dt, "rk4", substeps))
        cost = Integral(self.cost, dt)
        return Problem(dynamics, cost, self.actions, horizon, constraints=self.constraints)

    def start(self) -> Tensor:
        """x0 (1, nx)."""
        return tensor(*self.x0)[None]

    def guess(self, horizon: int | None = None) -> Plan:
        horizon = horizon or self.horizon
        share = torch.linspace(0, 1, horizon + 1, dtype=torch.float64)[:, None]
        states = (1 - share) * tensor(*self.x0) + share * tensor(*self.end)
        actions = tensor(*self.u).expand(horizon, -1)
        return Plan(actions[None], tensor(math.nan), states[None])


CASADI = "CasADi, direct_multiple_shooting.py; not published, `held` is its NLP"
COPS = "Dolan, Moré & Munson 2004, Benchmarking optimization software with COPS 3.0"
FREE = math.inf

VAN_DER_POL = Known(
    "Van der Pol", VanDerPol(), Sum((1.0, 1.0), (1.0,)), box(1.0),
    (0.0, 1.0), (0.0, 0.0), (0.0,), 20, 10.0, 3.61518, 3.7329693929, CASADI,
    always(Below(0, -0.25, -1.0)), tolerance=3e-3,
)  # fmt: skip
CART_POLE = Known(
    "cart-pole", CartPole(), Sum(R=(1.0,)), box(20.0),
    (0.0,) * 4, (1.0, math.pi, 0.0, 0.0), (0.0,), 100, 2.0, 58.80767, 58.8882813949,
    "Kelly 2017, An introduction to trajectory optimization, appendix E: the problem; dymos test_cartpole_opt.py: 58.88 with u(T) = 0",
    (*always(Below(0, 2.0)), *always(Below(0, -2.0, -1.0)), reaches(1.0, math.pi, 0.0, 0.0)),
)  # fmt: skip
BLOCK_MOVE = Known(
    "block move", DoubleIntegrator(), Sum(R=(1.0,)), box(FREE),
    (0.0, 0.0), (1.0, 0.0), (0.0,), 100, 1.0, 12.0, 12 / (1 - 1e-4), "analytic: u = 6 − 12 t; held, 12 / (1 − 1/N²)",
    (reaches(1.0, 0.0),), tolerance=1e-7,
)  # fmt: skip
HYPERSENSITIVE = Known(
    "hypersensitive", Decay(), Sum((0.5,), (0.5,)), box(FREE),
    (1.5,), (1.0,), (0.0,), 200, 10.0, 1.6730939784, 1.6735516901, "analytic, formula in dymos test_hyper_sensitive.py",
    (reaches(1.0),), tolerance=1e-6,
)  # fmt: skip
STEERING = Known(
    "steering", Steered(), TIME, box(math.pi / 2),
    (0.0,) * 4, (0.0, 5.0, 45.0, 0.0), (0.0,), 100, 1.0, 0.554577, 0.5545770239, COPS,
    (reaches(5.0, 45.0, 0.0, places=(1, 2, 3)),), (0.1, 2.0),
)  # fmt: skip
ROBOT_ARM = Known(
    "robot arm", RobotArm(), TIME, box(1.0, 1.0, 1.0),
    (4.5, 0.0, math.pi / 4, 0.0, 0.0, 0.0), (4.5, 2 * math.pi / 3, math.pi / 4, 0.0, 0.0, 0.0), (0.0,) * 3, 100,
    10.0, 9.14138, 9.1411877295, COPS,
    (*always(Below(0, 5.0)), *always(Below(0, 0.0, -1.0)), reaches(4.5, 2 * math.pi / 3, math.pi / 4, 0.0, 0.0, 0.0)),
    (1.0, 20.0),
)  # fmt: skip
GODDARD = Known(
    "Goddard's rocket", Rocket(), Sum(final=(-1.0,)), box(3.5, low=(0.0,)),
    (1.0, 0.0, 1.0), (1.01, 0.0, 0.6), (1.75,), 100, 0.2, -1.01283, -1.0128368515, COPS,
    (*always(Below(1, 0.0, -1.0)), *always(Below(2, 0.6, -1.0)), reaches(0.6, places=(2,))), (0.05, 0.5),
)  # fmt: skip
GLIDER = Known(
    "hang glider", Glider(), Sum(final=(-1.0,)), box(1.4, low=(0.0,)),
    (0.0, 1000.0, 13.23, -1.288), (1250.0, 900.0, 13.23, -1.288), (0.7,), 100, 100.0, -1247.9876, -1247.8707024845, f"{COPS}, whose 1248.03 is of 400 trapezoids; converged here",
    (*always(Below(2, 0.0, -1.0)), reaches(900.0, 13.23, -1.288, places=(1, 2, 3))), (20.0, 200.0), tolerance=1e-3,
)  # fmt: skip
LANDING = Known(
    "moon landing", Lander(), Sum(final=(0.0, 0.0, -1.0)), box(1.227, low=(0.0,)),
    (1.0, -0.783, 1.0), (0.0, 0.0, 0.4), (0.6,), 100, 1.5, -0.395354364, -0.3953528176, "a fall and one burn, whose two times follow from the landing; dymos: 0.3953",
    (*always(Below(0, 0.0, -1.0)), reaches(0.0, 0.0)), (0.5, 5.0),
)  # fmt: skip
BRACHISTOCHRONE = Known(
    "brachistochrone", Bead(), TIME, box(math.pi, low=(0.0,)),
    (0.0, 10.0, 0.0), (10.0, 5.0, 10.0), (1.0,), 40, 1.5, 1.8016031225, 1.8017475324, "a cycloid; dymos: 1.8016",
    (reaches(10.0, 5.0),), (0.5, 10.0),
)  # fmt: skip
BRYSON_DENHAM = Known(
    "Bryson-Denham", DoubleIntegrator(), Sum(R=(0.5,)), box(FREE),
    (0.0, 1.0), (0.0, -1.0), (0.0,), 90, 1.0, 4.0, 4.0011113687, "Bryson & Ho 1975, Applied optimal control, 3.11: 4 / 9l, l = 1/9",
    (*always(Below(0, 1 / 9)), reaches(0.0, -1.0)),
)  # fmt: skip
SPEED_LIMIT = Known(
    "speed limit", DoubleIntegrator(), TIME, box(1.0),
    (0.0, 0.0), (1.0, 0.0), (0.0,), 50, 2.0, 2.5, 2.5, "analytic: distance / v + v / a, v = 0.5, a = 1",
    (*always(Below(1, 0.5)), reaches(1.0, 0.0)), (1.0, 10.0), tolerance=1e-3,
)  # fmt: skip
_D, _R, _LOW = (
    math.hypot(1.0, 0.1),
    0.5,
    0.1,
)  # from the disc to the ends; its radius, and how far it is off the line
DETOUR = Known(
    "detour", Walker(), TIME, box(math.pi),
    (-1.0, 0.0), (1.0, 0.0), (0.0,), 100, 2.0,
    2 * math.sqrt(_D**2 - _R**2) + _R * (math.pi - 2 * math.atan(_LOW) - 2 * math.acos(_R / _D)), 2.1645932436,
    "analytic: two tangents and an arc",
    (*always(Outside((0.0, -_LOW), _R)), reaches(1.0, 0.0)), (1.0, 5.0),
)  # fmt: skip
KNOWN = (
    VAN_DER_POL, CART_POLE, BLOCK_MOVE, HYPERSENSITIVE, STEERING, ROBOT_ARM, GODDARD, GLIDER, LANDING, BRACHISTOCHRONE,
    BRYSON_DENHAM, SPEED_LIMIT, DETOUR,
)  # fmt: skip
