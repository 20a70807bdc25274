"""best.json, trials.csv and report.html of a search for hyper-parameters."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from mbrl.experiments import control
from mbrl.experiments.cells import ANALYTIC, SIMULATOR, machine
from mbrl.experiments.charts import Dot, bar_chart, card, dot_chart
from mbrl.experiments.spaces import Choice
from mbrl.experiments.statistics import Estimate, estimate, mean
from mbrl.experiments.tune_study import Study, Trial, best_of
from mbrl.runs import plain, write_text

if TYPE_CHECKING:
    from mbrl.experiments.tune import Search


@dataclass(frozen=True)
class Confirmation:
    """Returns from fresh seeds, of the defaults and of the winner, seed by seed; None where the physics diverged."""

    trial: int
    default: tuple[float | None, ...]
    winner: tuple[float | None, ...]

    @property
    def pairs(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """(n, 2), where both have a return."""
        both = [
            (a, b) for a, b in zip(self.default, self.winner, strict=True) if a is not None and b is not None
        ]
        return np.array(both, dtype=np.float64).reshape(len(both), 2)

    @property
    def difference(self) -> Estimate | None:
        """Of the winner's mean return from the defaults', with its interval over paired seeds."""
        return estimate([self.pairs[:, 1] - self.pairs[:, 0]], mean) if len(self.pairs) else None

    @property
    def verdict(self) -> str:
        if self.trial == 0:
            return "No trial beat the defaults: there is nothing to gain here by this search."
        found = self.difference
        if found is None:
            return "Every pair had an episode that diverged: nothing can be said."
        if found.low is None or found.high is None:
            return "The winner and the defaults differ by the same on every seed, or there is one only: no interval."
        if found.low > 0:
            return "Tuning pays: the interval of the difference is above 0."
        if found.high < 0:
            return "The defaults win: the winner of the search was lucky. Keep the defaults, or tune on more seeds."
        return "No difference can be told: the interval of the difference holds 0. Keep the defaults, or tune on more seeds."

    def words(self) -> list[str]:
        """What fresh seeds say, in lines."""
        lines = []
        if len(self.pairs):
            for name, scores in (("defaults", self.pairs[:, 0]), ("winner", self.pairs[:, 1])):
                lines.append(f"{name} on {len(scores)} fresh seeds: {interval(estimate([scores], mean))}")
            if self.trial and self.difference is not None:
                lines.append(f"difference, seed by seed: {interval(self.difference)}")
        for name, returns in (("defaults", self.default), ("winner", self.winner)):
            if None in returns:
                lines.append(
                    f"{returns.count(None)} episodes of the {name} diverged; their seeds are left out"
                )
        return [*lines, self.verdict]


def interval(e: Estimate) -> str:
    """A mean and its 95 % interval."""
    return f"{e.value:.5g}" + ("" if e.low is None else f" [{e.low:.5g}, {e.high:.5g}]")


def write_results(
    search: Search, study: Study, trials: Sequence[Trial], confirmation: Confirmation | None
) -> Path:
    """Write what is known, and return the path of report.html; best.json only if a trial gave a return.

    Raises:
        RunFolderError: it cannot be written; the trials are kept.
    """
    write_text(study.folder / "trials.csv", table(search, trials))
    best = best_of(trials)
    told: dict[str, Any] | None = None
    if best is not None:
        told = best_json(search, trials, best, confirmation)
        write_text(study.folder / "best.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    page = resources.files("mbrl.experiments")
    name = f"{search.config.planner} tuned on {search.config.env}"
    text = Template(page.joinpath("compare.html").read_text(encoding="utf-8")).substitute(
        title=escape(name),
        heading=escape(name),
        style=page.joinpath("page.css").read_text(encoding="utf-8"),
        lead=escape(lead(search, study, trials)),
        body="".join(body(search, study, trials, best, told, confirmation)),
    )
    return write_text(study.folder / "report.html", text)


def best_json(
    search: Search, trials: Sequence[Trial], best: Trial, confirmation: Confirmation | None
) -> dict[str, Any]:
    """The winner: its planner, which `mbrl.runs.from_plain` reads, how to use it, and how good it is."""
    words, note = command(search, best)
    first = trials[0]
    return {
        "command": words,
        "note": note,
        "planner": best.facts["planner"],
        "horizon": search.horizon(best.point),
        "point": best.point,
        "trial": best.index,
        "search": search.about() | {"trials": len(trials)},
        "tuning": {
            "seeds": list(search.seeds),
            "returns": best.returns,
            "default": first.returns if first.state == "complete" else None,
        },
        "fresh": None
        if confirmation is None
        else {
            "seeds": list(search.fresh),
            "returns": confirmation.winner,
            "default": confirmation.default,
            "difference": plain(confirmation.difference),
            "verdict": confirmation.verdict,
        },
        "machine": machine(),
    }


def command(search: Search, best: Trial) -> tuple[str, str]:
    """The winner as a command line of `mbrl mpc`, and what that does differently, if it does."""
    config, planner = search.config, search.planner(best.point)
    default = control.PLANNERS[config.planner]()
    words = ["mbrl", "mpc", "--env", config.env, "--planner", config.planner]
    for field in dataclasses.fields(planner):
        value = getattr(planner, field.name)
        if field.name != "budget_ms" and value != getattr(default, field.name):
            words += [f"--planner.{field.name.replace('_', '-')}", str(value)]
    words += ["--horizon", str(search.horizon(best.point)), "--steps", str(config.steps)]
    if config.budget_ms is not None:
        words += ["--budget-ms", f"{config.budget_ms:g}"]
    if config.learned:
        words += ["--model", config.model, "--propagation", config.propagation]
        words += ["--particles", str(config.particles)] if config.drawn > 1 else []
    note = (
        ""
        if config.model != ANALYTIC
        else "It plans in the simulator, where the search planned on the analytic model."
    )
    return shlex.join(words), note


def table(search: Search, trials: Sequence[Trial]) -> str:
    """CSV, one line a trial: what was tried and what came of it."""
    text = io.StringIO()
    seeds = [f"return_seed_{seed}" for seed in search.seeds]
    facts = ("model_steps", "plan_ms", "load", "seconds", "why")
    writer = csv.writer(text)
    writer.writerow(["trial", "state", "mean_return", *seeds, *search.space, "population", *facts])
    for trial in trials:
        returns = [*trial.returns, *[""] * (len(seeds) - len(trial.returns))]
        value = "" if math.isnan(trial.value) else trial.value
        point = [trial.point.get(name, "") for name in search.space]
        population = trial.facts.get("planner", {}).get("population", "")
        numbers = ["" if trial.facts.get(name) is None else trial.facts[name] for name in facts]
        writer.writerow([trial.index, trial.state, value, *returns, *point, population, *numbers])
    return text.getvalue()


def lead(search: Search, study: Study, trials: Sequence[Trial]) -> str:
    config = search.config
    counts = [
        f"{n} {word}"
        for word in ("complete", "pruned", "crashed")
        if (n := sum(t.state == word for t in trials))
    ]
    work = (
        f"{config.budget_ms:g} ms a plan, one episode after another"
        if search.cell.timed
        else f"{config.evaluations:,} steps of the model a plan: the population follows from the rest"
    )
    shortest, longest = config.range
    horizon = f"{longest} steps" if shortest == longest else f"{shortest} to {longest} steps"
    model = "simulator" if config.model == SIMULATOR else f"{config.model} model"
    if config.learned:
        model = f"learned model {config.model} ({config.propagation})"
    killed = f" Killed on the way and tried again: {study.killed}." if study.killed else ""
    return (
        f"{len(trials)} trials ({', '.join(counts)}) of {len(search.seeds)} episodes of at most {config.steps} steps, "
        f"planned on the {model} over {horizon}, "
        f"with {work}.{killed}"
    )


def body(
    search: Search,
    study: Study,
    trials: Sequence[Trial],
    best: Trial | None,
    told: dict[str, Any] | None,
    confirmation: Confirmation | None,
) -> list[str]:
    parts = []
    if best is not None and told is not None:
        parts.append(tiles(trials, best, confirmation))
        if confirmation is None:
            parts.append(
                "<p>The winner is not confirmed yet: the best of many trials is lucky, so its return here is too "
                "good. Run the same command again.</p>"
            )
        else:
            lines = confirmation.words()
            parts.append(f"<p><b>{escape(lines[-1])}</b> {escape('; '.join(lines[:-1]))}.</p>")
        parts.append(f"<h2>Use it</h2><code class='command'>{escape(told['command'])}</code>")
        parts.append(f"<p>{escape(told['note'])}</p>" if told["note"] else "")
    parts += ["<h2>The search</h2><div class='grid2'>", history(trials, best), matter(study), "</div>"]
    parts += ["<h2>Each parameter</h2><div class='grid2'>"]
    parts += [slice_of(search, trials, best, name) for name in search.space]
    parts += ["</div><h2>Trials</h2>", rows(search, trials), "<ul class='notes'>"]
    parts += [f"<li>{escape(line)}</li>" for line in notes(search, study, trials)]
    return [*parts, "</ul>"]


def tiles(trials: Sequence[Trial], best: Trial, confirmation: Confirmation | None) -> str:
    shown = [("mean return of the winner, seeds of the search", f"{best.value:.5g}")]
    if trials[0].state == "complete":
        shown.append(("of the defaults, the same seeds", f"{trials[0].value:.5g}"))
    if confirmation is not None and len(confirmation.pairs):
        default, winner = confirmation.pairs.mean(0)
        shown += [("winner on fresh seeds", f"{winner:.5g}"), ("defaults on fresh seeds", f"{default:.5g}")]
    return "<div class='tiles'>{}</div>".format(
        "".join(f"<div class='tile'><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in shown)
    )


def _dots(trials: Sequence[Trial], best: Trial | None, across: Sequence[float]) -> list[Dot]:
    return [
        Dot(
            x,
            trial.value,
            f"trial {trial.index}: {trial.value:.5g}{', pruned' if trial.state == 'pruned' else ''}",
            hollow=trial.state == "pruned",
            circled=best is not None and trial.index == best.index,
        )
        for x, trial in zip(across, trials, strict=True)
        if trial.state != "crashed"
    ]


def _floor(trials: Sequence[Trial]) -> float:
    """Below it returns are drawn at the edge, lest one bad trial flatten the rest."""
    values = sorted(trial.value for trial in trials if trial.state != "crashed")
    if not values:
        return -math.inf
    middle = statistics.median(values)
    return middle - 3 * max(values[-1] - middle, middle - values[len(values) // 4])


def history(trials: Sequence[Trial], best: Trial | None) -> str:
    record, line = -math.inf, []
    for trial in trials:
        record = max(record, trial.value) if trial.state == "complete" else record
        line.append((float(trial.index), record))
    line = [(x, y) for x, y in line if math.isfinite(y)]
    chart = dot_chart(
        _dots(trials, best, [float(trial.index) for trial in trials]),
        label="mean return",
        xlabel="trial",
        line=line,
        floor=_floor(trials),
    )
    return card(
        "History",
        chart,
        "Every trial, and the best so far. Trial 0 has the defaults, the next ones are random until ten are finished. "
        "Circled: the winner. Hollow: pruned, after fewer seeds. Dots at the lower edge were worse than that.",
    )


def matter(study: Study) -> str:
    found = study.importance()
    note = "How much each parameter tells the best quarter of the trials from the rest (PED-ANOVA), in shares of 1."
    chart = bar_chart({name.replace("_", " "): share for name, share in found.items()})
    return card("What matters", chart or "<p>Too few trials to tell.</p>", note)


def slice_of(search: Search, trials: Sequence[Trial], best: Trial | None, name: str) -> str:
    kind = search.space[name]
    names = kind.names if isinstance(kind, Choice) else ()
    log = not isinstance(kind, Choice) and kind.log
    known = [trial for trial in trials if name in trial.point]
    across = [float(names.index(t.point[name]) if names else t.point[name]) for t in known]
    chart = dot_chart(
        _dots(known, best, across),
        label="mean return",
        xlabel=name.replace("_", " "),
        log=log,
        names=names,
        floor=_floor(trials),
    )
    return card(name.replace("_", " "), chart, "")


def rows(search: Search, trials: Sequence[Trial]) -> str:
    heads = ["trial", "mean return", "state", *search.space, "population", "steps of the model", "ms a plan"]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in heads)
    lines = []
    for trial in sorted(trials, key=lambda t: math.inf if math.isnan(t.value) else -t.value):
        facts = trial.facts
        cells = [
            trial.index,
            trial.value,
            facts.get("why", trial.state),
            *(trial.point.get(name) for name in search.space),
            facts.get("planner", {}).get("population"),
            facts.get("model_steps"),
            facts.get("plan_ms"),
        ]
        kinds = [" class='why'" if "why" in facts and i == 2 else "" for i in range(len(cells))]
        tds = (f"<td{kind}>{escape(_cell(value))}</td>" for kind, value in zip(kinds, cells, strict=True))
        lines.append(f"<tr>{''.join(tds)}</tr>")
    return (
        f"<div class='scroll'><table class='sortable'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def notes(search: Search, study: Study, trials: Sequence[Trial]) -> list[str]:
    seeds, fresh = search.seeds, search.fresh
    found = [f"Seeds of the search: {seeds[0]} to {seeds[-1]}; fresh ones: {fresh[0]} to {fresh[-1]}."]
    found.append("Intervals hold 95 % (bootstrap over seeds, paired for the difference).")
    if search.cell.timed:
        loads = [trial.facts["load"] for trial in trials]
        found.append(
            f"Plans were timed on {os.cpu_count()} processors under a load of {min(loads):.1f} to {max(loads):.1f} "
            f"(median {statistics.median(loads):.1f}). Returns depend on the machine and on that load, so the search "
            "cannot be repeated number for number."
        )
    else:
        found.append(
            "The sampler is seeded for each trial, so a search that was interrupted goes on as if it had not been, "
            "on the same machine, versions and threads."
        )
    if study.changed:
        changed = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in study.changed.items())
        found.append(f"Versions changed since the search began: {changed}.")
    return found
