"""How honest a model is about what it does not know, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mbrl.models import HorizonError

_BINS = 12


def plot_calibration(
    path: Path,
    coverage: Mapping[str, Mapping[float, float]],
    horizon: HorizonError | None,
    disagreement: Tensor,
    error: Tensor,
    dt: float,
) -> None:
    """Write a PNG of three panels: coverage of each level, error and spread over the horizon, disagreement and error.

    Args:
        path: of the file.
        coverage: name of a model -> level -> share of truths inside.
        horizon: None leaves its panel out.
        disagreement, error: (B,), of `disagreement_and_error`.
        dt: seconds per step.
    """
    panels = 2 if horizon is None else 3
    figure = Figure(figsize=(4.2 * panels, 3.9), layout="constrained")
    axes = list(figure.subplots(1, panels))
    _coverage(axes[0], coverage)
    if horizon is not None:
        _horizon(axes[1], horizon, dt)
    _disagreement(axes[-1], disagreement, error)
    for ax in axes:
        ax.grid(True, which="major", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _coverage(ax: Axes, coverage: Mapping[str, Mapping[float, float]]) -> None:
    ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="honest")
    for name, shares in coverage.items():
        ax.plot(list(shares), list(shares.values()), marker="o", markersize=3, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="level of the interval", ylabel="share of truths inside")
    ax.set_title("Coverage", loc="left")
    ax.legend(frameon=False, fontsize=9)


def _horizon(ax: Axes, horizon: HorizonError, dt: float) -> None:
    steps = range(1, len(horizon.error) + 1)
    ax.plot(steps, horizon.error, label="error of the mean")
    ax.plot(steps, horizon.spread, label="spread of the particles")
    ax.set(xlabel=f"steps predicted (of {dt:g} s)", ylabel="standard deviations of the data")
    ax.set_xlim(left=1)
    ax.set_ylim(bottom=0)
    ax.set_title("Open-loop prediction", loc="left")
    ax.legend(frameon=False, fontsize=9)


def _disagreement(ax: Axes, disagreement: Tensor, error: Tensor) -> None:
    """All transitions but the largest hundredth, and the median error of those that are alike in disagreement.

    Numbers that are not finite have no place in it.
    """
    finite = torch.isfinite(disagreement) & torch.isfinite(error)
    disagreement, error = disagreement[finite], error[finite]
    ax.set(xlabel="disagreement of the members", ylabel="error of their mean")
    ax.set_title("Disagreement and error", loc="left")
    if not len(error):
        return
    shown = torch.linspace(0, len(error) - 1, min(len(error), 3_000)).long()
    ax.plot(disagreement[shown], error[shown], ".", markersize=4, alpha=0.35, color="0.45", markeredgewidth=0)
    bins = [part for part in disagreement.argsort().tensor_split(_BINS) if len(part)]
    medians = [(float(disagreement[part].median()), float(error[part].median())) for part in bins]
    ax.plot(
        *zip(*medians, strict=True), marker="o", markersize=4, label=f"medians of {len(bins)} equal parts"
    )
    right, top = (max(float(values.float().quantile(0.99)), 1e-12) for values in (disagreement, error))
    ax.set(xlim=(0, 1.02 * right), ylim=(0, 1.02 * top))
    ax.legend(frameon=False, fontsize=9, loc="upper left")
