"""README sections on simulators and on planning on them."""

from __future__ import annotations

import json
import statistics
from typing import Any

import numpy as np
import scipy.stats

from mbrl.envs import WORLDS
from mbrl.experiments.benchmarks import returns
from mbrl.experiments.benchmarks.readme_tables import (
    chance,
    folder,
    load,
    mcnemar,
    mean_cell,
    median,
    settings,
    table,
)
from mbrl.experiments.benchmarks.robustness import ARMS


def worlds() -> str:
    return table(("name", "what"), ((f"`{name}`", entry.about) for name, entry in WORLDS.items()))


def fidelity() -> str:
    result = next(iter(load("fidelity.json")), None)
    if result is None:
        return ""
    cases = result["worlds"]
    exact = [
        name for name, case in cases.items() if all(error == 0 for error in case["state_error"].values())
    ]
    mpc_steps, random_steps = (
        min(case["config"][name] for case in cases.values()) for name in ("mpc_steps", "random_steps")
    )
    wrong = sum(case[kind]["wrong_ends"] for case in cases.values() for kind in ("float32", "float64"))
    ends = sum(case[kind]["ends"] for case in cases.values() for kind in ("float32", "float64"))

    def worst(kind: str, what: str) -> str:
        return f"{np.max([case[kind][what] for case in cases.values()]):.1e}"  # NaN is the worst

    return table(
        ("what", "measured"),
        (
            (
                f"predicted = realised state, {mpc_steps} MPC steps, 1 and 2 threads",
                f"difference exactly 0 in {len(exact)} of {len(cases)} worlds",
            ),
            (
                f"reward, {random_steps:,} random steps",
                f"within {worst('float64', 'reward')} (float64 actions), {worst('float32', 'reward')} (float32)",
            ),
            ("observation", f"within {worst('float64', 'observation')}"),
            ("ends", f"{wrong} wrong of {ends}"),
        ),
    )


def throughput() -> str:
    result = next(iter(load("throughput.json")), None)
    if result is None:
        return ""
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
    config = returns.Config(out=folder("returns"))
    rows = returns.summarise(config)
    parts = []
    for budget in config.budgets:
        lines = []
        for env in config.envs:
            cells = {row["planner"]: row for row in rows if (row["env"], row["budget"]) == (env, budget)}
            if cells:
                best = max(cells, key=lambda name: cells[name]["mean"])
                label = f"{env} (E)" if env in returns.EULER else env
                lines.append([label, *(mean_cell(cells.get(name), name == best) for name in config.planners)])
        if lines:
            parts.append(f"{budget:,} simulated steps per control step:\n")
            parts.append(table(("env", *config.planners), lines) + "\n")
    if not parts:
        return ""
    parts.append(
        "`n` is the number of seeds that have run; the best mean of a row is bold. (E): planned on the Euler "
        "integrator, which costs a quarter of the RK4 that the environment itself keeps."
    )
    parts += ["", "Expected was iCEM > CEM > random shooting at equal simulated steps. Measured:", ""]
    for env in returns.LARGE_ENVS:
        for budget in config.budgets:
            means = {
                row["planner"]: row["mean"] for row in rows if (row["env"], row["budget"]) == (env, budget)
            }
            lasted = [row["steps"] for row in rows if (row["env"], row["budget"]) == (env, budget)]
            order = sorted((name for name in means if name in returns.LARGE_PLANNERS), key=means.__getitem__)
            if order:
                falls = max(lasted) < config.steps
                parts.append(
                    f"* {env}, {budget:,} steps: {' > '.join(reversed(order))}."
                    + f" Every planner falls, after {min(lasted):.0f} to {max(lasted):.0f} of {config.steps} steps on "
                    f"average, beyond what its horizon sees; see below for what keeps it up." * falls
                )
    run = {(row["env"], row["budget"]) for row in rows}
    wanted = [(env, config.budgets[0]) for env in config.envs]
    wanted += [(env, config.budgets[1]) for env in returns.LARGE_ENVS]
    missing = [f"{env} at {budget:,}" for env, budget in wanted if (env, budget) not in run]
    if missing:
        parts += ["", f"Not run yet: {', '.join(missing)}."]
    return "\n".join(parts)


def endurance() -> str:
    cases: dict[str, list[dict[str, Any]]] = {}
    for result in load("endurance/*.json"):
        cases.setdefault(result["env"], []).append(result)
    rows = []
    for env, results in cases.items():
        one = results[0]
        planner = (
            f"{one['planner']}, horizon {one['horizon']}, {one['model_steps_per_plan']:,.0f} steps per plan"
        )
        if one.get("planning_integrator"):
            planner += f", planned with {one['planning_integrator'].capitalize()}"
        steps = sorted({result["steps"] for result in results})
        value = {"upright": "upright", "regulator": "LQR's cost-to-go"}.get(
            one.get("terminal_cost") or "", "none"
        )
        rows.append(
            (
                env,
                f"{' to '.join(map(str, steps[:: max(len(steps) - 1, 1)]))} of {one['wanted_steps']}",
                str(len(results)),
                planner,
                value,
                f"{statistics.mean(result['return'] for result in results):.0f}",
                f"{median(results, 'plan_ms'):.0f}",
            )
        )
    head = (
        "world",
        "control steps without a fall",
        "seeds",
        "planner",
        "terminal cost",
        "return",
        "plan, ms",
    )
    return table(head, rows) if rows else ""


def robots() -> str:
    cases: dict[str, dict[str, list[dict[str, Any]]]] = {}  # of each case, those with equal settings
    for result in [*load("legged/*.json"), *load("robots/*.json")]:
        same = json.dumps(settings(result), sort_keys=True)
        cases.setdefault(result["case"], {}).setdefault(same, []).append(result)
    rows = []
    for name, groups in cases.items():
        every = [settings(results[0]) for results in groups.values()]
        differ = sorted({k for one in every for k in one if len({str(other.get(k)) for other in every}) > 1})
        for results, planner in zip(groups.values(), every, strict=True):
            speeds = [result["mean_velocity"] for result in results if "walk" in name]
            detail = f"mean speed {min(speeds):.2f} to {max(speeds):.2f} m/s" if speeds else ""
            if name.startswith("panda"):
                detail = f"final distance {100 * max(result['gap'] for result in results):.1f} cm at most"
            plans = "type" in planner  # else the baseline that holds the control of the stance
            label = "hold the stance (no planner)"
            if plans:
                label = f"{planner['type']}, {planner['population']} × {planner['iterations']}"
                label += "".join(f", {k} {planner.get(k)}" for k in differ if k != "type")
            rows.append(
                (
                    f"`{name}`",
                    f"{sum(result['success'] for result in results)} of {len(results)}",
                    detail,
                    label,
                    f"{median(results, 'plan_ms_median'):.0f}" if plans else "–",
                    f"{median(results, 'real_time_factor'):.2f}" if plans else "–",
                )
            )
    head = ("world", "successes", "detail", "planner, candidates", "plan, ms", "real-time factor")
    return table(head, rows) if rows else ""


def robustness() -> str:
    arms = {arm["arm"]: arm for arm in load("robustness/*.json")}
    if not arms.keys() >= set(ARMS):
        return ""
    config = arms["sampled"]["config"]
    few, many, n = config["candidates"], config["candidates"] * config["models"], config["models"]
    planned_on = (
        f"the nominal model, {few} candidates; plants unchanged",
        f"the nominal model, {few} candidates",
        f"{n} sampled models, their mean, {few} candidates",
        f"{n} sampled models, the worst of them, {few} candidates",
        f"the nominal model, {many} candidates",
    )
    rows = []
    for name, what, work in zip(ARMS, planned_on, (1, 1, n, n, n), strict=True):
        arm = arms[name]
        interval = scipy.stats.binomtest(arm["falls"], arm["seeds"]).proportion_ci(method="wilson")
        share = f"{100 * interval.low:.0f} – {100 * interval.high:.0f} %"
        distance = f"{statistics.median(arm['distance']):.2f}"
        rows.append((name, what, f"{work} ×", f"{arm['falls']} of {arm['seeds']}", share, distance))
    head = ("arm", "planned on", "work", "falls", "95 % interval", "median distance, m")
    nominal, mean, worst, same = (arms[name] for name in ARMS[1:])
    return (
        table(head, rows)
        + f"\n\nWith {few} candidates each: {verdict(mean, nominal)} {verdict(worst, nominal)} "
        + f"At equal work: {verdict(worst, same)} "
        + "The plants of all arms but the first have mass and friction within ±20 % of the model's; "
        + "p is two-sided, from McNemar's exact test over the same plants. The cost of a fall and the worst case as the "
        + "risk were chosen after earlier runs on these plants, so these p are exploratory. "
        + other_plants()
    )


def other_plants() -> str:
    """The arms that stood out, on plants that no setting was chosen on."""
    arms = {arm["arm"]: arm for arm in load("robustness-other-plants/*.json")}
    if not arms.keys() >= {"nominal", "sampled, worst case"}:
        return ""
    return f"On other plants (`--seed 1`): {verdict(arms['sampled, worst case'], arms['nominal'])}"


def verdict(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Which of two arms fell less often, and whether that is more than chance."""
    p = mcnemar(a["fell_at"], b["fell_at"])
    if a["falls"] == b["falls"]:
        return f"“{a['arm']}” and “{b['arm']}” fell {a['falls']} times each ({chance(p)})."
    if a["falls"] > b["falls"]:
        a, b = b, a
    kind = "significant" if p < 0.05 else "not significant"
    far, near = (statistics.median(arm["distance"]) for arm in (a, b))
    return (
        f"“{a['arm']}” fell less often than “{b['arm']}”, {a['falls']} against {b['falls']} of {a['seeds']}, "
        f"{kind} ({chance(p)}), and went {far:.2f} m against {near:.2f} m."
    )
