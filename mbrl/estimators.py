"""Estimators: from what the world shows to the state that the planner starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mbrl.errors import ContractError
from mbrl.protocols import Estimator


class FullState:
    """Reads the full simulator state that a wrapper put into `info["state"]`, (nx,) or (M, nx)."""

    def reset(self, mask: Tensor | None = None) -> None:
        pass

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        if info is None or "state" not in info:
            keys = "no info" if info is None else f"info with the keys {sorted(info)}"
            raise ContractError(
                f'FullState needs info["state"], but got {keys}. Make the environment with World.make(), '
                "which adds it."
            )
        return _rows(torch.as_tensor(info["state"], dtype=torch.float64))


class Observed:
    """The observation is the state: for models whose state is the observation itself."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype

    def reset(self, mask: Tensor | None = None) -> None:
        pass

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        return _rows(torch.as_tensor(obs, dtype=self.dtype))


class Measured:
    """y is the state, read by `measure(obs, info)` of a world: for learned models, whose state is y.

    Args:
        measure: (obs, info) -> y (M, ny).
        dtype: what a network computes in.
    """

    def __init__(self, measure: Callable[[Any, Any], Tensor], dtype: torch.dtype = torch.float32):
        self.measure, self.dtype = measure, dtype

    def reset(self, mask: Tensor | None = None) -> None:
        pass

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        return self.measure(obs, info).to(self.dtype)


class Padded:
    """Another estimator's state with n zeros behind: for dynamics that hold more than the world shows."""

    def __init__(self, estimator: Estimator, n: int = 1):
        self.estimator, self.n = estimator, n

    def reset(self, mask: Tensor | None = None) -> None:
        self.estimator.reset(mask)

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        return torch.nn.functional.pad(self.estimator(obs, info, last_action), (0, self.n))

    def completed(self, x: Tensor, expected: Tensor) -> Tensor:
        """x with the numbers of `expected` in place of the zeros."""
        measured = x.shape[-1] - self.n
        return torch.cat([x[..., :measured], expected[..., measured:]], -1)


class WithLastAction:
    """Another estimator's state with the last action behind: for `WithPreviousAction`.

    Args:
        first: (nu,), what counts as the last action where there was none yet, as at the start of an episode.
    """

    def __init__(self, estimator: Estimator, first: Tensor):
        if first.ndim != 1:
            raise ContractError(f"WithLastAction needs first (nu,), but got {tuple(first.shape)}.")
        self.estimator, self.first = estimator, first
        self._fresh: Tensor | None = None

    def reset(self, mask: Tensor | None = None) -> None:
        self.estimator.reset(mask)
        self._fresh = mask if mask is None or self._fresh is None else self._fresh | mask

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        x = self.estimator(obs, info, last_action)
        first = self.first.to(x).expand(len(x), -1)
        last = first if last_action is None else last_action.to(x)
        if self._fresh is not None:
            last = torch.where(self._fresh[:, None], first, last)
        self._fresh = None
        return torch.cat([x, last], -1)


def _rows(x: Tensor) -> Tensor:
    """x (M, n) of (n,) or (M, n)."""
    return x[None] if x.ndim == 1 else x
