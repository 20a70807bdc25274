"""PETS: learn the dynamics of a robot from scratch and plan with what is not known about them.

Three classic forms, by `refit`: fit once to random data and plan (once), fit again between episodes (episode),
fit again every so many steps in mid-episode (a number).

Reference: Chua et al. 2018, "Deep reinforcement learning in a handful of trials using probabilistic dynamics
models", algorithm 1.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from mbrl.checkpoints import Checkpoints, pack, unpack
from mbrl.collect import Collected, Collector
from mbrl.data import Replay, Transition
from mbrl.datasets import DatasetWriter, load_dataset
from mbrl.envs import make_training_world
from mbrl.errors import ContractError, RunFolderError
from mbrl.estimators import Measured
from mbrl.experiments.benchmarks.record import interval
from mbrl.experiments.mpc import PLANNERS, stop_on_interrupt
from mbrl.models import TS1, Ensemble, Fit, FitConfig, MomentMatching, Propagation, Trainer, TSInf
from mbrl.mpc import MPC
from mbrl.planners import CEM, SamplingPlanner
from mbrl.policies import RandomPolicy
from mbrl.problem import from_task
from mbrl.protocols import TrainingWorld
from mbrl.resumable import vectorize
from mbrl.risk import Mean, MeanStd
from mbrl.runs import RunFolder, environment, from_plain

P = TypeVar("P", bound=SamplingPlanner[Any])
PLANNER = CEM(population=400, iterations=5, elites=40)
"""The paper's."""
PROPAGATIONS: dict[str, type[Propagation]] = {"ts1": TS1, "tsinf": TSInf, "moments": MomentMatching}
COLUMNS = (
    *("step", "kind", "return", "length"),
    *("train_loss", "holdout_error", "epochs", "fit_s", "plan_ms", "wall_s"),
)


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
        propagation: how uncertainty enters a rollout: ts1, tsinf or moments.
        kappa: deviations of the return that a plan is charged for; below 0 it is optimistic.
        members, hidden: of the ensemble.
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
    propagation: Literal["ts1", "tsinf", "moments"] = "tsinf"
    kappa: float = 0.0
    members: int = 5
    hidden: tuple[int, ...] = (200, 200, 200)
    fit: FitConfig = field(default_factory=FitConfig)
    envs: int = 1
    eval_every: int = 0
    eval_episodes: int = 10
    seed: int = 0
    device: str = "cpu"
    keep: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.random_steps, self.envs, self.eval_episodes, self.keep) < 1:
            raise ContractError(
                "Training needs steps, random_steps, envs, eval_episodes and keep ≥ 1, but got "
                f"{self.steps}, {self.random_steps}, {self.envs}, {self.eval_episodes} and {self.keep}."
            )
        if isinstance(self.refit, int) and self.refit < 1:
            raise ContractError(f"refit needs a number of steps ≥ 1, once or episode, but got {self.refit}.")


class Agent:
    """The model, what fits it, what it was fitted to, and the policy that plans with it."""

    def __init__(self, config: Config[Any], world: TrainingWorld):
        self.config, self.world = config, world
        self.generator = torch.Generator(config.device).manual_seed(config.seed)
        env = world.make()
        self.dt = float(env.unwrapped.dt)
        env.close()
        ny, nu = world.features.ny, world.actions.nu
        self.model = Ensemble(
            ny,
            nu,
            self.dt,
            features=world.features,
            members=config.members,
            hidden=config.hidden,
            generator=torch.Generator().manual_seed(config.seed),
        ).to(config.device)
        self.trainer = Trainer(self.model, config.fit)
        self.replay = Replay(config.steps + config.envs, ny, nu, config.device)
        self.policy = self.plan_with(config.envs)

    def plan_with(self, envs: int) -> MPC:
        config = self.config
        problem = from_task(
            PROPAGATIONS[config.propagation](self.model),
            self.world.task,
            self.world.actions,
            config.horizon,
            particles=config.particles,
            risk=MeanStd(config.kappa) if config.kappa else Mean(),
        )
        return MPC(problem, config.planner, estimator=Measured(self.world.measure), generator=self.generator)

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.generator.set_state(state["generator"])


def main(config: Config[Any], console: Console | None = None, *, resume: Path | None = None) -> Path:
    """Train, and return the run's folder; `resume` goes on with the newest checkpoint of that folder.

    Ctrl-C ends it after the current step, with a checkpoint, and then raises KeyboardInterrupt.
    """
    console = console or Console()
    world = make_training_world(config.env)
    agent = Agent(config, world)
    babble = RandomPolicy(world.actions, generator=torch.Generator().manual_seed(config.seed))
    collector = Collector(vectorize(world.make, config.envs), babble, output=world.measure, seed=config.seed)
    step, fits, started = 0, 0, time.perf_counter()

    checkpoints, state = None, None
    if resume is not None:
        checkpoints = Checkpoints(resume / "checkpoints", config.keep)
        step, tensors, meta = checkpoints.load()
        state = unpack(tensors, meta)
    folder = (
        RunFolder(resume, COLUMNS, resume_at=step)
        if resume is not None
        else RunFolder.numbered(config.out or Path("runs", f"pets-{config.env}-{config.seed}"), COLUMNS)
    )
    with folder, DatasetWriter(folder.path / "data", {"world": config.env, "dt": agent.dt}) as data:
        if state is None:
            folder.save_config(config, algorithm="pets")
            checkpoints = Checkpoints(folder.path / "checkpoints", config.keep)
        else:
            fits, started = state["fits"], started - state["wall_s"]
            data.cut(state["transitions"])
            agent.replay.add(load_dataset(data.path).transition)
            agent.load_state_dict(state["agent"])
            babble.generator.set_state(state["random"])
            collector.policy = agent.policy
            collector.load_state_dict(state["collector"])
        assert checkpoints is not None
        board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1 if state else None)
        console.print(f"PETS on {config.env} -> {folder.path}", highlight=False, soft_wrap=True)

        def log(kind: str, **values: float) -> None:
            row = {"step": step, "kind": kind, "wall_s": round(time.perf_counter() - started, 2), **values}
            folder.log(row)
            for name, value in values.items():
                board.add_scalar(f"{kind}/{name}", value, step)
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            console.print(f"  {step:>6} {kind}: {text}", highlight=False)

        def save(new: list[Transition]) -> None:
            data.append(Transition.cat(new))
            new.clear()
            tensors, meta = pack(
                {
                    "agent": agent.state_dict(),
                    "collector": collector.state_dict(),
                    "random": babble.generator.get_state(),
                    "transitions": data.transitions,
                    "fits": fits,
                    "wall_s": time.perf_counter() - started,
                }
            )
            checkpoints.save(step, tensors, meta, finite=("agent/model",))

        fresh: list[Transition] = []  # since the last checkpoint
        plan_ms: list[float] = []  # since the last episode's end
        with stop_on_interrupt() as stop:
            while step < config.steps and not stop.is_set():
                some = collector.collect(1)
                if collector.policy is agent.policy and agent.policy.report is not None:
                    plan_ms.append(agent.policy.report.plan_ms)
                agent.replay.add(some.transition)
                fresh.append(some.transition.to("cpu", torch.float32))
                step += config.envs
                for total, length in zip(some.returns.tolist(), some.lengths.tolist(), strict=True):
                    planning = {"plan_ms": statistics.median(plan_ms)} if plan_ms else {}
                    log("episode", **{"return": total, "length": length, **planning})
                    plan_ms.clear()

                fitted = due(config, step, fits, some)
                if fitted:
                    tic = time.perf_counter()
                    fit = agent.fit()
                    fits += 1
                    log("fit", **summary(fit), fit_s=time.perf_counter() - tic)
                    collector.policy = agent.policy
                evaluated = bool(fits and config.eval_every and step % config.eval_every < config.envs)
                if evaluated:
                    log("evaluation", **{"return": statistics.fmean(evaluate(agent, config.eval_episodes))})
                if fitted or evaluated:  # after all of this step's rows: a resumed run keeps those
                    save(fresh)
            if fresh:
                save(fresh)
        board.close()
    if stop.is_set():
        raise KeyboardInterrupt
    return folder.path


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
    last = fit.epochs[-1]
    return {
        "train_loss": sum(last.train) / len(last.train),
        "holdout_error": sum(fit.best) / len(fit.best) if fit.best else math.nan,
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


def evaluate_run(folder: Path, episodes: int, console: Console) -> float:
    """Mean return of the newest checkpoint of a run; prints it with its bootstrap interval."""
    config = config_of(folder)
    agent = Agent(config, make_training_world(config.env))
    step, tensors, meta = Checkpoints(folder / "checkpoints").load()
    agent.load_state_dict(unpack(tensors, meta)["agent"])
    returns = evaluate(agent, episodes)
    mean, (low, high) = statistics.fmean(returns), interval(returns)
    around = "" if low is None else f", 95 % interval {low:.4g} to {high:.4g}"
    console.print(f"{config.env} after {step} steps: return {mean:.4g}{around} ({episodes} episodes)")
    return mean


def config_of(folder: Path) -> Config[Any]:
    """What a run was started with.

    Raises:
        RunFolderError: no config there, or one of another version.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} holds no run to go on with: config.json: {error}.") from error
    if content.get("algorithm") != "pets":
        raise RunFolderError(f"{folder} holds a run of another kind, not of `mbrl train`.")
    now, then = environment(), {key: content.get(key) for key in ("versions", "torch_threads")}
    for key, value in then.items():
        if now[key] != value:
            warnings.warn(
                f"The run in {folder} had {key} = {value}, now it is {now[key]}: it goes on, but not number for number.",
                RuntimeWarning,
                stacklevel=2,
            )
    config: Config[Any] = from_plain(
        {**content["config"], "out": None}, (Config, FitConfig, *PLANNERS.values())
    )
    return config
