"""Is the uncertainty of an ensemble what it says? On data whose noise is known.

    python -m mbrl.experiments.benchmarks.honest_uncertainty      # table, docs/uncertainty.png

Changes are sin 2y plus Gaussian noise of deviation 0.05 + 0.25 (1 + y/2)²/4 for y in (-2, 2); outside there are no
data. The aleatoric part should be that deviation, the epistemic part large outside and fall with more data; that of
an estimate from n points falls as 1/√n.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.models import Ensemble, FitConfig, Trainer

EDGE = 2.0
BATCH, STEPS = 512, 3_000
"""Of the gradient, however few the data: the noise of small batches would hide what many data are worth."""


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000)
    seeds: int = 3
    members: int = 8
    out: Path = RESULTS / "honest_uncertainty.json"
    picture: Path = Path("docs/uncertainty.png")


def noise(y: Tensor) -> Tensor:
    """The deviation of the data."""
    return 0.05 + 0.25 * (1 + y / EDGE) ** 2 / 4


def data(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    y = EDGE * (2 * torch.rand(n, 1, generator=generator) - 1)
    u = 2 * torch.rand(n, 1, generator=generator) - 1  # has no effect
    return y, u, y + torch.sin(2 * y) + noise(y) * torch.randn(n, 1, generator=generator)


def learn(n: int, seed: int, members: int) -> tuple[Ensemble, Tensor, Tensor]:
    """An ensemble fitted to n points, and the points with their changes."""
    generator = torch.Generator().manual_seed(seed)
    y, u, y_next = data(n, generator)
    model = Ensemble(1, 1, 0.1, members=members, hidden=(64, 64), generator=generator)
    per_epoch = max(1, n * 4 // 5 // BATCH)  # a fifth is held out
    Trainer(model, FitConfig(batch=BATCH, epochs=STEPS // per_epoch, patience=None)).fit(
        y, u, y_next, generator=generator
    )
    return model, y[:, 0], (y_next - y)[:, 0]


@torch.no_grad()
def deviations(model: Ensemble, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, aleatoric and epistemic deviation of the predicted change, (N,) each, at y (N,)."""
    said = model.predict(y[:, None], torch.zeros_like(y)[:, None])
    return said.change.mean(0)[:, 0], said.aleatoric().sqrt()[:, 0], said.epistemic().sqrt()[:, 0]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    inside, outside = torch.linspace(-EDGE, EDGE, 81), torch.tensor([-2 * EDGE, 2 * EDGE])
    table = Table("n", "error of the aleatoric part", "epistemic inside", "× √n", "epistemic outside")
    rows = []
    for n in config.sizes:
        found = []
        for seed in range(config.seeds):
            model, *_ = learn(n, seed, config.members)
            _, aleatoric, epistemic = deviations(model, inside)
            far = deviations(model, outside)[2]
            off = ((aleatoric - noise(inside)).abs() / noise(inside)).mean()
            found.append((float(off), float(epistemic.mean()), float(far.mean())))
        off, near, away = (sum(column) / len(column) for column in zip(*found, strict=True))
        rows.append({"n": n, "aleatoric_error": off, "epistemic_inside": near, "epistemic_outside": away})
        table.add_row(
            f"{n:,}", f"{100 * off:.0f} %", f"{near:.4f}", f"{near * math.sqrt(n):.2f}", f"{away:.2f}"
        )
    Console().print(table)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "picture")}
    write(config.out, {"rows": rows, "config": settings, "machine": machine()})
    draw(config, rows)


def draw(config: Config, rows: list[dict[str, float]]) -> None:
    """What one ensemble says, its two uncertainties against the truth, and how the epistemic one shrinks."""
    model, y, change = learn(1_000, 0, config.members)
    axis = torch.linspace(-2 * EDGE, 2 * EDGE, 161)
    mean, aleatoric, epistemic = deviations(model, axis)
    whole = (aleatoric**2 + epistemic**2).sqrt()
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(y, change, ".", markersize=2, color="0.6", label="data")
    left.plot(axis, mean, color="#1f6fb4", label="mean of the members")
    left.fill_between(
        axis, mean - 2 * whole, mean + 2 * whole, color="#1f6fb4", alpha=0.2, label="±2 deviations"
    )
    left.set(xlabel="y", ylabel="change of y", ylim=(-3, 3))
    left.set_title("A thousand points", loc="left")
    middle.plot(inside := torch.linspace(-EDGE, EDGE, 81), noise(inside), "k--", label="noise of the data")
    middle.plot(axis, aleatoric, color="#d07a1f", label="aleatoric")
    middle.plot(axis, epistemic, color="#1f6fb4", label="epistemic")
    middle.axvspan(-EDGE, EDGE, color="0.5", alpha=0.1)
    middle.set(xlabel="y (data in the grey part)", ylabel="standard deviation", yscale="log")
    middle.set_title("Two kinds of uncertainty", loc="left")
    sizes = [row["n"] for row in rows]
    near = [row["epistemic_inside"] for row in rows]
    right.loglog(sizes, near, marker="o", color="#1f6fb4", label="epistemic, mean inside the data")
    right.loglog(sizes, [near[0] * math.sqrt(sizes[0] / n) for n in sizes], "k--", label="∝ 1/√n")
    right.set(xlabel="points", ylabel="standard deviation")
    right.set_title("More data", loc="left")
    for ax in (left, middle, right):
        ax.grid(True, which="major", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    figure.savefig(config.picture, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
