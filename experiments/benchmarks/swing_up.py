"""Swing-ups from 50 random starts each, with limits on the controls: does every one arrive?

    python -m mbrl.experiments.benchmarks.swing_up

DDP plans a whole swing-up at once, all starts in one batch, first from controls of zero ("unaided"), then, for the starts
that did not arrive, from `guesses` random controls each, of which the cheapest end counts. A start has arrived if every
number of its final state is within 0.05 of the goal (m, rad and per second; angles modulo 2π).
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
from rich.table import Table
from torch import Tensor

from mbrl.envs.systems import Acrobot, CartPole, Discretized, Pendulum, System
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import DDP
from mbrl.planners.noise import colored_noise
from mbrl.problem import Box, Plan, Problem
from mbrl.symbolic import Symbolic


@dataclass(frozen=True)
class Config:
    starts: int = 50
    guesses: int = 8
    seed: int = 0
    out: Path = RESULTS / "swing_up.json"


@dataclass(frozen=True)
class Case:
    """angles: which numbers of the state are angles. spread: of the random starts, in every number."""

    system: System
    goal: tuple[float, ...]
    angles: tuple[int, ...]
    limit: float
    dt: float
    horizon: int
    spread: tuple[float, ...]
    effort: float


CASES = {
    "pendulum": Case(Pendulum(), (math.pi, 0.0), (0,), 2.0, 0.05, 240, (3.0, 2.0), 0.01),
    "cart-pole": Case(
        CartPole(), (0.0, math.pi, 0.0, 0.0), (1,), 20.0, 0.04, 100, (0.5, 3.0, 0.5, 2.0), 0.001
    ),
    "acrobot": Case(
        Acrobot(), (math.pi, 0.0, 0.0, 0.0), (0, 1), 10.0, 0.05, 160, (1.0, 1.0, 0.5, 0.5), 0.001
    ),
}


@dataclass(frozen=True)
class There:
    """Effort on the way, squared distance from the goal at the end; angles by sine and cosine."""

    goal: tuple[float, ...]
    angles: tuple[int, ...]
    effort: float
    weight: float = 100.0

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.effort * u.square().sum(-1)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        away = y - torch.tensor(self.goal).to(y)
        parts = [
            2 * (1 - away[..., i].cos()) if i in self.angles else away[..., i].square()
            for i in range(len(self.goal))
        ]
        return self.weight * torch.stack(parts, -1).sum(-1)


def distance(case: Case, x: Tensor) -> Tensor:
    """The largest distance (...) of any number of x (..., nx) from the goal."""
    away = x - torch.tensor(case.goal).to(x)
    wrapped = torch.remainder(away + math.pi, 2 * math.pi) - math.pi
    angle = torch.tensor([i in case.angles for i in range(len(case.goal))])
    return torch.where(angle, wrapped, away).abs().amax(-1)


def run(case: Case, config: Config) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    limit = torch.full((case.system.nu,), case.limit, dtype=torch.float64)
    plant = Symbolic(Discretized(case.system, case.dt))
    problem = Problem(plant, There(case.goal, case.angles, case.effort), Box(-limit, limit), case.horizon)
    spread = torch.tensor(case.spread, dtype=torch.float64)
    draw = torch.rand(config.starts, len(spread), generator=generator, dtype=torch.float64)
    x0, planner = spread * (2 * draw - 1), DDP(iterations=500)

    def ends(x0: Tensor, guess: Plan | None) -> tuple[Tensor, Tensor]:
        state = planner.init(problem, x0, generator=generator, guess=guess)
        plan, _ = planner.plan(problem, x0, state, generator=generator)
        assert plan.states is not None
        return plan.cost, distance(case, plan.states[:, -1])

    tic = time.perf_counter()
    _, away = ends(x0, None)
    unaided = int((away <= 0.05).sum())
    lost = (away > 0.05).nonzero()[:, 0]
    if len(lost):
        n = config.guesses
        noise = colored_noise((len(lost) * n, case.horizon, 1), 1.5, x0, generator=generator)
        guess = Plan((0.5 * limit * noise).clamp(-limit, limit), x0.new_zeros(len(lost) * n))
        _, again = ends(x0[lost].repeat_interleave(n, 0), guess)
        away[lost] = torch.minimum(away[lost], again.view(-1, n).amin(1))
    return {
        "limit": case.limit,
        "seconds": case.dt * case.horizon,
        "starts": config.starts,
        "unaided": unaided,
        "arrived": int((away <= 0.05).sum()),
        "worst": float(away.max()),
        "wall_s": time.perf_counter() - tic,
    }


def main(config: Config) -> None:
    table = Table(
        "system", "|u| ≤", "swing-up, s", "arrived unaided", "arrived", "worst end", "wall-clock, s"
    )
    rows = {}
    for name, case in CASES.items():
        row = rows[name] = run(case, config)
        table.add_row(
            name,
            f"{row['limit']:g}",
            f"{row['seconds']:g}",
            f"{row['unaided']} of {row['starts']}",
            f"{row['arrived']} of {row['starts']}",
            f"{row['worst']:.3f}",
            f"{row['wall_s']:.1f}",
        )
    write(
        config.out,
        {"cases": rows, "config": {"seed": config.seed, "guesses": config.guesses}, "machine": machine()},
    )
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
