"""A 3-D quadrotor that starts upside down: does it reach hover?

    python -m mbrl.experiments.benchmarks.upside_down

Tilts of 120° to 180° about random horizontal axes, random yaw, random velocities and body rates (0.5 m/s and rad/s); each
rotor pulls between none and twice its share of the weight. iLQR plans 2.4 s at once on the tangent space, all starts in
one batch, first from hovering thrust ("unaided"), then, for the starts that did not arrive, from `guesses` random
thrusts each. A start has arrived if the final position, attitude (rad), velocity and rates are all within 0.05 of hover at
the origin. Zero thrust is no start for the search: tried on 16 starts, 12 of them stayed in free fall.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Generator, Tensor

from mbrl import quaternions
from mbrl.envs.systems import Discretized, Quadrotor
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import ILQR
from mbrl.planners.noise import colored_noise
from mbrl.problem import Box, Plan, Problem
from mbrl.symbolic import Symbolic

QUADROTOR = Quadrotor()
SHARE = QUADROTOR.mass * QUADROTOR.gravity / 4
"""Thrust of a rotor in hover, N."""


@dataclass(frozen=True)
class Config:
    starts: int = 24
    guesses: int = 8
    horizon: int = 60
    dt: float = 0.04
    iterations: int = 400
    seed: int = 0
    out: Path = RESULTS / "upside_down.json"


class ToHover:
    """Little effort, and hover at the origin in the end; of the attitude, four times the squared sine of half its angle."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return 0.01 * (u - SHARE).square().sum(-1)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        moved = y[..., :3].square().sum(-1) + y[..., 7:].square().sum(-1)
        return 100 * (moved + 4 * y[..., 4:7].square().sum(-1))


def problem_of(config: Config) -> Problem[Any, Any, Any]:
    limits = torch.zeros(4, dtype=torch.float64), torch.full((4,), 2 * SHARE, dtype=torch.float64)
    return Problem(Symbolic(Discretized(QUADROTOR, config.dt)), ToHover(), Box(*limits), config.horizon)


def upside_down(n: int, *, generator: Generator) -> Tensor:
    """States (n, 13) with the rotors below."""
    way, tilt, yaw = torch.rand(3, n, generator=generator, dtype=torch.float64)
    none = torch.zeros_like(way)
    axis = torch.stack([(2 * math.pi * way).cos(), (2 * math.pi * way).sin(), none], -1)
    turned = quaternions.exp(torch.stack([none, none, 2 * math.pi * yaw], -1))
    q = quaternions.multiply(quaternions.exp(math.pi * (2 + tilt[:, None]) / 3 * axis), turned)
    rates = 0.5 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return torch.cat([torch.zeros(n, 3, dtype=torch.float64), q, rates], -1)


def distance(x: Tensor) -> Tensor:
    """The largest distance (...) of x (..., 13) from hover at the origin, in any number of the tangent space."""
    hover = torch.zeros_like(x)
    hover[..., 3] = 1
    return QUADROTOR.difference(hover, x).abs().amax(-1)


def fly(config: Config, x0: Tensor, thrust: Tensor, *, generator: Generator) -> Plan:
    """iLQR's plan from x0 (M, 13), beginning with the thrusts (M, H, 4)."""
    problem, planner = problem_of(config), ILQR(iterations=config.iterations)
    guess = Plan(problem.actions.clip(thrust), x0.new_zeros(len(x0)))
    start = planner.init(problem, x0, generator=generator, guess=guess)
    return planner.plan(problem, x0, start, generator=generator)[0]


def end(plan: Plan) -> Tensor:
    """How far from hover each row ends, (M,)."""
    assert plan.states is not None
    return distance(plan.states[:, -1])


def main(config: Config) -> None:
    tic, generator = time.perf_counter(), torch.Generator().manual_seed(config.seed)
    x0 = upside_down(config.starts, generator=generator)
    plan = fly(config, x0, torch.full((len(x0), config.horizon, 4), SHARE), generator=generator)
    away = end(plan)
    unaided, lost = int((away <= 0.05).sum()), (away > 0.05).nonzero()[:, 0]
    if len(lost):
        n = config.guesses
        noise = colored_noise((len(lost) * n, config.horizon, 4), 1.5, x0, generator=generator)
        again = end(
            fly(config, x0[lost].repeat_interleave(n, 0), SHARE * (1 + 0.5 * noise), generator=generator)
        )
        away[lost] = torch.minimum(away[lost], again.view(-1, n).amin(1))
    row = {
        "limit": 2 * SHARE,
        "seconds": config.dt * config.horizon,
        "starts": config.starts,
        "unaided": unaided,
        "arrived": int((away <= 0.05).sum()),
        "worst": float(away.max()),
        "ends": away.tolist(),
        "iterations": plan.info["iterations"].tolist(),  # type: ignore[union-attr]
        "wall_s": time.perf_counter() - tic,
    }
    write(
        config.out,
        {
            "cases": {"quadrotor, upside down": row},
            "config": {"seed": config.seed, "guesses": config.guesses, "iterations": config.iterations},
            "machine": machine(),
        },
    )
    Console().print(
        f"{unaided} of {config.starts} arrived unaided, {row['arrived']} in all; worst end {row['worst']:.3f}; "
        f"{row['wall_s']:.0f} s"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
