"""Any MJCF robot as a world: a model, a task, and how an episode starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.mujoco import diverged, read_state
from mbrl.envs.world import World
from mbrl.errors import ContractError
from mbrl.problem import Box
from mbrl.protocols import Task
from mbrl.task_checks import check_finite, check_value

Reset = Callable[[mujoco.MjModel, mujoco.MjData, np.random.Generator], None]
"""Writes the first state of an episode into a fresh MjData; `mj_forward` follows."""


class MjcfEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The Gymnasium environment of a model and a task: what a robot does in the real world.

    The observation is the task's `observe(y)`, or y where it has none. A step raises `ContractError` where the
    task returns no scalar tensors, or a reward or an end that is not finite though y is.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        layout: Layout,
        task: Task,
        *,
        frame_skip: int,
        actions: Box,
        reset: Reset | None = None,
        name: str = "this environment",
    ):
        self.name, self._step = name, 0
        self.model, self.data = model, mujoco.MjData(model)
        self.layout, self.task, self.frame_skip, self._reset = layout, task, frame_skip, reset
        self.action_space = gymnasium.spaces.Box(
            actions.low.float().numpy(), actions.high.float().numpy(), dtype=np.float32
        )
        mujoco.mj_forward(model, self.data)
        size = self._observe(self._y()).shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, size, dtype=np.float64)

    @property
    def dt(self) -> float:
        return float(self.model.opt.timestep * self.frame_skip)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        if self.model.nkey:
            mujoco.mj_resetDataKeyframe(self.model, self.data, 0)
        else:
            mujoco.mj_resetData(self.model, self.data)
        if self._reset is not None:
            self._reset(self.model, self.data, self.np_random)
        mujoco.mj_forward(self.model, self.data)
        return self._observe(self._y()).numpy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        y = self._y()
        action = np.asarray(action, dtype=self.action_space.dtype)  # as World.action_dtype promises planners
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)
        mujoco.mj_rnePostConstraint(self.model, self.data)
        y_next, u = self._y(), torch.as_tensor(action, dtype=torch.float64)
        reward, end = self.task.reward(y, u, y_next), self.task.terminated(y_next)
        user = f"The task {type(self.task).__name__} of {self.name}"
        check_value(user, "reward", reward, ())
        check_value(user, "terminated", end, ())
        if torch.isfinite(y_next).all() and not diverged(self.data):
            moment = f"in step {self._step} after the action {u.tolist()}"
            check_finite(user, "reward", reward, moment)
            check_finite(user, "end", end, moment)
        self._step += 1
        return self._observe(y_next).numpy(), float(reward), bool(end), False, {}

    def _y(self) -> Tensor:
        return torch.from_numpy(read_state(self.model, self.data, self.layout)[-self.layout.size :])

    def _observe(self, y: Tensor) -> Tensor:
        observe = getattr(self.task, "observe", None)
        return y if observe is None else observe(y)


def load_mjcf(source: str | Path | mujoco.MjSpec, *, name: str = "") -> mujoco.MjModel:
    """The compiled model of an MJCF file, an MJCF string or an MjSpec; `name` is told in errors.

    Raises:
        ContractError: the file is missing or MuJoCo refuses it; holds MuJoCo's element and line.
    """
    try:
        if isinstance(source, mujoco.MjSpec):
            return source.compile()
        if isinstance(source, str) and source.lstrip().startswith("<"):
            return mujoco.MjModel.from_xml_string(source)
        return mujoco.MjModel.from_xml_path(str(source))
    except ValueError as error:
        where = f" in {source}" if not isinstance(source, mujoco.MjSpec) and "<" not in str(source) else ""
        whose = f" of {name}" if name else ""
        raise ContractError(f"MuJoCo cannot load the model{whose}{where}: {error}") from error


def mjcf_world(
    name: str,
    model: mujoco.MjModel | mujoco.MjSpec | str | Path,
    task: Task | Callable[[mujoco.MjModel, Layout], Task],
    fields: Sequence[str] = ("qpos", "qvel"),
    *,
    frame_skip: int = 1,
    actions: Box | None = None,
    reset: Reset | None = None,
    max_steps: int | None = None,
    camera: Mapping[str, Any] | None = None,
) -> World:
    """A robot of your own as a world.

    Args:
        name: as shown in reports.
        model: an MJCF file or string, an MjSpec or a compiled model.
        task: a `Task`, or a function (model, layout) -> Task for tasks that look fields up by name.
        fields: what y holds, see `Layout`.
        frame_skip: physics steps per control step.
        actions: bounds of the controls; the actuators' ctrlrange unless given. They are rounded inwards to
            what a float32 environment can hold.
        reset: how an episode starts; from keyframe 0, or the default pose, unless given.
        max_steps: control steps after which an episode is truncated.
        camera: attributes of mujoco.MjvCamera for pictures, e.g. {"distance": 3.0}.

    Raises:
        ContractError: the MJCF has an error, no actuator or one without a control range, `frame_skip` is
            below 1, or the task lacks a method.
        UnknownName: a field or object does not exist.
    """
    plant = model if isinstance(model, mujoco.MjModel) else load_mjcf(model, name=name)
    if frame_skip < 1:
        raise ContractError(f"{name} needs frame_skip ≥ 1, but got {frame_skip}.")
    if plant.nu == 0:
        raise ContractError(f"{name} needs controls, but its model has no actuators. Add one in the MJCF.")
    layout = Layout(plant, fields)
    # A class has the methods of its instances, so it would pass for a Task.
    ready = isinstance(task, Task) and not isinstance(task, type)
    if isinstance(task, type) and not inspect.signature(task).parameters:
        raise ContractError(
            f"The task of {name} needs to be an object, or made from (model, layout), but the class {task.__name__} "
            f"takes nothing. Give {task.__name__}()."
        )
    made: Any = task if ready or not callable(task) else task(plant, layout)
    lacking = [method for method in ("reward", "terminated") if not hasattr(made, method)]
    if lacking:
        raise ContractError(
            f"The task of {name} needs reward(y, u, y_next) and terminated(y_next), "
            f"but {type(made).__name__} lacks {' and '.join(lacking)}."
        )
    if actions is None:
        free = [
            plant.actuator(i).name or str(i) for i in range(plant.nu) if not plant.actuator_ctrllimited[i]
        ]
        if free:
            raise ContractError(
                f"{name} needs bounded controls, but actuator {', '.join(free)} has no ctrlrange. "
                "Add one in the MJCF, or give actions=Box(low, high)."
            )
        actions = Box(*torch.as_tensor(plant.actuator_ctrlrange.T.copy()))
    elif actions.nu != plant.nu:
        raise ContractError(f"{name} needs actions of size {plant.nu}, but got a Box of size {actions.nu}.")
    actions = _inward(actions)

    def build(model: mujoco.MjModel) -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = MjcfEnv(
            model, layout.on(model), made, frame_skip=frame_skip, actions=actions, reset=reset, name=name
        )
        return env if max_steps is None else gymnasium.wrappers.TimeLimit(env, max_steps)

    return World(
        name=name,
        model=plant,
        layout=layout,
        task=made,
        frame_skip=frame_skip,
        actions=actions,
        action_dtype=torch.float32,
        build=build,
        camera=dict(camera or {}),
    )


def _inward(actions: Box) -> Box:
    """The widest float32 bounds inside these; where nothing lies between them, the nearest number below."""
    low, high = actions.low.double().numpy(), actions.high.double().numpy()
    with np.errstate(over="ignore"):
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    high32 = np.where(high32 > high, np.nextafter(high32, np.float32(-np.inf)), high32)
    low32 = np.where(low32 < low, np.nextafter(low32, np.float32(np.inf)), low32)
    low32 = np.minimum(low32, high32)
    return Box(torch.from_numpy(low32).double(), torch.from_numpy(high32).double())
