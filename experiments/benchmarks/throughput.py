"""How much of the raw `mujoco.batch` step rate a planner's whole iteration keeps.

    python -m mbrl.experiments.benchmarks.throughput

One CEM iteration (sampling, simulating, scoring, updating; 256 candidates, horizon 30) against the
bare `step(nstep=frame_skip)` calls on the same states under the same controls. Passes of both sides
are interleaved; the ratio of medians counts. Ends are switched off, so that both sides simulate all
rows to the end.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import mujoco.batch
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import World, gym_world
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import CEM
from mbrl.rollout import evaluate

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "HalfCheetah": ("HalfCheetah-v5", {}, 0.85),
    "Humanoid without contact cost": (
        "Humanoid-v5",
        {
            "contact_cost_weight": 0.0,
            "include_cfrc_ext_in_observation": False,
            "terminate_when_unhealthy": False,
        },
        0.95,
    ),
    "Ant": ("Ant-v5", {"terminate_when_unhealthy": False}, 0.65),
    "Humanoid": ("Humanoid-v5", {"terminate_when_unhealthy": False}, 0.65),
}


@dataclass(frozen=True)
class Config:
    candidates: int = 256
    horizon: int = 30
    passes: int = 15
    threads: int = 0
    """Of the simulator, on both sides; 0 for all processors."""
    seed: int = 0


def measure(world: World, config: Config) -> dict[str, Any]:
    """Seconds per pass of both sides."""
    planner = CEM(population=config.candidates, iterations=1, elites=25)
    problem = world.problem(config.horizon, threads=config.threads)
    generator = torch.Generator().manual_seed(config.seed)
    env = world.make()
    _, info = env.reset(seed=config.seed)
    x0 = torch.as_tensor(info["state"])[None]
    state = planner.init(problem, x0, generator=generator)
    plan, _ = planner.plan(problem, x0, state, generator=generator)  # warm-up

    nstate = mujoco.mj_stateSize(world.model, mujoco.mjtState.mjSTATE_INTEGRATION)
    batch = mujoco.batch.Batch(world.model, config.candidates, config.threads)
    control = batch.bind("ctrl")
    ours, raw, single = [], [], []
    for _ in range(config.passes):
        mark = generator.get_state()
        tic = time.perf_counter()
        plan, _ = planner.plan(problem, x0, state, generator=generator)
        total = time.perf_counter() - tic
        # The final scoring of the winner is not part of an iteration: 2 rows against 256.
        pair = plan.actions[:, None].expand(-1, 2, -1, -1)
        tic = time.perf_counter()
        evaluate(problem, problem.dynamics, x0, pair, keep_states=True)
        final = time.perf_counter() - tic
        ours.append(total - final)
        single.append(final)

        generator.set_state(mark)
        z = planner.propose(state, 0, True, generator=generator).clamp(-1, 1)[0].numpy()
        low, high = world.actions.low.numpy(), world.actions.high.numpy()
        u = ((low + high) / 2 + (high - low) / 2 * z).astype(np.float32)
        batch.state[:] = x0[0, :nstate].numpy()
        tic = time.perf_counter()
        for k in range(config.horizon):
            control[:] = u[:, k]
            batch.step(nstep=world.frame_skip)
        raw.append(time.perf_counter() - tic)
    steps = config.candidates * config.horizon * world.frame_skip
    return {
        "iteration_s": ours,
        "raw_s": raw,
        "final_check_s": single,
        "ratio": statistics.median(raw) / statistics.median(ours),
        "physics_steps_per_s": steps / statistics.median(ours),
        "raw_physics_steps_per_s": steps / statistics.median(raw),
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)  # torch's idle threads would take turns with the simulator's
    table = Table("case", "iteration, ms", "raw, ms", "physics steps/s", "share of raw", "bar")
    results = {}
    for name, (env, options, bar) in CASES.items():
        result = measure(gym_world(env, **options), config)
        results[name] = {**result, "bar": bar, "env": env, "options": options}
        table.add_row(
            name,
            f"{1e3 * statistics.median(result['iteration_s']):.0f}",
            f"{1e3 * statistics.median(result['raw_s']):.0f}",
            f"{result['physics_steps_per_s']:,.0f}",
            f"{100 * result['ratio']:.1f} %",
            f"{100 * bar:.0f} %",
        )
    Console().print(table)
    write(RESULTS / "throughput.json", {"config": vars(config), "machine": machine(), "cases": results})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
