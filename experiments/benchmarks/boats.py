"""A boat in currents that have to be learned: small worlds in which only uncertainty tells good plans from bad ones.

The state is the position (2,), the action the thrust, at most 1 long. The boat is carried by a current that depends
on where it is, so a model is a map of the currents and a picture shows what it knows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mbrl.problem import Box

THRUST = Box(-torch.ones(2), torch.ones(2))
Drive = tuple[Tensor, Tensor, Tensor]
"""Positions, actions and next positions, (T, 2) each."""


def ripples(p: Tensor, wave: float, phase: float) -> Tensor:
    """Currents of at most 1 in either direction, everywhere: what makes a model worth learning."""
    x, y = p[..., 0], p[..., 1]
    return torch.stack([torch.sin(wave * (y + 0.5 * x)), torch.sin(wave * (x - 0.3 * y) + phase)], -1)


def distance(p: Tensor, q: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    far: Tensor = torch.linalg.vector_norm(p - torch.tensor(q), dim=-1)
    return far


def inwards(p: Tensor) -> Tensor:
    """The direction to the origin."""
    return -p / distance(p).unsqueeze(-1).clamp(min=1e-9)


@dataclass(frozen=True)
class Boat(ABC):
    """Dynamics without the current; `noise` is the deviation of the random drift of a real step."""

    noise: float = 0.01
    dt: float = 0.2
    nx: int = 2
    nu: int = 2
    ny: int = 2

    @abstractmethod
    def current(self, p: Tensor) -> Tensor:
        """(..., 2) velocity at p (..., 2)."""

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        thrust = u / distance(u).unsqueeze(-1).clamp(min=1.0)
        return x + self.dt * (thrust + self.current(x))

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Strait(Boat):
    """The trap: a reef with a gap, and in the gap a whirlpool. The way around the reef is longer and safe.

    Start in the west, goal in the east. `data` drives around the reef only.
    """

    start: tuple[float, float] = (-1.2, 0.0)
    goal: tuple[float, float] = (1.2, 0.0)
    reach: float = 0.25
    """Radius from which the whirlpool lets nothing go."""

    def current(self, p: Tensor) -> Tensor:
        r = distance(p).unsqueeze(-1)
        swallow = 2.5 * torch.sigmoid((0.33 - r) / 0.03) * (r / self.reach).clamp(max=1.0)
        return 0.4 * ripples(p, 5.0, 5.3) + swallow * inwards(p)

    def reef(self, p: Tensor) -> Tensor:
        x, y = p[..., 0].abs(), p[..., 1]
        return (x < 0.35) & (((y > 0.15) & (y < 0.55)) | (y < -0.15))

    def trapped(self, p: Tensor) -> Tensor:
        return distance(p) < self.reach

    def arrived(self, p: Tensor) -> Tensor:
        return distance(p, self.goal) < 0.2

    def data(self, *, drives: int = 24, steps: int = 30, generator: Generator) -> Drive:
        """Drives in both directions along half ellipses around the reef, with noise on the thrust."""
        back = torch.arange(drives) % 2 == 1
        size = (0.87 + 0.28 * torch.rand(drives, generator=generator)).unsqueeze(-1)
        half = torch.tensor([1.2, 0.87])  # half axes
        x = torch.stack([torch.where(back, 1.2, -1.2) * size[:, 0], torch.zeros(drives)], -1)
        x = x + 0.05 * torch.randn(drives, 2, generator=generator)
        parts = []
        for _ in range(steps):
            angle = torch.atan2(x[:, 1] / half[1], x[:, 0] / half[0])
            angle = (angle + math.pi / 2) % (2 * math.pi) - math.pi / 2  # cut in the south
            angle = (angle + torch.where(back, 0.35, -0.35)).clamp(-0.1, math.pi + 0.1)
            aim = half * size * torch.stack([angle.cos(), angle.sin()], -1)
            u = (3 * (aim - x) + 0.5 * torch.randn(drives, 2, generator=generator)).clamp(-1, 1)
            x_next = self.step(x, u, 0) + self.noise * torch.randn(drives, 2, generator=generator)
            parts.append((x, u, x_next))
            x = x_next
        xs, us, nexts = zip(*parts, strict=True)
        return torch.cat(xs), torch.cat(us), torch.cat(nexts)


@dataclass(frozen=True)
class StraitCost:
    """Distance to the goal, 6 on the reef."""

    world: Strait

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return distance(y_next, self.world.goal) + 6.0 * self.world.reef(y_next)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros(y.shape[:-1])


@dataclass(frozen=True)
class Lagoon(Boat):
    """The sparse goal: a bay that holds what drifts, and a small island out at sea that nobody has seen."""

    goal: tuple[float, float] = (1.5, 0.0)
    noise: float = 0.02

    def current(self, p: Tensor) -> Tensor:
        r = distance(p).unsqueeze(-1)
        sea = torch.sigmoid((r - 0.5) / 0.1)
        edge = 1.5 * torch.sigmoid((r - 2.0) / 0.1)
        return sea * 0.5 * ripples(p, 4.0, 0.0) + ((1 - sea) * 0.6 * r + edge) * inwards(p)

    def arrived(self, p: Tensor) -> Tensor:
        return distance(p, self.goal) < 0.25


@dataclass(frozen=True)
class LagoonCost:
    """Reward 1 on the island and nothing elsewhere; fuel 0.4 |u|²."""

    world: Lagoon

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return 0.4 * (u * u).sum(-1).clamp(max=1.0) - self.world.arrived(y_next).to(y_next)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros(y.shape[:-1])


def drive(
    world: Boat,
    x: Tensor,
    policy: Callable[[Tensor], Tensor],
    steps: int,
    over: Callable[[Tensor], Tensor],
    *,
    generator: Generator,
) -> Drive:
    """Sail from x (1, 2) for `steps`, or until `over(position)`."""
    parts = []
    for k in range(steps):
        u = policy(x).to(x)
        x_next = world.step(x, u, k) + world.noise * torch.randn(1, 2, generator=generator)
        parts.append((x, u, x_next))
        x = x_next
        if over(x).any():
            break
    xs, us, nexts = zip(*parts, strict=True)
    return torch.cat(xs), torch.cat(us), torch.cat(nexts)
