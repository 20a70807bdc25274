"""Control a robot by planning, in the true simulator or in a learned model: measured and recorded."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from mbrl.derivatives import Autodiff, FiniteDifference
from mbrl.envs import WORLDS, Pendulum, World, make_world
from mbrl.errors import ContractError, MbrlError, UnknownName
from mbrl.estimators import FullState, Measured, Padded
from mbrl.experiments.progress import Progress, show_facts
from mbrl.experiments.recording import Recording
from mbrl.experiments.report import explanations, write_report
from mbrl.experiments.video import write_video
from mbrl.following import FOLLOWED
from mbrl.mpc import MPC, MPCReport
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
from mbrl.runs import RunFolder

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
HEALTH = (
    "effective_samples",
    "elite_spread",
    "clipped",
    "diverged",
    "improvement",
    "iterations",
    "model_steps",
    "damping",
    "slope",
    "violation",
    "gap",
    "status",
)
COLUMNS = (
    *("step", "time", "reward", "return", "predicted_reward", "reward_error", "state_error", "output_error"),
    *("plan_ms", "realtime_factor", "plan_cost"),
    *(f"planner/{name}" for name in HEALTH),
    *("planner/explanation", "delay", "followed", "fallback", "terminated", "truncated", "diverged"),
)


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


@dataclass(frozen=True, kw_only=True)
class Config(Control[P]):
    """Control a robot by planning in its simulator; leaves metrics, a video and a report.

    Choose a planner with --planner random-shooting | cem | icem | mppi | predictive-sampling | cma-es | ilqr |
    fddp | ddp (on a learned model) | nmpc (on a learned model, or a world with an analytic one) | scenario-nmpc (on a
    learned ensemble) and its parameters with --planner.NAME, in any order. The help below is that of the planner chosen.

    Attributes:
        steps: control steps; the run ends earlier if the episode does.
        video: record a video.
        out: folder for everything the run leaves; runs/ENV-PLANNER-SEED unless given.
    """

    steps: int = 200
    video: bool = True
    out: Path | None = None

    def __post_init__(self) -> None:
        Control.__post_init__(self)
        if self.steps < 1:
            raise ContractError(f"A run needs steps ≥ 1, but got {self.steps}.")


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


def main(config: Config[Any], console: Console | None = None) -> Path:
    """Run one episode and return its folder.

    Ctrl-C or SIGTERM ends it after the current step: the report is still written, then KeyboardInterrupt is raised.

    Raises:
        MbrlError: no plan of the run was usable; the report is still written.
    """
    console = console or Console()
    config = checked(config)
    world = make_world(config.env)
    policy = policy_of(config, world)
    problem, planner = policy.problem, config.planner
    with open_folder(config) as folder:
        console.print(
            f"{config.env} with {type(planner).__name__} -> {folder.path}", highlight=False, soft_wrap=True
        )
        for line in left_out(planner, world):
            console.print(f"[dim]{escape(line)}[/dim]", highlight=False, soft_wrap=True)
        folder.save_config(config)
        env = world.make()
        obs, info = env.reset(seed=config.seed)
        recording = Recording(world, problem, [torch.as_tensor(info["state"])], [], [], [])
        report, total = folder.path / "report.html", 0.0
        with stop_on_interrupt() as stop:
            with Progress(console, config.steps) as progress:
                for step in range(config.steps):
                    action = policy(obs, info)
                    obs, reward, terminated, truncated, info = env.step(action[0].numpy().astype(np.float32))

                    planning = policy.report
                    assert planning is not None  # the policy has just been called
                    reward = (
                        math.nan if info["diverged"] else float(reward)
                    )  # unknown, and no part of the return
                    total += 0.0 if info["diverged"] else reward
                    row = {
                        "step": step,
                        "time": (step + 1) * problem.dynamics.dt,
                        "reward": reward,
                        "return": total,
                        **measure(planning, reward, problem.dynamics.dt * allowed_steps(config)),
                        "terminated": int(terminated),
                        "truncated": int(truncated),
                        "diverged": int(info["diverged"]),
                    }
                    folder.log(row)
                    recording.add(torch.as_tensor(info["state"]), action[0], planning.plan, row)
                    progress.show(row)
                    if terminated or truncated or stop.is_set():
                        break
            env.close()
            write_report(recording, config, report, interrupted=stop.is_set())
        video = None
        if config.video:  # after the report: graphics drivers may take the process down
            video = save_video(recording, folder.path / "video.mp4", console)
        if video is not None:
            write_report(recording, config, report, video=video, interrupted=stop.is_set())
    show_facts(console, recording, report, video)
    if stop.is_set():
        raise KeyboardInterrupt
    plans = sum(row["plan_ms"] is not None for row in recording.rows)
    if policy.fallbacks == plans:
        reasons = explanations(recording)
        why = reasons[0] if reasons else "not finite, or outside the bounds"
        raise MbrlError(
            f"None of the {plans} plans was usable ({why}), so the robot was not controlled by planning. See {report}."
        )
    return folder.path


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


def open_folder(config: Config[Any]) -> RunFolder:
    if config.out is not None:
        return RunFolder(config.out, COLUMNS)
    planner = next(name for name, kind in PLANNERS.items() if type(config.planner) is kind)
    return RunFolder.numbered(Path("runs", f"{config.env}-{planner}-{config.seed}"), COLUMNS)


def save_video(recording: Recording, path: Path, console: Console) -> Path | None:
    """The video, or None with a warning: no picture is worth a failed run."""
    try:
        with console.status("rendering the video"):
            return write_video(recording, path)
    except (MbrlError, OSError, RuntimeError) as error:  # the latter two from the encoder
        console.print(f"[yellow]No video:[/yellow] {escape(str(error))}", highlight=False, soft_wrap=True)
        return None


def allowed_steps(config: Control[Any]) -> int:
    """Control steps that a plan may take in real time: the latency that is reckoned with, else those between replans."""
    fixed = 0 if config.latency == "measured" else config.latency
    return fixed or config.replan_every


def measure(report: MPCReport, reward: float, budget_s: float) -> dict[str, Any]:
    """The part of a row that tells how planning went; None where there is nothing to tell."""
    new = report.begun
    predicted = None if report.predicted_cost is None else -float(report.predicted_cost[0])
    health = {name: None if new is None else number(new.info.get(name)) for name in HEALTH}
    return {
        "predicted_reward": predicted,
        "reward_error": None if predicted is None else abs(predicted - reward),
        "state_error": number(report.state_error),
        "output_error": number(report.output_error),
        "plan_ms": None if new is None else report.plan_ms,
        "realtime_factor": None if new is None else 1e3 * budget_s / report.plan_ms,
        "plan_cost": None if new is None else number(new.cost),
        **{f"planner/{name}": value for name, value in health.items()},
        "planner/explanation": (new.info.get("explanation") if new is not None else None) or None,
        "delay": report.delay,
        "followed": FOLLOWED[int(report.followed[0])],
        "fallback": int(report.fallback[0]),
    }


def number(value: Any) -> float | None:
    """A tensor (1,) or a scalar as a number."""
    return (
        None
        if value is None
        else float(value[0] if isinstance(value, torch.Tensor) and value.ndim else value)
    )


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event; the next ones act as usual."""
    stop = threading.Event()

    def first(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    old = {number: signal.signal(number, first) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
