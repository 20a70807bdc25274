"""CMA-ES: evolution strategy that learns the covariance of good plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from mbrl.planners.noise import white_noise
from mbrl.planners.sampling import SamplingPlanner, SamplingState, check_range
from mbrl.planners.spline import Order


@dataclass(frozen=True)
class CMAESState(SamplingState):
    """The mean is the `solution`; n = K · nu parameters.

    Attributes:
        sigma: (M,), step size.
        C: (M, n, n) covariance, or (M, n) its diagonal in the separable variant.
        p_sigma, p_c: (M, n), evolution paths.
        generation: (M,), updates since the start.
    """

    sigma: Tensor
    C: Tensor
    p_sigma: Tensor
    p_c: Tensor
    generation: Tensor


class Constants(NamedTuple):
    """Strategy constants of n parameters and λ candidates, in the names of the reference."""

    weights: list[float]  # of the μ best, positive, summing to 1
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    chi_n: float

    @staticmethod
    def of(n: int, population: int, separable: bool) -> Constants:
        mu = population // 2
        raw = [math.log((population + 1) / 2) - math.log(i) for i in range(1, mu + 1)]
        weights = [w / sum(raw) for w in raw]
        mu_eff = 1.0 / sum(w**2 for w in weights)
        c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
        c_mu = min(1 - c_1, 2 * (0.25 + mu_eff - 2 + 1 / mu_eff) / ((n + 2) ** 2 + mu_eff))
        if separable:
            c_1, c_mu = c_1 * (n + 2) / 3, min(1 - c_1 * (n + 2) / 3, c_mu * (n + 2) / 3)
        return Constants(
            weights=weights,
            mu_eff=mu_eff,
            c_sigma=c_sigma,
            d_sigma=1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma,
            c_c=(4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n),
            c_1=c_1,
            c_mu=c_mu,
            chi_n=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2)),
        )


@dataclass(frozen=True, kw_only=True)
class CMAES(SamplingPlanner[CMAESState]):
    """(μ/μ_w, λ)-CMA-ES over the knots, for many problems at once; separable above `full_below` parameters.

    z ~ m + σ N(0, C); m, C and σ follow the ranking of the candidates through two evolution paths.
    Candidates outside the bounds are projected, and the projections enter the update.

    Attributes:
        std: initial σ, as a share of half the action range. A new control step starts from the moved
            mean with this σ, unit covariance and empty paths.
        full_below: number of parameters up to which the covariance is a full matrix.

    Reference: Hansen 2016, "The CMA evolution strategy: a tutorial" (revision of 2023), figure 6 with positive weights;
        Ros & Hansen 2008 for the separable variant.
    """

    population: int = 20
    iterations: int = 5
    knot_spacing: int = 2
    spline: Order = "linear"
    std: float = 0.4
    full_below: int = 100

    def __post_init__(self) -> None:
        SamplingPlanner.__post_init__(self)
        check_range(self, 1e-6, 1e3, "std")

    def start(self, solution: Tensor, phase: Tensor) -> CMAESState:
        M, K, nu = solution.shape
        n = K * nu
        zeros = solution.new_zeros(M, n)
        C = solution.new_ones(M, n) if n > self.full_below else torch.eye(n).to(solution).expand(M, n, n)
        generation = torch.zeros(M, dtype=torch.long, device=solution.device)
        return CMAESState(solution, phase, solution.new_full((M,), self.std), C, zeros, zeros, generation)

    def propose(self, state: CMAESState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        noise = white_noise((M, self.population, K * nu), state.solution, generator=generator)
        if state.C.ndim == 3:
            values, vectors = torch.linalg.eigh(state.C)
            root = vectors * values.clamp(min=1e-20).sqrt()[:, None, :]  # B D
            steps: Tensor = noise @ root.mT
        else:
            steps = noise * state.C.sqrt()[:, None]
        steps = (state.sigma[:, None, None] * steps).reshape(M, self.population, K, nu)
        return state.solution[:, None] + steps

    def update(self, state: CMAESState, knots: Tensor, cost: Tensor) -> tuple[CMAESState, Tensor]:
        M, B, K, nu = knots.shape
        n = K * nu
        full = state.C.ndim == 3
        c = Constants.of(n, B, separable=not full)
        w = torch.tensor(c.weights).to(knots)
        low, order = cost.topk(len(w), dim=-1, largest=False)
        found = torch.isfinite(low).all(-1)
        mean = state.solution.reshape(M, n)
        z = knots.reshape(M, B, n)[torch.arange(M, device=knots.device)[:, None], order]
        y = (z - mean[:, None]) / state.sigma[:, None, None]  # (M, μ, n)
        y_w = (w[:, None] * y).sum(1)

        if full:
            values, vectors = torch.linalg.eigh(state.C)
            inverse_root = (vectors / values.clamp(min=1e-20).sqrt()[:, None, :]) @ vectors.mT
            whitened = (inverse_root @ y_w[..., None])[..., 0]
        else:
            whitened = y_w / state.C.sqrt()
        p_sigma = (1 - c.c_sigma) * state.p_sigma + math.sqrt(
            c.c_sigma * (2 - c.c_sigma) * c.mu_eff
        ) * whitened
        norm = p_sigma.norm(dim=-1)
        generation = state.generation + 1
        bias = (1 - (1 - c.c_sigma) ** (2 * generation.to(norm))).sqrt()
        h_sigma = (norm / bias < (1.4 + 2 / (n + 1)) * c.chi_n).to(norm)[:, None]
        p_c = (1 - c.c_c) * state.p_c + h_sigma * math.sqrt(c.c_c * (2 - c.c_c) * c.mu_eff) * y_w
        stall = (1 - h_sigma) * c.c_c * (2 - c.c_c)  # keeps the variance where the path is held back
        if full:
            rank_one = p_c[:, :, None] * p_c[:, None, :] + stall[..., None] * state.C
            rank_mu = torch.einsum("i,mij,mik->mjk", w, y, y)
        else:
            rank_one = p_c**2 + stall * state.C
            rank_mu = (w[:, None] * y**2).sum(1)
        C = (1 - c.c_1 - c.c_mu) * state.C + c.c_1 * rank_one + c.c_mu * rank_mu
        sigma = state.sigma * torch.exp((c.c_sigma / c.d_sigma) * (norm / c.chi_n - 1))

        def accept(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(found.reshape(M, *[1] * (new.ndim - 1)), new, old)

        weights = torch.zeros_like(cost).scatter_(-1, order, w.expand(M, -1)) * found[:, None]
        return (
            replace(
                state,
                solution=accept((mean + state.sigma[:, None] * y_w).reshape(M, K, nu), state.solution),
                sigma=accept(sigma.clamp(1e-8, 1e4), state.sigma),
                C=accept(C, state.C),
                p_sigma=accept(p_sigma, state.p_sigma),
                p_c=accept(p_c, state.p_c),
                generation=accept(generation, state.generation),
            ),
            weights,
        )

    def advance(self, state: CMAESState, move: Callable[[Tensor], Tensor]) -> CMAESState:
        return self.start(move(state.solution), state.phase)
