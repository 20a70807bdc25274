"""Legged robots with the settings recommended for them: do they walk, do they get up, and how fast is it?

    python -m mbrl.experiments.benchmarks.legged                     # runs what is missing, then prints the table
    python -m mbrl.experiments.benchmarks.legged --cases pup-walk --seeds 0 1

One JSON file per case and seed; a file that is there is not run again. Planning runs on the world's
planning model, the episode on the plant.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import World, make_world
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import MPPI


@dataclass(frozen=True)
class Case:
    """A world and the settings recommended for it.

    Attributes:
        planner: what plans.
        horizon: control steps of 20 ms.
        steps: of the episode.
        seeds: of the environment and the planner.
    """

    planner: MPPI
    horizon: int
    steps: int
    seeds: tuple[int, ...]


# Knots every 0.1 s: a sampled plan is then smooth enough for legs, and has few numbers to search.
_KNOTS: dict[str, Any] = {"knot_spacing": 5, "spline": "linear", "beta": 0.0}
CASES = {
    "pup-walk": Case(MPPI(population=40, std=0.3, **_KNOTS), horizon=20, steps=500, seeds=(0, 1, 2, 3, 4)),
    "go2-walk": Case(MPPI(population=40, std=0.3, **_KNOTS), horizon=20, steps=500, seeds=(0, 1, 2)),
    "go2-stand-up": Case(
        MPPI(population=40, std=0.4, **_KNOTS), horizon=25, steps=150, seeds=(0, 1, 2, 3, 4)
    ),
}
TOLERANCE = 0.15  # m/s, of the mean velocity


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] | None = None
    """All of a case, unless given."""
    threads: int = 2
    folder: Path = RESULTS / "legged"
    run: bool = True


def episode(world: World, case: Case, seed: int, threads: int) -> dict[str, Any]:
    """What happened in one episode on the plant."""
    problem = world.problem(case.horizon, threads=threads)
    generator = torch.Generator().manual_seed(seed)
    mpc = MPC(problem, case.planner, estimator=FullState(), generator=generator)
    env = world.make()
    obs, info = env.reset(seed=seed)
    data: Any = env.unwrapped.data  # type: ignore[attr-defined]
    plan_ms, positions, upright, rewards = [], [data.qpos[:3].copy()], [], []
    fell = False
    started = time.perf_counter()
    for _ in range(case.steps):
        action = mpc(torch.as_tensor(obs), info)[0].numpy()
        assert mpc.report is not None
        plan_ms.append(mpc.report.plan_ms)
        obs, reward, fell, _, info = env.step(action)
        rewards.append(float(reward))
        positions.append(data.qpos[:3].copy())
        upright.append(float(data.xmat[world.model.jnt_bodyid[0], 8]))
        if fell or info["diverged"]:
            break
    wall = time.perf_counter() - started
    path = np.array(positions)
    seconds = len(rewards) * problem.dynamics.dt
    velocity = float((path[-1, 0] - path[0, 0]) / seconds)
    whole = len(rewards) == case.steps and not fell and not info["diverged"]
    task: Any = world.task
    if hasattr(task, "speed"):
        success = whole and abs(velocity - task.speed) <= TOLERANCE
    else:  # stands for the last half second
        success = whole and path[-25:, 2].min() > 0.85 * task.height and min(upright[-25:]) > 0.95
    return {
        "success": bool(success),
        "fell": bool(fell),
        "seconds": seconds,
        "mean_velocity": velocity,
        "sideways": float(path[-1, 1]),
        "min_height": float(path[:, 2].min()),
        "end_height": float(path[-25:, 2].mean()),
        "end_upright": min(upright[-25:]),
        "mean_reward": float(np.mean(rewards)),
        "plan_ms_median": float(np.median(plan_ms)),
        "real_time_factor": seconds / wall,
    }


def run(config: Config, console: Console) -> None:
    for name in config.cases:
        case = CASES[name]
        world = make_world(name)
        for seed in config.seeds or case.seeds:
            path = config.folder / f"{name}-{seed}.json"
            if path.exists():
                continue
            before = machine()
            result = {
                "case": name,
                "seed": seed,
                **episode(world, case, seed, config.threads),
                "planner": {"type": type(case.planner).__name__, **dataclasses.asdict(case.planner)},
                "horizon": case.horizon,
                "planning_timestep": (world.planning_model or world.model).opt.timestep,
                "plant_timestep": world.model.opt.timestep,
                "simulation_threads": config.threads,
                "machine": {**machine(), "load_before": before["load"]},
            }
            write(path, result)
            console.print(
                f"{name} seed {seed}: success {result['success']}, {result['mean_velocity']:.2f} m/s, "
                f"real-time factor {result['real_time_factor']:.2f}",
                highlight=False,
            )


def table(folder: Path) -> Table:
    """One row per case: all seeds together."""
    out = Table(title="Legged robots, recommended settings")
    for column in (
        "case",
        "success",
        "fell",
        "m/s",
        "min height",
        "end height",
        "plan ms",
        "× real time",
        "load",
    ):
        out.add_column(column, justify="left" if column == "case" else "right")
    for name in CASES:
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-*.json"))]
        if not rows:
            continue

        def median(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return float(np.median([row[key] for row in rows]))

        out.add_row(
            name,
            f"{sum(row['success'] for row in rows)}/{len(rows)}",
            str(sum(row["fell"] for row in rows)),
            f"{median('mean_velocity'):.2f}",
            f"{min(row['min_height'] for row in rows):.2f}",
            f"{median('end_height'):.2f}",
            f"{median('plan_ms_median'):.0f}",
            f"{median('real_time_factor'):.2f}",
            f"{np.median([row['machine']['load'] for row in rows]):.1f}",
        )
    return out


def main(config: Config) -> None:
    torch.set_num_threads(1)  # the simulator has the processors
    console = Console(width=120)
    if config.run:
        run(config, console)
    console.print(table(config.folder))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
