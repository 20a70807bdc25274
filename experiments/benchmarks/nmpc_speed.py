"""How fast is nonlinear MPC in closed loop? Against do-mpc 5.1.2 with its defaults, and against CasADi by hand, in turn.

    python -m mbrl.experiments.benchmarks.nmpc_speed

Two plants: a cart-pole that swings up within ±20 N (60 steps of 0.05 s, horizon 40), and do-mpc's own example, a reactor
with a soft limit and weighted moves (50 steps of 0.005 h, horizon 20). do-mpc is given the cart-pole's ODE, the stage cost
and, of the last state, the same cost without the input; of its options, only the printing is off. By hand means multiple
shooting with RK4, scalar expressions and fatrop, with the shifted solution as guess, interpreted or as C from gcc -O3. The
cart-pole is integrated by one integrator for all; do-mpc's reactor by its own simulator, ours by an equal one.

Every side runs in a process of its own, on one thread, and is asked for one closed loop after another, in turn; the first
is thrown away. Times are of the processor and of whole control steps, of ours of `MPC.__call__`; of a step its median over
the passes. The reactor's closed loops are also compared state by state.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.envs.reactor import CSTR
from mbrl.envs.systems import CartPole, Discretized
from mbrl.estimators import Observed
from mbrl.experiments.benchmarks import plants
from mbrl.experiments.benchmarks.peer import FOLDER, Peer, python_with, serve
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.mpc import MPC
from mbrl.planners import NMPC
from mbrl.problem import Box, Constraint, Problem
from mbrl.symbolic import Symbolic

DO_MPC = ("do-mpc==5.1.2", "pandas==2.3.3", "pytz==2025.2")
ANGLES = (-0.5, -0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5)
"""rad from upright, at rest, from which the real-time iteration and the converged solver recover."""


@dataclass(frozen=True)
class Config:
    passes: int = 9
    out: Path = RESULTS / "nmpc_speed.json"


@dataclass(frozen=True)
class SwingUp:
    """x² + 10 (1 − cos θ) + 0.01 u², with the angle from hanging: θ = y₁ − π."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.terminal(y, p) + 0.01 * u[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return y[..., 0] ** 2 + 10 * (1 + y[..., 1].cos())


def swing_up() -> Problem[Symbolic, SwingUp, Box]:
    limit = torch.tensor([plants.LIMIT], dtype=torch.float64)
    system = CartPole(plants.CART, plants.POLE, plants.LENGTH, plants.GRAVITY)
    dynamics = Symbolic(Discretized(system, plants.DT))
    return Problem(dynamics, SwingUp(), Box(-limit, limit), plants.HORIZON)


@dataclass(frozen=True)
class WithMoves:
    """A reactor whose last inputs are part of its state: y = x = (state (4,), last inputs (2,))."""

    plant: Discretized
    nx: int = 6
    nu: int = 2
    ny: int = 6

    @property
    def dt(self) -> float:
        return self.plant.dt

    def ode(self, x: Tensor, u: Tensor) -> Tensor:
        """Of the state alone: the last inputs change from step to step."""
        return self.plant.ode(x[..., :4], u)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        after = self.plant.step(x[..., :4], u, k)
        return torch.cat([after, u.expand(*after.shape[:-1], 2)], -1)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Production:
    """(B − 0.6)² and the moves of the inputs, weighted by 0.1 and 1e-3, in the units of `CSTR`."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        moves = (u - y[..., 4:]) ** 2
        return self.terminal(y, p) + 0.1 * moves[..., 0] + 1e-3 * moves[..., 1]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return (y[..., 1] - 0.6) ** 2


SIZES = np.array([1.0, 1.0, 100.0, 100.0]), np.array([100.0, 2000.0])
"""Of states and inputs: of `CSTR` in those of `plants.reactor`."""
LOW, HIGH = (0.1, 0.1, 0.5, 0.5), (2.0, 2.0, 1.4)


def within(y: Tensor, u: Tensor, k: int, p: Tensor | None) -> Tensor:
    low = [low - y[..., i] for i, low in enumerate(LOW)]
    return torch.stack([*low, *(y[..., i] - HIGH[j] for j, i in enumerate((0, 1, 3)))], -1)


def cool(y: Tensor, u: Tensor, k: int, p: Tensor | None) -> Tensor:
    return y[..., 2:3] - 1.4


def reactor() -> Problem[Symbolic, Production, Box]:
    low, high = torch.tensor([[0.05, -4.25], [1.0, 0.0]], dtype=torch.float64)
    dynamics = Symbolic(WithMoves(Discretized(CSTR(), plants.REACTOR_DT, substeps=4)))
    limits = Constraint(within), Constraint(cool, soft=1e4)  # per 100 °C
    return Problem(dynamics, Production(), Box(low, high), plants.REACTOR_HORIZON, constraints=limits)


Side = dict[str, Any]
SWING_UP: dict[str, NMPC] = {
    "fatrop": NMPC(),
    "real-time iteration": NMPC(solver="sqp", iterations=1),
}
REACTOR: dict[str, NMPC] = {"fatrop": NMPC(transcription="radau", degree=2)}
WANTED = {
    ("swing-up", "do-mpc", "fatrop"): 4.5,
    ("swing-up", "by hand", "fatrop"): 1 / 1.15,
    ("reactor", "do-mpc", "fatrop"): 3.0,
}
"""How many times as fast as which peer, at the median."""
AGAINST = {"fatrop": "by hand", "generated code": "by hand, compiled"}
"""The sides that are the same but for who wrote them."""


# ---- ours -----------------------------------------------------------------------------------------------------------
def ours(setting: dict[str, Any]) -> None:
    """Our side, as a `Peer`: each pass with a new `MPC`; what is built once is built before."""
    torch.set_num_threads(1)
    run = {"swing-up": our_swing_up, "reactor": our_reactor, "recovery": our_recovery}[setting["case"]]
    run(setting["side"])

    def work() -> dict[str, Any]:
        result: dict[str, Any] = run(setting["side"])
        return result

    serve(work)


def controller(problem: Problem[Any, Any, Box], planner: NMPC) -> Callable[[np.ndarray[Any, Any]], Any]:
    """x (nx,) -> u (nu,), by an `MPC` without memory of other closed loops."""
    mpc = MPC(problem, planner, estimator=Observed(), generator=torch.Generator())

    def act(x: np.ndarray[Any, Any]) -> Any:
        action = mpc(torch.from_numpy(x)[None])
        if mpc.fallbacks:
            raise RuntimeError(f"A plan was not followed at {x}: {mpc.report}")
        return action[0].numpy()

    return act


def our_swing_up(side: str, start: tuple[float, ...] = plants.START) -> dict[str, Any]:
    act = controller(swing_up(), SWING_UP[side])
    step = plants.Clock(lambda x: act(x + np.array([0.0, np.pi, 0.0, 0.0]))[0])
    return timed(plants.swing_up(step, start), step)


def our_reactor(side: str) -> dict[str, Any]:
    act, last = controller(reactor(), REACTOR[side]), np.zeros(2)

    def control(x: np.ndarray[Any, Any]) -> Any:
        nonlocal last
        last = act(np.concatenate([x / SIZES[0], last]))
        return last * SIZES[1]

    step = plants.Clock(control)
    return timed(plants.react(step), step)


def our_recovery(side: str) -> dict[str, Any]:
    """The cost of each of `ANGLES`, and all steps' times."""
    results = [our_swing_up(side, (0.0, angle, 0.0, 0.0)) for angle in ANGLES]
    joined: dict[str, Any] = {name: sum((r[name] for r in results), []) for name in ("wall_s", "processor_s")}
    return {"costs": [r["cost"] for r in results], **joined}


def timed(result: dict[str, Any], step: plants.Clock) -> dict[str, Any]:
    wall, processor = step.seconds
    return {**result, "wall_s": wall, "processor_s": processor}


# ---------------------------------------------------------------------------------------------------------------------
def commands(case: str) -> dict[str, list[str]]:
    """How each side of a case is started."""
    here, own = Path(__file__), [sys.executable, "-m", "mbrl.experiments.benchmarks.nmpc_speed", "--serve"]

    def side(command: list[str], **setting: Any) -> list[str]:
        return [*command, json.dumps(setting)]

    sides = {}
    if case != "recovery":
        do_mpc = [python_with("do-mpc", DO_MPC), str(here.with_name("peer_do_mpc.py"))]
        sides["do-mpc"] = side(do_mpc, case=case, n_robust=0)
    if case == "swing-up":
        hand = [sys.executable, str(here.with_name("peer_casadi_fatrop.py"))]
        sides["by hand"] = side(hand, compiled=False)
        sides["by hand, compiled"] = side(hand, compiled=True)
    for name in REACTOR if case == "reactor" else SWING_UP:
        sides[name] = side(own, case=case, side=name)
    return sides


def compare(case: str, passes: int) -> dict[str, Any]:
    """Closed loops of all sides in turn."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    seen: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(Peer(command[1:], python=command[0], threads=1))
            for name, command in commands(case).items()
        }
        for i in range(passes + 1):
            for name, peer in running.items():
                result = peer.run()
                if i > 0:
                    seen.setdefault(name, []).append(result)
    sides = {name: summarise(results) for name, results in seen.items()}
    for side in sides.values():
        for name in {"do-mpc", "by hand", "by hand, compiled"} & sides.keys():
            side.setdefault("times_faster", {})[name] = {
                what: sides[name][what] / side[what] for what in ("median_ms", "worst_ms")
            }
        if "do-mpc" in sides:
            side["above"] = side["cost"] / sides["do-mpc"]["cost"] - 1
            side["apart"] = apart(side, sides["do-mpc"])
    return {"case": case, "sides": sides}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's closed loop and the times of its steps in ms, of each the median over the passes."""
    summary = {name: results[0][name] for name in ("states", "inputs", "cost", "costs") if name in results[0]}
    for clock in ("processor", "wall"):
        passes = np.array([r[f"{clock}_s"] for r in results])
        summary[f"{clock}_ms"] = (1e3 * np.median(passes, 0)).tolist()
    first, *rest = summary["processor_ms"]
    return {
        **summary,
        "median_ms": statistics.median([first, *rest]),
        "worst_ms": max(rest),
        "first_ms": first,
    }


def apart(side: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two closed loops' states, relative to how far each state ranges."""
    x, y = np.array(side["states"]), np.array(other["states"])
    return float((abs(x - y).max(0) / np.ptp(y, axis=0)).max())


HEAD = (
    "plant", "side", "median, ms", "worst after the first, ms", "first, ms", "times as fast as do-mpc (median; worst)",
    "as by hand (median)", "closed-loop cost", "above do-mpc's", "states apart from do-mpc's",
)  # fmt: skip


def cells(name: str, side: dict[str, Any]) -> list[str]:
    """A side of a case as cells of a table."""
    times = side.get("times_faster", {})
    rival = times.get("do-mpc")
    hand = times.get(AGAINST.get(name, ""))
    return [
        f"{side['median_ms']:.2f}",
        f"{side['worst_ms']:.2f}",
        f"{side['first_ms']:.1f}",
        f"{rival['median_ms']:.2f}; {rival['worst_ms']:.2f}" if rival else "",
        f"{hand['median_ms']:.2f}" if hand else "",
        f"{side['cost']:.5g}" if "cost" in side else f"{sum(side['costs']):.5g}",
        f"{100 * side['above']:+.3f} %" if "above" in side else "",
        f"{side['apart']:.1e}" if "apart" in side else "",
    ]


def recovery(case: dict[str, Any]) -> list[float]:
    """By how much the real-time iteration's costs are above the converged solver's, relatively, for each of `ANGLES`."""
    costs, others = (case["sides"][name]["costs"] for name in ("real-time iteration", "fatrop"))
    return [cost / other - 1 for cost, other in zip(costs, others, strict=True)]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    cases = [compare(case, config.passes) for case in ("swing-up", "reactor", "recovery")]
    write(config.out, {"cases": cases, "config": {"passes": config.passes}, "machine": machine()})
    shown = Table(*HEAD)
    for case in cases:
        for name, side in case["sides"].items():
            shown.add_row(case["case"], name, *cells(name, side))
    Console(width=190).print(shown)
    print(
        f"Real-time iteration, recovery: at most {100 * max(recovery(cases[-1])):.3f} % above the converged cost."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ours(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
