"""What `mbrl tune` searches: the hyper-parameters of each planner that matter, and their ranges.

A point of a space is a planner of fixed strength. Where steps of the model are counted, the population follows from
them, the horizon and the iterations, so that no point can buy more work; where time is, the planner's own deadline
ends its iterations and the population is free.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mbrl.errors import ContractError, UnknownName
from mbrl.experiments import control
from mbrl.planners import CEM, ICEM, SamplingPlanner
from mbrl.planners.spline import Order


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; whole numbers if they are; `log`: evenly on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def nearest(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]


Space = Mapping[str, Range | Choice]
Point = Mapping[str, Any]

_ITERATIONS: Space = {"iterations": Range(1, 8, log=True)}
_KNOTS: Space = {"knot_spacing": Range(1, 8, log=True), "spline": Choice(get_args(Order))}
_GAUSSIAN: Space = {"elite_share": Range(0.03, 0.5, log=True), "alpha": Range(0.0, 0.6)}

SPACES: dict[str, Space] = {
    "random-shooting": {**_ITERATIONS, **_KNOTS},
    "cem": {
        **_ITERATIONS,
        **_GAUSSIAN,
        "std": Range(0.05, 1.5, log=True),
        "min_std": Range(0.005, 0.3, log=True),
        **_KNOTS,
    },
    "icem": {
        **_ITERATIONS,
        **_GAUSSIAN,
        "decay": Range(1.0, 2.0),
        "keep": Range(0.0, 1.0),
        "std": Range(0.05, 1.5, log=True),
        "beta": Range(0.0, 4.0),
        **_KNOTS,
    },
    "mppi": {
        **_ITERATIONS,
        "effective_share": Range(0.01, 0.6, log=True),
        "std": Range(0.05, 1.5, log=True),
        "beta": Range(0.0, 4.0),
        **_KNOTS,
    },
    "predictive-sampling": {
        **_ITERATIONS,
        "std": Range(0.02, 1.0, log=True),
        "wide_share": Range(0.0, 0.6),
        "wide_std": Range(0.2, 2.0, log=True),
        **_KNOTS,
    },
    "cma-es": {**_ITERATIONS, "std": Range(0.05, 1.5, log=True), **_KNOTS},
}
"""Fields of the planner, and `elite_share`, elites over population. The temperature of MPPI stays automatic, in units
of the task's cost by itself, and its `effective_share` is what is tuned."""

_POPULATION = Range(8, 512, log=True)  # where time is what counts
_LEAST = 20  # candidates that a plan must be able to pay


def space_of(
    name: str, horizons: tuple[int, int], particles: int = 1, *, evaluations: int | None = None
) -> dict[str, Range | Choice]:
    """The space of the planner `name`, for plans of so many steps; the horizon is in it where it may differ.

    Args:
        horizons: the shortest and the longest.
        particles: of each candidate.
        evaluations: steps of the model that a plan may take; None where time is limited instead.

    Raises:
        UnknownName: there is no such planner.
        ContractError: the planner has no space, or the budget is too small.
    """
    if name not in control.PLANNERS:
        raise UnknownName("planner", name, control.PLANNERS)
    if name not in SPACES:
        raise ContractError(
            f"{name} has no search space: its plans end when it has converged, so that there is no equal work to "
            f"compare by. Planners that can be tuned: {', '.join(SPACES)}."
        )
    space = dict(SPACES[name])
    longest = horizons[1]
    if evaluations is None:
        space = {"population": _POPULATION, **space}
        del space["iterations"]
    else:
        total = candidates(evaluations, longest, particles)
        if total < _LEAST:
            raise ContractError(
                f"Tuning {name} needs at least {(_LEAST + 2) * longest * particles:,} steps of the model for a plan of "
                f"{longest} steps here, but the budget is {evaluations:,}."
            )
        space["iterations"] = Range(1, min(8, total // 8), log=True)
    space["knot_spacing"] = Range(1, min(8, longest), log=True)
    if horizons[0] < horizons[1]:
        space["horizon"] = Range(*horizons, log=True)
    return space


def candidates(evaluations: int, horizon: int, particles: int = 1) -> int:
    """How many plans can be tried; two more are what the last and the new one cost on a fresh draw."""
    return evaluations // (horizon * particles) - 2


def default_of(name: str, space: Space, horizon: int) -> dict[str, Any]:
    """The planner's defaults, and a horizon, as a point of the space; what lies outside is moved to its edge."""
    planner: SamplingPlanner[Any] = control.PLANNERS[name]()
    values = {field.name: getattr(planner, field.name) for field in dataclasses.fields(planner)}
    values["horizon"] = horizon
    if isinstance(planner, CEM | ICEM):
        values["elite_share"] = planner.elites / planner.population
    return {
        key: kind.nearest(values[key]) if isinstance(kind, Range) else values[key]
        for key, kind in space.items()
    }


def planner_of(
    name: str,
    point: Point,
    horizon: int,
    particles: int = 1,
    *,
    evaluations: int | None = None,
    **fields: Any,
) -> SamplingPlanner[Any]:
    """The planner at a point of its space.

    Args:
        horizon: steps of its plans.
        evaluations: steps of the model that a plan may take; None where the point has a population.
        fields: more of the planner's, such as `budget_ms`.
    """
    kind = control.PLANNERS[name]
    own = {key: value for key, value in point.items() if key not in ("elite_share", "horizon", "population")}

    def sized(population: int) -> SamplingPlanner[Any]:
        elites = {}
        if "elite_share" in point:
            most = population // 2 if kind is ICEM else population
            elites["elites"] = min(max(2, round(point["elite_share"] * population)), most)
        planner: SamplingPlanner[Any] = kind(population=population, **elites, **own, **fields)
        return planner

    if evaluations is None:
        return sized(point["population"])
    total = candidates(evaluations, horizon, particles)
    return sized(largest(lambda population: sampled(sized(population)), 4, total))


def sampled(planner: SamplingPlanner[Any]) -> int:
    """Candidates of a whole plan."""
    if isinstance(planner, ICEM):
        return sum(planner.candidates(i) for i in range(planner.iterations))
    return planner.population * planner.iterations


def largest(total: Callable[[int], int], low: int, limit: int) -> int:
    """The largest n ≥ low with total(n) ≤ limit, for a `total` that rises with n and is at least n."""
    return low + max(0, bisect_right(range(low, limit + 1), limit, key=total) - 1)
