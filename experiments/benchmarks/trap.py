"""Does planning with uncertainty pay? A trap that the data does not cover.

    python -m mbrl.experiments.benchmarks.trap            # 20 seeds, table, picture

A boat wants to go east; the short way leads through a whirlpool, `Strait` in boats.py. The data went around, so an
ensemble knows nothing of the whirlpool, only that it has not been there. One ensemble per seed; every planner is the
same and gets the same models, starts and noise: only the risk, or the price of disagreement, differs.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy.stats
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mbrl.estimators import Observed, Padded
from mbrl.experiments.benchmarks.boats import THRUST, Strait, StraitCost, drive
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import DisagreementCost, Ensemble, FitConfig, Trainer, TSInf, WithDisagreement
from mbrl.mpc import MPC
from mbrl.planners import ICEM
from mbrl.problem import Problem
from mbrl.protocols import Estimator
from mbrl.risk import CVaR, Mean, MeanStd, Optimistic, Risk, Worst

ARMS: dict[str, Risk | float] = {
    "mean": Mean(),
    "mean + 3 deviations": MeanStd(3.0),
    "worst 20 %": CVaR(0.2),
    "worst case": Worst(),
    "price of disagreement 20": 20.0,
    "best 20 %": Optimistic(0.2),
    "mean - 2 deviations": MeanStd(-2.0),
}
"""The risk, or the price per unit of disagreement at mean risk."""


@dataclass(frozen=True)
class Config:
    seeds: int = 20
    steps: int = 45
    horizon: int = 16
    particles: int = 10
    planner: ICEM = field(
        default_factory=lambda: ICEM(
            population=64, iterations=3, elites=8, knot_spacing=3, spline="linear", std=1.0, beta=0.0
        )
    )
    out: Path = RESULTS / "trap.json"
    picture: Path = Path("docs/trap.png")


def learn(world: Strait, seed: int) -> Ensemble:
    """Five networks fitted to drives around the reef."""
    generator = torch.Generator().manual_seed(seed)
    y, u, y_next = world.data(generator=generator)
    model = Ensemble(2, 2, world.dt, members=5, hidden=(64, 64), generator=generator)
    config = FitConfig(batch=64, epochs=80, learning_rate=3e-3, patience=15, decays=(1e-5,))
    Trainer(model, config).fit(y, u, y_next, generator=generator)
    return model


def sail(world: Strait, model: Ensemble, arm: str, seed: int, config: Config) -> dict[str, Any]:
    """One episode in the true world, planned on the model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.tensor([world.start]) + 0.05 * torch.randn(1, 2, generator=generator)
    problem: Problem[Any, Any, Any]
    risk = ARMS[arm]
    estimator: Estimator = Observed(torch.float32)
    if isinstance(risk, float):
        problem = Problem(
            WithDisagreement(TSInf(model)),
            DisagreementCost(StraitCost(world), risk),
            THRUST,
            config.horizon,
            particles=config.particles,
        )
        estimator = Padded(estimator)
    else:
        problem = Problem(
            TSInf(model), StraitCost(world), THRUST, config.horizon, particles=config.particles, risk=risk
        )
    mpc = MPC(problem, config.planner, estimator=estimator, generator=generator, replan_every=2)
    tic = time.perf_counter()
    path, _, ends = drive(
        world, x, mpc, config.steps, lambda p: world.trapped(p) | world.arrived(p), generator=generator
    )
    return {
        "trapped": bool(world.trapped(ends).any()),
        "arrived": bool(world.arrived(ends).any()),
        "steps": len(ends),
        "path": torch.cat([path[:1], ends]).tolist(),
        "wall_s": time.perf_counter() - tic,
    }


def draw(world: Strait, model: Ensemble, results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The disagreement of one seed's members over the map, and every seed's way for four planners."""
    axis_x, axis_y = torch.linspace(-1.6, 1.6, 161), torch.linspace(-0.8, 1.4, 111)
    p = torch.cartesian_prod(axis_x, axis_y)
    with torch.no_grad():
        said = model.predict(p, torch.zeros_like(p)).change / model.target_scale
    disagreement = said.var(0, correction=0).mean(-1).sqrt().view(161, 111).T
    shown = ("mean", "mean + 3 deviations", "worst case", "best 20 %")
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    for ax, arm in zip(figure.subplots(2, 2).flat, shown, strict=True):
        image = ax.pcolormesh(axis_x, axis_y, disagreement, cmap="Greys", vmin=0, rasterized=True)
        ax.contourf(
            axis_x, axis_y, world.reef(p).view(161, 111).T, levels=[0.5, 1], colors=["#b58b5a"], alpha=0.8
        )
        angle = torch.linspace(0, 2 * torch.pi, 60)
        ax.fill(world.reach * angle.cos(), world.reach * angle.sin(), color="#c03030", alpha=0.8)
        for result in results[arm]:
            xs, ys = zip(*result["path"], strict=True)
            ax.plot(xs, ys, color="#c03030" if result["trapped"] else "#1f6fb4", linewidth=1, alpha=0.8)
        ax.plot(*world.goal, "*", color="#2a8a3a", markersize=14)
        ax.plot(*world.start, "o", color="black", markersize=5)
        caught = sum(result["trapped"] for result in results[arm])
        ax.set_title(f"{arm}: {caught} of {len(results[arm])} in the whirlpool", loc="left")
        ax.set(xlim=(-1.6, 1.6), ylim=(-0.8, 1.4), aspect="equal")
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="disagreement of the members (one seed's model)")
    figure.savefig(path, dpi=110)


def against_mean(results: dict[str, list[dict[str, Any]]], arm: str) -> float:
    """Two-sided exact p of McNemar's test that an arm is trapped as often as planning for the mean."""
    pairs = [(a["trapped"], b["trapped"]) for a, b in zip(results["mean"], results[arm], strict=True)]
    only_mean, only_arm = pairs.count((True, False)), pairs.count((False, True))
    if only_mean + only_arm == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_mean, only_mean + only_arm).pvalue)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    world = Strait()
    models = [learn(world, seed) for seed in range(config.seeds)]
    results: dict[str, list[dict[str, Any]]] = {}
    table = Table("planned for", "trapped", "arrived", "p against the mean")
    for arm in ARMS:
        results[arm] = [sail(world, model, arm, seed, config) for seed, model in enumerate(models)]
        trapped, arrived = (sum(r[key] for r in results[arm]) for key in ("trapped", "arrived"))
        table.add_row(
            arm,
            f"{trapped} of {config.seeds}",
            f"{arrived} of {config.seeds}",
            "" if arm == "mean" else f"{against_mean(results, arm):.2g}",
        )
    Console().print(table)
    summary = [
        {
            "arm": arm,
            "seeds": config.seeds,
            "trapped": sum(r["trapped"] for r in runs),
            "arrived": sum(r["arrived"] for r in runs),
            "p": against_mean(results, arm),
        }
        for arm, runs in results.items()
    ]
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "picture")}
    write(config.out, {"arms": summary, "episodes": results, "config": settings, "machine": machine()})
    draw(world, models[0], results, config.picture)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
