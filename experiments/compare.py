"""Which planner pays, on this model and task? Planners × models × worlds × seeds, at equal budgets."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from mbrl.envs import WORLDS
from mbrl.errors import ContractError, UnknownName
from mbrl.experiments.cells import ANALYTIC, RANDOM, SIMULATOR, Cell, Job, Outcome, fingerprint
from mbrl.experiments.compare_report import write_results
from mbrl.experiments.contenders import CONTENDERS
from mbrl.experiments.executors import Executor, executor_of
from mbrl.experiments.learned import load_model
from mbrl.experiments.ledger import Ledger

HORIZONS = {
    "Hopper-v5": 40,
    "Walker2d-v5": 40,
    "InvertedDoublePendulum-v5": 12,
    "acrobot": 40,
    "cart-pole": 40,
}
"""Longer where a fall or a swing takes longer to see, shorter where random plans all fall; 30 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare planners on fixed models at equal budgets; leaves report.html, results.json and cells.csv.

    What is finished is kept in the folder: the same command goes on after a kill, and a larger one adds to it.

    Attributes:
        envs: worlds, see `mbrl list`.
        models: what is planned on: simulator, analytic, and folders of learned models, each of which counts for the
            world that it was learned on.
        planners: that compete, see `mbrl list`.
        seeds: how many starts, the same for all planners.
        steps: control steps of an episode, at most.
        horizon: steps of a plan; a value that suits the world unless given.
        evaluations: steps of the model that a plan may take, a Jacobian counting as those of forward differences;
            0 leaves this half out.
        budget_ms: milliseconds that a plan may take, one problem at a time and no job beside another; 0 leaves this
            half out.
        propagation: how the uncertainty of a learned model enters: mean (the same deterministic model for all
            planners), or ts1, tsinf or moments for those that draw particles.
        particles: of each candidate plan, where they are drawn.
        batch: episodes planned together, where time does not count.
        threads: of each job.
        workers: jobs at once; 0 for as many as there are processors.
        executor: where jobs run: local processes, a Ray cluster, or SLURM.
        address: of the Ray cluster; a new one on this machine unless given.
        video: render the first episodes side by side.
        run: run what is missing; --no-run only writes the report again.
        out: the folder.
    """

    envs: tuple[str, ...] = ("cart-pole",)
    models: tuple[str, ...] = (SIMULATOR,)
    planners: tuple[str, ...] = ("random-shooting", "cem", "icem", "mppi", "ilqr")
    seeds: int = 5
    steps: int = 200
    horizon: int | None = None
    evaluations: int = 3_000
    budget_ms: float = 0.0
    propagation: Literal["mean", "ts1", "tsinf", "moments"] = "mean"
    particles: int = 5
    batch: int = 10
    threads: int = 1
    workers: int = 0
    executor: Literal["local", "ray", "slurm"] = "local"
    address: str | None = None
    video: bool = True
    run: bool = True
    out: Path = Path("runs", "compare")

    def __post_init__(self) -> None:
        for kind, names, valid in (
            ("world", self.envs, WORLDS),
            ("planner", self.planners, CONTENDERS),
        ):
            for name in names:
                if name not in valid:
                    raise UnknownName(kind, name, valid)
        for option, given in (("envs", self.envs), ("models", self.models), ("planners", self.planners)):
            twice = {name for name in given if given.count(name) > 1}
            if twice:
                raise ContractError(f"--{option} names {', '.join(sorted(twice))} twice. Name each once.")
        if not (self.envs and self.models and self.planners):
            raise ContractError(
                "A comparison needs a world, a model and a planner, but got "
                f"{len(self.envs)}, {len(self.models)} and {len(self.planners)}."
            )
        least = min(self.seeds, self.steps, self.batch, self.threads, self.particles)
        if least < 1 or self.workers < 0 or (self.horizon is not None and self.horizon < 1):
            raise ContractError(
                "A comparison needs seeds, steps, batch, threads, particles and horizon ≥ 1 and workers ≥ 0, but got "
                f"{self.seeds}, {self.steps}, {self.batch}, {self.threads}, {self.particles}, {self.horizon} and "
                f"{self.workers}."
            )
        if not (self.evaluations >= 0 and 0 <= self.budget_ms < float("inf")):
            raise ContractError(
                "A comparison needs finite evaluations and budget_ms ≥ 0, but got "
                f"{self.evaluations} and {self.budget_ms}."
            )
        if not self.evaluations and not self.budget_ms:
            raise ContractError(
                "A comparison needs a budget: --evaluations, --budget-ms, or both, but got none."
            )


def cells_of(config: Config) -> list[Cell]:
    """Every cell that is asked for: world by world, model by model, first the random policy, then the planners.

    Raises:
        CheckpointError: a model cannot be loaded.
        ContractError: a model was learned on a world that is not among those compared.
    """
    learned = [name for name in config.models if name not in (SIMULATOR, ANALYTIC)]
    models = {name: load_model(Path(name)) for name in learned}
    world_of = {name: model.world for name, model in models.items()}
    for name, world in world_of.items():
        if world is None and len(config.envs) > 1:
            raise ContractError(
                f"The model in {name} does not tell which world it was learned on, so only one of "
                f"{', '.join(config.envs)} can be compared with it. Give one --envs."
            )
        if world is not None and world not in config.envs:
            raise ContractError(
                f"The model in {name} was learned on {world}, but {', '.join(config.envs)} are compared. "
                f"Add {world} to --envs, or leave the model out."
            )
    prints = {name: fingerprint(model) for name, model in models.items()}
    for name in learned:
        same = [other for other in learned if prints[other] == prints[name]]
        if len(same) > 1:
            raise ContractError(f"{' and '.join(same)} hold the same model. Give one of them.")
    budgets: list[tuple[Literal["evaluations", "ms"], float]] = []
    if config.evaluations:
        budgets.append(("evaluations", float(config.evaluations)))
    if config.budget_ms:
        budgets.append(("ms", config.budget_ms))
    cells = []
    for env in config.envs:
        base = Cell(
            env=env,
            model=SIMULATOR,
            fingerprint=None,
            planner=RANDOM,
            budget="evaluations",
            amount=0.0,
            horizon=config.horizon or HORIZONS.get(env, 30),
            steps=config.steps,
            propagation="mean",
            particles=1,
            threads=config.threads,
        )
        cells.append(base)
        for budget, amount in budgets:
            for model in config.models:
                if model in world_of and world_of[model] not in (None, env):
                    continue
                cell = replace(base, model=model, budget=budget, amount=amount)
                if model in world_of:
                    particles = 1 if config.propagation == "mean" else config.particles
                    cell = replace(
                        cell,
                        fingerprint=prints[model],
                        propagation=config.propagation,
                        particles=particles,
                    )
                cells += [replace(cell, planner=planner) for planner in config.planners]
    return cells


def jobs_of(config: Config, cells: Sequence[Cell], ledger: Ledger) -> list[Job]:
    """What is missing. A timed cell is one job, whose episodes run one after another."""
    jobs: list[Job] = []
    for cell in cells:
        jobs += ledger.missing(cell, range(config.seeds), config.seeds if cell.timed else config.batch)
    return jobs


def main(config: Config, console: Console | None = None, *, command: Sequence[str] = ()) -> Path:
    """Run what is missing and write the report; returns the folder.

    Ctrl-C ends it at once: finished jobs are kept, those that run are lost.

    Args:
        command: as typed, for the report.

    Raises:
        ContractError: a model was learned on another world, or there is nothing to report.
    """
    console = console or Console()
    cells = cells_of(config)
    if not config.run and not config.out.is_dir():
        raise ContractError(f"There is no folder {config.out} to report on. Run the comparison first.")
    with Ledger(config.out) as ledger:
        if config.run:
            _run(config, cells, ledger, console)
        report = write_results(config, cells, ledger, command=command, console=console)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    return config.out


def _run(config: Config, cells: Sequence[Cell], ledger: Ledger, console: Console) -> None:
    jobs = jobs_of(config, cells, ledger)
    if not jobs:
        console.print("Every cell is finished.", highlight=False)
        return
    console.print(f"{len(jobs)} jobs for {len(cells)} cells -> {config.out}", highlight=False, soft_wrap=True)
    executor: Executor = executor_of(
        config.executor,
        workers=config.workers,
        threads=config.threads,
        address=config.address,
        folder=config.out,
    )
    started, done = time.monotonic(), 0
    untimed, timed = [job for job in jobs if not job.cell.timed], [job for job in jobs if job.cell.timed]
    labels = {job.key: job.label for job in jobs}
    for group, alone in ((untimed, False), (timed, True)):
        busy = os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
        if alone and group and busy and not untimed:  # else it may have been ourselves
            console.print(
                f"[yellow]The machine is busy (load {os.getloadavg()[0]:.1f}): wall-clock results will suffer.[/yellow]"
            )
        for outcome in executor.run(group, alone=alone):
            ledger.add(outcome)
            done += 1
            minutes = (time.monotonic() - started) / 60
            console.print(
                f"[dim]{done}/{len(jobs)} {minutes:.1f} min[/dim] {escape(labels[outcome.record['key']])}: "
                f"{escape(_news(outcome))}",
                highlight=False,
                soft_wrap=True,
            )


def _news(outcome: Outcome) -> str:
    """An outcome in a few words."""
    record = outcome.record
    again = f" (attempt {record['attempts']})" if "attempts" in record else ""
    for word in ("refused", "crashed"):
        if word in record:
            return f"{word}: {record[word]}{again}"
    totals = [episode["return"] for episode in record["episodes"]]
    return f"return {sum(totals) / len(totals):.1f} in {record['wall_s']:.0f} s{again}"
