"""What a world has to keep to: limits on what it measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbrl.errors import ContractError


@dataclass(frozen=True)
class Within:
    """low ≤ y[index] ≤ high, as the `fun` of a `Constraint`: g = (y[index] − high, low − y[index]).

    Attributes:
        what: the number that is limited, with its unit, for plots.
    """

    index: int
    low: float
    high: float
    what: str = ""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ContractError(f"Within needs low < high, but got {self.low} and {self.high}.")

    def __call__(self, y: Tensor, u: Tensor | None, k: int | Tensor | None, p: Tensor | None) -> Tensor:
        value = y[..., self.index]
        return torch.stack([value - self.high, self.low - value], -1)
