"""Pushes that no model foresees: at random times, or on demand."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np


class Pushes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Three sideways pushes per episode: sudden changes of the whole body's velocity that no model foresees.

    They come about 2, 5 and 8 s after the start, from left or right within `spread` of sideways; the seed of
    `reset` decides.

    Attributes:
        speed: of the change, m/s.
        spread: rad.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, speed: float, spread: float):
        super().__init__(env)
        self.speed, self.spread = speed, spread
        self._schedule: dict[int, np.ndarray] = {}
        self._step = 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**options)
        rng, dt = self.unwrapped.np_random, self.unwrapped.dt  # type: ignore[attr-defined]
        self._schedule, self._step = {}, 0
        for start in (2.0, 5.0, 8.0):
            angle = rng.choice((-1, 1)) * math.pi / 2 + rng.uniform(-self.spread, self.spread)
            step = round((start + rng.uniform(-0.5, 0.5)) / dt)
            self._schedule[step] = self.speed * np.array([math.cos(angle), math.sin(angle)])
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._step in self._schedule:
            self.unwrapped.data.qvel[:2] += self._schedule[self._step]  # type: ignore[attr-defined]
        self._step += 1
        return self.env.step(action)


class Pushable(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Pushes on demand: a force at a body's centre of mass, for some control steps.

    MuJoCo counts applied forces to the state of a simulation. This one is taken off after each step, before the state
    is read, so that a planner that starts from the state does not know of it.

    Attributes:
        body: that is pushed.
        force: (3,), N, in the world's axes.
        left: control steps that the push still lasts.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], body: int):
        super().__init__(env)
        self.body, self.force, self.left = body, np.zeros(3), 0

    def push(self, force: np.ndarray, steps: int) -> None:
        """Push by `force` (3,), in N, in the next `steps` control steps, instead of what push there is."""
        self.force, self.left = force, steps

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self.left = 0
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if not self.left:
            return self.env.step(action)
        self.left -= 1
        applied = self.unwrapped.data.xfrc_applied[self.body, :3]  # type: ignore[attr-defined]
        before = applied.copy()
        applied += self.force
        try:
            return self.env.step(action)
        finally:
            applied[:] = before
