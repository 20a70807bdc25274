"""A linear model by ridge regression: exact where the world is linear, and the first thing to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from mbrl.derivatives import Euclidean, flat_rows
from mbrl.errors import ContractError
from mbrl.features import Features
from mbrl.models.ensemble import divisor, mean_and_scale
from mbrl.models.propagation import one_step
from mbrl.models.training import check_data
from mbrl.protocols import Dynamics


class LinearModel(Euclidean, nn.Module):
    """t = W z + ε of normalised inputs z (what `Features` sees of y, and u) and targets t.

    Over N transitions the closed-form W minimises Σ ‖t − W z‖² + ridge ‖W‖². It is deterministic dynamics;
    `LinearGaussian` adds the noise. All numbers are float64.

    Args:
        ny, nu: sizes; the state of a learned model is y.
        dt: seconds per step.
        features: what the model sees and predicts.
        ridge: ≥ 0, as strong as that many transitions of normalised inputs without effect; 0 takes, of all
            best W, the smallest.

    Reference: Hoerl & Kennard 1970, "Ridge regression"; Hastie et al. 2009, eqs. 3.47 and 3.50.
    """

    weights: Tensor
    """(nf + nu, np), Wᵀ."""
    std: Tensor
    """(np,), the standard deviation of ε in units of the targets."""
    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, ny: int, nu: int, dt: float, *, features: Features | None = None, ridge: float = 1e-3):
        super().__init__()
        self.features = features = features or Features(ny)
        if min(ny, nu) < 1 or not dt > 0 or not ridge >= 0 or features.ny != ny:
            raise ContractError(
                f"A LinearModel needs ny and nu ≥ 1, dt > 0 s, ridge ≥ 0 and features for ny, but got {ny}, {nu}, "
                f"{dt}, {ridge} and features for {features.ny}."
            )
        self.nx = self.ny = ny
        self.nu, self.dt, self.ridge = nu, float(dt), ridge
        self.np = len(features.predicted)
        nz = features.inputs(torch.zeros(ny)).shape[-1] + nu
        for name, value in {
            "weights": torch.zeros(nz, self.np),
            "std": torch.zeros(self.np),
            "input_mean": torch.zeros(nz),
            "input_scale": torch.ones(nz),
            "target_mean": torch.zeros(self.np),
            "target_scale": torch.ones(self.np),
        }.items():
            self.register_buffer(name, value.double())

    @torch.no_grad()
    def fit(self, y: Tensor, u: Tensor, y_next: Tensor) -> None:
        """Fit to N transitions; y, y_next: (N, ny), u: (N, nu).

        Raises:
            ContractError: too few transitions, wrong shapes, or NaN or inf in the data.
        """
        check_data(self, y, u, y_next)
        eps = torch.finfo(y.dtype).eps
        # In float64 from the start: differences of float32 numbers would lose what small steps change.
        y, u, y_next = (v.to(self.weights) for v in (y, u, y_next))
        z = torch.cat([self.features.inputs(y), u], -1)
        t = self.features.targets(y, y_next)
        self.input_mean, input_scale = mean_and_scale(z, eps)
        self.target_mean, target_scale = mean_and_scale(t, eps)
        self.input_scale, self.target_scale = divisor(input_scale), divisor(target_scale)
        z = (z - self.input_mean) / self.input_scale
        t = (t - self.target_mean) / self.target_scale

        U, s, Vh = torch.linalg.svd(z, full_matrices=False)
        kept = s > s.max() * max(z.shape) * torch.finfo(s.dtype).eps
        gain = torch.where(kept, s / (s**2 + self.ridge), 0.0)
        self.weights = Vh.T @ (gain[:, None] * (U.T @ t))
        # Each direction in the data costs a share of a degree of freedom, the mean costs one.
        freedom = max(len(z) - 1 - float((gain * s).sum()), 1.0)
        residual = t - z @ self.weights
        self.std = (residual.pow(2).sum(0) / freedom).sqrt() * self.target_scale

    def answer(self, y: Tensor, u: Tensor) -> Tensor:
        """The mean targets (B, np) of y (B, ny) and u (B, nu), in units of y."""
        z = torch.cat([self.features.inputs(y), u.to(y)], -1).to(self.weights)
        t = (z - self.input_mean) / self.input_scale @ self.weights
        return t * self.target_scale + self.target_mean

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        y, u, rows = flat_rows(x, u)
        return self.features.advance(y, self.answer(y, u).to(y)).reshape(*rows, -1)

    def output(self, x: Tensor) -> Tensor:
        return x

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        y, u, rows = flat_rows(x, u)
        J = (self.weights / self.input_scale[:, None] * self.target_scale).T
        fx, fu = self.features.linearize(y, self.answer(y, u)[None], J.expand(1, len(y), -1, -1))
        return fx.reshape(*rows, self.ny, self.ny), fu.reshape(*rows, self.ny, self.nu)


@dataclass(frozen=True)
class LinearGaussian:
    """A linear model with its noise: independent normal numbers of each step, drawn before the rollout."""

    model: LinearModel

    @property
    def nx(self) -> int:
        return self.model.nx

    @property
    def nu(self) -> int:
        return self.model.nu

    @property
    def ny(self) -> int:
        return self.model.ny

    @property
    def dt(self) -> float:
        return self.model.dt

    def output(self, x: Tensor) -> Tensor:
        return x

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        noise = torch.randn((horizon, *shape, self.model.np), generator=generator, device=generator.device)
        return _Draw(self.model, noise.to(self.model.std) * self.model.std)


class _Draw:
    """A linear model with noise (H, *shape, np) that is known."""

    def __init__(self, model: LinearModel, noise: Tensor):
        self.nx, self.nu, self.ny, self.dt = model.nx, model.nu, model.ny, model.dt
        self._model, self._noise = model, noise

    def output(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        noise = self._noise[one_step(k)]
        rows = torch.broadcast_shapes(x.shape[:-1], u.shape[:-1], noise.shape[:-1])  # type: ignore[no-untyped-call]
        y, u, _ = flat_rows(x.expand(*rows, -1), u)
        t = self._model.answer(y, u) + noise.expand(*rows, -1).reshape(len(y), -1)
        return self._model.features.advance(y, t.to(y)).reshape(*rows, -1)
