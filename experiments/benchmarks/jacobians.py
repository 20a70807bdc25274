"""Derivatives of robots' control steps, against a plain loop over mj_step with another step size.

    python -m mbrl.experiments.benchmarks.jacobians

Centred differences in the tangent space, ε = 1e-6, all in one threaded call, against ε = 1e-5, one simulation after the
other; warm starts are held fixed on both sides. States are visited under random actions; those whose contacts differ
between any two of the simulations that a derivative is made of have none, and are left out (and counted). The share inside
MuJoCo is that of its batched steps in the time of `FiniteDifference.linearize` of all states, median of 15 passes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mujoco
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.derivatives import FiniteDifference
from mbrl.envs import MujocoDynamics, World, make_world
from mbrl.envs.gym_tasks import TASKS
from mbrl.experiments.benchmarks.record import RESULTS, machine, write

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass(frozen=True)
class Config:
    worlds: tuple[str, ...] = (*sorted(TASKS), "go2-walk", "g1-stand")
    states: int = 20
    every: int = 5
    """Control steps between two states."""
    seed: int = 0
    threads: int = 0
    out: Path = RESULTS / "jacobians.json"


def visited(world: World, config: Config) -> tuple[Tensor, Tensor]:
    """States (n, nx) and the actions (n, nu) taken there, at 0.8 of the range."""
    env, rng = world.make(), np.random.default_rng(config.seed)
    _, info = env.reset(seed=config.seed)
    center, half = world.actions.center.numpy(), world.actions.half_range.numpy()
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    while len(states) < config.states:
        for _ in range(config.every):
            u = (center + 0.8 * half * rng.uniform(-1, 1, len(center))).astype(np.float32)
            state = info["state"]
            _, _, terminated, truncated, info = env.step(u)
            if terminated or truncated:
                _, info = env.reset()
        states.append(state)
        actions.append(u.astype(np.float64))
    env.close()
    return torch.tensor(np.array(states)), torch.tensor(np.array(actions))


def serial(
    plant: MujocoDynamics, data: mujoco.MjData, x: Tensor, u: Tensor
) -> tuple[Tensor, tuple[Any, ...]]:
    """The next state by mj_step, and which constraints were active at its physics steps."""
    model, active = plant.model, []
    row = x.numpy()[: mujoco.mj_stateSize(model, _STATE)].copy()
    mujoco.mj_setState(model, data, row, _STATE)
    data.ctrl[:] = u
    for _ in range(plant.frame_skip):
        mujoco.mj_step(model, data)
        active.append((data.contact.geom.tolist(), data.efc_state.tolist()))
    mujoco.mj_getState(model, data, row, _STATE)
    return torch.tensor(row), tuple(map(str, active))


def by_hand(plant: MujocoDynamics, x: Tensor, u: Tensor, eps: float) -> Tensor | None:
    """[fx fu] at x (nx,) and u (nu,), or None where contacts differ."""
    data, columns, seen = mujoco.MjData(plant.model), [], set()
    for i in range(plant.ndx + plant.nu):
        ends = []
        for sign in (1.0, -1.0):
            dx, du = torch.zeros(plant.ndx).double(), torch.zeros(plant.nu).double()
            (dx if i < plant.ndx else du)[i if i < plant.ndx else i - plant.ndx] = sign * eps
            end, active = serial(plant, data, plant.retract(x, dx), u + du)
            ends.append(end)
            seen.add(active)
        if len(seen) > 1:
            return None
        columns.append(plant.difference(ends[1], ends[0]) / (2 * eps))
    return torch.stack(columns, -1)


def run(name: str, config: Config) -> dict[str, Any]:
    world = make_world(name)
    plant = world.dynamics(threads=config.threads)
    x, u = visited(world, config)
    derivative = FiniteDifference(plant, world.actions)
    fx, fu = derivative.linearize(x, u, 0)
    got, errors = torch.cat([fx, fu], -1), []
    for i in range(len(x)):
        wanted = by_hand(plant, x[i], u[i], 1e-5)
        if wanted is not None:
            errors.append(float((got[i] - wanted).norm() / wanted.norm()))
    whole, inside = timed(lambda: derivative.linearize(x, u, 0))
    return {
        "ndx": plant.ndx,
        "used": len(errors),
        "left_out": len(x) - len(errors),
        "errors": errors,
        "median": statistics.median(errors) if errors else None,
        "worst": max(errors, default=None),
        "ms_per_state": 1e3 * statistics.median(whole) / len(x),
        "inside_mujoco": statistics.median(i / w for i, w in zip(inside, whole, strict=True)),
    }


def timed(work: Callable[[], object], passes: int = 15) -> tuple[list[float], list[float]]:
    """Seconds that `work` took in each pass, and of these in the simulator's steps."""
    whole: list[float] = []
    inside: list[float] = []
    step = mujoco.batch.Batch.step

    def clocked(*args: Any, **options: Any) -> Any:
        tic = time.perf_counter()
        result = step(*args, **options)
        inside[-1] += time.perf_counter() - tic
        return result

    with mock.patch.object(mujoco.batch.Batch, "step", clocked):
        for _ in range(passes):
            inside.append(0.0)
            tic = time.perf_counter()
            work()
            whole.append(time.perf_counter() - tic)
    return whole, inside


def main(config: Config) -> None:
    torch.set_num_threads(1)
    table = Table(
        "world", "tangent", "states", "left out", "median error", "worst", "ms a state", "inside MuJoCo"
    )
    rows = {}
    for name in config.worlds:
        row = rows[name] = run(name, config)
        numbers = ["–" if row[key] is None else f"{row[key]:.1e}" for key in ("median", "worst")]
        table.add_row(
            name, str(row["ndx"]), str(row["used"]), str(row["left_out"]), *numbers,
            f"{row['ms_per_state']:.2f}", f"{row['inside_mujoco']:.0%}",
        )  # fmt: skip
    settings = {
        "states": config.states,
        "every": config.every,
        "seed": config.seed,
        "threads": config.threads,
    }
    write(config.out, {"worlds": rows, "config": settings, "machine": machine()})
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
