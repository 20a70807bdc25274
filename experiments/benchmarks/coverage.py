"""Do 95 % intervals hold 95 % of the time? By simulation, for the statistics that comparisons report.

    python -m mbrl.experiments.benchmarks.coverage

Runs are drawn from distributions like those that returns have; the interval of their interquartile mean (or mean) should
hold what the statistic is on average. Beside ours: the plain percentile bootstrap, whose deviations are not stretched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.experiments.statistics import Array, estimate, iqm, mean

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed (log-normal, σ = 0.7)": lambda rng, size: rng.lognormal(0.0, 0.7, size=size),
    "heavy tails (t, 3 degrees)": lambda rng, size: rng.standard_t(3, size=size),
    "two modes (0 or 1, 30 to 70)": lambda rng, size: (rng.random(size) > 0.3) + 0.1 * rng.normal(size=size),
}
STATISTICS = {"interquartile mean": iqm, "mean": mean}


@dataclass(frozen=True)
class Config:
    trials: int = 2_000
    seeds: tuple[int, ...] = (5, 10, 20)
    tasks: tuple[int, ...] = (1, 6)
    resamples: int = 1_000
    seed: int = 0
    out: Path = RESULTS / "coverage.json"


def plain(strata: Array, statistic: Callable[..., Array], resamples: int, rng: np.random.Generator) -> Array:
    """The percentile bootstrap without the stretch, written by itself: (2,)."""
    tasks, n = strata.shape
    index = rng.integers(0, n, (resamples, tasks, n))
    drawn = np.take_along_axis(np.broadcast_to(strata, index.shape), index, -1)
    found: Array = np.quantile(statistic(drawn.reshape(resamples, -1), axis=-1), [0.025, 0.975])
    return found


def main(config: Config) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, draw in DISTRIBUTIONS.items():
        for which, statistic in STATISTICS.items():
            for tasks in config.tasks:
                for n in config.seeds:
                    rng = np.random.default_rng(config.seed)
                    many = draw(rng, (20_000, tasks * n))
                    truth = float(statistic(many, axis=-1).mean())
                    ours = theirs = 0
                    for _ in range(config.trials):
                        strata = draw(rng, (tasks, n))
                        found = estimate(list(strata), statistic, resamples=config.resamples)
                        assert found.low is not None and found.high is not None
                        ours += found.low <= truth <= found.high
                        low, high = plain(strata, statistic, config.resamples, rng)
                        theirs += low <= truth <= high
                    rows.append(
                        {
                            "distribution": name,
                            "statistic": which,
                            "tasks": tasks,
                            "seeds": n,
                            "coverage": ours / config.trials,
                            "plain": theirs / config.trials,
                        }
                    )
    table = Table("runs", "statistic", "tasks", "seeds", "stretched", "plain")
    for row in rows:
        table.add_row(
            row["distribution"],
            row["statistic"],
            str(row["tasks"]),
            str(row["seeds"]),
            f"{100 * row['coverage']:.1f} %",
            f"{100 * row['plain']:.1f} %",
        )
    Console().print(table)
    write(config.out, {"config": dataclasses.asdict(config), "rows": rows, "machine": machine()})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
