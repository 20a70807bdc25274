"""Does the best planner keep its robot up, at the budget that this takes?

    python -m mbrl.experiments.benchmarks.endurance [--cases Hopper-v5]

Hopper, Walker2d, Ant and Humanoid for 500 control steps, the inverted double pendulum for 1,000. One
JSON file per case and seed; what is there is not run again.

The reward alone does not do it within a horizon that sampling can handle: it pays for speed, and the fall
that the speed leads to lies beyond the horizon. So most cases say what a good last state is: upright and
not tumbling for those that run, and the cost-to-go of a linear-quadratic regulator for the double pendulum.
The environment and its rewards stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.envs import World, gym_world
from mbrl.experiments.benchmarks import returns
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import CEM, ICEM, SamplingPlanner

Value = Callable[[Tensor], Tensor]


def upright(
    height: int, target: float, lean: tuple[int, ...], tumbling: tuple[int, ...]
) -> Callable[[World], Value]:
    """A terminal cost on low torsos, on leaning and on turning; indices are into qpos, qpos and qvel."""

    def value(world: World) -> Value:
        qpos, qvel = positions(world), velocities(world)

        def cost(x: Tensor) -> Tensor:
            q, v = x[..., qpos], x[..., qvel]
            low = (target - q[..., height]).clamp(min=0)
            return 200 * low**2 + 200 * (q[..., lean] ** 2).sum(-1) + 2 * (v[..., tumbling] ** 2).sum(-1)

        return cost

    return value


def regulator(world: World) -> Value:
    """The cost-to-go of the linear-quadratic regulator at rest, from central differences of the simulator.

    Stage cost q'q + 0.1 v'v + u'u per step.
    """
    dynamics, model = world.dynamics(threads=1), world.model
    rest = torch.zeros(1, dynamics.nx, dtype=torch.float64)
    n, m, eps = (
        model.nq + model.nv,
        model.nu,
        1e-4,
    )  # actions are float32: a smaller step would be rounded away
    moved = slice(positions(world).start, velocities(world).stop)
    x, u = rest.repeat(2 * (n + m), 1), torch.zeros(2 * (n + m), m, dtype=torch.float64)
    steps = eps * torch.cat([torch.eye(n + m), -torch.eye(n + m)]).double()
    x[:, moved], u = steps[:, :n], steps[:, n:]
    after = dynamics.step(x, u, 0)[:, moved]
    jacobian = ((after[: n + m] - after[n + m :]) / (2 * eps)).T.numpy()
    A, B = jacobian[:, :n], jacobian[:, n:]
    Q = np.diag([1.0] * model.nq + [0.1] * model.nv)
    S = torch.from_numpy(scipy.linalg.solve_discrete_are(A, B, Q, np.eye(m)))
    return lambda x: ((x[..., moved] @ S) * x[..., moved]).sum(-1)


def positions(world: World) -> slice:
    """Where qpos stands in x: the integration state begins with the time."""
    return slice(1, 1 + world.model.nq)


def velocities(world: World) -> slice:
    return slice(1 + world.model.nq, 1 + world.model.nq + world.model.nv)


@dataclass(frozen=True)
class Case:
    """How to plan.

    Attributes:
        steps: control steps to stay up.
        value: terminal cost.
        euler: plan on the Euler integrator, at a quarter of the cost of the plant's RK4.
    """

    planner: SamplingPlanner[Any]
    horizon: int
    steps: int = 500
    value: Callable[[World], Value] | None = None
    termination_cost: float = 0.0
    euler: bool = False


CASES = {
    "InvertedDoublePendulum-v5": Case(
        CEM(population=60, iterations=8, elites=8, std=0.3, min_std=0.001, alpha=0.0),
        horizon=5,
        steps=1_000,
        value=regulator,
        termination_cost=1_000.0,
    ),
    "Hopper-v5": Case(
        ICEM(population=60, iterations=3, elites=8, beta=2.0, knot_spacing=5, spline="linear"),
        horizon=100,
        value=upright(height=1, target=1.2, lean=(2,), tumbling=(2,)),
        termination_cost=200.0,
        euler=True,
    ),
    "Walker2d-v5": Case(
        ICEM(population=60, iterations=3, elites=8, beta=2.0, knot_spacing=5, spline="linear"),
        horizon=100,
        value=upright(height=1, target=1.2, lean=(2,), tumbling=(2,)),
        termination_cost=200.0,
        euler=True,
    ),
    "Ant-v5": Case(CEM(population=20, iterations=2, elites=4), horizon=15),
    "Humanoid-v5": Case(
        ICEM(population=60, iterations=3, elites=8, beta=2.0, knot_spacing=2, spline="linear"),
        horizon=40,
        value=upright(height=2, target=1.3, lean=(4, 5), tumbling=(3, 4)),
        termination_cost=200.0,
        euler=True,
    ),
}


@dataclass(frozen=True)
class Config:
    cases: tuple[str, ...] = tuple(CASES)
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 0
    out: Path = RESULTS / "endurance"


def run(name: str, seed: int, threads: int) -> dict[str, Any]:
    case, world = CASES[name], gym_world(name)
    if case.euler:
        world = world.with_model(world.model, planning_model=returns.with_euler(world.model))
    problem = world.problem(
        case.horizon,
        threads=threads,
        terminal_value=case.value(world) if case.value else None,
        termination_cost=case.termination_cost,
    )
    result = returns.episode(world, problem, case.planner, seed, steps=case.steps)
    result |= {"env": name, "seed": seed, "horizon": case.horizon, "wanted_steps": case.steps}
    result |= {"planner": type(case.planner).__name__, "settings": dataclasses.asdict(case.planner)}
    result |= {"terminal_cost": None if case.value is None else case.value.__qualname__.split(".")[0]}
    result |= {
        "termination_cost": case.termination_cost,
        "planning_integrator": "euler" if case.euler else None,
    }
    return result


def main(config: Config) -> None:
    torch.set_num_threads(1)
    for seed in config.seeds:
        for name in config.cases:
            path = config.out / f"{name}-{seed}.json"
            if not path.exists():
                write(path, {**run(name, seed, config.threads), "machine": machine()})
    table = Table("world", "seed", "steps", "fell", "return", "planner", "model steps", "plan, ms")
    for path in sorted(config.out.glob("*.json")):
        result = json.loads(path.read_text())
        table.add_row(
            result["env"],
            str(result["seed"]),
            f"{result['steps']} of {result['wanted_steps']}",
            "yes" if result["terminated"] else "no",
            f"{result['return']:.0f}",
            f"{result['planner']}, horizon {result['horizon']}",
            f"{result['model_steps_per_plan']:,.0f}",
            f"{result['plan_ms']['median']:.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
