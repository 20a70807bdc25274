"""A finite set of dynamics of which any may be the true one: members of an ensemble, or values of a parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.protocols import Dynamics


@dataclass(frozen=True)
class Scenarios:
    """Stochastic dynamics that are one of `members`, for the whole rollout.

    Sampling planners draw particles from it; with as many particles as members, particle p is member p. Scenario MPC
    plans for all of `members` at once.

    Attributes:
        members: deterministic, of equal nx, nu, ny and dt, and of one output function.

    Raises:
        ContractError: there are none, one must itself be drawn, or they differ in size or time step.
    """

    members: tuple[Dynamics, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ContractError("Scenarios needs at least one member, but got none.")
        sizes = []
        for i, member in enumerate(self.members):
            if not hasattr(member, "step"):
                raise ContractError(
                    f"Scenarios needs dynamics with step, but member {i}, {type(member).__name__}, must be drawn first. "
                    "Give the members of an ensemble one by one: mbrl.models.scenarios(ensemble)."
                )
            sizes.append((member.nx, member.nu, member.ny, member.dt))
            if sizes[i] != sizes[0]:
                raise ContractError(
                    f"Scenarios needs members of equal nx, nu, ny and dt, but member 0 has {sizes[0]} and member {i} has "
                    f"{sizes[i]}."
                )

    @property
    def nx(self) -> int:
        return self.members[0].nx

    @property
    def nu(self) -> int:
        return self.members[0].nu

    @property
    def ny(self) -> int:
        return self.members[0].ny

    @property
    def dt(self) -> float:
        return self.members[0].dt

    def output(self, x: Tensor) -> Tensor:
        return self.members[0].output(x)

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        """Each of `shape` keeps one member; each member gets as many of them, give or take one."""
        n, S = math.prod(shape), len(self.members)
        member = torch.arange(n)
        if n != S:
            order = torch.rand(n, generator=generator, device=generator.device).argsort()
            first = torch.randint(S, (), generator=generator, device=generator.device)
            member = ((order + first) % S).cpu()
        return _Draw(self, member.reshape(shape))


class _Draw:
    """Members of scenarios, one for each place of `member` (*shape,), which broadcasts against x.shape[:-1]."""

    def __init__(self, scenarios: Scenarios, member: Tensor):
        self.nx, self.nu, self.ny, self.dt = scenarios.nx, scenarios.nu, scenarios.ny, scenarios.dt
        self._members, self._member = scenarios.members, member
        self._shares: dict[tuple[int, ...], tuple[Tensor, Tensor, list[int]]] = {}

    def output(self, x: Tensor) -> Tensor:
        return self._members[0].output(x)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1], self._member.shape)
        order, back, sizes = self._shares_of(rows)

        def shared(v: Tensor) -> tuple[Tensor, ...]:
            return torch.split(v[order], sizes)

        xs = shared(x.expand(*rows, -1).reshape(-1, self.nx))
        us = shared(u.expand(*rows, -1).reshape(-1, self.nu))
        ks = shared(k.expand(rows).reshape(-1)) if isinstance(k, Tensor) and k.ndim else (k,) * len(sizes)
        shares = zip(self._members, xs, us, ks, strict=True)
        reached = [member.step(x, u, k) for member, x, u, k in shares if len(x)]
        return torch.cat(reached)[back].reshape(*rows, self.nx)

    def _shares_of(self, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, list[int]]:
        """The rows by member, the way back, and how many each member has; worked out once."""
        if rows not in self._shares:
            member = self._member.expand(rows).reshape(-1)
            order = member.argsort(stable=True)
            sizes = member.bincount(minlength=len(self._members)).tolist()
            self._shares[rows] = order, order.argsort(), sizes
        return self._shares[rows]
