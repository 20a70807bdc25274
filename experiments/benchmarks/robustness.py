"""Does planning over sampled models fall less often than planning with the nominal one?

Claim under test: with the plant's mass and friction drawn within ±20 %, planning over 8 sampled models
falls less often than planning with the nominal model.

    python -m mbrl.experiments.benchmarks.robustness

The small quadruped trots fast on a slippery floor, with few candidates, and follows each plan for 0.1 s.
With ordinary friction and a plan at every step the same mismatch felled none of 20: feedback hides the
errors of a model. Speed and friction were chosen by the falls of "no mismatch" and "nominal" alone, before
any planning over samples was run. The cost of a fall, the same for all, and the worst case as the risk were chosen
after runs on these very plants, in which nothing but speed and posture counted and the sampled models did not help
significantly: the p values are exploratory. `--seed 1` draws other plants.

All planners meet the same plants and starts. "sampled" minimises the mean cost over the models, "sampled, worst
case" the largest. "nominal" has as many candidates as they have, "nominal, same work" as many simulated steps; "no
mismatch" is the nominal planner on unchanged plants. One JSON file per planner; a file that is there is not run
again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.envs import RandomizedMujoco, World, make_world, scaled_model
from mbrl.envs.mujoco import draw_scales
from mbrl.estimators import FullState
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import MPPI
from mbrl.risk import Mean, Worst

ARMS = ("no mismatch", "nominal", "sampled", "sampled, worst case", "nominal, same work")
SCALES = {"body_mass": (0.8, 1.2), "geom_friction": (0.8, 1.2)}


@dataclass(frozen=True)
class Config:
    seeds: int = 100
    """Plants, each with its own mass, friction and start."""
    seed: int = 0
    """Of the draws of plants, starts and plans."""
    steps: int = 100
    speed: float = 0.7
    """m/s, faster than the usual command."""
    friction: float = 0.5
    replan_every: int = 5
    candidates: int = 16
    models: int = 8
    horizon: int = 20
    fall_cost: float = 10.0
    threads: int = 2
    arms: tuple[str, ...] = ARMS
    folder: Path = RESULTS / "robustness"


def slippery(world: World, friction: float) -> World:
    """The world with this sliding friction everywhere, and no costlier model to plan on."""
    models = []
    for model in (world.model, world.planning_model or world.model):
        models.append(copy.copy(model))
        models[-1].geom_friction[:, 0] = friction
    return world.with_model(*models)


def episodes(config: Config, arm: str) -> dict[str, Any]:
    """All plants at once: one planner call plans for every one of them."""
    world = slippery(make_world("pup-walk", speed=config.speed), config.friction)
    draws = draw_scales(SCALES, config.seeds, generator=torch.Generator().manual_seed(config.seed))
    if arm == "no mismatch":
        draws = [dict.fromkeys(SCALES, 1.0) for _ in draws]
    envs = []
    for seed, draw in enumerate(draws):
        env = world.with_model(scaled_model(world.model, draw)).make()
        env.reset(seed=1_000 * config.seed + seed)
        envs.append(env)

    generator = torch.Generator().manual_seed(config.seed + 1)
    dynamics: Any = world.dynamics(threads=config.threads, model=world.planning_model)
    candidates, particles = config.candidates, 1
    if arm.startswith("sampled"):
        dynamics = RandomizedMujoco(dynamics, SCALES, config.models, generator=generator)
        particles = config.models
    elif arm == "nominal, same work":
        candidates *= config.models
    planner = MPPI(population=candidates, knot_spacing=5, spline="linear", beta=0.0, std=0.3)
    problem = world.problem(
        config.horizon,
        dynamics=dynamics,
        particles=particles,
        risk=Worst() if arm.endswith("worst case") else Mean(),
        termination_cost=config.fall_cost,
    )
    mpc = MPC(problem, planner, estimator=FullState(), generator=generator, replan_every=config.replan_every)

    fell_at: list[int | None] = [None] * len(envs)
    distance = np.zeros(len(envs))
    tic = time.perf_counter()
    for t in range(config.steps):
        state = torch.as_tensor(np.stack([env.get_wrapper_attr("state")() for env in envs]))
        actions = mpc(state, {"state": state})
        for i, env in enumerate(envs):
            if fell_at[i] is None:
                _, _, fell, _, info = env.step(actions[i].numpy())
                distance[i] = info["state"][-world.layout.size]
                fell_at[i] = t if fell or info["diverged"] else None
    return {
        "arm": arm,
        "falls": sum(t is not None for t in fell_at),
        "seeds": len(envs),
        "fell_at": fell_at,
        "distance": distance.tolist(),
        "scales": draws,
        "wall_seconds": time.perf_counter() - tic,
        "planner": {"type": type(planner).__name__, **dataclasses.asdict(planner)},
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("arms", "folder")},
        "machine": machine(),
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)  # the simulator has the processors
    out = Table(title=f"Falls on {config.seeds} plants, mass and friction within ±20 %")
    for column in ("planned on", "falls", "95 % interval", "median distance m", "wall s"):
        out.add_column(column, justify="left" if column == "planned on" else "right")
    for arm in config.arms:
        path = config.folder / f"{arm.replace(', ', '-').replace(' ', '-')}.json"
        if not path.exists():
            write(path, episodes(config, arm))
        result = json.loads(path.read_text())
        interval = scipy.stats.binomtest(result["falls"], result["seeds"]).proportion_ci(method="wilson")
        out.add_row(
            arm,
            f"{result['falls']}/{result['seeds']}",
            f"{interval.low:.2f} – {interval.high:.2f}",
            f"{np.median(result['distance']):.2f}",
            f"{result['wall_seconds']:.0f}",
        )
    Console().print(out)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
