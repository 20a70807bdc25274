"""Dynamics that remember the last action, so that costs and constraints can limit its rate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from mbrl.errors import ContractError
from mbrl.expressions import Expression
from mbrl.protocols import Dynamics

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class WithPreviousAction:
    """Dynamics with the action of the step before behind x and behind y: u − y[..., −nu:] is its change.

    What the dynamics have besides, this has too: derivatives, a tangent space, parameters `p`, an ODE (of the first
    numbers of the state only), and an expression. Where they lack one, so does this. `Symbolic` goes around it,
    Symbolic(WithPreviousAction(dynamics)), so that integral costs are integrated with the dynamics. The estimator of
    a closed loop is lifted by `mbrl.estimators.WithLastAction`.

    Attributes:
        dynamics: deterministic. Of `Scenarios` wrap each member.

    Raises:
        ContractError: the dynamics must be drawn first.
    """

    dynamics: Dynamics

    def __post_init__(self) -> None:
        if not hasattr(self.dynamics, "step"):
            raise ContractError(
                f"WithPreviousAction needs dynamics with step, but {type(self.dynamics).__name__} must be drawn first. "
                "Wrap what is drawn from: of Scenarios each member, of an ensemble its mean, MeanDynamics(ensemble)."
            )

    @property
    def nx(self) -> int:
        return self.dynamics.nx + self.nu

    @property
    def ndx(self) -> int:
        return int(getattr(self.dynamics, "ndx", self.dynamics.nx)) + self.nu

    @property
    def nu(self) -> int:
        return self.dynamics.nu

    @property
    def ny(self) -> int:
        return self.dynamics.ny + self.nu

    @property
    def dt(self) -> float:
        return self.dynamics.dt

    @property
    def p(self) -> Tensor | None:
        p: Tensor | None = getattr(self.dynamics, "p", None)
        return p

    def at(self, p: Tensor | None) -> WithPreviousAction:
        """The same with other parameters."""
        dynamics: Any = self.dynamics
        return WithPreviousAction(dynamics.at(p))

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        reached = self.dynamics.step(self._own(x), u, k)
        return torch.cat(
            [reached, u + 0 * reached[..., :1]], -1
        )  # 0 · NaN: a row that is lost is lost as a whole

    def output(self, x: Tensor) -> Tensor:
        return torch.cat([self.dynamics.output(self._own(x)), self._last(x)], -1)

    def refreshed(self, x: Tensor) -> Tensor:
        """x with the output's derived fields as they are at x, where the dynamics keep such."""
        own: Callable[[Tensor], Tensor] = getattr(self.dynamics, "refreshed", lambda x: x)
        return torch.cat([own(self._own(x)), self._last(x)], -1)

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        own: Callable[[Tensor, Tensor], Tensor] = getattr(self.dynamics, "retract", torch.add)
        return torch.cat([own(self._own(x), self._own(dx)), self._last(x) + self._last(dx)], -1)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        own: Callable[[Tensor, Tensor], Tensor] = getattr(self.dynamics, "difference", lambda x, y: y - x)
        return torch.cat([own(self._own(x), self._own(y)), self._last(y) - self._last(x)], -1)

    # What follows is there only if the dynamics have it: hasattr() of it says so.

    @property
    def linearize(self) -> Callable[[Tensor, Tensor, int | Tensor], tuple[Tensor, Tensor]]:
        own, nu = self.dynamics.linearize, self.nu  # type: ignore[attr-defined]

        def linearize(x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
            fx, fu = own(self._own(x), u, k)
            last = torch.eye(nu).to(fu).expand(*fu.shape[:-2], nu, nu)
            return pad(fx, (0, nu, 0, nu)), torch.cat([fu, last], -2)

        return linearize

    @property
    def linearize_output(self) -> Callable[[Tensor], Tensor]:
        own, nu = self.dynamics.linearize_output, self.nu  # type: ignore[attr-defined]

        def linearize_output(x: Tensor) -> Tensor:
            G = own(self._own(x))
            last = torch.eye(nu).to(G).expand(*G.shape[:-2], nu, nu)
            return torch.cat([pad(G, (0, nu)), pad(last, (G.shape[-1], 0))], -2)

        return linearize_output

    @property
    def curvature(self) -> Callable[[Tensor, Tensor, int | Tensor], Tensor]:
        """Second derivatives of the next state by (x, u) jointly, (..., ndx, n, n) with n = ndx + nu."""
        own, nu = self.dynamics.curvature, self.nu  # type: ignore[attr-defined]

        def curvature(x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
            C = own(self._own(x), u, k)
            ndx = C.shape[-3]
            for axis in (-1, -2):
                C = torch.cat([C.narrow(axis, 0, ndx), _zeros(C, axis, nu), C.narrow(axis, ndx, nu)], axis)
            return torch.cat([C, _zeros(C, -3, nu)], -3)

        return curvature

    @property
    def curvature_output(self) -> Callable[[Tensor], Tensor]:
        """Second derivatives of the output by x, (..., ny, ndx, ndx)."""
        own, nu = self.dynamics.curvature_output, self.nu  # type: ignore[attr-defined]
        return lambda x: pad(own(self._own(x)), (0, nu) * 3)

    @property
    def ode(self) -> Callable[[Tensor, Tensor], Tensor]:
        """ẋ of the first numbers of the state, those of the dynamics."""
        own: Callable[[Tensor, Tensor], Tensor] = self.dynamics.ode  # type: ignore[attr-defined]
        return lambda x, u: own(self._own(x), u)

    @property
    def with_integral(self) -> Callable[[Callable[[Tensor, Tensor], Tensor]], _WithIntegral]:
        """The same with one more state, the integral of rate(y, u), integrated with the dynamics; of it, `step` only."""
        self.dynamics.with_integral  # type: ignore[attr-defined]  # noqa: B018
        return lambda rate: _WithIntegral(self, rate)

    @property
    def expression(self) -> Expression:
        return _expression(self.dynamics.expression)  # type: ignore[attr-defined]

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        theta: npt.NDArray[np.float64] = self.dynamics.theta  # type: ignore[attr-defined]
        return theta

    def _own(self, x: Tensor) -> Tensor:
        return x[..., : -self.nu]

    def _last(self, x: Tensor) -> Tensor:
        return x[..., -self.nu :]


@dataclass(frozen=True)
class _WithIntegral:
    """`WithPreviousAction` whose last state is the integral of a rate."""

    user: WithPreviousAction
    rate: Callable[[Tensor, Tensor], Tensor]

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        nu, dynamics = self.user.nu, self.user.dynamics
        own, last, integral = x[..., : -nu - 1], x[..., -nu - 1 : -1], x[..., -1:]

        def rate(y: Tensor, u: Tensor) -> Tensor:
            return self.rate(torch.cat([y, last.expand(*y.shape[:-1], nu)], -1), u)

        reached = dynamics.with_integral(rate).step(torch.cat([own, integral], -1), u, k)  # type: ignore[attr-defined]
        kept = u.expand(*reached.shape[:-1], nu)
        return torch.cat([reached[..., :-1], kept, reached[..., -1:]], -1)


def _zeros(C: Tensor, axis: int, n: int) -> Tensor:
    """n entries of zeros along an axis of C."""
    shape = list(C.shape)
    shape[axis] = n
    return C.new_zeros(shape)


@functools.lru_cache(maxsize=64)
def _expression(own: Expression) -> Expression:
    nx, nu = own.nx, own.nu
    sym: Any = casadi.SX.sym if own.scalar else casadi.MX.sym
    state, u, k, theta = sym("x", nx + nu), sym("u", nu), sym("k"), sym("theta", own.ntheta)
    x, last = state[:nx], state[nx:]
    step = casadi.Function("step", [state, u, k, theta], [casadi.vertcat(own.step(x, u, k, theta), u)])
    output = casadi.Function("output", [state], [casadi.vertcat(own.output(x), last)])
    ode = None
    if own.ode is not None:
        ode = casadi.Function("ode", [state, u, theta], [own.ode(x, u, theta)])
    batch = None if own.batch is None else functools.partial(_batch, own)
    return Expression(step, output, ode, batch=batch)


def _batch(
    own: Expression, x: Array, u: Array, theta: Array, multipliers: Array | None = None, *, order: int = 0
) -> tuple[Array, Array | None, Array | None]:
    """`Expression.batch` with the last action behind x."""
    assert own.batch is not None
    nx, nu = own.nx, own.nu
    lam = None if multipliers is None else multipliers[:, :nx]
    reached, J, H = own.batch(x[:, :nx], u, theta, lam, order=order)
    here, wide, bent = [*range(nx), *range(nx + nu, nx + 2 * nu)], None, None
    if J is not None:
        wide = np.zeros((len(x), nx + nu, nx + 2 * nu))
        wide[:, :nx, here] = J
        wide[:, nx:, nx + nu :] = np.eye(nu)
    if H is not None:
        bent = np.zeros((len(x), nx + 2 * nu, nx + 2 * nu))
        bent[:, np.array(here)[:, None], here] = H
    return np.concatenate([reached, u], 1), wide, bent
