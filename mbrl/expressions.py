"""Dynamics as CasADi expressions: what nonlinear MPC asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import casadi
import numpy as np
import numpy.typing as npt
from torch import Tensor

from mbrl.protocols import Dynamics


@dataclass(frozen=True, eq=False)
class Expression:
    """Dynamics as CasADi functions of columns. Models of one structure share one object, and what is built upon it.

    Attributes:
        step: (x, u, k, θ) -> x_next. θ holds what may change without a new expression: weights, masses.
        output: (x) -> y.
        ode: (x, u, θ) -> ẋ (nc,) of the first nc numbers of the state, where they follow an ODE; the others, if
            any, change from step to step only.
        quadrature: (rate(y, u, p), size of p) -> a function (x, u, k, θ[, p]) -> ∫ rate dt over a step, by the
            model's own integration, or None where it has none.
        batch: (x (n, nx), u (n, nu), θ, λ (n, nx), order=) -> x_next (n, nx), J (n, nx, nx+nu), H (n, nx+nu, nx+nu), of
            n places at once in numpy; J and H are None below that order.
    """

    step: casadi.Function
    output: casadi.Function
    ode: casadi.Function | None = None
    quadrature: Callable[[Callable[..., Tensor], int], casadi.Function] | None = None
    batch: Callable[..., tuple[npt.NDArray[np.float64], Any, Any]] | None = None

    @property
    def nx(self) -> int:
        return int(self.step.numel_in(0))

    @property
    def nu(self) -> int:
        return int(self.step.numel_in(1))

    @property
    def ntheta(self) -> int:
        """The size of θ."""
        return int(self.step.numel_in(3))

    @property
    def scalar(self) -> bool:
        """Whether it is made of scalar operations: small, and fast to evaluate as such."""
        return bool(self.step.is_a("SXFunction"))


@runtime_checkable
class Expressible(Dynamics, Protocol):
    """Dynamics that are a CasADi expression as well, with the values of its parameters."""

    @property
    def expression(self) -> Expression:
        """One and the same object for all models of one structure."""
        ...

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        """θ (nθ,), the values that this model has now."""
        ...
