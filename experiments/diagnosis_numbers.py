"""What a diagnosis found, and its numbers."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mbrl.envs import World
from mbrl.experiments.diagnosis_data import Known
from mbrl.experiments.diagnosis_measures import (
    Heads,
    Map,
    OneStep,
)
from mbrl.experiments.diagnosis_plans import Trial
from mbrl.experiments.verdict import Evidence, Verdict
from mbrl.models import Ensemble, HorizonError
from mbrl.models.calibration import LEVELS


@dataclass(frozen=True)
class Finding:
    """What was found of one planner.

    Attributes:
        trial: what it did.
        there: one-step predictions where it went: its own steps, and those of its plans when the plant ran them.
        gone: how much longer than on held-out data, (N,): disagreement of the members where it went, its plans as the
            model imagines them included.
        distance: (N,), to the nearest training data, there; None where these are not known.
        visited, planned: errors of open-loop predictions under the actions that were taken, and under those of plans.
        parted: (N,), the step of each plan at which imagined and realised sums part; the horizon where they do not.
    """

    trial: Trial
    there: OneStep
    gone: Tensor
    distance: Tensor | None
    visited: HorizonError | None
    planned: HorizonError | None
    parted: Tensor
    evidence: Evidence
    verdict: Verdict


@dataclass(frozen=True)
class Diagnosis:
    """All that a report is made of."""

    world: World
    model: Ensemble
    names: list[str]
    known: Known
    unit: Tensor
    held: OneStep
    held_distance: Tensor | None
    held_open: HorizonError | None
    heads: Heads
    map: Map
    findings: dict[str, Finding]
    refused: dict[str, str]
    random: list[float]
    verdict: Verdict | None


def plan_rows(found: Diagnosis) -> list[dict[str, Any]]:
    """A row of metrics.csv for every plan that was looked into."""
    rows: list[dict[str, Any]] = []
    for name, finding in found.findings.items():
        tried = finding.trial.tried
        for i in range(len(tried.seed)):
            rows.append(
                {
                    "plan": len(rows),
                    "planner": name,
                    "seed": int(tried.seed[i]),
                    "step": int(tried.step[i]),
                    "imagined": float(tried.imagined[i].sum()),
                    "realised": float(tried.realised[i].sum()),
                    "spread": float(tried.spread[i]),
                    "stronger_imagined": float(tried.stronger_imagined[i]),
                    "stronger_realised": float(tried.stronger_realised[i]),
                    "best": float(tried.best[i]),
                    "random": float(tried.babble[i]),
                    "parted": int(finding.parted[i]),
                }
            )
    return rows


def numbers(found: Diagnosis) -> dict[str, Any]:
    """The diagnosis in JSON types, but for numbers that are not finite."""
    return {
        "world": found.world.name,
        "verdict": None if found.verdict is None else dataclasses.asdict(found.verdict),
        "planners": {
            name: {
                **dataclasses.asdict(finding.verdict),
                "evidence": dataclasses.asdict(finding.evidence),
                "returns": finding.trial.returns,
                "returns_on_simulator": finding.trial.on_simulator,
                "parted_median": float(finding.parted.float().median()),
                "one_step": _one_step(finding.there),
                "open_loop": {
                    "visited": _curve(finding.visited),
                    "planned": _curve(finding.planned),
                },
                "distance_median": None if finding.distance is None else float(finding.distance.median()),
            }
            for name, finding in found.findings.items()
        },
        "refused": found.refused,
        "random_returns": found.random,
        "outputs": found.names,
        "held_out": {
            **_one_step(found.held),
            "open_loop": _curve(found.held_open),
            "distance_median": None if found.held_distance is None else float(found.held_distance.median()),
        },
        "reward_and_end": dataclasses.asdict(found.heads),
        "data": list(found.known.notes),
    }


def _one_step(said: OneStep) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rank": said.rank,
        "disagreement_median": float(said.disagreement.median()),
        "error_median": float(said.error.median()),
        "output_error": said.output_error.tolist(),
    }
    if said.calibration is not None:
        found |= {
            "nll": said.calibration.nll,
            "expected_error": said.calibration.expected_error,
            "coverage": {f"{level:g}": said.calibration.coverage[level] for level in LEVELS},
            "coverage_95_each": said.calibration.coverage_each[LEVELS.index(0.95)].tolist(),
        }
    return found


def _curve(error: HorizonError | None) -> dict[str, list[float]] | None:
    return None if error is None else {"error": error.error.tolist(), "spread": error.spread.tolist()}


def show(found: Diagnosis, console: Console) -> None:
    """Print the verdicts and what they rest on."""
    if found.verdict is None:
        console.print("No planner could run on this model, so there is no verdict.", highlight=False)
        return
    table = Table(
        "planner", "verdict", "imagined − realised", "solver's part", "model's part", "return", "on simulator"
    )
    for name, finding in found.findings.items():
        e, simulator = finding.evidence, finding.trial.on_simulator
        table.add_row(
            name,
            finding.verdict.name,
            f"{e.gap:.2f}",
            f"{e.solver:.2f}",
            f"{e.model:.2f}",
            f"{statistics.fmean(finding.trial.returns):.4g}",
            "none" if isinstance(simulator, str) else f"{statistics.fmean(simulator):.4g}",
        )
    console.print(table)
    for name, finding in found.findings.items():
        console.print(
            f"{name}: [bold]{finding.verdict.name}[/bold]. {escape(finding.verdict.why)}", highlight=False
        )
        console.print(f"  What to do: {escape(finding.verdict.remedy)}", highlight=False)
