"""A Go2 that is pushed three times in 10 s: does iLQR keep it standing, and how well?

    python -m mbrl.experiments.benchmarks.pushed_go2           # runs what is missing, then prints the table

One JSON file per arm and seed; what is there is not run again. "hold" keeps the targets of the stance, the baseline to
beat. "ilqr" plans every second control step and follows its gains in between; "every-step", which was added after "ilqr"
had fallen on seed 1, plans at each. Planning runs on the world's cheaper model with smooth contacts, or with the contacts
that it has ("stiff"), the episode on the plant.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.derivatives import FiniteDifference
from mbrl.envs import make_world
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import ILQR
from mbrl.problem import Plan

ARMS = ("hold", "ilqr", "every-step", "stiff")


@dataclass(frozen=True)
class Config:
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    horizon: int = 25
    """Control steps of 20 ms."""
    iterations: int = 1
    """Of iLQR per plan."""
    replan_every: int = 2
    """Control steps; in between the gains correct the plan."""
    every: int = 4
    """Derivatives at every n-th step of the horizon."""
    threads: int = 1
    out: Path = RESULTS / "pushed_go2"
    run: bool = True


def episode(arm: str, seed: int, config: Config) -> dict[str, Any]:
    """What happened in one episode of 10 s."""
    world = make_world("go2-stand")
    world = world if arm == "stiff" else world.smoothed()
    task: Any = world.task
    simulator = world.dynamics(threads=config.threads, model=world.planning_model)
    dynamics = FiniteDifference(simulator, world.actions, every=config.every)
    planner = ILQR(iterations=config.iterations, line_search=6)
    mpc = MPC(
        world.problem(config.horizon, dynamics=dynamics),
        planner,
        estimator=FullState(),
        generator=torch.Generator().manual_seed(seed),
        replan_every=1 if arm == "every-step" else config.replan_every,
        guess=Plan(actions=task.home.expand(1, config.horizon, -1), cost=torch.zeros(1)),
    )
    env = world.make()
    obs, info = env.reset(seed=seed)
    data: Any = env.unwrapped.data  # type: ignore[attr-defined]
    trunk = int(world.model.jnt_bodyid[0])
    fell, truncated, wall_ms, cpu_ms, corrections = False, False, [], [], []
    heights, tilts, path, rewards = [], [], [], []
    since = 0  # steps since the last plan
    while not (fell or truncated):
        tic = time.process_time()
        if arm == "hold":
            action = task.home
        else:
            action = mpc(torch.as_tensor(obs), info)[0]
            assert mpc.report is not None
            since = 0 if mpc.report.plan_ms > 0 else since + 1
            if since == 0:
                wall_ms.append(mpc.report.plan_ms)
                cpu_ms.append(1e3 * (time.process_time() - tic))
            else:  # by the gains
                corrections.append(float((action - mpc.report.plan.actions[0, since]).abs().max()))
        obs, reward, fell, truncated, info = env.step(action.numpy())
        rewards.append(float(reward))
        heights.append(float(data.qpos[2]))
        tilts.append(math.degrees(math.acos(min(1.0, float(data.xmat[trunk, 8])))))
        path.append(data.qpos[:2].copy())
        if info["diverged"]:
            break
    last = slice(-25, None)  # half a second
    return {
        "stood": bool(truncated and not fell and not info["diverged"]),
        "fell": bool(fell),
        "seconds": len(heights) * mpc.problem.dynamics.dt,
        "height": {"wanted": task.height, "least": min(heights), "end": statistics.mean(heights[last])},
        "tilt_degrees": {"most": max(tilts), "end": statistics.mean(tilts[last])},
        "way": float(np.linalg.norm(path[-1])),
        "mean_reward": statistics.mean(rewards),
        "plans": len(wall_ms),
        "wall_ms": statistics.median(wall_ms) if wall_ms else None,
        "cpu_ms": statistics.mean(cpu_ms) if cpu_ms else None,
        "correction": {"median": statistics.median(corrections), "most": max(corrections)}
        if corrections
        else None,
        "planner": dataclasses.asdict(planner) if arm != "hold" else None,
        "planning_timestep": float(simulator.model.opt.timestep),
        "plant_timestep": float(world.model.opt.timestep),
        "push": env.get_wrapper_attr("speed"),
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    for seed in config.seeds:
        for arm in config.arms:
            path = config.out / f"{arm}-{seed}.json"
            if not path.exists() and config.run:
                result = {"arm": arm, "seed": seed, **episode(arm, seed, config)}
                settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "run")}
                write(path, {**result, "config": settings, "machine": machine()})
    table = Table(
        "arm", "seed", "stood", "seconds", "least height, m", "end", "most tilt, °", "end", "CPU ms a plan"
    )
    for path in sorted(config.out.glob("*.json")):
        r = json.loads(path.read_text())
        table.add_row(
            r["arm"], str(r["seed"]), str(r["stood"]), f"{r['seconds']:.2f}",
            f"{r['height']['least']:.3f}", f"{r['height']['end']:.3f}",
            f"{r['tilt_degrees']['most']:.1f}", f"{r['tilt_degrees']['end']:.1f}",
            "–" if r["cpu_ms"] is None else f"{r['cpu_ms']:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
