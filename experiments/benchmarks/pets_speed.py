"""How fast is a PETS plan? Against mbrl-lib 0.2.0 on the same processor, with the same weights, in turn.

    python -m mbrl.experiments.benchmarks.pets_speed

The work: CEM with 5 iterations, a tenth elites, momentum 0.1, TS1 over 20 particles and 5 networks of 4 × 200 with
Gaussian heads, reward = the first number of the next y, no termination. HalfCheetah's sizes are 400 candidates,
horizon 30, 17 + 6 numbers; cart-pole's 500, 15 and 4 + 1. Plans are of equal worth if the returns that each side
expects of its own plans agree within their spread. bfloat16 is tried where the processor multiplies it in hardware.
The epoch of training shows 10,000 synthetic transitions to 5 networks in batches of 256; both sides have then seen
the same number of epochs, and the error is of new transitions, in standard deviations squared.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mbrl.experiments.benchmarks.peer import FOLDER, Peer, python_with, serve
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import TS1, Ensemble, FitConfig, Trainer
from mbrl.planners import CEM
from mbrl.problem import Box, Problem
from mbrl.rollout import evaluate, realize

PACKAGES = (
    *("mbrl==0.2.0", "hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3"),
    *("PyYAML==6.0.2", "termcolor==2.5.0", "tqdm==4.67.1"),
)
MAX_LOGVAR = -6.0
SIZES = {
    "HalfCheetah": {"ny": 17, "nu": 6, "population": 400, "horizon": 30},
    "cart-pole": {"ny": 4, "nu": 1, "population": 500, "horizon": 15},
}


@dataclass(frozen=True)
class Config:
    sizes: tuple[str, ...] = tuple(SIZES)
    activations: tuple[str, ...] = ("relu", "silu")
    passes: int = 5
    threads: int = 2
    out: Path = RESULTS / "pets_speed.json"


class FirstNumber:
    """The cost: minus the first number of the next y."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return -y_next[..., 0]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros_like(y[..., 0])


def ensemble(setting: dict[str, Any]) -> Ensemble:
    """Untrained; its noise is small, or the worth of a plan would drown in it."""
    model = Ensemble(
        setting["ny"],
        setting["nu"],
        0.05,
        members=5,
        activation=setting["activation"],
        generator=torch.Generator().manual_seed(setting["seed"]),
    )
    with torch.no_grad():
        model.max_logvar.fill_(MAX_LOGVAR)
    return model


def ours(setting: dict[str, Any]) -> None:
    """Our side of the comparison, as a `Peer`."""
    torch.set_num_threads(setting["threads"])
    serve(planning(setting) if setting["work"] == "plan" else training(setting))


def planning(setting: dict[str, Any]) -> Callable[[], dict[str, float]]:
    box = Box(-torch.ones(setting["nu"]), torch.ones(setting["nu"]))
    dynamics = TS1(ensemble(setting), getattr(torch, setting["dtype"]))
    problem = Problem(dynamics, FirstNumber(), box, setting["horizon"], particles=20)
    many = replace(problem, particles=1_000)
    planner = CEM(population=setting["population"], iterations=5, elites=setting["population"] // 10)
    generator = torch.Generator().manual_seed(setting["seed"])
    x0 = torch.zeros(1, setting["ny"])

    def work() -> dict[str, float]:
        state = planner.init(problem, x0, generator=generator)
        tic = time.perf_counter()
        plan, _ = planner.plan(problem, x0, state, generator=generator)
        seconds = time.perf_counter() - tic
        drawn, particles = realize(many, generator=generator)
        u = plan.actions[:, None]
        with torch.no_grad():
            cost = evaluate(problem, drawn, x0, u, particles=particles).cost
        return {"seconds": seconds, "return": -float(cost.mean())}

    return work


def training(setting: dict[str, Any]) -> Callable[[], dict[str, float]]:
    data = safetensors.torch.load_file(setting["data"])
    model = ensemble(setting)
    # The loss of the other side: the likelihood alone, and its pull on the bounds.
    config = FitConfig(
        beta=0.0,
        bounds=0.01,
        epochs=1,
        holdout=0.0,
        patience=None,
        decays=(1e-5,),
        mixed=setting["dtype"] == "bfloat16",
    )
    trainer = Trainer(model, config)
    generator = torch.Generator().manual_seed(setting["seed"])

    def work() -> dict[str, float]:
        tic = time.perf_counter()
        trainer.fit(data["y"], data["u"], data["y_next"], generator=generator)
        seconds = time.perf_counter() - tic
        change = data["test/y_next"] - data["test/y"]
        with torch.no_grad():
            said = model.predict(data["test/y"], data["test/u"]).change
        return {"seconds": seconds, "error": float((((said - change) / change.std(0)) ** 2).mean())}

    return work


def transitions(ny: int, nu: int, n: int, seed: int) -> dict[str, Tensor]:
    """y' = y + 0.1 tanh(A y + B u) + noise."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(ny + nu, ny, generator=torch.Generator().manual_seed(0)) / (ny + nu) ** 0.5
    y, u = torch.randn(n, ny, generator=g), 2 * torch.rand(n, nu, generator=g) - 1
    change = 0.1 * torch.tanh(2 * torch.cat([y, u], -1) @ mix) + 0.01 * torch.randn(n, ny, generator=g)
    return {"y": y, "u": u, "y_next": y + change}


def compare(setting: dict[str, Any], passes: int) -> dict[str, Any]:
    """Interleaved passes of both sides; the first of each is thrown away."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    weights = FOLDER / "weights.safetensors"
    net = ensemble(setting).net
    layers = {f"weight{i}": w.detach() for i, w in enumerate(net.weights)}
    safetensors.torch.save_file(layers | {f"bias{i}": b.detach() for i, b in enumerate(net.biases)}, weights)
    data = FOLDER / "transitions.safetensors"
    test = transitions(setting["ny"], setting["nu"], 2_000, seed=2)
    safetensors.torch.save_file(
        transitions(setting["ny"], setting["nu"], 10_000, seed=1)
        | {f"test/{name}": value for name, value in test.items()},
        data,
    )
    setting = {**setting, "data": str(data.resolve())}
    python = python_with("mbrl-lib", PACKAGES)
    script = str(Path(__file__).with_name("peer_mbrl_lib.py"))
    hardware = torch.cpu._is_amx_tile_supported()
    dtypes = ["float32"] + ["bfloat16"] * hardware
    sides = {f"ours, {dtype}": {**setting, "dtype": dtype} for dtype in dtypes}
    peers = {
        "mbrl-lib": Peer(
            [script, json.dumps({**setting, "weights": str(weights.resolve()), "max_logvar": MAX_LOGVAR})],
            python=python,
            threads=setting["threads"],
        ),
        **{
            name: Peer(
                ["-m", "mbrl.experiments.benchmarks.pets_speed", "--serve", json.dumps(side)],
                threads=setting["threads"],
            )
            for name, side in sides.items()
        },
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for i in range(passes + 1):
        for name, peer in peers.items():
            result = peer.run()
            if i:
                seen[name].append(result)
    for peer in peers.values():
        peer.__exit__(None, None, None)
    gflop = plan_gflop(setting) if setting["work"] == "plan" else None
    base = statistics.median(result["seconds"] for result in seen["mbrl-lib"])
    sides_result: dict[str, Any] = {}
    for name, results in seen.items():
        seconds = [result["seconds"] for result in results]
        worth = [result.get("return", result.get("error", 0.0)) for result in results]
        median = statistics.median(seconds)
        sides_result[name] = {
            "seconds": seconds,
            "median_s": median,
            "times_faster": base / median,
            "tflop_per_s": None if gflop is None else 1e-3 * gflop / median,
            "worth_mean": statistics.mean(worth) if gflop else worth[-1],
            "worth_std": statistics.pstdev(worth) if gflop else None,
        }
    return {"setting": setting, "gflop": gflop, "sides": sides_result}


def plan_gflop(setting: dict[str, Any]) -> float:
    """Of the matrix products of one plan."""
    widths: list[int] = [setting["ny"] + setting["nu"], 200, 200, 200, 200, 2 * setting["ny"]]
    rows: int = 5 * setting["population"] * 20 * setting["horizon"]
    return 2e-9 * rows * sum(a * b for a, b in pairwise(widths))


def main(config: Config) -> None:
    cases = {}
    table = Table("work", "side", "median, s", "times faster", "TFLOP/s", "return of the plan, or error")
    works = [(size, activation, "plan") for size in config.sizes for activation in config.activations]
    works += [("HalfCheetah", "silu", "train")] * ("HalfCheetah" in config.sizes)
    for size, activation, work in works:
        setting = {
            **SIZES[size],
            "activation": activation,
            "work": work,
            "seed": 0,
            "threads": config.threads,
        }
        passes = config.passes if work == "plan" else 4 * config.passes
        title = f"{size}, {activation}" if work == "plan" else "epoch of training"
        cases[title] = compare(setting, passes)
        for name, side in cases[title]["sides"].items():
            table.add_row(title, name, *cells(side))
    write(config.out, {"cases": cases, "machine": machine()})
    Console(width=120).print(table)


def cells(side: dict[str, Any]) -> tuple[str, ...]:
    """Median, ratio, TFLOP/s, and the worth of what came out, as text."""
    rate = "" if side["tflop_per_s"] is None else f"{side['tflop_per_s']:.3f}"
    around = "" if side["worth_std"] is None else f" ± {side['worth_std']:.2f}"
    worth = f"{side['worth_mean']:.2f}{around}" if around else f"error {side['worth_mean']:.4f}"
    return f"{side['median_s']:.3f}", f"{side['times_faster']:.2f}", rate, worth


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        ours(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Config, description=__doc__))
