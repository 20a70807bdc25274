"""Writes the measured numbers into README.md, from the result files and from nowhere else.

    python -m mbrl.experiments.benchmarks.readme

Each section stands between <!-- name --> and <!-- /name -->.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mbrl.envs import WORLDS
from mbrl.experiments.benchmarks import returns
from mbrl.experiments.benchmarks.record import RESULTS

README = RESULTS.parent.parent.parent / "README.md"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def worlds() -> str:
    return table(("name", "what"), ((f"`{name}`", entry.about) for name, entry in WORLDS.items()))


def fidelity() -> str:
    result = json.loads((RESULTS / "fidelity.json").read_text())
    cases = result["worlds"]
    exact = [name for name, case in cases.items() if max(case["state_error"].values()) == 0]
    wrong = sum(case[kind]["wrong_ends"] for case in cases.values() for kind in ("float32", "float64"))
    ends = sum(case[kind]["ends"] for case in cases.values() for kind in ("float32", "float64"))

    def worst(kind: str, what: str) -> str:
        return f"{max(case[kind][what] for case in cases.values()):.1e}"

    return table(
        ("what", "measured"),
        (
            (
                f"predicted = realised state, {result['config']['mpc_steps']} MPC steps, 1 and 2 threads",
                f"difference exactly 0 in {len(exact)} of {len(cases)} worlds",
            ),
            (
                f"reward, {result['config']['random_steps']:,} random steps",
                f"within {worst('float64', 'reward')} (float64 actions), {worst('float32', 'reward')} (float32)",
            ),
            ("observation", f"within {worst('float64', 'observation')}"),
            ("ends", f"{wrong} wrong of {ends}"),
        ),
    )


def throughput() -> str:
    result = json.loads((RESULTS / "throughput.json").read_text())
    rows = (
        (
            name,
            f"{case['physics_steps_per_s']:,.0f}",
            f"{case['raw_physics_steps_per_s']:,.0f}",
            f"{100 * case['ratio']:.0f} %",
            f"{100 * case['bar']:.0f} %",
        )
        for name, case in result["cases"].items()
    )
    note = f"{result['machine']['cores']} cores, load {result['machine']['load']} at the end."
    return table(("case", "physics steps/s", "raw", "share", "wanted"), rows) + "\n\n" + note


def returns_table() -> str:
    config = returns.Config()
    rows = returns.summarise(config)
    parts = []
    for budget in config.budgets:
        lines = []
        for env in config.envs:
            cells = {row["planner"]: row for row in rows if (row["env"], row["budget"]) == (env, budget)}
            if cells:
                best = max(cells, key=lambda name: cells[name]["mean"])
                lines.append([env, *(_cell(cells.get(name), name == best) for name in config.planners)])
        if lines:
            parts.append(f"{budget:,} simulated steps per control step:\n")
            parts.append(table(("env", *config.planners), lines) + "\n")
    return "\n".join(parts) + "\n`n` is the number of seeds that have run; the best mean of a row is bold."


def _cell(row: dict[str, Any] | None, best: bool) -> str:
    if row is None:
        return ""
    mean = f"**{row['mean']:.0f}**" if best else f"{row['mean']:.0f}"
    interval = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
    return f"{mean}{interval} n={row['seeds']}"


def endurance() -> str:
    rows = (
        (
            result["env"],
            f"{result['steps']} of {result['wanted_steps']}",
            f"{result['planner']}, horizon {result['horizon']}, {result['model_steps_per_plan']:,.0f} steps per plan",
            f"{result['return']:.0f}",
            f"{result['plan_ms']['median']:.0f}",
        )
        for result in load("endurance/*.json")
    )
    return table(("world", "control steps without a fall", "planner", "return", "plan, ms"), rows)


def robots() -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in [*load("legged/*.json"), *load("robots/*.json")]:
        groups.setdefault(result["case"], []).append(result)
    rows = []
    for name, results in groups.items():
        speeds = [result["mean_velocity"] for result in results if "walk" in name]
        detail = f"mean speed {min(speeds):.2f} to {max(speeds):.2f} m/s" if speeds else ""
        if name.startswith("panda"):
            detail = f"final distance {100 * max(result['gap'] for result in results):.1f} cm at most"
        planner = results[0]["planner"]
        rows.append(
            (
                f"`{name}`",
                f"{sum(result['success'] for result in results)} of {len(results)}",
                detail,
                f"{planner['type']}, {planner['population']} × {planner['iterations']}",
                f"{statistics.median(result['plan_ms_median'] for result in results):.0f}",
                f"{statistics.median(result['real_time_factor'] for result in results):.2f}",
            )
        )
    head = ("world", "successes", "detail", "planner, candidates", "plan, ms", "real-time factor")
    arms = load("robustness/*.json")
    text = table(head, rows)
    if arms:
        falls = ", ".join(f"{arm['falls']} of {arm['seeds']} ({arm['arm']})" for arm in arms)
        text += f"\n\nFalls on plants whose mass and friction lie within ±20 % of the model's: {falls}."
    return text


SECTIONS: dict[str, Callable[[], str]] = {
    "worlds": worlds,
    "fidelity": fidelity,
    "throughput": throughput,
    "returns": returns_table,
    "endurance": endurance,
    "robots": robots,
}


def main(path: Path = README) -> None:
    text = path.read_text()
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if opening not in text or closing not in text:
            raise SystemExit(f"README.md has no section {opening.strip()} … {closing}.")
        before, rest = text.split(opening, 1)
        text = before + opening + section() + "\n" + closing + rest.split(closing, 1)[1]
    path.write_text(text)


if __name__ == "__main__":
    main()
