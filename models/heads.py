"""Planning by what the networks have learned of reward and end, where no task is known as code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.models.lifted import Lifted, LiftedDraw
from mbrl.models.propagation import Propagation
from mbrl.problem import Box, Problem
from mbrl.protocols import Dynamics


@dataclass(frozen=True)
class WithHeads(Lifted):
    """Dynamics with two numbers more in x and y: the reward of the step just taken, and the probability of its end.

    Both are what the particle's own network says, so that their uncertainty is the ensemble's. An estimator of y
    is lifted by `mbrl.estimators.Padded(estimator, 2)`. A termination head that was not learned says 0.

    Raises:
        ContractError: the ensemble does not learn the reward.
    """

    more: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.way.model.learns_reward:
            raise ContractError(
                "WithHeads needs an ensemble that learns the reward, but this one does not: Ensemble(…, reward=True)."
            )

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        return _Headed(self, self.way.realize(shape, horizon, generator=generator))


class _Headed(LiftedDraw):
    """A draw that also tells reward and end."""

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        y_next, reward, end = self.draw.step_and_heads(x[..., :-2], u, k)
        nothing = torch.zeros_like(y_next[..., 0])
        heads = torch.stack([nothing if head is None else head for head in (reward, end)], -1)
        return torch.cat([y_next, heads], -1)


@dataclass(frozen=True)
class HeadsCost:
    """The cost of `WithHeads`: minus the reward that was predicted."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return -y_next[..., -2]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros_like(y[..., 0])


def from_heads(
    way: Propagation, actions: Box, horizon: int, **options: Any
) -> Problem[WithHeads, HeadsCost, Box]:
    """A problem that maximises the learned reward; a rollout counts as long as it has probably not ended.

    Args:
        options: as for `Problem`.

    Raises:
        ContractError: the ensemble does not learn the reward.
    """
    ended = _end if way.model.learns_termination else None
    return Problem(WithHeads(way), HeadsCost(), actions, horizon, terminated=ended, **options)


def _end(y_next: Tensor) -> Tensor:
    return y_next[..., -1]
