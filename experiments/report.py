"""report.html: what a run did, in words, plots, a replay and a video, in one file without network."""

from __future__ import annotations

import base64
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from mbrl.experiments.charts import card, histogram, line_chart
from mbrl.experiments.motion_plots import constraints, controls, convergence, portraits
from mbrl.experiments.recording import HELD, Recording, tracked_body
from mbrl.experiments.replay import scene
from mbrl.following import FOLLOWED
from mbrl.planners.nmpc import STATUS
from mbrl.runs import environment, plain, write_text

_TOLD = 5  # explanations
_EMBED_BELOW = 20 * 2**20  # bytes of video; a larger one is linked


def write_report(
    recording: Recording, config: Any, path: Path, *, video: Path | None = None, interrupted: bool = False
) -> Path:
    """Write the report of a run.

    Args:
        config: shown as a table; has `env`, `planner`, `horizon`, `seed`, `replan_every`.
        video: embedded, or linked if it is large.
        interrupted: the user stopped the run.

    Raises:
        RunFolderError: it cannot be written; nothing is left of it.
    """
    facts = measure(recording)
    settings = plain(config)
    planner = settings.pop("planner")
    settings.pop("type")
    machine = environment()
    badge, bad = ending(recording, interrupted)
    pages = resources.files("mbrl.experiments")
    text = Template(pages.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{config.env}, {planner['type']}"),
        style=pages.joinpath("page.css").read_text(encoding="utf-8"),
        heading=escape(f"{config.env} with {planner['type']}"),
        badge=escape(badge),
        badge_class="bad" if bad else "",
        lead=escape(lead(recording, config, planner["type"])),
        tiles="".join(
            f"<div class='tile'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles(facts)
        ),
        words="".join(
            f"<p>{unbroken_options(escape(line))}</p>"
            for line in [*words(facts, config), *solved(recording), *kept(recording)]
        ),
        legend=legend(recording),
        video=embed(video),
        charts=charts(recording),
        motion=controls(recording) + constraints(recording) + portraits(recording),
        health=convergence(recording) + health(recording),
        settings=table(settings),
        machine=table(
            planner | machine["versions"] | machine["machine"] | {"torch threads": machine["torch_threads"]}
        ),
        viewer=pages.joinpath("viewer.js").read_text(encoding="utf-8"),
        scene=json.dumps(scene(recording), separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
    )
    return write_text(path, text)


def column(recording: Recording, name: str) -> list[float]:
    """The numbers in a column, without gaps and NaN."""
    return [row[name] for row in recording.rows if not missing(row[name])]


def missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def measure(recording: Recording) -> dict[str, float]:
    """The numbers that sum a run up; NaN where there is nothing to measure."""
    rows = recording.rows
    times, factors = sorted(column(recording, "plan_ms")), column(recording, "realtime_factor")
    return {
        "return": rows[-1]["return"],
        "steps": len(rows),
        "seconds": rows[-1]["time"],
        "plan_ms": statistics.median(times),
        "plan_ms_95": times[min(len(times) - 1, math.ceil(0.95 * len(times)))],
        "realtime": statistics.median(factors),
        "state_error": max(column(recording, "state_error"), default=math.nan),
        "output_error": max(column(recording, "output_error"), default=math.nan),
        "reward_error": max(column(recording, "reward_error"), default=math.nan),
        "fallbacks": sum(row["fallback"] for row in rows),
        **{name: sum(row["followed"] == name for row in rows) for name in FOLLOWED},
        "delay": statistics.median(column(recording, "delay")),
        "longest_delay": max(column(recording, "delay")),
        "unpredicted": sum(missing(row["predicted_reward"]) for row in rows),
        "terminated": rows[-1]["terminated"],
        "iterations": statistics.median(column(recording, "planner/iterations") or [math.nan]),
        "model_steps": sum(column(recording, "planner/model_steps")),
    }


def ending(recording: Recording, interrupted: bool) -> tuple[str, bool]:
    """How the run ended, and whether that is bad news."""
    last = recording.rows[-1]
    if last["diverged"]:
        return f"physics diverged in step {last['step']}, episode truncated", True
    if last["terminated"]:
        return f"terminated in step {last['step']}", True
    if interrupted:
        return f"interrupted after {len(recording.rows)} steps", True
    return ("time limit of the episode" if last["truncated"] else "completed"), False


def lead(recording: Recording, config: Any, planner: str) -> str:
    model, dynamics = recording.world.model, recording.problem.dynamics
    exact = config.exact or recording.world.planning_model is None
    where = "the true simulator" if exact else "a cheaper model of the plant"
    if config.smooth:
        where = f"a copy of {where} with smooth contacts"
    if recording.analytic:
        where = "the analytic model"
    if config.model is not None:
        where = f"a learned model ({config.model})"
    return (
        f"{config.env}: {model.nv} degrees of freedom, {dynamics.nu} actuators, controlled every {1e3 * dynamics.dt:g} ms. "
        f"{planner} plans {config.horizon} steps ({config.horizon * dynamics.dt:.2f} s) ahead in {where}, seed {config.seed}."
    )


def legend(recording: Recording) -> str:
    """What the lines in the replay are."""
    if not recording.shows_plans:
        return "A learned model tells what the task reads, not where bodies are, so plans are not drawn."
    model = recording.world.model
    others = ""
    if any("candidates" in plan.info for plan in recording.plans):
        others = (
            ', <i class="key" style="background:var(--candidate)"></i>a few of the plans it was chosen over'
        )
    tracked = escape((model.body(tracked_body(model)).name or "robot").replace("_", " "))
    return f'<i class="key" style="background:var(--plan)"></i>where the plan being followed expects the {tracked} to go{others}.'


def tiles(facts: Mapping[str, float]) -> list[tuple[str, str]]:
    return [
        ("return", f"{facts['return']:.1f}"),
        (f"simulated, {facts['steps']:.0f} steps", f"{facts['seconds']:.2f} s"),
        ("real-time factor, median", f"{facts['realtime']:.2f}×"),
        (f"per plan, median (95%: {facts['plan_ms_95']:.1f} ms)", f"{facts['plan_ms']:.1f} ms"),
        ("largest prediction error", amount(facts["output_error"])),
        ("unusable plans (fallbacks)", f"{facts['fallbacks']:.0f}"),
    ]


def amount(error: float) -> str:
    if math.isnan(error):
        return "unknown"
    return f"{error:.2g}" if error >= 0.01 or not error else f"{error:.1e}"


def words(facts: Mapping[str, float], config: Any) -> list[str]:
    """What the numbers mean."""
    pace = facts["realtime"]
    speed = (
        f"Planning keeps up with a real robot: it is {pace:.1f} times faster than the time it controls."
        if pace >= 1
        else f"Planning is {1 / pace:.1f} times slower than the time it controls, so a real robot would have to wait. "
        "Fewer candidates or iterations, a shorter horizon, --replan-every, or a deadline (--budget-ms) make it faster."
    )
    gaps = facts["unpredicted"]
    if gaps == facts["steps"]:
        error = "No step had a prediction that could be compared with what happened."
    elif math.isnan(facts["state_error"]):
        error = "The run was too short to compare predictions with what happened."
    elif facts["state_error"] == 0 and not facts["reward_error"] >= 1e-6:
        error = (
            f"{'The states that were predicted' if gaps else 'Every predicted state'} came true to the last bit, and "
            f"{'their rewards' if gaps else 'every reward'} to rounding, as it must be where the very "
            "simulator that is controlled also makes the plans."
        )
    else:
        error = (
            "The plans are made with a model that is not the plant: one step ahead, positions, velocities and whatever "
            f"else the task reads differ from what happened by at most {amount(facts['output_error'])}, rewards by at most "
            f"{amount(facts['reward_error'])}."
        )
    if 0 < gaps < facts["steps"]:
        error += f" In {gaps:.0f} of {facts['steps']:.0f} steps there was no prediction to compare."
    fallback = (
        "Every plan was usable."
        if not facts["fallbacks"]
        else f"In {facts['fallbacks']:.0f} steps the new plan was unusable (not finite, or against bounds or constraints) and the old one was followed."
    )
    if config.budget_ms is not None and facts["plan_ms"] > 1.1 * config.budget_ms:
        speed += f" The deadline of {config.budget_ms:g} ms was missed"
        speed += (
            ": a single iteration of this planner takes longer, so its population or horizon must be smaller."
            if facts["iterations"] <= 1
            else ", by iterations that took longer than those before."
        )
    every = "every step" if config.replan_every == 1 else f"every {config.replan_every} steps"
    candidates = (
        f" and simulated {facts['model_steps']:,.0f} candidate steps in all" if facts["model_steps"] else ""
    )
    work = f"It planned {every}{candidates}."
    return [f"{work} {speed}", f"{error} {fallback} {ladder(facts)}"]


def ladder(facts: Mapping[str, float]) -> str:
    """Where the actions came from, and how late plans were."""
    text = ""
    if facts["longest_delay"]:
        steps = "step" if facts["delay"] == 1 else "steps"
        text = f"A plan was followed {facts['delay']:g} {steps} after it was begun"
        late = facts["longest_delay"] > facts["delay"]
        text += f" (median; at most {facts['longest_delay']:.0f}). " if late else ". "
    if facts["gains"] or facts["safe"]:
        text += (
            f"Of {facts['steps']:.0f} actions, {facts['gains']:.0f} were a plan's, corrected by its feedback gains, "
            f"{facts['plan']:.0f} a plan's as they were, and {facts['safe']:.0f} the safe action."
        )
    return text


def solved(recording: Recording) -> list[str]:
    """How the solver of a nonlinear program fared, and what it said where it did not reach an optimum."""
    programs = [row for row in recording.rows if row["planner/gap"] is not None]  # only they have one
    found = [int(row["planner/status"]) for row in programs]
    if not found:
        return []
    counts = ", ".join(f"{found.count(i)} {what}" for i, what in enumerate(STATUS) if i in found)
    return [f"Of {len(found)} programs: {counts}.", *explanations(recording)]


def explanations(recording: Recording) -> list[str]:
    """What planners said of their plans, without the numbers, and how often, the most frequent first."""
    told = Counter(
        re.sub(r"(?<![\w\[])-?\d[\d.]*(e[-+]?\d+)?", "#", text)
        for row in recording.rows
        if (text := row["planner/explanation"])
    )
    return [f"{n} times: {text}." for text, n in told.most_common(_TOLD)]


def kept(recording: Recording) -> list[str]:
    """Whether the world's constraints were kept."""
    total = len(recording.states)
    return [
        f"The constraint {name} was violated in {n} of {total} states, by at most {amount(worst)}."
        if n
        else f"The constraint {name} was held in all {total} states, to {HELD:g}."
        for name, (n, worst) in recording.violations().items()
    ]


def unbroken_options(text: str) -> str:
    return re.sub(r"--[a-z-]+", r"<code>\g<0></code>", text)


def charts(recording: Recording) -> str:
    rows = recording.rows
    times = [row["time"] for row in rows]

    def values(name: str) -> list[float | None]:
        return [row[name] for row in rows]

    budget = round(rows[0]["realtime_factor"] * rows[0]["plan_ms"], 6)  # ms between plans
    errors = {"output": values("output_error"), "reward": values("reward_error")}
    known = [v for series in errors.values() for v in series if v is not None and not math.isnan(v)]
    gaps = any(missing(v) for v in values("predicted_reward"))
    zero = f"All zero: every {'prediction that was made' if gaps else 'predicted state and reward'} came true exactly."
    return "".join(
        [
            card(
                "Reward per step",
                line_chart(
                    times,
                    {"realised": values("reward"), "predicted": values("predicted_reward")},
                    label="reward",
                ),
                "Higher is better. Predicted is what the plan expected of the action it chose; where the lines part, the model was wrong.",
            ),
            card(
                "Return",
                line_chart(times, {"return": values("return")}, label="return so far"),
                "The sum of rewards so far. A straight rise means a steady gait or pose.",
            ),
            card(
                "Cost of the plan",
                line_chart(times, {"cost": values("plan_cost")}, label="cost over the horizon"),
                "What each plan expects to pay over its horizon (minus its reward). It falls while the planner finds better plans and is flat once it has settled.",
            ),
            card(
                "Planning time",
                histogram(
                    column(recording, "plan_ms"),
                    label="ms per plan",
                    limit=budget,
                ),
                f"How long plans took. Left of the dashed line at {budget:g} ms a real robot could be controlled in real time; "
                "the first plan is often the slowest.",
            ),
            card(
                "Prediction error",
                f"<p>{zero if known else 'There was no prediction to compare.'}</p>"
                if not any(known)
                else line_chart(times, errors, label="|predicted − realised|", log=True),
                "One step ahead. Output: the largest difference in anything the task reads; exact zeros are left out of the logarithmic axis.",
            ),
        ]
    )


def health(recording: Recording) -> str:
    rows = recording.rows
    times = [row["time"] for row in rows]

    def chart(title: str, names: Mapping[str, str], label: str, note: str, *, log: bool = False) -> str:
        series = {shown: [row[f"planner/{name}"] for row in rows] for shown, name in names.items()}
        if not any(column(recording, f"planner/{name}") for name in names.values()):
            return ""  # not a number of this planner
        some = any(v for values in series.values() for v in values if not missing(v))
        return card(title, line_chart(times, series, label=label, log=log and some), note)

    return "".join(
        [
            chart(
                "Effective samples", {"effective samples": "effective_samples"}, "1 / Σw²",
                "How many candidates shaped the plan. Near 1: one candidate decided and the rest was wasted; near the population: "
                "the planner hardly distinguished good from bad. 0: no candidate was finite, so none shaped it.",
            ),
            chart(
                "Spread of the good candidates", {"spread": "elite_spread"}, "share of half the range",
                "How far apart the candidates lie that shaped the plan. Falling towards 0 means the search has converged, perhaps too early.",
            ),
            chart(
                "Clipped and diverged", {"clipped actions": "clipped", "diverged candidates": "diverged"}, "share",
                "Clipped: sampled actions that had to be moved back inside the bounds. Diverged: candidates whose simulation blew up; "
                "they are never chosen.",
            ),
            chart(
                "Improvement", {"improvement": "improvement"}, "cost saved",
                "How much cheaper the new plan is than the old one moved on in time. Around 0 the planner only repeats itself; "
                "below 0 this plan got worse.",
            ),
            chart(
                "Damping", {"damping": "damping"}, "λ",
                "How far the quadratic model was distrusted (regularisation). It rises where the model promises what the rollouts "
                "do not hold, at contacts above all; steps with λ = 0 are left out.",
                log=True,
            ),
            chart(
                "Slope", {"slope": "slope"}, "mean of max |k| / (|u| + 1)",
                "By how much the last iteration wanted to change the controls. Small: the plan is near a local optimum.",
                log=True,
            ),
            chart(
                "Feasibility", {"violation": "violation", "gap": "gap"}, "largest",
                "Violation: of a hard constraint along the plan. Gap: of the program's equations and bounds, where its solver "
                "stopped. What is exactly 0 is left out.",
                log=True,
            ),
            chart(
                "Iterations", {"iterations": "iterations"}, "iterations per plan",
                "How many steps the solver took, rounds of sampling fitted into the deadline, or sweeps were made.",
            ) if len(set(column(recording, "planner/iterations"))) > 1 else "",
        ]
    )  # fmt: skip


def embed(video: Path | None) -> str:
    if video is None:
        return ""
    source = escape(video.name)
    if video.stat().st_size < _EMBED_BELOW:
        source = "data:video/mp4;base64," + base64.b64encode(video.read_bytes()).decode()
    return (
        f'<h2>Video</h2><video controls loop muted playsinline src="{source}"></video>'
        f"<p style='font-size:14px;color:var(--soft);margin-top:8px'>Rendered by MuJoCo; also in {escape(video.name)}.</p>"
    )


def table(values: Mapping[str, Any]) -> str:
    return "".join(
        f"<tr><td>{escape(str(k).replace('_', ' '))}</td><td>{escape('not set' if v is None else str(v))}</td></tr>"
        for k, v in values.items()
    )
