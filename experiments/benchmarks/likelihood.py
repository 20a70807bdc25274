"""What the exponent β of the likelihood's weights is worth, on the data of PETS worlds.

    python -m mbrl.experiments.benchmarks.likelihood

Random steps of each world; a fifth is held out. β = 0 is the likelihood alone, as PETS and MBPO use it; see `FitConfig`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.collect import Collector
from mbrl.data import Transition
from mbrl.envs import make_training_world
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import Ensemble, FitConfig, Trainer, calibrate
from mbrl.policies import RandomPolicy
from mbrl.protocols import TrainingWorld
from mbrl.resumable import vectorize


@dataclass(frozen=True)
class Config:
    worlds: tuple[str, ...] = ("pets-cartpole", "Pendulum-v1", "pets-reacher3d")
    betas: tuple[float, ...] = (0.0, 0.5, 1.0)
    steps: int = 1_000
    seeds: int = 3
    hidden: tuple[int, ...] = (100, 100)
    epochs: int = 50
    out: Path = RESULTS / "likelihood.json"


def collect(world: TrainingWorld, steps: int, seed: int) -> Transition:
    generator = torch.Generator().manual_seed(seed)
    babble = RandomPolicy(world.actions, generator=generator)
    envs = vectorize(world.make, 10)
    rows = Collector(envs, babble, output=world.measure, seed=seed).collect(steps // 10).transition
    envs.close()
    return rows.to("cpu", torch.float32)


def measure(
    world: TrainingWorld, rows: Transition, beta: float, config: Config, seed: int
) -> tuple[float, float]:
    """Root mean squared error of the members' mean, in deviations of the targets, and log-likelihood loss (NLL)."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows.reward), generator=generator)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = Ensemble(
        rows.y.shape[-1],
        rows.u.shape[-1],
        1.0,  # of no concern here
        features=world.features,
        hidden=config.hidden,
        generator=generator,
    )
    fit = FitConfig(batch=32, epochs=config.epochs, patience=8, beta=beta)
    Trainer(model, fit).fit(rows.y[train], rows.u[train], rows.y_next[train], generator=generator)
    said = calibrate(model, rows.y[test], rows.u[test], rows.y_next[test])
    with torch.no_grad():
        change = model.predict(rows.y[test], rows.u[test]).change.mean(0)
    error = (change - world.features.targets(rows.y[test], rows.y_next[test])) / model.target_scale
    return float((error**2).mean().sqrt()), said.nll


def main(config: Config) -> None:
    torch.set_num_threads(1)
    table = Table("world", "β", "error", "NLL")
    results = []
    for name in config.worlds:
        world = make_training_world(name)
        data = [collect(world, config.steps, seed) for seed in range(config.seeds)]
        for beta in config.betas:
            found = [measure(world, rows, beta, config, seed) for seed, rows in enumerate(data)]
            error, nll = (sum(column) / len(column) for column in zip(*found, strict=True))
            results.append({"world": name, "beta": beta, "error": error, "nll": nll, "found": found})
            table.add_row(name, f"{beta:g}", f"{error:.4f}", f"{nll:.2f}")
    Console().print(table)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
    write(config.out, {"results": results, "config": settings, "machine": machine()})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
