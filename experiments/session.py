"""An episode under MPC that is paused, pushed, reset and planned for differently while it runs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl.envs import WithState, make_world
from mbrl.envs.pushes import Pushable
from mbrl.errors import ContractError, UnknownName
from mbrl.experiments.control import Control, allowed_steps, checked, policy_of
from mbrl.experiments.mpc import measure
from mbrl.experiments.recording import robot_root, shows_plans, traces, tracked_body
from mbrl.problem import Plan

LONGEST_PUSH = 1000  # control steps


class Session:
    """One robot under MPC, step by step, episode after episode.

    Attributes:
        world, policy: what is controlled, and by what.
        tracked: the body whose path is drawn and that is pushed.
        paused: whether `step` should wait; a single step may be taken all the same.
        planning: whether actions are planned; else the robot gets the safe action. See `plan_or_not`.
        seed: of the episode; each `reset` takes the next one.
        state: (nx,), of the plant.
        steps, total: of the episode so far: control steps, and the return.
        row: the last step's numbers, those of metrics.csv; empty before the first step.
        ended: why the episode is over, or None.
    """

    def __init__(self, config: Control[Any]):
        self._config = config = checked(config)
        self.world = make_world(config.env)
        self.policy = policy_of(config, self.world)
        model = self.world.model
        self.tracked = tracked_body(model)
        self._plant = Pushable(self.world.build(model), self.tracked)
        self._env = WithState(self._plant, self.world.layout)
        self.paused, self.planning = False, True
        self._start(config.seed)

    def _start(self, seed: int) -> None:
        self._obs, self._info = self._env.reset(seed=seed)
        self.policy.reset()
        self.policy.fallbacks = 0
        self.seed, self.steps, self.total = seed, 0, 0.0
        self.state = torch.as_tensor(self._info["state"])
        self.row: Mapping[str, Any] = {}
        self.ended: str | None = None

    @property
    def dt(self) -> float:
        """Seconds per control step."""
        return float(self.policy.problem.dynamics.dt)

    @property
    def budget_ms(self) -> float:
        """That a plan may take in real time."""
        return 1e3 * self.dt * allowed_steps(self._config)

    @property
    def shows_plans(self) -> bool:
        """Whether the states of plans tell where bodies are."""
        return shows_plans(self.world, self.policy.problem)

    def traces(self, *, sampled: bool) -> np.ndarray:
        """Where the tracked body would go: (1 + n, H+1, 3), by the plan and n candidates; (0, …) without a plan."""
        plan = self.plan
        if plan is None:
            return np.zeros((0, 1, 3))
        return traces(self.world, self.policy.problem, plan, self.tracked, sampled=sampled)

    @property
    def plan(self) -> Plan | None:
        """The plan that is being followed."""
        report = self.policy.report
        return report.plan if self.row and self.planning and report is not None else None

    @property
    def pushed(self) -> np.ndarray | None:
        """The force (3,) in N that acts in the next step, or None."""
        return self._plant.force if self._plant.left else None

    @property
    def weight(self) -> float:
        """Of the robot, N; as if gravity were 9.81 m/s² where the world has none."""
        model = self.world.model
        g = float(np.linalg.norm(model.opt.gravity)) or 9.81
        return float(model.body_subtreemass[robot_root(model)]) * g

    def step(self) -> None:
        """One control step, planned or with the safe action.

        Raises:
            ContractError: the episode is over, or the planner broke its contract.
        """
        if self.ended is not None:
            raise ContractError(f"The episode is over ({self.ended}), so there is no next step: reset first.")
        row: dict[str, Any] = {}
        action: Tensor = self.policy.safe_action
        if self.planning:
            action = self.policy(self._obs, self._info)[0]
        self._obs, reward, terminated, truncated, self._info = self._env.step(
            action.numpy().astype(np.float32)
        )
        reward, lost = float(reward), bool(self._info["diverged"])
        self.total += 0.0 if lost else reward
        if self.planning:
            report = self.policy.report
            assert report is not None  # the policy has just been called
            row = measure(report, math.nan if lost else reward, 1e-3 * self.budget_ms)
        self.steps += 1
        self.state = torch.as_tensor(self._info["state"])
        self.row = {**row, "reward": reward, "return": self.total, "time": self.steps * self.dt}
        if lost or terminated or truncated:
            self.ended = "the physics diverged" if lost else "terminated" if terminated else "time limit"

    def push(self, force: np.ndarray, steps: int) -> None:
        """Push the tracked body of the plant by `force` (3,), in N, in the next `steps` control steps.

        Raises:
            ContractError: no finite force, or no number of steps.
        """
        if force.shape != (3,) or not np.isfinite(force).all() or not 1 <= steps <= LONGEST_PUSH:
            raise ContractError(
                f"A push needs a finite force (3,) and 1 to {LONGEST_PUSH} steps, but got {force.tolist()} and {steps}."
            )
        self._plant.push(force, steps)

    def reset(self) -> None:
        """A new episode, with the next seed."""
        self._start(self.seed + 1)

    def plan_or_not(self, planning: bool) -> None:
        """Plan from the next step on, with nothing to start from; or leave the robot to the safe action."""
        if planning and not self.planning:
            self.policy.reset()
        self.planning = planning

    def parameters(self) -> dict[str, int | float]:
        """The planner's numbers, and the horizon."""
        planner = self.policy.planner
        fields = {f.name: getattr(planner, f.name) for f in dataclasses.fields(planner)}  # type: ignore[arg-type]
        numbers = {n: v for n, v in fields.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {"horizon": self.policy.problem.horizon, **numbers}

    def change(self, **values: float) -> None:
        """Give some of `parameters` other values, from the next plan on, which starts from the last one.

        Raises:
            MbrlError: the planner or the problem refuses them; nothing has changed then.
        """
        now = self.parameters()
        for name, value in values.items():
            if name not in now:
                raise UnknownName("parameter", name, now)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ContractError(f"{name} needs a number, but got {value!r}.")
            if isinstance(now[name], int) and value != int(value):
                raise ContractError(f"{name} needs a whole number, but got {value}.")
        new = {name: type(now[name])(value) for name, value in (now | values).items()}
        horizon = int(new.pop("horizon"))
        self.policy.change(
            dataclasses.replace(self.policy.problem, horizon=horizon),
            dataclasses.replace(self.policy.planner, **new),  # type: ignore[type-var]
        )


class Pace:
    """When the next step is due, and how fast steps really follow each other.

    Attributes:
        speed: simulated seconds per second that are aimed at.
    """

    def __init__(self, dt: float, speed: float):
        self.dt, self.speed = dt, speed
        self.restart()

    def restart(self) -> None:
        """The next step is due at once, and what was before does not count."""
        self._due = -math.inf
        self._steps: deque[float] = deque()

    def wait(self, now: float | None = None) -> float:
        """Seconds until the next step is due."""
        return max(0.0, self._due - (time.perf_counter() if now is None else now))

    def stepped(self, now: float | None = None) -> None:
        """A step begins. What it is late by is made up for, but never more than one step."""
        now = time.perf_counter() if now is None else now
        period = self.dt / self.speed
        self._due = (self._due if now - self._due < period else now) + period
        self._steps.append(now)
        while len(self._steps) > 2 and now - self._steps[0] > 1.0:
            self._steps.popleft()

    @property
    def factor(self) -> float:
        """Simulated seconds per second over the last second; NaN before the second step."""
        if len(self._steps) < 2:
            return math.nan
        return (len(self._steps) - 1) * self.dt / (self._steps[-1] - self._steps[0])
