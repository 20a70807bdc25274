"""Learned models for nonlinear MPC: proven to be the same function in CasADi as in torch."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import casadi
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mbrl.derivatives import Euclidean, flat_rows
from mbrl.errors import ContractError, UnsupportedProblem
from mbrl.expressions import Expression
from mbrl.models.bayesian import BayesianModel
from mbrl.models.casadi_export import casadi_expression, casadi_weights
from mbrl.models.ensemble import Ensemble
from mbrl.models.lifted import Lifted
from mbrl.models.linear import LinearGaussian, LinearModel
from mbrl.models.propagation import MeanDynamics, Propagation, Thompson
from mbrl.protocols import Dynamics
from mbrl.scenarios import Scenarios

POINTS = 5
"""At how many points equality is proven."""


@dataclass(frozen=True)
class Exported(Euclidean):
    """The mean of an ensemble, one member, or a linear model, in torch and as a CasADi expression.

    All models of one architecture share one expression, and θ is read anew each time: a solver that was built for one
    serves it after a further fit, and any other, without being built again.

    When it is made, and whenever `prove` is called, the expression is compared with torch: value, Jacobian and
    Hessian-vector product at five points drawn about the mean of the data, by their spread, and in units of it. Both
    sides compute in float64 from the model's weights as they are; the model itself keeps its dtype, in which `step`
    and `linearize` compute.

    Attributes:
        model: `MeanDynamics`, `Thompson` (its member, without noise) or `LinearModel`.
        tolerance: largest difference, as a share of the largest entry over all points.

    Raises:
        UnsupportedProblem: the model is none of these, or its network is not an `EnsembleMLP`; the message says what
            to wrap.
        ContractError: torch and CasADi differ by more than the tolerance, or are not finite.
    """

    model: MeanDynamics | Thompson | LinearModel
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if not isinstance(self.model, (MeanDynamics, Thompson, LinearModel)):
            raise UnsupportedProblem(
                f"Exported needs one function, MeanDynamics, Thompson or LinearModel, but got "
                f"{type(self.model).__name__}. {_remedy(self.model)}"
            )
        self.prove()

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

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return _deterministic(self.model).step(x, u, k)

    def output(self, x: Tensor) -> Tensor:
        return x

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        fx, fu = _deterministic(self.model).linearize(x, u, k)
        return fx, fu

    @property
    def expression(self) -> Expression:
        return casadi_expression(self.model)

    @property
    def theta(self) -> npt.NDArray[np.float64]:
        # Not kept: optimisers change weights without a trace in the tensors' versions.
        return casadi_weights(self.model)

    def prove(self) -> None:
        """Raise `ContractError` unless the expression is what torch computes; see the class."""
        for what, share, where in self._gaps():
            if not share <= self.tolerance:
                raise ContractError(
                    f"The expression of {type(self.model).__name__} is not its torch network: the {what} is off by "
                    f"{share:.3g} of the largest entry, beyond the tolerance of {self.tolerance:g}, {where}. Either the "
                    "weights are not finite, or a subclass changes what the network says, which an export cannot know: "
                    "plan on it in torch."
                )

    def errors(self) -> dict[str, float]:
        """How far the expression is from torch as of now, each as a share of the largest entry over all points."""
        return {what: share for what, share, _ in self._gaps()}

    def _gaps(self) -> Iterator[tuple[str, float, str]]:
        """What is compared, how far it is off, inf if not finite, and where that is."""
        twin = copy.deepcopy(self.model)
        holder = twin if isinstance(twin, LinearModel) else twin.model
        holder.double().cpu()
        y, u, unit = _points(holder)
        ny, n = holder.ny, holder.ny + holder.nu
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        lam, v = draw(POINTS, ny) / unit[:ny], draw(POINTS, n) * unit
        step = _deterministic(twin).step
        torchs, casadis = [], []
        derivatives, theta = _derivatives(self.expression), self.theta
        for i in range(POINTS):
            s = torch.cat([y[i], u[i]])
            torchs.append(_reference(lambda s: step(s[:ny], s[ny:], 0), s, lam[i], v[i]))
            found = derivatives(y[i].numpy(), u[i].numpy(), theta, lam[i].numpy(), v[i].numpy())
            casadis.append([torch.from_numpy(np.array(part)) for part in found])
        assert self.expression.batch is not None
        batch = self.expression.batch(*(part.numpy() for part in (y, u)), theta, lam.numpy(), order=2)
        for i, (reached, J, H) in enumerate(zip(*batch, strict=True)):
            product = H @ v[i].numpy()
            casadis[i] += [torch.from_numpy(part) for part in (reached[:, None], J, product[:, None])]
        units = (1 / unit[:ny, None], unit / unit[:ny, None], unit[:, None])
        least = 0.0
        for i, what in enumerate(("value", "Jacobian", "Hessian-vector product")):
            said = torch.stack([parts[i] for parts in torchs]) * units[i]
            scale = max(float(said.abs().max()), least)
            for how, j in (("derived by CasADi", i), ("in closed form", i + 3)):
                found = torch.stack([parts[j] for parts in casadis]) * units[i]
                gap = (found - said).abs().nan_to_num(nan=torch.inf)
                at, row, column = map(int, np.unravel_index(int(gap.argmax()), gap.shape))
                where = (
                    f"{float(found[at, row, column]):.12g} instead of {float(said[at, row, column]):.12g} at entry "
                    f"({row}, {column}), in units of the data's spread, at y = {y[at].tolist()}, u = {u[at].tolist()}"
                )
                worst = float(gap.max())
                share = 0.0 if worst == 0 else worst / scale if scale > 0 else math.inf
                yield f"{what} {how}", share, where
            # A curvature far below the slope has fewer digits, in torch too: it is made of differences of larger numbers.
            least = 1e-4 * scale if what == "Jacobian" else 0.0


def scenarios(ensemble: Ensemble) -> Scenarios:
    """Each elite of an ensemble as a scenario, without its noise. Which they are is settled now: call again after a fit."""
    if not isinstance(ensemble, Ensemble):
        raise ContractError(
            f"scenarios needs an Ensemble, but got a {type(ensemble).__name__}. Of a BayesianModel take "
            "model.draw(n, generator=generator)."
        )
    return Scenarios(tuple(Exported(Thompson(ensemble, member=e)) for e in ensemble.elites.tolist()))


@dataclass(frozen=True)
class _Member(Euclidean):
    """One network of an ensemble, without its noise."""

    model: Ensemble
    member: int

    @property
    def nx(self) -> int:
        return self.model.nx

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        y, u, rows = flat_rows(x, u)
        return self.model.predict(y, u, self.member).y_next[0].reshape(*rows, -1)

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        y, u, rows = flat_rows(x, u)
        fx, fu = self.model.linearize(y, u, self.member)
        return fx[0].reshape(*rows, *fx.shape[2:]), fu[0].reshape(*rows, *fu.shape[2:])


def _deterministic(model: MeanDynamics | Thompson | LinearModel) -> MeanDynamics | LinearModel | _Member:
    return _Member(model.model, model.member) if isinstance(model, Thompson) else model


def _points(model: Ensemble | LinearModel) -> tuple[Tensor, Tensor, Tensor]:
    """y (n, ny) and u (n, nu) about the mean of the data, and the spread (ny + nu,) of (y, u); 1 where it is not known."""
    features, generator = model.features, torch.Generator().manual_seed(0)
    ny, nu, turns = model.ny, model.nu, sorted(features.angles)
    seen = [i for i in range(ny) if i not in features.angles + features.hidden]
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    z = model.input_mean + model.input_scale * draw(POINTS, len(model.input_mean))
    y, unit = draw(POINTS, ny), torch.ones(ny + nu, dtype=torch.float64)
    plain, sin, cos, u = torch.split(z, [len(seen), len(turns), len(turns), nu], -1)
    y[:, seen], y[:, turns] = plain, torch.atan2(sin, cos)
    unit[seen], unit[ny:] = model.input_scale[: len(seen)], model.input_scale[-nu:]
    return features.rescaled(y), u, unit


def _reference(fun: Any, s: Tensor, lam: Tensor, v: Tensor) -> list[Tensor]:
    """Value (ny, 1), Jacobian (ny, n) and Hessian-vector product (n, 1) of λᵀ fun at s (n,), by torch."""
    derive: Any = torch.autograd.functional
    _, product = derive.hvp(lambda s: lam @ fun(s), s, v)
    return [fun(s).detach()[:, None], derive.jacobian(fun, s), product[:, None]]


@functools.lru_cache(maxsize=64)
def _derivatives(expression: Expression) -> casadi.Function:
    """(x, u, θ, λ, v) -> value, Jacobian and Hessian-vector product of λᵀ x_next, by CasADi."""
    sym = casadi.MX.sym
    x, u, theta = sym("x", expression.nx), sym("u", expression.nu), sym("theta", expression.ntheta)
    lam, v, s = sym("lambda", expression.nx), sym("v", expression.nx + expression.nu), casadi.vertcat(x, u)
    value = expression.step(x, u, 0, theta)
    product = casadi.jtimes(casadi.gradient(casadi.dot(lam, value), s), s, v)
    results = [value, casadi.jacobian(value, s), product]
    return casadi.Function("derivatives", [x, u, theta, lam, v], [casadi.densify(part) for part in results])


def _remedy(model: object) -> str:
    """What to export instead."""
    if isinstance(model, Ensemble):
        return (
            "Export the mean of its members, Exported(MeanDynamics(model)), one of them, Exported(Thompson(model, "
            "member=0)), or each as a scenario, scenarios(model)."
        )
    if isinstance(model, BayesianModel):
        return (
            "Export the network of the means, Exported(MeanDynamics(model.center)), or draw networks as scenarios, "
            "scenarios(model.draw(n, generator=generator))."
        )
    if isinstance(model, LinearGaussian):
        return "Export it without its noise: Exported(model.model)."
    if isinstance(model, Propagation):
        return "Particles have no expression. Export the mean, Exported(MeanDynamics(way.model)), or scenarios(way.model)."
    if isinstance(model, Lifted):
        return (
            "What it adds to y belongs to particles. Export what is behind it: Exported(MeanDynamics(lifted.way.model)), "
            "or scenarios(lifted.way.model)."
        )
    if isinstance(model, Exported):
        return "It is exported already."
    if isinstance(model, nn.Module):
        layers = sorted({type(part).__name__ for part in model.modules() if not list(part.children())})
        return (
            f"It has the layers {', '.join(layers)}; what can be exported is an Ensemble, of dense layers with silu, relu "
            "or tanh, or a LinearModel."
        )
    if isinstance(model, Dynamics):
        return "Dynamics that do not learn are traced: Symbolic(dynamics)."
    return "Such as Exported(MeanDynamics(ensemble))."
