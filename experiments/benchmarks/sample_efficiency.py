"""How many steps of the real world does PETS need? Against published figures.

    python -m mbrl.experiments.benchmarks.sample_efficiency --cases pets-cartpole --seeds 0 1

One training run per case and seed, in a folder of its own that is resumed where it was; one JSON result each,
written when the run is complete. Run seeds as processes side by side if there are processors for them.
The published rows are returns of training episodes (the original's curves show the best so far), so that is what
counts here: the last episode that ended within the steps, and beside it the best so far.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.experiments import pets
from mbrl.experiments.benchmarks.record import RESULTS, interval, machine, write
from mbrl.models import FitConfig
from mbrl.planners import CEM, ICEM, MPPI, SamplingPlanner


@dataclass(frozen=True)
class Case:
    """A published figure and how we try to reach it.

    Attributes:
        steps: of the real world.
        bar: the return to reach.
        planner, horizon, particles, hidden, fit, rest: of the run, see `pets.Config`.
        evaluate: judge by 10 evaluation episodes at the end instead of the training return.
    """

    env: str
    steps: int
    bar: float
    planner: SamplingPlanner[Any]
    horizon: int = 25
    particles: int = 10
    random_steps: int = 200
    hidden: tuple[int, ...] = (200, 200, 200)
    fit: FitConfig = field(default_factory=lambda: FitConfig(batch=32, epochs=30, patience=8))
    rest: float = 0.0
    evaluate: bool = False


CASES = {
    case.env: case
    for case in (
        Case(
            "pets-cartpole",
            2_400,
            180.0,
            ICEM(population=120, iterations=4, elites=12, std=0.3),
            hidden=(128, 128),
        ),
        Case(
            "Pendulum-v1",
            3_000,
            -200.0,
            ICEM(population=60, iterations=3, elites=8),
            hidden=(100, 100),
        ),
        Case(
            "InvertedPendulum-v5",
            10_000,
            1_000.0,
            MPPI(population=100, std=0.2, beta=0.0),
            horizon=15,  # random plans of a second all fall
            hidden=(100, 100),
            rest=1.0,  # or the cart drifts to the end of its rail
            evaluate=True,
        ),
        Case(
            "pets-reacher3d",
            5_000,
            -40.0,
            # on the true simulator as good as the paper's 400 x 5, for an eighth of its work
            CEM(
                population=60,
                iterations=4,
                elites=6,
                std=0.15,
                min_std=0.003,
                knot_spacing=5,
                spline="linear",
            ),
        ),
        Case("pets-pusher", 3_000, -80.0, CEM(population=100, iterations=4, elites=10)),
        Case(
            "pets-halfcheetah",
            50_000,
            4_204.0,
            CEM(population=500, iterations=5, elites=50),
            horizon=30,
            particles=20,
            random_steps=1_000,
            hidden=(200, 200, 200, 200),
            fit=FitConfig(epochs=30),
        ),
    )
}


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int | None = None
    """Stop earlier than the published figure."""
    device: str = "cpu"
    runs: Path = Path("runs", "sample-efficiency")
    out: Path = RESULTS / "sample_efficiency"
    run: bool = True


def train(case: Case, seed: int, config: Config) -> dict[str, Any]:
    """Train, or go on training, and say how well it went."""
    folder = config.runs / f"{case.env}-{seed}"
    if (folder / "config.json").exists():
        settings = dataclasses.replace(pets.config_of(folder), steps=config.steps or case.steps)
        pets.main(settings, Console(quiet=True), resume=folder)
    else:
        settings = pets.Config(
            planner=case.planner,
            env=case.env,
            steps=config.steps or case.steps,
            random_steps=case.random_steps,
            horizon=case.horizon,
            particles=case.particles,
            hidden=case.hidden,
            fit=case.fit,
            rest=case.rest,
            seed=seed,
            device=config.device,
            eval_every=(config.steps or case.steps) if case.evaluate else 0,
            out=folder,
        )
        pets.main(settings, Console(quiet=True))
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    episodes = [(int(row["step"]), float(row["return"])) for row in rows if row["kind"] == "episode"]
    evaluations = [float(row["return"]) for row in rows if row["kind"] == "evaluation"]
    return {
        "env": case.env,
        "seed": seed,
        "steps": settings.steps,
        "bar": case.bar,
        "judged_by": "evaluation" if case.evaluate else "last training episode",
        "return": evaluations[-1] if case.evaluate else episodes[-1][1],
        "best_so_far": max(total for _, total in episodes),
        "episodes": episodes,
        "wall_s": float(rows[-1]["wall_s"]),
        "settings": {**dataclasses.asdict(case), "device": config.device},
        "machine": machine(),
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    for seed in config.seeds:
        for name in config.cases:
            path = config.out / f"{name}-{config.steps or CASES[name].steps}-{seed}.json"
            if config.run and not path.exists():
                tic = time.perf_counter()
                write(path, train(CASES[name], seed, config))
                print(f"{name} seed {seed}: {time.perf_counter() - tic:.0f} s", flush=True)
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(config.out.glob("*.json")):
        result = json.loads(path.read_text())
        cells.setdefault((result["env"], result["steps"]), []).append(result)
    table = Table("world", "steps", "seeds", "return", "95 % interval", "wanted", "best so far", "wall, min")
    for (env, steps), results in cells.items():
        totals = [result["return"] for result in results]
        low, high = interval(totals)
        table.add_row(
            env,
            f"{steps:,}",
            str(len(results)),
            f"{sum(totals) / len(totals):.1f}",
            "" if low is None else f"{low:.1f} to {high:.1f}",
            f"{results[0]['bar']:g}",
            f"{sum(result['best_so_far'] for result in results) / len(results):.1f}",
            f"{sum(result['wall_s'] for result in results) / len(results) / 60:.0f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
