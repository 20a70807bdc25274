"""Learned models as CasADi expressions: for nonlinear MPC and fast iLQR, with exact second derivatives."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import casadi
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mbrl.errors import UnsupportedProblem
from mbrl.expressions import Expression
from mbrl.features import Features
from mbrl.models.batched_export import BatchedNetworks
from mbrl.models.ensemble import Ensemble
from mbrl.models.linear import LinearModel
from mbrl.models.networks import Activation, EnsembleMLP
from mbrl.models.propagation import MeanDynamics, Thompson

Exportable = Ensemble | MeanDynamics | Thompson | LinearModel


def casadi_function(model: Exportable) -> casadi.Function:
    """(x, u, k, θ) -> x_next of mean predictions, with `casadi_weights(model)` as θ; of a learned model x is y.

    x_next is (ny, n), a column per elite, of an `Ensemble`, and (ny, 1) of the others: the mean of the elites,
    the one member of `Thompson`, or the linear model. Models of one architecture share one function, so what is
    built upon it serves on after the model was fitted again.

    Raises:
        UnsupportedProblem: the network is not one of `EnsembleMLP`.
    """
    if isinstance(model, Ensemble):
        return _columns(_structure(model))
    return casadi_expression(model).step


def casadi_expression(model: MeanDynamics | Thompson | LinearModel) -> Expression:
    """`casadi_function` with the output and, in closed form, the derivatives; one object for all of an architecture.

    Raises:
        UnsupportedProblem: the network is not one of `EnsembleMLP`.
    """
    return _expression(_structure(model))


def casadi_weights(model: Exportable) -> npt.NDArray[np.float64]:
    """Normalisers and weights of a model as the θ of its `casadi_function`, (nθ,)."""
    if isinstance(model, LinearModel):
        layers = [(model.weights[None], torch.zeros_like(model.target_mean)[None, None])]
        holder: Ensemble | LinearModel = model
    else:
        holder, members = _members(model)
        layers = [
            (w[members], b[members]) for w, b in zip(holder.net.weights, holder.net.biases, strict=True)
        ]
    n = holder.np
    w, b = layers[-1]
    layers[-1] = (w[..., :n], b[..., :n])  # what predicts the mean of y
    # CasADi counts by columns, torch by rows.
    networks = torch.cat([part.flatten(1) for w, b in layers for part in (w.mT, b)], 1)
    normalisers = [holder.input_mean, holder.input_scale, holder.target_mean[:n], holder.target_scale[:n]]
    packed = torch.cat([part.detach().double().cpu() for part in (*normalisers, networks.flatten())])
    return np.asarray(packed.numpy(), dtype=np.float64)


@dataclass(frozen=True)
class _Structure:
    """What an expression depends on besides its arguments. sizes: of the layers, inputs and predictions included."""

    features: Features
    nu: int
    sizes: tuple[int, ...]
    activation: Activation
    members: int


def _structure(model: Exportable) -> _Structure:
    if isinstance(model, LinearModel):
        sizes = tuple(model.weights.shape)  # no hidden layer, so the activation means nothing
        return _Structure(model.features, model.nu, sizes, "tanh", members=1)
    holder, members = _members(model)
    sizes = (*(w.shape[1] for w in holder.net.weights), holder.np)
    return _Structure(holder.features, holder.nu, sizes, holder.net.activation, len(members))


def _members(model: Ensemble | MeanDynamics | Thompson) -> tuple[Ensemble, list[int]]:
    holder = model if isinstance(model, Ensemble) else model.model
    net: nn.Module = holder.net
    if not isinstance(net, EnsembleMLP) or net.activation not in _ACTIVATIONS:
        layers = {type(part).__name__ for part in net.modules() if not list(part.children())}
        raise UnsupportedProblem(
            f"As an expression, a network is an EnsembleMLP: dense layers with {', '.join(_ACTIVATIONS)} between them; "
            f"but got {type(net).__name__} with {', '.join(sorted(layers))}. Learn with an Ensemble; dynamics that do "
            "not learn can be written in torch and traced: Symbolic(dynamics)."
        )
    return holder, [model.member] if isinstance(model, Thompson) else holder.elites.tolist()


@dataclass(frozen=True)
class _Parts:
    """θ taken apart. Vectors are rows, so that weights come as CasADi multiplies fastest; layers: of each network."""

    input_mean: casadi.MX
    input_scale: casadi.MX
    target_mean: casadi.MX
    target_scale: casadi.MX
    networks: list[list[tuple[casadi.MX, casadi.MX]]]


def _parts(structure: _Structure) -> tuple[casadi.MX, _Parts]:
    """θ, and its parts."""
    sizes = structure.sizes
    per_network = sum((n + 1) * m for n, m in pairwise(sizes))
    theta = casadi.MX.sym("theta", 2 * (sizes[0] + sizes[-1]) + structure.members * per_network)
    start = 0

    def take(n: int, m: int) -> casadi.MX:
        nonlocal start
        start += n * m
        return casadi.reshape(theta[start - n * m : start], n, m)

    normalisers = (take(1, sizes[0]), take(1, sizes[0]), take(1, sizes[-1]), take(1, sizes[-1]))
    networks = [[(take(n, m), take(1, m)) for n, m in pairwise(sizes)] for _ in range(structure.members)]
    return theta, _Parts(*normalisers, networks)


def _symbols(structure: _Structure) -> tuple[casadi.MX, casadi.MX, casadi.MX]:
    sym = casadi.MX.sym
    return sym("x", structure.features.ny), sym("u", structure.nu), sym("k")


@functools.cache
def _columns(structure: _Structure) -> casadi.Function:
    """(x, u, k, θ) -> x_next of every member."""
    features = structure.features
    (x, u, k), (theta, parts) = _symbols(structure), _parts(structure)
    z = (casadi.vertcat(_inputs(features, x), u).T - parts.input_mean) / parts.input_scale
    nexts = []
    for *hidden, (weight, bias) in parts.networks:
        h = z
        for w, b in hidden:
            h = _ACTIVATIONS[structure.activation](h @ w + b)
        answer = (h @ weight + bias) * parts.target_scale + parts.target_mean
        nexts.append(_advance(features, x, answer.T))
    return casadi.Function(
        "members", [x, u, k, theta], [casadi.horzcat(*nexts)], ["x", "u", "k", "theta"], ["x_next"]
    )


@functools.cache
def _expression(structure: _Structure) -> Expression:
    x, u, k = _symbols(structure)
    members = _columns(structure)
    theta = casadi.MX.sym("theta", members.numel_in(3))
    (nexts,) = members.call([x, u, k, theta], True, False)
    step = casadi.Function(
        "model",
        [x, u, k, theta],
        [casadi.sum2(nexts) / structure.members],
        ["x", "u", "k", "theta"],
        ["x_next"],
    )
    return Expression(
        step,
        casadi.Function("output", [x], [x]),
        batch=_batched(structure),
    )


def _batched(structure: _Structure) -> BatchedNetworks:
    features, nu = structure.features, structure.nu
    see = _seeing(features, nu)
    x, u, g = (casadi.SX.sym(name, see.numel_in(i)) for i, name in enumerate("xug"))
    seen, by_s, bend = see(x, u, g)
    return BatchedNetworks(
        casadi.Function("see", [x, u], [seen, casadi.densify(by_s)]),
        casadi.Function("bend", [x, u, g], [casadi.densify(bend)]),
        _moving(features),
        ny=features.ny,
        nu=nu,
        sizes=structure.sizes,
        members=structure.members,
        activate=_ARRAYS[structure.activation],
    )


def _seeing(features: Features, nu: int) -> casadi.Function:
    """(x, u, g) -> what the networks see, its derivative by (x, u), and that of gᵀ times it twice."""
    s = casadi.SX.sym("s", features.ny + nu)
    seen = casadi.vertcat(_inputs(features, s[: features.ny]), s[features.ny :])
    g = casadi.SX.sym("g", seen.numel())
    results = [seen, casadi.jacobian(seen, s), casadi.hessian(casadi.dot(g, seen), s)[0]]
    return casadi.Function("seeing", [s[: features.ny], s[features.ny :], g], results)


def _moving(features: Features) -> casadi.Function:
    """(x, answer, λ) -> x_next, its derivative by both, the Hessian of λᵀ x_next by both, its gradient by the answer."""
    ny, n = features.ny, len(features.predicted)
    both, lam = casadi.SX.sym("both", ny + n), casadi.SX.sym("lambda", ny)
    x_next = _advance(features, both[:ny], both[ny:])
    bent, slope = casadi.hessian(casadi.dot(lam, x_next), both)
    results = [x_next, casadi.jacobian(x_next, both), bent, casadi.densify(slope[ny:])]
    return casadi.Function("moving", [both[:ny], both[ny:], lam], results)


def _silu(a: casadi.MX) -> casadi.MX:
    # σ(a) = ½ (1 + tanh a/2): the derivative of 1/(1 + e^−a) is NaN where e^−a overflows.
    return a * (0.5 + 0.5 * casadi.tanh(a / 2))


_ACTIVATIONS: dict[str, Any] = {"silu": _silu, "relu": lambda a: casadi.fmax(a, 0), "tanh": casadi.tanh}


def _silu_of(a: Any) -> tuple[Any, Any, Any]:
    s = 0.5 + 0.5 * np.tanh(a / 2)
    return a * s, s + a * s * (1 - s), s * (1 - s) * (2 + a * (1 - 2 * s))


def _relu_of(a: Any) -> tuple[Any, Any, None]:
    return np.maximum(a, 0), (a > 0).astype(np.float64), None


def _tanh_of(a: Any) -> tuple[Any, Any, Any]:
    h = np.tanh(a)
    return h, 1 - h * h, -2 * h * (1 - h * h)


_ARRAYS: dict[str, Any] = {"silu": _silu_of, "relu": _relu_of, "tanh": _tanh_of}
"""Of numpy arrays: the activation, and its first and second derivative, None where that is 0."""


def _inputs(features: Features, y: Any) -> Any:
    """As `Features.inputs`."""
    angles = [y[i] for i in sorted(features.angles)]
    seen = [y[i] for i in range(features.ny) if i not in features.angles + features.hidden]
    return casadi.vertcat(*seen, *map(casadi.sin, angles), *map(casadi.cos, angles))


def _advance(features: Features, y: Any, answer: Any) -> Any:
    """As `Features.advance`."""
    place = {i: n for n, i in enumerate(features.predicted)}
    run_of = {i: n for n, run in enumerate(features.unit) for i in run}
    parts = []
    for run, group in groupby(range(features.ny), run_of.get):
        new = casadi.vertcat(
            *(
                (0 if i in features.absolute else y[i]) + (answer[place[i]] if i in place else 0)
                for i in group
            )
        )
        parts.append(new if run is None else new / casadi.norm_2(new))
    return casadi.vertcat(*parts)
