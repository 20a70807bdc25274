"""Sideways pushes that no model foresees."""

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
