"""Fit an ensemble to a stored data set, and report how honest it is on data that it has not seen."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Generator, Tensor

from mbrl.data import Replay, Transition, runs
from mbrl.datasets import load_dataset
from mbrl.envs import make_training_world
from mbrl.errors import ContractError, DataError, UnknownName
from mbrl.experiments.calibration_plots import plot_calibration
from mbrl.experiments.training import check_device
from mbrl.features import Features
from mbrl.models import (
    Calibration,
    Ensemble,
    Epoch,
    FitConfig,
    Trainer,
    calibrate,
    disagreement_and_error,
    horizon_error,
    recalibrate,
    save_ensemble,
)
from mbrl.models.calibration import GRID, LEVELS
from mbrl.models.training import check_data
from mbrl.runs import RunFolder

_ENOUGH = 20  # transitions, for a calibration that says anything
_WINDOWS = 500
_PLAIN_EVERY = 2.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fit an ensemble to a data set, save it, and report its calibration.

    Attributes:
        dataset: the data set's folder.
        out: folder for the model, the losses of each epoch, the report and its plots.
        world: whose features the model gets; the world that the data set names unless given, `none` for
            every number of y as it is.
        dt: seconds per step, where the data set does not tell.
        members, hidden: of the ensemble.
        learn_task: learn reward and end as well.
        fit: how it is fitted.
        test: share of the transitions that the fit does not see: by one half the deviations are
            recalibrated, on the other the report is made.
        recalibrate: whether to.
        horizon: steps of the open-loop predictions in the report.
        seed: of everything.
        device: of the fit.
    """

    dataset: tyro.conf.Positional[Path]
    out: Path
    world: str | None = None
    dt: float | None = None
    members: int = 5
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    learn_task: bool = False
    fit: FitConfig = field(default_factory=FitConfig)
    test: float = 0.2
    recalibrate: bool = True
    horizon: int = 30
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 0 <= self.test < 1 or self.horizon < 1 or self.seed < 0:
            raise ContractError(
                "A fit needs 0 ≤ test < 1, horizon ≥ 1 and seed ≥ 0, but got "
                f"{self.test}, {self.horizon} and {self.seed}."
            )
        if self.seed >= 2**63 or min(self.hidden, default=1) < 1 or self.dt == math.inf:
            raise ContractError(
                "A fit needs seed < 2**63, hidden ≥ 1 and a finite dt, but got "
                f"{self.seed}, {self.hidden} and {self.dt}."
            )
        check_device(self.device)


def main(config: Config, console: Console | None = None) -> Path:
    """Fit, report, and return the run's folder.

    Raises:
        DataError: the data set cannot be used.
        UnknownName: no world is called so.
        ContractError: too few transitions, or a fit that diverged before it had learned anything.
    """
    console = console or Console()
    dataset = load_dataset(config.dataset)
    # Not rounded to float32, which would lose small changes of large numbers.
    rows = dataset.transition.to("cpu", torch.promote_types(dataset.transition.y.dtype, torch.float32))
    features = features_of(config, dataset.metadata, rows.y.shape[-1])
    dt = dataset.metadata.get("dt") if config.dt is None else config.dt
    if not isinstance(dt, int | float):
        raise ContractError(f"{config.dataset} does not tell its dt. Give it: --dt 0.05, in seconds.")
    generator = torch.Generator(config.device).manual_seed(config.seed)
    model = Ensemble(
        rows.y.shape[-1],
        rows.u.shape[-1],
        dt,
        features=features,
        members=config.members,
        hidden=config.hidden,
        reward=config.learn_task,
        termination=config.learn_task,
        generator=torch.Generator().manual_seed(config.seed),
    ).to(config.device)
    model.world = dataset.metadata.get("world") if config.world in (None, "none") else config.world
    train, tune, test = (
        part.to(config.device)
        for part in split(rows, config.test, torch.Generator().manual_seed(config.seed))
    )
    task = (train.reward, train.terminated) if config.learn_task else ()
    learned = (train.y, train.u, train.y_next, *task)
    check_data(model, *learned)  # before there is a folder

    losses = [f"{kind}_{e}" for kind in ("train", "holdout") for e in range(config.members)]
    with RunFolder(config.out, ("epoch", *losses)) as folder:
        folder.save_config(config, algorithm="fit")
        console.print(
            f"{len(train.reward)} of {len(rows.reward)} transitions of {config.dataset} -> {folder.path}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        with Losses(console, config.members, config.fit.epochs) as progress:

            def log(epoch: Epoch) -> None:
                folder.log(
                    dict(zip(("epoch", *losses), (epoch.epoch, *epoch.train, *epoch.holdout), strict=True))
                )
                progress.show(epoch)

            fit = Trainer(model, config.fit).fit(*learned, generator=generator, progress=log)
        if not any(map(math.isfinite, fit.best)):
            raise ContractError(
                f"The fit gave no model: {fit.stopped}, and there were none before. Nothing was saved. "
                "Lower the learning rate, --fit.learning-rate, or look for outliers in the data."
            )
        console.print(f"Fitted: {fit.stopped}.", highlight=False)
        said, plot = assess(config, model, tune, test, generator=generator)
        report = {
            "transitions": {
                "fitted": len(train.reward),
                "recalibrated": len(tune.reward) if config.recalibrate else 0,
                "reported": len(test.reward),
            },
            "fit": {
                "epochs": len(fit.epochs),
                "stopped": fit.stopped,
                "best": fit.best,
                "elites": fit.elites,
            },
            **said,
        }
        saved = save_ensemble(folder.path / "model", model)
        (folder.path / "report.json").write_text(
            json.dumps(json_types(report), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        if plot is not None:  # last: the model does not depend on it
            plot(folder.path / "calibration.png")
    show(report, console)
    console.print(
        f"The model, for mbrl.models.load_ensemble: {saved.parent}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return folder.path


def features_of(config: Config, metadata: Any, ny: int) -> Features:
    """The features of the world that the config or the data set names, or the default ones."""
    name = metadata.get("world") if config.world is None else config.world
    if name is None or name == "none":
        return Features(ny)
    try:
        features = make_training_world(str(name)).features
    except UnknownName as error:
        if config.world is not None:
            raise
        raise DataError(
            f"{config.dataset} was recorded in a world that is not here: {error} Name another that measures the "
            "same y, --world NAME, or take every number as it is, --world none."
        ) from error
    if features.ny != ny:
        raise DataError(
            f"The world {name} has ny = {features.ny}, but the data set {config.dataset} has {ny}. Name another, "
            "--world NAME, or take every number as it is, --world none."
        )
    return features


def split(rows: Transition, share: float, generator: Generator) -> tuple[Transition, Transition, Transition]:
    """Rows to fit, to recalibrate and to report on, the last two of half the share each.

    Episodes stay together but for two cuts: neighbours in time are too alike to be test and training data.
    """
    _, episode = torch.unique(rows.episode, return_inverse=True)
    place = torch.randperm(int(episode.max()) + 1, generator=generator)
    rows = rows[place[episode].argsort(stable=True)]
    n, held = len(rows.reward), int(share * len(rows.reward) / 2)
    return rows[: n - 2 * held], rows[n - 2 * held : n - held], rows[n - held :]


def assess(
    config: Config, model: Ensemble, tune: Transition, test: Transition, *, generator: Generator
) -> tuple[dict[str, Any], Callable[[Path], None] | None]:
    """Recalibrate the model, in place, and tell how honest it is, in numbers and by what draws them to a file."""
    held = len(test.reward)
    if held < _ENOUGH:
        note = f"Only {held} transitions are held out to report on, so the model is not calibrated."
        return {"note": note}, None
    if not bool(model.target_scale[: model.np].any()):
        note = "Every step in the data is the same, so the model knows it for certain and there is nothing to calibrate."
        return {"note": note}, None
    levels, data = (*LEVELS, *GRID), (test.y, test.u, test.y_next)
    found = {"as fitted": calibrate(model, *data, levels=levels)}
    if config.recalibrate:
        recalibrate(model, tune.y, tune.u, tune.y_next)
        found["recalibrated"] = calibrate(model, *data, levels=levels)
    try:
        horizon = horizon_error(
            model, *windows(test, config.horizon, generator=generator), generator=generator
        )
        open_loop: dict[str, Any] = {"error": horizon.error.tolist(), "spread": horizon.spread.tolist()}
    except ContractError as disorder:  # rows that are not in order of time
        horizon, open_loop = None, {"note": str(disorder)}
    disagreement, error = disagreement_and_error(model, *data)
    plot = functools.partial(
        plot_calibration,
        coverage={name: {level: said.coverage[level] for level in GRID} for name, said in found.items()},
        horizon=horizon,
        disagreement=disagreement.cpu(),
        error=error.cpu(),
        dt=model.dt,
    )
    report = {
        "calibration": {name: numbers(said) for name, said in found.items()},
        "temperature": model.temperature.tolist(),
        "open_loop": open_loop,
    }
    return report, plot


def windows(rows: Transition, length: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Some unbroken pieces of episodes, y (N, L+1, ny) and u (N, L, nu), of `length` steps or the longest there are."""
    _, run = runs(rows)
    replay = Replay(len(rows.reward), rows.y.shape[-1], rows.u.shape[-1], rows.y.device, rows.y.dtype)
    replay.add(rows)
    y, u = replay.trajectories(min(length, int(run.bincount().max())))
    some = torch.randperm(len(y), generator=generator, device=generator.device)[:_WINDOWS]
    return y[some], u[some]


def numbers(said: Calibration) -> dict[str, Any]:
    return {
        "coverage": {f"{level:g}": said.coverage[level] for level in LEVELS},
        "coverage_each": said.coverage_each[: len(LEVELS)].tolist(),
        "expected_error": said.expected_error,
        "nll": said.nll,
        "rmse": said.rmse.tolist(),
        "aleatoric": said.aleatoric,
        "epistemic": said.epistemic,
        "rank": said.rank,
    }


def json_types(value: Any) -> Any:
    """With None for numbers that are not finite, as of rollouts that diverge: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: json_types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [json_types(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(report: dict[str, Any], console: Console) -> None:
    """Print what `assess` found."""
    if "note" in report:
        console.print(f"[yellow]note:[/yellow] {report['note']}", highlight=False, soft_wrap=True)
        return
    found = report["calibration"]
    table = Table("on held-out data", *found)
    for level in LEVELS:
        inside = [f"{100 * said['coverage'][f'{level:g}']:.1f} %" for said in found.values()]
        table.add_row(f"truths inside {100 * level:.0f} % intervals", *inside)
    for name, key in (("expected calibration error", "expected_error"), ("negative log-likelihood", "nll")):
        table.add_row(name, *(f"{said[key]:.3f}" for said in found.values()))
    said = list(found.values())[-1]
    for name, text in (
        ("ignorance, share of the variance", f"{100 * said['epistemic']:.0f} %"),
        ("rank correlation, disagreement and error", f"{said['rank']:.2f}"),
    ):
        table.add_row(name, *[""] * (len(found) - 1), text)
    console.print(table)


class Losses:
    """Losses per member while a fit runs: a live table on a terminal, a line every two seconds elsewhere."""

    def __init__(self, console: Console, members: int, epochs: int):
        self.console = console
        self._bar = Progress(TextColumn("epoch"), BarColumn(bar_width=20), MofNCompleteColumn())
        self._task = self._bar.add_task("", total=epochs)
        self._best: list[tuple[float, int] | None] = [None] * members
        self._live = Live(self._bar, console=console, refresh_per_second=4) if console.is_terminal else None
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, epoch: Epoch) -> None:
        table = Table("member", "training loss", "holdout error", "best", "in epoch")
        for e, (train, error, improved) in enumerate(
            zip(epoch.train, epoch.holdout, epoch.improved, strict=True)
        ):
            if improved:
                self._best[e] = error, epoch.epoch
            best, when = self._best[e] or (math.nan, "")
            table.add_row(f"{e}", f"{train:.4f}", f"{error:.5f}", f"{best:.5f}", f"{when}")
        self._bar.update(self._task, completed=epoch.epoch + 1)
        if self._live:
            self._live.update(Group(self._bar, table))
        elif time.monotonic() - self._shown > _PLAIN_EVERY:
            self._shown = time.monotonic()
            errors = " ".join(f"{error:.5f}" for error in epoch.holdout)
            self.console.print(f"epoch {epoch.epoch}: holdout {errors}", highlight=False, soft_wrap=True)
