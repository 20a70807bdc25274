"""Control a robot by planning, in the true simulator or in a learned model: measured and recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from mbrl.envs import make_world
from mbrl.errors import ContractError, MbrlError
from mbrl.experiments.control import PLANNERS, Control, P, allowed_steps, checked, left_out, policy_of
from mbrl.experiments.interrupts import stop_on_interrupt
from mbrl.experiments.progress import Progress, show_facts
from mbrl.experiments.recording import Recording
from mbrl.experiments.report import explanations, write_report
from mbrl.experiments.video import write_video
from mbrl.following import FOLLOWED
from mbrl.mpc import MPCReport
from mbrl.runs import RunFolder

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
