"""report.html, results.json and cells.csv of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.markup import escape as markup

from mbrl.envs import make_world
from mbrl.errors import ContractError, MbrlError
from mbrl.experiments.cells import Cell
from mbrl.experiments.compare_page import body, lead
from mbrl.experiments.compare_summary import Row, Summary, optimality_gap, plan_ms, summarise
from mbrl.experiments.ledger import Ledger
from mbrl.experiments.video import write_mosaic
from mbrl.runs import environment, plain, write_text

_SHOWN = 4  # planners side by side in a video
_COLUMNS = (
    *(
        "env",
        "model",
        "planner",
        "budget",
        "amount",
        "horizon",
        "seed",
        "return",
        "steps",
        "terminated",
        "diverged",
    ),
    *(
        "planned",
        "gap",
        "optimum",
        "plan_ms",
        "plan_ms_worst",
        "late",
        "model_steps",
        "certified",
        "fallbacks",
        "violated",
    ),
)


def write_results(
    config: Any, cells: Sequence[Cell], ledger: Ledger, *, command: Sequence[str], console: Console
) -> Path:
    """Write what the ledger knows of the cells, and return the path of report.html.

    Args:
        config: has `seeds` and `video`.

    Raises:
        ContractError: no cell has an episode.
    """
    summary = summarise(cells, ledger, range(config.seeds))
    if not any(row.episodes for row in summary.rows):
        reasons = {row.why for row in summary.rows if row.why}
        raise ContractError(
            f"There is nothing to report in {ledger.folder}: no cell has an episode ({'; '.join(sorted(reasons))[:600]})."
        )
    folder = ledger.folder
    write_text(folder / "results.json", json.dumps(_results(config, summary, command), indent=1) + "\n")
    write_text(folder / "cells.csv", _table_of_episodes(summary))
    films = _films(summary, ledger, console) if config.video else {}
    page = resources.files("mbrl.experiments")
    text = Template(page.joinpath("compare.html").read_text(encoding="utf-8")).substitute(
        title="Comparison of planners",
        heading=f"{_count(summary, 'planner', 'planner')} on {_count(summary, 'env', 'task')}",
        style=page.joinpath("page.css").read_text(encoding="utf-8"),
        lead=escape(lead(config, summary)),
        body="".join(body(config, summary, films, command)),
    )
    return write_text(folder / "report.html", text)


def _count(summary: Summary, name: str, word: str) -> str:
    n = len({getattr(row.cell, name) for row in summary.rows})
    return f"{n} {word}{'' if n == 1 else 's'}"


def _films(summary: Summary, ledger: Ledger, console: Console) -> dict[str, tuple[Path, list[str]]]:
    """Of each world, the first episodes of the best planner on each model and of the worst, side by side."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for env in dict.fromkeys(row.cell.env for row in summary.rows):
        rows = [r for r in summary.rows if r.cell.env == env and r.key and ledger.film(r.key) is not None]
        rows.sort(key=lambda row: -float(row.returns.mean()))
        chosen = [next(r for r in rows if r.model == m) for m in dict.fromkeys(r.model for r in rows)][
            : _SHOWN - 1
        ]
        if rows and rows[-1] not in chosen:
            chosen.append(rows[-1])
        names = [f"{row.cell.planner}, {row.model}: {row.episodes[0]['return']:.0f}" for row in chosen]
        path = ledger.folder / "films" / f"{env}-{'-'.join(str(row.key)[:6] for row in chosen)}.mp4"
        try:
            if chosen and not path.exists():
                films = [film for row in chosen if (film := ledger.film(str(row.key))) is not None]
                with console.status(f"rendering {env}"):
                    write_mosaic(make_world(env), films, path)
        except (MbrlError, OSError, RuntimeError) as error:  # no picture is worth a failed report
            console.print(
                f"[yellow]No videos:[/yellow] {markup(str(error))}", highlight=False, soft_wrap=True
            )
            return found
        if chosen:
            found[env] = path, names
    return found


def _results(config: Any, summary: Summary, command: Sequence[str]) -> dict[str, Any]:
    return {
        "command": list(command),
        "config": plain(config),
        **environment(),
        "machines": {budget: summary.machines(budget) for budget, _ in summary.halves()},
        "scales": {env: dataclasses.asdict(scale) for env, scale in summary.scales.items()},
        "random": {env: dataclasses.asdict(e) for env, e in summary.random.items()},
        "scores": [
            {
                "planner": a.planner,
                "model": a.model,
                "budget": a.budget,
                "tasks": a.worlds,
                **dataclasses.asdict(a.score),
            }
            for a in summary.aggregates
        ],
        "cells": [_cell_result(row) for row in summary.rows],
    }


def _cell_result(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {
        "env": row.cell.env,
        "model": row.model,
        "kind": row.kind,
        "planner": row.cell.planner,
        "budget": row.cell.budget,
        "amount": row.cell.amount,
        "horizon": row.cell.horizon,
    }
    if row.why is not None:
        return found | {"why": row.why}
    names = ("planned", "gap", "plan_ms_worst", "late", "model_steps", "certified", "fallbacks")
    return found | {
        "seeds": len(row.episodes),
        "size": row.size,
        "return": None if row.total is None else dataclasses.asdict(row.total),
        "score": None if row.score is None else dataclasses.asdict(row.score),
        "optimality_gap": optimality_gap(row),
        "plan_ms": plan_ms(row),
        "violated": row.violated,
        **{name: row.number(name, max if name == "plan_ms_worst" else statistics.fmean) for name in names},
    }


def _table_of_episodes(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in summary.rows:
        cell = dataclasses.asdict(row.cell) | {"model": row.model}
        for episode in row.episodes:
            violated = sum(n for n, _ in episode["violations"].values())
            writer.writerow(cell | episode | {"violated": violated if episode["violations"] else None})
    return text.getvalue()
