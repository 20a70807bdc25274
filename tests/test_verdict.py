"""The decision of a diagnosis, on numbers that were made up."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest

from mbrl.experiments.verdict import (
    GAP,
    HALF_KNOWS,
    KNOWS,
    LACK,
    OFF,
    SEVERITY,
    STUCK,
    WARNS,
    Evidence,
    Verdict,
    judge,
    overall,
)

SOUND = Evidence(
    plans=18,
    diverged=0.0,
    scale=100.0,
    size=400.0,
    gap=0.0,
    off=0.03,
    search=0.1,
    solver=0.08,
    model=0.04,
    coverage=0.97,
    disagreement=1.0,
    distance=1.0,
    rank=0.4,
    covered="qvel/hinge",
    worst="qvel/hinge",
    worst_error=0.02,
)
UNSURE: dict[str, Any] = {"gap": 0.4, "off": 0.45, "model": 0.5}
BLIND: dict[str, Any] = {**UNSURE, "coverage": 0.1, "worst_error": 1.2}
STARVED: dict[str, Any] = {"search": 0.5, "solver": 0.5}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fine"),
        (STARVED, "solver stuck"),
        (UNSURE, "model uncertain here"),
        (BLIND, "model exploited"),
        # What a stronger search finds is an error of the model: it earns nothing in the plant.
        ({"search": 0.8, "solver": -0.3}, "fine"),
        ({**UNSURE, "search": 0.8, "solver": -0.3}, "model uncertain here"),
        # Both: the larger part decides.
        ({**STARVED, "model": 0.3}, "solver stuck"),
        ({**STARVED, "model": 0.7}, "model uncertain here"),
        ({**STARVED, "gap": 0.7, "coverage": 0.2}, "model exploited"),
        # An output is plainly wrong and the model does not know, whether or not it has cost anything yet.
        ({"coverage": 0.1, "worst_error": 1.2}, "model exploited"),
        ({**STARVED, "coverage": 0.1, "worst_error": 1.2}, "model exploited"),
        ({"coverage": 0.1}, "fine"),
        ({"worst_error": 1.2}, "fine"),
        # Only one of the two signs of a bad model.
        ({"gap": 0.3}, "model uncertain here"),
        ({"model": 0.3}, "model uncertain here"),
        ({"off": 0.5}, "model uncertain here"),
        ({"gap": -0.2, "off": 0.2}, "fine"),  # too modest, and its plans are good
        # It warns although its intervals are too narrow, unless they are hardly ever right.
        ({**BLIND, "coverage": 0.7, "disagreement": 3.0}, "model uncertain here"),
        ({**BLIND, "coverage": 0.7, "distance": 3.0}, "model uncertain here"),
        ({**BLIND, "coverage": 0.7}, "model exploited"),
        ({**BLIND, "coverage": 0.3, "disagreement": 9.0, "distance": 9.0}, "model exploited"),
        # It claims no uncertainty, or its training data are not known.
        ({**BLIND, "coverage": math.nan, "disagreement": math.nan}, "model exploited"),
        ({**BLIND, "coverage": math.nan, "disagreement": math.nan, "distance": 3.0}, "model uncertain here"),
        ({**UNSURE, "distance": math.nan}, "model uncertain here"),
        # No plan to judge by, and nothing to win.
        ({"plans": 0, "diverged": 1.0, "scale": 0.0}, "model exploited"),
        ({**BLIND, "scale": 0.0}, "fine"),
    ],
)
def test_cases(changes: dict[str, Any], name: str) -> None:
    assert judge(dataclasses.replace(SOUND, **changes)).name == name


def test_every_combination_is_decided_by_the_rule() -> None:
    below, above = 0.5, 1.5
    count = dict.fromkeys(SEVERITY, 0)
    for search, solver, gap, model, off, coverage, warning in itertools.product(
        (below, above),
        (below, above),
        (below, above),
        (below, above),
        (below, above),
        (0.3, 0.7, 0.9),
        (1, 3),
    ):
        e = dataclasses.replace(
            SOUND,
            search=search * STUCK,
            solver=solver * STUCK,
            gap=gap * GAP,
            model=model * LACK,
            off=off * OFF,
            coverage=coverage,
            disagreement=warning * WARNS / 2,
        )
        verdict = judge(e)
        count[verdict.name] += 1
        misled = above in (gap, model, off)
        stuck = search == solver == above
        known = coverage > KNOWS or (coverage > HALF_KNOWS and warning == 3)
        if not misled and not stuck:
            assert verdict.name == "fine"
        elif not misled or (stuck and max(e.gap, e.model) <= e.solver):
            assert verdict.name == ("solver stuck" if stuck else "fine")
        else:
            assert verdict.name == ("model uncertain here" if known else "model exploited")
        assert verdict.why.strip() and verdict.remedy.strip() and "nan" not in verdict.why
    assert min(count.values()) > 0


@pytest.mark.parametrize("field", ["gap", "model", "off"])
def test_a_worse_model_is_never_judged_better(field: str) -> None:
    for coverage in (0.1, 0.97):
        evidence = dataclasses.replace(SOUND, coverage=coverage)
        worse: list[dict[str, Any]] = [{field: 0.02 * i} for i in range(50)]
        found = [judge(dataclasses.replace(evidence, **changes)).name for changes in worse]
        ranks = [SEVERITY.index(name) for name in found]
        assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


def test_each_verdict_names_its_remedy() -> None:
    exploited = judge(dataclasses.replace(SOUND, **BLIND))
    assert "qvel/hinge" in exploited.remedy and "10 %" in exploited.why
    uncertain = judge(dataclasses.replace(SOUND, **UNSURE))
    assert "more data" in uncertain.remedy and "kappa" in uncertain.remedy and "TS-inf" in uncertain.remedy
    stuck = judge(dataclasses.replace(SOUND, **STARVED))
    assert "budget" in stuck.remedy and "0.50" in stuck.why
    assert judge(SOUND).remedy == "Nothing."


def test_plans_that_did_not_stay_finite_are_told() -> None:
    found = judge(dataclasses.replace(SOUND, diverged=0.25, **BLIND))
    assert "25 % of the plans did not stay finite" in found.why
    lost = judge(dataclasses.replace(SOUND, diverged=0.25))
    assert lost.name == "model uncertain here" and "25 % of the plans did not stay finite" in lost.why
    assert judge(dataclasses.replace(SOUND, diverged=0.05)).name == "fine"


def test_the_model_is_as_good_as_the_planner_that_finds_most_wrong_with_it() -> None:
    assert overall({}) is None
    verdicts = {name: Verdict(name, f"why {name}.", f"cure {name}.") for name in SEVERITY}
    for worst in range(1, 5):
        found = overall({name: verdicts[name] for name in SEVERITY[:worst]})
        assert found is not None and found.name == SEVERITY[worst - 1]
        assert found.remedy == f"cure {found.name}." and found.why.startswith(f"Found with {found.name}")
        assert all(f"{name}: {name}" in found.why for name in SEVERITY[: worst - 1])
