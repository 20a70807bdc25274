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

import numpy as np
import scipy.stats

from mbrl.envs import WORLDS
from mbrl.experiments.benchmarks import (
    exploration,
    feedback,
    ilqr_mpc,
    ilqr_speed,
    jacobian_speed,
    nmpc_speed,
    readme_nmpc,
    returns,
)
from mbrl.experiments.benchmarks.pets_speed import cells
from mbrl.experiments.benchmarks.record import RESULTS, interval
from mbrl.experiments.benchmarks.robustness import ARMS

MISSING = "Not measured yet."
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
    config = returns.Config(out=RESULTS / "returns")
    rows = returns.summarise(config)
    parts = []
    for budget in config.budgets:
        lines = []
        for env in config.envs:
            cells = {row["planner"]: row for row in rows if (row["env"], row["budget"]) == (env, budget)}
            if cells:
                best = max(cells, key=lambda name: cells[name]["mean"])
                label = f"{env} (E)" if env in returns.EULER else env
                lines.append([label, *(_cell(cells.get(name), name == best) for name in config.planners)])
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


def _cell(row: dict[str, Any] | None, best: bool) -> str:
    if row is None:
        return ""
    mean = f"**{row['mean']:.0f}**" if best else f"{row['mean']:.0f}"
    interval = "" if row["low"] is None else f" [{row['low']:.0f}, {row['high']:.0f}]"
    return f"{mean}{interval} n={row['seeds']}"


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


def swing_up() -> str:
    results = [*load("swing_up.json"), *load("upside_down.json")]
    if not results:
        return ""
    rows = (
        (
            name,
            f"{case['limit']:g}",
            f"{case['seconds']:g}",
            f"{case['unaided']} of {case['starts']}",
            f"{case['arrived']} of {case['starts']}",
            f"{case['worst']:.3f}",
        )
        for result in results
        for name, case in result["cases"].items()
    )
    return table(("system", "limit of u", "seconds", "arrived unaided", "arrived", "worst end"), rows)


def feedback_mpc() -> str:
    rows = []
    for case in load("feedback/*.json"):
        cells = {(cell["every"], cell["latency"], cell["gains"]): cell for cell in case["cells"]}
        latencies = sorted({latency for _, latency, _ in cells})
        for every in sorted({every for every, _, _ in cells}):
            for latency in dict.fromkeys((latencies[0], latencies[-1])):
                arms = (cells[every, latency, gains] for gains in (True, False))
                texts = (text for arm in arms for text in feedback.shown(arm))
                rows.append((case["case"], str(every), str(latency), *texts))
    head = ("system", "plan every", "latency", "cost, gains", "fallen", "cost, no gains", "fallen")
    return table(head, rows) if rows else ""


def jacobians() -> str:
    result = next(iter(load("jacobians.json")), None)
    if result is None:
        return ""
    rows = (
        (
            f"`{name}`",
            f"{row['ndx']}",
            f"{row['used']} of {row['used'] + row['left_out']}",
            "–" if row["median"] is None else f"{row['median']:.1e}",
            "–" if row["worst"] is None else f"{row['worst']:.1e}",
            f"{row['ms_per_state']:.1f}",
            f"{100 * min(1.0, row['inside_mujoco']):.0f} %",
        )
        for name, row in result["worlds"].items()
    )
    head = ("world", "tangent space", "states", "median error", "worst", "ms a state", "inside MuJoCo")
    return table(head, rows)


def ilqr_on_robots() -> str:
    names = {
        "ilqr": "iLQR",
        "ilqr-on": "iLQR, plans go on after a fall",
        "icem": "iCEM",
        "icem-own": "iCEM, reward",
        "polish": "iCEM refined by iLQR",
    }
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in ilqr_mpc.summarise(RESULTS / "ilqr_mpc"):
        found.setdefault(row["env"], {})[row["planner"]] = row
    rows, words = [], []
    for env, mine in found.items():
        best = max(mine, key=lambda name: mine[name]["mean"])
        for name in filter(mine.__contains__, names):
            row = mine[name]
            rows.append(
                (
                    env,
                    f"{row['wanted_steps']}",
                    names[name],
                    _cell(row, name == best),
                    f"{row['fell']} of {row['seeds']}",
                    f"{row['horizon']}",
                    f"{row['cpu_ms']:.0f}",
                )
            )
        if {"ilqr", "icem"} <= mine.keys():
            rivals = [mine[name] for name in ("icem", "icem-own") if name in mine]
            rival = max(rivals, key=lambda row: row["mean"])
            pairs = [(mine["ilqr"]["returns"][seed], rival["returns"][seed]) for seed in rival["returns"]]
            won = sum(ours > theirs for ours, theirs in pairs)
            verdict = f"better on {won} of {len(pairs)} seeds"
            words.append(f"{env}: iLQR against the iCEM of the higher mean, {verdict}.")
    if not rows:
        return ""
    load = statistics.median(row["load"] for mine in found.values() for row in mine.values())
    head = (
        "environment",
        "steps",
        "planner",
        "return",
        "fell",
        "horizon",
        "plan, ms of processor time",
    )
    note = f"Processor times are means on a busy machine (load {load:.0f} on 2 cores), and so upper limits."
    return table(head, rows) + "\n\n" + " ".join((*words, note))


def pushed_go2() -> str:
    arms = {
        "hold": "hold the stance (no planner)",
        "ilqr": "iLQR",
        "every-step": "iLQR, planned at every step",
        "stiff": "iLQR, without smooth contacts",
    }
    results = load("pushed_go2/*.json")
    rows = (
        (
            arms[row["arm"]],
            str(row["seed"]),
            "yes" if row["stood"] else f"no, fell after {row['seconds']:.1f} s",
            f"{row['height']['least']:.3f} of {row['height']['wanted']:.3f}",
            f"{row['height']['end']:.3f}" if row["stood"] else "–",
            f"{row['tilt_degrees']['most']:.0f}°",
            f"{row['tilt_degrees']['end']:.1f}°" if row["stood"] else "–",
            "–" if row["cpu_ms"] is None else f"{row['cpu_ms']:.0f}",
        )
        for row in sorted(results, key=lambda row: (list(arms).index(row["arm"]), row["seed"]))
    )
    head = (
        *("controlled by", "seed", "stood 10 s", "least height, m", "height at the end", "most tilt"),
        *("tilt at the end", "plan, ms of processor time"),
    )
    return table(head, rows) if results else ""


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
        for row in exploration.summarise(exploration.Config(out=RESULTS / "exploration"))
    ]
    return (
        table(("explores by", "goal found", "episodes to it", "as many as with noise?"), rows) if rows else ""
    )


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


def ilqr_speeds() -> str:
    result = next(iter(load("ilqr_speed.json")), None)
    if result is None:
        return ""
    rows, bars = [], []
    for case in result["cases"]:
        sides, n = case["sides"], case["problems"]
        rows += [(case["case"], str(n), name, *ilqr_speed.cells(side, n)) for name, side in sides.items()]
        ours = {name: side for name, side in sides.items() if name.startswith("ours")}
        best = max(ours, key=lambda name: ours[name]["times_faster"])
        times, wanted = ours[best]["times_faster"], case["wanted"]
        factor = float(f"{times:.2g}")
        bars.append(
            f"{case['case']} × {n}: {best.removeprefix('ours, ')} {factor:g} times as fast as {case['against']} "
            f"({wanted:g} wanted: {'met' if times >= wanted else 'not met'}), "
            f"at a higher cost in {ours[best]['higher']} of {n}"
        )
    machine = result["machine"]
    return (
        table(ilqr_speed.HEAD, rows)
        + f"\n\nThe fastest of ours: {'; '.join(bars)}. {machine['cpu']}, {machine['cores']} cores, load {machine['load']}."
    )


def jacobian_speeds() -> str:
    result = next(iter(load("jacobian_speed.json")), None)
    if result is None:
        return ""
    machine = result["machine"]
    return (
        table(jacobian_speed.HEAD, (jacobian_speed.cells(row) for row in result["cases"]))
        + f"\n\n{machine['cpu']}, {result['config']['threads']} thread, load {machine['load']}."
    )


def nmpc_speeds() -> str:
    result = next(iter(load("nmpc_speed.json")), None)
    if result is None:
        return ""
    cases, texts = {case["case"]: case["sides"] for case in result["cases"]}, []
    rows = [
        (case, name, *nmpc_speed.cells(name, side))
        for case, sides in cases.items()
        for name, side in sides.items()
    ]
    for (case, name), (median, worst) in nmpc_speed.WANTED.items():
        times = cases[case][name]["times_faster"]["do-mpc"]
        told = [
            f"{times['median_ms']:.2f} at the median ({median:g} wanted: {met(times['median_ms'], median)})"
        ]
        if worst is not None:
            told.append(
                f"{times['worst_ms']:.2f} at the worst ({worst:g} wanted: {met(times['worst_ms'], worst)})"
            )
        texts.append(f"{case}, {name}: times as fast as do-mpc, {', '.join(told)}")
    if "recovery" in cases:
        above = max(nmpc_speed.recovery({"sides": cases["recovery"]}))
        texts.append(
            f"the real-time iteration recovers at a cost of at most {100 * above:+.2g} % of the converged one's"
        )
    texts.append("passes: " + ", ".join(f"{case['case']} {case['passes']}" for case in result["cases"]))
    machine = result["machine"]
    return (
        table(nmpc_speed.HEAD, rows)
        + f"\n\n{'; '.join(texts)}. {machine['cpu']}, one thread, load {machine['load']}."
    )


def met(value: float, wanted: float) -> str:
    return "met" if value >= wanted else "not met"


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


def settings(result: dict[str, Any]) -> dict[str, Any]:
    """The planner of a result, with its horizon."""
    return {"horizon": result.get("horizon"), **result["planner"]}


def median(results: list[dict[str, Any]], name: str) -> float:
    values = (result[name] for result in results)
    return float(statistics.median(v["median"] if isinstance(v, dict) else v for v in values))


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


def chance(p: float) -> str:
    return f"p = {p:.2f}" if p >= 0.01 else "p < 0.01"


def mcnemar(a: list[int | None], b: list[int | None]) -> float:
    """Two-sided exact p that two planners fall equally often, from when they fell (None: never) on the same plants."""
    only_a = sum(x is not None and y is None for x, y in zip(a, b, strict=True))
    only_b = sum(x is None and y is not None for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_a, only_a + only_b).pvalue)


SECTIONS: dict[str, Callable[[], str]] = {
    "worlds": worlds,
    "fidelity": fidelity,
    "throughput": throughput,
    "returns": returns_table,
    "endurance": endurance,
    "sample-efficiency": sample_efficiency,
    "pets-speed": pets_speed,
    "mppi-speed": mppi_speed,
    "honest-uncertainty": honest_uncertainty,
    "likelihood": likelihood,
    "swing-up": swing_up,
    "feedback": feedback_mpc,
    "jacobians": jacobians,
    "ilqr-mpc": ilqr_on_robots,
    "pushed-go2": pushed_go2,
    "ilqr-speed": ilqr_speeds,
    "jacobian-speed": jacobian_speeds,
    "nmpc-speed": nmpc_speeds,
    "trap": trap,
    "exploration": explorers,
    "learned-nmpc": readme_nmpc.learned_nmpc_section,
    "robots": robots,
    "robustness": robustness,
}


def main(path: Path = README) -> None:
    text = path.read_text()
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if opening not in text or closing not in text:
            raise SystemExit(f"README.md has no section {opening.strip()} … {closing}.")
        before, rest = text.split(opening, 1)
        text = before + opening + (section() or MISSING) + "\n" + closing + rest.split(closing, 1)[1]
    path.write_text(text)


if __name__ == "__main__":
    main()
