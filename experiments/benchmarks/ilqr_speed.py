"""How fast are iLQR and DDP? Against crocoddyl 3.2.1 (C++) and mpc 0.0.6 (mpc.pytorch), on their own problems, in turn.

    python -m mbrl.experiments.benchmarks.ilqr_speed

Three problems, each from one start and from many: crocoddyl's unicycle over 100 steps; a linear-quadratic problem with
|u| ≤ 1 over 30, whose optimum from the first start is 63.8630422864; and mpc.pytorch's pendulum over 20. Every side starts
from controls of zero, stops by its own rule at its own defaults (mpc.pytorch: those of its example notebook), and is given
to one evaluator, `mbrl.evaluate`, to compare costs. crocoddyl solves one problem after another on one thread; mpc.pytorch
takes the batch. Of crocoddyl's solvers and starts, and of mpc.pytorch's Jacobians by hand or by autodiff, the fastest counts.
Ours is timed with `init` and `plan`; the share of its parts is measured by timers around them, in further solves.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.derivatives import Autodiff
from mbrl.envs.systems import Discretized, DoubleIntegrator, Unicycle
from mbrl.experiments.benchmarks.peer import FOLDER, Peer, python_with, serve
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.planners import DDP, ILQR
from mbrl.planners.ilqr import _Search
from mbrl.problem import Box, Plan, Problem
from mbrl.rollout import evaluate
from mbrl.symbolic import Symbolic
from mbrl.symbolic_horizon import SymbolicHorizon

CROCODDYL = (
    "crocoddyl==3.2.1", "libcrocoddyl==3.2.1", "pin==4.1.0", "libpinocchio==4.1.0", "eigenpy==3.13.0", "coal==3.0.3",
    "libcoal==3.0.3", "cmeel==0.62.0", "cmeel-assimp==6.0.5", "cmeel-boost==1.90.0", "cmeel-console-bridge==1.0.2.3",
    "cmeel-octomap==1.10.0", "cmeel-qhull==8.0.2.1", "cmeel-tinyxml2==11.0.0", "cmeel-urdfdom==6.0.0",
    "cmeel-zlib==1.3.2",
)  # fmt: skip
MPC_PYTORCH = ("mpc==0.0.6",)
PLANNERS = {"iLQR": ILQR(), "DDP": DDP()}


@dataclass(frozen=True)
class Config:
    passes: int = 21
    passes_many: int = 5
    threads: int = 2
    """Of many problems at once; a single one is solved on one."""
    seed: int = 0
    out: Path = RESULTS / "ilqr_speed.json"


@dataclass(frozen=True)
class Quadratic:
    """½ Σ (Q y² + R u²) + Σ q y per step, ½ Σ Qf y² at the end."""

    Q: tuple[float, ...]
    R: tuple[float, ...]
    Qf: tuple[float, ...]
    q: tuple[float, ...] = (0.0, 0.0, 0.0)

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return _dot(y**2, self.Q) / 2 + _dot(y, self.q[: y.shape[-1]]) + _dot(u**2, self.R) / 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return _dot(y**2, self.Qf) / 2


def _dot(v: Tensor, weights: tuple[float, ...]) -> Tensor:
    result: Tensor = v @ torch.tensor(weights, dtype=torch.float64).to(v)
    return result


@dataclass(frozen=True)
class PendulumDx:
    """mpc.pytorch's pendulum, as in its env_dx/pendulum.py. y = x = (cos, sin, rate), 0 upright; |u| ≤ 2."""

    dt: float = 0.05
    gravity: float = 10.0
    nx: int = 3
    nu: int = 1
    ny: int = 3

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        cos, sin, rate = x.unbind(-1)
        rate = rate + self.dt * (1.5 * self.gravity * sin + 3 * u[..., 0])
        angle = torch.atan2(sin, cos) + self.dt * rate
        return torch.stack([angle.cos(), angle.sin(), rate], -1)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Case:
    """A problem, where it starts, and against whom.

    Attributes:
        first: x0 (nx,) of the single problem.
        many: how many starts there are, of which `first` is one.
        spread: the others are uniform within ± these numbers.
        wanted: of one problem and of many, how many times faster is wanted than `against`, per problem.
    """

    problem: Callable[[], Problem[Symbolic, Quadratic, Box]]
    first: tuple[float, ...]
    many: int
    spread: tuple[float, ...]
    against: tuple[str, ...]
    sides: tuple[str, ...]
    wanted: tuple[float, float]
    repeats: int

    def starts(self, generator: torch.Generator) -> Tensor:
        draws = 2 * torch.rand(self.many - 1, len(self.spread), generator=generator, dtype=torch.float64) - 1
        x0 = torch.tensor(self.spread, dtype=torch.float64) * draws
        if self.problem is pendulum:
            x0 = torch.stack([x0[:, 0].cos(), x0[:, 0].sin(), x0[:, 1]], -1)
        return torch.cat([torch.tensor([self.first], dtype=torch.float64), x0])


def box(nu: int, limit: float) -> Box:
    limits = torch.full((nu,), limit, dtype=torch.float64)
    return Box(-limits, limits)


def unicycle() -> Problem[Symbolic, Quadratic, Box]:
    """As crocoddyl's ActionModelUnicycle: dt 0.1 s, weights 10 of the state and 1 of the control, squared."""
    cost = Quadratic((100.0,) * 3, (1.0, 1.0), (100.0,) * 3)
    return Problem(Symbolic(Discretized(Unicycle(), 0.1, "euler")), cost, box(2, torch.inf), 100)


def bounded_lq() -> Problem[Symbolic, Quadratic, Box]:
    cost = Quadratic((1.0, 0.1), (0.01,), (10.0, 1.0))
    return Problem(Symbolic(Discretized(DoubleIntegrator(), 0.1)), cost, box(1, 1.0), 30)


def pendulum() -> Problem[Symbolic, Quadratic, Box]:
    cost = Quadratic((1.0, 1.0, 0.1), (0.001,), (0.0, 0.0, 0.0), (-1.0, 0.0, 0.0))
    return Problem(Symbolic(PendulumDx()), cost, box(1, 2.0), 20)


MPC_SIDES = ("mpc.pytorch, ANALYTIC", "mpc.pytorch, AUTO_DIFF")
CASES = {
    "unicycle": Case(
        unicycle, (-1.0, -1.0, 1.0), 256, (1.0, 1.0, 1.0), ("crocoddyl",), ("iLQR", "DDP"), (0.2, 1.0), 20
    ),
    "bounded LQ": Case(bounded_lq, (3.0, 0.0), 256, (3.0, 1.0), ("crocoddyl",), ("iLQR",), (0.2, 1.0), 50),
    "pendulum": Case(
        pendulum, (0.0, 1.0, 0.0), 64, (torch.pi / 2, 1.0), MPC_SIDES, ("iLQR", "DDP"), (20.0, 20.0), 1
    ),
}


def ours(setting: dict[str, Any]) -> None:
    """Our side of the comparison, as a `Peer`."""
    torch.set_num_threads(setting["threads"])
    numba.set_num_threads(setting["threads"])
    problem, planner = CASES[setting["case"]].problem(), PLANNERS[setting["planner"]]
    x0 = torch.from_numpy(np.load(setting["starts"]))
    generator = torch.Generator()

    def solve() -> Plan:
        state = planner.init(problem, x0, generator=generator)
        return planner.plan(problem, x0, state, generator=generator)[0]

    plan = solve()  # and builds what is built once
    np.save(setting["controls"], plan.actions.numpy())
    assert isinstance(plan.info["iterations"], Tensor)
    facts = {"iterations": float(plan.info["iterations"].double().mean()), "where": shares(solve)}

    def work() -> dict[str, Any]:
        tic = time.perf_counter()
        for _ in range(setting["repeats"]):
            solve()
        return {"seconds": (time.perf_counter() - tic) / setting["repeats"], **facts}

    serve(work)


def shares(solve: Callable[[], object], seconds: float = 1.0) -> dict[str, float]:
    """What share of the time of `solve` its parts take."""
    spent: Counter[str] = Counter()

    def timed(name: str, fun: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tic = time.perf_counter()
            result = fun(*args, **options)
            spent[name] += time.perf_counter() - tic  # type: ignore[assignment]
            return result

        return call

    parts = (
        (SymbolicHorizon, "roll", "roll-outs"),
        (SymbolicHorizon, "expand", "derivatives"),
        (_Search, "_backward", "backward sweeps"),
    )
    with ExitStack() as stack:
        for owner, attribute, name in parts:
            patch = mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute)))
            stack.enter_context(patch)
        start = time.perf_counter()
        while (total := time.perf_counter() - start) < seconds:
            solve()
    result = {name: spent[name] / total for name in dict.fromkeys(name for *_, name in parts)}
    return {**result, "the rest": 1 - sum(result.values())}


def compare(name: str, problems: int, x0: Tensor, config: Config) -> dict[str, Any]:
    """Interleaved passes of all sides; the first is thrown away."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    case, here = CASES[name], Path(__file__)
    problem, threads = case.problem(), 1 if problems == 1 else config.threads
    starts = FOLDER.resolve() / "starts.npy"
    np.save(starts, x0.numpy())
    setting = {"case": name, "starts": str(starts), "horizon": problem.horizon}
    setting["repeats"] = case.repeats if problems == 1 else 1

    def controls(side: str) -> str:
        return str(FOLDER.resolve() / f"{side}.npy")

    def peer(side: str, command: list[str], **more: Any) -> Peer:
        told = json.dumps({**setting, **more, "controls": controls(side)})
        return Peer([*command[1:], told], python=command[0], threads=more["threads"])

    sides: dict[str, dict[str, Any]] = {}
    for side in case.against:
        if side == "crocoddyl":
            python, script = python_with("crocoddyl", CROCODDYL), here.with_name("peer_crocoddyl.py")
            more = {"threads": 1, **(lq_matrices(problem) if name == "bounded LQ" else {})}
        else:
            python, script = python_with("mpc", MPC_PYTORCH), here.with_name("peer_mpc_pytorch.py")
            more = {"threads": threads, "method": side.split(", ")[1]}
        sides[side] = {"command": [python, str(script)], **more}
    module = [sys.executable, "-m", "mbrl.experiments.benchmarks.ilqr_speed", "--serve"]
    for planner in case.sides:
        for n in sorted({1, threads}):
            label = f"ours, {planner}" + f", {n} threads" * (n > 1)
            sides[label] = {"command": module, "planner": planner, "threads": n}

    seen: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with ExitStack() as stack:
        running = {side: stack.enter_context(peer(side, **how)) for side, how in sides.items()}
        for i in range((config.passes if problems == 1 else config.passes_many) + 1):
            for side, each in running.items():
                result = each.run()
                if i > 0:
                    seen[side].append(result)
    medians = {side: statistics.median(r["seconds"] for r in results) for side, results in seen.items()}
    fastest = min(case.against, key=medians.__getitem__)
    costs = {side: cost(problem, x0, torch.from_numpy(np.load(controls(side)))) for side in sides}
    return {
        "case": name,
        "problems": problems,
        "horizon": problem.horizon,
        "against": fastest,
        "wanted": case.wanted[problems > 1],
        "sides": {
            side: {
                "threads": sides[side]["threads"],
                "seconds": [r["seconds"] for r in seen[side]],
                "median_s": medians[side],
                "times_faster": medians[fastest] / medians[side],
                "iterations": seen[side][0].get("iterations"),
                "where": seen[side][0].get("where"),
                "cost": float(costs[side].mean()),
                **against(costs[side], costs[fastest]),
            }
            for side in sides
        },
    }


def lq_matrices(problem: Problem[Any, Quadratic, Any]) -> dict[str, Any]:
    """A, B, Q, R and Qf of a linear-quadratic problem, in this order."""
    dynamics, cost = Autodiff(problem.dynamics), problem.cost
    A, B = dynamics.linearize(torch.zeros(dynamics.nx).double(), torch.zeros(dynamics.nu).double(), 0)
    diagonals = {"Q": cost.Q, "R": cost.R, "Qf": cost.Qf}
    return {"A": A.tolist(), "B": B.tolist(), **{name: np.diag(d).tolist() for name, d in diagonals.items()}}


def cost(problem: Problem[Any, Any, Box], x0: Tensor, u: Tensor) -> Tensor:
    """The cost (M,) of controls u (M, H, nu), which must be within the limits."""
    if not bool(problem.actions.contains(u).all()):
        raise ValueError(f"Controls beyond the limits: up to {float(u.abs().max())}.")
    return evaluate(problem, problem.dynamics, x0, u[:, None]).cost[:, 0]


def against(cost: Tensor, other: Tensor, margin: float = 1e-6) -> dict[str, Any]:
    """By how much a cost (M,) is above another, relatively: at most, and in how many problems by more than `margin`."""
    above = (cost - other) / other.abs()
    return {
        "most_above": float(above.max()),
        "higher": int((above > margin).sum()),
        "lower": int((above < -margin).sum()),
    }


def cells(side: dict[str, Any], problems: int) -> list[str]:
    """A side of a case as cells of a table."""
    where = side["where"] or {}
    return [
        str(side["threads"]),
        f"{1e3 * side['median_s'] / problems:,.2f}",
        f"{side['times_faster']:.2f}",
        "" if side["iterations"] is None else f"{side['iterations']:.1f}",
        f"{side['cost']:.8g}",
        f"{side['lower']} / {side['higher']}",
        ", ".join(f"{name} {100 * share:.0f} %" for name, share in where.items()),
    ]


HEAD = (
    "problem", "at once", "side", "threads", "ms a problem", "times faster", "iterations", "mean cost",
    "lower / higher cost", "where the time goes",
)  # fmt: skip


def main(config: Config) -> None:
    torch.set_num_threads(1)
    table, cases = Table(*HEAD), []
    for name, case in CASES.items():
        x0 = case.starts(torch.Generator().manual_seed(config.seed))
        for problems in (1, case.many):
            result = compare(name, problems, x0[:problems], config)
            cases.append(result)
            for side, row in result["sides"].items():
                table.add_row(name, str(problems), side, *cells(row, problems))
    settings = {
        "passes": config.passes,
        "passes_many": config.passes_many,
        "threads": config.threads,
        "seed": config.seed,
    }
    write(config.out, {"cases": cases, "config": settings, "machine": machine()})
    Console(width=190).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ours(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
