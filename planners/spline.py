"""Control splines: a plan of H steps from K control points ("knots").

Knots sit at fixed moments `spacing` steps apart, so moving on in time never smears them: a state
keeps its phase, the number of steps since its first knot, and drops that knot when it has passed.
Each spline is a linear map of its knots, actions = W(phase) · knots, built once.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import torch
from scipy.interpolate import CubicSpline, make_interp_spline
from torch import Tensor

Order = Literal["zero", "linear", "cubic"]


def knot_count(horizon: int, spacing: int, order: Order) -> int:
    """K, enough knots to cover `horizon` steps from any phase in [0, spacing)."""
    if order == "zero" or spacing == 1:
        return math.ceil((horizon + spacing - 1) / spacing)
    return max(2, math.ceil((horizon + spacing - 2) / spacing) + 1)


@functools.lru_cache(maxsize=64)
def _weights(horizon: int, spacing: int, order: Order) -> Tensor:
    """W (spacing, H, K): the actions of each phase as a linear map of the knots."""
    K = knot_count(horizon, spacing, order)
    steps = np.arange(spacing)[:, None] + np.arange(horizon)  # (phase, H), in steps since the first knot
    if order == "zero":
        W = np.eye(K)[steps // spacing]
    elif order == "linear":
        W = make_interp_spline(np.arange(K) * spacing, np.eye(K), k=1)(steps)
    else:
        W = CubicSpline(np.arange(K) * spacing, np.eye(K), bc_type="natural")(steps)
    return torch.from_numpy(np.ascontiguousarray(W))


def interpolate(knots: Tensor, phase: Tensor, horizon: int, spacing: int, order: Order) -> Tensor:
    """Actions (M, B, H, nu) of knots (M, B, K, nu) at phase (M,). Cubic splines may leave the knots' range."""
    if spacing == 1:
        return knots
    W = _weights(horizon, spacing, order).to(knots)[phase]  # (M, H, K)
    return torch.einsum("mhk,mbku->mbhu", W, knots)


def fit(actions: Tensor, spacing: int, order: Order) -> Tensor:
    """Knots (M, K, nu) at phase 0, in [−1, 1], that come nearest to actions (M, H, nu) in the least-squares sense."""
    if spacing == 1:
        return actions.clone()
    W = _weights(actions.shape[-2], spacing, order)[0].to(actions)
    knots: Tensor = (torch.linalg.pinv(W) @ actions).clamp(-1, 1)
    # Fitted freely, a knot at the end, which few actions touch, can land hundreds of ranges outside the
    # bounds. Accelerated projected gradient descent settles the bounds; a free fit inside them is its fixed point.
    gram, target = W.mT @ W, W.mT @ actions
    rate = 1.0 / float(torch.linalg.matrix_norm(gram, ord=2))
    ahead = knots
    for i in range(100):
        moved = (ahead - rate * (gram @ ahead - target)).clamp(-1, 1)
        ahead = moved + i / (i + 3) * (moved - knots)
        knots = moved
    # Knots beyond the horizon have no weight: they repeat the last one that has.
    used = int((W.abs().sum(0) > 0).nonzero().max()) + 1
    knots[..., used:, :] = knots[..., used - 1 : used, :]
    return knots


def advance(knots: Tensor, passed: Tensor) -> Tensor:
    """Knots (M, ..., K, nu) without the first `passed` (M,) ones; the last is repeated at the end."""
    K = knots.shape[-2]
    index = (torch.arange(K, device=knots.device) + passed[:, None]).clamp(max=K - 1)  # (M, K)
    index = index.reshape(len(passed), *[1] * (knots.ndim - 3), K, 1).expand_as(knots)
    return knots.gather(-2, index)
