"""How the uncertainty of an ensemble enters a rollout: TS1, TS∞, Thompson, moment matching, the mean.

Each takes an ensemble and is dynamics itself, so a problem says how it wants to be planned:
`Problem(TSInf(ensemble), …, particles=20)`. What is random is drawn once, before the rollout: the
networks that a particle follows, and its noise, which all candidates share.

Reference: Chua et al. 2018 (PETS), section 5 and appendix A.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from mbrl.derivatives import Euclidean, flat_rows
from mbrl.errors import ContractError
from mbrl.models.networks import activate

if TYPE_CHECKING:
    from mbrl.models.ensemble import Ensemble


@dataclass(frozen=True)
class _Sized:
    """The sizes of an ensemble. dtype: of the networks' arithmetic, their own unless given; y keeps its own."""

    model: Ensemble
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.model, "elites"):
            raise ContractError(
                f"{type(self).__name__} needs an Ensemble, but got a {type(self.model).__name__}. Of a BayesianModel take "
                "model.draw(n, generator=generator) or model.center; a LinearModel is dynamics itself."
            )

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

    def output(self, x: Tensor) -> Tensor:
        return x


class Propagation(_Sized, ABC):
    """A way to draw deterministic dynamics from an ensemble."""

    @abstractmethod
    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Draw: ...


@dataclass(frozen=True)
class TS1(Propagation):
    """Trajectory sampling: at every step each particle follows another network, in balanced shares."""

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Draw:
        members = _balanced((horizon, *shape), self.model.elites, generator)
        return Draw(self, members, _noise(self.model, shape, horizon, generator))


@dataclass(frozen=True)
class TSInf(Propagation):
    """Trajectory sampling in which a particle keeps its network: what is unknown stays the same over time."""

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Draw:
        members = _balanced((1, *shape), self.model.elites, generator)
        return Draw(self, members, _noise(self.model, shape, horizon, generator))


@dataclass(frozen=True)
class Thompson(Propagation):
    """One network, for a whole episode: explores as if it were the truth. See `draw`.

    Reference: Osband et al. 2013, "(More) efficient reinforcement learning via posterior sampling".
    """

    member: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.member < self.model.members:
            raise ContractError(
                f"Thompson needs one of the ensemble's {self.model.members} members, counted from 0, but got "
                f"{self.member}. Thompson.draw(model, generator=generator) takes one at random."
            )

    @classmethod
    def draw(cls, model: Ensemble, *, generator: Generator) -> Thompson:
        i = int(torch.randint(len(model.elites), (), generator=generator, device=generator.device))
        return cls(model, member=int(model.elites[i]))

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Draw:
        members = torch.full((1, *shape), self.member)
        return Draw(self, members, _noise(self.model, shape, horizon, generator))


@dataclass(frozen=True)
class MomentMatching(Propagation):
    """TS1 whose particles are drawn anew at every step, from a Gaussian with their mean and variance.

    Particles are the first axis of `shape`, at least two of them. Those whose state is not finite, such as of rows
    that `evaluate` retired at their end, stay so and do not count. (Rows whose states it keeps are not retired.)
    """

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Matched:
        if len(shape) != 3 or shape[0] < 2:
            raise ContractError(
                f"MomentMatching needs a shape (P, 1, 1) with P ≥ 2 particles, but got {shape}. "
                "Give the problem particles=20."
            )
        members = _balanced((horizon, *shape), self.model.elites, generator)
        again = torch.randn((horizon, *shape, self.ny), generator=generator, device=generator.device)
        return Matched(self, members, _noise(self.model, shape, horizon, generator), again)


@dataclass(frozen=True)
class MeanDynamics(_Sized, Euclidean):
    """The mean of the members' means: deterministic, and differentiable in closed form."""

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        y, u, rows = flat_rows(x, u)
        return self.model.predict(y, u).y_next.mean(0).to(x).reshape(*rows, -1)

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        y, u, rows = flat_rows(x, u)
        fx, fu = (f.mean(0) for f in self.model.linearize(y, u))
        return fx.reshape(*rows, self.ny, self.ny), fu.reshape(*rows, self.ny, self.nu)


@dataclass(frozen=True)
class _Shares:
    """Which network each of N particles follows.

    Attributes:
        lead: how many leading axes of the rows the particles take.
        count: N.
        order, back: (N,), the particles by network, and the way back.
        sizes: of each network's share.
    """

    lead: int
    count: int
    order: Tensor
    back: Tensor
    sizes: list[int]


class Draw:
    """Dynamics without randomness, drawn from an ensemble. A row whose state is not finite stays so.

    It has derivatives by x and u; the weights it was drawn with are constants.

    Args:
        way: the propagation.
        members: (H or 1, *shape), the network of each particle at each step.
        noise: (H, *shape, np) standard normal numbers, or None for a deterministic ensemble.
    """

    def __init__(self, way: Propagation, members: Tensor, noise: Tensor | None):
        model = way.model
        self.nx, self.nu, self.ny, self.dt = model.nx, model.nu, model.ny, model.dt
        self._model, self._dtype = model, way.dtype or model.input_mean.dtype
        self._members, self._noise = members, noise
        self._shares: dict[tuple[int, tuple[int, ...]], _Shares] = {}
        self._mean, self._slope = model.input_mean, 1 / model.input_scale
        self._layers = {int(e): _folded(model, int(e), self._dtype) for e in set(members.flatten().tolist())}
        # exp of the soft bounds: log σ² between them is σ² = e^min + 1 / (e^-max + e^-raw), written without softplus.
        self._scale = (model.target_scale * model.temperature)[: model.np]
        self._low = model.min_logvar.detach()[: model.np].exp()
        self._high = (-model.max_logvar.detach()[: model.np]).exp()

    def output(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return self.step_and_heads(x, u, k)[0]

    def step_and_heads(
        self, x: Tensor, u: Tensor, k: int | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The next state (..., ny), and what the particle's network says of this step's reward and end (...).

        None where it learns none; the reward is its mean, the end a probability.
        """
        model, k = self._model, one_step(k)
        rows = np.broadcast_shapes(x.shape[:-1], u.shape[:-1], self._members.shape[1:])  # torch takes 0.1 ms
        shares = self._shares_of(min(k, len(self._members) - 1), rows)
        y = x.expand(*rows, -1).reshape(shares.count, -1, self.ny)
        u = u.to(y).expand(*rows, -1).reshape(shares.count, -1, self.nu)
        z = torch.cat([*model.features.seen(y), u], -1).to(self._mean)
        z = z.sub_(self._mean).mul_(self._slope).to(self._dtype)  # as Ensemble.inputs, but in place
        if len(self._layers) == 1:
            out = self._forward(next(iter(self._layers)), z)
        else:  # one network after the other, so that its rows stay in the cache from layer to layer
            parts = torch.split(z[shares.order], shares.sizes)
            out = torch.cat([self._forward(e, part) for e, part in enumerate(parts) if len(part)])
            out = out[shares.back]
        target = out[..., : model.np]
        if self._noise is not None:
            raw = out[..., model.nt : model.nt + model.np]
            std = (self._low + 1 / (self._high + torch.exp(-raw))).sqrt_() * self._scale
            target = target + std * self._spread(self._noise[k], rows, shares.lead)
        y_next = model.features.advance(y, target.to(y)).reshape(*rows, self.ny)
        reward = out[..., model.np].to(y).reshape(rows) if model.learns_reward else None
        end = torch.sigmoid(out[..., -1]).to(y).reshape(rows) if model.learns_termination else None
        return y_next, reward, end

    def _shares_of(self, k: int, rows: tuple[int, ...]) -> _Shares:
        """Who is whose at entry k of `members`, worked out once where the particles keep their networks."""
        if (k, rows) not in self._shares:
            member = self._members[k]
            member = member.reshape((1,) * (len(rows) - member.ndim) + tuple(member.shape))
            lead = max((i + 1 for i, n in enumerate(member.shape) if n > 1), default=0)
            member = member.reshape(member.shape[:lead]).expand(rows[:lead]).reshape(-1)
            order = member.argsort()
            sizes = torch.bincount(member, minlength=self._model.members).tolist()
            self._shares[k, rows] = _Shares(lead, len(member), order, order.argsort(), sizes)
        return self._shares[k, rows]

    def _spread(self, noise: Tensor, rows: tuple[int, ...], lead: int) -> Tensor:
        """Noise (N, 1, np) of (*shape, np)."""
        noise = noise.reshape((1,) * (len(rows) + 1 - noise.ndim) + tuple(noise.shape))
        size = noise.shape[-1]
        return noise.reshape(*noise.shape[:lead], size).expand(*rows[:lead], size).reshape(-1, 1, size)

    def _forward(self, e: int, z: Tensor) -> Tensor:
        """The output of network e in units of y, (n, R, outputs) of normalised inputs (n, R, nf)."""
        *hidden, (weight, bias) = self._layers[e]
        activation, h = self._model.net.activation, z.reshape(-1, z.shape[-1])
        for w, b in hidden:
            h = torch.addmm(b, h, w)
            h = activate(h, activation, inplace=not h.requires_grad)
        return torch.addmm(bias, h, weight).to(self._scale).reshape(*z.shape[:-1], -1)


class Matched(Draw):
    """A draw whose particles are replaced, at every step, by those of a Gaussian."""

    def __init__(self, way: Propagation, members: Tensor, noise: Tensor | None, again: Tensor):
        super().__init__(way, members, noise)
        self._again = again

    def step_and_heads(
        self, x: Tensor, u: Tensor, k: int | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, reward, end = super().step_and_heads(x, u, k)
        left = torch.isfinite(y).all(-1, keepdim=True)
        count = left.sum(0).clamp(min=1)
        mean = torch.where(left, y, 0.0).sum(0) / count
        # The others at the mean add nothing to the sum of squares, which is divided by those that are left, less one.
        std = torch.where(left, y, mean).std(0) * ((len(y) - 1) / (count - 1).clamp(min=1)).sqrt()
        drawn = self._model.features.rescaled(mean + std * self._again[int(k)].to(y))
        return torch.where(left, drawn, y), reward, end


def one_step(k: int | Tensor) -> int:
    """k as a number: noise and networks are drawn per step, and a draw steps all rows at the same one."""
    if isinstance(k, Tensor) and k.numel() != 1:
        raise ContractError(
            f"A draw needs one k for all rows, but got {k.numel()}, of shape {tuple(k.shape)}. Step the rows of each k "
            "by themselves."
        )
    return int(k)


def _folded(model: Ensemble, e: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Weights (in, out) and biases (out,) of network e; the last layer answers in units of y.

    Without their graph, which all steps would share and the first backward() would free.
    """
    layers: list[Any] = [
        (w.detach()[e], b.detach()[e, 0]) for w, b in zip(model.net.weights, model.net.biases, strict=True)
    ]
    w, b = layers[-1]
    scale, shift = torch.ones_like(b), torch.zeros_like(b)
    scale[: model.nt], shift[: model.nt] = model.target_scale, model.target_mean
    layers[-1] = (w * scale, b * scale + shift)
    return [(w.to(dtype), b.to(dtype)) for w, b in layers]


def _balanced(shape: tuple[int, ...], elites: Tensor, generator: Generator) -> Tensor:
    """A network for each particle, (steps, *shape): in every step each network gets as many, give or take one."""
    steps, n = shape[0], math.prod(shape[1:])
    order = torch.rand((steps, n), generator=generator, device=generator.device).argsort(-1)
    first = torch.randint(len(elites), (steps, 1), generator=generator, device=generator.device)
    return elites[(order + first) % len(elites)].reshape(shape)


def _noise(model: Ensemble, shape: tuple[int, ...], horizon: int, generator: Generator) -> Tensor | None:
    if not model.probabilistic:
        return None
    return torch.randn((horizon, *shape, model.np), generator=generator, device=generator.device)
