"""Plots of a control run: controls and constraints, phase portraits, and how the cost fell in single plans."""

from __future__ import annotations

import math
from itertools import groupby

import mujoco
from torch import Tensor

from mbrl.envs import Within
from mbrl.experiments.charts import card, line_chart, phase_chart
from mbrl.experiments.recording import HELD, Recording
from mbrl.problem import Box

_LINES, _CHARTS, _PORTRAITS, _PLANS = 3, 2, 4, 3


def controls(recording: Recording) -> str:
    """The controls over time with their bounds, three to a chart; of many those that vary most."""
    model, actions = recording.world.model, recording.problem.actions
    assert isinstance(actions, Box)
    nu, T = actions.nu, len(recording.actions)
    values = [[float(action[i]) for action in recording.actions] for i in range(nu)]
    names = [actuator_name(model, i) if model.nu == nu else f"control {i}" for i in range(nu)]
    bounds = list(zip(actions.low.tolist(), actions.high.tolist(), strict=True))

    def variation(i: int) -> float:
        width = bounds[i][1] - bounds[i][0]
        return (max(values[i]) - min(values[i])) / (width if 0 < width < math.inf else 1.0)

    chosen = sorted(sorted(range(nu), key=variation, reverse=True)[: _LINES * _CHARTS])
    left_out = f" The {len(chosen)} of {nu} that vary most." if len(chosen) < nu else ""
    times = [recording.problem.dynamics.dt * k for k in range(T + 1)]
    cards = []
    for (low, high), group in groupby(sorted(chosen, key=bounds.__getitem__), key=bounds.__getitem__):
        same = list(group)
        for few in (same[i : i + _LINES] for i in range(0, len(same), _LINES)):
            series = {names[i]: [*values[i], values[i][-1]] for i in few}
            title = "Control: " + names[few[0]] if len(few) == 1 else "Controls"
            chart = line_chart(times, series, label="control", limits=(low, high), held=True)
            note = f"What was sent to the robot, held for one control step. Dashed: the bounds, {low:g} and {high:g}."
            cards.append(card(title, chart, note + left_out))
    return "".join(cards)


def constraints(recording: Recording) -> str:
    """Of each of the world's constraints its largest g over time, and of those on one number of y, that number."""
    y, cards = recording.outputs(), []
    times = [recording.problem.dynamics.dt * k for k in range(len(y))]
    for constraint in recording.world.constraints:
        name, g = constraint.label, recording.constrained()[constraint.label]
        worst = g.max(-1)
        broken = (worst > HELD).tolist()
        note = f"Shaded: violated by more than {HELD:g}." if any(broken) else f"Never above {HELD:g}: held."
        if isinstance(constraint.fun, Within):
            limit = constraint.fun
            what, limits = limit.what or f"y[{limit.index}]", (limit.low, limit.high)
            chart = line_chart(
                times, {what: y[:, limit.index].tolist()}, label=what, limits=limits, marked=broken
            )
            told = f"Dashed: the limits, {limit.low:g} and {limit.high:g}. {note}"
            cards.append(card(f"Constraint: {name}", chart, told))
        shown = "|g|" if constraint.kind == "eq" else "g"
        chart = line_chart(times, {shown: worst.tolist()}, label=shown, limits=(0.0,), marked=broken)
        of = f", the largest of its {g.shape[1]} numbers" if g.shape[1] > 1 else ""
        soft = "" if constraint.soft is None else " It is soft: a plan may pay for violating it."
        cards.append(card(f"{shown} of {name}", chart, f"To be at most 0{of}. {note}{soft}"))
    return "".join(cards)


def actuator_name(model: mujoco.MjModel, i: int) -> str:
    """The name of an actuator, or of the joint that it drives."""
    drives = mujoco.mjtTrn(model.actuator_trntype[i]) == mujoco.mjtTrn.mjTRN_JOINT
    joint = model.joint(model.actuator_trnid[i, 0]).name if drives else ""
    return model.actuator(i).name or joint or f"control {i}"


def portraits(recording: Recording) -> str:
    """Velocity against position of the joints that move most, hinges before slides."""

    def reach(positions: list[float]) -> float:
        finite = [q for q in positions if math.isfinite(q)]
        return max(finite) - min(finite)

    joints = recording.joints()
    moving = [name for name, (_, positions, _) in joints.items() if reach(positions) > 1e-9]
    moving.sort(key=lambda name: (not joints[name][0], -reach(joints[name][1])))
    cards = []
    for name in moving[:_PORTRAITS]:
        turns, positions, velocities = joints[name]
        xlabel, label = ("angle (rad)", "rate (rad/s)") if turns else ("position (m)", "velocity (m/s)")
        note = "From the ring to the dot, a point for each control step. A spiral inwards settles; a closed loop is a steady gait or an oscillation."
        chart = phase_chart(positions, velocities, xlabel=xlabel, label=label)
        cards.append(card(f"Phase portrait: {name.replace('_', ' ')}", chart, note))
    return "".join(cards)


def convergence(recording: Recording) -> str:
    """The cost after each iteration of a few plans, of planners that report it."""
    dt = recording.problem.dynamics.dt
    plans: dict[int, tuple[str, list[float]]] = {}
    for k, plan in enumerate(recording.plans):
        costs = plan.info.get("costs")
        if isinstance(costs, Tensor) and costs.shape[1] > 1:
            plans.setdefault(id(plan.info), (f"from {k * dt:.3g} s", costs[0].tolist()))
    found = list(plans.values())
    if not found:
        return ""
    picked = sorted({round(i * (len(found) - 1) / (_PLANS - 1)) for i in range(_PLANS)})
    series = dict(found[i] for i in picked)
    length = max(map(len, series.values()))
    padded = {name: [*costs, *[math.nan] * (length - len(costs))] for name, costs in series.items()}
    known = [v for costs in series.values() for v in costs if math.isfinite(v)]
    log = bool(known) and min(known) > 0 and max(known) > 50 * min(known)
    chart = line_chart(range(length), padded, label="cost", log=log, xlabel="iteration")
    return card(
        "Cost per iteration",
        chart,
        "Of the first plan, of one in the middle and of the last, by the time from which they were followed. Iteration 0 is "
        "what the search starts from: the plan before, moved on in time. Flat lines: more iterations would not help.",
    )
