"""Whether a learned model can be trusted, and whose fault it is where planning on it fails: the decision, from numbers.

Returns are compared plan by plan: the same actions from the same state, on the model and in the plant. Differences
are told in units of the scale S, what the best known plans earn in the plant more than random actions do, so that
thresholds mean the same in every world:

    what a plan lacks  =  what a better search on the same model would gain in the plant   (the solver's part)
                        + what even that search lacks                                       (the model's part)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Name = Literal["fine", "solver stuck", "model uncertain here", "model exploited"]
SEVERITY: tuple[Name, ...] = ("fine", "solver stuck", "model uncertain here", "model exploited")

STUCK = 0.33
"""Solver's part, above which a planner is stuck. An MPC repairs its plans at every step: planners of usual budgets lack
up to 0.22 of what 12 times the evaluations find without harm to their episodes, starved ones 0.4 and more."""
GAP = 0.15
"""Imagined minus realised return, above which the model is at fault. It is lower than `STUCK`, for a better search only
widens it."""
LACK = 0.2
"""Model's part, above which the model is at fault. It is never negative, for the best known plans include those of a
search in the plant that goes on from the best plan on the model; of well fitted models up to 0.16 was measured, of
those of too few data 0.22 and more."""
OFF = 0.25
"""Mean |imagined − realised|, above which the model is at fault even where it is too high as often as too low."""
KNOWS = 0.8
"""Share of truths inside 95 % intervals, of the worst output where the planner went, above which a model knows what it
does not know: with it intervals of 95 % are at most 1.5 times too narrow."""
HALF_KNOWS = 0.5
"""The same, where a model also warns by disagreement or distance: intervals up to 3 times too narrow."""
WRONG = 0.5
"""Error of an output where the planner went, in deviations of its changes, above which a model whose intervals hold
fewer than `HALF_KNOWS` of the truths is not to be trusted, even if no plan that was looked into has paid for it."""
LOST = 0.1
"""Share of plans that do not stay finite, above which the model is at fault: they are left out of everything else."""
WARNS = 2.0
"""Disagreement or distance to the nearest training data, over that of held-out data, which is a warning."""
NOTHING = 1e-6
"""Scale, relative to the size of returns, below which nothing is at stake."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of one planner on a model, over its plans. Differences of returns are in units of `scale`.

    NaN stands for what could not be measured.

    Attributes:
        plans: how many were looked into, all of them finite on the model and in the plant.
        diverged: share of plans that did not stay finite, on the model or in the plant.
        scale: S, in units of the reward.
        size: mean |return| of plans in the plant, in units of the reward.
        gap: imagined minus realised.
        off: |imagined − realised|.
        search: what the stronger search promises more than the planner's own plan, on the model.
        solver: what it earns more in the plant.
        model: what the best known plan earns more than that.
        coverage: share of truths inside 95 % intervals, of the output `covered`, which has the lowest, where the
            planner went.
        disagreement: of the members where the planner went, over that on held-out data.
        distance: to the nearest training data where the planner went, over that of held-out data.
        rank: correlation of disagreement and error where the planner went.
        covered: see `coverage`.
        worst: the output with the largest error there, relative to its changes.
        worst_error: how large, in deviations of its changes.
    """

    plans: int
    diverged: float
    scale: float
    size: float
    gap: float
    off: float
    search: float
    solver: float
    model: float
    coverage: float
    disagreement: float
    distance: float
    rank: float
    covered: str
    worst: str
    worst_error: float


@dataclass(frozen=True)
class Verdict:
    """The decision, in words.

    Attributes:
        name: which of the four.
        why: with the numbers behind it.
        remedy: what to do.
    """

    name: Name
    why: str
    remedy: str


def judge(evidence: Evidence) -> Verdict:
    """Whose fault it is, if any. Where both parts are too large the larger one decides, unless an output is plainly wrong."""
    e = evidence
    if e.plans == 0:
        return Verdict(
            "model exploited",
            "No plan stayed finite both on the model and in the plant, so none could be compared.",
            "Fit the model to more data, and look for outliers in them.",
        )
    if not e.scale > NOTHING * e.size:
        return Verdict(
            "fine",
            f"Nothing is at stake: no known plan earns more than random actions over the {e.plans} plans.",
            "Look at states, or over a horizon, where actions matter, before trusting this.",
        )
    blind = e.coverage < HALF_KNOWS and e.worst_error > WRONG
    misled = e.model > LACK or e.gap > GAP or e.off > OFF or e.diverged > LOST or blind
    fault = math.inf if blind else max(e.model, e.gap)
    if e.search > STUCK and e.solver > STUCK and not (misled and fault > e.solver):
        return Verdict(
            "solver stuck", _stuck(e), "A larger budget or another planner; the model is not the trouble."
        )
    if not misled:
        return Verdict("fine", _fine(e), "Nothing.")
    if knows(e):
        return Verdict("model uncertain here", f"{_misled(e)} {_warned(e)}", _UNCERTAIN)
    return Verdict("model exploited", f"{_misled(e)} {_unwarned(e)}", _exploited(e))


def knows(evidence: Evidence) -> bool:
    """Whether the model says that it may be wrong where the planner went."""
    e = evidence
    warns = e.disagreement > WARNS or e.distance > WARNS
    if math.isnan(e.coverage):  # it claims no uncertainty of its own
        return warns
    return e.coverage > KNOWS or (warns and e.coverage > HALF_KNOWS)


def overall(verdicts: Mapping[str, Verdict]) -> Verdict | None:
    """Of all planners, by name: the model is as good as the planner that finds most wrong with it. None without any."""
    if not verdicts:
        return None
    name = max((verdict.name for verdict in verdicts.values()), key=SEVERITY.index)
    found = [planner for planner, verdict in verdicts.items() if verdict.name == name]
    others = [f"{planner}: {verdict.name}" for planner, verdict in verdicts.items() if verdict.name != name]
    first = verdicts[found[0]]
    why = f"Found with {' and '.join(found)}" + (f"; {', '.join(others)}. " if others else ". ")
    return Verdict(name, why + first.why, first.remedy)


def _stuck(e: Evidence) -> str:
    return (
        f"A stronger search on the same model finds plans that promise {e.search:.2f} more than the planner's "
        f"({STUCK:g} would be let pass), and that earn {e.solver:.2f} more in the plant as well. What the model "
        f"costs is less: {_number(e.model)}, with a gap of {_number(e.gap)} between imagined and realised return. "
        f"{_unit(e)}"
    )


def _fine(e: Evidence) -> str:
    return (
        f"Over {e.plans} plans the model imagines {_number(e.gap)} more than the plant pays ({GAP:g} would be let "
        f"pass), {e.off:.2f} without the sign; the best known plans are {_number(e.model)} better than what a strong "
        f"search on the model finds, and that search {_number(e.solver)} better than the planner. {_unit(e)}"
    )


def _misled(e: Evidence) -> str:
    faults = []
    if e.gap > GAP:
        faults.append(f"plans earn {e.gap:.2f} less in the plant than the model imagines")
    elif e.off > OFF:
        faults.append(f"what the model imagines is {e.off:.2f} off, too high as often as too low")
    if e.model > LACK:
        faults.append(
            f"even a strong search on it finds plans that earn {e.model:.2f} less in the plant than the best known ones"
        )
    if not faults and e.diverged <= LOST:
        faults.append(
            f"no plan that was looked into has paid much for it yet (gap {_number(e.gap)}, model's part "
            f"{_number(e.model)}), but {e.worst} is off by {e.worst_error:.2g} deviations of its changes"
        )
    if e.diverged > 0:
        faults.append(f"{100 * e.diverged:.0f} % of the plans did not stay finite and were left out")
    text = "; ".join(faults)
    return f"{text[0].upper()}{text[1:]}. {_unit(e)}"


def _warned(e: Evidence) -> str:
    signs = []
    if e.coverage > KNOWS:
        signs.append(
            f"{100 * e.coverage:.0f} % of what happened where the planner went is inside the model's 95 % intervals, "
            "even of the output where fewest are"
        )
    if e.disagreement > WARNS:
        signs.append(f"its members disagree {e.disagreement:.1f} times as much there as on held-out data")
    if e.distance > WARNS:
        signs.append(f"the nearest training data are {e.distance:.1f} times as far as from held-out data")
    return f"The model does not hide it: {'; '.join(signs)}."


def _unwarned(e: Evidence) -> str:
    share = (
        "it claims no uncertainty"
        if math.isnan(e.coverage)
        else f"only {100 * e.coverage:.0f} % of what happened is inside its 95 % intervals of {e.covered}"
    )
    return (
        f"The model does not know where the planner went: {share}; there its members disagree "
        f"{_number(e.disagreement)} times as much as on held-out data, and disagreement goes with error at a rank "
        f"correlation of {_number(e.rank)}."
    )


_UNCERTAIN = (
    "Collect more data where the planner goes and fit again. Until then plan with what is not known: particles that "
    "keep their member (TS-inf), pessimism (kappa), or a trust region."
)


def _exploited(e: Evidence) -> str:
    return (
        f"Look at the output {e.worst}, which is most wrong where the planner goes (off by {e.worst_error:.2g} "
        "deviations of its changes): check its data, units and features, and fit again with data from there. "
        "Pessimism (kappa) or a trust region hold a planner back only where the model has doubts, and here it has none."
    )


def _unit(e: Evidence) -> str:
    return f"(1 is what the best known plans earn more than random actions, {e.scale:.3g} over the horizon.)"


def _number(value: float) -> str:
    return "an unknown number" if math.isnan(value) else f"{value:z.2f}"
