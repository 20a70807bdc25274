"""The cells of a comparison, and how one is run: a planner on a model, in a world, from some seeds."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mbrl.envs import World, make_world
from mbrl.errors import ContractError, UnsupportedProblem
from mbrl.estimators import FullState, Measured
from mbrl.experiments.contenders import BudgetTooSmall, calibrated, contender, size_for
from mbrl.experiments.control import with_derivatives
from mbrl.experiments.episodes import Episode, run_episodes
from mbrl.experiments.learned import learned_problem, load_model
from mbrl.experiments.oracle import riccati_optimum
from mbrl.experiments.recording import HELD
from mbrl.models import Ensemble
from mbrl.mpc import MPC
from mbrl.planners import ILQR, NMPC
from mbrl.policies import RandomPolicy
from mbrl.problem import Problem
from mbrl.protocols import Estimator, Planner
from mbrl.runs import environment, plain

SIMULATOR, ANALYTIC = "simulator", "analytic"
RANDOM = "random"
"""The planner that is none: uniform actions, the lower end of a normalised score."""
_FORMAT = 1  # of what a job leaves


@dataclass(frozen=True)
class Cell:
    """One planner on one model in one world at one budget; everything but the seeds.

    Attributes:
        env: the world that is acted in.
        model: what is planned on: `simulator`, `analytic`, or the folder of a learned model.
        fingerprint: of the learned model, so that another one in the same folder is another cell.
        planner: a name in `CONTENDERS`, or `random`.
        budget: what of a plan is limited, steps of the model or milliseconds.
        amount: to how much.
        horizon: steps of a plan.
        steps: control steps of an episode.
        propagation, particles: how the uncertainty of a learned model enters, see `mpc.Config`.
        threads: of simulator and networks.
    """

    env: str
    model: str
    fingerprint: str | None
    planner: str
    budget: Literal["evaluations", "ms"]
    amount: float
    horizon: int
    steps: int
    propagation: str
    particles: int
    threads: int

    @property
    def timed(self) -> bool:
        return self.budget == "ms"

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on, as JSON types: of a learned model what it is, not where it lies."""
        found = dataclasses.asdict(self) | {
            "format": _FORMAT,
            "version": environment()["versions"]["mbrl-kit"],
        }
        return found if self.fingerprint is None else found | {"model": "learned"}


@dataclass(frozen=True)
class Job:
    """A cell and the seeds that are planned together, or one after another where time counts."""

    cell: Cell
    seeds: tuple[int, ...]

    @functools.cached_property
    def key(self) -> str:
        text = json.dumps([self.cell.identity, self.seeds], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def label(self) -> str:
        cell = self.cell
        unit = f"{cell.amount:g} ms" if cell.timed else f"{cell.amount:,.0f} steps"
        return f"{cell.env}, {Path(cell.model).name}, {cell.planner}, {unit}, seeds {self.seeds[0]}-{self.seeds[-1]}"


@dataclass(frozen=True)
class Outcome:
    """What a job has left.

    Attributes:
        record: JSON types: `episodes`, one mapping per seed; or `refused` or `crashed`, why there are none.
        films: (T+1, nx) states of the first seed, for pictures; None without episodes.
    """

    record: dict[str, Any]
    films: Tensor | None = None


def fingerprint(model: Ensemble) -> str:
    """A hash of a learned model: of its weights, and of what it sees and predicts."""
    digest = hashlib.sha256(f"{model.world} {model.dt} {model.features} {model.net}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What timings depend on."""
    found = environment()
    return {
        "host": platform.node(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        **found["versions"],
    }


def run_job(job: Job) -> Outcome:
    """Run a job. What goes wrong is told in the record: no cell may cost the others."""
    torch.set_num_threads(job.cell.threads)
    tic = time.perf_counter()
    record: dict[str, Any] = {"key": job.key, "cell": job.cell.identity, "seeds": list(job.seeds)}
    films = None
    try:
        world = make_world(job.cell.env)
        episodes, told = _play(job, world)
        best = _optimum(world, episodes, job.cell.steps)
        together = 1 if job.cell.timed else len(job.seeds)
        summaries = [
            _summary(job.cell, world, e, o) | {"together": together}
            for e, o in zip(episodes, best, strict=True)
        ]
        if not all(math.isfinite(e["return"]) for e in summaries):
            raise ArithmeticError("a return is not finite")
        record |= told | {"episodes": summaries}
        films = episodes[0].states
    except (UnsupportedProblem, BudgetTooSmall) as error:
        record["refused"] = str(error)
    except Exception as error:  # noqa: BLE001  a defect in one cell must not end the comparison
        record["crashed"] = f"{type(error).__name__}: {error}"
    record |= {"wall_s": round(time.perf_counter() - tic, 3), "machine": machine()}
    return Outcome(_finite(record), films)


def problem_of(cell: Cell, world: World, planner: Planner[Any]) -> tuple[Problem[Any, Any, Any], Estimator]:
    """What the planner is given, and what reads its state off the world.

    Raises:
        UnsupportedProblem: the world has no analytic model, or the planner cannot use the model.
    """
    holds = isinstance(planner, NMPC)
    constraints = world.constraints if holds else ()
    estimator: Estimator
    if cell.model == SIMULATOR:
        problem = world.problem(cell.horizon, threads=cell.threads, constraints=constraints)
        estimator = FullState()
    elif cell.model == ANALYTIC:
        if world.analytic is None:
            raise UnsupportedProblem(f"{world.name} has no analytic model.")
        problem = world.problem(cell.horizon, dynamics=world.analytic, constraints=constraints)
        estimator = Measured(world.measure, torch.float64)
    else:
        way = "expression" if holds else cell.propagation
        model = load_model(Path(cell.model))
        options: dict[str, Any] = {
            "propagation": way,
            "particles": cell.particles,
            "kappa": 0.0,
            "constraints": constraints,
        }
        problem = learned_problem(world, model, cell.horizon, **options)
        estimator = Measured(world.measure)
    if holds:
        problem = dataclasses.replace(problem, terminated=None)
    if isinstance(planner, ILQR):
        problem = dataclasses.replace(problem, dynamics=with_derivatives(problem, planner))
    planner.check(problem)
    return problem, estimator


def _play(job: Job, world: World) -> tuple[list[Episode], dict[str, Any]]:
    """The episodes, and how strong the planner was."""
    cell = job.cell
    if cell.planner == RANDOM:
        babble = RandomPolicy(world.actions, generator=torch.Generator().manual_seed(job.seeds[0]))
        return run_episodes(world, babble, job.seeds, steps=cell.steps), {}
    problem, estimator = problem_of(cell, world, contender(cell.planner, 1))
    if not cell.timed:
        size = size_for(cell.planner, int(cell.amount), problem)
        planner = contender(cell.planner, size)
        generator = torch.Generator().manual_seed(job.seeds[0])
        policy = MPC(problem, planner, estimator=estimator, generator=generator)
        episodes = run_episodes(world, policy, job.seeds, steps=cell.steps, threads=cell.threads)
        return episodes, {"size": size, "settings": plain(planner)}
    size = calibrated(
        cell.planner,
        cell.amount,
        problem,
        _start(world, estimator),
        generator=torch.Generator().manual_seed(0),
    )
    planner, episodes = contender(cell.planner, size), []
    for seed in job.seeds:
        generator = torch.Generator().manual_seed(seed)
        policy = MPC(problem, planner, estimator=estimator, generator=generator)
        episodes += run_episodes(world, policy, (seed,), steps=cell.steps, threads=cell.threads)
    return episodes, {"size": size, "settings": plain(planner)}


def _start(world: World, estimator: Estimator) -> Tensor:
    env = world.make()
    obs, info = env.reset(seed=0)
    env.close()
    return estimator(torch.as_tensor(np.asarray(obs)), info, None)


def _optimum(world: World, episodes: Sequence[Episode], steps: int) -> list[float | None]:
    """The largest return from each start, where the world is linear-quadratic."""
    y0 = torch.stack([episode.states[0, -world.layout.size :] for episode in episodes])
    try:
        found: list[float | None] = riccati_optimum(world, y0, steps).tolist()
    except ContractError:
        return [None] * len(episodes)
    return found


def _summary(cell: Cell, world: World, episode: Episode, optimum: float | None) -> dict[str, Any]:
    """An episode in numbers; None where there is nothing to tell."""
    times = episode.plan_ms[~episode.plan_ms.isnan()].tolist()
    planned, gap = episode.planned, episode.planned - episode.realised
    return {
        "seed": episode.seed,
        "return": episode.total,
        "steps": len(episode.rewards),
        "terminated": episode.terminated,
        "diverged": episode.diverged,
        "planned": _mean(planned),
        "gap": _mean(gap),
        "lost": _lost(episode),
        "optimum": optimum,
        "plan_ms": statistics.median(times) if times else None,
        "plan_ms_worst": max(times, default=None),
        "late": sum(t > cell.amount for t in times) / len(times) if times and cell.timed else None,
        "model_steps": _mean(episode.model_steps),
        "certified": _mean(episode.certified),
        "fallbacks": episode.fallbacks,
        "violations": _violations(world, episode),
    }


def _mean(values: Tensor) -> float | None:
    """Of what is finite."""
    known = values[values.isfinite()]
    return float(known.mean()) if len(known) else None


def _lost(episode: Episode) -> float | None:
    """The share of the plans tried in the plant that left the finite numbers there, or on the model."""
    tried = ~episode.realised.isnan()
    if not tried.any():
        return None
    lost = ~(episode.planned.isfinite() & episode.realised.isfinite())
    return float(lost[tried].double().mean())


def _violations(world: World, episode: Episode) -> dict[str, list[float]]:
    """Of each constraint of the world, in how many states it was violated, and by how much at most."""
    y = episode.states[:, -world.layout.size :]
    u = torch.cat([episode.actions, episode.actions[-1:]]).to(y)
    found = {}
    for constraint in world.constraints:
        g = torch.stack([constraint.fun(y[k], u[k], k, None) for k in range(len(y))])
        over = (g.abs() if constraint.kind == "eq" else g).amax(-1)
        found[constraint.label] = [int((over > HELD).sum()), max(0.0, float(over.max()))]
    return found


def _finite(value: Any) -> Any:
    """JSON types with None in place of what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].split(":")[1].strip()
    return platform.processor() or platform.machine()
