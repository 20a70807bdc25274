"""Unit quaternions (w, x, y, z) and the rotation vectors of their tangent space, batched and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(p: Tensor, q: Tensor) -> Tensor:
    """The rotation p after q: p ⊗ q, (..., 4)."""
    pw, pv, qw, qv = p[..., :1], p[..., 1:], q[..., :1], q[..., 1:]
    w = pw * qw - (pv * qv).sum(-1, keepdim=True)
    return torch.cat([w, pw * qv + qw * pv + torch.linalg.cross(pv, qv)], -1)


def conjugate(q: Tensor) -> Tensor:
    """The inverse rotation, (..., 4)."""
    return torch.cat([q[..., :1], -q[..., 1:]], -1)


def exp(r: Tensor) -> Tensor:
    """The rotation (..., 4) by the angle |r| about r (..., 3), rad."""
    square = (r * r).sum(-1, keepdim=True)
    small = square < 1e-12  # there the series is exact, and the gradient of the norm would be NaN
    angle = torch.where(small, 1.0, square).sqrt()
    half = torch.where(small, 0.5 - square / 48, (angle / 2).sin() / angle)
    return torch.cat([torch.where(small, 1 - square / 8, (angle / 2).cos()), half * r], -1)


def log(q: Tensor) -> Tensor:
    """The rotation vector (..., 3) of q (..., 4), with an angle in [−π, π]."""
    q = torch.where(q[..., :1] < 0, -q, q)
    w, v = q[..., :1], q[..., 1:]
    square = (v * v).sum(-1, keepdim=True)
    small = square < 1e-12
    sine = torch.where(small, 1.0, square).sqrt()
    r: Tensor = torch.where(small, 2 / w, 2 * torch.atan2(sine, w) / sine) * v
    return r


def rotate(q: Tensor, v: Tensor) -> Tensor:
    """v (..., 3), rotated by q (..., 4)."""
    t = 2 * torch.linalg.cross(q[..., 1:], v)
    turned: Tensor = v + q[..., :1] * t + torch.linalg.cross(q[..., 1:], t)
    return turned


def retract(q: Tensor, r: Tensor) -> Tensor:
    """q (..., 4) turned by the rotation vector r (..., 3) in its own frame, of length 1."""
    moved = multiply(q, exp(r))
    unit: Tensor = moved / moved.norm(dim=-1, keepdim=True)
    return unit


def difference(p: Tensor, q: Tensor) -> Tensor:
    """The rotation vector (..., 3) in the frame of p that leads from p to q (..., 4)."""
    return log(multiply(conjugate(p), q))
