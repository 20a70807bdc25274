"""Disagreement of an ensemble as a number that a plan can pay for, seek, or stop at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.models.lifted import Lifted, LiftedDraw
from mbrl.models.propagation import Draw
from mbrl.protocols import Cost, Dynamics


@dataclass(frozen=True)
class WithDisagreement(Lifted):
    """Dynamics with one number more in x and y: how much the members disagreed on the step just taken.

    It is the standard deviation of the members' mean answers, each in standard deviations of the
    training targets, root-mean-squared over the answers. See `DisagreementCost`; an estimator of y
    is lifted by `mbrl.estimators.Padded`.

    Attributes:
        way: the propagation.
        limit: where the disagreement is above, the step leads to NaN: a rollout that leaves the data
            costs +inf. For a penalty instead, let the problem terminate there, at a termination cost.
    """

    limit: float = math.inf

    def __post_init__(self) -> None:
        if len(self.way.model.elites) < 2:
            raise ContractError("WithDisagreement needs an ensemble of at least 2 members, but got 1.")
        if not self.limit > 0:
            raise ContractError(f"WithDisagreement needs a limit above 0, but got {self.limit}.")

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        return _Disagreeing(self, self.way.realize(shape, horizon, generator=generator))


class _Disagreeing(LiftedDraw):
    """A draw that also tells the disagreement."""

    def __init__(self, user: WithDisagreement, draw: Draw):
        super().__init__(user, draw)
        self._model, self._limit = user.way.model, user.limit
        self._unit = self._model.target_unit[: self._model.np]

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        y = x[..., :-1]
        y_next = self.draw.step(y, u, k)
        rows = y_next.shape[:-1]
        model = self._model
        y, u = (v.expand(*rows, -1).reshape(-1, v.shape[-1]) for v in (y, u))
        said = model.predict(y, u).change / self._unit
        d = said.var(0, correction=0).mean(-1).sqrt().reshape(*rows, 1).to(y_next)
        return torch.cat([y_next, d], -1).masked_fill(d > self._limit, torch.nan)


@dataclass(frozen=True)
class DisagreementCost:
    """Another cost plus `weight` times the disagreement of each step; a weight below 0 is a bonus to explore.

    Reference: Pathak et al. 2019, "Self-supervised exploration via disagreement" (the bonus);
        Yu et al. 2020 (MOPO), eq. 7 (the penalty).
    """

    cost: Cost
    weight: float

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return self.cost.stage(y[..., :-1], u, y_next[..., :-1], k, p) + self.weight * y_next[..., -1]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return self.cost.terminal(y[..., :-1], p)
