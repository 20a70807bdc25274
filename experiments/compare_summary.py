"""What the episodes of a comparison say: returns and scores with intervals, cell by cell and over all worlds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.experiments.cells import ANALYTIC, RANDOM, SIMULATOR, Cell
from mbrl.experiments.ledger import Ledger
from mbrl.experiments.statistics import Array, Estimate, estimate, iqm, mean, probability_of_improvement

LEARNED = "learned"
KINDS = (SIMULATOR, ANALYTIC, LEARNED)
VERSIONS = ("python", "mbrl-kit", "torch", "mujoco", "gymnasium", "numpy")


@dataclass(frozen=True)
class Row:
    """A cell with its episodes, by seed.

    Attributes:
        kind: of the model: simulator, analytic or learned.
        model: as shown.
        why: there are no episodes.
        scores: (n,) normalised returns; empty where the world has no scale.
        total, score: mean return and interquartile mean of the scores.
        size: of the planner, see `contenders`.
        key: of the job that filmed the first of the episodes.
        machines, versions, loads: what the jobs ran on.
    """

    cell: Cell
    kind: str
    model: str
    episodes: list[dict[str, Any]]
    why: str | None = None
    scores: Array = field(default_factory=lambda: np.empty(0))
    total: Estimate | None = None
    score: Estimate | None = None
    size: int | None = None
    key: str | None = None
    machines: tuple[str, ...] = ()
    versions: tuple[dict[str, str], ...] = ()
    loads: tuple[float, ...] = ()

    @property
    def returns(self) -> Array:
        return np.array([episode["return"] for episode in self.episodes])

    def number(self, name: str, pick: Any = statistics.fmean) -> float | None:
        """Of what the episodes tell of `name`, the mean or another pick."""
        known = [episode[name] for episode in self.episodes if episode.get(name) is not None]
        return float(pick(known)) if known else None

    @property
    def violated(self) -> tuple[float, float] | None:
        """Mean number of states in which a constraint of the world was violated, and by how much at most."""
        found = [episode["violations"].values() for episode in self.episodes if episode["violations"]]
        if not found:
            return None
        counts = [sum(n for n, _ in each) for each in found]
        worst = [by for each in found for _, by in each if by is not None]
        return statistics.fmean(counts), max(worst, default=0.0)


@dataclass(frozen=True)
class Scale:
    """What 0 and 1 of a normalised score are in a world: the mean return of random actions, and the best mean return of
    a planner on the simulator (of any planner, where none had it)."""

    random: float
    reference: float
    by: str


@dataclass(frozen=True)
class Aggregate:
    """A planner on one model, as shown, at one budget over all worlds in which it ran; scores (n,) by world."""

    planner: str
    model: str
    budget: str
    score: Estimate
    worlds: int
    scores: dict[str, Array]


@dataclass(frozen=True)
class Summary:
    rows: list[Row]
    scales: dict[str, Scale]
    random: dict[str, Estimate]
    aggregates: list[Aggregate]

    @property
    def models(self) -> list[str]:
        """As shown, the true ones first."""
        names = dict.fromkeys(row.model for row in self.rows)
        return sorted(names, key=lambda name: KINDS.index(name) if name in KINDS else len(KINDS))

    def versions(self) -> dict[str, list[str]]:
        """Of each package, those that cells ran with."""
        found: dict[str, set[str]] = {}
        for row in self.rows:
            for versions in row.versions:
                for name, version in versions.items():
                    found.setdefault(name, set()).add(version)
        return {name: sorted(versions) for name, versions in found.items()}

    def halves(self) -> list[tuple[str, float]]:
        """The budgets compared: ("evaluations" or "ms", how much)."""
        return list(dict.fromkeys((row.cell.budget, row.cell.amount) for row in self.rows))

    def machines(self, budget: str) -> list[str]:
        """What the cells of a budget ran on."""
        return sorted({m for row in self.rows if row.cell.budget == budget for m in row.machines})


def summarise(cells: Sequence[Cell], ledger: Ledger, seeds: Iterable[int]) -> Summary:
    wanted = set(seeds)
    names = _labels(cells)
    found = [_row(cell, names[cell.model], ledger, wanted) for cell in cells]
    rows = [row for row in found if row.cell.planner != RANDOM]
    babble = {row.cell.env: row for row in found if row.cell.planner == RANDOM and row.episodes}
    scales = {env: scale for env in babble if (scale := _scale(babble[env], rows)) is not None}
    rows = [_scored(row, scales.get(row.cell.env)) for row in rows]
    random = {env: estimate([row.returns], mean) for env, row in babble.items()}
    return Summary(rows, scales, random, _aggregates(rows))


def improvement(summary: Summary, budget: str, model: str) -> tuple[list[str], list[list[Estimate | None]]]:
    """Planners, best first, and how likely each beats each other on the worlds in which both ran."""
    found = [a for a in summary.aggregates if (a.budget, a.model) == (budget, model)]
    found.sort(key=lambda a: -a.score.value)
    table: list[list[Estimate | None]] = []
    for ours in found:
        line: list[Estimate | None] = []
        for theirs in found:
            both = [env for env in ours.scores if env in theirs.scores]
            pairs = [ours.scores[env] for env in both], [theirs.scores[env] for env in both]
            line.append(probability_of_improvement(*pairs) if both and ours is not theirs else None)
        table.append(line)
    return [a.planner for a in found], table


def _labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Models as shown: `learned`, or with folders' names where there are several for one world."""
    by_env: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.fingerprint is not None:
            by_env.setdefault(cell.env, {})[cell.model] = None
    folders = list(dict.fromkeys(folder for models in by_env.values() for folder in models))
    names = {cell.model: cell.model for cell in cells}
    several = any(len(models) > 1 for models in by_env.values())
    for folder in folders:
        short = Path(folder).name
        alone = [Path(other).name for other in folders].count(short) == 1
        names[folder] = f"{LEARNED} ({short if alone else folder})" if several else LEARNED
    return names


def _row(cell: Cell, model: str, ledger: Ledger, seeds: set[int]) -> Row:
    kind = LEARNED if cell.fingerprint is not None else cell.model
    records = ledger.done(cell)
    refused = [record["refused"] for record in records if "refused" in record]
    if refused:
        return Row(cell, kind, model, [], why=refused[-1])
    episodes = {episode["seed"]: episode for record in records for episode in record["episodes"]}
    kept = [episodes[seed] for seed in sorted(seeds & episodes.keys())]
    if not kept:
        return Row(cell, kind, model, [], why=ledger.crash(cell) or "not run yet")
    first = min(records, key=lambda record: min(record["seeds"]))
    return Row(
        cell,
        kind,
        model,
        kept,
        total=estimate([np.array([episode["return"] for episode in kept])], mean),
        size=records[-1].get("size"),
        key=first["key"] if first["seeds"][0] == kept[0]["seed"] else None,
        machines=tuple(sorted({machine_name(record["machine"]) for record in records})),
        versions=tuple({n: str(record["machine"][n]) for n in VERSIONS} for record in records),
        loads=tuple(record["machine"]["load"] for record in records),
    )


def machine_name(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, host {machine['host']}"


def _scale(babble: Row, rows: Sequence[Row]) -> Scale | None:
    """The world's scale, or None where no planner does better than random actions."""
    here = [row for row in rows if row.cell.env == babble.cell.env and row.episodes]
    true = [row for row in here if row.kind == SIMULATOR] or here
    if not true:
        return None
    best = max(true, key=lambda row: float(row.returns.mean()))
    low, high = float(babble.returns.mean()), float(best.returns.mean())
    if high <= low:
        return None
    unit = f"{best.cell.amount:g} ms" if best.cell.timed else f"{best.cell.amount:,.0f} steps"
    return Scale(low, high, f"{best.cell.planner} on the {best.model}, {unit}")


def _scored(row: Row, scale: Scale | None) -> Row:
    if scale is None or not row.episodes:
        return row
    scores = (row.returns - scale.random) / (scale.reference - scale.random)
    return Row(**{**vars(row), "scores": scores, "score": estimate([scores], iqm)})


def _aggregates(rows: Sequence[Row]) -> list[Aggregate]:
    groups: dict[tuple[str, str, str], dict[str, Array]] = {}
    for row in rows:
        if len(row.scores):
            groups.setdefault((row.cell.planner, row.model, row.cell.budget), {})[row.cell.env] = row.scores
    return [
        Aggregate(planner, model, budget, estimate(list(scores.values())), len(scores), scores)
        for (planner, model, budget), scores in groups.items()
    ]


def plan_ms(row: Row) -> float | None:
    """Median milliseconds of a plan, for one of the episodes that were planned together."""
    times = [e["plan_ms"] / e["together"] for e in row.episodes if e["plan_ms"] is not None]
    return statistics.median(times) if times else None


def optimality_gap(row: Row) -> float | None:
    """(J − J*) / J* of the mean cost J, on linear-quadratic worlds whose optimum J* is above 0."""
    known = [(-e["return"], -e["optimum"]) for e in row.episodes if e["optimum"] is not None]
    if not known:
        return None
    cost, least = (statistics.fmean(values) for values in zip(*known, strict=True))
    return (cost - least) / least if least > 0 else None


def lost_to_model(summary: Summary) -> dict[int, float]:
    """By the row's id: the mean over seeds of its score less that of the same planner on the true simulator."""
    true = {
        (row.cell.env, row.cell.planner, row.cell.budget): by_seed(row)
        for row in summary.rows
        if row.kind == SIMULATOR and len(row.scores)
    }
    found = {}
    for row in summary.rows:
        theirs = true.get((row.cell.env, row.cell.planner, row.cell.budget), {})
        differences = [score - theirs[seed] for seed, score in by_seed(row).items() if seed in theirs]
        if row.kind != SIMULATOR and differences:
            found[id(row)] = statistics.fmean(differences)
    return found


def by_seed(row: Row) -> dict[int, float]:
    return {e["seed"]: float(score) for e, score in zip(row.episodes, row.scores, strict=False)}
