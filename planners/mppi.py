"""Model predictive path integral control: the cost-weighted average of random perturbations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.planners.noise import colored_noise
from mbrl.planners.sampling import SamplingPlanner, SamplingState, check_range


@dataclass(frozen=True, kw_only=True)
class MPPI(SamplingPlanner[SamplingState]):
    """The nominal plan moved by the cost-weighted average of its random perturbations.

    U ← U + Σᵢ wᵢ εᵢ,   wᵢ ∝ exp(−Sᵢ/λ − c Uᵀ Σ⁻¹ εᵢ),   εᵢ after clipping to the bounds.

    Attributes:
        temperature: λ, in units of cost. None chooses λ for each plan such that the effective sample
            size 1/Σw² is `effective_share` of the population, so that it needs no tuning to the task.
        effective_share: target of the automatic temperature, in (0, 1).
        action_cost: c in [0, 1], the weight of the path-integral control cost (c = γ/λ of the
            reference). Leave it 0 if the task has an action cost of its own.
        std: of the perturbation, as a share of half the action range.
        beta: exponent of the noise's power spectrum along the knots; 0 is white.

    The nominal plan itself is candidate 0.

    Reference: Williams et al. 2017, "Information theoretic MPC", algorithm 2.
    Differs: automatic temperature; optional coloured noise (Vlahov et al. 2024).
    """

    temperature: float | None = None
    effective_share: float = 0.1
    action_cost: float = 0.0
    std: float = 0.4
    beta: float = 0.5

    def __post_init__(self) -> None:
        SamplingPlanner.__post_init__(self)
        check_range(self, 1e-6, 1e3, "std")
        check_range(self, 0.0, 1.0, "action_cost")
        check_range(self, 0.0, 10.0, "beta")
        if self.temperature is not None:
            check_range(self, 1e-12, 1e12, "temperature")
        if not 0 < self.effective_share < 1:
            raise ContractError(f"MPPI needs effective_share in (0, 1), but got {self.effective_share}.")

    def start(self, solution: Tensor, phase: Tensor) -> SamplingState:
        return SamplingState(solution, phase)

    def propose(self, state: SamplingState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.solution.shape
        noise = colored_noise((M, self.population, K, nu), self.beta, state.solution, generator=generator)
        noise[:, 0] = 0.0
        return state.solution[:, None] + self.std * noise

    def update(self, state: SamplingState, knots: Tensor, cost: Tensor) -> tuple[SamplingState, Tensor]:
        nominal = state.solution[:, None]
        penalty = self.action_cost * (nominal * (knots - nominal)).sum((-1, -2)) / self.std**2
        temperature = (
            auto_temperature(cost, self.effective_share)
            if self.temperature is None
            else torch.full_like(cost[:, 0], self.temperature)
        )
        weights = path_integral_weights(cost, temperature, penalty)
        solution = state.solution + (weights[..., None, None] * (knots - nominal)).sum(1)
        return replace(state, solution=solution), weights

    def advance(self, state: SamplingState, move: Callable[[Tensor], Tensor]) -> SamplingState:
        return replace(state, solution=move(state.solution))


def path_integral_weights(cost: Tensor, temperature: Tensor, penalty: Tensor | float = 0.0) -> Tensor:
    """w (M, B) ∝ exp(−cost/λ − penalty), rows summing to 1, or to 0 where no cost is finite.

    Args:
        cost: (M, B), +inf allowed.
        temperature: λ (M,).
        penalty: (M, B), dimensionless.
    """
    finite = torch.isfinite(cost)
    logits = torch.where(finite, -cost / temperature[:, None] - penalty, -torch.inf)
    logits = logits - logits.max(-1, keepdim=True).values.nan_to_num(neginf=0.0)
    weights = torch.where(finite, logits.exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)


def auto_temperature(cost: Tensor, share: float) -> Tensor:
    """λ (M,) at which the effective sample size of exp(−cost/λ) is `share` of the finite candidates, at least 1.

    The effective sample size grows with λ. Bisection on log λ between a hundredth of the smallest excess over
    the lowest cost, where only the lowest counts, and a million times the largest, where all count alike.
    """
    finite = torch.isfinite(cost)
    count = finite.sum(-1)
    lowest = torch.where(finite, cost, torch.inf).min(-1, keepdim=True).values
    excess = torch.where(finite, cost - lowest, 0.0)
    target = (share * count).clamp(min=1.0)
    largest = excess.amax(-1).clamp(max=torch.finfo(cost.dtype).max)
    largest = torch.where(largest > 0, largest, 1.0)
    smallest = torch.where(excess > 0, excess, largest[:, None]).amin(-1)
    low = smallest.clamp(min=1e3 * torch.finfo(cost.dtype).tiny).log10() - 2.0
    high = largest.log10() + 6.0
    for _ in range(40):
        middle = (low + high) / 2
        w = torch.where(finite, torch.exp(-excess / 10 ** middle[:, None]), 0.0)
        effective = w.sum(-1) ** 2 / (w**2).sum(-1).clamp(min=1e-30)
        low = torch.where(effective < target, middle, low)
        high = torch.where(effective < target, high, middle)
    return 10 ** ((low + high) / 2)
