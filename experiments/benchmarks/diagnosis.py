"""Four prepared models, of which it is known what is wrong with them: does `mbrl diagnose` say so?

    python -m mbrl.experiments.benchmarks.diagnosis

A good model, one fitted to 5 % of its data, one of whose outputs all members have learned wrong, and the good model
under a planner that is starved of candidates; in three worlds, with three seeds of data, weights, starts and search.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.data import Transition
from mbrl.datasets import DatasetWriter
from mbrl.envs import World, make_world
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.experiments.diagnose import Config as Diagnose
from mbrl.experiments.diagnose import diagnose
from mbrl.experiments.diagnosis_data import collect_mix
from mbrl.experiments.diagnosis_measures import labels
from mbrl.experiments.fit import json_types
from mbrl.models import Ensemble, FitConfig, Trainer, save_ensemble

CASES = {
    "good": ("fine",),
    "5 % of the data": ("model uncertain here", "model exploited"),
    "corrupted output": ("model exploited",),
    "starved planner": ("solver stuck",),
}
"""The verdicts that are right."""


@dataclass(frozen=True)
class Config:
    """
    Attributes:
        corrupted: for each world, the output whose changes are taken to be larger by one of their deviations.
        transitions: that the good model is fitted to; as many again by a fifth are held out.
        seeds: none of those, 0 to 2, that thresholds and recipe were chosen on.
        starved: candidates that the starved planner, random shooting, has.
    """

    worlds: tuple[str, ...] = ("cart-pole", "pets-cartpole", "pendulum")
    corrupted: tuple[str, ...] = ("qvel/hinge", "qvel/hinge", "qvel/hinge")
    seeds: tuple[int, ...] = (10, 11, 12)
    transitions: int = 4_000
    hidden: tuple[int, ...] = (64, 64)
    epochs: int = 80
    evaluations: int = 10_000
    horizon: int = 20
    steps: int = 20
    episodes: int = 3
    checked: int = 3
    starved: int = 22
    out: Path = RESULTS / "diagnosis.json"


def fit(world: World, rows: Transition, config: Config, seed: int, epochs: int) -> Ensemble:
    """An ensemble of the world, fitted to the rows."""
    generator = torch.Generator().manual_seed(seed)
    model = Ensemble(
        world.features.ny,
        world.actions.nu,
        world.model.opt.timestep * world.frame_skip,
        features=world.features,
        hidden=config.hidden,
        generator=generator,
    )
    trainer = Trainer(model, FitConfig(batch=64, epochs=epochs, patience=8))
    trainer.fit(rows.y, rows.u, rows.y_next, generator=generator)
    model.world = world.name
    return model


def corrupted(rows: Transition, output: int) -> Transition:
    """The rows as if this number of y had changed by one more deviation of its changes in each step."""
    y_next = rows.y_next.clone()
    y_next[:, output] += (rows.y_next - rows.y)[:, output].std()
    return dataclasses.replace(rows, y_next=y_next)


def prepare(world: World, output: str, config: Config, seed: int, folder: Path) -> Mapping[str, Path]:
    """Models, their training data and the held-out data as folders; returns where each case finds its own."""
    rows = collect_mix(world, config.transitions, config.horizon, seed=seed)
    held = collect_mix(world, config.transitions // 5, config.horizon, seed=10_000 + seed)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(rows.reward), generator=generator)[: len(rows.reward) // 20]
    data = {"good": rows, "small": rows[some], "corrupted": corrupted(rows, labels(world).index(output))}
    for name, part in {**data, "held": held}.items():
        with DatasetWriter(folder / f"{name} data", {"world": world.name}) as writer:
            writer.append(
                dataclasses.replace(part, episode=torch.arange(len(part.reward))) if name == "small" else part
            )
    for name, part in data.items():
        epochs = 4 * config.epochs if name == "small" else config.epochs
        save_ensemble(folder / name, fit(world, part, config, seed, epochs))
    return dict(zip(CASES, (folder / name for name in ("good", "small", "corrupted", "good")), strict=True))


def run(world: World, case: str, folder: Path, config: Config, seed: int) -> dict[str, Any]:
    """The verdict on one case, and the numbers behind it."""
    from mbrl.experiments.learned import load_model

    starved = case == "starved planner"
    particles = 5
    budget = config.starved * config.horizon * particles + 2 * config.horizon * particles
    planner = "random-shooting" if starved else "icem"
    settings = Diagnose(
        folder=folder,
        planners=(planner,),
        evaluations=budget if starved else config.evaluations,
        horizon=config.horizon,
        steps=config.steps,
        seeds=config.episodes,
        seed=100 * seed,
        checked=config.checked,
        particles=particles,
        held_out=folder.parent / "held data",
        training=folder.parent / f"{folder.name} data",
    )
    tic = time.perf_counter()
    quiet = Console(quiet=True)
    found = diagnose(settings, load_model(folder), world, quiet)
    finding = found.findings[planner]
    return {
        "world": world.name,
        "case": case,
        "seed": seed,
        "verdict": finding.verdict.name,
        "right": finding.verdict.name in CASES[case],
        "why": finding.verdict.why,
        "evidence": dataclasses.asdict(finding.evidence),
        "returns": finding.trial.returns,
        "returns_on_simulator": finding.trial.on_simulator,
        "random": found.random,
        "wall_s": round(time.perf_counter() - tic, 1),
    }


def summary(content: Mapping[str, Any]) -> str:
    """The results as a table in Markdown: of each case how often the verdict is right, and the ranges of its numbers."""
    lines = [
        "| world | model and planner | verdict | imagined − realised | solver's part | model's part | inside 95 % |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in content["results"]:
        groups.setdefault((result["world"], result["case"]), []).append(result)
    for (world, case), results in groups.items():
        counts = Counter(result["verdict"] for result in results)
        verdicts = ", ".join(f"{name} {n} of {len(results)}" for name, n in counts.most_common())
        ranges = []
        for key in ("gap", "solver", "model", "coverage"):
            values = [result["evidence"][key] for result in results]
            ranges.append(f"{min(values) + 0.0:.2f} to {max(values):.2f}".replace("-0.00", "0.00"))
        lines.append(f"| {world} | {case} | {verdicts} | {' | '.join(ranges)} |")
    right = sum(result["right"] for result in content["results"])
    lines += ["", f"{right} of {len(content['results'])} verdicts are right."]
    return "\n".join(lines)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    console = Console()
    table = Table("world", "case", "seed", "verdict", "gap", "solver", "model", "inside 95 %", "worst output")
    tic, busy = time.perf_counter(), time.process_time()
    for name, output in zip(config.worlds, config.corrupted, strict=True):
        world = make_world(name)
        for seed in config.seeds:
            with tempfile.TemporaryDirectory() as folder:
                for case, model in prepare(world, output, config, seed, Path(folder)).items():
                    result = run(world, case, model, config, seed)
                    if case == "corrupted output":
                        result["right"] &= result["evidence"]["worst"] == output
                    results.append(result)
                    e = result["evidence"]
                    verdict = result["verdict"] if result["right"] else f"[red]{result['verdict']}[/red]"
                    parts = (f"{e[key]:.2f}" for key in ("gap", "solver", "model", "coverage"))
                    table.add_row(name, case, str(seed), verdict, *parts, e["worst"])
                    console.print(f"{name}, {case}, seed {seed}: {verdict}", highlight=False)
                _write(config, results, tic, busy)
    console.print(table)
    right = sum(result["right"] for result in results)
    console.print(
        f"{right} of {len(results)} verdicts are right; {time.process_time() - busy:.0f} s of processor time."
    )


def _write(config: Config, results: list[dict[str, Any]], tic: float, busy: float) -> None:
    seconds = {"wall_s": time.perf_counter() - tic, "cpu_s": time.process_time() - busy}
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "out"}
    write(config.out, {"results": json_types(results), **seconds, "config": settings, "machine": machine()})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
