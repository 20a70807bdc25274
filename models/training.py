"""Fitting an ensemble: bootstrap, holdout, early stopping and a snapshot of each member's best."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.models.ensemble import Ensemble

if TYPE_CHECKING:
    from mbrl.models.linear import LinearModel

DECAYS = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)
"""Weight decay from the first layer to the last, as in MBPO; ½ λ ‖W‖² per layer, biases free."""
BLOWN = 10.0
"""Times the holdout error at the start, at least that of predicting the mean, beyond which a member has diverged."""


@dataclass(frozen=True)
class FitConfig:
    """How an ensemble is fitted.

    Attributes:
        batch: transitions per step and member.
        epochs: at most; one epoch shows each member as many transitions as there are.
        patience: stop when no member improved for this many epochs. None: run all epochs.
        improvement: relative fall of the holdout error that counts as one.
        holdout: share of the data that trains nobody; at most `max_holdout` transitions. 0: none, and
            the last finite weights are kept.
        elites: how many of the best members answer afterwards; all unless given.
        learning_rate, decays: of Adam; one decay per layer, or one for all.
        beta: each squared error is weighed by σ^(2β), as a constant, against the likelihood's own weight σ⁻².
            With 0, the likelihood alone, targets that are easy to predict leave the others no share of the
            gradient, and their means can stay much worse. 1 weighs all errors alike.
        bounds: weight of the pull on the learned bounds of the log-variance.
        clip: largest norm of the gradient of one member.
        bootstrap: whether each member draws its own data with replacement, once per fit.
        mixed: multiply matrices in bfloat16; weights, losses and the optimiser stay as they are. Pays where the
            processor has it in hardware: AMX, or a GPU.

    Raises:
        ContractError: a number with which no fit is possible.

    Reference: Janner et al. 2019 (MBPO), appendix and software; Chua et al. 2018; Seitzer et al. 2022, "On the
        pitfalls of heteroscedastic uncertainty estimation with probabilistic neural networks", eq. 5 (beta).
    """

    batch: int = 256
    epochs: int = 100
    patience: int | None = 5
    improvement: float = 0.01
    holdout: float = 0.2
    max_holdout: int = 5_000
    elites: int | None = None
    learning_rate: float = 1e-3
    decays: tuple[float, ...] = DECAYS
    beta: float = 0.5
    bounds: float = 1e-3
    clip: float = 100.0
    bootstrap: bool = True
    mixed: bool = False

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("epochs", 1), ("patience", 1), ("max_holdout", 0), ("elites", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ContractError(f"FitConfig needs {name} ≥ {least}, but got {value}.")
        if not 0 <= self.holdout < 1:
            raise ContractError(
                f"FitConfig needs holdout, a share of the data, in [0, 1), but got {self.holdout}."
            )
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ContractError(f"FitConfig needs a finite {name} > 0, but got {getattr(self, name)}.")
        for name in ("improvement", "beta", "bounds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ContractError(f"FitConfig needs a finite {name} ≥ 0, but got {getattr(self, name)}.")
        if not self.decays or not all(0 <= decay < math.inf for decay in self.decays):
            raise ContractError(f"FitConfig needs one or more finite decays ≥ 0, but got {self.decays}.")


@dataclass(frozen=True)
class Epoch:
    """One epoch's outcome. train, holdout: (E,), loss on the training data and error on the holdout."""

    epoch: int
    train: list[float]
    holdout: list[float]
    improved: list[bool]


@dataclass
class Fit:
    """What a fit did.

    Attributes:
        epochs: one record each.
        best: (E,), the holdout error of the weights that were kept; inf where a member learned nothing in this fit.
        elites: indices of the members that answer.
        stopped: why it ended.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    elites: list[int] = field(default_factory=list)
    stopped: str = ""


class Trainer:
    """Fits one ensemble, again and again: the optimiser's state lives on between fits.

    Args:
        model: changed in place.
        config: see `FitConfig`.
    """

    def __init__(self, model: Ensemble, config: FitConfig | None = None):
        self.model, self.config = model, config or FitConfig()
        self.optimizer = _adam(model, self.config)

    def fit(
        self,
        y: Tensor,
        u: Tensor,
        y_next: Tensor,
        reward: Tensor | None = None,
        terminated: Tensor | None = None,
        *,
        generator: Generator,
        progress: Callable[[Epoch], None] | None = None,
    ) -> Fit:
        """Fit to N transitions; y, y_next: (N, ny), u: (N, nu), reward, terminated: (N,).

        A member that diverges, to what is not finite or to errors far above those at the start, ends with its best
        weights so far, and the others go on. One that learned nothing by then is no elite; if none did the whole
        model is as before.

        Raises:
            ContractError: too few transitions, wrong shapes, NaN or inf in the data, or a head without data.
        """
        model, config = self.model, self.config
        for name, learns, value in (
            ("reward", model.learns_reward, reward),
            ("terminated", model.learns_termination, terminated),
        ):
            if learns and value is None:
                raise ContractError(
                    f"This ensemble learns the {name}, so fit needs {name} (N,), but got None."
                )
        check_data(
            model,
            y,
            u,
            y_next,
            reward if model.learns_reward else None,
            terminated if model.learns_termination else None,
        )
        n = len(y)
        held = min(int(config.holdout * n), config.max_holdout)
        order = torch.randperm(n, generator=generator, device=generator.device)
        test, train = order[:held], order[held:]
        before = copy.deepcopy(model.state_dict())
        model.normalise(y[train], u[train], y_next[train], None if reward is None else reward[train])
        inputs = model.inputs(y, u)
        targets = model.targets(y, y_next, reward)
        ends = None if terminated is None else terminated.to(inputs)

        shape = (model.members, len(train))
        own = (
            torch.randint(len(train), shape, generator=generator, device=generator.device)
            if config.bootstrap and model.members > 1
            else torch.arange(len(train)).expand(shape)
        )
        own = train[own]  # (E, n): drawn once, else the members would see the same data in the end

        fit, best = Fit(), [math.inf] * model.members
        kept = _snapshot(model)
        waiting, diverged = 0, dict[int, int]()
        highest = torch.full_like(model.input_mean[:1], math.inf)
        if held:
            at_start = self._errors(inputs[test], targets[test], None if ends is None else ends[test])
            highest = BLOWN * at_start.nan_to_num(1.0, posinf=1.0).clamp(min=1.0)
        for epoch in range(config.epochs):
            shuffled = torch.rand(shape, generator=generator, device=generator.device).argsort(-1)
            own = own.gather(1, shuffled)
            losses = []
            for start in range(0, len(train), config.batch):
                batch = own[:, start : start + config.batch]
                loss = self._step(inputs[batch], targets[batch], None if ends is None else ends[batch])
                losses.append(loss)
            train_loss = torch.stack(losses).mean(0)
            errors = train_loss
            if held:
                errors = self._errors(inputs[test], targets[test], None if ends is None else ends[test])
            sound = torch.isfinite(train_loss) & (errors <= highest) & _finite(model)
            improved = [
                bool(ok) and (e < b - config.improvement * abs(b) if b < math.inf else True)
                for ok, e, b in zip(sound, errors.tolist(), best, strict=True)
            ]
            if not held:  # nothing to choose by: the newest finite weights
                improved = sound.tolist()
            for e, better in enumerate(improved):
                if better:
                    best[e] = float(errors[e])
                    _keep(kept, model, e)
            record = Epoch(epoch, train_loss.tolist(), errors.tolist(), improved)
            fit.epochs.append(record)
            if progress is not None:
                progress(record)
            for member in (~sound).nonzero().flatten().tolist():
                diverged.setdefault(member, epoch)
            waiting = 0 if any(improved) else waiting + 1
            if not sound.any():
                fit.stopped = "no member is left"
                break
            if config.patience is not None and held and waiting >= config.patience:
                fit.stopped = f"no member improved for {waiting} epochs"
                break
        else:
            fit.stopped = f"all {config.epochs} epochs are done"
        if diverged:
            when = ", ".join(f"member {e} diverged in epoch {epoch}" for e, epoch in diverged.items())
            fit.stopped += f"; {when}; the best weights before are kept"
            self.optimizer = _adam(model, config)  # its moments are spoilt
        model.load_state_dict(kept, strict=False)
        learned = sorted((e for e in range(model.members) if best[e] < math.inf), key=best.__getitem__)
        if learned:
            elites = sorted(learned[: config.elites])
            model.elites = torch.tensor(elites, device=model.elites.device)
        else:
            model.load_state_dict(before)
        fit.best, fit.elites = best, model.elites.tolist()
        return fit

    def _step(self, z: Tensor, t: Tensor, ends: Tensor | None) -> Tensor:
        """One step of Adam; the loss of each member (E,)."""
        model, config = self.model, self.config
        loss = losses(model, z, t, ends, beta=config.beta, mixed=config.mixed)
        total = loss.sum()
        if model.probabilistic:
            total = total + config.bounds * (model.max_logvar.sum() - model.min_logvar.sum())
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        for bound in (model.max_logvar, model.min_logvar):
            if bound.grad is not None:  # all members share the bounds: one that diverged must not spoil them
                bound.grad.nan_to_num_(0.0, 0.0, 0.0)
        _clip(model, config.clip)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _errors(self, z: Tensor, t: Tensor, ends: Tensor | None = None) -> Tensor:
        """Mean squared error of each member (E,), of normalised targets and of the probability of an end."""
        model, chunks = self.model, []
        goals = t if ends is None or not model.learns_termination else torch.cat([t, ends[:, None]], -1)
        for part, goal in zip(torch.split(z, 4096), torch.split(goals, 4096), strict=True):
            mean, _, logit = model.heads(model.net(part))
            said = mean if logit is None else torch.cat([mean, torch.sigmoid(logit)[..., None]], -1)
            chunks.append(((said - goal) ** 2).mean(-1))
        return torch.cat(chunks, -1).mean(-1)


def losses(
    model: Ensemble,
    z: Tensor,
    t: Tensor,
    ends: Tensor | None = None,
    *,
    beta: float = 0.0,
    mixed: bool = False,
) -> Tensor:
    """The loss of each member (E,) on normalised inputs z (E, B, nf) and targets t (E, B, nt).

    Gaussian: mean of (err² e^(−log σ²) + log σ²) σ^(2β), the last factor without a gradient of its own.
    Deterministic: mean of err². Termination: cross-entropy.
    """
    with torch.autocast(z.device.type, torch.bfloat16, enabled=mixed):
        out = model.net(z)
    mean, logvar, logit = model.heads(out.to(z))
    loss = (mean - t) ** 2
    if logvar is not None:
        loss = loss * torch.exp(-logvar) + logvar
        if beta:
            loss = loss * torch.exp(beta * logvar.detach())
    loss = loss.mean((-1, -2))
    if logit is not None:
        assert ends is not None
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
            logit, ends, reduction="none"
        ).mean(-1)
    return loss


def _adam(model: Ensemble, config: FitConfig) -> torch.optim.Adam:
    layers = len(model.net.weights)
    decays: Sequence[float] = config.decays if len(config.decays) == layers else config.decays[-1:] * layers
    groups = [
        {"params": [w], "weight_decay": decay} for w, decay in zip(model.net.weights, decays, strict=True)
    ]
    groups.append({"params": list(model.net.biases), "weight_decay": 0.0})
    if model.probabilistic:
        groups.append({"params": [model.max_logvar, model.min_logvar], "weight_decay": 0.0})
    return torch.optim.Adam(groups, lr=config.learning_rate, fused=True)


def _clip(model: Ensemble, largest: float) -> None:
    """Scale the gradient of each member down to a norm of at most `largest`."""
    grads = [p.grad for p in model.net.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).pow(2).sum(1) for g in grads]).sum(0).sqrt()  # (E,)
    scale = (largest / norms.clamp(min=largest))[:, None, None]
    if bool((scale < 1).any()):
        for g in grads:
            g.mul_(scale)


def _finite(model: Ensemble) -> Tensor:
    """Whether all weights of each member are finite, (E,)."""
    ok = torch.ones(model.members, dtype=torch.bool, device=model.elites.device)
    for p in model.net.parameters():
        ok &= torch.isfinite(p.flatten(1)).all(1)
    return ok & torch.isfinite(model.max_logvar).all() & torch.isfinite(model.min_logvar).all()


def _snapshot(model: Ensemble) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _keep(kept: dict[str, Tensor], model: Ensemble, e: int) -> None:
    """Copy member e, and the bounds that all share."""
    for name, p in model.named_parameters():
        if name.startswith("net."):
            kept[name][e] = p.detach()[e]
        else:
            kept[name].copy_(p.detach())


def check_data(
    model: Ensemble | LinearModel,
    y: Tensor,
    u: Tensor,
    y_next: Tensor,
    reward: Tensor | None = None,
    terminated: Tensor | None = None,
) -> None:
    """Raise ContractError unless these are N ≥ 2 transitions, of the shapes and of finite numbers that the model can take."""
    n, dtype = len(y), model.input_mean.dtype
    if n < 2:
        raise ContractError(f"fit needs at least 2 transitions, but got {n}.")
    largest = math.sqrt(torch.finfo(dtype).max) / 1e3
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "y": (y, (n, model.ny)),
        "u": (u, (n, model.nu)),
        "y_next": (y_next, (n, model.ny)),
        "reward": (reward, (n,)),
        "terminated": (terminated, (n,)),
    }
    for name, (value, shape) in wanted.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ContractError(f"fit needs {name} of shape {shape}, but got {tuple(value.shape)}.")
        size = value.reshape(n, -1).double().abs().amax(-1)
        bad = (~torch.isfinite(size)).nonzero().flatten()
        if len(bad):
            raise ContractError(
                f"fit needs finite data, but {name} holds NaN or inf in {len(bad)} of {n} rows, first in row "
                f"{int(bad[0])}. Leave these transitions out; the model was not changed."
            )
        if float(size.max()) > largest:
            raise ContractError(
                f"fit needs numbers up to {largest:.0e} in size, since the model squares them in {dtype}, but {name} is "
                f"{float(size.max()):.3g} in row {int(size.argmax())}. Use larger units; the model was not changed."
            )
