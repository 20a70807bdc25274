"""MPC with iLQR against iCEM, and iCEM refined by iLQR, at equal computing time per control step, in the true simulator.

    python -m mbrl.experiments.benchmarks.ilqr_mpc           # runs what is missing, then prints the table
    python -m mbrl.experiments.benchmarks.ilqr_mpc --no-run  # only the table

All planners of an environment get one problem: dynamics, cost, horizon; "icem-own" is iCEM with the reward as the cost and
the horizon of the returns benchmark, where these differ; "ilqr-on" is iLQR on plans that go on where an episode would end,
since after its end a plan has no slope. It was added after "ilqr" had fallen on seeds 2 and 3. The plant that acts is Gymnasium's, and returns are its own
rewards. iLQR's settings are given; the populations of the others are calibrated until their plans take as much processor
time, on one thread, at the same states in turn. With these numbers fixed, no result depends on the machine's load.
Settings were chosen on seed 0, which is not among those that are reported. One JSON file per environment, planner and
seed; what is there is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.derivatives import FiniteDifference
from mbrl.envs import World, gym_world
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, interval, machine, write
from mbrl.experiments.benchmarks.returns import BETAS, HORIZONS, with_euler
from mbrl.mpc import MPC
from mbrl.planners import ICEM, ILQR, Polish
from mbrl.problem import Box, Problem
from mbrl.protocols import Planner

PLANNERS = ("ilqr", "ilqr-on", "icem", "icem-own", "polish")


@dataclass(frozen=True)
class Hop:
    """Run at `speed` without falling, as a sum of squares: the reward is linear in speed and constant until the fall.

    Attributes:
        x, z, pitch, rate: where these stand in y; rate is that of the pitch.
        dt: s.
        speed: wanted, m/s.
    """

    x: int
    z: int
    pitch: int
    rate: int
    dt: float
    speed: float

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: Any, p: Tensor | None) -> Tensor:
        speed = (y_next[..., self.x] - y[..., self.x]) / self.dt
        return (speed - self.speed) ** 2 / (2 * self.speed) + 0.01 * (u * u).sum(-1) + self._lost(y_next) / 40

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return self._lost(y)

    def _lost(self, y: Tensor) -> Tensor:
        """`upright` of the endurance benchmark."""
        low = (1.2 - y[..., self.z]).clamp(min=0)
        return 200 * low**2 + 200 * y[..., self.pitch] ** 2 + 2 * y[..., self.rate] ** 2


def hop(world: World) -> Hop:
    q, v = world.layout["qpos"].start, world.layout["qvel"].start
    dt = world.frame_skip * float(world.model.opt.timestep)
    return Hop(x=q, z=q + 1, pitch=q + 2, rate=v + 2, dt=dt, speed=2.0)


@dataclass(frozen=True)
class Case:
    """One problem and how to plan in it.

    Attributes:
        horizon: steps.
        ilqr: the planner whose processor time the others get.
        refine: what refines iCEM's winner.
        icem: its population is calibrated.
        search: iterations of the iCEM that is refined.
        every: derivatives at every n-th step.
        euler: plan on the Euler integrator, a quarter of the cost of the plant's RK4.
        smooth: plan with smooth contacts.
        cost: instead of the reward.
        termination_cost: of an early end.
        own_horizon: of "icem-own", where it plans another problem.
        on: whether there is an "ilqr-on".
    """

    horizon: int
    ilqr: ILQR
    refine: ILQR
    icem: ICEM
    search: int = 2
    every: int = 1
    euler: bool = False
    smooth: bool = False
    cost: Callable[[World], Any] | None = None
    termination_cost: float = 0.0
    own_horizon: int | None = None
    on: bool = False

    def problem(self, world: World, planner: str) -> Problem[Any, Any, Box]:
        model = with_euler(world.model) if self.euler else None
        world = world.with_model(world.model, planning_model=model)
        world = world.smoothed() if self.smooth else world
        simulator = world.dynamics(threads=1, model=world.planning_model)
        dynamics = FiniteDifference(simulator, world.actions, every=self.every)
        if planner == "icem-own":
            assert self.own_horizon is not None  # else it has no planner
            return world.problem(self.own_horizon, dynamics=simulator)
        problem = world.problem(self.horizon, dynamics=dynamics, termination_cost=self.termination_cost)
        if planner == "ilqr-on":
            problem = dataclasses.replace(problem, terminated=None)
        return problem if self.cost is None else dataclasses.replace(problem, cost=self.cost(world))

    def planners(self, populations: Mapping[str, int]) -> dict[str, Planner[Any]]:
        """Every planner of this case, with the populations given."""

        def sized(planner: ICEM, name: str) -> ICEM:
            n = populations[name]
            return dataclasses.replace(planner, population=n, elites=max(2, n // 6))

        found: dict[str, Planner[Any]] = {
            "ilqr": self.ilqr,
            "icem": sized(self.icem, "icem"),
            "polish": Polish(
                planner=dataclasses.replace(sized(self.icem, "polish"), iterations=self.search),
                by=self.refine,
            ),
        }
        if self.on:
            found["ilqr-on"] = self.ilqr
        if self.own_horizon is not None:
            found["icem-own"] = sized(ICEM(), "icem-own")
        return found


CASES = {
    "HalfCheetah-v5": Case(
        horizon=25,
        ilqr=ILQR(iterations=3, damp="state", line_search=6),
        refine=ILQR(iterations=1, damp="state", line_search=6),
        icem=ICEM(beta=BETAS["HalfCheetah-v5"]),
        every=3,
    ),
    "Hopper-v5": Case(
        horizon=50,
        ilqr=ILQR(iterations=1, line_search=4),
        refine=ILQR(iterations=1, line_search=4),
        icem=ICEM(beta=2.0, knot_spacing=5, spline="linear"),
        every=5,
        euler=True,
        cost=hop,
        termination_cost=200.0,
        own_horizon=HORIZONS["Hopper-v5"],
    ),
    "InvertedDoublePendulum-v5": Case(
        horizon=30,
        ilqr=ILQR(iterations=2, line_search=4),
        refine=ILQR(iterations=1, line_search=4),
        icem=ICEM(),
        search=3,
        every=2,
        euler=True,
        own_horizon=HORIZONS["InvertedDoublePendulum-v5"],
        on=True,
    ),
}


@dataclass(frozen=True)
class Config:
    envs: tuple[str, ...] = tuple(CASES)
    planners: tuple[str, ...] = PLANNERS
    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = 150
    """Control steps of an episode."""
    out: Path = RESULTS / "ilqr_mpc"
    run: bool = True


def episode(
    world: World, problem: Problem[Any, Any, Box], planner: Planner[Any], seed: int, steps: int
) -> dict[str, Any]:
    """One episode in the plant."""
    env = world.make()
    obs, info = env.reset(seed=seed)
    mpc = MPC(problem, planner, estimator=FullState(), generator=torch.Generator().manual_seed(seed))
    total, terminated, cpu_ms, wall_ms = 0.0, False, [], []
    for _ in range(steps):
        tic = time.process_time()
        action = mpc(torch.as_tensor(obs), info)
        cpu_ms.append(1e3 * (time.process_time() - tic))
        assert mpc.report is not None
        wall_ms.append(mpc.report.plan_ms)
        obs, reward, terminated, truncated, info = env.step(action[0].numpy().astype(np.float32))
        if not info["diverged"]:  # else it is the reward of no state that there is
            total += float(reward)
        if terminated or truncated:
            break
    env.close()
    return {
        "return": total,
        "steps": len(cpu_ms),
        "fell": bool(terminated),
        "cpu_ms": {"median": statistics.median(cpu_ms), "mean": statistics.mean(cpu_ms)},
        "wall_ms": {"median": statistics.median(wall_ms), "mean": statistics.mean(wall_ms)},
        "fallbacks": mpc.fallbacks,
    }


def calibrate(name: str, *, states: int = 6, rounds: int = 4) -> dict[str, Any]:
    """Populations at which iCEM and the polished iCEM take iLQR's processor time.

    All plan at the same `states`, which iLQR visits, each with its own warm start; the order changes from state to state.
    """
    case, world = CASES[name], gym_world(name)
    populations = {"icem": 40, "polish": 20}
    if case.own_horizon is not None:
        populations["icem-own"] = 40
    history: list[tuple[dict[str, int], dict[str, float]]] = []
    for _ in range(rounds):
        env = world.make()
        obs, info = env.reset(seed=1_000)
        policies = {
            planner: MPC(
                case.problem(world, planner),
                how,
                estimator=FullState(),
                generator=torch.Generator().manual_seed(0),
            )
            for planner, how in case.planners(populations).items()
        }
        spent: dict[str, list[float]] = {planner: [] for planner in policies}
        for i in range(states + 2):
            actions = {}
            for j in range(len(policies)):
                planner = list(policies)[(i + j) % len(policies)]
                tic = time.process_time()
                actions[planner] = policies[planner](torch.as_tensor(obs), info)
                spent[planner].append(1e3 * (time.process_time() - tic))
            obs, _, _, _, info = env.step(actions["ilqr"][0].numpy().astype(np.float32))
        env.close()
        ms = {
            planner: statistics.median(values[2:]) for planner, values in spent.items()
        }  # without the first
        history.append((dict(populations), ms))
        # A plan's time is a fixed part and one per candidate: step halfway, in proportion.
        for planner, population in populations.items():
            factor = (ms["ilqr"] / ms[planner]) ** 0.9
            populations[planner] = max(12, round(population * min(max(factor, 0.4), 4.0)))
    found = {}
    for planner in populations:
        ratios = [abs(np.log(ms[planner] / ms["ilqr"])) for _, ms in history]
        found[planner] = history[int(np.argmin(ratios))][0][planner]
    rows = [{"populations": tried, "cpu_ms": ms} for tried, ms in history]
    return {"populations": found, "history": rows, "machine": machine()}


def run(config: Config) -> None:
    """Run every missing cell, seed by seed."""
    console = Console()
    for seed in config.seeds:
        for name in config.envs:
            found = config.out / name / "calibration.json"
            if not found.exists():
                write(found, calibrate(name))
            populations = json.loads(found.read_text())["populations"]
            case, world = CASES[name], gym_world(name)
            for planner, how in case.planners(populations).items():
                path = config.out / name / f"{planner}-{seed}.json"
                if planner not in config.planners or path.exists():
                    continue
                load = machine()["load"]
                result = episode(world, case.problem(world, planner), how, seed, config.steps)
                result |= {"env": name, "planner": planner, "seed": seed, "wanted_steps": config.steps}
                own = planner == "icem-own"
                settings: Any = how
                result |= {"settings": dataclasses.asdict(settings)}
                result |= {"horizon": case.own_horizon if own else case.horizon}
                result |= {"every": case.every, "smooth": case.smooth, "euler": case.euler}
                result |= {"cost": "reward" if own or case.cost is None else case.cost.__name__}
                result |= {"termination_cost": 0.0 if own else case.termination_cost}
                result |= {"machine": {**machine(), "load_before": load}}
                write(path, result)
                console.print(
                    f"{name} {planner} seed {seed}: {result['return']:.1f} in {result['steps']} steps, "
                    f"{result['cpu_ms']['mean']:.0f} ms of processor time a plan",
                    highlight=False,
                )


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Every environment and planner that has results."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*-*.json")):
        result = json.loads(path.read_text())
        cells.setdefault((result["env"], result["planner"]), []).append(result)
    rows = []
    for (env, planner), results in sorted(cells.items()):
        returns = [result["return"] for result in results]
        low, high = interval(returns)
        rows.append(
            {
                "env": env,
                "planner": planner,
                "seeds": len(results),
                "returns": {result["seed"]: result["return"] for result in results},
                "mean": statistics.mean(returns),
                "low": low,
                "high": high,
                "fell": sum(result["fell"] for result in results),
                "cpu_ms": statistics.median(result["cpu_ms"]["mean"] for result in results),
                "wall_ms": statistics.median(result["wall_ms"]["median"] for result in results),
                "load": statistics.median(result["machine"]["load"] for result in results),
                "wanted_steps": results[0]["wanted_steps"],
                "settings": results[0]["settings"],
                "horizon": results[0]["horizon"],
            }
        )
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    if config.run:
        run(config)
    rows = summarise(config.out)
    table = Table("env", "planner", "return", "fell", "CPU ms a plan", "wall ms", "load")
    for row in rows:
        spread = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
        table.add_row(
            row["env"],
            row["planner"],
            f"{row['mean']:.1f}{spread}",
            f"{row['fell']} of {row['seeds']}",
            f"{row['cpu_ms']:.0f}",
            f"{row['wall_ms']:.0f}",
            f"{row['load']:.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
