"""What a control run leaves in memory for its video and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs import MujocoDynamics, World
from mbrl.problem import Plan, Problem
from mbrl.rollout import rollout

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
HELD = 1e-3
"""A constraint counts as held up to this, in its own units."""


@dataclass(frozen=True)
class Recording:
    """One episode, or its beginning.

    Attributes:
        states: T+1 of (nx,), the last one after the last step.
        actions: T of (nu,).
        plans: T, the plan that was followed in each step; its first state may be some steps old.
        rows: T rows of metrics.csv.
    """

    world: World
    problem: Problem[Any, Any, Any]
    states: list[Tensor]
    actions: list[Tensor]
    plans: list[Plan]
    rows: list[Mapping[str, Any]]

    def add(self, state: Tensor, action: Tensor, plan: Plan, row: Mapping[str, Any]) -> None:
        """A step: where the action led, the plan that was followed, and the row of metrics.csv."""
        self.states.append(state)
        self.actions.append(action)
        self.plans.append(plan)
        self.rows.append(row)

    def frames(self, rate: float) -> list[int]:
        """Indices of the states to show so that there are at most `rate` per second of simulated time."""
        stride = max(1, math.ceil(1 / (rate * self.problem.dynamics.dt) - 1e-6))
        return list(range(0, len(self.states), stride))

    def joints(self) -> dict[str, tuple[bool, list[float], list[float]]]:
        """Of each hinge and slide, by name: whether it turns, its T+1 positions (rad or m) and velocities."""
        model, states = self.world.model, torch.stack(self.states).numpy()
        start = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_TIME)  # what comes before the positions
        found = {}
        for i in range(model.njnt):
            joint, kind = model.joint(i), mujoco.mjtJoint(model.jnt_type[i])
            if kind in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                q, v = start + int(joint.qposadr[0]), start + model.nq + int(joint.dofadr[0])
                turns = kind == mujoco.mjtJoint.mjJNT_HINGE
                found[joint.name or f"joint {i}"] = (turns, states[:, q].tolist(), states[:, v].tolist())
        return found

    def outputs(self) -> Tensor:
        """y (T+1, ny) along the run."""
        return torch.stack(self.states)[:, -self.world.layout.size :]

    def constrained(self) -> dict[str, np.ndarray]:
        """Of each of the world's constraints, by name, what is not to exceed 0 along the run: g, or |g| of equations.

        (T+1, n), each at a state and the action taken there; at the last state, at the action before.
        """
        y, u = self.outputs(), torch.stack([*self.actions, self.actions[-1]]).to(self.states[0])
        found = {}
        for constraint in self.world.constraints:
            g = torch.stack([constraint.fun(y[k], u[k], k, None) for k in range(len(y))])
            found[constraint.label] = (g.abs() if constraint.kind == "eq" else g).numpy()
        return found

    def violations(self) -> dict[str, tuple[int, float]]:
        """Of each of the world's constraints, by name, in how many of the T+1 states it is violated, and by how much."""
        return {
            name: (int((g > HELD).any(-1).sum()), max(0.0, float(np.nanmax(g, initial=0.0))))
            for name, g in self.constrained().items()
        }

    @property
    def shows_plans(self) -> bool:
        """Whether the states of plans tell where bodies are."""
        return shows_plans(self.world, self.problem)

    @property
    def analytic(self) -> bool:
        """Whether plans are made with the world's analytic model, whose states are y."""
        return analytic(self.world, self.problem)

    def traces(self, frame: int, body: int) -> np.ndarray:
        """Where a body would go: (1 + n, H+1, 3), as `traces`, by the plan that was followed at a frame."""
        return traces(self.world, self.problem, self.plans[min(frame, len(self.plans) - 1)], body)


def analytic(world: World, problem: Problem[Any, Any, Any]) -> bool:
    """Whether plans are made with the world's analytic model, whose states are y."""
    return world.analytic is not None and problem.dynamics is world.analytic


def shows_plans(world: World, problem: Problem[Any, Any, Any]) -> bool:
    """Whether the states of plans tell where bodies are."""
    dynamics = problem.dynamics
    simulated = isinstance(
        getattr(dynamics, "dynamics", dynamics), MujocoDynamics
    )  # or FiniteDifference of it
    return simulated or (analytic(world, problem) and "qpos" in world.layout)


def traces(
    world: World, problem: Problem[Any, Any, Any], plan: Plan, body: int, *, sampled: bool = True
) -> np.ndarray:
    """Where a body would go: (1 + n, H+1, 3), first by the plan, then by n sampled candidates if they are wanted.

    Candidates are simulated again here, because keeping their states would slow the planner down.
    The states of a learned model are what the task reads, not where bodies are: no traces.
    """
    if plan.states is None or not shows_plans(world, problem):
        return np.full((0, 1, 3), np.nan)
    states = plan.states[:1]  # (1, H+1, nx)
    candidates = plan.info.get("candidates")
    if sampled and isinstance(candidates, Tensor):
        n = candidates.shape[1]
        others = rollout(problem.dynamics, states[0, :1].expand(n, -1), candidates[0])
        H = min(states.shape[1], others.shape[1])
        states = torch.cat([states[:, :H], others[:, :H]])
    if analytic(world, problem):
        return body_positions(world.model, states[..., world.layout["qpos"]].numpy(), body)
    return body_positions(world.model, states.numpy(), body)


def body_positions(model: mujoco.MjModel, states: np.ndarray, body: int) -> np.ndarray:
    """Centre of mass (..., 3) of a body in states (..., nx), or in positions (..., nq); NaN where one is not finite."""
    data = mujoco.MjData(model)
    kind = mujoco.mjtState.mjSTATE_QPOS if states.shape[-1] == model.nq else _STATE
    n = mujoco.mj_stateSize(model, kind)
    flat = states.reshape(-1, states.shape[-1])
    positions = np.full((len(flat), 3), np.nan)
    for x, position in zip(flat, positions, strict=True):
        if np.isfinite(x[:n]).all():
            mujoco.mj_setState(model, data, np.ascontiguousarray(x[:n]), kind)
            mujoco.mj_kinematics(model, data)
            position[:] = data.xipos[body]
    return positions.reshape(*states.shape[:-1], 3)


def robot_root(model: mujoco.MjModel) -> int:
    """The root body of the kinematic tree with the most degrees of freedom."""
    dofs = np.zeros(model.nbody, dtype=int)
    for body in range(1, model.nbody):
        dofs[model.body_rootid[body]] += model.body_dofnum[body]
    return int(dofs.argmax())


def walks(model: mujoco.MjModel) -> bool:
    """Whether the robot's base moves freely, so that the camera must follow it."""
    return int(model.body_dofnum[robot_root(model)]) >= 3


def tracked_body(model: mujoco.MjModel) -> int:
    """The body whose path tells most: the base of a walking robot, else the end of the chain."""
    root = robot_root(model)
    if walks(model):
        return root
    return int(np.flatnonzero(model.body_rootid == root)[-1])
