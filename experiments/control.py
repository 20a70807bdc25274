"""What every run under MPC shares: which planner, on which model of the world, and how often."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from mbrl.derivatives import Autodiff, FiniteDifference
from mbrl.envs import WORLDS, Pendulum, World
from mbrl.errors import ContractError, UnknownName
from mbrl.estimators import FullState, Measured, Padded
from mbrl.mpc import MPC
from mbrl.planners import (
    CEM,
    CMAES,
    DDP,
    FDDP,
    ICEM,
    ILQR,
    MPPI,
    NMPC,
    PredictiveSampling,
    RandomShooting,
    ScenarioNMPC,
)
from mbrl.problem import Problem
from mbrl.protocols import Estimator, Planner

P = TypeVar("P", bound=Planner[Any])

PLANNERS: dict[str, type[Any]] = {
    "random-shooting": RandomShooting,
    "cem": CEM,
    "icem": ICEM,
    "mppi": MPPI,
    "predictive-sampling": PredictiveSampling,
    "cma-es": CMAES,
    "ilqr": ILQR,
    "fddp": FDDP,
    "ddp": DDP,
    "nmpc": NMPC,
    "scenario-nmpc": ScenarioNMPC,
}
STARTS = {"ilqr": ILQR(iterations=3), "fddp": FDDP(iterations=3), "ddp": DDP(iterations=3)}
"""Planners whose defaults, made for one plan, are too slow for a plan at each step."""


@dataclass(frozen=True, kw_only=True)
class Control(Generic[P]):
    """Which robot is controlled, by which planner, in which model.

    Attributes:
        planner: what searches for actions; --planner NAME on the command line.
        env: the world; `mbrl list` shows all.
        model: folder of a training run or of `mbrl fit`: plan in that learned model instead of the simulator.
        propagation: how the uncertainty of a learned model enters a rollout: ts1, tsinf, moments, or mean for none.
        particles: of each candidate plan on a learned model.
        kappa: deviations of the return that a plan on a learned model is charged for.
        exact: plan with the plant itself where the world has a cheaper model to plan with.
        smooth: plan with contacts that set in gradually, on a copy of the model; for planners that follow gradients.
        learned_task: plan by the reward and the end that the model has learned, not by the world's.
        horizon: steps to plan ahead.
        seed: of the environment and the planner.
        threads: of the simulation or of the learned model; 0 for all processors.
        budget_ms: plan until this many milliseconds are used, instead of planner.iterations times.
        replan_every: steps from the beginning of one plan to that of the next.
        latency: control steps until a plan that was begun is followed, or `measured`: as many as planning it took.
        safe_action: what to do where no plan can be followed, one number per actuator; the middle of the bounds
            unless given.
    """

    planner: P
    env: str = "HalfCheetah-v5"
    model: Path | None = None
    propagation: Literal["ts1", "tsinf", "moments", "mean"] = "tsinf"
    particles: int = 20
    kappa: float = 0.0
    exact: bool = False
    smooth: bool = False
    learned_task: bool = False
    horizon: int = 30
    seed: int = 0
    threads: int = 0
    budget_ms: float | None = None
    replan_every: int = 1
    latency: int | Literal["measured"] = 0
    safe_action: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.env == Pendulum.name:
            raise ContractError(
                f"{self.env} has no MuJoCo simulator, which mbrl mpc needs even to run a learned model: learn it by "
                f"mbrl train pets --env {self.env}, and see how well by mbrl eval."
            )
        if self.env not in WORLDS:
            raise UnknownName("world", self.env, WORLDS)
        if not 1 <= self.replan_every <= self.horizon:
            raise ContractError(
                f"A run needs 1 ≤ replan_every ≤ horizon, but got {self.replan_every} and {self.horizon}."
            )
        if self.latency != "measured" and not 0 <= self.latency <= self.horizon:
            raise ContractError(
                f"A run needs a latency of 0 to horizon = {self.horizon} control steps, or measured, "
                f"but got {self.latency}."
            )
        if self.threads < 0 or not 0 <= self.seed < 2**63:
            raise ContractError(
                f"A run needs threads ≥ 0 and 0 ≤ seed < 2**63, but got {self.threads} and {self.seed}."
            )
        simulators = {
            "exact plans with the plant": self.exact,
            "smooth with a smoothed copy of the simulator": self.smooth,
            "model with a learned model": self.model is not None,
        }
        given = [what for what, wanted in simulators.items() if wanted]
        if len(given) > 1:
            raise ContractError(f"{', '.join(given)}: give one of them.")
        if self.particles < 1:
            raise ContractError(f"A run needs particles ≥ 1, but got {self.particles}.")
        learned = {
            name: getattr(self, name) for name in ("propagation", "particles", "kappa", "learned_task")
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [name for name, value in learned.items() if value != defaults[name]]
        if self.model is None and changed:
            raise ContractError(
                f"A run needs a learned model for {', '.join(changed)}, but none is given: --model FOLDER."
            )
        single = self.propagation == "mean" or self.particles < 2
        if self.kappa and single:
            raise ContractError("kappa needs 2 particles or more that may differ, so no propagation mean.")
        if self.propagation == "moments" and single:
            raise ContractError(f"Propagation moments needs 2 particles or more, but got {self.particles}.")
        if self.learned_task and self.propagation == "mean":
            raise ContractError("A learned task needs particles: --propagation ts1, tsinf or moments.")
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(f"A run needs a finite budget_ms > 0, but got {self.budget_ms}.")


C = TypeVar("C", bound=Control[Any])


def check(config: Control[Any]) -> None:
    """Refuse what nonlinear MPC cannot use. Apart from `Control`, for the defaults that options change need not be usable.

    Raises:
        ContractError: with what to do instead.
    """
    planner = config.planner
    if not isinstance(planner, NMPC):
        return
    name, many = type(planner).__name__, isinstance(planner, ScenarioNMPC)
    dataclasses.replace(planner, budget_ms=config.budget_ms)  # not every solver can be stopped
    if config.model is None and many:
        raise ContractError(
            f"{name} plans for all members of a learned ensemble, but none is given: --model FOLDER."
        )
    if config.model is None and not WORLDS[config.env].analytic:
        analytic = [world for world, entry in WORLDS.items() if entry.analytic]
        raise ContractError(
            f"{name} needs dynamics that are an expression, and the simulator of {config.env} is none. Plan in a "
            f"model that was learned on it, --model FOLDER, or take a world with an analytic model: --env "
            f"{' | '.join(analytic)}."
        )
    if config.exact or config.smooth:
        raise ContractError(
            f"{name} plans on an expression, not in a simulator. Leave --{'exact' if config.exact else 'smooth'} out."
        )
    unused = {
        "propagation": config.propagation not in ("tsinf", "tsinf" if many else "mean"),
        "particles": config.particles != 20,
        "kappa": config.kappa != 0,
        "learned-task": config.learned_task,
    }
    given = [f"--{option}" for option, wanted in unused.items() if wanted]
    if given:
        what = "each member" if many else "the mean"
        raise ContractError(
            f"{name} plans on {what} of a learned ensemble, by the world's reward. Leave {' and '.join(given)} out."
        )
    if planner.final_time is not None:
        raise ContractError(
            f"A run goes on in steps of the world's length, but the final time of {name} is to be free, which "
            "changes their length. Leave --planner.final-time out; it is for plans that are followed to their end."
        )


def with_derivatives(problem: Problem[Any, Any, Any], planner: ILQR) -> Any:
    """The problem's dynamics with what the planner needs: second derivatives of a network, first ones of a simulator."""
    dynamics = problem.dynamics
    if not hasattr(dynamics, "linearize"):
        return FiniteDifference(dynamics, problem.actions)
    return Autodiff(dynamics) if planner.exact and not hasattr(dynamics, "curvature") else dynamics


def checked(config: C) -> C:
    """The configuration, with its deadline given to its planner.

    Raises:
        ContractError: as `check`.
    """
    check(config)
    if config.budget_ms is None:
        return config
    return dataclasses.replace(
        config, planner=dataclasses.replace(config.planner, budget_ms=config.budget_ms)
    )


def policy_of(config: Control[Any], world: World) -> MPC:
    """The MPC that a configuration asks for.

    Raises:
        ContractError: its safe action is none.
        UnsupportedProblem: the problem lacks an ability that the planner needs.
    """
    planner, safe = config.planner, config.safe_action
    problem, estimator = plan_in(config, world)
    if isinstance(planner, ILQR):
        problem = dataclasses.replace(problem, dynamics=with_derivatives(problem, planner))
    return MPC(
        problem,
        planner,
        estimator=estimator,
        generator=torch.Generator().manual_seed(config.seed),
        replan_every=config.replan_every,
        latency=config.latency,
        safe_action=None if safe is None else torch.tensor(safe, dtype=torch.float64),
    )


def left_out(planner: Any, world: World) -> list[str]:
    """What of the world the planner's problem leaves out, in words."""
    name = type(planner).__name__
    if isinstance(planner, NMPC):
        return [f"{name} plans to the horizon: that the task may end an episode earlier is left out."]
    labels = ", ".join(constraint.label for constraint in world.constraints)
    return [f"{name} holds no constraints: {labels} is left out and only watched."] if labels else []


def plan_in(config: Control[Any], world: World) -> tuple[Problem[Any, Any, Any], Estimator]:
    """The problem on the simulator, the analytic or the learned model, and what reads its state off the world."""
    holds = isinstance(config.planner, NMPC)
    constraints = world.constraints if holds else ()
    if config.model is None and holds:
        torch.set_num_threads(1)
        problem = world.problem(config.horizon, dynamics=world.analytic, constraints=constraints)
        return dataclasses.replace(problem, terminated=None), Measured(world.measure, torch.float64)
    if config.model is None:
        # The simulator has the processors; torch's threads would wait in their way.
        torch.set_num_threads(1)
        world = world.smoothed() if config.smooth else world
        exact = world.dynamics(threads=config.threads) if config.exact else None
        return world.problem(config.horizon, dynamics=exact, threads=config.threads), FullState()
    from mbrl.experiments.learned import learned_problem, load_model

    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    propagation: str = config.propagation
    if holds:
        propagation = "scenarios" if isinstance(config.planner, ScenarioNMPC) else "expression"
    problem = learned_problem(
        world,
        load_model(config.model),
        config.horizon,
        propagation=propagation,
        particles=config.particles,
        kappa=config.kappa,
        learned_task=config.learned_task,
        constraints=constraints,
    )
    if holds:
        problem = dataclasses.replace(problem, terminated=None)
    estimator: Estimator = Measured(world.measure)
    return problem, Padded(estimator, 2) if config.learned_task else estimator


def allowed_steps(config: Control[Any]) -> int:
    """Control steps that a plan may take in real time: the latency that is reckoned with, else those between replans."""
    fixed = 0 if config.latency == "measured" else config.latency
    return fixed or config.replan_every
