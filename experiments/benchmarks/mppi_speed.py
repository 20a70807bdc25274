"""How fast is an MPPI command? Against pytorch_mppi 0.9.1 on the same processor, with the same network, in turn.

    python -m mbrl.experiments.benchmarks.mppi_speed

The work: 1,000 perturbations of a plan of 30 steps, white noise of deviation 1, temperature 1, on x' = x + 0.1 net(x, u)
with a net of 4 × 200, 17 states and 6 actions; cost |x|² + 0.01 |u|² of the state that is reached. Each command starts
from the plan before, in the same state, so both sides improve one plan; its return is told, to compare their worth.
Ours is timed with all that `MPC` does, among it one more scoring of the plan that is followed. bfloat16 is tried where the
processor multiplies it in hardware.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.estimators import Observed
from mbrl.experiments.benchmarks.peer import FOLDER, Peer, python_with, serve
from mbrl.experiments.benchmarks.pets_speed import cells
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import Ensemble, TSInf
from mbrl.mpc import MPC
from mbrl.planners import MPPI
from mbrl.problem import Box, Problem
from mbrl.rollout import evaluate, realize

PACKAGES = ("pytorch-mppi==0.9.1", "arm-pytorch-utilities==0.5.0", "pytorch-seed==0.2.0")
SETTING = {"ny": 17, "nu": 6, "population": 1_000, "horizon": 30, "seed": 0}


@dataclass(frozen=True)
class Config:
    activations: tuple[str, ...] = ("relu", "silu")
    passes: int = 20
    threads: int = 2
    out: Path = RESULTS / "mppi_speed.json"


class Quadratic:
    """|x|² + 0.01 |u|² of the state that is reached."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return (y_next * y_next).sum(-1) + 0.01 * (u * u).sum(-1)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros_like(y[..., 0])


def network(setting: dict[str, Any]) -> Ensemble:
    """One deterministic network; what it says is multiplied by 0.1."""
    generator = torch.Generator().manual_seed(setting["seed"])
    sizes, kind = (setting["ny"], setting["nu"]), setting["activation"]
    model = Ensemble(*sizes, 0.1, members=1, activation=kind, probabilistic=False, generator=generator)
    model.target_scale.fill_(0.1)
    return model


def ours(setting: dict[str, Any]) -> None:
    """Our side of the comparison, as a `Peer`."""
    torch.set_num_threads(setting["threads"])
    box = Box(-torch.ones(setting["nu"]), torch.ones(setting["nu"]))
    dynamics = TSInf(network(setting), getattr(torch, setting["dtype"]))
    problem = Problem(dynamics, Quadratic(), box, setting["horizon"])
    planner = MPPI(population=setting["population"], temperature=1.0, std=1.0, beta=0.0)
    generator = torch.Generator().manual_seed(setting["seed"])
    mpc = MPC(problem, planner, estimator=Observed(torch.float32), generator=generator)
    start = torch.ones(1, setting["ny"])
    exact, _ = realize(
        Problem(TSInf(dynamics.model), Quadratic(), box, setting["horizon"]), generator=generator
    )

    def command() -> dict[str, float]:
        tic = time.perf_counter()
        mpc(start)
        seconds = time.perf_counter() - tic
        assert mpc.report is not None
        cost = evaluate(problem, exact, start, mpc.report.plan.actions[:, None]).cost
        return {"seconds": seconds, "return": -float(cost)}

    with torch.no_grad():
        serve(command)


def compare(setting: dict[str, Any], passes: int) -> dict[str, Any]:
    """Interleaved passes of both sides; the first five are thrown away."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    weights, net = FOLDER / "mppi.safetensors", network(setting).net
    layers = {f"weight{i}": w.detach() for i, w in enumerate(net.weights)}
    safetensors.torch.save_file(layers | {f"bias{i}": b.detach() for i, b in enumerate(net.biases)}, weights)
    theirs = json.dumps({**setting, "weights": str(weights.resolve())})
    script, threads = str(Path(__file__).with_name("peer_pytorch_mppi.py")), setting["threads"]
    peers = {
        "pytorch_mppi": Peer([script, theirs], python=python_with("pytorch-mppi", PACKAGES), threads=threads)
    }
    for dtype in ["float32"] + ["bfloat16"] * torch.cpu._is_amx_tile_supported():
        side = json.dumps({**setting, "dtype": dtype})
        peers[f"ours, {dtype}"] = Peer(
            ["-m", "mbrl.experiments.benchmarks.mppi_speed", "--serve", side], threads=threads
        )
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    with ExitStack() as stack:
        for peer in peers.values():
            stack.enter_context(peer)
        for i in range(passes + 5):
            for name, peer in peers.items():
                result = peer.run()
                if i >= 5:
                    seen[name].append(result)
    widths = [setting["ny"] + setting["nu"], 200, 200, 200, 200, setting["ny"]]
    gflop = 2e-9 * setting["population"] * setting["horizon"] * sum(a * b for a, b in pairwise(widths))
    medians = {name: statistics.median(r["seconds"] for r in results) for name, results in seen.items()}
    return {
        "setting": setting,
        "gflop": gflop,
        "sides": {
            name: {
                "seconds": [r["seconds"] for r in results],
                "median_s": medians[name],
                "times_faster": medians["pytorch_mppi"] / medians[name],
                "tflop_per_s": 1e-3 * gflop / medians[name],
                "worth_mean": statistics.mean(r["return"] for r in results),
                "worth_std": statistics.pstdev(r["return"] for r in results),
            }
            for name, results in seen.items()
        },
    }


def main(config: Config) -> None:
    table = Table("network", "side", "median, s", "times faster", "TFLOP/s", "return of the plan")
    cases = {}
    for activation in config.activations:
        setting = {**SETTING, "activation": activation, "threads": config.threads}
        cases[activation] = compare(setting, config.passes)
        for name, side in cases[activation]["sides"].items():
            table.add_row(activation, name, *cells(side))
    write(config.out, {"cases": cases, "machine": machine()})
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ours(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
