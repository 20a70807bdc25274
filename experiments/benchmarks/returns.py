"""Returns of every sampling planner on every Gymnasium MuJoCo v5 environment, at equal simulated steps.

    python -m mbrl.experiments.benchmarks.returns            # runs what is missing, then prints the table
    python -m mbrl.experiments.benchmarks.returns --no-run   # only the table

One JSON file per environment, planner, budget and seed; a file that is there is not run again, so a
killed benchmark goes on where it was. A planner gets `budget` simulated environment steps per
control step (candidates × horizon); checking the winner costs it two rows more.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import World, gym_world
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, interval, machine, write
from mbrl.mpc import MPC
from mbrl.planners import CEM, CMAES, ICEM, MPPI, PredictiveSampling, RandomShooting, SamplingPlanner
from mbrl.problem import Box, Problem

# Cheapest first, so that an unfinished table is as full as it can be.
ENVS = (
    "InvertedPendulum-v5",
    "Reacher-v5",
    "InvertedDoublePendulum-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Pusher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
    "Ant-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
)
# Longer where a control step is 8 ms, so that a fall is seen before it is certain; shorter where the
# motion is so unstable that random plans of 1.5 s all fall.
HORIZONS = {"Hopper-v5": 40, "Walker2d-v5": 40, "InvertedDoublePendulum-v5": 12}
# Exponents of iCEM's noise that its authors publish; elsewhere our default.
BETAS = {"HalfCheetah-v5": 0.25, "Humanoid-v5": 2.0, "HumanoidStandup-v5": 2.0}
# Planned on the Euler integrator, a quarter of the cost of the plant's RK4: with RK4 these three take a day
# of two cores. The plant that acts keeps its own.
EULER = ("Ant-v5", "Humanoid-v5", "HumanoidStandup-v5")
LARGE_ENVS = ("HalfCheetah-v5", "Hopper-v5", "Humanoid-v5")
LARGE_PLANNERS = ("random-shooting", "cem", "icem")


@dataclass(frozen=True)
class Config:
    envs: tuple[str, ...] = ENVS
    planners: tuple[str, ...] = ("random-shooting", "cem", "icem", "mppi", "predictive-sampling", "cma-es")
    budgets: tuple[int, ...] = (3_000, 12_000)
    """Simulated environment steps per control step; the larger one runs for a part of the table only."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 300
    """Control steps of an episode; some environments end theirs earlier."""
    horizon: int = 30
    """Steps; some environments have their own, see HORIZONS."""
    threads: int = 0
    """Of the simulator; 0 for all processors."""
    out: Path = RESULTS / "returns"
    run: bool = True


def planners_at(candidates: int, env: str = "") -> dict[str, SamplingPlanner[Any]]:
    """Every planner with `candidates` candidates per plan, shared among its iterations."""
    beta = BETAS.get(env, ICEM.beta)
    third = candidates // 3
    first = round(candidates / (1 + 1 / 1.25 + 1 / 1.25**2))  # of iCEM's shrinking populations
    return {
        "random-shooting": RandomShooting(population=candidates),
        "cem": CEM(population=third, iterations=3, elites=max(2, third // 5)),
        "icem": ICEM(population=first, iterations=3, elites=max(2, first // 6), beta=beta),
        "mppi": MPPI(population=candidates),
        "predictive-sampling": PredictiveSampling(population=candidates),
        "cma-es": CMAES(population=candidates // 5, iterations=5),
    }


def with_euler(model: mujoco.MjModel) -> mujoco.MjModel:
    """The model, integrated by (semi-implicit) Euler."""
    model = copy.copy(model)
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    return model


def episode(
    world: World, problem: Problem[Any, Any, Box], planner: SamplingPlanner[Any], seed: int, *, steps: int
) -> dict[str, Any]:
    """One episode in the world, planned with the problem."""
    env = world.make()
    obs, info = env.reset(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    mpc = MPC(problem, planner, estimator=FullState(), generator=generator)
    total, plan_ms, error, model_steps = 0.0, [], 0.0, 0
    terminated = truncated = False
    for _ in range(steps):
        action = mpc(torch.as_tensor(obs), info)
        assert mpc.report is not None
        plan_ms.append(mpc.report.plan_ms)
        model_steps += int(mpc.report.plan.info["model_steps"])
        obs, reward, terminated, truncated, info = env.step(action[0].numpy().astype(np.float32))
        predicted = mpc.report.plan.states
        assert predicted is not None
        error = max(error, float((predicted[0, 1] - torch.as_tensor(info["state"])).abs().max()))
        if not info["diverged"]:  # else it is the reward of no state that there is
            total += float(reward)
        if terminated or truncated:
            break
    return {
        "return": total,
        "steps": len(plan_ms),
        "terminated": terminated,
        "truncated": truncated,
        "model_steps_per_plan": model_steps / len(plan_ms),
        "plan_ms": {"median": statistics.median(plan_ms), "worst": max(plan_ms)},
        "state_error": error,
        "fallbacks": mpc.fallbacks,
    }


def run(config: Config) -> None:
    """Run every missing cell, seed by seed."""
    console = Console()
    for seed in config.seeds:
        for budget in config.budgets:
            for env in config.envs:
                horizon = HORIZONS.get(env, config.horizon)
                for name, planner in planners_at(budget // horizon, env).items():
                    if name not in config.planners:
                        continue
                    if budget > 3_000 and not (env in LARGE_ENVS and name in LARGE_PLANNERS):
                        continue
                    path = config.out / env / f"{name}-{budget}-{seed}.json"
                    if path.exists():
                        continue
                    tic = time.perf_counter()
                    world = gym_world(env)
                    if env in EULER:
                        world = world.with_model(world.model, planning_model=with_euler(world.model))
                    problem = world.problem(horizon, threads=config.threads)
                    result = episode(world, problem, planner, seed, steps=config.steps)
                    result |= {"env": env, "planner": name, "budget": budget, "seed": seed}
                    result |= {"settings": dataclasses.asdict(planner), "horizon": horizon}
                    result |= {"planning_integrator": "euler" if env in EULER else None}
                    result |= {"threads": config.threads, "machine": machine()}
                    write(path, result)
                    seconds = time.perf_counter() - tic
                    console.print(
                        f"{env} {name} {budget} seed {seed}: {result['return']:.1f} "
                        f"in {result['steps']} steps ({seconds:.0f} s)",
                        highlight=False,
                    )


def summarise(config: Config) -> list[dict[str, Any]]:
    """Mean and 95 % bootstrap interval of every cell that has results."""
    cells: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for path in sorted(config.out.glob("*/*.json")):
        result = json.loads(path.read_text())
        cells.setdefault((result["env"], result["budget"], result["planner"]), []).append(result)
    rows = []
    for (env, budget, planner), results in sorted(cells.items()):
        returns = [result["return"] for result in results]
        low, high = interval(returns)
        rows.append(
            {
                "env": env,
                "budget": budget,
                "planner": planner,
                "seeds": len(returns),
                "mean": float(np.mean(returns)),
                "low": low,
                "high": high,
                "returns": returns,
                "steps": float(np.mean([result["steps"] for result in results])),
                "plan_ms": statistics.median(result["plan_ms"]["median"] for result in results),
                "state_error": max(result["state_error"] for result in results),
            }
        )
    return rows


def show(rows: list[dict[str, Any]], config: Config) -> None:
    console = Console(width=170)
    for budget in config.budgets:
        table = Table("env", *config.planners, title=f"Return at {budget:,} simulated steps per control step")
        for env in config.envs:
            cells = {row["planner"]: row for row in rows if row["env"] == env and row["budget"] == budget}
            if cells:
                table.add_row(env, *(_cell(cells.get(name)) for name in config.planners))
        if table.row_count:
            console.print(table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    spread = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
    return f"{row['mean']:.1f}{spread} n={row['seeds']}"


def main(config: Config) -> None:
    torch.set_num_threads(1)  # torch's idle threads would take turns with the simulator's
    if config.run:
        run(config)
    rows = summarise(config)
    show(rows, config)
    write(config.out.with_suffix(".json"), {"rows": rows, "machine": machine()})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
