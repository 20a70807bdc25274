"""README sections on nonlinear MPC."""

from __future__ import annotations

from mbrl.experiments.benchmarks import nmpc_speed
from mbrl.experiments.benchmarks.readme_tables import chance, load, mcnemar, met, table


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


def learned_expressions() -> str:
    result = next(iter(load("learned_expressions.json")), None)
    if result is None:
        return ""
    lines = []
    for row in result["rows"]:
        derived, batch = row["us"]["derived"], row["us"]["batch"]
        lines.append(
            (
                " × ".join(str(n) for n in row["hidden"]),
                f"{row['members']}",
                row["activation"],
                f"{max(row['errors'].values()):.0e}",
                f"{derived:.0f}",
                f"{batch:.0f}",
                f"{derived / batch:.1f} ×",
                f"{row['us_theta'] / 1e3:.1f}",
                f"{row['s_proof']:.2f}",
            )
        )
    head = (
        "hidden units", "networks", "activation", "largest relative error", "CasADi's derivatives, µs",
        "in a batch, µs", "faster", "new weights, ms", "proof, s",
    )  # fmt: skip
    return table(head, lines)


def learned_nmpc() -> str:
    result = next(iter(load("learned_nmpc.json")), None)
    if result is None:
        return ""
    rows = {row["arm"]: row for row in result["arms"]}
    lines = []
    for arm, row in rows.items():
        limited = arm != "swing-up"
        lines.append(
            (
                "swing-up, no limit" if not limited else f"drive on another plant, {arm}",
                f"{row['up']} of {row['seeds']}",
                f"{row['violated']} of {row['seeds']}" if limited else "",
                f"{100 * row['beyond']:.1f} cm" if limited else "",
                f"{row['cost']:.1f}",
                f"{row['plan_ms']:.0f} ms",
            )
        )
    head = ("task and planner", "upright", "limit violated", "at most by", "median cost", "per step")
    text = table(head, lines)
    seen = {arm: {r["seed"]: r for r in result["runs"] if r["arm"] == arm} for arm in rows}
    if seen.keys() >= {"mean", "scenarios"}:
        both = sorted(seen["mean"].keys() & seen["scenarios"].keys())
        mean, many = (
            [1 if seen[arm][s]["violated"] else None for s in both] for arm in ("mean", "scenarios")
        )
        text += f"\n\nThat scenarios violate the limit as often as the mean: {chance(mcnemar(mean, many))} "
        text += f"(McNemar's exact test over {len(both)} seeds). {result['chosen']}"
    return text
