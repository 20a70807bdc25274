"""What sections of the README share."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import scipy.stats

from mbrl.experiments.benchmarks.record import RESULTS


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def folder(name: str) -> Path:
    return RESULTS / name


def load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def met(value: float, wanted: float) -> str:
    return "met" if value >= wanted else "not met"


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """The planner of a result, with its horizon."""
    return {"horizon": result.get("horizon"), **result["planner"]}


def median(results: list[dict[str, Any]], name: str) -> float:
    values = (result[name] for result in results)
    return float(statistics.median(v["median"] if isinstance(v, dict) else v for v in values))


def chance(p: float) -> str:
    return f"p = {p:.2f}" if p >= 0.01 else "p < 0.01"


def mcnemar(a: list[int | None], b: list[int | None]) -> float:
    """Two-sided exact p that two planners fall equally often, from when they fell (None: never) on the same plants."""
    only_a = sum(x is not None and y is None for x, y in zip(a, b, strict=True))
    only_b = sum(x is None and y is not None for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue)


def mean_cell(row: dict[str, Any] | None, best: bool) -> str:
    if row is None:
        return ""
    mean = f"**{row['mean']:.0f}**" if best else f"{row['mean']:.0f}"
    interval = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
    return f"{mean}{interval} n={row['seeds']}"
