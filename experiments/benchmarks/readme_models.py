"""README sections on learned models, and on planning on them."""

from __future__ import annotations

import statistics
from typing import Any

from mbrl.experiments.benchmarks import exploration
from mbrl.experiments.benchmarks.pets_speed import cells
from mbrl.experiments.benchmarks.readme_tables import chance, folder, load, table
from mbrl.experiments.benchmarks.record import interval


def sample_efficiency() -> str:
    cases: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in load("sample_efficiency/*.json"):
        cases.setdefault((result["env"], result["steps"]), []).append(result)
    rows = []
    for (env, steps), results in cases.items():
        totals = [result["return"] for result in results]
        low, high = interval(totals)
        around = "" if low is None else f" [{low:.1f}, {high:.1f}]"
        rows.append(
            (
                f"`{env}`",
                f"{steps:,}",
                f"{statistics.mean(totals):.1f}{around}",
                f"{results[0]['bar']:g}",
                results[0]["judged_by"],
                str(len(results)),
                f"{statistics.mean(result['wall_s'] for result in results) / 60:.0f}",
            )
        )
    head = ("world", "real steps", "return", "wanted", "judged by", "seeds", "wall, min")
    return table(head, rows) if rows else ""


def pets_speed() -> str:
    result = next(iter(load("pets_speed.json")), None)
    if result is None:
        return ""
    rows = (
        (work, name, *cells(side))
        for work, case in result["cases"].items()
        for name, side in case["sides"].items()
    )
    machine = result["machine"]
    note = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}."
    head = ("work", "side", "median, s", "times faster", "TFLOP/s", "return of the plan, or error")
    return table(head, rows) + "\n\n" + note


def mppi_speed() -> str:
    result = next(iter(load("mppi_speed.json")), None)
    if result is None:
        return ""
    rows = (
        (kind, name, *cells(side))
        for kind, case in result["cases"].items()
        for name, side in case["sides"].items()
    )
    head = ("network", "side", "median, s", "times faster", "TFLOP/s", "return of the plan")
    machine = result["machine"]
    return table(head, rows) + f"\n\n{machine['cpu']}, {machine['cores']} cores, load {machine['load']}."


def honest_uncertainty() -> str:
    result = next(iter(load("honest_uncertainty.json")), None)
    if result is None:
        return ""
    rows = (
        (
            f"{row['n']:,}",
            f"{100 * row['aleatoric_error']:.0f} %",
            f"{row['epistemic_inside']:.4f}",
            f"{row['epistemic_outside']:.2f}",
        )
        for row in result["rows"]
    )
    return table(("points", "error of the aleatoric part", "epistemic, inside the data", "outside"), rows)


def likelihood() -> str:
    result = next(iter(load("likelihood.json")), None)
    if result is None:
        return ""
    betas = result["config"]["betas"]
    found = {(row["world"], row["beta"]): row for row in result["results"]}
    rows = (
        (
            f"`{world}`",
            *(f"{found[world, beta]['error']:.4f} / {found[world, beta]['nll']:.2f}" for beta in betas),
        )
        for world in result["config"]["worlds"]
    )
    return table(("world", *(f"β = {beta:g}" for beta in betas)), rows)


def trap() -> str:
    result = next(iter(load("trap.json")), None)
    if result is None:
        return ""
    rows = (
        (
            arm["arm"],
            f"{arm['trapped']} of {arm['seeds']}",
            f"{arm['arrived']} of {arm['seeds']}",
            "" if arm["arm"] == "mean" else chance(arm["p"]),
        )
        for arm in result["arms"]
    )
    return table(("planned for", "trapped", "arrived", "trapped as often as with the mean?"), rows)


def explorers() -> str:
    rows = [
        (
            row["arm"],
            f"{row['found']} of {row['seeds']}",
            f"{row['mean']:.1f}" + ("" if row["low"] is None else f" [{row['low']:.1f}, {row['high']:.1f}]"),
            "" if row["arm"] == "noise" else chance(row["p"]),
        )
        for row in exploration.summarise(exploration.Config(out=folder("exploration")))
    ]
    return (
        table(("explores by", "goal found", "episodes to it", "as many as with noise?"), rows) if rows else ""
    )
