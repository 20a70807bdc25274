"""How the returns of P particles become one number that a planner minimises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from mbrl.errors import ContractError


@runtime_checkable
class Risk(Protocol):
    def __call__(self, cost: Tensor) -> Tensor:
        """Cost (...) of particle costs (P, ...). A non-finite particle makes the result +inf."""
        ...


@dataclass(frozen=True)
class Mean:
    """The expected cost."""

    def __call__(self, cost: Tensor) -> Tensor:
        return cost.mean(0)


@dataclass(frozen=True)
class CVaR:
    """Conditional value at risk: the mean of the worst share `alpha` of the particles.

    At least one particle counts, so CVaR(0) is the worst case and CVaR(1) the mean.

    Reference: Rockafellar & Uryasev 2000, "Optimization of conditional value-at-risk".
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ContractError(f"CVaR needs alpha, a share in [0, 1], but got {self.alpha}.")

    def __call__(self, cost: Tensor) -> Tensor:
        # 0.07 · 100 is a little more than 7.
        n = max(1, math.ceil(self.alpha * cost.shape[0] - 1e-9))
        return cost.topk(n, dim=0).values.mean(0)


@dataclass(frozen=True)
class MeanStd:
    """Mean plus κ standard deviations of the cost: κ > 0 shuns uncertain outcomes, κ < 0 seeks them.

    In rewards this is mean − κ · std.
    """

    kappa: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.kappa):
            raise ContractError(f"MeanStd needs a finite kappa, but got {self.kappa}.")

    def __call__(self, cost: Tensor) -> Tensor:
        return cost.mean(0) + self.kappa * cost.std(0, correction=0)


@dataclass(frozen=True)
class Worst:
    """The highest cost of all particles."""

    def __call__(self, cost: Tensor) -> Tensor:
        return cost.amax(0)


@dataclass(frozen=True)
class Optimistic:
    """The mean of the best share `alpha` of the particles, at least one: hopes for what is not ruled out."""

    alpha: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ContractError(f"Optimistic needs alpha, a share in [0, 1], but got {self.alpha}.")

    def __call__(self, cost: Tensor) -> Tensor:
        return -CVaR(self.alpha)(-cost)
