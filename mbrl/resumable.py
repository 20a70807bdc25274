"""Environments that can be restored in mid-episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from mbrl.checkpoints import check_state


class Resumable(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Lets a deterministic environment be restored in mid-episode, in another process too.

    `snapshot` holds the random state that the episode was reset with and the actions since. Setting it resets
    the environment and replays them, which takes as long as it took then. It must be the outermost wrapper, so
    that time limits are replayed too. Exact where all randomness comes from the environment's `np_random`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]):
        super().__init__(env)
        self._start: dict[str, Any] | None = None
        self._actions: list[np.ndarray] = []
        self._obs: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        # A seed replaces the random state; without one the state decides, and is replayed from here.
        random = self.unwrapped.np_random.bit_generator.state if seed is None else None
        obs, info = self.env.reset(seed=seed, options=options)
        self._start, self._actions, self._obs = {"seed": seed, "random": random}, [], np.array(obs)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        action = np.array(action)
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._actions.append(action)
        self._obs = np.array(obs)
        return obs, reward, terminated, truncated, info

    @property
    def snapshot(self) -> dict[str, Any] | None:
        """{"start", "actions" (T, …), "obs"}, or None before the first reset."""
        if self._start is None:
            return None
        actions = np.array(self._actions, self.action_space.dtype).reshape(-1, *self.action_space.shape or ())
        return {"start": self._start, "actions": torch.as_tensor(actions), "obs": torch.as_tensor(self._obs)}

    @snapshot.setter
    def snapshot(self, snapshot: dict[str, Any]) -> None:
        check_state("Resumable", snapshot, {"start": dict, "actions": torch.Tensor, "obs": torch.Tensor})
        start = snapshot["start"]
        check_state("Resumable", start, {"seed": int | None, "random": dict | None})
        if start["random"] is not None:
            self.unwrapped.np_random.bit_generator.state = start["random"]
        self.reset(seed=start["seed"])
        for action in snapshot["actions"].numpy():
            self.step(action)


def vectorize(make: Callable[[], gymnasium.Env[Any, Any]], n: int) -> SyncVectorEnv:
    """n environments, e.g. of `world.make`, as a `Collector` wants them; resumable if they are deterministic."""
    return SyncVectorEnv([lambda: Resumable(make())] * n, autoreset_mode=AutoresetMode.SAME_STEP)
