"""Dynamics that tell more than y: numbers behind it that a cost or an end can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mbrl.models.propagation import Draw, Propagation


@dataclass(frozen=True)
class Lifted:
    """A propagation with `more` numbers behind y, in x and in y; an estimator is lifted by `mbrl.estimators.Padded`."""

    way: Propagation
    more: ClassVar[int] = 1

    @property
    def nx(self) -> int:
        return self.way.nx + self.more

    @property
    def ny(self) -> int:
        return self.way.ny + self.more

    @property
    def nu(self) -> int:
        return self.way.nu

    @property
    def dt(self) -> float:
        return self.way.dt

    def output(self, x: Tensor) -> Tensor:
        return x


class LiftedDraw:
    """What the draws of lifted dynamics have in common: all but the step."""

    def __init__(self, user: Lifted, draw: Draw):
        self.nx, self.nu, self.ny, self.dt = user.nx, user.nu, user.ny, user.dt
        self.draw = draw

    def output(self, x: Tensor) -> Tensor:
        return x
