"""Can a learned model be trusted, and where a planner on it fails, was it the solver or the model?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from mbrl.data import Transition
from mbrl.envs import WORLDS, Pendulum, World, make_world
from mbrl.errors import ContractError, MbrlError, UnknownName
from mbrl.experiments.contenders import CONTENDERS
from mbrl.experiments.diagnosis_data import find_data, read
from mbrl.experiments.diagnosis_measures import (
    Neighbours,
    OneStep,
    choose,
    heads,
    labels,
    make_map,
    one_step,
    open_loop,
    unit_of,
    wrapped,
)
from mbrl.experiments.diagnosis_numbers import Diagnosis, Finding, numbers, plan_rows, show
from mbrl.experiments.diagnosis_plans import Setting, Trial, Tried, try_planner
from mbrl.experiments.episodes import run_episodes
from mbrl.experiments.fit import json_types
from mbrl.experiments.learned import learned_problem, load_model
from mbrl.experiments.verdict import Evidence, judge, overall
from mbrl.models import Ensemble, horizon_error
from mbrl.models.calibration import LEVELS
from mbrl.policies import RandomPolicy
from mbrl.runs import RunFolder

PARTED = 0.1
"""Share of the scale, what the best known plans earn more than random actions, at which imagined and realised sums of
rewards have parted."""
COLUMNS = (
    "plan", "planner", "seed", "step", "imagined", "realised", "spread", "stronger_imagined", "stronger_realised",
    "best", "random", "parted",
)  # fmt: skip
_HELD = 5_000  # transitions that are looked at


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tell whether a learned model can be trusted, and whether planners on it fail by their search or by the model.

    Attributes:
        folder: of the model: a training run, a fit, or what save_ensemble left.
        env: the world, where the model does not name it.
        planners: what is tried on the model; see `mbrl compare` for all.
        evaluations: steps of the model for each plan.
        horizon: steps to plan ahead.
        steps: control steps of an episode, at most.
        seeds: episodes of each planner.
        seed: of everything; the first episode's.
        checked: plans of each episode that are looked into.
        particles: of planners that draw them; a multiple of the members is fair to all.
        held_out: data set that the fit has not seen. Else what a fit has kept for its report, else fresh data.
        training: data set that the model was fitted to, where its folder does not tell.
        transitions: how many to collect where there are no held-out data.
        maps: two numbers of y for the maps, by name or number; else those along which the error varies most.
        threads: of simulator and networks.
        out: folder for the report; runs/diagnose-WORLD unless given.
    """

    folder: tyro.conf.Positional[Path]
    env: str | None = None
    planners: tuple[str, ...] = ("icem", "ilqr")
    evaluations: int = 20_000
    horizon: int = 20
    steps: int = 60
    seeds: int = 3
    seed: int = 0
    checked: int = 6
    particles: int = 5
    held_out: Path | None = None
    training: Path | None = None
    transitions: int = 1_000
    maps: tuple[str, ...] = ()
    threads: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        least = {"evaluations": 1, "horizon": 1, "steps": 1, "seeds": 1, "checked": 1, "particles": 1}
        least |= {"transitions": 100, "threads": 1, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ContractError(f"A diagnosis needs {name} ≥ {low}, but got {getattr(self, name)}.")
        for name in self.planners:
            if name not in CONTENDERS:
                raise UnknownName("planner", name, CONTENDERS)
        if len(self.maps) not in (0, 2):
            raise ContractError(f"Maps need two numbers of y, but got {len(self.maps)}.")

    @property
    def setting(self) -> Setting:
        return Setting(
            evaluations=self.evaluations,
            horizon=self.horizon,
            steps=self.steps,
            seeds=tuple(range(self.seed, self.seed + self.seeds)),
            checked=self.checked,
            particles=self.particles,
            threads=self.threads,
        )


def main(config: Config, console: Console | None = None) -> Path:
    """Diagnose, report, and return the folder of the report.

    Raises:
        CheckpointError: there is no model.
        ContractError: it is one of another world.
        DataError: data that were given cannot be used.
    """
    from mbrl.experiments.diagnosis_report import write_report

    console = console or Console()
    torch.set_num_threads(config.threads)
    model = load_model(config.folder)
    model.requires_grad_(False)
    world = world_of(config, model)
    learned_problem(
        world, model, config.horizon, propagation="mean", particles=1, kappa=0.0
    )  # fits, or says why not
    if config.maps:
        choose(
            labels(world), config.maps, torch.zeros(2, model.ny), torch.zeros(2)
        )  # known, or says which are
    for path in (config.held_out, config.training):
        if path is not None:
            read(path, model)  # before there is a folder
    folder = (
        RunFolder.numbered(Path("runs", f"diagnose-{world.name}"), COLUMNS)
        if config.out is None
        else RunFolder(config.out, COLUMNS)
    )
    with folder:
        folder.save_config(config, algorithm="diagnose")
        console.print(f"{config.folder} in {world.name} -> {folder.path}", highlight=False, soft_wrap=True)
        found = diagnose(config, model, world, console)
        for row in plan_rows(found):
            folder.log(row)
        (folder.path / "report.json").write_text(
            json.dumps(json_types(numbers(found)), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        write_report(found, config, folder.path / "report.html")
    show(found, console)
    console.print(f"Report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return folder.path


def world_of(config: Config, model: Ensemble) -> World:
    """The world of the config, else of the model.

    Raises:
        ContractError: neither names one, or it has no simulator in which plans could be tried.
        UnknownName: there is no such world.
    """
    name = model.world if config.env is None else config.env
    if name is None:
        raise ContractError(f"The model in {config.folder} does not tell its world. Name it: --env NAME.")
    if name == Pendulum.name:
        raise ContractError(
            f"{name} has no MuJoCo simulator in which plans could be tried, so a model of it cannot be diagnosed. "
            "See mbrl eval for its returns, and mbrl fit for its calibration."
        )
    if name not in WORLDS:
        raise UnknownName("world", name, WORLDS)
    return make_world(name)


def diagnose(config: Config, model: Ensemble, world: World, console: Console) -> Diagnosis:
    """Measure everything and judge."""
    generator = torch.Generator().manual_seed(config.seed)
    known = find_data(
        config.folder,
        model,
        world,
        held_out=config.held_out,
        training=config.training,
        transitions=config.transitions,
        horizon=config.horizon,
        seed=config.seed + 100_000,
    )
    for note in known.notes:
        console.print(f"[dim]{escape(note)}[/dim]", highlight=False, soft_wrap=True)
    rows = known.held_out[:_HELD]
    unit = unit_of(model, rows)
    held = one_step(model, rows, unit)
    neighbours = None if known.training is None else Neighbours(model, known.training)
    held_distance = None if neighbours is None else neighbours.distance(rows.y, rows.u)
    spread = rows.y.std(0)
    y_unit = torch.where(spread > 0, spread, 1.0)
    trials: dict[str, Trial] = {}
    refused: dict[str, str] = {}
    for name in dict.fromkeys(config.planners):
        with console.status(f"{name} plans"):
            try:
                trials[name] = try_planner(
                    name, config.folder, model, world, config.setting, seed=config.seed
                )
            except MbrlError as error:
                refused[name] = str(error)
                console.print(
                    f"[yellow]{name}:[/yellow] {escape(refused[name])}", highlight=False, soft_wrap=True
                )
    findings = {
        name: examine(
            trial, config, model, held, neighbours, held_distance, unit, y_unit, labels(world), generator
        )
        for name, trial in trials.items()
    }
    seen = Transition.cat([rows, *(trial.visited for trial in trials.values())])
    there = one_step(model, seen, unit)
    names = labels(world)
    pair = choose(names, config.maps, wrapped(model, seen.y), there.error)
    babble = RandomPolicy(world.actions, generator=generator)
    return Diagnosis(
        world=world,
        model=model,
        names=[names[i] for i in model.features.predicted],
        known=known,
        unit=unit,
        held=held,
        held_distance=held_distance,
        held_open=open_loop(model, rows, config.horizon, y_unit, generator=generator),
        heads=heads(model, seen, world),
        map=make_map(names, pair, wrapped(model, seen.y), there.disagreement, there.error),
        findings=findings,
        refused=refused,
        random=[
            episode.total for episode in run_episodes(world, babble, config.setting.seeds, steps=config.steps)
        ],
        verdict=overall({name: finding.verdict for name, finding in findings.items()}),
    )


def examine(
    trial: Trial,
    config: Config,
    model: Ensemble,
    held: OneStep,
    neighbours: Neighbours | None,
    held_distance: Tensor | None,
    unit: Tensor,
    y_unit: Tensor,
    names: list[str],
    generator: torch.Generator,
) -> Finding:
    """Where a planner went, what the model knows there, and the verdict."""
    tried, visited = trial.tried, trial.visited
    planned = _planned(tried)
    there = one_step(model, Transition.cat([visited, planned]), unit)
    imagined_y = tried.y_imagined[:, :-1].flatten(0, 1)
    imagined_u = tried.u.float().flatten(0, 1)
    usable = imagined_y.isfinite().all(-1)
    imagined_y, imagined_u = imagined_y[usable], imagined_u[usable]
    with torch.no_grad():
        said = model.predict(imagined_y, imagined_u).change / model.target_unit[: model.np]
    imagined_doubt = said.std(0, correction=0).mean(-1)
    doubt = torch.cat([there.disagreement, imagined_doubt])
    distance = None
    if neighbours is not None:
        distance = torch.cat(
            [neighbours.distance(visited.y, visited.u), neighbours.distance(imagined_y, imagined_u)]
        )
    whole = ~tried.ended & tried.y.isfinite().all(-1).all(-1)
    evidence = weigh(trial, model, there, doubt, held, distance, held_distance, names)
    return Finding(
        trial=trial,
        there=there,
        gone=doubt,
        distance=distance,
        visited=open_loop(model, visited, config.horizon, y_unit, generator=generator),
        planned=horizon_error(
            model, tried.y[whole].float(), tried.u[whole].float(), unit=y_unit, generator=generator
        )
        if bool(whole.any())
        else None,
        parted=parting(tried, PARTED * evidence.scale),
        evidence=evidence,
        verdict=judge(evidence),
    )


def _planned(tried: Tried) -> Transition:
    """What happened when the plant ran the plans, as transitions; without ends and rewards, which nobody asks for."""
    y, u = tried.y.float(), tried.u.float()
    n, H = u.shape[:2]
    going = torch.ones(n, H, dtype=torch.bool)
    going[:, 1:] = (tried.realised[:, 1:] != 0) | ~tried.ended[:, None]  # after an end rewards are exactly 0
    flag = torch.zeros(n, H, dtype=torch.bool)
    rows = Transition(
        y=y[:, :-1],
        u=u,
        reward=tried.realised.float(),
        y_next=y[:, 1:],
        terminated=flag,
        truncated=flag,
        episode=torch.arange(n)[:, None].expand(n, H),
    )
    usable = going & y[:, :-1].isfinite().all(-1) & y[:, 1:].isfinite().all(-1)
    return rows[usable]


def weigh(
    trial: Trial,
    model: Ensemble,
    there: OneStep,
    doubt: Tensor,
    held: OneStep,
    distance: Tensor | None,
    held_distance: Tensor | None,
    names: list[str],
) -> Evidence:
    """The numbers that a verdict rests on."""
    tried = trial.tried
    imagined, realised = tried.imagined.sum(-1), tried.realised.sum(-1)
    all_of = torch.stack([imagined, realised, tried.stronger_imagined, tried.stronger_realised, tried.best])
    sound = all_of.isfinite().all(0) & tried.babble.isfinite()
    imagined, realised, promised, earned, best = all_of[:, sound].double()
    n = int(sound.sum())
    won = float((best - tried.babble[sound]).mean()) if n else 0.0
    scale = max(won, tried.babble_std) if tried.babble_std == tried.babble_std else won

    def mean(values: Tensor) -> float:
        return float(values.mean()) / scale if n and scale > 0 else 0.0

    coverage, least = torch.nan, 0
    if there.calibration is not None:
        inside = there.calibration.coverage_each[LEVELS.index(0.95)]
        coverage, least = float(inside.min()), int(inside.argmin())
    worst = int(there.output_error.nan_to_num(0.0).argmax())
    return Evidence(
        plans=n,
        diverged=1 - n / len(sound),
        scale=scale,
        size=float(realised.abs().mean()) if n else 0.0,
        gap=mean(imagined - realised),
        off=mean((imagined - realised).abs()),
        search=mean(promised - imagined),
        solver=mean(earned - realised),
        model=mean(best - earned),
        coverage=coverage,
        disagreement=_ratio(doubt, held.disagreement),
        distance=torch.nan if distance is None or held_distance is None else _ratio(distance, held_distance),
        rank=there.rank,
        covered=names[model.features.predicted[least]],
        worst=names[model.features.predicted[worst]],
        worst_error=float(there.output_error[worst]),
    )


def _ratio(there: Tensor, held: Tensor) -> float:
    """Of the medians."""
    return float(there.median() / held.median()) if float(held.median()) > 0 else torch.nan


def parting(tried: Tried, tolerance: float) -> Tensor:
    """(N,) the first step at which imagined and realised sums of rewards differ by more; H where they never do."""
    H = tried.realised.shape[1]
    apart = (tried.imagined - tried.realised).cumsum(-1).abs() > tolerance
    return torch.where(apart.any(-1), apart.float().argmax(-1), H)
