"""Problems with known answers, and all planners once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl import Box, Problem
from mbrl.planners import CEM, CMAES, ICEM, MPPI, PredictiveSampling, RandomShooting, SamplingPlanner
from mbrl.planners.lqr import finite_lqr

PLANNERS: list[SamplingPlanner[Any]] = [
    CEM(),
    CMAES(),
    ICEM(),
    MPPI(),
    PredictiveSampling(),
    RandomShooting(),
]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def name(value: object) -> str:
    return type(value).__name__


@dataclass(frozen=True)
class DoubleIntegrator:
    """A point pushed along a line: x = (p, v), u = (a,). Tests break it in many ways; its fields check nothing."""

    nx: int = 2
    nu: int = 1
    ny: int = 2
    dt: float = 0.2

    @property
    def A(self) -> Tensor:
        return torch.tensor([[1.0, self.dt], [0.0, 1.0]], dtype=torch.float64)

    @property
    def B(self) -> Tensor:
        return torch.tensor([[self.dt**2 / 2], [self.dt]], dtype=torch.float64)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        p, v, a = x[..., 0], x[..., 1], u[..., 0]
        return torch.stack([p + self.dt * v + self.dt**2 / 2 * a, v + self.dt * a], -1)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Quadratic:
    """ℓ = yᵀ Q y + uᵀ R u, terminal yᵀ Q_f y, all diagonal, about `goal`."""

    Q: tuple[float, ...] = (1.0, 0.1)
    R: tuple[float, ...] = (0.1,)
    Qf: tuple[float, ...] = (5.0, 1.0)
    goal: tuple[float, ...] = ()

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        y = y - torch.tensor(self.goal).to(y) if self.goal else y
        return (y**2 @ torch.tensor(self.Q).to(y)) + (u**2 @ torch.tensor(self.R).to(u))

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        y = y - torch.tensor(self.goal).to(y) if self.goal else y
        value: Tensor = y**2 @ torch.tensor(self.Qf).to(y)
        return value


def box(nu: int, limit: float) -> Box:
    limits = torch.full((nu,), limit, dtype=torch.float64)
    return Box(-limits, limits)


def lq_problem(
    horizon: int = 6, limit: float = 10.0, **options: Any
) -> Problem[DoubleIntegrator, Quadratic, Box]:
    return Problem(DoubleIntegrator(), Quadratic(), box(1, limit), horizon, **options)


def riccati(problem: Problem[DoubleIntegrator, Quadratic, Box], x0: Tensor) -> tuple[Tensor, Tensor]:
    """The optimal cost (M,) and actions (M, H, nu) from x0 (M, nx), without bounds."""
    Q, R, final = (
        2 * torch.diag(torch.tensor(d, dtype=torch.float64))
        for d in (problem.cost.Q, problem.cost.R, problem.cost.Qf)
    )
    plant, H = problem.dynamics, problem.horizon
    regulator = finite_lqr(plant.A, plant.B, Q, R, horizon=H, final=final)
    x, actions = x0, []
    for t in range(H):
        actions.append(regulator.act(x, t))
        x = plant.step(x, actions[-1], t)
    return regulator.value(x0, 0), torch.stack(actions, 1)


@dataclass(frozen=True)
class Noisy:
    """A double integrator under a random constant wind that differs by particle: `Stochastic`."""

    wind: float = 0.5
    nominal: DoubleIntegrator = field(default_factory=DoubleIntegrator)
    nx: int = 2
    nu: int = 1
    ny: int = 2
    dt: float = 0.2

    def output(self, x: Tensor) -> Tensor:
        return x

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Windy:
        return Windy(
            self.wind * torch.randn(*shape, 1, generator=generator, dtype=torch.float64), self.nominal
        )


@dataclass(frozen=True)
class Windy:
    """A draw of `Noisy`. wind: (..., 1)."""

    wind: Tensor
    nominal: DoubleIntegrator
    nx: int = 2
    nu: int = 1
    ny: int = 2
    dt: float = 0.2

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return self.nominal.step(x, u + self.wind, k)

    def output(self, x: Tensor) -> Tensor:
        return x
