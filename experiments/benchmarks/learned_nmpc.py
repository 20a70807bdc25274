"""Nonlinear MPC on learned cart-poles: does it swing up, and does planning for every member keep it on its track?

    python -m mbrl.experiments.benchmarks.learned_nmpc            # 20 seeds, table, picture; resumes

Swing-up. Per seed, an ensemble is fitted to random motion of the cart-pole, and NMPC on the mean of its members swings
up the true one, which is the one that the data came from, from a start near hanging and without a limit.

Another plant. Per seed, six cart-poles are drawn, whose masses and length are off by a factor of up to 1 + `off`, and
which are pushed all the time by up to `push` N, either way. Five leave a log each; the sixth is the plant, which has to
drive as far as its track allows, towards a target beyond its end, with the pole upright. "mean" plans on the mean of an
ensemble that was fitted to all logs together; "scenarios" on five networks at once, one fitted to each log, whose first
`shared` controls are common; "spread" on the same five, for the mean of the branches and so many of their deviations. All
see the same data and have the same start, cost, limit and penalty.

The limit is a soft constraint with an exact penalty, so that there is a plan beyond it too. A run violates it if the
cart is ever more than a millimetre beyond.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from mbrl.envs.systems import CartPole, Discretized
from mbrl.estimators import Observed
from mbrl.experiments.benchmarks.nmpc_speed import SwingUp
from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.features import Features
from mbrl.models import Ensemble, Exported, FitConfig, MeanDynamics, Thompson, Trainer
from mbrl.mpc import MPC
from mbrl.planners import CEM, NMPC, ScenarioNMPC
from mbrl.planners.noise import colored_noise
from mbrl.problem import Box, Constraint, Plan, Problem
from mbrl.scenarios import Scenarios

DT = 0.05
BOX = Box(torch.tensor([-20.0], dtype=torch.float64), torch.tensor([20.0], dtype=torch.float64))
VIOLATION = 1e-3
"""m beyond the limit that count."""
HELD = 0.2
"""rad from upright during the last second that count as swung up."""
DRIVES = ("mean", "scenarios", "spread")
ARMS = ("swing-up", *DRIVES)

CHOSEN = (
    "Settings were chosen on seeds 1000 to 1002, and after an unfinished run of seeds 0 to 2; none of these is in the table. "
    "The comparison on another plant was first a swing-up within 0.5 m, then 0.9 m, where planning for scenarios often did "
    "not swing up and violated the limit as well; then a recovery from a lean, at which all planners failed; then this "
    "drive without a push: at 1 and 4 times the weight of the place feedback alone kept the mean within the limit, at 10 and "
    "20 times both planners often dropped the pole; with the pole hanging, limits were hardly violated by either. Pushes of "
    "4 N, 4 times the weight and a penalty of 1000 per m were tried too: the mean then drops the "
    "pole rather than violate the limit. Plants were off by 25, 10, 20 and now 15 %; logs went from 40 to 200 episodes. The "
    "swing-up lost its limit after runs that violated it or did not swing up, and its episodes of data went from 100 to 300 "
    "after a complete run on seeds 20 to 39: 17 of 20 up, and on the drive, which has not been changed since, 6, 0 and 1 of "
    "20 runs beyond the limit with mean, scenarios and spread. For speed, networks went from 64 to 32 units, "
    "its horizon from 40 to 30 and the iterations from 60 to 30; its steps went from 60 to 50 to 80."
)
"""What was changed after looking at results."""


@dataclass(frozen=True)
class Config:
    """episodes, log: of `steps_each` transitions, for the swing-up and for each of the five logs. limit, target in m; push in N."""

    seeds: int = 20
    first: int = 40
    arms: tuple[str, ...] = ARMS
    steps: int = 80
    horizon: int = 30
    drive_steps: int = 60
    drive_horizon: int = 20
    limit: float = 0.8
    target: float = 1.2
    penalty: float = 100.0
    off: float = 0.15
    push: float = 3.0
    shared: int = 5
    spread: float = 1.5
    hidden: tuple[int, ...] = (32, 32)
    episodes: int = 300
    log: int = 200
    steps_each: int = 20
    epochs: int = 50
    iterations: int = 30
    generate_code: bool = True
    out: Path = RESULTS / "learned_nmpc.json"
    picture: Path = Path("docs/learned_nmpc.png")


@dataclass(frozen=True)
class Arrive:
    """`SwingUp` with the cart at `place` in m instead of 0."""

    place: float

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: Any, p: Tensor | None) -> Tensor:
        return self.terminal(y, p) + 0.01 * u[..., 0] ** 2

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return (y[..., 0] - self.place) ** 2 + 10 * (1 + y[..., 1].cos())


@dataclass(frozen=True)
class Track:
    """|cart| ≤ limit."""

    limit: float

    def __call__(self, y: Tensor, u: Tensor | None, k: Any, p: Tensor | None) -> Tensor:
        return torch.stack([y[..., 0] - self.limit, -self.limit - y[..., 0]], -1)


def generator(seed: int, *purpose: int) -> Generator:
    """Of its own for each purpose, so that arms do not change each other's draws."""
    number = seed
    for part in purpose:
        number = 1000 * number + part + 1
    return Generator().manual_seed(number)


@dataclass(frozen=True)
class Pushed:
    """A cart-pole that is pushed all the time, by `force` in N."""

    still: Discretized
    force: float = 0.0

    def step(self, x: Tensor, u: Tensor, k: Any) -> Tensor:
        return self.still.step(x, u + self.force, k)


def plant(off: float, push: float, generator: Generator) -> Pushed:
    """Cart, pole and length are each off by a factor of up to 1 + off, either way, and it is pushed by up to `push` N."""
    power = 2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1
    p = CartPole().p.double()
    still = Discretized(CartPole(), DT, p=torch.cat([p[:3] * (1 + off) ** power[:3], p[3:]]))
    return Pushed(still, push * float(power[3]))


def motion(plant: Pushed, episodes: int, steps: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Transitions (N, …) under pink noise, from anywhere that a swing-up passes."""
    most = torch.tensor([1.0, math.pi, 4.0, 10.0], dtype=torch.float64)
    x = most * (2 * torch.rand(episodes, 4, generator=generator, dtype=torch.float64) - 1)
    u = (10 * colored_noise((episodes, steps, 1), 1.0, x, generator=generator)).clamp(BOX.low, BOX.high)
    states = [x]
    for step in range(steps):
        states.append(plant.step(states[-1], u[:, step], step))
    path = torch.stack(states, 1)
    return path[:, :-1].reshape(-1, 4), u.reshape(-1, 1), path[:, 1:].reshape(-1, 4)


def learn(
    data: Iterable[tuple[Tensor, Tensor, Tensor]], members: int, config: Config, generator: Generator
) -> Ensemble:
    model = Ensemble(
        4,
        1,
        DT,
        features=Features(4, hidden=(0,), angles=(1,)),
        members=members,
        hidden=config.hidden,
        activation="tanh",
        probabilistic=False,
        generator=generator,
    )
    y, u, y_next = (torch.cat(parts) for parts in zip(*data, strict=True))
    fit = FitConfig(batch=128, epochs=config.epochs, learning_rate=3e-3, patience=None, decays=(0.0,))
    Trainer(model, fit).fit(y, u, y_next, generator=generator)
    return model


def first_guess(task: Problem[Any, SwingUp, Box], x: Tensor, generator: Generator) -> Plan:
    """A sampled plan on the same model: hanging at rest is a saddle."""
    planner = CEM(iterations=10, population=64)
    return planner.plan(task, x, planner.init(task, x, generator=generator), generator=generator)[0]


def drive(
    task: Problem[Any, Any, Box],
    planner: NMPC,
    guess: Plan | None,
    plant: Pushed,
    x: Tensor,
    steps: int,
) -> dict[str, Any]:
    """One closed loop on the plant."""
    mpc = MPC(task, planner, estimator=Observed(), generator=Generator().manual_seed(0), guess=guess)
    path, cost, ms = [x[0].tolist()], 0.0, []
    for step in range(steps):
        u = mpc(x)
        assert mpc.report is not None
        ms.append(mpc.report.plan_ms)
        cost += float(task.cost.stage(x, u, x, step, None))
        x = plant.step(x, u, step)
        path.append(x[0].tolist())
    return {"path": path, "cost": cost, "ms": ms, "fallbacks": mpc.fallbacks}


def judge(path: list[list[float]], limit: float) -> dict[str, Any]:
    """Whether it swung up and by how much m the cart was beyond the limit, 0 if never."""
    last = path[-round(1 / DT) :]
    away = max(abs(math.remainder(state[1] - math.pi, 2 * math.pi)) for state in last)
    beyond = max(max(abs(state[0]) - limit for state in path), 0.0)
    return {
        "up": away < HELD,
        "away": away,
        "beyond": beyond,
        "violated": beyond > VIOLATION,
    }


@functools.lru_cache(maxsize=1)
def study(seed: int, config: Config) -> tuple[Pushed, Ensemble, tuple[Ensemble, ...]]:
    """The sixth cart-pole, an ensemble of all logs of the others, and a network of each log."""
    true, *others = (plant(config.off, config.push, generator(seed, 2, i)) for i in range(6))
    logs = [
        motion(other, config.log, config.steps_each, generator(seed, 3, i)) for i, other in enumerate(others)
    ]
    each = tuple(learn([log], 1, config, generator(seed, 6, i)) for i, log in enumerate(logs))
    return true, learn(logs, 5, config, generator(seed, 4)), each


def swing_up(seed: int, config: Config) -> tuple[dict[str, Any], float]:
    """One closed loop from hanging, on the plant that the data came from, without a limit."""
    true = Pushed(Discretized(CartPole(), DT))
    data = motion(true, config.episodes, config.steps_each, generator(seed, 1))
    mean = Exported(MeanDynamics(learn([data], 5, config, generator(seed, 4))))
    x = 0.05 * torch.randn(1, 4, generator=generator(seed, 0), dtype=torch.float64)
    task = Problem(mean, SwingUp(), BOX, config.horizon)
    planner = NMPC(iterations=config.iterations, generate_code=config.generate_code)
    guess = first_guess(task, x, generator(seed, 5))
    return drive(task, planner, guess, true, x, config.steps), math.inf


def drive_to_the_end(seed: int, arm: str, config: Config) -> tuple[dict[str, Any], float]:
    """One closed loop along the track, on a plant that differs from the data."""
    true, pooled, each = study(seed, config)
    x = 0.02 * torch.randn(1, 4, generator=generator(seed, 0), dtype=torch.float64)
    x[:, 1] += math.pi
    dynamics: Any = Exported(MeanDynamics(pooled))
    planner = NMPC(iterations=config.iterations, generate_code=config.generate_code)
    if arm != "mean":
        dynamics = Scenarios(tuple(Exported(Thompson(network)) for network in each))
        planner = ScenarioNMPC(
            iterations=config.iterations,
            generate_code=config.generate_code,
            shared=config.shared,
            spread=config.spread if arm == "spread" else None,
        )
    track = Constraint(Track(config.limit), soft=config.penalty, name="track")
    task = Problem(dynamics, Arrive(config.target), BOX, config.drive_horizon, constraints=(track,))
    return drive(task, planner, None, true, x, config.drive_steps), config.limit


def run(seed: int, arm: str, config: Config) -> dict[str, Any]:
    driven, limit = swing_up(seed, config) if arm == "swing-up" else drive_to_the_end(seed, arm, config)
    ms = driven.pop("ms")[1:]  # with the first plan the solver is built
    found = {"seed": seed, "arm": arm, **judge(driven["path"], limit), **driven}
    return {**found, "plan_ms": statistics.median(ms), "worst_ms": max(ms), "load": machine()["load"]}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the table."""
    return {
        "arm": runs[0]["arm"],
        "seeds": len(runs),
        "up": sum(run["up"] for run in runs),
        "violated": sum(run["violated"] for run in runs),
        "beyond": max(run["beyond"] for run in runs),
        "median_beyond": statistics.median(run["beyond"] for run in runs),
        "cost": statistics.median(run["cost"] for run in runs),
        "plan_ms": statistics.median(run["plan_ms"] for run in runs),
        "fallbacks": sum(run["fallbacks"] for run in runs),
    }


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm that has been run."""
    each = {arm: [run for run in runs if run["arm"] == arm] for arm in ARMS}
    return [summarise(mine) for mine in each.values() if mine]


def draw(runs: list[dict[str, Any]], config: Config) -> None:
    """The cart of every run over time, with the limit, and the angle below."""
    shown = [arm for arm in config.arms if any(run["arm"] == arm for run in runs)]
    figure = Figure(figsize=(3.4 * len(shown), 5.2), layout="constrained")
    axes = figure.subplots(2, len(shown), sharex="col", squeeze=False)
    limited = [arm in DRIVES for arm in shown]
    for row in axes:  # one scale for all drives
        first, *others = row[limited] if any(limited) else row[:1]
        for other in others:
            other.sharey(first)
    for (top, bottom), arm in zip(axes.T, shown, strict=True):
        mine = [run for run in runs if run["arm"] == arm]
        for one in mine:
            color = "#c03030" if one["violated"] else "#1f6fb4"
            cart, angle = zip(*(state[:2] for state in one["path"]), strict=True)
            t = [DT * k for k in range(len(cart))]
            top.plot(t, cart, color=color, linewidth=0.9, alpha=0.7)
            bottom.plot(t, [abs(a) for a in angle], color=color, linewidth=0.9, alpha=0.7)
        if arm in DRIVES:
            top.axhline(config.limit, color="black", linestyle="--", linewidth=1)
        bottom.axhline(math.pi, color="black", linestyle=":", linewidth=1)
        over, up = (sum(one[key] for one in mine) for key in ("violated", "up"))
        said = f"{over} of {len(mine)} beyond the limit" if arm in DRIVES else f"{up} of {len(mine)} up"
        top.set_title(f"{arm}: {said}", loc="left", fontsize=10)
        bottom.set_xlabel("time in s")
    axes[0, 0].set_ylabel("cart in m")
    axes[1, 0].set_ylabel("|angle| from hanging in rad")
    figure.savefig(config.picture, dpi=110)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("out", "picture", "arms", "seeds", "first")
    }
    settings = json.loads(json.dumps(settings))
    runs: list[dict[str, Any]] = []
    if config.out.exists():
        before = json.loads(config.out.read_text())
        if before["config"] != settings:
            raise SystemExit(
                f"{config.out} holds runs with other settings. Move it away, or choose another --out."
            )
        runs = before["runs"]
    done = {(run["seed"], run["arm"]) for run in runs}
    for seed in range(config.first, config.first + config.seeds):
        for arm in config.arms:
            if (seed, arm) in done:
                continue
            tic = time.perf_counter()
            runs.append(run(seed, arm, config))
            result = {"arms": rows(runs), "runs": runs, "config": settings}
            write(config.out, {**result, "chosen": CHOSEN, "machine": machine()})
            print(f"seed {seed}, {arm}: {time.perf_counter() - tic:.1f} s", flush=True)
    table = Table("arm", "swung up", "violated", "median cm", "worst cm", "cost", "ms per step")
    for row in rows(runs):
        table.add_row(
            row["arm"],
            f"{row['up']} of {row['seeds']}",
            f"{row['violated']} of {row['seeds']}",
            f"{100 * row['median_beyond']:.1f}",
            f"{100 * row['beyond']:.1f}",
            f"{row['cost']:.1f}",
            f"{row['plan_ms']:.1f}",
        )
    Console().print(table)
    draw(runs, config)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
