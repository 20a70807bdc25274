"""Scenario NMPC: one plan for all members, branches with controls of their own, constraints tightened by the spread."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from mbrl import Box, Constraint, ContractError, Problem, UnsupportedProblem, Worst, check_planner, evaluate
from mbrl.envs.systems import CartPole, Discretized
from mbrl.planners import CEM, NMPC, ScenarioNMPC
from mbrl.scenarios import Scenarios
from mbrl.symbolic import Symbolic
from tests.problems import seeded
from tests.test_nmpc import NEAR_UPRIGHT, SwingUp, Track, solve, tensor, value


def poles(*masses: float) -> Scenarios:
    return Scenarios(
        tuple(Symbolic(Discretized(CartPole(), 0.05, p=tensor(1.0, m, 0.5, 9.81))) for m in masses)
    )


def problem(
    scenarios: Scenarios, limit: float | None = 0.5, horizon: int = 20, **options: Any
) -> Problem[Any, Any, Any]:
    constraints = () if limit is None else (Constraint(Track(limit), name="track"),)
    return Problem(
        scenarios,
        SwingUp(),
        Box(tensor(-20.0), tensor(20.0)),
        horizon,
        constraints=constraints,
        particles=len(scenarios.members),
        **options,
    )


FOUR = poles(0.15, 0.3, 0.45, 0.6)


def test_one_member_is_nonlinear_mpc() -> None:
    one = problem(poles(0.3))
    alone = dataclasses.replace(one, dynamics=one.dynamics.members[0], particles=1)
    torch.testing.assert_close(
        solve(ScenarioNMPC(), one, NEAR_UPRIGHT).actions, solve(NMPC(), alone, NEAR_UPRIGHT).actions
    )


@pytest.mark.parametrize("transcription", ["shooting", "radau"])
def test_a_plan_holds_for_every_member(transcription: Any) -> None:
    task = problem(FOUR)
    plan = solve(ScenarioNMPC(transcription=transcription), task, NEAR_UPRIGHT)
    assert value(plan, "status") == 0
    costs = []
    for member in FOUR.members:
        alone = dataclasses.replace(task, dynamics=member, particles=1)
        found = evaluate(alone, member, NEAR_UPRIGHT, plan.actions[:, None], keep_states=True)
        assert found.states is not None
        if transcription == "shooting":
            assert float(found.states[..., :-1, 0].abs().max()) <= 0.5 + 1e-5
        costs.append(found.cost[0, 0])
    torch.testing.assert_close(plan.cost[0], torch.stack(costs).mean())
    if transcription == "shooting":
        assert value(plan, "objective") == pytest.approx(float(plan.cost), rel=1e-6)


def test_the_mean_model_alone_breaks_the_limit_for_another_member() -> None:
    task = problem(FOUR)
    middle = dataclasses.replace(task, dynamics=poles(0.375).members[0], particles=1)
    plan = solve(NMPC(), middle, NEAR_UPRIGHT)
    worst = 0.0
    for member in FOUR.members:
        found = evaluate(middle, member, NEAR_UPRIGHT, plan.actions[:, None], keep_states=True)
        assert found.states is not None
        worst = max(worst, float(found.states[..., :-1, 0].abs().max()))
    assert worst > 0.51


def test_branches_with_controls_of_their_own_cost_less() -> None:
    """From the best for every branch apart to one control for all, costs can only rise with what is shared."""
    apart = []
    task = problem(FOUR, limit=None)
    for member in FOUR.members:
        apart.append(
            float(solve(NMPC(), dataclasses.replace(task, dynamics=member, particles=1), NEAR_UPRIGHT).cost)
        )
    costs = [float(solve(ScenarioNMPC(shared=r), task, NEAR_UPRIGHT).cost) for r in (1, 3, 20)]
    assert sum(apart) / 4 <= costs[0] < costs[1] < costs[2]
    everything = solve(ScenarioNMPC(), task, NEAR_UPRIGHT)
    assert float(everything.cost) == pytest.approx(costs[2], rel=1e-9)


def test_constraints_tightened_by_the_spread() -> None:
    """g of the branches, mean + κ deviations, is at its bound along the plan."""
    task = problem(FOUR, limit=0.5)
    plan = solve(ScenarioNMPC(spread=1.0), task, NEAR_UPRIGHT)
    assert value(plan, "status") == 0
    paths = []
    for member in FOUR.members:
        found = evaluate(task, member, NEAR_UPRIGHT, plan.actions[:, None], keep_states=True)
        assert found.states is not None
        paths.append(found.states[0, 0, 1:-1, 0])
    x = torch.stack(paths)
    tightened = x.abs().mean(0) + x.std(0, correction=0)
    assert float(tightened.max()) == pytest.approx(0.5, abs=1e-3)
    assert value(plan, "violation") > 0  # of a single branch, which is allowed here
    wider = solve(ScenarioNMPC(spread=0.0), task, NEAR_UPRIGHT)
    assert float(wider.cost) < float(plan.cost)


def test_risk_is_the_problems_own() -> None:
    task = problem(FOUR, limit=None, risk=Worst())
    plan = solve(ScenarioNMPC(), task, NEAR_UPRIGHT)
    costs = [
        evaluate(
            dataclasses.replace(task, dynamics=m, particles=1), m, NEAR_UPRIGHT, plan.actions[:, None]
        ).cost
        for m in FOUR.members
    ]
    torch.testing.assert_close(plan.cost[0], torch.stack(costs).max())


def test_the_same_problem_serves_sampling_planners() -> None:
    task = problem(FOUR, limit=None)
    planner = CEM(population=50, iterations=2)
    state = planner.init(task, NEAR_UPRIGHT, generator=seeded())
    plan, _ = planner.plan(task, NEAR_UPRIGHT, state, generator=seeded())
    best = solve(ScenarioNMPC(), task, NEAR_UPRIGHT)
    assert float(best.cost) <= float(plan.cost)


def test_contract() -> None:
    x0 = NEAR_UPRIGHT + 0.05 * torch.randn(2, 4, generator=seeded(), dtype=torch.float64)
    check_planner(ScenarioNMPC(), problem(FOUR, horizon=8), x0)
    check_planner(ScenarioNMPC(shared=1), problem(FOUR, horizon=8), x0)


def test_infeasible_for_one_member_names_the_constraint() -> None:
    plan = solve(ScenarioNMPC(iterations=60), problem(poles(0.3, 5.0), limit=0.2), NEAR_UPRIGHT)
    assert float(plan.cost) == math.inf and "track" in str(plan.info["explanation"])


def test_bad_settings() -> None:
    with pytest.raises(ContractError, match="shared ≥ 1"):
        ScenarioNMPC(shared=0)
    with pytest.raises(ContractError, match="spread ≥ 0"):
        ScenarioNMPC(spread=-1.0)
    with pytest.raises(UnsupportedProblem, match="has none"):
        alone = dataclasses.replace(problem(FOUR), dynamics=FOUR.members[0], particles=1)
        ScenarioNMPC().check(alone)
    with pytest.raises(UnsupportedProblem, match=r"ScenarioNMPC"):
        NMPC().check(problem(FOUR))

    plain: Any = Scenarios((Discretized(CartPole(), 0.05),))
    with pytest.raises(UnsupportedProblem, match=r"members with expression.*Symbolic"):
        ScenarioNMPC().check(problem(plain))
