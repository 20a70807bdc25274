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
from torch.func import jacfwd, jacrev, vmap

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
        # Reverse over forward: torch lacks the forward derivative of SiLU's slope.
        return self._along(jacrev(jacfwd(self._moved)), x, u, k)

    def curvature_output(self, x: Tensor) -> Tensor:
        """Second derivatives of the output by x, (..., ny, ndx, ndx)."""
        return self._at(jacrev(jacfwd(self._seen)), x)

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
        every: along a trajectory, differentiate at every n-th step and at the last one only, and interpolate fx, fu
            and G linearly in between. States are then (..., H, nx), with time before the last axis, and k is (H,).

    Raises:
        ContractError: ε or `every` is too small; or, with `every` above 1, there is no axis of time.

    Reference: MuJoCo 4.0 documentation, mjd_transitionFD, whose ε = 1e-6 this is; unlike it, any integrator and a
        whole control step of several physics steps. `every` is derivative_skip + 1 of MuJoCo MPC.
    """

    actions: Box | None = None
    eps: float = 1e-6
    every: int = 1

    def __post_init__(self) -> None:
        _Wrapped.__post_init__(self)
        if not (self.eps > 0 and self.every >= 1):
            raise ContractError(
                f"FiniteDifference needs eps > 0 and every ≥ 1, but got {self.eps} and {self.every}."
            )

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        if self.every == 1:
            return self._linearized(x, u, k)
        rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1])
        if not rows or not isinstance(k, Tensor) or k.shape[-1:] != rows[-1:]:
            steps = tuple(k.shape) if isinstance(k, Tensor) else k
            raise ContractError(
                "FiniteDifference with every > 1 needs a trajectory, x (..., H, nx), u (..., H, nu) and k (H,), but got "
                f"x {tuple(x.shape)}, u {tuple(u.shape)} and k {steps}. For single states take every=1."
            )
        keys = self._keys(rows[-1])
        x, u = x.expand(*rows, -1)[..., keys, :], u.expand(*rows, -1)[..., keys, :]
        fx, fu = self._linearized(x, u, k[..., keys])
        return _between(fx, keys), _between(fu, keys)

    def linearize_output(self, x: Tensor) -> Tensor:
        if self.every == 1:
            return self._linearized_output(x)
        if x.ndim < 2:
            raise ContractError(
                f"FiniteDifference with every > 1 needs a trajectory, x (..., H, nx), but got {tuple(x.shape)}. "
                "For single states take every=1."
            )
        keys = self._keys(x.shape[-2])
        return _between(self._linearized_output(x[..., keys, :]), keys)

    def _keys(self, steps: int) -> Tensor:
        """The steps to differentiate at: every n-th, and the last."""
        keys = torch.arange(0, steps, self.every)
        return keys if steps == 0 or keys[-1] == steps - 1 else torch.cat([keys, torch.tensor([steps - 1])])

    def _linearized(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
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

    def _linearized_output(self, x: Tensor) -> Tensor:
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


def _between(values: Tensor, keys: Tensor) -> Tensor:
    """Matrices (..., n, a, b) at the steps `keys` (n,), and linearly interpolated at those in between."""
    if len(keys) < 2:
        return values
    steps = torch.arange(int(keys[-1]) + 1)
    right = torch.searchsorted(keys, steps).clamp(min=1)
    share = (steps - keys[right - 1]) / (keys[right] - keys[right - 1])
    return torch.lerp(values[..., right - 1, :, :], values[..., right, :, :], share.to(values)[:, None, None])


def flat_rows(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x and u broadcast and in one row of rows, and the leading shape they had."""
    rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1])  # torch takes 0.1 ms
    y, u = (v.expand(*rows, -1).reshape(-1, v.shape[-1]) for v in (x, u))
    return y, u, rows
