"""report.html of a diagnosis: the verdicts in words, and the figures that they can be checked by, in one file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl.experiments.charts import card, heat_map, line_chart, scatter_chart
from mbrl.experiments.diagnose import PARTED, Config
from mbrl.experiments.diagnosis_measures import OneStep
from mbrl.experiments.diagnosis_numbers import Diagnosis, Finding
from mbrl.experiments.verdict import Name
from mbrl.models.calibration import GRID, LEVELS
from mbrl.runs import environment, plain, write_text

_POINTS = 300  # of a cloud
_TONE: dict[Name, str] = {
    "fine": "good",
    "solver stuck": "warn",
    "model uncertain here": "warn",
    "model exploited": "bad",
}


def write_report(found: Diagnosis, config: Config, path: Path) -> Path:
    """Write the report of a diagnosis.

    Raises:
        RunFolderError: it cannot be written.
    """
    world, dt = found.world.name, found.model.dt
    page = resources.files("mbrl.experiments").joinpath("diagnosis.html")
    machine = environment()
    text = Template(page.read_text(encoding="utf-8")).substitute(
        title=escape(f"Diagnosis of a model of {world}"),
        heading=escape(f"Can this model of {world} be trusted?"),
        badge="" if found.verdict is None else _badge(found.verdict.name),
        lead=escape(
            f"{config.folder}: {found.model.members} networks, control step {1e3 * dt:g} ms. Each planner acted in "
            f"{config.seeds} episodes of up to {config.steps} steps, with {config.evaluations:,} steps of the model "
            f"for every plan of {config.horizon} steps ({config.horizon * dt:.2f} s), and "
            f"{config.checked} plans of each episode were looked into."
        ),
        verdicts="".join(_verdict(name, finding) for name, finding in found.findings.items())
        + "".join(
            f"<div class='card verdict'><h3>{escape(name)} was not run</h3><p>{escape(why)}</p></div>"
            for name, why in found.refused.items()
        ),
        returns=_returns(found),
        returns_note=_returns_note(found),
        plans=_plans(found),
        knowledge=_knowledge(found, config),
        maps=_maps(found),
        outputs=_outputs(found),
        data="".join(f"<p class='note'>{escape(note)}</p>" for note in found.known.notes),
        settings=_settings({**plain(config), **machine["versions"], **machine["machine"]}),
    )
    return write_text(path, text)


def _badge(name: Name) -> str:
    return f"<span class='badge {_TONE[name]}'>{escape(name)}</span>"


def _verdict(name: str, finding: Finding) -> str:
    said = finding.verdict
    return (
        f"<div class='card verdict'><h3>{escape(name)}: {_badge(said.name)}</h3><p>{escape(said.why)}</p>"
        f"<p><b>What to do:</b> {escape(said.remedy)}</p></div>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None, digits: int = 2) -> str:
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value + 0.0:.{digits}f}".replace("-0.00", "0.00")
    )


def _amount(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _returns(found: Diagnosis) -> str:
    head = (
        "planner", "imagined − realised", "solver’s part", "model’s part", "parts after", "return on the model",
        "return on the simulator", "random",
    )  # fmt: skip
    rows = []
    for name, finding in found.findings.items():
        e, simulator = finding.evidence, finding.trial.on_simulator
        H = finding.trial.tried.realised.shape[1]
        parted = float(finding.parted.float().median())
        rows.append(
            (
                name,
                _number(e.gap),
                _number(e.solver),
                _number(e.model),
                "never" if parted >= H else f"{parted + 1:.0f} of {H} steps",
                _amount(statistics.fmean(finding.trial.returns)),
                "–" if isinstance(simulator, str) else _amount(statistics.fmean(simulator)),
                _amount(statistics.fmean(found.random)),
            )
        )
    return _table(head, rows)


def _returns_note(found: Diagnosis) -> str:
    scales = ", ".join(f"{name} {f.evidence.scale:.3g}" for name, f in found.findings.items())
    text = (
        "The first three are means over plans in units of what the best known plans earn more than random actions from "
        f"the same states ({scales}). The solver’s part is what a stronger search on the same model would gain in the "
        "plant; the model’s part is what even that search lacks against the best known plan. Imagined and realised "
        f"sums have parted where they differ by more than {PARTED:g} of that unit (median over plans). Returns are "
        "those of whole episodes; on the simulator the same planner planned with the plant itself."
    )
    refusals = [
        f" {name} on the simulator: {why}"
        for name, f in found.findings.items()
        if isinstance(why := f.trial.on_simulator, str)
    ]
    return f"<p class='note'>{escape(text + ''.join(refusals))}</p>"


def _plans(found: Diagnosis) -> str:
    pairs, sums, parted = {}, {}, []
    H = 1
    for name, finding in found.findings.items():
        tried = finding.trial.tried
        pairs[name] = list(zip(tried.imagined.sum(-1).tolist(), tried.realised.sum(-1).tolist(), strict=True))
        H = tried.realised.shape[1]
        usable = tried.imagined.isfinite().all(-1) & tried.realised.isfinite().all(-1)
        for what, rewards in (("imagined", tried.imagined), ("realised", tried.realised)):
            sums[f"{name}, {what}"] = (
                [0.0, *rewards[usable].mean(0).cumsum(0).tolist()] if usable.any() else []
            )
        parted.append((name, finding.parted))
    share = {name: [float((steps <= k).float().mean()) * 100 for k in range(H)] for name, steps in parted}
    return "".join(
        [
            card(
                "Imagined and realised return",
                scatter_chart(
                    pairs,
                    xlabel="imagined return of the plan",
                    label="realised return",
                    diagonal=True,
                ),
                "A point is a plan. On the dashed line it came true; below it the model promised more than the plant paid.",
            ),
            card(
                "Where they part",
                line_chart(
                    range(H + 1),
                    {name: values for name, values in sums.items() if values},
                    label="sum of rewards so far",
                    xlabel="step of the plan",
                ),
                "Mean over the plans. Where the two lines of a planner part, the model has stopped being right.",
            ),
            card(
                "How many have parted",
                line_chart(
                    range(1, H + 1), share, label="plans that have parted (%)", xlabel="step of the plan"
                ),
                f"Share of the plans whose imagined and realised sums differ by more than {PARTED:g} of the unit by then.",
            ),
            card(
                "What a stronger search finds",
                scatter_chart(
                    {
                        name: list(
                            zip(
                                (f.trial.tried.stronger_imagined - f.trial.tried.imagined.sum(-1)).tolist(),
                                (f.trial.tried.stronger_realised - f.trial.tried.realised.sum(-1)).tolist(),
                                strict=True,
                            )
                        )
                        for name, f in found.findings.items()
                    },
                    xlabel="gain in return on the model",
                    label="gain in return in the plant",
                    diagonal=True,
                ),
                "Gain over the planner’s own plan. Near zero: its search is good enough. Along the dashed line: the search "
                "is what is weak. Far to the right but not up: what is found there is an error of the model.",
            ),
        ]
    )


def _clouds(found: Diagnosis) -> dict[str, OneStep]:
    return {"held-out data": found.held} | {
        f"where {name} went": finding.there for name, finding in found.findings.items()
    }


def _knowledge(found: Diagnosis, config: Config) -> str:
    clouds = _clouds(found)
    curves = {"held-out data": found.held_open}
    for name, finding in found.findings.items():
        curves[f"{name}, actions taken"] = finding.visited
        curves[f"{name}, plans"] = finding.planned
    horizon: dict[str, list[float | None]] = {}
    for name, curve in curves.items():
        if curve is not None:
            error = curve.error.tolist()
            horizon[name] = [*error, *[None] * (config.horizon - len(error))]
    coverage = {
        name: [0.0, *(100 * said.calibration.coverage[p] for p in GRID), 100.0]
        for name, said in clouds.items()
        if said.calibration is not None
    }
    levels = [0.0, *(100 * p for p in GRID), 100.0]
    points = {name: _cloud(said) for name, said in clouds.items()}
    ranks = ", ".join(f"{name} {_number(said.rank)}" for name, said in clouds.items())
    calibrated = ", ".join(
        f"{name} {_number(said.calibration.nll)} and {_number(said.calibration.expected_error)}"
        for name, said in clouds.items()
        if said.calibration is not None
    )
    distances = {} if found.held_distance is None else {"held-out data": found.held_distance}
    for name, finding in found.findings.items():
        if finding.distance is not None:
            distances[f"where {name} went"] = finding.distance
    shares = [float(q) for q in range(0, 100, 2)]
    return "".join(
        [
            card(
                "Error against horizon",
                line_chart(
                    range(1, config.horizon + 1),
                    horizon,
                    label="error (deviations of y)",
                    log=True,
                    xlabel=f"steps predicted (of {found.model.dt:g} s)",
                ),
                "Root mean square error of open-loop predictions, in standard deviations of the held-out y; 1 is no better "
                "than a guess. Plans: the plant under the actions that were planned.",
            ),
            card(
                "Disagreement and error",
                scatter_chart(
                    points,
                    xlabel="disagreement of the members (deviations of the outputs)",
                    label="error of their mean",
                    log=True,
                ),
                f"One step ahead, a point is a transition. Where error rises with disagreement the model knows what it does "
                f"not know. Rank correlation: {ranks}.",
            ),
            card(
                "Coverage",
                line_chart(
                    levels,
                    {**coverage, "honest": levels},
                    label="truths inside (%)",
                    xlabel="level of the interval (%)",
                )
                if coverage
                else "",
                "Share of truths inside the model’s intervals, one step ahead. Below the honest line it is too sure, above "
                f"it too cautious. Negative log-likelihood and expected calibration error: {calibrated}.",
            ),
            card(
                "Distance to the training data",
                line_chart(
                    shares,
                    {
                        name: np.quantile(d[d.isfinite()].numpy(), np.array(shares) / 100).tolist()
                        for name, d in distances.items()
                    },
                    label="distance (normalised inputs)",
                    xlabel="share of steps that are nearer (%)",
                )
                if len(distances) > 1
                else "",
                "From each step, its action included, to the nearest one that the model was fitted to, in standard deviations "
                "of the model’s inputs. A planner whose line is far above that of held-out data has left the data.",
            ),
        ]
    )


def _cloud(said: OneStep) -> list[tuple[float, float]]:
    some = torch.linspace(0, len(said.error) - 1, min(_POINTS, len(said.error))).long()
    x, y = _rounded(said.disagreement[some]), _rounded(said.error[some])
    return list(zip(x, y, strict=True))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def _maps(found: Diagnosis) -> str:
    m = found.map
    parts = (
        (
            "Density of the data",
            m.count,
            "transitions per cell",
            "How many held-out and visited transitions there are. All three maps are coloured on logarithmic scales; grey is empty. Angles are taken to ±π.",
        ),
        (
            "True error",
            m.error,
            "error, one step",
            "Mean error of the members’ mean, in deviations of the outputs.",
        ),
        (
            "Disagreement",
            m.disagreement,
            "disagreement",
            "Mean deviation of the members. Bright where the error is: the model knows. Dark there: it does not.",
        ),
    )

    def picture(values: np.ndarray, unit: str) -> str:
        return heat_map(
            values.tolist(),
            across=(m.low[0], m.high[0]),
            up=(m.low[1], m.high[1]),
            xlabel=f"{m.names[0]} (units of y)",
            label=f"{m.names[1]} (units of y)",
            unit=unit,
        )

    return "".join(card(title, picture(values, unit), note) for title, values, unit, note in parts)


def _outputs(found: Diagnosis) -> str:
    clouds = _clouds(found)
    at = LEVELS.index(0.95)
    head = ["output"]
    for name in clouds:
        head += [f"error, {name}", "inside 95 %"]
    rows = []
    for i, output in enumerate(found.names):
        row = [output]
        for said in clouds.values():
            inside = None if said.calibration is None else float(said.calibration.coverage_each[at][i])
            row += [
                _number(float(said.output_error[i]), 3),
                "–" if inside is None else f"{100 * inside:.0f} %",
            ]
        rows.append(row)
    h = found.heads
    (stayed, early), (missed, hit) = h.confusion
    whose = "the learned head" if h.learned else "the task’s reward of predicted outputs"
    ends = "the learned head" if h.learned_end else "the task’s end of predicted outputs"
    confusion = _table(
        ("", "predicted to go on", "predicted to end"),
        (("went on", f"{stayed:,}", f"{early:,}"), ("ended", f"{missed:,}", f"{hit:,}")),
    )
    return (
        f"<div class='card'><h3>Error of each output</h3><div class='scroll'>{_table(head, rows)}</div>"
        "<p>Root mean square error one step ahead, in standard deviations of the output’s true changes in the held-out "
        "data, and the share of truths inside the model’s 95 % intervals. A wrong output has a large error and a small "
        "share.</p></div>"
        f"<div class='card'><h3>Reward and end of an episode</h3><p style='margin-top:0'>Reward by {whose}: root mean "
        f"square error {_amount(h.reward_rmse)}, mean error {_amount(h.reward_bias)}, where true rewards deviate by "
        f"{_amount(h.reward_std)}.</p>{confusion}<p>End by {ends}, on held-out and visited transitions.</p></div>"
    )


def _settings(settings: dict[str, Any]) -> str:
    return "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
