"""Derivatives of dynamics, for planners that need them: by automatic differentiation, or by finite differences.

A state may live on a manifold (quaternions); its derivatives live in the tangent space, of size ndx:
`retract(x, dx)` moves x by dx, `difference(x, y)` is the dx that leads from x to y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from mbrl.errors import ContractError
from mbrl.problem import Box
from mbrl.protocols import Dynamics


class Euclidean:
    """The tangent space of a state that is a vector of numbers, and its own output."""

    @property
    def ndx(self) -> int:
        return int(self.nx)  # type: ignore[attr-defined]

    def linearize_output(self, x: Tensor) -> Tensor:
        return torch.eye(x.shape[-1]).to(x).expand(*x.shape, -1)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        return y - x

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        return x + dx


@dataclass(frozen=True)
class _Wrapped:
    """Dynamics with something added; what they have is passed on.

    Attributes:
        dynamics: deterministic. Without `retract` and `difference` their state is a vector of numbers.
    """

    dynamics: Dynamics

    def __post_init__(self) -> None:
        if not hasattr(self.dynamics, "step"):
            raise ContractError(
                f"{type(self).__name__} needs dynamics with step, but {type(self.dynamics).__name__} must be drawn "
                "first. Plan on a mean (MeanDynamics), or on one draw: dynamics.realize((), horizon, generator=…)."
            )

    @property
    def nx(self) -> int:
        return self.dynamics.nx

    @property
    def ndx(self) -> int:
        return int(getattr(self.dynamics, "ndx", self.dynamics.nx))

    @property
    def nu(self) -> int:
        return self.dynamics.nu

    @property
    def ny(self) -> int:
        return self.dynamics.ny

    @property
    def dt(self) -> float:
        return self.dynamics.dt

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return self.dynamics.step(x, u, k)

    def output(self, x: Tensor) -> Tensor:
        return self.dynamics.output(x)

    def refreshed(self, x: Tensor) -> Tensor:
        """x with the output's derived fields as they are at x, where the dynamics keep such."""
        own: Callable[[Tensor], Tensor] | None = getattr(self.dynamics, "refreshed", None)
        return x if own is None else own(x)

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        own: Callable[[Tensor, Tensor], Tensor] | None = getattr(self.dynamics, "retract", None)
        return x + dx if own is None else own(x, dx)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        own: Callable[[Tensor, Tensor], Tensor] | None = getattr(self.dynamics, "difference", None)
        return y - x if own is None else own(x, y)


@dataclass(frozen=True)
class Autodiff(_Wrapped):
    """Dynamics written in torch, with first and second derivatives by automatic differentiation."""

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        F = self._along(jacfwd(self._moved), x, u, k)
        return F[..., : self.ndx], F[..., self.ndx :]

    def linearize_output(self, x: Tensor) -> Tensor:
        return self._at(jacfwd(self._seen), x)

    def curvature(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        """Second derivatives of the next state by (x, u) jointly, (..., ndx, n, n) with n = ndx + nu."""
        return self._along(jacfwd(jacfwd(self._moved)), x, u, k)

    def curvature_output(self, x: Tensor) -> Tensor:
        """Second derivatives of the output by x, (..., ny, ndx, ndx)."""
        return self._at(jacfwd(jacfwd(self._seen)), x)

    def _moved(self, d: Tensor, x: Tensor, u: Tensor, k: int | Tensor, x_next: Tensor) -> Tensor:
        """Where the next state goes, from x_next, if (x, u) moves by d (n,)."""
        return self.difference(x_next, self.step(self.retract(x, d[: self.ndx]), u + d[self.ndx :], k))

    def _seen(self, dx: Tensor, x: Tensor) -> Tensor:
        return self.output(self.retract(x, dx))

    def _along(self, derivative: Callable[..., Any], x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        x, u, rows = flat_rows(x, u)
        steps = isinstance(k, Tensor) and k.ndim > 0
        k = k.expand(rows).reshape(-1) if isinstance(k, Tensor) and steps else k
        d, x_next = x.new_zeros(self.ndx + self.nu), self.step(x, u, k)
        result: Tensor = vmap(derivative, (None, 0, 0, 0 if steps else None, 0))(d, x, u, k, x_next)
        return result.reshape(*rows, *result.shape[1:])

    def _at(self, derivative: Callable[..., Any], x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.nx)
        result: Tensor = vmap(derivative, (None, 0))(x.new_zeros(self.ndx), rows)
        return result.reshape(*x.shape[:-1], *result.shape[1:])


@dataclass(frozen=True)
class FiniteDifference(_Wrapped):
    """Any dynamics, with derivatives by centred differences in the tangent space, all in one call of `step`.

    Where an action is nearer to a bound than ε, the difference is taken on the inner side: beyond its range an
    actuator does nothing, and half of a centred difference would be lost. Simulators round actions as their
    environment does; `unrounded` dynamics, if they have them, are differentiated instead.

    Attributes:
        dynamics: deterministic.
        actions: bounds of the actions, or None.
        eps: ε, the step in units of the tangent space and of the actions.

    Reference: MuJoCo 4.0 documentation, mjd_transitionFD, whose ε = 1e-6 this is; unlike it, any integrator and a
        whole control step of several physics steps.
    """

    actions: Box | None = None
    eps: float = 1e-6

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        x, u, rows = flat_rows(x, u)
        if isinstance(k, Tensor) and k.ndim > 0:
            k = k.expand(rows).reshape(-1, 1)
        plant: Any = getattr(self.dynamics, "unrounded", self.dynamics)
        n, ndx, nu = len(x), self.ndx, self.nu
        states = torch.cat([self._moved(x), x[:, None].expand(n, 2 * nu, -1)], 1)
        high, low = self._actions(u)
        actions = torch.cat([u[:, None].expand(n, 2 * ndx, nu), high, low], 1)
        reached = plant.step(states, actions, k)
        centre = reached[:, :1]  # any state nearby will do to measure differences from
        d = self.difference(centre.expand_as(reached), reached)
        fx = (d[:, :ndx] - d[:, ndx : 2 * ndx]) / (2 * self.eps)
        span = (high - low).diagonal(dim1=1, dim2=2)  # (n, nu)
        fu = (d[:, 2 * ndx : 2 * ndx + nu] - d[:, 2 * ndx + nu :]) / span[..., None].clamp(min=1e-300)
        return fx.mT.reshape(*rows, ndx, ndx), fu.mT.reshape(*rows, ndx, nu)

    def linearize_output(self, x: Tensor) -> Tensor:
        rows, x = x.shape[:-1], x.reshape(-1, self.nx)
        y = self.output(self.refreshed(self._moved(x)))
        G = (y[:, : self.ndx] - y[:, self.ndx :]) / (2 * self.eps)
        return G.mT.reshape(*rows, self.ny, self.ndx)

    def _moved(self, x: Tensor) -> Tensor:
        """x (n, nx), moved by +ε and by −ε along each direction, (n, 2 ndx, nx)."""
        d = self.eps * torch.eye(self.ndx).to(x)
        d = torch.cat([d, -d])[None].expand(len(x), -1, -1)
        return self.retract(x[:, None].expand(-1, 2 * self.ndx, -1), d)

    def _actions(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u (n, nu), moved up and down in each action within the bounds, (n, nu, nu) each."""
        d = self.eps * torch.eye(self.nu).to(u)
        high, low = u[:, None] + d, u[:, None] - d
        return (high, low) if self.actions is None else (self.actions.clip(high), self.actions.clip(low))


def flat_rows(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x and u broadcast and in one row of rows, and the leading shape they had."""
    rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1])  # torch takes 0.1 ms
    y, u = (v.expand(*rows, -1).reshape(-1, v.shape[-1]) for v in (x, u))
    return y, u, rows
