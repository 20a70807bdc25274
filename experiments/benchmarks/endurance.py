"""Does the best planner keep its robot up, at the budget that this takes?

    python -m mbrl.experiments.benchmarks.endurance [--cases Hopper-v5]

Hopper, Walker2d, Ant and Humanoid for 500 control steps, the inverted double pendulum for 1,000. One
JSON file per case and seed; what is there is not run again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.experiments.benchmarks import returns
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import CEM, ICEM, MPPI, SamplingPlanner

# World -> planner, horizon and control steps.
CASES: dict[str, tuple[SamplingPlanner[Any], int, int]] = {
    "InvertedDoublePendulum-v5": (MPPI(), 30, 1_000),
    "Hopper-v5": (ICEM(), 40, 500),
    "Walker2d-v5": (ICEM(), 40, 500),
    "Ant-v5": (CEM(population=20, iterations=2, elites=4), 15, 500),
    "Humanoid-v5": (ICEM(), 30, 500),
}


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] = (0,)
    threads: int = 0
    out: Path = RESULTS / "endurance"


def main(config: Config) -> None:
    torch.set_num_threads(1)
    for seed in config.seeds:
        for name in config.cases:
            path = config.out / f"{name}-{seed}.json"
            if path.exists():
                continue
            planner, horizon, steps = CASES[name]
            result = returns.episode(
                name, planner, seed, steps=steps, horizon=horizon, threads=config.threads
            )
            result |= {"env": name, "seed": seed, "horizon": horizon, "wanted_steps": steps}
            result |= {"planner": type(planner).__name__, "settings": dataclasses.asdict(planner)}
            write(path, {**result, "machine": machine()})
    table = Table("world", "seed", "steps", "fell", "return", "planner", "model steps", "plan, ms")
    for path in sorted(config.out.glob("*.json")):
        result = json.loads(path.read_text())
        table.add_row(
            result["env"],
            str(result["seed"]),
            f"{result['steps']} of {result['wanted_steps']}",
            "yes" if result["terminated"] else "no",
            f"{result['return']:.0f}",
            f"{result['planner']}, horizon {result['horizon']}",
            f"{result['model_steps_per_plan']:,.0f}",
            f"{result['plan_ms']['median']:.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
