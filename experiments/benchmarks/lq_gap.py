"""Every sampling planner approaches the Riccati optimum of a linear-quadratic problem as its budget grows.

    python -m mbrl.experiments.benchmarks.lq_gap

A double integrator over 8 steps of 0.1 s, with ½ (p² + 0.1 v² + 0.01 u²) per step and 5 (p² + 0.1 v²) at the end; the relative gap (J − J*) / J* of one cold plan, median over 20 starts,
against the number of candidates. Writes JSON and docs/lq_gap.svg.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.envs.systems import Discretized, DoubleIntegrator
from mbrl.experiments.benchmarks.ilqr_speed import Quadratic, bounded_lq, box, lq_matrices
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import CEM, CMAES, ICEM, MPPI, PredictiveSampling, RandomShooting, SamplingPlanner
from mbrl.planners.lqr import finite_lqr
from mbrl.problem import Problem


def riccati(problem: Problem[Any, Quadratic, Any], x0: Tensor) -> tuple[Tensor, float]:
    """The optimal cost (M,) from x0 (M, nx) without bounds, and the largest control that it takes."""
    A, B, Q, R, final = (torch.tensor(m, dtype=torch.float64) for m in lq_matrices(problem).values())
    H = problem.horizon
    regulator = finite_lqr(A, B, Q, R, horizon=H, final=final)
    x, largest = x0, 0.0
    for t in range(H):
        u = regulator.act(x, t)
        x, largest = problem.dynamics.step(x, u, t), max(largest, float(u.abs().max()))
    return regulator.value(x0, 0), largest


def planners_at(candidates: int) -> dict[str, SamplingPlanner[Any]]:
    """Every planner with `candidates` candidates in all, in the way that suits it."""
    rounds = max(3, round(candidates**0.5 / 3))
    per_round = candidates // rounds
    elites = max(2, per_round // 6)
    return {
        "random shooting": RandomShooting(population=candidates),
        "CEM": CEM(population=per_round, iterations=rounds, elites=elites, min_std=0.0),
        "iCEM": ICEM(population=per_round, iterations=rounds, elites=elites, decay=1.0, beta=0.0),
        "MPPI": MPPI(population=per_round, iterations=rounds, std=0.1, beta=0.0),
        "predictive sampling": PredictiveSampling(
            population=per_round, iterations=rounds, knot_spacing=1, std=0.05, wide_std=0.2
        ),
        "CMA-ES": CMAES(population=per_round, iterations=rounds, knot_spacing=1),
    }


@dataclass(frozen=True)
class Config:
    budgets: tuple[int, ...] = (30, 100, 300, 1_000, 3_000, 10_000, 30_000)
    horizon: int = 8
    starts: int = 20
    seed: int = 0
    plot: Path = Path("docs/lq_gap.svg")


def gaps(config: Config) -> dict[str, list[float]]:
    """Median relative gap of each planner at each budget."""
    generator = torch.Generator().manual_seed(config.seed)
    x0 = torch.randn(config.starts, 2, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5)
    plant = Discretized(DoubleIntegrator(), 0.1)
    free = Problem(plant, bounded_lq().cost, box(1, torch.inf), config.horizon)
    optimum, largest = riccati(free, x0)
    # Bounds so wide that the optimum lies inside: the Riccati solution knows none.
    problem = dataclasses.replace(free, actions=box(1, 1.05 * largest))
    result: dict[str, list[float]] = {name: [] for name in planners_at(config.budgets[0])}
    for budget in config.budgets:
        for name, planner in planners_at(budget).items():
            state = planner.init(problem, x0, generator=generator)
            plan, _ = planner.plan(problem, x0, state, generator=generator)
            result[name].append(float(((plan.cost - optimum) / optimum).median()))
    return result


def main(config: Config) -> None:
    torch.set_num_threads(1)
    result = gaps(config)
    table = Table("planner", *(f"{budget:,}" for budget in config.budgets))
    for name, values in result.items():
        table.add_row(name, *(f"{value:.1e}" for value in values))
    Console(width=120).print(table)
    write(
        RESULTS / "lq_gap.json",
        {"config": dataclasses.asdict(config), "machine": machine(), "median_relative_gap": result},
    )
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, values in result.items():
        axes.loglog(config.budgets, values, marker="o", markersize=4, label=name)
    axes.set(xlabel="candidates in one plan", ylabel="(J − J*) / J*, median of 20 starts")
    axes.set_title("Sampling planners against the Riccati optimum", loc="left")
    axes.set_ylim(bottom=1e-9)  # below it the rounding of the costs shows
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(config.plot)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
