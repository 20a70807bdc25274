"""Any MJCF robot as a world: a model, a task, and how an episode starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.mujoco import read_state
from mbrl.envs.world import World
from mbrl.errors import ContractError
from mbrl.problem import Box
from mbrl.protocols import Task

Reset = Callable[[mujoco.MjModel, mujoco.MjData, np.random.Generator], None]
"""Writes the first state of an episode into a fresh MjData; `mj_forward` follows."""


class MjcfEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """The Gymnasium environment of a model and a task: what a robot does in the real world.

    The observation is the task's `observe(y)`, or y where it has none.
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
    ):
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
        reward = float(self.task.reward(y, u, y_next))
        return self._observe(y_next).numpy(), reward, bool(self.task.terminated(y_next)), False, {}

    def _y(self) -> Tensor:
        return torch.from_numpy(read_state(self.model, self.data, self.layout)[-self.layout.size :])

    def _observe(self, y: Tensor) -> Tensor:
        observe = getattr(self.task, "observe", None)
        return y if observe is None else observe(y)


def load_mjcf(source: str | Path | mujoco.MjSpec) -> mujoco.MjModel:
    """The compiled model of an MJCF file, an MJCF string or an MjSpec.

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
        raise ContractError(f"MuJoCo cannot load the model{where}: {error}") from error


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
        actions: bounds of the controls; the actuators' ctrlrange unless given.
        reset: how an episode starts; from keyframe 0, or the default pose, unless given.
        max_steps: control steps after which an episode is truncated.
        camera: attributes of mujoco.MjvCamera for pictures, e.g. {"distance": 3.0}.

    Raises:
        ContractError: the MJCF has an error, an actuator has no control range, or the task is broken.
        UnknownName: a field or object does not exist.
    """
    if not isinstance(model, mujoco.MjModel):
        model = load_mjcf(model)
    layout = Layout(model, fields)
    if not hasattr(task, "reward"):
        task = task(model, layout)  # type: ignore[operator, call-arg]
    if actions is None:
        free = [
            model.actuator(i).name or str(i) for i in range(model.nu) if not model.actuator_ctrllimited[i]
        ]
        if free:
            raise ContractError(
                f"{name} needs bounded controls, but actuator {', '.join(free)} has no ctrlrange. "
                "Add one in the MJCF, or give actions=Box(low, high)."
            )
        low, high = torch.as_tensor(model.actuator_ctrlrange.T.copy())
        # What a float32 environment can hold, on the inner side of the bounds.
        actions = Box(low.float().double(), high.float().double())

    def build(**render: Any) -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = MjcfEnv(
            model, layout, task, frame_skip=frame_skip, actions=actions, reset=reset
        )
        return env if max_steps is None else gymnasium.wrappers.TimeLimit(env, max_steps)

    return World(
        name=name,
        model=model,
        layout=layout,
        task=task,
        frame_skip=frame_skip,
        actions=actions,
        action_dtype=torch.float32,
        build=build,
        camera=dict(camera or {}),
    )
