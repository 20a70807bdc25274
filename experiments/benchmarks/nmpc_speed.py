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

import itertools
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
from mbrl.planners import NMPC, ScenarioNMPC
from mbrl.previous_action import WithPreviousAction
from mbrl.problem import Box, Constraint, Problem
from mbrl.scenarios import Scenarios
from mbrl.symbolic import Symbolic

DO_MPC = ("do-mpc==5.1.2", "pandas==2.3.3", "pytz==2025.2")
ANGLES = (-0.5, -0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5)
"""rad from upright, at rest, from which the real-time iteration and the converged solver recover."""


@dataclass(frozen=True)
class Config:
    passes: int = 5
    passes_robust: int = 1
    """Of the reactor with nine scenarios."""
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
class Production:
    """(B − 0.6)² and the moves of the inputs, weighted by 0.1 and 1e-3, in the units of `CSTR`."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        moves = (u - y[..., 4:]) ** 2
        return self.terminal(y, p) + 0.1 * moves[..., 0] + 1e-3 * moves[..., 1]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return (y[..., 1] - 0.6) ** 2


SCENARIOS = tuple(itertools.product((1.0, 1.05, 0.95), (1.0, 1.1, 0.9)))
"""Values of (alpha, beta)."""
SIZES = np.array([1.0, 1.0, 100.0, 100.0]), np.array([100.0, 2000.0])
"""Of states and inputs: of `CSTR` in those of `plants.reactor`."""
LOW, HIGH = (0.1, 0.1, 0.5, 0.5), (2.0, 2.0, 1.4)


def within(y: Tensor, u: Tensor, k: int, p: Tensor | None) -> Tensor:
    low = [low - y[..., i] for i, low in enumerate(LOW)]
    return torch.stack([*low, *(y[..., i] - HIGH[j] for j, i in enumerate((0, 1, 3)))], -1)


def cool(y: Tensor, u: Tensor, k: int, p: Tensor | None) -> Tensor:
    return 100 * y[..., 2:3] - 140  # °C, as solvers relax bounds of slacks by 1e-8 of their unit


def model(alpha: float = 1.0, beta: float = 1.0) -> Symbolic:
    plant = Discretized(
        CSTR(), plants.REACTOR_DT, substeps=2, p=torch.tensor([alpha, beta], dtype=torch.float64)
    )
    return Symbolic(WithPreviousAction(plant))


def reactor(scenarios: bool = False) -> Problem[Any, Production, Box]:
    """The penalty of the soft limit is 100 per °C and scenario in do-mpc, whose cost is the mean of the scenarios."""
    low, high = torch.tensor([[0.05, -4.25], [1.0, 0.0]], dtype=torch.float64)
    members = tuple(model(*p) for p in (SCENARIOS if scenarios else SCENARIOS[:1]))
    limits = Constraint(within), Constraint(cool, soft=100.0 * len(members))
    dynamics = Scenarios(members) if scenarios else members[0]
    return Problem(dynamics, Production(), Box(low, high), plants.REACTOR_HORIZON, constraints=limits)


CONVERGED = NMPC()
SWING_UP: dict[str, NMPC] = {
    "ours": CONVERGED,
    "ours, generated code": NMPC(generate_code=True),
    "ours, real-time iteration": NMPC(solver="sqp", iterations=1),
}
REACTOR: dict[str, NMPC] = {
    "ours": NMPC(tolerance=1e-8),
    "ours, generated code": NMPC(tolerance=1e-8, generate_code=True),
    "ours, collocation": NMPC(transcription="radau", degree=2, tolerance=1e-8),
}
# In do-mpc ipopt divides the cost of the scenarios by 9, for its gradient by the first slack is 900 and may be 100: 9e-8 is
# its tolerance in our units. It stops early in a flat cost, so both are also solved to the end.
ROBUST: dict[str, NMPC] = {
    "ours": ScenarioNMPC(shared=1, tolerance=1e-8),
    "ours, collocation": ScenarioNMPC(
        shared=1, transcription="radau", degree=2, solver="ipopt", tolerance=9e-8
    ),
    "ours, collocation, converged": ScenarioNMPC(shared=1, transcription="radau", degree=2, tolerance=1e-9),
}
RECOVERY = {name: SWING_UP[name] for name in ("ours", "ours, real-time iteration")}
OURS = {"swing-up": SWING_UP, "reactor": REACTOR, "recovery": RECOVERY, "reactor, 9 scenarios": ROBUST}
AGAINST = {"ours": "by hand", "ours, generated code": "by hand, compiled"}
"""The sides that are the same but for who wrote them."""
CLOSELY = "do-mpc, converged"
"""With a tolerance of 1e-12 instead of its default."""
# Times as fast as do-mpc, at the median and at the worst step after the first.
WANTED: dict[tuple[str, str], tuple[float, float | None]] = {
    ("swing-up", "ours"): (4.5, 3.0),
    ("swing-up", "ours, generated code"): (8.0, 3.0),
    ("reactor", "ours"): (3.0, None),
}


# ---- ours -----------------------------------------------------------------------------------------------------------
def ours(setting: dict[str, Any]) -> None:
    """Our side, as a `Peer`: each pass with a new `MPC`; what is built once is built before."""
    torch.set_num_threads(1)
    case, side = setting["case"], setting["side"]
    planner, run = OURS[case][side], RUNS[case]
    run(planner)
    serve(lambda: run(planner))


def controller(problem: Problem[Any, Any, Box], planner: NMPC) -> Callable[[np.ndarray[Any, Any]], Any]:
    """x (nx,) -> u (nu,), by an `MPC` without memory of other closed loops.

    The real-time iteration, which follows an optimum but does not look for one, starts from that of `CONVERGED`: it is
    found in the first step.
    """
    mpc: MPC | None = None

    def act(x: np.ndarray[Any, Any]) -> Any:
        nonlocal mpc
        x0 = torch.from_numpy(x)[None]
        if mpc is None:
            generator, guess = torch.Generator(), None
            if planner.iterations == 1:
                state = CONVERGED.init(problem, x0, generator=generator)
                guess, _ = CONVERGED.plan(problem, x0, state, generator=generator)
            mpc = MPC(problem, planner, estimator=Observed(), generator=generator, guess=guess)
        action = mpc(x0)
        if mpc.fallbacks:
            raise RuntimeError(f"A plan was not followed at {x}: {mpc.report}")
        return action[0].numpy()

    return act


def our_swing_up(planner: NMPC, start: tuple[float, ...] = plants.START) -> dict[str, Any]:
    act = controller(swing_up(), planner)
    step = plants.Clock(lambda x: act(x + np.array([0.0, np.pi, 0.0, 0.0]))[0])
    return timed(plants.swing_up(step, start), step)


def our_reactor(planner: NMPC) -> dict[str, Any]:
    act, last = controller(reactor(isinstance(planner, ScenarioNMPC)), planner), np.zeros(2)

    def control(x: np.ndarray[Any, Any]) -> Any:
        nonlocal last
        last = act(np.concatenate([x / SIZES[0], last]))
        return last * SIZES[1]

    step = plants.Clock(control)
    return timed(plants.react(step), step)


def our_recovery(planner: NMPC) -> dict[str, Any]:
    """The cost of each of `ANGLES`, and all steps' times."""
    results = [our_swing_up(planner, (0.0, angle, 0.0, 0.0)) for angle in ANGLES]
    joined = {name: [t for r in results for t in r[name]] for name in ("wall_s", "processor_s")}
    return {"costs": [r["cost"] for r in results], **joined}


def timed(result: dict[str, Any], step: plants.Clock) -> dict[str, Any]:
    wall, processor = step.seconds
    return {**result, "wall_s": wall, "processor_s": processor}


RUNS: dict[str, Callable[[NMPC], dict[str, Any]]] = {
    "swing-up": our_swing_up,
    "reactor": our_reactor,
    "reactor, 9 scenarios": our_reactor,
    "recovery": our_recovery,
}


# ---------------------------------------------------------------------------------------------------------------------
def commands(case: str) -> dict[str, list[str]]:
    """How each side of a case is started."""
    here, own = Path(__file__), [sys.executable, "-m", "mbrl.experiments.benchmarks.nmpc_speed", "--serve"]

    def side(command: list[str], **setting: Any) -> list[str]:
        return [*command, json.dumps(setting)]

    sides = {}
    if case != "recovery":
        do_mpc = [python_with("do-mpc", DO_MPC), str(here.with_name("peer_do_mpc.py"))]
        sides["do-mpc"] = side(do_mpc, case=case, n_robust=int("scenarios" in case))
        if "scenarios" in case:
            sides[CLOSELY] = side(do_mpc, case=case, n_robust=1, tolerance=1e-12)
    if case == "swing-up":
        hand = [sys.executable, str(here.with_name("peer_casadi_fatrop.py"))]
        sides["by hand"] = side(hand, compiled=False)
        sides["by hand, compiled"] = side(hand, compiled=True)
    for name in OURS[case]:
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
        if CLOSELY in sides:
            side["apart_converged"] = apart(side, sides[CLOSELY])
    return {"case": case, "passes": passes, "sides": sides}


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's closed loop and the times of its steps in ms, of each the median over the passes."""
    kept = ("states", "inputs", "cost", "costs")
    summary: dict[str, Any] = {name: results[0][name] for name in kept if name in results[0]}
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
    """The largest difference of two closed loops' states, relative to the largest value of each state."""
    x, y = np.array(side["states"]), np.array(other["states"])
    return float((abs(x - y).max(0) / abs(y).max(0)).max())


HEAD = (
    "plant", "side", "median, ms", "worst after the first, ms", "first, ms", "times as fast as do-mpc (median; worst)",
    "as by hand (median)", "closed-loop cost", "above do-mpc's", "states apart from do-mpc's",
    "from do-mpc's, converged",
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
        *(f"{side[name]:.1e}" if name in side else "" for name in ("apart", "apart_converged")),
    ]


def recovery(case: dict[str, Any]) -> list[float]:
    """By how much the real-time iteration's costs are above the converged solver's, relatively, for each of `ANGLES`."""
    costs, others = (case["sides"][name]["costs"] for name in ("ours, real-time iteration", "ours"))
    return [cost / other - 1 for cost, other in zip(costs, others, strict=True)]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    settings, cases = {"passes": config.passes, "passes_robust": config.passes_robust}, []
    for case in OURS:
        cases.append(compare(case, config.passes_robust if "scenarios" in case else config.passes))
        write(config.out, {"cases": cases, "config": settings, "machine": machine()})
    shown = Table(*HEAD)
    for result in cases:
        for name, side in result["sides"].items():
            shown.add_row(result["case"], name, *cells(name, side))
    Console(width=190).print(shown)
    print(
        f"Real-time iteration, recovery: at most {100 * max(recovery(next(c for c in cases if c['case'] == 'recovery'))):.3f} % above the converged cost."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ours(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
