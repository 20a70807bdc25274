"""PETS: learn the dynamics of a robot from scratch and plan with what is not known about them.

Three classic forms, by `refit`: fit once to random data and plan (once), fit again between episodes (episode),
fit again every so many steps in mid-episode (a number).

Reference: Chua et al. 2018, "Deep reinforcement learning in a handful of trials using probabilistic dynamics
models", algorithm 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from mbrl.checkpoints import check_state
from mbrl.collect import Collected, Collector
from mbrl.data import Replay
from mbrl.envs import make_training_world
from mbrl.errors import ContractError
from mbrl.estimators import Measured, Padded
from mbrl.experiments import control, training
from mbrl.experiments.benchmarks.record import interval
from mbrl.experiments.interrupts import stop_on_interrupt
from mbrl.experiments.training import TrainingRun, check_device, fitting
from mbrl.models import (
    TS1,
    Ensemble,
    Fit,
    FitConfig,
    MomentMatching,
    Propagation,
    Thompson,
    Trainer,
    TSInf,
    from_heads,
)
from mbrl.models.storage import check_ensemble
from mbrl.mpc import MPC
from mbrl.planners import CEM, SamplingPlanner
from mbrl.policies import RandomPolicy
from mbrl.problem import Problem, from_task
from mbrl.protocols import Estimator, TrainingWorld
from mbrl.resumable import vectorize
from mbrl.risk import Mean, MeanStd

P = TypeVar("P", bound=SamplingPlanner[Any])

PLANNERS = {name: kind for name, kind in control.PLANNERS.items() if issubclass(kind, SamplingPlanner)}
"""Those that plan with particles."""
PLANNER = CEM(population=400, iterations=5, elites=40)
"""The paper's."""
PROPAGATIONS: dict[str, Callable[[Ensemble], Propagation]] = {
    "ts1": TS1,
    "tsinf": TSInf,
    "moments": MomentMatching,
}
COLUMNS = ("return", "length", "plan_ms", "train_loss", "holdout_error", "epochs", "fit_s")


@dataclass(frozen=True, kw_only=True)
class Config(Generic[P]):
    """Learn a robot's dynamics from scratch and plan with them (PETS).

    Attributes:
        planner: what searches for actions; --planner NAME on the command line.
        env: the world; `mbrl list` shows all.
        steps: environment steps in all, random ones included.
        random_steps: with random actions, before the first fit.
        refit: when to fit again: once, episode, or a number of steps.
        horizon: steps to plan ahead.
        particles: of each candidate plan; a multiple of the members is fair to all.
        propagation: how uncertainty enters a rollout: ts1, tsinf, moments, or thompson to explore by planning each
            episode on one network.
        rest: weight of a terminal cost |y|², for tasks that are to end at rest at y = 0 where the reward does not say so.
        kappa: deviations of the return that a plan is charged for; below 0 it is optimistic.
        members, hidden: of the ensemble.
        learn_task: learn reward and end as well, and plan by them, instead of reading them off the task.
        fit: how it is fitted.
        envs: environments that run at once.
        eval_every: steps between evaluations on environments of their own; 0 for none.
        eval_episodes: in each.
        seed: of everything.
        device: of model and planner.
        keep: checkpoints to keep.
        out: folder for everything the run leaves; runs/pets-ENV-SEED unless given.
    """

    planner: P
    env: str = "pets-cartpole"
    steps: int = 3_000
    random_steps: int = 200
    refit: Literal["once", "episode"] | int = "episode"
    horizon: int = 25
    particles: int = 20
    propagation: Literal["ts1", "tsinf", "moments", "thompson"] = "tsinf"
    kappa: float = 0.0
    rest: float = 0.0
    members: int = 5
    hidden: tuple[int, ...] = (200, 200, 200)
    learn_task: bool = False
    fit: FitConfig = field(default_factory=FitConfig)
    envs: int = 1
    eval_every: int = 0
    eval_episodes: int = 10
    seed: int = 0
    device: str = "cpu"
    keep: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.envs, self.eval_episodes, self.keep) < 1 or self.random_steps < 2:
            raise ContractError(
                "Training needs steps, envs, eval_episodes and keep ≥ 1 and random_steps ≥ 2, but got "
                f"{self.steps}, {self.envs}, {self.eval_episodes}, {self.keep} and {self.random_steps}."
            )
        if min(self.particles, self.members, *self.hidden) < 1 or not 0 <= self.rest < math.inf:
            raise ContractError(
                "Training needs particles, members and hidden ≥ 1 and a finite rest ≥ 0, but got "
                f"{self.particles}, {self.members}, {self.hidden} and {self.rest}."
            )
        if self.eval_every < 0 or not 0 <= self.seed < 2**63:
            raise ContractError(
                f"Training needs eval_every ≥ 0 and 0 ≤ seed < 2**63, but got {self.eval_every} and {self.seed}."
            )
        check_device(self.device)
        if self.particles < 2 and (self.kappa or self.propagation == "moments"):
            raise ContractError(
                f"kappa and propagation moments need 2 particles or more, but got {self.particles}."
            )
        if self.propagation == "thompson" and self.envs > 1:
            raise ContractError(
                f"Thompson sampling plans a whole episode on one network, so it needs envs = 1, but got {self.envs}."
            )
        if isinstance(self.refit, int) and self.refit < 1:
            raise ContractError(f"refit needs a number of steps ≥ 1, once or episode, but got {self.refit}.")


class Agent:
    """The model, what fits it, what it was fitted to, and the policy that plans with it.

    Args:
        weights: of a stored model, instead of fresh ones; no memory is taken before they are known to fit.
    """

    def __init__(self, config: Config[Any], world: TrainingWorld, weights: dict[str, Any] | None = None):
        self.config, self.world = config, world
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        env = world.make()
        self.dt = float(env.unwrapped.dt)
        env.close()
        ny, nu = world.features.ny, world.actions.nu
        with torch.device("cpu" if weights is None else "meta"):
            model = Ensemble(
                ny,
                nu,
                self.dt,
                features=world.features,
                members=config.members,
                hidden=config.hidden,
                reward=config.learn_task,
                termination=config.learn_task,
                generator=torch.Generator().manual_seed(config.seed),
            )
        if weights is not None:
            model.load_state_dict(weights, assign=True)
            check_ensemble(model)
        self.model = model.to(config.device)
        self.model.world = config.env
        self.trainer = Trainer(self.model, config.fit)
        self.replay = Replay(config.steps + config.envs, ny, nu, config.device)
        self.policy = self.plan_with(config.envs)
        self.member: int | None = None
        """That the policy plans on, under Thompson sampling."""

    def plan_with(self, envs: int) -> MPC:
        # Evaluated on all networks, whichever one explores.
        way = TSInf if self.config.propagation == "thompson" else PROPAGATIONS[self.config.propagation]
        estimator: Estimator = Measured(self.world.measure)
        if self.config.learn_task:
            estimator = Padded(estimator, 2)
        return MPC(
            self.problem(way(self.model)), self.config.planner, estimator=estimator, generator=self.generator
        )

    def problem(self, way: Propagation) -> Problem[Any, Any, Any]:
        config = self.config
        options: dict[str, Any] = {
            "particles": config.particles,
            "risk": MeanStd(config.kappa) if config.kappa else Mean(),
        }
        if config.rest:
            ny = self.world.features.ny
            options["terminal_value"] = lambda y: config.rest * (y[..., :ny] ** 2).sum(-1)
        if config.learn_task:
            return from_heads(way, self.world.actions, config.horizon, **options)
        return from_task(way, self.world.task, self.world.actions, config.horizon, **options)

    def believe(self, member: int | None = None) -> None:
        """Under Thompson sampling: plan on one network, a newly drawn one unless it is given."""
        if self.config.propagation != "thompson":
            return
        if member is None:
            member = Thompson.draw(self.model, generator=self.generator).member
        self.member = member
        self.policy.problem = self.problem(Thompson(self.model, member=member))

    def fit(self) -> Fit:
        data = self.replay.all()
        return self.trainer.fit(
            data.y, data.u, data.y_next, data.reward, data.terminated, generator=self.generator
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.trainer.optimizer.state_dict(),
            "policy": self.policy.state_dict(),
            "generator": self.generator.get_state(),
            "member": self.member,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(
            "An agent",
            state,
            {"model": dict, "optimizer": dict, "policy": dict, "generator": Tensor, "member": int | None},
        )
        self.model.load_state_dict(state["model"])
        check_ensemble(self.model)
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        if state["member"] is not None:
            self.believe(state["member"])
        self.policy.load_state_dict(state["policy"])
        self.generator.set_state(state["generator"])


def main(config: Config[Any], console: Console | None = None, *, resume: Path | None = None) -> Path:
    """Train, and return the run's folder; `resume` goes on with the newest checkpoint of that folder.

    Ctrl-C ends it after the current step, with a checkpoint, and then raises KeyboardInterrupt.
    """
    world = make_training_world(config.env)
    agent = Agent(config, world)
    babble = RandomPolicy(world.actions, generator=torch.Generator().manual_seed(config.seed))
    collector = Collector(vectorize(world.make, config.envs), babble, output=world.measure, seed=config.seed)
    fits = 0
    with TrainingRun(
        config.out,
        config,
        name=f"pets-{config.env}-{config.seed}",
        algorithm="pets",
        columns=COLUMNS,
        metadata={"world": config.env, "dt": agent.dt},
        keep=config.keep,
        console=console or Console(),
        resume=resume,
    ) as run:
        if run.state is not None and run.recorded is not None:
            with fitting(run.path / "checkpoints" / f"step_{run.step}"):
                check_state("A run of PETS", run.state, {"fits": int, "babble": Tensor})
                check_state("A run of PETS", run.state, {"agent": dict, "collector": dict})
                fits = run.state["fits"]
                agent.replay.add(run.recorded)
                agent.load_state_dict(run.state["agent"])
                babble.generator.set_state(run.state["babble"])
                collector.policy = agent.policy if fits else babble
                collector.load_state_dict(run.state["collector"])

        def save() -> None:
            state = {
                "agent": agent.state_dict(),
                "collector": collector.state_dict(),
                "babble": babble.generator.get_state(),
                "fits": fits,
            }
            run.save(state, finite=("agent/model",))

        plan_ms: list[float] = []  # since the last episode's end
        with stop_on_interrupt() as stop:
            while run.step < config.steps and not stop.is_set():
                some = collector.collect(1)
                agent.replay.add(some.transition)
                run.record(some.transition)
                run.step += config.envs
                if fits and agent.policy.report is not None:
                    plan_ms.append(agent.policy.report.plan_ms)
                for total, length in zip(some.returns.tolist(), some.lengths.tolist(), strict=True):
                    planning = {"plan_ms": statistics.median(plan_ms)} if plan_ms else {}
                    run.log("episode", **{"return": total, "length": length, **planning})
                    plan_ms.clear()

                fitted = due(config, run.step, fits, some)
                if fitted:
                    tic = time.perf_counter()
                    fit = agent.fit()
                    run.log("fit", **summary(fit), fit_s=time.perf_counter() - tic)
                    run.say(fit.stopped)
                    if fits == 0 and not all(math.isfinite(fit.best[e]) for e in fit.elites):
                        raise ContractError(
                            f"The first fit gave no model to plan with: {fit.stopped}. "
                            "Lower the learning rate, --fit.learning-rate."
                        )
                    fits += 1
                    collector.policy = agent.policy
                if fits and (len(some.returns) or agent.member not in agent.model.elites.tolist()):
                    agent.believe()
                evaluated = bool(fits and config.eval_every and run.step % config.eval_every < config.envs)
                if evaluated:
                    run.log(
                        "evaluation", **{"return": statistics.fmean(evaluate(agent, config.eval_episodes))}
                    )
                if fitted or evaluated:  # after all of this step's rows: a resumed run keeps those
                    save()
            if run.unsaved:
                save()
    if stop.is_set():
        raise KeyboardInterrupt
    return run.path


def due(config: Config[Any], step: int, fits: int, some: Collected) -> bool:
    """Whether to fit now."""
    if step < config.random_steps:
        return False
    if fits == 0:
        return True
    if config.refit == "once":
        return False
    return len(some.returns) > 0 if config.refit == "episode" else step % config.refit < config.envs


def summary(fit: Fit) -> dict[str, float]:
    """Of the networks that answer."""
    return {
        "train_loss": statistics.fmean(fit.epochs[-1].train[e] for e in fit.elites),
        "holdout_error": statistics.fmean(fit.best[e] for e in fit.elites),
        "epochs": len(fit.epochs),
    }


def evaluate(agent: Agent, episodes: int) -> list[float]:
    """Returns of episodes in environments of their own, all at once; moves no generator of the run."""
    config = agent.config
    policy = agent.plan_with(episodes)
    policy.generator = torch.Generator(config.device).manual_seed(config.seed + 1)
    envs = vectorize(agent.world.make, episodes)
    collector = Collector(envs, policy, output=agent.world.measure, seed=config.seed + 10_000)
    first: dict[int, float] = {}  # of each environment: later episodes are there only if they are short
    while len(first) < episodes:
        some = collector.collect(1)
        for episode, total in zip(some.episodes.tolist(), some.returns.tolist(), strict=True):
            if episode < episodes:
                first[episode] = total
    envs.close()
    return list(first.values())


def evaluate_run(folder: Path, episodes: int, console: Console, device: str | None = None) -> float:
    """Mean return of the newest checkpoint of a run; prints it with its bootstrap interval."""
    step, agent = load_agent(folder, **{} if device is None else {"device": device})
    returns = evaluate(agent, episodes)
    mean, (low, high) = statistics.fmean(returns), interval(returns)
    around = "" if low is None else f", 95 % interval {low:.4g} to {high:.4g}"
    console.print(f"{agent.config.env} after {step} steps: return {mean:.4g}{around} ({episodes} episodes)")
    return mean


def load_agent(folder: Path, **changes: Any) -> tuple[int, Agent]:
    """The environment steps of a run's newest checkpoint, and an agent with the model of then, to be evaluated.

    `changes` are of its config, such as another device.
    """
    config = config_of(folder, **changes)
    world = make_training_world(config.env)
    step, tree = training.newest(folder)
    with fitting(folder / "checkpoints" / f"step_{step}"):
        check_state("An agent", tree["agent"], {"model": dict})
        agent = Agent(config, world, tree["agent"]["model"])
    return step, agent


def load_model(folder: Path) -> Ensemble:
    """The model of a run's newest checkpoint, on the CPU wherever it was trained."""
    return load_agent(folder, device="cpu")[1].model


def config_of(folder: Path, **changes: Any) -> Config[Any]:
    """What a run was started with; see `training.config_of`."""
    types = (Config, FitConfig, *PLANNERS.values())
    config: Config[Any] = training.config_of(folder, "pets", Config, types, **changes)
    return config
