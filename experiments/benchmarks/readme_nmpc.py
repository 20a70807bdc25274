"""README sections on nonlinear MPC."""

from __future__ import annotations


def learned_nmpc_section() -> str:
    from mbrl.experiments.benchmarks import readme  # which imports this module

    result = next(iter(readme.load("learned_nmpc.json")), None)
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
    text = readme.table(head, lines)
    seen = {arm: {r["seed"]: r for r in result["runs"] if r["arm"] == arm} for arm in rows}
    if seen.keys() >= {"mean", "scenarios"}:
        both = sorted(seen["mean"].keys() & seen["scenarios"].keys())
        mean, many = (
            [1 if seen[arm][s]["violated"] else None for s in both] for arm in ("mean", "scenarios")
        )
        text += f"\n\nThe limit is violated as often with scenarios as with the mean: {readme.chance(readme.mcnemar(mean, many))} "
        text += f"(McNemar's exact test over {len(both)} seeds). {result['chosen']}"
    return text
