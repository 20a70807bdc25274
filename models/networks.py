"""Ensembles of multilayer perceptrons as one batched matrix product per layer."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mbrl.errors import UnknownName

Activation = Literal["silu", "relu", "tanh"]


def activate(z: Tensor, activation: Activation, *, inplace: bool = False) -> Tensor:
    if activation == "silu":
        return F.silu(z, inplace=inplace)
    if activation == "relu":
        return F.relu(z, inplace=inplace)
    return z.tanh_() if inplace else torch.tanh(z)


def activate_with_slope(z: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation at z and its derivative."""
    if activation == "silu":
        s = torch.sigmoid(z)
        h = z * s
        return h, s + h * (1 - s)
    if activation == "relu":
        return F.relu(z), (z > 0).to(z)
    h = torch.tanh(z)
    return h, 1 - h**2


class EnsembleMLP(nn.Module):
    """E perceptrons of one architecture with weights of their own.

    Args:
        inputs, outputs: feature sizes.
        members: E.
        hidden: width of each hidden layer; empty for a linear map.
        generator: of the first weights, a truncated normal with standard deviation 1/(2 √inputs), biases 0.

    Reference: initialisation as in Chua et al. 2018 (PETS), software.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        members: int,
        hidden: tuple[int, ...] = (200, 200, 200, 200),
        activation: Activation = "silu",
        generator: Generator,
    ):
        super().__init__()
        if activation not in get_args(Activation):
            raise UnknownName("activation", activation, get_args(Activation))
        self.members, self.activation = members, activation
        sizes = (inputs, *hidden, outputs)
        self.weights = nn.ParameterList(
            nn.Parameter(_truncated_normal((members, n, m), 0.5 / math.sqrt(n), generator))
            for n, m in pairwise(sizes)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(members, 1, m)) for m in sizes[1:])

    def forward(self, z: Tensor, member: int | None = None) -> Tensor:
        """(E, B, outputs) of z (E, B, inputs), or of (B, inputs) shown to every member; (1, B, outputs) of one member."""
        *hidden, last = self._layers(member)
        if z.ndim == 2:
            z = z.expand(len(last[0]), *z.shape)
        for weight, bias in hidden:
            z = activate(torch.baddbmm(bias, z, weight), self.activation)
        return torch.baddbmm(last[1], z, last[0])

    def value_and_jacobian(
        self, z: Tensor, rows: int | None = None, member: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output (E, B, outputs) and its derivative (E, B, rows, inputs) in closed form; z as in `forward`.

        From the last layer to the first: networks of dynamics have fewer outputs than inputs, and of the outputs only
        the first `rows` (all unless given) are carried.
        """
        *hidden, last = self._layers(member)
        if z.ndim == 2:
            z = z.expand(len(last[0]), *z.shape)
        E, B, _ = z.shape
        slopes = []
        for weight, bias in hidden:
            z, slope = activate_with_slope(torch.baddbmm(bias, z, weight), self.activation)
            slopes.append(slope[:, :, None])
        out = torch.baddbmm(last[1], z, last[0])
        J = last[0][..., :rows].mT[:, None].expand(-1, B, -1, -1)  # (E, B, rows, width)
        for (weight, _), slope in zip(reversed(hidden), reversed(slopes), strict=True):
            J = torch.bmm((J * slope).flatten(1, 2), weight.mT).view(E, B, J.shape[2], -1)
        return out, J

    def _layers(self, member: int | None) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases, of one member alone if asked."""
        some = slice(None) if member is None else slice(member, member + 1)
        return [(w[some], b[some]) for w, b in zip(self.weights, self.biases, strict=True)]


def _truncated_normal(shape: tuple[int, ...], std: float, generator: Generator) -> Tensor:
    """Normal numbers of which those beyond 2 σ are drawn again."""
    w = torch.empty(shape)
    nn.init.trunc_normal_(w, std=std, a=-2 * std, b=2 * std, generator=generator)
    return w
