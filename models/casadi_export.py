"""Learned models as CasADi functions: for nonlinear MPC and fast iLQR, with exact second derivatives."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import groupby, pairwise

import casadi
import numpy as np
import numpy.typing as npt
import torch

from mbrl.features import Features
from mbrl.models.ensemble import Ensemble
from mbrl.models.linear import LinearModel
from mbrl.models.networks import Activation
from mbrl.models.propagation import MeanDynamics, Thompson

Exportable = Ensemble | MeanDynamics | Thompson | LinearModel


def casadi_function(model: Exportable) -> casadi.Function:
    """f(y, u, weights) -> y_next of mean predictions, with `casadi_weights(model)` as weights.

    y_next is (ny, n), a column per elite, of an `Ensemble`, and (ny, 1) of the others: the mean of the elites,
    the one member of `Thompson`, or the linear model. Models of one architecture share one function, so what is
    built upon it serves on after the model was fitted again.
    """
    return _build(_structure(model))


def casadi_weights(model: Exportable) -> npt.NDArray[np.float64]:
    """Normalisers and weights of a model as the parameter of its `casadi_function`, (n_weights,)."""
    if isinstance(model, LinearModel):
        networks = [[(model.weights, torch.zeros_like(model.target_mean))]]
        holder: Ensemble | LinearModel = model
    else:
        holder, members = _members(model)
        layers = list(zip(holder.net.weights, holder.net.biases, strict=True))
        networks = [[(w[e], b[e, 0]) for w, b in layers] for e in members]
    n = holder.np
    parts = [holder.input_mean, holder.input_scale, holder.target_mean[:n], holder.target_scale[:n]]
    for *hidden, (w, b) in networks:  # of the last layer, what predicts the mean of y
        for weight, bias in (*hidden, (w[:, :n], b[:n])):
            parts += [weight.flatten(), bias]
    packed: npt.NDArray[np.float64] = torch.cat([part.detach().double().cpu() for part in parts]).numpy()
    return packed


@dataclass(frozen=True)
class _Structure:
    """What a function depends on besides its arguments. sizes: of the layers, inputs and predictions included."""

    features: Features
    nu: int
    sizes: tuple[int, ...]
    activation: Activation
    members: int
    mean: bool


def _structure(model: Exportable) -> _Structure:
    if isinstance(model, LinearModel):
        sizes = tuple(model.weights.shape)  # no hidden layer, so the activation means nothing
        return _Structure(model.features, model.nu, sizes, "tanh", members=1, mean=True)
    holder, members = _members(model)
    sizes = (*(w.shape[1] for w in holder.net.weights), holder.np)
    mean = not isinstance(model, Ensemble)
    return _Structure(holder.features, holder.nu, sizes, holder.net.activation, len(members), mean)


def _members(model: Ensemble | MeanDynamics | Thompson) -> tuple[Ensemble, list[int]]:
    if isinstance(model, Thompson):
        return model.model, [model.member]
    holder = model if isinstance(model, Ensemble) else model.model
    return holder, holder.elites.tolist()


@functools.cache
def _build(structure: _Structure) -> casadi.Function:
    features, sizes = structure.features, structure.sizes
    y, u = casadi.MX.sym("y", features.ny), casadi.MX.sym("u", structure.nu)
    per_network = sum((n + 1) * m for n, m in pairwise(sizes))
    total = 2 * (sizes[0] + sizes[-1]) + structure.members * per_network
    weights = casadi.MX.sym("weights", total)
    start = 0

    def take(n: int) -> casadi.MX:
        nonlocal start
        start += n
        return weights[start - n : start]

    input_mean, input_scale = take(sizes[0]), take(sizes[0])
    target_mean, target_scale = take(sizes[-1]), take(sizes[-1])
    z = (casadi.vertcat(_inputs(features, y), u) - input_mean) / input_scale
    nexts = []
    for _ in range(structure.members):
        h = z
        for i, (n, m) in enumerate(pairwise(sizes)):
            # CasADi counts by columns, torch by rows: W (n, m) arrives transposed.
            h = casadi.reshape(take(n * m), m, n) @ h + take(m)
            h = h if i == len(sizes) - 2 else _activate(h, structure.activation)
        nexts.append(_advance(features, y, h * target_scale + target_mean))
    out = casadi.horzcat(*nexts)
    if structure.mean:
        out = casadi.sum2(out) / structure.members
    return casadi.Function("model", [y, u, weights], [out], ["y", "u", "weights"], ["y_next"])


def _activate(z: casadi.MX, activation: Activation) -> casadi.MX:
    if activation == "silu":
        # σ(z) = ½ (1 + tanh z/2): the derivative of 1/(1 + e^−z) is NaN where e^−z overflows.
        return z * (0.5 + 0.5 * casadi.tanh(z / 2))
    return casadi.fmax(z, 0) if activation == "relu" else casadi.tanh(z)


def _inputs(features: Features, y: casadi.MX) -> casadi.MX:
    """As `Features.inputs`."""
    angles = [y[i] for i in sorted(features.angles)]
    seen = [y[i] for i in range(features.ny) if i not in features.angles + features.hidden]
    return casadi.vertcat(*seen, *map(casadi.sin, angles), *map(casadi.cos, angles))


def _advance(features: Features, y: casadi.MX, answer: casadi.MX) -> casadi.MX:
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
