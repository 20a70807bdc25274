"""Which hyper-parameters of a planner pay, on this model and task? A search at a fixed budget per plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape

from mbrl.envs import WORLDS, World, make_world
from mbrl.errors import ContractError, MbrlError, UnknownName
from mbrl.experiments.cells import ANALYTIC, SIMULATOR, Cell, fingerprint, problem_of
from mbrl.experiments.episodes import Episode, run_episodes
from mbrl.experiments.interrupts import stop_on_interrupt
from mbrl.experiments.learned import load_model
from mbrl.experiments.spaces import Choice, Point, Range, default_of, planner_of, space_of
from mbrl.experiments.tune_report import Confirmation, write_results
from mbrl.experiments.tune_study import Asked, Study, Trial, best_of
from mbrl.mpc import MPC
from mbrl.planners import SamplingPlanner
from mbrl.runs import plain

_FRESH = 1_000  # the first seed of those that confirm the winner, after that of the search
_BATCH = 10  # episodes planned together


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tune a planner's hyper-parameters at equal work per plan; leaves report.html, best.json and trials.csv.

    Every trial spends the same steps of the model on a plan (--evaluations), or the same time (--budget-ms). The first
    one has the planner's defaults; the winner is confirmed against them on fresh seeds. What is finished is kept in the
    folder: the same command goes on after a kill, and with more --trials it adds to them.

    Attributes:
        planner: one that samples, see `mbrl list`.
        env: the world, see `mbrl list`.
        model: what is planned on: simulator, analytic, or the folder of a learned model.
        evaluations: steps of the model that a plan may take.
        budget_ms: milliseconds that a plan may take, instead. Results then depend on the machine.
        horizon: steps of a plan.
        horizons: tune the horizon too, from the first to the second; the population follows it.
        steps: control steps of an episode, at most.
        seeds: starts of each trial, the same for all.
        trials: in all, those that the folder already has included.
        minutes: begin no trial after so many, if given; the winner is still confirmed.
        fresh: seeds that no trial has seen, for the winner and the defaults.
        seed: of the sampler, and the first of the starts.
        propagation: how the uncertainty of a learned model enters: mean (none), ts1, tsinf or moments.
        particles: of each candidate, where they are drawn.
        threads: of simulator and networks.
        out: the folder; runs/tune-ENV-PLANNER unless given.
    """

    planner: str
    env: str = "cart-pole"
    model: str = SIMULATOR
    evaluations: int | None = None
    budget_ms: float | None = None
    horizon: int = 30
    horizons: tuple[int, int] | None = None
    steps: int = 200
    seeds: int = 3
    trials: int = 50
    minutes: float | None = None
    fresh: int = 20
    seed: int = 0
    propagation: Literal["mean", "ts1", "tsinf", "moments"] = "mean"
    particles: int = 5
    threads: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.env not in WORLDS:
            raise UnknownName("world", self.env, WORLDS)
        if (self.evaluations is None) == (self.budget_ms is None):
            given = "neither" if self.evaluations is None else "both"
            raise ContractError(
                "Tuning needs the budget of a plan, --evaluations N steps of the model or --budget-ms T, "
                f"but got {given}."
            )
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(f"Tuning needs a finite budget_ms > 0, but got {self.budget_ms}.")
        if self.trials < 1 or (self.minutes is not None and not self.minutes > 0):
            raise ContractError(
                f"Tuning needs trials ≥ 1 and minutes > 0, if any, but got {self.trials} and {self.minutes}."
            )
        if min(self.horizon, self.steps, self.particles, self.threads) < 1 or self.seed < 0:
            raise ContractError(
                "Tuning needs horizon, steps, particles and threads ≥ 1 and seed ≥ 0, but got "
                f"{self.horizon}, {self.steps}, {self.particles}, {self.threads} and {self.seed}."
            )
        if not 1 <= self.seeds <= _FRESH or self.fresh < 2:
            raise ContractError(
                f"Tuning needs 1 to {_FRESH} seeds and 2 fresh ones or more, but got {self.seeds} and {self.fresh}."
            )
        if self.horizons is not None and not 1 <= self.horizons[0] < self.horizons[1]:
            raise ContractError(f"Tuning needs horizons 1 ≤ first < second, but got {self.horizons}.")
        space_of(self.planner, self.range, self.drawn, evaluations=self.evaluations)

    @property
    def range(self) -> tuple[int, int]:
        """The shortest and the longest horizon."""
        return self.horizons or (self.horizon, self.horizon)

    @property
    def learned(self) -> bool:
        return self.model not in (SIMULATOR, ANALYTIC)

    @property
    def drawn(self) -> int:
        """Particles of each candidate."""
        return self.particles if self.learned and self.propagation != "mean" else 1

    @property
    def folder(self) -> Path:
        return self.out or Path("runs", f"tune-{self.env}-{self.planner}")


@dataclass(frozen=True)
class Search:
    """A configuration with what follows from it."""

    config: Config

    @functools.cached_property
    def world(self) -> World:
        return make_world(self.config.env)

    @functools.cached_property
    def cell(self) -> Cell:
        config = self.config
        return Cell(
            env=config.env,
            model=config.model,
            fingerprint=fingerprint(load_model(Path(config.model))) if config.learned else None,
            planner=config.planner,
            budget="evaluations" if config.budget_ms is None else "ms",
            amount=float(config.evaluations or config.budget_ms or 0.0),
            horizon=config.horizon,
            steps=config.steps,
            propagation=config.propagation if config.learned else "mean",
            particles=config.drawn,
            threads=config.threads,
        )

    @functools.cached_property
    def space(self) -> dict[str, Range | Choice]:
        config = self.config
        return space_of(config.planner, config.range, config.drawn, evaluations=config.evaluations)

    @property
    def default(self) -> dict[str, Any]:
        return default_of(self.config.planner, self.space, self.config.horizon)

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.seeds)

    @property
    def fresh(self) -> range:
        first = self.config.seed + _FRESH
        return range(first, first + self.config.fresh)

    def about(self) -> dict[str, Any]:
        """What every trial depends on, as JSON types."""
        cell = dataclasses.asdict(self.cell)
        if self.config.learned:  # wherever it lies
            del cell["model"]
        if self.config.horizons:
            cell["horizons"] = self.config.horizons
        space = {name: dataclasses.asdict(kind) for name, kind in self.space.items()}
        about = {**cell, "seeds": self.config.seeds, "seed": self.config.seed, "space": space}
        plain_about: dict[str, Any] = json.loads(json.dumps(about))
        return plain_about

    def horizon(self, point: Point) -> int:
        return int(point.get("horizon", self.config.horizon))

    def planner(self, point: Point) -> SamplingPlanner[Any]:
        config = self.config
        return planner_of(
            config.planner,
            point,
            self.horizon(point),
            config.drawn,
            evaluations=config.evaluations,
            budget_ms=config.budget_ms,
        )

    def groups(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        """Episodes are planned together, but one after another where time counts."""
        size = 1 if self.cell.timed else _BATCH
        return [seeds[i : i + size] for i in range(0, len(seeds), size)]

    def play(self, point: Point, seeds: Sequence[int]) -> list[Episode]:
        """An episode from each seed in the true world."""
        planner = self.planner(point)
        cell = dataclasses.replace(self.cell, horizon=self.horizon(point))
        problem, estimator = problem_of(cell, self.world, planner)
        generator = torch.Generator().manual_seed(seeds[0])
        policy = MPC(problem, planner, estimator=estimator, generator=generator)
        steps, threads = self.config.steps, self.config.threads
        return run_episodes(self.world, policy, seeds, steps=steps, audit_every=0, threads=threads)


def main(config: Config, console: Console | None = None) -> Path:
    """Try what is missing, confirm the winner and write the report; returns the folder.

    Ctrl-C or SIGTERM ends it after the current trial: everything is written, then KeyboardInterrupt is raised.

    Raises:
        ContractError: the folder holds another search.
        UnsupportedProblem: the planner cannot use the model.
        MbrlError: no trial gave a return.
    """
    console = console or Console()
    torch.set_num_threads(config.threads)
    search = Search(config)
    problem_of(search.cell, search.world, search.planner(search.default))  # refused here, not in every trial
    with Study(config.folder, search.about(), search.space, first=search.default, seed=config.seed) as study:
        _greet(search, study, console)
        with stop_on_interrupt() as stop:
            _try(search, study, console, stop)
            trials = study.trials()
            best = best_of(trials)
            confirmation = None
            if best and not stop.is_set():
                confirmation = _confirm(search, study, best, console, stop)
            report = write_results(search, study, trials, confirmation)
        if best is None:
            raise MbrlError(
                f"None of the {len(trials)} trials gave a return, the last because: "
                f"{trials[-1].facts.get('why')} See {report.with_name('trials.csv')}."
            )
        if confirmation is not None:
            for line in confirmation.words():
                console.print(escape(line), highlight=False, soft_wrap=True)
        told = json.loads(report.with_name("best.json").read_text(encoding="utf-8"))
        console.print(f"Use it: [bold]{escape(told['command'])}[/bold]", highlight=False, soft_wrap=True)
        if told["note"]:
            console.print(escape(told["note"]), highlight=False, soft_wrap=True)
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
        if stop.is_set():
            raise KeyboardInterrupt
    return config.folder


def _greet(search: Search, study: Study, console: Console) -> None:
    config, known = search.config, len(study.trials())
    budget = f"{config.budget_ms:g} ms" if search.cell.timed else f"{config.evaluations:,} steps of the model"
    lines = [f"{config.env}, {config.planner}, {budget} a plan -> {study.folder}"]
    if known:
        killed = f" Killed on the way and tried again: {study.killed}." if study.killed else ""
        lines.append(f"Going on after {known} trials.{killed}")
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
    warnings = []
    if study.changed:
        told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in study.changed.items())
        warnings.append(
            f"Versions have changed since the search began ({told}): it may go on differently than it would have."
        )
    if search.cell.timed and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        warnings.append(
            f"The machine is busy (load {os.getloadavg()[0]:.1f}): planning in real time suffers."
        )
    for line in warnings:
        console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False, soft_wrap=True)


def _try(search: Search, study: Study, console: Console, stop: threading.Event) -> None:
    """Trials until there are enough, the time is up, or the user has stopped it."""
    config, started = search.config, time.monotonic()
    while (done := len(study.trials())) < config.trials and not stop.is_set():
        minutes = (time.monotonic() - started) / 60
        if config.minutes is not None and minutes >= config.minutes:
            break
        asked = study.ask()
        news = _attempt(search, asked)
        best = best_of(study.trials())
        told = f" (best {best.value:.4g})" if best else ""
        point = "  ".join(
            f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in asked.point.items()
        )
        console.print(
            f"[dim]{done + 1}/{config.trials} {(time.monotonic() - started) / 60:.1f} min[/dim] "
            f"{escape(news + told)}  [dim]{escape(point)}[/dim]",
            highlight=False,
            soft_wrap=True,
        )


def _attempt(search: Search, asked: Asked) -> str:
    """Play a trial and record it; returns what came of it in a few words."""
    started, load = time.perf_counter(), os.getloadavg()[0]
    returns: list[float] = []
    episodes: list[Episode] = []

    def facts() -> dict[str, Any]:
        ms = torch.cat([episode.plan_ms for episode in episodes]) if episodes else torch.full((1,), math.nan)
        work = torch.cat([episode.model_steps for episode in episodes]) if episodes else ms
        return {
            "planner": plain(search.planner(asked.point)),
            "model_steps": _number(work.nanmean()),
            "plan_ms": _number(ms.nanmedian()),
            "load": round(load, 2),
            "seconds": round(time.perf_counter() - started, 2),
        }

    try:
        for group in search.groups(search.seeds):
            episodes += search.play(asked.point, group)
            lost = [episode.seed for episode in episodes if episode.diverged]
            if lost:
                raise MbrlError(f"The physics diverged from seed {lost[0]}, so there is no return.")
            returns = [episode.total for episode in episodes]
            mean = statistics.fmean(returns)
            if len(returns) < len(search.seeds) and asked.hopeless(mean, len(returns)):
                asked.tell(returns, facts(), pruned=True)
                return f"pruned at {mean:.4g} after {len(returns)} of {len(search.seeds)} seeds"
    except MbrlError as error:
        asked.crashed(str(error), facts() if episodes else {"load": round(load, 2)})
        return f"crashed: {error}"
    except Exception as error:  # noqa: BLE001  a defect in one trial must not end the search
        why = f"{type(error).__name__}: {error}"
        asked.crashed(why, {"load": round(load, 2)})
        return f"crashed: {why}"
    asked.tell(returns, facts())
    return f"return {statistics.fmean(returns):.4g}"


def _confirm(
    search: Search, study: Study, winner: Trial, console: Console, stop: threading.Event
) -> Confirmation | None:
    """The winner and the defaults from seeds that no trial has seen; None if it was stopped."""
    found = {}
    for name, point in (("default", search.default), ("winner", winner.point)):
        text = json.dumps([plain(search.planner(point)), search.horizon(point)], sort_keys=True)
        key = f"fresh {hashlib.sha256(text.encode()).hexdigest()[:20]}"
        returns: list[float | None] = study.recall(key, [])
        for group in search.groups(search.fresh[len(returns) :]):
            if stop.is_set():
                return None
            with console.status(f"fresh seeds, {name}: {len(returns)} of {len(search.fresh)}"):
                episodes = search.play(point, group)
            returns = returns + [None if episode.diverged else episode.total for episode in episodes]
            study.remember(key, returns)
        found[name] = returns[: len(search.fresh)]
    return Confirmation(winner.index, tuple(found["default"]), tuple(found["winner"]))


def _number(value: torch.Tensor) -> float | None:
    return float(value) if bool(torch.isfinite(value)) else None
