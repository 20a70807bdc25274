"""Panda reach and push, and a G1 that is pushed: does MPC on the true simulator solve them, and how fast?

One JSON file per case and seed; those that exist are skipped, so an interrupted run goes on.

    python -m mbrl.experiments.benchmarks.manipulation_and_balance --case panda-reach
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mbrl.envs.world import World
from mbrl.envs.worlds import make_world
from mbrl.errors import UnknownName
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import MPPI
from mbrl.planners.sampling import SamplingPlanner


@dataclass(frozen=True)
class Case:
    """A world and the settings recommended for it.

    Attributes:
        world: by name.
        planner: what plans; None holds the control of the model's keyframe, the baseline to beat.
        horizon: control steps.
        seeds: episodes.
    """

    world: str
    planner: SamplingPlanner[Any] | None
    horizon: int
    seeds: int


CASES: dict[str, Case] = {
    "panda-reach": Case(
        "panda-reach",
        MPPI(population=40, iterations=2, knot_spacing=6, spline="linear", std=0.2, effective_share=0.1),
        horizon=12,
        seeds=20,
    ),
    "panda-push": Case(
        "panda-push",
        MPPI(population=40, iterations=1, knot_spacing=6, spline="linear", std=0.25, effective_share=0.1),
        horizon=14,
        seeds=10,
    ),
    "g1-stand": Case(
        "g1-stand",
        MPPI(population=32, iterations=1, knot_spacing=5, spline="linear", std=0.1, effective_share=0.1),
        horizon=20,
        seeds=5,
    ),
    "g1-hold": Case("g1-stand", None, horizon=1, seeds=5),
}


def episode(world: World, case: Case, seed: int, threads: int) -> dict[str, Any]:
    """What happened in one episode. Success is the task's at the last step; an early end is a failure."""
    task: Any = world.task
    problem = world.problem(case.horizon, threads=threads)
    generator = torch.Generator().manual_seed(seed)
    mpc = None
    if case.planner is not None:
        mpc = MPC(problem, case.planner, estimator=FullState(), generator=generator)
    held_control = world.model.key_ctrl[0]
    env = world.make()
    _, info = env.reset(seed=seed)
    dt = problem.dynamics.dt
    plan_ms, good, gaps, total = [], [], [], 0.0
    started, ended, terminated = time.perf_counter(), False, False
    while not ended:
        tic = time.perf_counter()
        action = held_control if mpc is None else mpc(torch.empty(0), info)[0].numpy()
        plan_ms.append(1e3 * (time.perf_counter() - tic))
        _, reward, terminated, truncated, info = env.step(action)
        y = torch.as_tensor(info["state"][-world.layout.size :])
        good.append(bool(task.success(y)))
        gaps.append(float(task.gap(y)))
        if not info["diverged"]:  # else it is the reward of no state that there is
            total += float(reward)
        ended = terminated or truncated
    wall = time.perf_counter() - started
    held = next((i for i in range(len(good)) if all(good[i:])), None)
    return {
        "success": good[-1] and not terminated,
        "gap": gaps[-1],
        "gap_max": max(gaps),
        "seconds_to_success": None if held is None else (held + 1) * dt,
        "return": total,
        "steps": len(gaps),
        "simulated_seconds": len(gaps) * dt,
        "plan_ms_median": float(np.median(plan_ms)),
        "plan_ms_p95": float(np.percentile(plan_ms, 95)),
        "real_time_factor": len(gaps) * dt / wall,
        "fallbacks": 0 if mpc is None else mpc.fallbacks,
    }


def run(name: str, case: Case, seeds: Sequence[int], threads: int, folder: Path) -> list[dict[str, Any]]:
    """The results of all seeds, from files where they exist."""
    results, world = [], None
    for seed in seeds:
        path = folder / f"{name}-{seed}.json"
        if not path.exists():
            world = make_world(case.world) if world is None else world
            config: dict[str, Any] = {"horizon": case.horizon}
            if case.planner is not None:
                config |= {"type": type(case.planner).__name__, **asdict(case.planner)}
            result = {
                "case": name,
                "seed": seed,
                **episode(world, case, seed, threads),
                "planner": config,
                "planning_timestep": (world.planning_model or world.model).opt.timestep,
                "plant_timestep": world.model.opt.timestep,
                "threads": threads,
                "machine": machine(),
            }
            write(path, result)
            print(_row(result), flush=True)
        results.append(json.loads(path.read_text()))
    return results


def _row(r: Mapping[str, Any]) -> str:
    reached = "   –  " if r["seconds_to_success"] is None else f"{r['seconds_to_success']:6.2f}"
    load = (
        r["machine"]["load"] if "load" in r["machine"] else r["machine"]["load_average"][0]
    )  # older results have the latter
    return (
        f"{r['case']:14} seed {r['seed']:2}  {'yes' if r['success'] else 'NO ':3}  gap {r['gap']:7.4f}  "
        f"from {reached} s  {r['simulated_seconds']:5.2f} s  plan {r['plan_ms_median']:6.1f} ms  "
        f"real-time factor {r['real_time_factor']:.3f}  load {load:.1f}"
    )


@dataclass(frozen=True)
class Config:
    case: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] = ()
    """Episodes; all of the case unless given."""
    threads: int = 0
    """Of the simulator; 0 for all processors."""
    folder: Path = RESULTS / "robots"

    def __post_init__(self) -> None:
        for name in self.case:
            if name not in CASES:
                raise UnknownName("case", name, CASES)


def main(config: Config) -> None:
    torch.set_num_threads(1)  # the simulator has the processors
    for name in config.case:
        case = CASES[name]
        results = run(name, case, config.seeds or range(case.seeds), config.threads, config.folder)
        for result in results:
            print(_row(result))
        won = sum(r["success"] for r in results)
        print(
            f"{name}: {won} of {len(results)}, median gap {np.median([r['gap'] for r in results]):.4f}, "
            f"median plan {np.median([r['plan_ms_median'] for r in results]):.0f} ms, "
            f"median real-time factor {np.median([r['real_time_factor'] for r in results]):.3f}\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
