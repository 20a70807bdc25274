"""How many episodes until a sparse goal is found? Thompson sampling and a bonus against noise on the actions.

    python -m mbrl.experiments.benchmarks.exploration     # 40 seeds, table

A boat in a lagoon; the only reward is on an island out at sea, and random thrust drifts back to where it came from,
`Lagoon` in boats.py. After each episode the ensemble is fitted to all that was seen. The planner and the networks
are the same for all; the arms differ in how they leave what they know:

* noise: with probability 0.3 a step's action is uniformly random;
* Thompson: each episode is planned on one member, another each time;
* bonus: the cost of a step falls by twice the members' disagreement.

One JSON per arm and seed; a file that is there is not run again. Of the 40 seeds, 20 were run first and gave the same
order of the arms; p is of all.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from mbrl.estimators import Observed, Padded
from mbrl.experiments.benchmarks.boats import THRUST, Drive, Lagoon, LagoonCost, drive
from mbrl.experiments.benchmarks.record import RESULTS, interval, machine, write
from mbrl.models import (
    DisagreementCost,
    Ensemble,
    FitConfig,
    Thompson,
    Trainer,
    TSInf,
    WithDisagreement,
)
from mbrl.mpc import MPC
from mbrl.planners import ICEM
from mbrl.problem import Problem

ARMS = ("noise", "Thompson", "bonus")
NOISY, BONUS = 0.3, 2.0

Policy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    seeds: int = 40
    episodes: int = 12
    """After the random one; who has not found the goal by then counts with one more."""
    steps: int = 30
    horizon: int = 16
    particles: int = 10
    planner: ICEM = field(
        default_factory=lambda: ICEM(
            population=100, iterations=3, elites=10, knot_spacing=5, spline="linear", std=1.0, beta=0.0
        )
    )
    out: Path = RESULTS / "exploration"


def explore(world: Lagoon, arm: str, seed: int, config: Config) -> dict[str, Any]:
    """Episodes until the goal was reached, None if it never was."""
    generator = torch.Generator().manual_seed(seed)
    model = Ensemble(2, 2, world.dt, members=5, hidden=(32, 32), generator=generator)
    trainer = Trainer(model, FitConfig(batch=32, epochs=60, learning_rate=3e-3, patience=10, decays=(1e-5,)))
    seen = [episode(world, lambda x: uniform(generator), config, generator)]
    tic = time.perf_counter()
    found = None
    for number in range(1, config.episodes + 1):
        y, u, y_next = (torch.cat(column) for column in zip(*seen, strict=True))
        trainer.fit(y, u, y_next, generator=generator)
        seen.append(episode(world, planned(world, model, arm, config, generator), config, generator))
        if world.arrived(seen[-1][2]).any():
            found = number
            break
    return {"arm": arm, "seed": seed, "found": found, "wall_s": time.perf_counter() - tic}


def episode(world: Lagoon, policy: Policy, config: Config, generator: Generator) -> Drive:
    start = 0.05 * torch.randn(1, 2, generator=generator)
    return drive(world, start, policy, config.steps, world.arrived, generator=generator)


def uniform(generator: Generator) -> Tensor:
    return 2 * torch.rand(1, 2, generator=generator) - 1


def planned(world: Lagoon, model: Ensemble, arm: str, config: Config, generator: Generator) -> Policy:
    """The policy of one episode."""
    cost = LagoonCost(world)
    estimator = Observed(torch.float32)
    shape: dict[str, Any] = {"horizon": config.horizon, "particles": config.particles}
    if arm == "bonus":
        way = WithDisagreement(TSInf(model))
        problem: Problem[Any, Any, Any] = Problem(way, DisagreementCost(cost, -BONUS), THRUST, **shape)
        return MPC(problem, config.planner, estimator=Padded(estimator), generator=generator, replan_every=2)
    member = Thompson.draw(model, generator=generator) if arm == "Thompson" else TSInf(model)
    problem = Problem(member, cost, THRUST, **shape)
    mpc = MPC(problem, config.planner, estimator=estimator, generator=generator, replan_every=2)
    if arm == "Thompson":
        return mpc

    def noisy(x: Tensor) -> Tensor:
        action = mpc(x)
        return uniform(generator) if float(torch.rand(1, generator=generator)) < NOISY else action

    return noisy


def summarise(config: Config) -> list[dict[str, Any]]:
    """Mean episodes to the goal of each arm, and whether they are fewer than with noise."""
    found: dict[str, list[int | None]] = {arm: [] for arm in ARMS}
    for seed in range(config.seeds):
        paths = [config.out / f"{arm}-{seed}.json" for arm in ARMS]
        if all(path.exists() for path in paths):  # the same seeds for all
            for arm, path in zip(ARMS, paths, strict=True):
                found[arm].append(json.loads(path.read_text())["found"])
    rows = []
    for arm, values in found.items():
        if not values:
            continue
        counted = [config.episodes + 1 if v is None else v for v in values]
        noise = [config.episodes + 1 if v is None else v for v in found["noise"]]
        p = scipy.stats.mannwhitneyu(counted, noise, alternative="two-sided").pvalue if noise else np.nan
        low, high = interval(counted)
        rows.append(
            {
                "arm": arm,
                "seeds": len(values),
                "found": sum(v is not None for v in values),
                "mean": float(np.mean(counted)),
                "low": low,
                "high": high,
                "p": float(p),
            }
        )
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    world = Lagoon()
    for seed in range(config.seeds):
        for arm in ARMS:
            path = config.out / f"{arm}-{seed}.json"
            if not path.exists():
                settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
                write(path, {**explore(world, arm, seed, config), "config": settings, "machine": machine()})
    table = Table("explores by", "goal found", "episodes to it", "p against noise")
    for row in summarise(config):
        table.add_row(
            row["arm"],
            f"{row['found']} of {row['seeds']}",
            f"{row['mean']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            f"{row['p']:.2g}",
        )
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
