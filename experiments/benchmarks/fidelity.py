"""Does the simulator inside the planner equal the real environment?

    python -m mbrl.experiments.benchmarks.fidelity [--worlds Ant-v5 pup-walk]

For every world: the largest difference between the predicted and the realised state over 200 steps
of MPC, with 1 and 2 threads (it must be exactly 0); and over 1,000 steps of random actions the
largest difference of reward and observation and the number of wrong ends, with the environment's own
float32 actions and with the same ones in float64.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import WORLDS, World, make_world
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import ICEM


@dataclass(frozen=True)
class Config:
    worlds: tuple[str, ...] = tuple(WORLDS)
    mpc_steps: int = 200
    random_steps: int = 1_000
    seed: int = 0


def prediction_error(world: World, threads: int, config: Config) -> float:
    """Largest |predicted − realised| of the state over MPC steps; episodes start again where they end."""
    env = world.make()
    obs, info = env.reset(seed=config.seed)
    # Planned with the plant itself, also where the world recommends a coarser planning model.
    problem = world.problem(5, dynamics=world.dynamics(model=world.model, threads=threads))
    generator = torch.Generator().manual_seed(config.seed)
    mpc = MPC(problem, ICEM(population=12, elites=4), estimator=FullState(), generator=generator)
    error = 0.0
    for _ in range(config.mpc_steps):
        action = mpc(torch.as_tensor(obs), info)
        assert mpc.report is not None and mpc.report.plan.states is not None
        obs, _, terminated, truncated, info = env.step(action[0].numpy().astype(np.float32))
        gap = (mpc.report.plan.states[0, 1] - torch.as_tensor(info["state"])).abs().max()
        error = float(np.maximum(error, float(gap)))  # max() would take NaN for 0
        if terminated or truncated:
            obs, info = env.reset()
            mpc.reset()
    return error


def task_errors(world: World, dtype: type, config: Config) -> dict[str, Any]:
    """The task against the environment under random actions of one precision."""
    env = world.make()
    rng = np.random.default_rng(config.seed)
    low, high = world.actions.low.numpy(), world.actions.high.numpy()
    output = world.dynamics().output
    _, info = env.reset(seed=config.seed)
    y = output(torch.as_tensor(info["state"]))
    result: dict[str, Any] = {"reward": 0.0, "observation": 0.0, "wrong_ends": 0, "ends": 0}
    for _ in range(config.random_steps):
        # The same values in both; the environment computes its reward in the precision that it is given.
        action: np.ndarray = rng.uniform(low, high).astype(np.float32).astype(dtype)
        obs, reward, terminated, truncated, info = env.step(action)
        y_next = output(torch.as_tensor(info["state"]))
        ours = float(world.task.reward(y, torch.as_tensor(action, dtype=torch.float64), y_next))
        gaps = {"reward": ours - float(reward), "observation": world.observe(y_next).numpy() - obs}
        for what, gap in gaps.items():
            result[what] = float(np.maximum(result[what], np.abs(gap).max()))
        result["wrong_ends"] += int(bool(world.task.terminated(y_next)) != terminated)
        result["ends"] += int(terminated)
        if terminated or truncated:
            _, info = env.reset()
            y_next = output(torch.as_tensor(info["state"]))
        y = y_next
    return result


def main(config: Config) -> None:
    table = Table(
        "world", "state, 1 thread", "state, 2 threads", "reward f32", "reward f64", "obs", "wrong ends"
    )
    path = RESULTS / "fidelity.json"
    results = json.loads(path.read_text())["worlds"] if path.exists() else {}  # of worlds not run now
    for name in config.worlds:
        world = make_world(name)
        states = {threads: prediction_error(world, threads, config) for threads in (1, 2)}
        f32, f64 = task_errors(world, np.float32, config), task_errors(world, np.float64, config)
        results[name] = {
            "config": {key: value for key, value in dataclasses.asdict(config).items() if key != "worlds"},
            "machine": machine(),
            "state_error": states,
            "float32": f32,
            "float64": f64,
        }
        table.add_row(
            name,
            *(f"{states[threads]:g}" for threads in (1, 2)),
            f"{f32['reward']:.1e}",
            f"{f64['reward']:.1e}",
            f"{max(f32['observation'], f64['observation']):.1e}",
            f"{f32['wrong_ends'] + f64['wrong_ends']} of {f32['ends'] + f64['ends']}",
        )
    Console(width=140).print(table)
    write(path, {"worlds": results})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
