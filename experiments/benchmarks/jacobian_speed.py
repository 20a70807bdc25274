"""Closed-form Jacobians of learned networks against automatic differentiation: equal, and how much faster?

    python -m mbrl.experiments.benchmarks.jacobian_speed

The derivatives of y' = f(y, u) by y and u, of the mean of 1 and of 5 networks of 3 × 200 SiLU, 18 states and 6 actions, for
1, 30 and 1,000 rows at once. Against three ways of torch: `Autodiff`, which is forward mode row by row (vmap of jacfwd) and
what dynamics without derivatives of their own get; reverse mode row by row (vmap of jacrev); and one backward pass per
output through the whole batch (vmap of vjp), which knows that no row depends on another. All take turns, in float32; the
largest difference from `Autodiff`, relative to the largest derivative of the networks (that of y by itself left out), is
told in float64, of 30 rows at most.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from mbrl.derivatives import Autodiff
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import Ensemble, MeanDynamics

NY, NU, HIDDEN = 18, 6, (200, 200, 200)
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Config:
    members: tuple[int, ...] = (1, 5)
    rows: tuple[int, ...] = (1, 30, 1_000)
    seconds: float = 2.0
    """Of each side at least, and one pass."""
    threads: int = 1
    seed: int = 0
    out: Path = RESULTS / "jacobian_speed.json"


def by_rows(dynamics: MeanDynamics, x: Tensor, u: Tensor) -> Pair:
    """Reverse mode, row by row."""
    result: Pair = vmap(jacrev(lambda x, u: dynamics.step(x, u, 0), argnums=(0, 1)))(x, u)
    return result


def by_outputs(dynamics: MeanDynamics, x: Tensor, u: Tensor) -> Pair:
    """Reverse mode, of each output for all rows at once."""
    backward = vjp(lambda x, u: dynamics.step(x, u, 0), x, u)[1]
    fx, fu = vmap(backward)(torch.eye(NY).to(x)[:, None].expand(-1, len(x), -1))
    return fx.transpose(0, 1), fu.transpose(0, 1)


SIDES: dict[str, Callable[[MeanDynamics, Tensor, Tensor], Pair]] = {
    "closed form": lambda dynamics, x, u: dynamics.linearize(x, u, 0),
    "Autodiff": lambda dynamics, x, u: Autodiff(dynamics).linearize(x, u, 0),
    "vmap of jacrev": by_rows,
    "vmap of vjp": by_outputs,
}


def run(members: int, rows: int, config: Config) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(config.seed)
    model = Ensemble(NY, NU, 0.05, members=members, hidden=HIDDEN, probabilistic=False, generator=generator)
    dynamics = MeanDynamics(model.requires_grad_(False))
    x, u = (torch.randn(rows, n, generator=generator) for n in (NY, NU))
    for side in SIDES.values():
        side(dynamics, x[:1], u[:1])
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    while waiting := [name for name, spent in seconds.items() if sum(spent) < config.seconds]:
        for name in waiting:
            tic = time.perf_counter()
            SIDES[name](dynamics, x, u)
            seconds[name].append(time.perf_counter() - tic)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    model.double()
    x, u = x[:30].double(), u[:30].double()
    wanted = torch.cat(Autodiff(dynamics).linearize(x, u, 0), -1)
    got = torch.cat(dynamics.linearize(x, u, 0), -1)
    return {
        "members": members,
        "rows": rows,
        "passes": {name: len(values) for name, values in seconds.items()},
        "median_s": medians,
        "times_faster": {name: value / medians["closed form"] for name, value in medians.items()},
        "difference": float((got - wanted).abs().max() / (wanted - torch.eye(NY, NY + NU)).abs().max()),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A case as cells of a table."""
    return [
        str(row["members"]),
        f"{row['rows']:,}",
        f"{1e3 * row['median_s']['closed form']:.3g}",
        *(f"{row['times_faster'][name]:.1f}" for name in SIDES if name != "closed form"),
        f"{row['difference']:.0e}",
    ]


HEAD = ("networks", "rows", "closed form, ms", "faster than Autodiff", "than vmap of jacrev", "than vmap of vjp",
        "difference")  # fmt: skip


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    table, cases = Table(*HEAD), []
    for members in config.members:
        for rows in config.rows:
            cases.append(run(members, rows, config))
            table.add_row(*cells(cases[-1]))
    settings = {"seconds": config.seconds, "threads": config.threads, "seed": config.seed}
    write(config.out, {"cases": cases, "config": settings, "machine": machine()})
    Console(width=130).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
