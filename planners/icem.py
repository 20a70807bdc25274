"""iCEM: the cross-entropy method made sample-efficient by coloured noise and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.planners.noise import colored_noise
from mbrl.planners.sampling import SamplingPlanner, SamplingState, check_range, select_elites


@dataclass(frozen=True)
class ICEMState(SamplingState):
    """The best candidate is the `solution`.

    Attributes:
        mean, std: (M, K, nu), the Gaussian.
        kept: (M, n, K, nu), the elites carried into the next iteration or control step.
        valid: (M,), whether `kept` holds anything yet.
    """

    mean: Tensor
    std: Tensor
    kept: Tensor
    valid: Tensor


@dataclass(frozen=True, kw_only=True)
class ICEM(SamplingPlanner[ICEMState]):
    """CEM with coloured noise, kept and shifted elites, a shrinking population and the best candidate executed.

    Iteration i samples max(2·elites, N γ⁻ⁱ) candidates, all counted: among them the kept elites and,
    in the last iteration, the mean.

    Attributes:
        population: N, candidates of the first iteration.
        decay: γ.
        elites: how many of the best candidates the Gaussian is fitted to.
        keep: share of the elites that joins the next iteration and, shifted, the next control step.
        alpha: momentum on the old mean and deviation.
        std: initial deviation, as a share of half the action range; each control step starts with it.
        beta: exponent of the noise's power spectrum, f^-β; larger is slower.

    Reference: Pinneri et al. 2020, "Sample-efficient cross-entropy method for real-time planning",
        algorithm 1 and the authors' software.
    Differs: kept elites are simulated again within the population, where the authors reuse their
        costs and do not count them, so that a stochastic model cannot reward luck twice.
    """

    population: int = 40
    iterations: int = 3
    decay: float = 1.25
    elites: int = 6
    keep: float = 0.3
    alpha: float = 0.1
    std: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        SamplingPlanner.__post_init__(self)
        check_range(self, 1e-6, 1e3, "std")
        check_range(self, 0.0, 1.0, "alpha", "keep")
        check_range(self, 1.0, 1e3, "decay")
        check_range(self, 0.0, 10.0, "beta")
        if not 2 <= self.elites <= self.population // 2:
            raise ContractError(
                f"ICEM needs 2 ≤ elites ≤ population / 2, but got {self.elites} and {self.population}."
            )

    def start(self, solution: Tensor, phase: Tensor) -> ICEMState:
        M, K, nu = solution.shape
        return ICEMState(
            solution,
            phase,
            mean=solution,
            std=torch.full_like(solution, self.std),
            kept=solution[:, None].expand(M, int(self.keep * self.elites), K, nu),
            valid=torch.zeros(M, dtype=torch.bool, device=solution.device),
        )

    def candidates(self, i: int) -> int:
        """The population of iteration i."""
        return max(2 * self.elites, int(self.population * self.decay**-i))

    def propose(self, state: ICEMState, i: int, last: bool, *, generator: Generator) -> Tensor:
        M, K, nu = state.mean.shape
        noise = colored_noise((M, self.candidates(i), K, nu), self.beta, state.mean, generator=generator)
        z = state.mean[:, None] + state.std[:, None] * noise
        n = state.kept.shape[1]
        if n:
            kept = state.kept.clone()
            if i == 0:  # shifted from the last control step: their last knot is new
                kept[:, :, -1] = z[:, -n:, -1]
            z[:, -n:] = torch.where(state.valid[:, None, None, None], kept, z[:, -n:])
        if last:
            z[:, 0] = state.mean
        return z

    def update(self, state: ICEMState, knots: Tensor, cost: Tensor) -> tuple[ICEMState, Tensor]:
        chosen, weights, found = select_elites(knots, cost, self.elites)
        mean = self.alpha * state.mean + (1 - self.alpha) * chosen.mean(1)
        std = self.alpha * state.std + (1 - self.alpha) * chosen.std(1, correction=0)
        keep = ~found[:, None, None]
        n = state.kept.shape[1]
        return (
            replace(
                state,
                solution=torch.where(
                    torch.isfinite(cost.min(-1).values)[:, None, None], chosen[:, 0], state.solution
                ),
                mean=torch.where(keep, state.mean, mean),
                std=torch.where(keep, state.std, std),
                kept=torch.where(keep[:, None], state.kept, chosen[:, :n]),
                valid=state.valid | found,
            ),
            weights,
        )

    def advance(self, state: ICEMState, move: Callable[[Tensor], Tensor]) -> ICEMState:
        return replace(
            state,
            solution=move(state.solution),
            mean=move(state.mean),
            std=torch.full_like(state.std, self.std),
            kept=move(state.kept),
        )
