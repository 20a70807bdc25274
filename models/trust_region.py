"""Plans that stay where a learned model has seen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mbrl.errors import ContractError, UnsupportedProblem
from mbrl.features import Features
from mbrl.models.bayesian import BayesianModel
from mbrl.models.ensemble import Ensemble
from mbrl.models.exported import Exported
from mbrl.models.linear import LinearGaussian, LinearModel
from mbrl.models.propagation import MeanDynamics, Propagation
from mbrl.problem import Constraint


@dataclass(frozen=True)
class TrustRegion:
    """g = ‖(z − mean) / scale‖² / n − radius², over the n numbers z that a model sees of y, and u.

    At the end, where there is no u, over those of y. Along the path, data have g + radius² = 1 on average.

    Attributes:
        mean, scale: of z in the data.
    """

    features: Features
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    radius: float

    def __call__(self, y: Tensor, u: Tensor | None, k: int | Tensor | None, p: Tensor | None) -> Tensor:
        z = self.features.inputs(y)
        z = z if u is None else torch.cat([z, u], -1)
        n = z.shape[-1]
        mean, scale = (torch.tensor(v[:n], dtype=torch.float64).to(z) for v in (self.mean, self.scale))
        return (((z - mean) / scale) ** 2).mean(-1, keepdim=True) - self.radius**2


def trust_region(
    model: Ensemble | MeanDynamics | Propagation | LinearModel | LinearGaussian | BayesianModel | Exported,
    radius: float,
    *,
    soft: float | None = None,
    at: Literal["path", "terminal"] = "path",
) -> Constraint:
    """A constraint that keeps what the model sees within `radius` standard deviations of its data, root-mean-squared.

    It is an ellipsoid about the mean, in the units of the model's normaliser: all that is known of the data after a fit.
    Built from the normaliser as it is now; build it anew after a fit. An input that did not vary has the scale 1.

    Args:
        radius: 1 is as far as the data are on average.
        soft: weight of an exact penalty, or None: it must hold.
        at: along the path, for y and u of the steps 0 … H−1; or at the end, for y.

    Raises:
        ContractError: the radius is not positive and finite.
        UnsupportedProblem: the model has no normaliser.
    """
    if not 0 < radius < float("inf"):
        raise ContractError(
            f"trust_region needs a finite radius > 0, in standard deviations, but got {radius}."
        )
    holder: object = model
    if isinstance(holder, Exported):
        holder = holder.model
    if isinstance(holder, (MeanDynamics, Propagation, LinearGaussian)):
        holder = holder.model
    if isinstance(holder, BayesianModel):
        holder = holder.center
    if not isinstance(holder, (Ensemble, LinearModel)):
        raise UnsupportedProblem(
            f"trust_region needs a learned model with a normaliser, such as an Ensemble or a LinearModel, but got "
            f"{type(model).__name__}."
        )
    mean, scale = (tuple(v.double().tolist()) for v in (holder.input_mean, holder.input_scale))
    return Constraint(
        TrustRegion(holder.features, mean, scale, radius), at=at, soft=soft, name="trust region"
    )
