"""Which planner pays on which model? Ten planners, seven tasks, three kinds of model, ten seeds, two kinds of budget.

    python -m mbrl.experiments.benchmarks.headline                 # about 6 hours on 2 processors, goes on after a kill
    python -m mbrl.experiments.benchmarks.headline --no-run        # only the table, the page and the figure

The learned models are made first, from data that are recorded here: `gather` and `mbrl fit`. Everything is kept in
runs/headline; what is finished is not done again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import make_world
from mbrl.experiments import compare, fit
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.experiments.contenders import CONTENDERS
from mbrl.experiments.gather import gather
from mbrl.models import FitConfig

SMALL, LARGE = (200, 200), (200, 200, 200)
LEARNED: dict[str, tuple[int, tuple[int, ...]]] = {
    "pendulum": (6_000, SMALL),
    "cart-pole": (12_000, SMALL),
    "acrobot": (18_000, SMALL),
    "Reacher-v5": (12_000, SMALL),
    "Hopper-v5": (24_000, LARGE),
    "HalfCheetah-v5": (24_000, LARGE),
}
"""Transitions to learn from, and the nets."""
PLANNERS = tuple(name for name in CONTENDERS if name != "fddp")
"""FDDP without a guess of states is iLQR."""


@dataclass(frozen=True)
class Config:
    envs: tuple[str, ...] = ("double-integrator", *LEARNED)
    seeds: int = 10
    steps: int = 200
    evaluations: int = 3_000
    budget_ms: float = 20.0
    workers: int = 0
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=60))
    out: Path = Path("runs", "headline")
    result: Path = RESULTS / "headline.json"
    only_models: bool = False
    """Stop when the models are learned."""
    run: bool = True


def learn(env: str, config: Config, console: Console) -> Path:
    """The folder of the world's model, which is recorded and fitted unless it is there."""
    transitions, hidden = LEARNED[env]
    folder = config.out / "models" / env
    if not (folder / "report.json").exists():
        console.print(f"{env}: {transitions:,} transitions, then a fit", highlight=False)
        horizon = compare.HORIZONS.get(env, 30)
        data = gather(make_world(env), config.out / "data" / env, transitions, horizon=horizon)
        if not (folder / "model").exists():
            fit.main(fit.Config(dataset=data, out=folder, hidden=hidden, fit=config.fit), Console(quiet=True))
    return folder


def settings(config: Config, models: tuple[str, ...]) -> compare.Config:
    return compare.Config(
        envs=config.envs,
        models=("simulator", "analytic", *models),
        planners=PLANNERS,
        seeds=config.seeds,
        steps=config.steps,
        evaluations=config.evaluations,
        budget_ms=config.budget_ms,
        workers=config.workers,
        run=config.run,
        out=config.out,
    )


def main(config: Config) -> None:
    torch.set_num_threads(1)
    console = Console()
    wanted = [env for env in config.envs if env in LEARNED]
    folders = [
        str(learn(env, config, console) if config.run else config.out / "models" / env) for env in wanted
    ]
    if config.only_models:
        return
    command = ["python", "-m", "mbrl.experiments.benchmarks.headline"]
    compare.main(settings(config, tuple(folders)), console, command=command)
    results = json.loads((config.out / "results.json").read_text())
    write(config.result, results | {"machine": machine()})
    for budget in ("evaluations", "ms"):
        kinds = ("simulator", "analytic", "learned")
        table = Table("planner", *kinds, title=f"Interquartile mean of normalised scores, budget in {budget}")
        for planner in PLANNERS:
            found = {
                s["model"]: s for s in results["scores"] if (s["planner"], s["budget"]) == (planner, budget)
            }
            table.add_row(planner, *(_words(found.get(kind)) for kind in kinds))
        console.print(table)


def _words(score: dict[str, float] | None) -> str:
    if score is None:
        return ""
    spread = "" if score["low"] is None else f" [{score['low']:.2f}, {score['high']:.2f}]"
    return f"{score['value']:.2f}{spread} ({score['tasks']:.0f})"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
