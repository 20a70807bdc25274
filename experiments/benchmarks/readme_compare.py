"""README sections on comparing planners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mbrl.experiments.benchmarks.headline import PLANNERS
from mbrl.experiments.benchmarks.readme_tables import load, table

_KINDS = ("simulator", "analytic", "learned")


def headline() -> str:
    result = next(iter(load("headline.json")), None)
    if result is None:
        return ""
    parts = []
    budgets = dict.fromkeys((cell["budget"], cell["amount"]) for cell in result["cells"])
    for budget, amount in budgets:
        scores = {(s["planner"], s["model"]): s for s in result["scores"] if s["budget"] == budget}
        names = sorted(
            (p for p in PLANNERS if any((p, kind) in scores for kind in _KINDS)),
            key=lambda p: -max(scores[p, kind]["value"] for kind in _KINDS if (p, kind) in scores),
        )
        if not names:
            continue
        unit = f"{amount:g} ms a plan" if budget == "ms" else f"{amount:,.0f} steps of the model a plan"
        rows = [(name, *(_score(scores.get((name, kind))) for kind in _KINDS)) for name in names]
        parts.append(f"At {unit}:\n\n" + table(("planner, score over the tasks", *_KINDS), rows))
        parts.append(_tasks(result["cells"], budget, names))
    config, machine = result["config"], result["machine"]
    parts.append(
        f"{config['seeds']} seeds, episodes of at most {config['steps']} steps. Score: 0 random actions, 1 the best planner "
        "on the simulator; interquartile mean, 95 % stratified bootstrap interval, and in brackets on how many tasks. "
        f"{machine['cpu']}, {machine['cores']} cores, one thread a job."
    )
    return "\n\n".join(parts)


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "cannot run"
    spread = "" if score["low"] is None else f" [{score['low']:.2f}, {score['high']:.2f}]"
    return f"{score['value']:.2f}{spread} ({score['tasks']})"


def _tasks(cells: list[dict[str, Any]], budget: str, names: list[str]) -> str:
    """Mean returns by task: on the simulator, and on the learned model."""
    found = {
        (c["env"], c["kind"], c["planner"]): c for c in cells if c["budget"] == budget and "why" not in c
    }
    envs = list(dict.fromkeys(env for env, _, _ in found))
    optimum = any(c.get("optimality_gap") is not None for c in found.values())
    rows = []
    for name in names:
        row = [name]
        for env in envs:
            told = [
                f"{found[env, kind, name]['return']['value']:.0f}"
                for kind in _KINDS
                if (env, kind, name) in found
            ]
            row.append(" / ".join(told) or "–")
        if optimum:
            row.append(_gap(found, name))
        rows.append(row)
    head = ["mean return: " + " / ".join(_KINDS), *envs]
    return table(head + ["above the Riccati optimum"] * optimum, rows)


def _gap(found: Mapping[tuple[str, str, str], Mapping[str, Any]], name: str) -> str:
    gaps = [
        cell["optimality_gap"]
        for (_, _, planner), cell in found.items()
        if planner == name and cell.get("optimality_gap") is not None
    ]
    return " / ".join(f"{100 * gap:.2g} %" for gap in gaps) or "–"


def coverage() -> str:
    result = next(iter(load("coverage.json")), None)
    if result is None:
        return ""
    seeds = result["config"]["seeds"]
    groups = dict.fromkeys((r["distribution"], r["statistic"], r["tasks"]) for r in result["rows"])
    by = {(r["distribution"], r["statistic"], r["tasks"], r["seeds"]): r for r in result["rows"]}
    rows = [
        (
            *map(str, group),
            *(f"{100 * by[*group, n]['coverage']:.1f} ({100 * by[*group, n]['plain']:.1f})" for n in seeds),
        )
        for group in groups
    ]
    head = ("runs", "statistic", "tasks", *(f"{n} seeds, %" for n in seeds))
    inside = sum(abs(r["coverage"] - 0.95) <= 0.02 for r in result["rows"])
    return (
        table(head, rows)
        + f"\n\nIn {inside} of {len(rows) * len(seeds)} cases within 2 points of 95 % (in brackets the plain percentile "
        f"bootstrap, {sum(abs(r['plain'] - 0.95) <= 0.02 for r in result['rows'])}); {result['config']['trials']:,} trials each."
    )
