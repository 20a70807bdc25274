"""The page of a comparison: figures and tables, readable without JavaScript."""

from __future__ import annotations

import base64
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mbrl.experiments.charts import card
from mbrl.experiments.compare_charts import forest_chart, pareto_chart, profile_chart
from mbrl.experiments.compare_summary import (
    Aggregate,
    Row,
    Summary,
    improvement,
    lost_to_model,
    optimality_gap,
    plan_ms,
)
from mbrl.experiments.statistics import Estimate, pareto, performance_profile
from mbrl.runs import plain


def half_name(budget: str, amount: float) -> str:
    return f"{amount:g} ms a plan" if budget == "ms" else f"{amount:,.0f} model steps a plan"


def lead(config: Any, summary: Summary) -> str:
    halves = " and ".join(half_name(*half) for half in summary.halves())
    seeds = "one seed, so without intervals" if config.seeds == 1 else f"{config.seeds} seeds each"
    return (
        f"Closed-loop episodes of at most {config.steps} steps in the true simulator, {seeds}, at {halves}. All planners "
        "meet the same starts. Intervals are 95 % stratified bootstrap intervals."
    )


def body(
    config: Any, summary: Summary, films: Mapping[str, tuple[Path, list[str]]], command: Sequence[str]
) -> list[str]:
    parts = []
    for budget, amount in summary.halves():
        mixed = _mixed(summary, budget)
        parts.append(f"<h2>At {half_name(budget, amount)}</h2>{mixed}{_overview(summary, budget)}")
    for env in dict.fromkeys(row.cell.env for row in summary.rows):
        parts.append(f"<h2>{escape(env)}</h2>{_world(summary, env)}{_mosaic(films.get(env))}")
    parts.append(f"<h2>Every cell</h2>{_every_cell(summary, config.seeds)}")
    parts.append(f"<h2>How to read this</h2><ul class='notes'>{_notes(summary)}</ul>")
    parts.append(_provenance(config, summary, command))
    return parts


def _mixed(summary: Summary, budget: str) -> str:
    """A warning where times of several machines stand in one column."""
    machines = summary.machines(budget)
    if len(machines) < 2:
        return ""
    return (
        f"<p><b>Times of {len(machines)} machines are mixed here</b>: {escape('; '.join(machines))}. Compare planners "
        "that ran on the same one, or run the timed half again on one machine.</p>"
    )


def _overview(summary: Summary, budget: str) -> str:
    """The aggregated figures of one half."""
    here = [a for a in summary.aggregates if a.budget == budget]
    if not here:
        return "<p>No world has a scale yet: it takes the random policy and a planner that beats it.</p>"
    models, names = summary.models, list(dict.fromkeys(row.cell.planner for row in summary.rows))
    cards = [
        card(
            "Normalised score, over all tasks",
            forest_chart(
                _by_planner(here, models),
                series=models,
                xlabel="interquartile mean of the score",
                reference={"reference": 1.0},
            ),
            "0 is the mean return of random actions, 1 that of the best planner on the true simulator. A planner that cannot "
            "run on some task is judged on the others; the table below tells on how many.",
        )
    ]
    cards.append(
        card(
            "Return against time",
            _return_against_time(summary, here),
            "Median time of a plan against the score; the lines join those that no other beats at lower cost."
            + (
                ""
                if budget == "ms"
                else " These plans were made for many episodes at once and beside other jobs: divided by the episodes, their time is rough."
            ),
        )
    )
    for model in models:
        group = sorted((a for a in here if a.model == model), key=lambda a: -a.score.value)
        if len(group) > 1:
            low = min(float(np.min(v)) for a in group for v in a.scores.values())
            thresholds = np.linspace(max(-0.5, min(0.0, low)), 1.1, 61)
            profiles = {a.planner: performance_profile(list(a.scores.values()), thresholds) for a in group}
            cards.append(
                card(
                    f"Performance profile, {model}",
                    profile_chart(thresholds, profiles, names=names, xlabel="score"),
                    "The share of episodes that reach each score; tasks weigh the same. A line above another is better throughout.",
                )
            )
    tables = "".join(_improvement(summary, budget, model) for model in models)
    return f"<div class='grid2'>{''.join(cards)}</div>{_score_table(here, models)}{tables}"


def _by_planner(aggregates: Sequence[Aggregate], models: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """planner -> model -> score, the best first."""
    found: dict[str, dict[str, Estimate]] = {}
    for model in models:
        for a in aggregates:
            if a.model == model:
                found.setdefault(a.planner, {})[model] = a.score
    return dict(sorted(found.items(), key=lambda item: -max(e.value for e in item[1].values())))


def _return_against_time(summary: Summary, here: Sequence[Aggregate]) -> str:
    points: dict[str, dict[str, tuple[float, Estimate]]] = {}
    fronts = {}
    for model in summary.models:
        for a in here:
            if a.model == model and (ms := _plan_ms(summary, a)) is not None:
                points.setdefault(a.planner, {})[model] = ms, a.score
        names = [name for name, each in points.items() if model in each]
        costs, values = [points[n][model][0] for n in names], [points[n][model][1].value for n in names]
        fronts[model] = [names[i] for i in pareto(costs, values)]
    return pareto_chart(
        points,
        series=summary.models,
        xlabel="ms per plan and episode, median",
        label="score",
        fronts=fronts,
    )


def _plan_ms(summary: Summary, a: Aggregate) -> float | None:
    times = [
        ms
        for row in summary.rows
        if (row.cell.planner, row.model, row.cell.budget) == (a.planner, a.model, a.budget)
        and (ms := plan_ms(row))
    ]
    return statistics.median(times) if times else None


def _score_table(here: Sequence[Aggregate], models: Sequence[str]) -> str:
    by = {(a.planner, a.model): a for a in here}
    head = "".join(f"<th>{escape(model)}</th><th>tasks</th>" for model in models)
    lines = []
    for planner in _by_planner(here, models):
        tds = [f"<td>{planner}</td>"]
        for model in models:
            a = by.get((planner, model))
            tds.append(_estimate_cell(None if a is None else a.score, 2))
            tds.append(f"<td data-value='{a.worlds}'>{a.worlds}</td>" if a else "<td></td>")
        lines.append(f"<tr>{''.join(tds)}</tr>")
    return _sortable(f"<th>planner</th>{head}", lines)


def _improvement(summary: Summary, budget: str, model: str) -> str:
    names, table = improvement(summary, budget, model)
    if len(names) < 2:
        return ""
    head = "<th></th>" + "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for name, line in zip(names, table, strict=True):
        tds = "".join(
            "<td>–</td>" if e is None else f"<td title='{_interval(e, 2)}'>{e.value:.2f}</td>" for e in line
        )
        lines.append(f"<tr><td>{name}</td>{tds}</tr>")
    return (
        f"<details><summary>Probability of improvement, {escape(model)}</summary><p>How likely an episode of the planner "
        f"on the left earns more than one of the planner above, on a task drawn at random.</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></details>"
    )


def _world(summary: Summary, env: str) -> str:
    rows = [row for row in summary.rows if row.cell.env == env]
    scale, random = summary.scales.get(env), summary.random.get(env)
    words = []
    if random is not None:
        words.append(f"Random actions earn {_interval(random, 1)}.")
    if scale is not None:
        words.append(f"A score of 1 is {scale.reference:.1f}, the mean return of {scale.by}.")
    for planner, kind in (("ilqr", "simulator"), ("nmpc", "analytic")):
        true = [row.total for row in rows if (row.cell.planner, row.kind) == (planner, kind) and row.total]
        if true:
            told = " and ".join(_interval(e, 1) for e in true)
            words.append(f"With the true model, {planner} ({kind}) earns {told}.")
    optimum = [e["optimum"] for row in rows for e in row.episodes if e.get("optimum") is not None]
    if optimum:
        words.append(f"The Riccati optimum earns {statistics.fmean(optimum):.4g} from the same starts.")
    cards = []
    for budget, amount in summary.halves():
        marks: dict[str, dict[str, Estimate]] = {}
        for row in rows:
            if row.cell.budget == budget and row.total is not None:
                marks.setdefault(row.cell.planner, {})[row.model] = row.total
        ordered = dict(sorted(marks.items(), key=lambda item: -max(e.value for e in item[1].values())))
        if ordered:
            reference = {} if scale is None else {"reference": scale.reference}
            if optimum:
                reference = {"optimum": statistics.fmean(optimum)}
            chart = forest_chart(ordered, series=summary.models, xlabel="mean return", reference=reference)
            cards.append(
                card(f"Return at {half_name(budget, amount)}", chart, "Mean over seeds, with intervals.")
            )
    refused = {(row.cell.planner, row.model): row.why for row in rows if row.why is not None}
    notes = "".join(
        f"<li><b>{escape(planner)} on the {escape(model)} model</b>: {escape(why or '')}</li>"
        for (planner, model), why in refused.items()
    )
    told = f"<details><summary>{len(refused)} cells without episodes, and why</summary><ul class='notes'>{notes}</ul></details>"
    return (
        f"<p>{escape(' '.join(words))}</p><div class='grid2'>{''.join(cards)}</div>{told if refused else ''}"
    )


def _every_cell(summary: Summary, seeds: int) -> str:
    lost = lost_to_model(summary)
    lq = any("optimum" in e and e["optimum"] is not None for row in summary.rows for e in row.episodes)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("task", lambda row: f"<td>{escape(row.cell.env)}</td>"),
        ("model", lambda row: f"<td>{escape(row.model)}</td>"),
        ("planner", lambda row: f"<td>{escape(row.cell.planner)}</td>"),
        ("budget", lambda row: _number_cell(row.cell.amount, ".4g", " ms" if row.cell.timed else " steps")),
        ("return", lambda row: _estimate_cell(row.total, 1)),
        ("score", lambda row: _estimate_cell(row.score, 2)),
        ("less on simulator", lambda row: _number_cell(lost.get(id(row)), "+.2f")),
        ("gap", lambda row: _number_cell(row.number("gap"), ".3g")),
        ("planned", lambda row: _number_cell(row.number("planned"), ".4g")),
        ("ms, median", lambda row: _number_cell(plan_ms(row), ".3g")),
        (
            "ms, worst",
            lambda row: _number_cell(row.number("plan_ms_worst", max) if row.cell.timed else None, ".3g"),
        ),
        ("late", lambda row: _number_cell(row.number("late"), ".0%")),
        ("model steps", lambda row: _number_cell(row.number("model_steps"), ",.0f")),
        ("certified", lambda row: _number_cell(row.number("certified"), ".0%")),
        ("diverged", lambda row: _number_cell(_some(row.number("diverged")), ".0%")),
        ("plans lost", lambda row: _number_cell(_some(row.number("lost")), ".0%")),
        ("violated", lambda row: _violated(row)),
        ("fallbacks", lambda row: _number_cell(row.number("fallbacks"), ".2g")),
        (
            "seeds",
            lambda row: f"<td data-value='{len(row.episodes)}'>{len(row.episodes)}{_of(row, seeds)}</td>",
        ),
    ]
    if lq:
        columns.insert(6, ("above optimum", lambda row: _number_cell(optimality_gap(row), ".2%")))
    lines = []
    for row in summary.rows:
        if row.why is None:
            lines.append(f"<tr>{''.join(cell(row) for _, cell in columns)}</tr>")
    return _sortable("".join(f"<th>{name}</th>" for name, _ in columns), lines)


def _of(row: Row, seeds: int) -> str:
    return "" if len(row.episodes) == seeds else f" of {seeds}"


def _some(share: float | None) -> float | None:
    """Nothing to show where there is none."""
    return share or None


def _violated(row: Row) -> str:
    found = row.violated
    if found is None:
        return "<td></td>"
    return f"<td data-value='{found[0]}'>{found[0]:.3g} <small>by ≤ {found[1]:.2g}</small></td>"


def _number_cell(value: float | None, form: str, unit: str = "") -> str:
    return "<td></td>" if value is None else f"<td data-value='{value}'>{value:{form}}{unit}</td>"


def _estimate_cell(e: Estimate | None, digits: int) -> str:
    if e is None:
        return "<td></td>"
    spread = "" if e.low is None else f" <small>[{e.low:.{digits}f}, {e.high:.{digits}f}]</small>"
    return f"<td data-value='{e.value}'>{e.value:.{digits}f}{spread}</td>"


def _interval(e: Estimate, digits: int) -> str:
    spread = "" if e.low is None else f" [{e.low:.{digits}f}, {e.high:.{digits}f}]"
    return f"{e.value:.{digits}f}{spread}"


def _sortable(head: str, lines: Sequence[str]) -> str:
    return (
        f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _notes(summary: Summary) -> str:
    notes = [
        (
            "<b>model steps</b>: what a plan took on average, candidates × horizon × particles; a Jacobian counts as the steps of "
            "forward differences, however it was found, an interior-point iteration as one rollout and one Jacobian, a gradient as two rollouts."
        ),
        (
            "<b>gap</b>: what a plan expects to earn over its horizon, less what the same actions earn in the plant from the same "
            "state; the mean over an episode's plans. Far above 0 the model is being exploited; on the true simulator it is 0."
        ),
        (
            "<b>less on simulator</b>: the score less that of the same planner with the same budget on the true simulator, "
            "seed by seed, on average."
        ),
        "<b>diverged</b>: episodes that the simulator broke off because its physics blew up; they keep what they had earned.",
        "<b>plans lost</b>: plans that left the finite numbers, on the model or in the plant; their gaps are not in the mean.",
        "<b>certified</b>: the share of plans that the planner itself says are optimal, to its tolerance; only solvers say so.",
        (
            "<b>late</b>: the share of plans that took longer than the budget. Planners are sized by timing them before the first "
            "episode, so plans scatter around it."
        ),
        "<b>violated</b>: states of an episode in which a constraint of the task did not hold; only nonlinear MPC is given them.",
        "<b>budget in ms</b>: one problem at a time, and no job beside it.",
    ]
    loads = [load for row in summary.rows if row.cell.timed for load in row.loads]
    if loads:
        notes.append(f"Load average while the timed cells ran: {min(loads):.1f} to {max(loads):.1f}.")
    return "".join(f"<li>{note}</li>" for note in notes)


def _provenance(config: Any, summary: Summary, command: Sequence[str]) -> str:
    typed = shlex.join(command) if command else "not run from the command line"
    facts: dict[str, str] = {name: ", ".join(found) for name, found in summary.versions().items()}
    facts["machine"] = "; ".join(sorted({m for row in summary.rows for m in row.machines}))
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    settings = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>"
        for k, v in plain(config).items()
        if k != "type"
    )
    return (
        f"<h2>Command and versions</h2><code class='command'>{escape(typed)}</code>"
        f"<div class='grid2'><div class='card'><h3>Settings</h3><table>{settings}</table></div>"
        f"<div class='card'><h3>What the cells ran with</h3><table>{rows}</table></div></div>"
    )


def _mosaic(film: tuple[Path, list[str]] | None) -> str:
    if film is None:
        return ""
    path, names = film
    source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    labels = "".join(f"<span>{escape(name)}</span>" for name in names)
    return f"<video class='mosaic' controls loop muted playsinline src='{source}'></video><div class='names'>{labels}</div>"
