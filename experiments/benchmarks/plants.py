"""The plants of the comparisons of nonlinear MPC, in numpy alone: peers import this file as it is, without the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# Swing-up of a cart-pole, x = (cart, angle, velocity, rate), angle 0 upright, under a force.
CART, POLE, LENGTH, GRAVITY = 1.0, 0.3, 0.5, 9.81
LIMIT, DT, HORIZON, STEPS = 20.0, 0.05, 40, 60  # N, s
START = (0.0, np.pi - 0.1, 0.0, 0.0)

# do-mpc's reactor, x = (A, B, temperature, jacket) in mol/l and °C, under an inflow 1/h and a heat flow kJ/h.
REACTOR_DT, REACTOR_HORIZON, REACTOR_STEPS = 0.005, 20, 50  # h
REACTOR_START = (0.8, 0.5, 134.14, 130.0)


def cart_pole(x: Sequence[Any], u: Any, sin: Callable[[Any], Any], cos: Callable[[Any], Any]) -> list[Any]:
    """ẋ, of numbers or expressions."""
    _, angle, velocity, rate = x
    s, c = -sin(angle), -cos(angle)  # of the angle from hanging
    whole = CART + POLE * s**2
    push = (LENGTH * POLE * s * rate**2 + u + POLE * GRAVITY * c * s) / whole
    swing = LENGTH * POLE * c * s * rate**2 + u * c + (CART + POLE) * GRAVITY * s
    return [velocity, rate, push, -swing / (LENGTH * whole)]


def stage(x: Any, u: Any, cos: Callable[[Any], Any]) -> Any:
    """The cost of a step of the swing-up; without u, of ending at x."""
    return x[0] ** 2 + 10 * (1 - cos(x[1])) + 0.01 * u**2


def reactor(x: Sequence[Any], u: Sequence[Any], p: Sequence[Any], exp: Callable[[Any], Any]) -> list[Any]:
    """ẋ per hour, of numbers or expressions; p = (alpha, beta). As in examples/CSTR of do-mpc."""
    a, b, temperature, jacket = x
    inflow, heat = u
    alpha, beta = p
    kelvin = temperature + 273.15
    ab = beta * 1.287e12 * exp(-9758.3 / kelvin) * a
    bc = 1.287e12 * exp(-9758.3 / kelvin) * b
    ad = 9.043e9 * exp(-alpha * 8560.0 / kelvin) * a**2
    exchange = 4032.0 * 0.215 * (temperature - jacket)
    warmed = (4.2 * ab - 11.0 * bc - 41.85 * ad) / (-0.9342 * 3.01)
    return [
        inflow * (5.1 - a) - ab - ad,
        -inflow * b + ab - bc,
        warmed + inflow * (130.0 - temperature) - exchange / (0.9342 * 3.01 * 10.01),
        (heat + exchange) / (5.0 * 2.0),
    ]


def rk4(ode: Callable[[Vector], Any], x: Vector, dt: float, substeps: int) -> Vector:
    """x after dt, in so many steps of order 4."""
    h = dt / substeps
    for _ in range(substeps):
        a = np.array(ode(x))
        b = np.array(ode(x + h / 2 * a))
        c = np.array(ode(x + h / 2 * b))
        x = x + h / 6 * (a + 2 * b + 2 * c + np.array(ode(x + h * c)))
    return x


def swing_up(act: Callable[[Vector], float], start: tuple[float, ...] = START) -> dict[str, Any]:
    """The swing-up, or what else becomes of a start, under a controller of x. Integrated with an error below 1e-9.

    Returns:
        "states" (STEPS + 1, 4), "inputs" (STEPS, 1), and the "cost" of the steps.
    """
    x, cost = np.array(start), 0.0
    states, inputs = [x.tolist()], []
    for _ in range(STEPS):
        u = float(act(x))
        cost += float(stage(x, u, np.cos))
        x = rk4(lambda x, u=u: cart_pole(x.tolist(), u, np.sin, np.cos), x, DT, 20)  # type: ignore[misc]
        states.append(x.tolist())
        inputs.append([u])
    return {"states": states, "inputs": inputs, "cost": cost}


def react(
    act: Callable[[Vector], Sequence[float]], advance: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """The reactor under a controller of x, with alpha = beta = 1.

    Args:
        advance: (x, u) -> x after a step, in place of our own integration, whose error is below 1e-9.

    Returns:
        "states" (REACTOR_STEPS + 1, 4), "inputs" (REACTOR_STEPS, 2), and the "cost": Σ (B − 0.6)² and the moves of the
        inputs, weighted as in the controller, from inputs of 0 on.
    """
    x, before, cost = np.array(REACTOR_START), np.zeros(2), 0.0
    states, inputs = [x.tolist()], []
    for _ in range(REACTOR_STEPS):
        u = np.array(act(x), dtype=float).ravel()
        cost += (x[1] - 0.6) ** 2 + float(np.array([0.1, 1e-3]) @ ((u - before) / (100.0, 2000.0)) ** 2)
        if advance is None:
            x = rk4(lambda x, u=u: reactor(x, u, (1.0, 1.0), np.exp), x, REACTOR_DT, 20)  # type: ignore[misc]
        else:
            x = np.array(advance(x, u), dtype=float).ravel()
        states.append(x.tolist())
        inputs.append(u.tolist())
        before = u
    return {"states": states, "inputs": inputs, "cost": float(cost)}


class Clock:
    """Times what it wraps, call by call: seconds of the wall and of the processor."""

    def __init__(self, fun: Callable[..., Any]):
        self._fun, self._clocks = fun, (time.perf_counter, time.process_time)
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def __call__(self, *args: Any) -> Any:
        start = [clock() for clock in self._clocks]
        result = self._fun(*args)
        for clock, before, seconds in zip(self._clocks, start, self.seconds, strict=True):
            seconds.append(clock() - before)
        return result
