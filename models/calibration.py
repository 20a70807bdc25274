"""Is the uncertainty of a model honest? Coverage, likelihood and recalibration on data it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.special
import scipy.stats
import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.models.ensemble import Ensemble, mean_and_scale
from mbrl.models.propagation import MeanDynamics, TSInf

LEVELS = (0.5, 0.8, 0.95)
GRID = tuple(0.05 * i for i in range(1, 20))
"""The levels of the expected calibration error."""


@dataclass(frozen=True)
class Calibration:
    """How one-step predictions compare with the truth, over B transitions and n predicted numbers.

    A number that the model claims to know for certain throughout, such as one that did not vary in its data, has no
    share in what is told over all numbers.

    Attributes:
        nll: mean negative log-likelihood per number, of normalised targets.
        rmse: (n,), of the mean, in units of the targets.
        coverage: share of truths inside the central interval of each level, over all numbers.
        coverage_each: (levels, n), the same for each predicted number.
        expected_error: expected calibration error: mean |coverage − level| over 19 levels from 5 to 95 %.
        aleatoric, epistemic: mean share of the predicted variance.
        rank: Spearman's correlation of disagreement and actual error, over transitions; NaN without.

    Reference: Kuleshov et al. 2018, "Accurate uncertainties for deep learning using calibrated regression".
    """

    nll: float
    rmse: Tensor
    coverage: dict[float, float]
    coverage_each: Tensor
    expected_error: float
    aleatoric: float
    epistemic: float
    rank: float


@torch.no_grad()
def predictive(model: Ensemble, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, aleatoric and epistemic variance (B, n) of the targets: the ensemble as one Gaussian.

    Reference: Lakshminarayanan et al. 2017, the moments of the mixture.
    """
    parts = []
    for some_y, some_u in zip(torch.split(y, 8192), torch.split(u, 8192), strict=True):
        said = model.predict(some_y, some_u)
        parts.append((said.change.mean(0), said.aleatoric(), said.change.var(0, correction=0)))
    mean, aleatoric, epistemic = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, aleatoric, epistemic


def calibrate(
    model: Ensemble, y: Tensor, u: Tensor, y_next: Tensor, levels: Sequence[float] = LEVELS
) -> Calibration:
    """Measure the calibration on y (B, ny), u (B, nu), y_next (B, ny), which should be new to the model.

    Raises:
        ContractError: the model claims no uncertainty: it is deterministic with a single member, or nothing varied
            in its data.
    """
    error, variance, aleatoric, epistemic = _errors(model, y, u, y_next)
    if not bool((variance > 0).any()):
        raise ContractError(
            "calibrate needs a model with uncertainty, but this one is deterministic and has a single member, or "
            "nothing varied in its data. Use probabilistic=True or more members."
        )
    doubted = variance > 0
    numbers = doubted.any(0)
    z = torch.where(error == 0, 0.0, error / variance.sqrt())  # certain and right: 0 deviations, not 0 / 0
    scale = model.target_unit[: model.np]

    each = torch.stack([(z.abs() <= width).to(z).mean(0) for width in _widths(levels)])
    gaps = [
        abs(float((z[:, numbers].abs() <= w).to(z).mean()) - p)
        for p, w in zip(GRID, _widths(GRID), strict=True)
    ]
    nll = 0.5 * (z**2 + (variance / scale**2).log() + math.log(2 * math.pi))
    share = (epistemic / (aleatoric + epistemic))[doubted]
    return Calibration(
        nll=float(nll[doubted].mean()),
        rmse=(error**2).mean(0).sqrt(),
        coverage={p: float(c[numbers].mean()) for p, c in zip(levels, each, strict=True)},
        coverage_each=each,
        expected_error=sum(gaps) / len(gaps),
        aleatoric=float((1 - share).mean()),
        epistemic=float(share.mean()),
        rank=_rank(_overall(model, epistemic.sqrt()), _overall(model, error.abs())),
    )


def disagreement_and_error(model: Ensemble, y: Tensor, u: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor]:
    """How much the members disagree and how wrong their mean is, (B,) and (B,): means over the normalised targets."""
    error, _, _, epistemic = _errors(model, y, u, y_next)
    return _overall(model, epistemic.sqrt()), _overall(model, error.abs())


def _overall(model: Ensemble, size: Tensor) -> Tensor:
    """Sizes (B, n) in units of the targets as one number each (B,)."""
    return (size / model.target_unit[: model.np]).mean(-1)


def recalibrate(model: Ensemble, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
    """Set the temperature of each predicted number, in place, by held-out data; returns it (n,).

    It scales the aleatoric deviation, so rollouts through the model change with it, and is the one of
    1/30 … 30 with the smallest calibration error. (The likeliest one would be ruled by the few largest
    errors, as of contacts, and widen all intervals for their sake.) Where the members disagree by more than
    their mean errs no temperature is low enough; for that `interval_scale` scales both parts in predicted
    intervals. It cannot be had in rollouts, whose particles follow members.

    Reference: after Guo et al. 2017, "On calibration of modern neural networks", temperature scaling.
    Differs: minimises the expected calibration error instead of the likelihood.
    """
    mean, aleatoric, epistemic = predictive(model, y, u)
    error = (model.features.targets(y, y_next).to(mean) - mean).abs()
    old = model.temperature[: model.np].clone()

    def deviation(t: Tensor) -> Tensor:
        return ((t / old) ** 2 * aleatoric + epistemic).sqrt()

    best = _best(lambda t: error / deviation(t), torch.logspace(-1.5, 1.5, 201).to(error), old)
    model.temperature[: model.np] = best
    ratio = error / deviation(best)
    model.interval_scale.copy_(_best(lambda s: ratio / s, torch.logspace(-1.0, 1.0, 201).to(error), old))
    return best


def _best(ratio: Callable[[Tensor], Tensor], grid: Tensor, like: Tensor) -> Tensor:
    """Of the numbers in `grid`, for each predicted number that whose |error| / deviation (B, n) is closest to normal."""
    levels = list(zip(GRID, _widths(GRID), strict=True))
    best, lowest = torch.ones_like(like), torch.full_like(like, torch.inf)
    for number in torch.cat([torch.ones_like(grid[:1]), grid]):  # 1 stays where none is closer
        z = ratio(number)
        gap = torch.stack([((z <= w).to(z).mean(0) - p).abs() for p, w in levels]).mean(0)
        best, lowest = torch.where(gap < lowest, number, best), torch.minimum(gap, lowest)
    return best


@dataclass(frozen=True)
class HorizonError:
    """Errors of open-loop predictions over h = 1 … L steps, in standard deviations of the data, or as they are where
    the data do not vary; or in other units that were given.

    Attributes:
        error: (L,), root mean square error of the mean prediction.
        spread: (L,), root mean square deviation of the particles.
    """

    error: Tensor
    spread: Tensor


@torch.no_grad()
def horizon_error(
    model: Ensemble,
    y: Tensor,
    u: Tensor,
    *,
    particles: int = 20,
    unit: Tensor | None = None,
    generator: Generator,
) -> HorizonError:
    """Compare rollouts from y (N, 0) under u (N, L, nu) with what really happened, y (N, L+1, ny).

    Args:
        unit: (ny,), of the errors, to compare several sets of data.
    """
    rows = y.reshape(-1, y.shape[-1])
    varies = mean_and_scale(rows, torch.finfo(rows.dtype).eps)[1] > 0
    scale = torch.where(varies, rows.std(0), 1.0) if unit is None else unit
    mean, draw = MeanDynamics(model), TSInf(model).realize((particles, 1), u.shape[1], generator=generator)
    at, some = y[:, 0], y[:, 0].expand(particles, *y[:, 0].shape)
    error, spread = [], []
    for k in range(u.shape[1]):
        at, some = mean.step(at, u[:, k], k), draw.step(some, u[:, k], k)
        error.append((((at - y[:, k + 1]) / scale) ** 2).mean().sqrt())
        spread.append((some.std(0) / scale).pow(2).mean().sqrt())
    return HorizonError(torch.stack(error), torch.stack(spread))


def _errors(model: Ensemble, y: Tensor, u: Tensor, y_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, aleatoric, epistemic = predictive(model, y, u)
    error = model.features.targets(y, y_next).to(mean) - mean
    return error, (aleatoric + epistemic) * model.interval_scale**2, aleatoric, epistemic


def _widths(levels: Sequence[float]) -> list[float]:
    """Half the width of the central interval of a standard normal number that holds each share of it."""
    return [float(scipy.special.ndtri(0.5 + p / 2)) for p in levels]


def _rank(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; NaN where one of the two does not vary."""
    if float(a.std()) == 0 or float(b.std()) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(a.cpu(), b.cpu()).statistic)
