"""Policies that need no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.problem import Box


class RandomPolicy:
    """Uniform actions within finite bounds.

    Raises:
        ContractError: a bound is infinite.
    """

    def __init__(self, actions: Box, *, generator: Generator):
        if not actions.bounded:
            raise ContractError("RandomPolicy needs finite action bounds. Give finite ones: Box(low, high).")
        self.actions, self.generator = actions, generator

    def reset(self, mask: Tensor | None = None) -> None:
        pass

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        low, high = self.actions.low, self.actions.high
        M = 1 if obs.ndim == 1 else len(obs)  # one observation by itself, as MPC takes it
        share = torch.rand((M, self.actions.nu), generator=self.generator, dtype=low.dtype)
        return low + share * (high - low)
