"""What became of a planner's plans: as the model imagined them, as the plant ran them, and what a stronger search finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.data import Transition
from mbrl.envs import World
from mbrl.errors import MbrlError
from mbrl.experiments.cells import SIMULATOR, Cell, problem_of
from mbrl.experiments.contenders import contender, size_for
from mbrl.experiments.control import with_derivatives
from mbrl.experiments.episodes import Episode, run_episodes
from mbrl.models import Ensemble, MeanDynamics, TSInf
from mbrl.mpc import MPC
from mbrl.planners import ICEM, ILQR, SamplingPlanner
from mbrl.problem import Plan, Problem
from mbrl.protocols import Dynamics, Planner
from mbrl.rollout import evaluate, realize, rollout

STRONGER = 12
"""How many times the planner's evaluations the stronger search has, half of them from the planner's own plan on."""
IN_PLANT = 5
"""How many times the planner's candidates a search in the plant has, which goes on from what was found on the model."""
PARTICLES = 20
"""Of the draws that plans are scored on: none that any search has seen."""
BABBLE = 16
"""Random action sequences from each state: what no planning at all would earn."""
_ROUNDS = 8


@dataclass(frozen=True)
class Setting:
    """How a diagnosis plans: `evaluations` steps of the model per plan, `horizon`, `steps` of an episode, `seeds` of the
    resets, `checked` plans of each episode that are looked into, `particles` of planners that draw them."""

    evaluations: int
    horizon: int
    steps: int
    seeds: tuple[int, ...]
    checked: int
    particles: int
    threads: int = 1


@dataclass(frozen=True)
class Tried:
    """N plans of one planner on the model, from states that it came to in the plant, over H steps.

    Attributes:
        seed, step: (N,), the episode and the control step at which a plan was begun.
        u: (N, H, nu).
        y: (N, H+1, ny), where it led in the plant.
        y_imagined: (N, H+1, ny), where the mean of the model expects it to lead.
        imagined, realised: (N, H), reward of each step; 0 after an end.
        spread: (N,), deviation of the return over particles that each keep one member of the ensemble.
        ended: (N,), whether the plant ended the episode within the plan.
        stronger_imagined: (N,), return on the model of the best of the planner's plan and a stronger search's.
        stronger_realised: (N,), what that plan earns in the plant.
        best: (N,), the highest return that any known plan earns in the plant, those of a search in it included.
        babble: (N,), mean return of random actions in the plant.
        babble_std: deviation of that over the random actions, root mean square over the states.
    """

    seed: Tensor
    step: Tensor
    u: Tensor
    y: Tensor
    y_imagined: Tensor
    imagined: Tensor
    realised: Tensor
    spread: Tensor
    ended: Tensor
    stronger_imagined: Tensor
    stronger_realised: Tensor
    best: Tensor
    babble: Tensor
    babble_std: float


@dataclass(frozen=True)
class Trial:
    """A planner on the model: its plans, its episodes, and those of the same planner on the simulator.

    Attributes:
        visited: the transitions of its episodes in the plant.
        settings: the planner, with all of its numbers.
        on_simulator: returns of the same planner on the simulator, or why there are none.
    """

    name: str
    tried: Tried
    visited: Transition
    returns: list[float]
    on_simulator: list[float] | str
    settings: Planner[Any]


@dataclass(frozen=True)
class Recorded:
    """A planner that keeps what it was asked and what it answered."""

    planner: Planner[Any]
    said: list[tuple[Tensor, Plan]]

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        self.planner.check(problem)

    def init(
        self,
        problem: Problem[Any, Any, Any],
        x0: Tensor,
        *,
        generator: Generator,
        guess: Plan | None = None,
    ) -> Any:
        return self.planner.init(problem, x0, generator=generator, guess=guess)

    def shift(self, state: Any, actions_taken: Tensor, x_now: Tensor) -> Any:
        return self.planner.shift(state, actions_taken, x_now)

    def plan(
        self, problem: Problem[Any, Any, Any], x0: Tensor, state: Any, *, generator: Generator
    ) -> tuple[Plan, Any]:
        plan, state = self.planner.plan(problem, x0, state, generator=generator)
        self.said.append((x0, plan))
        return plan, state


def try_planner(
    name: str, folder: Path, model: Ensemble, world: World, setting: Setting, *, seed: int
) -> Trial:
    """Let a planner act on the model in the plant, and look into some of its plans.

    Raises:
        MbrlError: the planner cannot run on the model; what it needs is told.
    """
    generator = torch.Generator().manual_seed(seed)
    cell = _cell(name, str(folder), world, setting)
    problem, estimator = problem_of(cell, world, contender(name, 1))
    planner = contender(name, size_for(name, setting.evaluations, problem))
    recorder = Recorded(planner, [])
    policy = MPC(problem, recorder, estimator=estimator, generator=generator)
    episodes = run_episodes(
        world, policy, setting.seeds, steps=setting.steps, audit_every=0, threads=setting.threads
    )
    tried = _look_into(episodes, recorder.said, planner, problem, model, world, setting, generator=generator)
    return Trial(
        name=name,
        tried=tried,
        visited=transitions(world, episodes),
        returns=[episode.total for episode in episodes],
        on_simulator=_on_simulator(planner, world, setting, seed),
        settings=planner,
    )


def _cell(name: str, model: str, world: World, setting: Setting) -> Cell:
    sampling = isinstance(contender(name, 1_000), SamplingPlanner)
    return Cell(
        env=world.name,
        model=model,
        fingerprint=None,
        planner=name,
        budget="evaluations",
        amount=setting.evaluations,
        horizon=setting.horizon,
        steps=setting.steps,
        propagation="tsinf" if sampling else "mean",
        particles=setting.particles if sampling else 1,
        threads=setting.threads,
    )


def _on_simulator(planner: Planner[Any], world: World, setting: Setting, seed: int) -> list[float] | str:
    """Returns of the same planner on the simulator, or why there are none."""
    cell = _cell("icem", SIMULATOR, world, setting)
    try:
        problem, estimator = problem_of(cell, world, planner)
    except MbrlError as error:
        return str(error)
    generator = torch.Generator().manual_seed(seed)
    policy = MPC(problem, planner, estimator=estimator, generator=generator)
    episodes = run_episodes(
        world, policy, setting.seeds, steps=setting.steps, audit_every=0, threads=setting.threads
    )
    return [episode.total for episode in episodes]


def transitions(world: World, episodes: Sequence[Episode]) -> Transition:
    """What happened in episodes, as float32 data (N,); steps that diverged are left out."""
    parts = []
    for number, episode in enumerate(episodes):
        y = episode.states[:, -world.layout.size :].float()
        n = len(episode.rewards)
        last = torch.arange(n) == n - 1
        rows = Transition(
            y=y[:-1],
            u=episode.actions.float(),
            reward=episode.rewards.float(),
            y_next=y[1:],
            terminated=last & episode.terminated,
            truncated=last & (not episode.terminated),
            episode=torch.full((n,), number),
        )
        parts.append(rows[~rows.reward.isnan()])
    return Transition.cat(parts)


@torch.no_grad()
def _look_into(
    episodes: Sequence[Episode],
    said: Sequence[tuple[Tensor, Plan]],
    planner: Planner[Any],
    problem: Problem[Any, Any, Any],
    model: Ensemble,
    world: World,
    setting: Setting,
    *,
    generator: Generator,
) -> Tried:
    where = [
        (i, k)
        for i, episode in enumerate(episodes)
        for k in sorted({int(k) for k in torch.linspace(0, len(episode.rewards) - 1, setting.checked)})
    ]
    x = torch.stack([said[k][0][i] for i, k in where])
    u = torch.stack([said[k][1].actions[i] for i, k in where])
    state = torch.stack([episodes[i].states[k] for i, k in where])
    plant: Any = dataclasses.replace(
        problem, dynamics=world.dynamics(threads=setting.threads), constraints=(), particles=1
    )

    def earned(actions: Tensor) -> Tensor:
        """Return (N, B) in the plant of actions (N, B, H, nu)."""
        return -evaluate(plant, plant.dynamics, state, actions.to(state)).cost

    stronger = search(problem, x, u, setting.evaluations * STRONGER, polish=model, generator=generator)
    draw = _more_particles(problem)
    scoring, particles = realize(draw, generator=generator)
    scores = -evaluate(draw, scoring, x, stronger, particles=particles).cost
    chosen = stronger[torch.arange(len(x)), scores.argmax(1)]
    in_plant = search(
        dataclasses.replace(plant, terminated=problem.terminated),
        state,
        chosen,
        setting.evaluations * IN_PLANT // problem.particles,
        generator=generator,
    )
    low, high = world.actions.low, world.actions.high
    share = torch.rand((len(x), BABBLE, problem.horizon, len(low)), generator=generator, dtype=torch.float64)
    babble = earned(low + share * (high - low))
    truth = torch.cat([earned(stronger), earned(in_plant)], 1)
    members = dataclasses.replace(problem, dynamics=TSInf(model), particles=PARTICLES, constraints=())
    many, _ = realize(members, generator=generator)
    lead = (PARTICLES, len(x), 1)
    returns = rewards_along(
        members, many, x[:, None].expand(*lead, -1), u[:, None].expand(*lead, *u.shape[1:])
    )
    imagined = _scored(draw, scoring, particles, x, u)
    states = rollout(plant.dynamics, state, u.to(state))
    y = plant.dynamics.output(states)
    realised = rewards_along(plant, plant.dynamics, state, u.to(state))
    ends = (
        torch.zeros(y.shape[:2], dtype=torch.bool) if plant.terminated is None else plant.terminated(y) > 0.5
    )
    return Tried(
        seed=torch.tensor([episodes[i].seed for i, _ in where]),
        step=torch.tensor([k for _, k in where]),
        u=u,
        y=y,
        y_imagined=rollout(MeanDynamics(model), x.float(), u.float()).detach(),
        imagined=imagined,
        realised=realised,
        spread=returns.sum(-1)[..., 0].std(0, correction=0),
        ended=ends[:, 1:].any(1),
        stronger_imagined=scores.max(1).values,
        stronger_realised=truth[torch.arange(len(x)), scores.argmax(1)],
        best=truth.max(1).values,
        babble=babble.mean(1),
        babble_std=float(babble.var(1).mean().sqrt()),
    )


def _more_particles(problem: Problem[Any, Any, Any]) -> Problem[Any, Any, Any]:
    many = PARTICLES if hasattr(problem.dynamics, "realize") else 1
    return dataclasses.replace(problem, particles=many, constraints=())


def _scored(
    problem: Problem[Any, Any, Any], dynamics: Dynamics, particles: int, x: Tensor, u: Tensor
) -> Tensor:
    """Reward (N, H) of each step on the draw that all plans are scored on, the mean over its particles."""
    lead = (particles, len(x), 1)
    found = rewards_along(
        problem, dynamics, x[:, None].expand(*lead, -1), u[:, None].expand(*lead, *u.shape[1:])
    )
    return found[:, :, 0].mean(0)


@torch.no_grad()
def rewards_along(problem: Problem[Any, Any, Any], dynamics: Dynamics, x: Tensor, u: Tensor) -> Tensor:
    """Reward (..., H) of each step from x (..., nx) under u (..., H, nu); 0 after an end."""
    y, alive = dynamics.output(x), torch.ones(x.shape[:-1], dtype=x.dtype)
    found = []
    for k in range(u.shape[-2]):
        x = dynamics.step(x, u[..., k, :], k)
        y_next = dynamics.output(x)
        reward = -problem.cost.stage(y, u[..., k, :], y_next, k, None)
        found.append(torch.where(alive > 0, alive * reward, 0.0))
        if problem.terminated is not None:
            alive = alive * (1 - problem.terminated(y_next).to(alive))
        y = y_next
    return torch.stack(found, -1)


def search(
    problem: Problem[Any, Any, Any],
    x: Tensor,
    u: Tensor,
    evaluations: int,
    *,
    polish: Ensemble | None = None,
    generator: Generator,
) -> Tensor:
    """Plans (N, B, H, nu) from x (N, nx): u (N, H, nu) first, iCEM from it, iCEM from nothing, and iLQR from the best.

    Args:
        evaluations: steps of the model, for both searches by iCEM together.
        polish: iLQR plans on the mean of this model; None leaves it out.
    """
    free = dataclasses.replace(problem, constraints=())
    per_candidate = problem.horizon * problem.particles
    shares = sum(ICEM.decay**-i for i in range(_ROUNDS))
    first = max(20, int(evaluations / 2 / per_candidate / shares))
    planner = ICEM(population=first, iterations=_ROUNDS, elites=max(2, first // 8))
    own = Plan(actions=u, cost=torch.zeros(len(u)))
    plans = [u]
    for guess in (own, None):
        start = planner.init(free, x, generator=generator, guess=guess)
        plans.append(planner.plan(free, x, start, generator=generator)[0].actions)
    if polish is not None:
        stack = torch.stack([plan.to(u) for plan in plans], 1)
        scoring, particles = realize(free, generator=generator)
        best = evaluate(free, scoring, x, stack, particles=particles).cost.argmin(1)
        found = _polished(free, polish, x, stack[torch.arange(len(x)), best], generator)
        plans += [] if found is None else [found]
    return torch.stack([plan.to(u) for plan in plans], 1)


def _polished(
    problem: Problem[Any, Any, Any], model: Ensemble, x: Tensor, u: Tensor, generator: Generator
) -> Tensor | None:
    """A local optimum on the mean of the model near u, or None where iLQR cannot be had."""
    planner = ILQR(iterations=25)
    mean = dataclasses.replace(problem, dynamics=MeanDynamics(model), particles=1)
    mean = dataclasses.replace(mean, dynamics=with_derivatives(mean, planner))
    try:
        planner.check(mean)
        x, guess = x.double(), Plan(actions=u.double(), cost=torch.zeros(len(u)))
        start = planner.init(mean, x, generator=generator, guess=guess)
        actions = planner.plan(mean, x, start, generator=generator)[0].actions
    except MbrlError:
        return None
    low, high = problem.actions.low, problem.actions.high
    return torch.where(actions.isfinite(), actions, u.double()).clamp(low, high)
