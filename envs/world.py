"""Worlds: a real environment and the problem that plans in it, from one description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.mujoco import MujocoDynamics, RandomizedMujoco, diverged, read_state
from mbrl.envs.smooth import smooth_contacts
from mbrl.errors import ContractError, UnknownName
from mbrl.estimators import FullState
from mbrl.expressions import Expressible
from mbrl.features import Features
from mbrl.problem import Box, Constraint, Problem, TaskCost, from_task
from mbrl.protocols import Task


@dataclass(frozen=True)
class World:
    """A true world: how to make the environment, and how to plan in it.

    Attributes:
        name: as typed on the command line.
        model: the plant.
        layout: what y holds, read from the plant.
        task: reward and end, `observe(y)` where the observation is not y itself, and `features` where a learned
            model should not see and predict all of y as it is.
        frame_skip: physics steps per control step.
        actions: bounds.
        action_dtype: what the environment rounds actions to.
        build: makes the bare environment of a plant, from (model, **options).
        camera: attributes of mujoco.MjvCamera for pictures.
        planning_model: a cheaper model of the plant that `problem` plans with; the plant itself unless given.
        constraints: on y, of every step; what the plant should keep to and does not enforce. `problem` leaves them out
            unless told otherwise, problem(…, constraints=world.constraints), for few planners hold any.
        analytic: the plant as an expression whose state is y, for planners that want one, or None.
    """

    name: str
    model: mujoco.MjModel
    layout: Layout
    task: Task
    frame_skip: int
    actions: Box
    action_dtype: torch.dtype
    build: Callable[..., gymnasium.Env[Any, Any]] = field(repr=False)
    camera: Mapping[str, Any] = field(default_factory=dict)
    planning_model: mujoco.MjModel | None = None
    constraints: tuple[Constraint, ...] = ()
    analytic: Expressible | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Another model may number its objects differently.
        object.__setattr__(self, "layout", self.layout.on(self.model))
        if any(constraint.at != "path" for constraint in self.constraints):
            raise ContractError(
                f'The constraints of {self.name} need at="path": a world goes on and has no end.'
            )

    def with_model(self, model: mujoco.MjModel, planning_model: mujoco.MjModel | None = None) -> World:
        """The same world with another plant, to act in and, unless `planning_model` is given, to plan with.

        An analytic model is left out: it is that of the old plant.

        Raises:
            ContractError: the model's state, its objects' order or its time step differ from the old plant's.
        """
        self._check_state("plant", model)
        if model.opt.timestep != self.model.opt.timestep:
            raise ContractError(
                f"Another plant for {self.name} needs the time step {self.model.opt.timestep:g} s, "
                f"but has {model.opt.timestep:g} s."
            )
        return replace(self, model=model, planning_model=planning_model, analytic=None)

    def smoothed(self) -> World:
        """The same world, planned in with contacts that set in gradually; see `smooth_contacts`."""
        model = self.model if self.planning_model is None else self.planning_model
        return replace(self, planning_model=smooth_contacts(model))

    def observe(self, y: Tensor) -> Tensor:
        """The environment's observation (..., nobs) of y (..., ny)."""
        observe = getattr(self.task, "observe", None)
        return y if observe is None else observe(y)

    @property
    def features(self) -> Features:
        """What a learned model sees of y, and what it predicts."""
        features: Features | None = getattr(self.task, "features", None)
        return Features(self.layout.size) if features is None else features

    def measure(self, obs: Any, info: Mapping[str, Any]) -> Tensor:
        """y (M, ny) of what `reset` or `step` of one environment, or of a vector of M, has returned."""
        return FullState()(obs, info, None)[:, -self.layout.size :]

    def make(self, **options: Any) -> gymnasium.Env[Any, Any]:
        """The environment, with the full simulator state in info["state"]."""
        return WithState(self.build(self.model, **options), self.layout)

    def dynamics(self, *, threads: int = 0, model: mujoco.MjModel | None = None) -> MujocoDynamics:
        """The simulator to plan with: the plant, or another model with the same state, at the same control step.

        Raises:
            ContractError: the model's state, its objects' order, output or control step differ from the plant's.
            UnknownName: the model lacks an object that y is read from.
        """
        model = self.model if model is None else model
        self._check_state("planning model", model)
        dt = self.model.opt.timestep * self.frame_skip
        frame_skip = round(dt / model.opt.timestep)
        if abs(frame_skip * model.opt.timestep - dt) > 1e-9 * dt or frame_skip < 1:
            raise ContractError(
                f"A planning model for {self.name} needs a time step that divides the control step of {dt:g} s, "
                f"but has {model.opt.timestep:g} s."
            )
        layout = self.layout if model is self.model else self.layout.on(model)
        return MujocoDynamics(
            model, layout, frame_skip=frame_skip, threads=threads, action_dtype=self.action_dtype
        )

    def _check_state(self, role: str, model: mujoco.MjModel) -> None:
        wanted, given = (
            (m.nq, m.nv, m.nu, m.na, mujoco.mj_stateSize(m, mujoco.mjtState.mjSTATE_INTEGRATION))
            for m in (self.model, model)
        )
        if wanted != given:
            raise ContractError(
                f"A {role} for {self.name} needs (nq, nv, nu, na, state size) = {wanted}, but has {given}."
            )
        names = numbered_names(model)
        for kind, ours in numbered_names(self.model).items():
            if names[kind] != ours:  # numbers would go to other objects
                raise ContractError(
                    f"A {role} for {self.name} needs the plant's {kind} in the plant's order, {', '.join(ours)}, "
                    f"but has {', '.join(names[kind])}. Name and order them alike in the MJCF."
                )

    def problem(
        self, horizon: int, *, dynamics: Any = None, threads: int = 0, **options: Any
    ) -> Problem[Any, TaskCost, Box]:
        """Maximise the task's reward over `horizon` steps, on `planning_model` unless dynamics are given.

        Options as for `Problem`. On a `RandomizedMujoco` there is one particle per model unless told otherwise.
        """
        if dynamics is None:
            dynamics = self.dynamics(threads=threads, model=self.planning_model)
        if isinstance(dynamics, RandomizedMujoco):
            options.setdefault("particles", len(dynamics.models))
        return from_task(dynamics, self.task, self.actions, horizon, **options)


def numbered_names(model: mujoco.MjModel) -> dict[str, list[str]]:
    """What the numbers in a state and an action belong to, in order; an unnamed actuator goes by what it drives."""
    obj, trn = mujoco.mjtObj, mujoco.mjtTrn
    driven = {
        trn.mjTRN_TENDON: obj.mjOBJ_TENDON,
        trn.mjTRN_SITE: obj.mjOBJ_SITE,
        trn.mjTRN_SLIDERCRANK: obj.mjOBJ_SITE,
        trn.mjTRN_BODY: obj.mjOBJ_BODY,
    }

    def actuator(i: int) -> str:
        kind = driven.get(trn(model.actuator_trntype[i]), obj.mjOBJ_JOINT)
        return (
            model.actuator(i).name or f"one on {mujoco.mj_id2name(model, kind, model.actuator_trnid[i, 0])}"
        )

    return {
        "bodies": [model.body(i).name for i in range(model.nbody)],
        "joints": [model.joint(i).name for i in range(model.njnt)],
        "actuators": [actuator(i) for i in range(model.nu)],
    }


class WithState(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds the full simulator state to `info["state"]` and ends episodes whose physics diverged.

    A diverged simulation is reset by MuJoCo in mid-episode without a word. Here that step comes back
    with truncated = True, info["diverged"] = True and the reward NaN, which must not count: it would pay for
    the jump back to the default pose. The environment's own number is in info["reward"]. Actions of a wrong
    shape or with NaN are refused, because MuJoCo would replace them with zeros. The others are rounded to the
    precision of the action space, as planners expect (`World.action_dtype`).
    """

    def __init__(self, env: gymnasium.Env[Any, Any], layout: Layout):
        super().__init__(env)
        self.layout = layout

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**options)
        return obs, {**info, "state": self.state(), "diverged": False}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        action, space = np.asarray(action), self.action_space
        # Back in its own dtype, for in it an environment computes its reward.
        action = action.astype(space.dtype).astype(action.dtype)
        if action.shape != space.shape or not np.isfinite(action).all():
            raise ContractError(
                f"{self.unwrapped} needs finite actions of shape {space.shape}, but got "
                f"shape {action.shape} with values {np.array2string(action.ravel()[:8], precision=3)}."
            )
        obs, reward, terminated, truncated, info = self.env.step(action)
        lost = diverged(self.unwrapped.data)  # type: ignore[attr-defined]
        info = {**info, "state": self.state(), "diverged": lost}
        if lost:
            info["reward"], reward = reward, float("nan")
        return obs, reward, terminated, truncated or lost, info

    def state(self) -> np.ndarray:
        """x (nx,) of the running simulation."""
        env: Any = self.unwrapped
        return read_state(env.model, env.data, self.layout)


def gym_world(name: str, **options: Any) -> World:
    """A Gymnasium MuJoCo v5 environment as a world; options as for `gymnasium.make`.

    Raises:
        UnknownName: not one of the eleven; near names are suggested.
    """
    from mbrl.envs.gym_tasks import TASKS

    if name not in TASKS:
        raise UnknownName("Gymnasium MuJoCo environment", name, TASKS)

    bare: Any = gymnasium.make(name, **options).unwrapped
    own = bare.model

    def build(model: mujoco.MjModel, **render: Any) -> gymnasium.Env[Any, Any]:
        env = gymnasium.make(name, **options, **render)
        if model is not own:
            plant: Any = env.unwrapped
            plant.model, plant.data = model, mujoco.MjData(model)
            plant.mujoco_renderer.model, plant.mujoco_renderer.data = model, plant.data
        return env

    task = TASKS[name]
    layout = Layout(bare.model, task.fields(bare))
    space = bare.action_space
    return World(
        name=name,
        model=bare.model,
        layout=layout,
        task=task(bare, layout),
        frame_skip=bare.frame_skip,
        actions=Box(
            torch.as_tensor(space.low, dtype=torch.float64), torch.as_tensor(space.high, dtype=torch.float64)
        ),
        action_dtype=torch.float32,
        build=build,
        camera=getattr(bare.mujoco_renderer, "default_cam_config", None) or {},
    )
