"""A bootstrap ensemble of neural networks that predicts the next y: deterministic or probabilistic, 1 to E members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mbrl.errors import ContractError
from mbrl.features import Features
from mbrl.models.networks import Activation, EnsembleMLP
from mbrl.models.propagation import TS1
from mbrl.protocols import Dynamics


@dataclass(frozen=True)
class Prediction:
    """What each of n members says, in units of y.

    Attributes:
        y_next: (n, B, ny), the mean.
        change: (n, B, n_predicted), the mean answer of the network that leads to y_next, see `Features`.
        variance: (n, B, n_predicted), the aleatoric variance of the change; zeros if deterministic.
        reward: (n, B) mean, or None without a reward head.
        end: (n, B) probability that the episode ends, or None without a termination head.
    """

    y_next: Tensor
    change: Tensor
    variance: Tensor
    reward: Tensor | None = None
    end: Tensor | None = None

    def aleatoric(self) -> Tensor:
        """Noise of the world itself: the mean of the members' variances, (B, n_predicted)."""
        return self.variance.mean(0)

    def epistemic(self) -> Tensor:
        """Ignorance: the variance of the members' means, (B, n_predicted). The two add up to that of the change."""
        return self.change.var(0, correction=0)


class Ensemble(nn.Module):
    """E networks of y and u that predict normalised changes of y, each with a Gaussian of its own.

    As `Stochastic` dynamics it propagates particles by TS1; `mbrl.models.propagation` has the other ways.

    Args:
        ny, nu: sizes; the state of a learned model is y.
        dt: seconds per step.
        features: what the networks see and predict.
        members: E.
        probabilistic: whether the networks also predict a variance; else they are deterministic.
        reward, termination: whether to learn these too.
        generator: of the first weights.

    Reference: Chua et al. 2018, "Deep reinforcement learning in a handful of trials using probabilistic
        dynamics models"; Lakshminarayanan et al. 2017.
    Differs: targets are normalised as well as inputs, so that no dimension of y rules the loss and the
        learned bounds of the log-variance mean the same for all.
    """

    def __init__(
        self,
        ny: int,
        nu: int,
        dt: float,
        *,
        features: Features | None = None,
        members: int = 5,
        hidden: tuple[int, ...] = (200, 200, 200, 200),
        activation: Activation = "silu",
        probabilistic: bool = True,
        reward: bool = False,
        termination: bool = False,
        generator: Generator,
    ):
        super().__init__()
        if min(ny, nu, members) < 1 or not dt > 0:
            raise ContractError(
                f"An Ensemble needs ny, nu and members ≥ 1 and dt > 0 s, but got {ny}, {nu}, {members} and {dt}."
            )
        self.nx, self.ny, self.nu, self.dt = ny, ny, nu, float(dt)
        self.features = features = features or Features(ny)
        if features.ny != ny:
            raise ContractError(f"The features are for ny = {features.ny}, but the ensemble has ny = {ny}.")
        self.members, self.probabilistic = members, probabilistic
        self.world: str | None = None
        """Name of the world that it was learned on, if anyone has said so; saved with it."""
        self.learns_reward, self.learns_termination = reward, termination
        self.np = len(features.predicted)
        nf = features.inputs(torch.zeros(ny)).shape[-1] + nu
        self.nt = self.np + reward
        outputs = self.nt * (1 + probabilistic) + termination
        self.net = EnsembleMLP(
            nf, outputs, members=members, hidden=hidden, activation=activation, generator=generator
        )
        self.max_logvar = nn.Parameter(torch.full((self.nt,), 0.5), requires_grad=probabilistic)
        self.min_logvar = nn.Parameter(torch.full((self.nt,), -10.0), requires_grad=probabilistic)
        self.register_buffer("input_mean", torch.zeros(nf))
        self.register_buffer("input_scale", torch.ones(nf))
        self.register_buffer("target_mean", torch.zeros(self.nt))
        self.register_buffer("target_scale", torch.ones(self.nt))
        self.register_buffer("temperature", torch.ones(self.nt))
        self.register_buffer("interval_scale", torch.ones(self.np))
        self.register_buffer("elites", torch.arange(members))

    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    """(nt,); 0 for what did not vary in the data: it is predicted as its mean, for certain."""
    temperature: Tensor
    """(nt,), by which the members' deviations are multiplied; see `recalibrate`."""
    interval_scale: Tensor
    """(np,), by which `calibrate` multiplies the whole deviation of a prediction; rollouts do not know it."""
    elites: Tensor

    def inputs(self, y: Tensor, u: Tensor) -> Tensor:
        """Normalised inputs (..., nf) of y (..., ny) and u (..., nu)."""
        z = torch.cat([self.features.inputs(y), u.to(y)], -1).to(self.input_mean)
        return (z - self.input_mean) * (1 / self.input_scale)

    def targets(self, y: Tensor, y_next: Tensor, reward: Tensor | None = None) -> Tensor:
        """What the networks are to say, normalised, (..., nt)."""
        t = self.features.targets(y, y_next)
        if self.learns_reward:
            assert reward is not None
            t = torch.cat([t, reward[..., None]], -1)
        return (t.to(self.target_mean) - self.target_mean) / self.target_unit

    @property
    def target_unit(self) -> Tensor:
        """(nt,), by which targets are measured: their scale, or 1 where that is 0."""
        return divisor(self.target_scale)

    def heads(self, out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mean (..., nt), log-variance (..., nt) and termination logit (...) in the output of the network.

        The mean and the variance are of normalised targets; the bounds of the log-variance are soft and learned.
        """
        mean = out[..., : self.nt]
        logvar = None
        if self.probabilistic:
            raw = out[..., self.nt : 2 * self.nt]
            logvar = self.max_logvar - nn.functional.softplus(self.max_logvar - raw)
            logvar = self.min_logvar + nn.functional.softplus(logvar - self.min_logvar)
        return mean, logvar, out[..., -1] if self.learns_termination else None

    def predict(self, y: Tensor, u: Tensor, member: int | None = None) -> Prediction:
        """What every elite, or one member alone, says of y (B, ny) and u (B, nu)."""
        z = self.inputs(y, u)
        out = self.net(z)[self.elites] if member is None else self.net(z, member)
        mean, logvar, logit = self.heads(out)
        t = mean * self.target_scale + self.target_mean
        variance = torch.zeros_like(t) if logvar is None else logvar.exp() * self.target_scale**2
        variance = variance * self.temperature**2
        return Prediction(
            y_next=self.features.advance(y.expand(len(t), *y.shape), t[..., : self.np].to(y)),
            change=t[..., : self.np],
            variance=variance[..., : self.np],
            reward=t[..., self.np] if self.learns_reward else None,
            end=None if logit is None else torch.sigmoid(logit),
        )

    def linearize(self, y: Tensor, u: Tensor, member: int | None = None) -> tuple[Tensor, Tensor]:
        """Derivatives of every elite's mean y_next, (n, B, ny, ny) by y (B, ny) and (n, B, ny, nu) by u (B, nu).

        In closed form; of one member alone, n = 1.
        """
        out, J = self.net.value_and_jacobian(self.inputs(y, u), self.np, member)
        if member is None:
            out, J = out[self.elites], J[self.elites]
        J = J * (self.target_scale[: self.np, None] / self.input_scale)
        t = out[..., : self.np] * self.target_scale[: self.np] + self.target_mean[: self.np]
        return self.features.linearize(y, t, J)

    def output(self, x: Tensor) -> Tensor:
        return x

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        """TS1: each particle changes its network at every step; see `mbrl.models.propagation`."""
        return TS1(self).realize(shape, horizon, generator=generator)

    @torch.no_grad()
    def normalise(self, y: Tensor, u: Tensor, y_next: Tensor, reward: Tensor | None = None) -> None:
        """Set mean and scale of inputs and targets from data, and all temperatures back to 1: they were of other weights.

        Inputs that do not vary keep the scale 1.
        """
        for neutral in (self.input_mean, self.target_mean):
            neutral.zero_()
        for neutral in (self.input_scale, self.target_scale, self.temperature, self.interval_scale):
            neutral.fill_(1.0)
        eps = max(torch.finfo(v.dtype).eps for v in (y, self.input_mean))
        m, s = mean_and_scale(self.inputs(y, u), eps)
        self.input_mean.copy_(m)
        self.input_scale.copy_(divisor(s))
        m, s = mean_and_scale(self.targets(y, y_next, reward), eps)
        self.target_mean.copy_(m)
        self.target_scale.copy_(s)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        elites = state_dict.get(f"{prefix}elites")
        if isinstance(elites, Tensor):  # how many they are is no part of the architecture
            self.elites = self.elites.new_zeros(elites.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        kind = "probabilistic" if self.probabilistic else "deterministic"
        size = sum(p.numel() for p in self.parameters())
        return f"{self.members} {kind} members, ny {self.ny}, nu {self.nu}, {size:,} weights"


def mean_and_scale(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n,) of the columns of z (N, n), 0 where they do not vary.

    Args:
        eps: of the least precise dtype that the numbers went through.
    """
    z = z.double()
    m, s = z.mean(0), z.std(0, correction=0)
    # Rounding makes a constant column look like noise of its last digits. Squares below 1e-30 are lost in float32.
    return m, torch.where(s > 8 * eps * m.abs() + 1e-15, s, 0.0)


def divisor(scale: Tensor) -> Tensor:
    """`scale`, or 1 where it is 0."""
    return torch.where(scale > 0, scale, 1.0)
