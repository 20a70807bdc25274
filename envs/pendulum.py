"""Gymnasium's Pendulum-v1, a world without MuJoCo: to learn and train in, not to plan on directly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import torch
from torch import Tensor

from mbrl.estimators import Observed
from mbrl.features import Features
from mbrl.problem import Box


@dataclass(frozen=True)
class SwingUp:
    """Swing the pendulum up and hold it; never ends.

    reward = −θ² − 0.1 θ̇² − 0.001 u², of θ in [−π, π] before the step.   y = (cos θ, sin θ, θ̇)
    """

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        cos, sin, speed = y.unbind(-1)
        return -(torch.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * u[..., 0] ** 2)

    def terminated(self, y_next: Tensor) -> Tensor:
        return torch.zeros(y_next.shape[:-1], dtype=torch.bool, device=y_next.device)


@dataclass(frozen=True)
class Pendulum:
    """Gymnasium's Pendulum-v1 as a `TrainingWorld`: y is the observation."""

    name: str = "Pendulum-v1"
    task: SwingUp = field(default_factory=SwingUp)
    features: Features = field(default_factory=lambda: Features(3, unit=((0, 1),)))

    @property
    def actions(self) -> Box:
        """Torque (1,), Nm."""
        bound = torch.tensor([2.0], dtype=torch.float64)
        return Box(-bound, bound)

    def make(self, **options: Any) -> gymnasium.Env[Any, Any]:
        return gymnasium.make(self.name, **options)

    def measure(self, obs: Any, info: Mapping[str, Any]) -> Tensor:
        """y (M, 3) of what `reset` or `step` of one environment, or of a vector of M, has returned."""
        return Observed()(obs, info, None)

    def observe(self, y: Tensor) -> Tensor:
        return y
