"""What are feedback gains worth between replans, when planning takes time and the plant is not the model?

    python -m mbrl.experiments.benchmarks.feedback

A cart-pole is balanced and a 3-D quadrotor hovers. Every mass and inertia of the plant is drawn within ±20 % of the
model's, one plant for each seed, and random pushes change its velocities at each step. iLQR plans every `every` steps,
and a plan arrives `latency` steps after it was begun; between replans its gains are applied, or not. All plants of a cell
are one batch, and all cells meet the same plants and pushes.

Cost: mean of the stage cost over time. Where a plant has fallen, the cost of that step goes on until the end.

The iterations of a plan, three, were chosen after a look at 16 quadrotors with gains and a plan every 20 steps: with one
all fell, with two 5 did, with three or more none. The whole grid of the quadrotor takes long; a part, and the
effect of the iterations, are

    … --cases cart-pole
    … --cases quadrotor --every 1 5 20 --latency 0 3
    … --cases quadrotor --every 20 --latency 0 --iterations 1 2 5 --out …/results/feedback-iterations
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.envs.systems import CartPole, Discretized, Quadrotor, System
from mbrl.estimators import Observed
from mbrl.experiments.benchmarks.record import RESULTS, interval, machine, write
from mbrl.mpc import MPC
from mbrl.planners import ILQR
from mbrl.problem import Box, Plan, Problem
from mbrl.symbolic import Symbolic


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = ("cart-pole", "quadrotor")
    seeds: int = 24
    steps: int = 100
    every: tuple[int, ...] = (1, 2, 5, 10, 20)
    latency: tuple[int, ...] = (0, 1, 2, 3)
    iterations: tuple[int, ...] = (3,)
    spread: float = 0.2
    seed: int = 0
    out: Path = RESULTS / "feedback"


@dataclass(frozen=True)
class Near:
    """½ Σ wᵢ (yᵢ − goalᵢ)² + ½ effort |u − rest|²; at the end the state costs `final` times as much."""

    goal: tuple[float, ...]
    weights: tuple[float, ...]
    rest: float
    effort: float
    final: float = 10.0

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self._away(y) + 0.5 * self.effort * (u - self.rest).square().sum(-1)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return self.final * self._away(y)

    def _away(self, y: Tensor) -> Tensor:
        weights, goal = torch.tensor(self.weights).to(y), torch.tensor(self.goal).to(y)
        return 0.5 * (weights * (y - goal).square()).sum(-1)


@dataclass(frozen=True)
class Case:
    """masses: which parameters vary. push: standard deviation of what a step adds to each velocity.

    fallen: the numbers of the state, and how far from the goal, that are a fall.
    """

    system: System
    cost: Near
    low: float
    high: float
    masses: tuple[str, ...]
    push: tuple[float, ...]
    fallen: tuple[tuple[int, float], ...]
    dt: float = 0.02
    horizon: int = 40


HOVER = Quadrotor()
WEIGHT = HOVER.mass * HOVER.gravity / 4
CASES = {
    "cart-pole": Case(
        CartPole(),
        Near((0.0, math.pi, 0.0, 0.0), (1.0, 10.0, 0.1, 0.1), 0.0, 0.01),
        -20.0,
        20.0,
        ("cart", "pole"),
        (0.05, 0.15),
        ((1, 0.8), (0, 2.0)),
    ),
    "quadrotor": Case(
        HOVER,
        Near((0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0), (10,) * 3 + (0,) + (4,) * 3 + (1,) * 3 + (0.1,) * 3, WEIGHT, 0.1),
        0.0,
        2 * WEIGHT,
        ("mass", "inertia", "inertia_z"),
        (0.02, 0.02, 0.02, 0.3, 0.3, 0.3),
        ((4, math.sin(math.pi / 4)), (5, math.sin(math.pi / 4)), (0, 1.0), (1, 1.0), (2, 1.0)),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WithoutGains(ILQR):
    """iLQR that keeps its gains for itself."""

    def plan(self, *given: Any, **options: Any) -> tuple[Plan, Any]:
        plan, state = super().plan(*given, **options)
        return dataclasses.replace(plan, K=None), state


def run(
    case: Case, config: Config, *, gains: bool, every: int, latency: int, iterations: int = 3
) -> dict[str, Any]:
    """One cell: all plants for all steps."""
    generator = torch.Generator().manual_seed(config.seed)
    nx, nu, M = case.system.nx, case.system.nu, config.seeds
    nv = len(case.push)
    share = 1 + config.spread * (2 * torch.rand(M, len(case.masses), generator=generator).double() - 1)
    pushes = torch.randn(config.steps, M, nv, generator=generator).double() * torch.tensor(case.push).double()
    p = case.system.p.repeat(M, 1)
    names = [f.name for f in dataclasses.fields(case.system)]  # type: ignore[arg-type]
    p[:, [names.index(name) for name in case.masses]] *= share
    plant = Discretized(case.system, case.dt, p=p)
    low, high = (torch.full((nu,), v, dtype=torch.float64) for v in (case.low, case.high))
    model = Symbolic(Discretized(case.system, case.dt))
    problem = Problem(model, case.cost, Box(low, high), case.horizon)
    policy = MPC(
        problem,
        ILQR(iterations=iterations) if gains else WithoutGains(iterations=iterations),
        estimator=Observed(),
        generator=generator,
        replan_every=every,
        latency=latency,
        safe_action=torch.full((nu,), case.cost.rest, dtype=torch.float64),
    )
    goal = torch.tensor(case.cost.goal, dtype=torch.float64)
    x = goal.repeat(M, 1)
    total, fallen, last = torch.zeros(M).double(), torch.zeros(M, dtype=torch.bool), torch.zeros(M).double()
    spent = []
    for push in pushes:
        u = policy(x)
        assert policy.report is not None
        if policy.report.plan_ms:
            spent.append(policy.report.plan_ms)
        last = torch.where(fallen, last, case.cost.stage(x, u, x, 0, None))
        total += last
        moved = plant.step(x, u, 0)
        moved = torch.cat([moved[:, : nx - nv], moved[:, nx - nv :] + push], -1)
        x = moved
        for i, limit in case.fallen:
            fallen = fallen | ~((x[:, i] - goal[i]).abs() <= limit)
        x = torch.where(fallen[:, None], goal, x)  # out of the planner's way
    n = int(fallen.sum())
    exact = scipy.stats.binomtest(n, M).proportion_ci()
    cost = (total / config.steps).tolist()
    return {
        "gains": gains,
        "every": every,
        "latency": latency,
        "iterations": iterations,
        "seeds": M,
        "cost": sum(cost) / M,
        "cost_interval": interval(cost),
        "costs": cost,
        "fallen": n,
        "fallen_interval": [exact.low, exact.high],
        "followed": policy.followed,
        "plan_ms": sorted(spent)[len(spent) // 2],
    }


def main(config: Config) -> None:
    for name in config.cases:
        tic = time.perf_counter()
        cells = [
            run(CASES[name], config, gains=gains, every=every, latency=latency, iterations=iterations)
            for iterations, every, latency, gains in itertools.product(
                config.iterations, config.every, config.latency, (True, False)
            )
        ]
        heads = (f"{what}, {arm}" for arm in ("gains", "no gains") for what in ("cost", "fallen"))
        table = Table("iterations", "replan every", "latency", *heads, title=f"{name}, {config.seeds} plants")
        for yes, no in zip(cells[::2], cells[1::2], strict=True):
            table.add_row(
                *(str(yes[key]) for key in ("iterations", "every", "latency")),
                *(text for cell in (yes, no) for text in shown(cell)),
            )
        Console(width=130).print(table)
        write(
            config.out / f"{name}.json",
            {
                "case": name,
                "cells": cells,
                "dt": CASES[name].dt,
                "horizon": CASES[name].horizon,
                "config": {"steps": config.steps, "spread": config.spread, "seed": config.seed},
                "wall_s": time.perf_counter() - tic,
                "machine": machine(),
            },
        )


def shown(cell: dict[str, Any]) -> tuple[str, str]:
    """The cost and the share of falls of a cell, each with its 95 % interval."""
    low, high = cell["cost_interval"]
    around = "" if low is None else f" [{low:.2g}, {high:.2g}]"
    few, many = (100 * share for share in cell["fallen_interval"])
    return f"{cell['cost']:.2g}{around}", f"{cell['fallen']} of {cell['seeds']} [{few:.0f} %, {many:.0f} %]"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
