"""Dynamics written in torch as CasADi expressions, for whole horizons without torch and for nonlinear MPC."""

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

from mbrl.derivatives import Autodiff
from mbrl.errors import ContractError
from mbrl.expressions import Expression
from mbrl.tracing import trace


@dataclass(frozen=True)
class Symbolic(Autodiff):
    """Dynamics written in torch, traced into CasADi: whole horizons are rolled out and differentiated without torch.

    For systems of a few dozen numbers, whose torch loops are all overhead; for networks keep `Autodiff`. The cost
    of a problem is traced as well. What is traced is kept as it is, so models that learn are refused. Dynamics with
    parameters `p` (np,) and a method `at(p)`, such as `Discretized`, keep them apart as θ.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        holder = getattr(self.dynamics, "model", None)
        if isinstance(self.dynamics, torch.nn.Module) or isinstance(holder, torch.nn.Module):
            raise ContractError(
                f"Symbolic needs dynamics that stay as they are, but {type(self.dynamics).__name__} has weights, which "
                "a fit would change behind its back. It has derivatives of its own: leave it unwrapped."
            )

    @property
    def expression(self) -> Expression:
        return _expression(*self._structure())

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        p = getattr(self.dynamics, "p", None)
        return np.empty(0) if p is None else p.detach().double().cpu().numpy()

    def _structure(self) -> tuple[Any, int]:
        """The dynamics without their θ, and its size."""
        p = getattr(self.dynamics, "p", None)
        if p is None:
            return self.dynamics, 0
        dynamics: Any = self.dynamics
        if p.ndim != 1:
            raise ContractError(
                f"As an expression, dynamics have one set of parameters p (np,), but got {tuple(p.shape)}."
            )
        return dynamics.at(None), len(p)


@functools.lru_cache(maxsize=64)
def _expression(dynamics: Any, ntheta: int) -> Expression:
    name, nx, nu = type(dynamics).__name__, dynamics.nx, dynamics.nu

    def model(theta: Tensor) -> Any:
        return dynamics.at(theta) if ntheta else dynamics

    step = trace(name, lambda x, u, k, theta: model(theta).step(x, u, k), (nx,), (nu,), (), (ntheta,))
    output = trace(name, dynamics.output, (nx,))
    ode, quadrature = None, None
    if hasattr(dynamics, "ode"):
        ode = trace(name, lambda x, u, theta: model(theta).ode(x, u), (nx,), (nu,), (ntheta,))
    if hasattr(dynamics, "with_integral"):

        def quadrature(rate: Callable[..., Tensor], params: int) -> casadi.Function:
            def integral(x: Tensor, u: Tensor, k: Tensor, theta: Tensor, *p: Tensor) -> Tensor:
                augmented = model(theta).with_integral(lambda y, u: rate(y, u, p[0] if p else None))
                reached: Tensor = augmented.step(torch.cat([x, torch.zeros_like(x[..., :1])], -1), u, k)
                return reached[..., -1]

            given = ((params,),) if params else ()
            return trace("rate", integral, (nx,), (nu,), (), (ntheta,), *given)

    return Expression(step, output, ode, quadrature)
