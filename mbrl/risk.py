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
