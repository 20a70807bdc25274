"""README sections on planning with derivatives."""

from __future__ import annotations

import statistics
from typing import Any

from mbrl.experiments.benchmarks import feedback, ilqr_mpc, ilqr_speed, jacobian_speed
from mbrl.experiments.benchmarks.readme_tables import folder, load, mean_cell, table


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
    for row in ilqr_mpc.summarise(folder("ilqr_mpc")):
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
                    mean_cell(row, name == best),
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
