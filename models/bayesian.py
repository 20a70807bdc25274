"""A Bayesian neural network: a Gaussian for every weight instead of one value."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from mbrl.errors import ContractError
from mbrl.features import Features
from mbrl.models.ensemble import Ensemble
from mbrl.models.networks import Activation, activate
from mbrl.models.propagation import TSInf
from mbrl.models.training import Epoch, Fit, check_data
from mbrl.protocols import Dynamics


class BayesianModel(nn.Module):
    """One probabilistic network whose weights are independent normal numbers, w ~ N(μ, σ²).

    Networks drawn from it are an `Ensemble`: `draw` gives one to plan with, calibrate, or explore by
    (Thompson). As `Stochastic` dynamics each particle follows a network of its own for the whole rollout.
    `MeanDynamics(model.center)` is the deterministic network of the means.

    Args:
        ny, nu: sizes; the state of a learned model is y.
        dt: seconds per step.
        features: what the network sees and predicts.
        prior: standard deviation of the prior, over √inputs for the weights of a layer with so many
            inputs: then it says the same of networks of every width.
        networks: how many one realisation draws at most; more particles share them.
        generator: of the first μ.

    Reference: Blundell et al. 2015, "Weight uncertainty in neural networks".
    Differs: a single Gaussian as prior, so that the KL divergence is in closed form; the layers' sums are
        drawn instead of their weights (Kingma et al. 2015, "Variational dropout and the local
        reparameterization trick"), which gives the same expectation with less noise in the gradient.
    """

    def __init__(
        self,
        ny: int,
        nu: int,
        dt: float,
        *,
        features: Features | None = None,
        hidden: tuple[int, ...] = (64, 64),
        activation: Activation = "silu",
        prior: float = 1.0,
        networks: int = 32,
        generator: Generator,
    ):
        super().__init__()
        if not prior > 0 or networks < 1:
            raise ContractError(
                f"A BayesianModel needs prior > 0 and networks ≥ 1, but got {prior} and {networks}."
            )
        self.prior, self.networks = prior, networks
        # The network of the means, which also holds features, normalisers and heads.
        self.center = Ensemble(
            ny,
            nu,
            dt,
            features=features,
            members=1,
            hidden=hidden,
            activation=activation,
            generator=generator,
        )
        # Without data nothing would hold learned bounds, and their posterior is of no interest.
        self.center.max_logvar.requires_grad_(False)
        self.center.min_logvar.requires_grad_(False)
        net = self.center.net
        # σ = softplus(ρ) starts at a tenth of the prior's: weights that are all noise learn nothing.
        self.weight_rho = nn.ParameterList(
            torch.full_like(w, _inverse_softplus(0.1 * prior / math.sqrt(w.shape[1]))) for w in net.weights
        )
        self.bias_rho = nn.ParameterList(
            torch.full_like(b, _inverse_softplus(0.1 * prior)) for b in net.biases
        )
        self.nx, self.ny, self.nu, self.dt = ny, ny, nu, self.center.dt

    def posterior(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Mean, deviation and the prior's deviation of each layer's weights, then of each layer's biases."""
        net = self.center.net
        for w, rho in zip(net.weights, self.weight_rho, strict=True):
            yield w, F.softplus(rho), self.prior / math.sqrt(w.shape[1])
        for b, rho in zip(net.biases, self.bias_rho, strict=True):
            yield b, F.softplus(rho), self.prior

    def kl(self) -> Tensor:
        """KL divergence () of the posterior from the prior: Σ log(s/σ) + (σ² + μ²) / 2s² − ½."""
        parts = [
            (torch.log(s / std) + (std**2 + mean**2) / (2 * s**2) - 0.5).sum()
            for mean, std, s in self.posterior()
        ]
        return torch.stack(parts).sum()

    def outputs(self, z: Tensor, *, generator: Generator) -> Tensor:
        """The network's output (B, outputs) of normalised inputs z (B, nf), each row with weights of its own.

        A layer's sums are normal, with mean z μ + μ_b and variance z² σ² + σ_b².
        """
        layers = list(self.posterior())
        last = len(layers) // 2 - 1
        for i, ((w, w_std, _), (b, b_std, _)) in enumerate(
            zip(layers[: last + 1], layers[last + 1 :], strict=True)
        ):
            mean, variance = z @ w[0] + b[0], z**2 @ w_std[0] ** 2 + b_std[0] ** 2
            z = mean + variance.sqrt() * _normal(mean, generator)
            z = z if i == last else activate(z, self.center.net.activation)
        return z

    def loss(self, z: Tensor, t: Tensor, n: int, *, generator: Generator) -> Tensor:
        """An estimate () of the negative ELBO per transition, less a constant, by a batch of n in all.

        mean over the batch of ½ Σ err² e^(−log σ²) + log σ², plus KL / n. z: (B, nf), t: (B, nt), normalised.
        """
        mean, logvar, _ = self.center.heads(self.outputs(z, generator=generator))
        assert logvar is not None
        fit = 0.5 * ((mean - t) ** 2 * torch.exp(-logvar) + logvar).sum(-1).mean()
        return fit + self.kl() / n

    @torch.no_grad()
    def draw(self, n: int, *, generator: Generator) -> Ensemble:
        """n networks of the posterior as an ensemble, with the same features, normalisers and heads."""
        drawn = copy.deepcopy(self.center)
        sampled = [
            nn.Parameter(mean + std * _normal(mean.expand(n, -1, -1), generator), requires_grad=False)
            for mean, std, _ in self.posterior()
        ]
        half = len(sampled) // 2
        drawn.net.weights, drawn.net.biases = (
            nn.ParameterList(part) for part in (sampled[:half], sampled[half:])
        )
        drawn.members = drawn.net.members = n
        drawn.elites = torch.arange(n, device=drawn.elites.device)
        return drawn

    def output(self, x: Tensor) -> Tensor:
        return x

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        """Each particle follows a drawn network of its own, see `networks`; it is TS∞ over them."""
        drawn = self.draw(min(math.prod(shape), self.networks), generator=generator)
        return TSInf(drawn).realize(shape, horizon, generator=generator)


@dataclass(frozen=True)
class BayesianConfig:
    """How a Bayesian network is fitted.

    Attributes:
        batch: transitions per step.
        epochs: all are run: the KL divergence keeps it from fitting noise, and the deviations settle later
            than the means, so that stopping by the holdout error would leave them where they started.
        holdout: share of the data that is watched and not fitted; at most `max_holdout` transitions.
        learning_rate: of Adam.
    """

    batch: int = 64
    epochs: int = 200
    holdout: float = 0.1
    max_holdout: int = 5_000
    learning_rate: float = 3e-3


class BayesianTrainer:
    """Fits one Bayesian network, again and again: the optimiser's state lives on between fits.

    Args:
        model: changed in place.
        config: see `BayesianConfig`.
    """

    def __init__(self, model: BayesianModel, config: BayesianConfig | None = None):
        self.model, self.config = model, config or BayesianConfig()
        self.optimizer = self._adam()

    def _adam(self) -> torch.optim.Adam:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.Adam(learned, lr=self.config.learning_rate, fused=True)

    def fit(
        self,
        y: Tensor,
        u: Tensor,
        y_next: Tensor,
        *,
        generator: Generator,
        progress: Callable[[Epoch], None] | None = None,
    ) -> Fit:
        """Fit to N transitions; y, y_next: (N, ny), u: (N, nu).

        In the records, train is the negative ELBO per transition, holdout the mean squared error of the means'
        network, of normalised targets. A fit that diverges ends with the weights of the last finite epoch.

        Raises:
            ContractError: too few transitions, wrong shapes, or NaN or inf in the data.
        """
        model, config = self.model, self.config
        check_data(model.center, y, u, y_next)
        held = min(int(config.holdout * len(y)), config.max_holdout)
        order = torch.randperm(len(y), generator=generator, device=generator.device)
        test, train = order[:held], order[held:]
        kept = copy.deepcopy(model.state_dict())
        model.center.normalise(y[train], u[train], y_next[train])
        z, t = model.center.inputs(y, u), model.center.targets(y, y_next)

        fit = Fit(elites=[0], stopped=f"all {config.epochs} epochs are done")
        for epoch in range(config.epochs):
            shuffled = torch.randperm(len(train), generator=generator, device=generator.device)
            losses = []
            for part in torch.split(train[shuffled], config.batch):
                loss = model.loss(z[part], t[part], len(train), generator=generator)
                self.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                self.optimizer.step()
                losses.append(loss.detach())
            train_loss = float(torch.stack(losses).mean())
            error = self._error(z[test], t[test]) if held else train_loss
            finite = math.isfinite(train_loss) and math.isfinite(error)
            finite = finite and all(bool(torch.isfinite(p).all()) for p in model.parameters())
            record = Epoch(epoch, [train_loss], [error], [finite])
            fit.epochs.append(record)
            if progress is not None:
                progress(record)
            if not finite:
                model.load_state_dict(kept)
                self.optimizer = self._adam()  # its moments are spoilt
                fit.stopped = f"diverged in epoch {epoch}; the weights before are kept"
                break
            kept, fit.best = copy.deepcopy(model.state_dict()), [error]
        return fit

    @torch.no_grad()
    def _error(self, z: Tensor, t: Tensor) -> float:
        """Mean squared error of the means' network."""
        mean, _, _ = self.model.center.heads(self.model.center.net(z)[0])
        return float(((mean - t) ** 2).mean())


def _normal(like: Tensor, generator: Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
