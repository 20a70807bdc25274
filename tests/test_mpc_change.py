"""MPC whose planner and horizon change while it runs: the search goes on from the last plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from mbrl import MPC, ContractError, Observed, Plan, Problem, UnsupportedProblem
from tests.problems import lq_problem, seeded
from tests.test_mpc import Counted, Scripted, X


@dataclass(frozen=True)
class Guessed(Scripted):
    """Keeps the actions that it was to start from."""

    guesses: list[Tensor] = field(default_factory=list)

    def init(
        self, problem: Problem[Any, Any, Any], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> Counted:
        if guess is not None:
            self.guesses.append(guess.actions)
        return Scripted.init(self, problem, x0, generator=generator, guess=guess)


def mpc(**options: Any) -> MPC:
    return MPC(lq_problem(horizon=5), Scripted(), estimator=Observed(), generator=seeded(), **options)


def test_the_search_starts_from_the_last_plan_moved_on_by_what_was_done() -> None:
    policy = mpc(replan_every=2)
    policy(X)
    later = Guessed()
    policy.change(policy.problem, later)
    assert later.guesses[0][0, :, 0].tolist() == pytest.approx([1, 1.01, 1.02, 1.03, 1.04])
    assert policy(X)[0, 0] == 1.01  # the plan that is followed goes on
    assert policy(X)[0, 0] == 1.0  # the first of its own
    assert later.log == ["check", "init", "shift 2", "plan"]


@pytest.mark.parametrize(
    ("horizon", "guess"), [(3, [1, 1.01, 1.02]), (7, [1, 1.01, 1.02, 1.03, 1.04, 0.5, 0.5])]
)
def test_another_horizon(horizon: int, guess: list[float]) -> None:
    policy = mpc(safe_action=torch.tensor([0.5]))
    policy(X)
    later = Guessed(H=horizon)
    policy.change(lq_problem(horizon=horizon), later)
    assert later.guesses[0][0, :, 0].tolist() == pytest.approx(guess)
    policy(X)
    assert policy.report is not None and policy.report.plan.actions.shape == (2, horizon, 1)


def test_a_plan_that_is_on_its_way_is_the_last_one() -> None:
    policy = mpc(latency=2)
    policy(X)  # begun, and not yet followed
    later = Guessed()
    policy.change(policy.problem, later)
    assert later.guesses[0][0, 0, 0] == 1.0
    assert [float(policy(X)[0, 0]) for _ in range(3)] == [0.0, 1.0, 1.01]
    assert later.log[:3] == ["check", "init", "shift 2"]


def test_rows_of_it_that_are_unusable_are_not() -> None:
    def spoil(n: int, plan: Plan) -> Plan:
        return replace(plan, cost=torch.tensor([torch.nan, 0.0]).double()) if n == 2 else plan

    policy = MPC(
        lq_problem(horizon=5), Scripted(spoil=spoil), estimator=Observed(), generator=seeded(), latency=1
    )
    for _ in range(2):
        policy(X)
    later = Guessed()
    policy.change(policy.problem, later)
    assert later.guesses[0][:, 0, 0].tolist() == [1.01, 2.0]


def test_before_the_first_plan_there_is_nothing_to_start_from() -> None:
    policy, later = mpc(), Guessed()
    policy.change(policy.problem, later)
    policy(X)
    assert later.guesses == [] and later.log == ["check", "init", "plan"]


def test_what_is_refused_changes_nothing() -> None:
    policy = mpc(replan_every=3)
    policy(X)
    before = policy.state_dict(), policy.planner, policy.problem
    with pytest.raises(ContractError, match="a horizon of 3 steps or more"):
        policy.change(lq_problem(horizon=2), Scripted())
    with pytest.raises(UnsupportedProblem, match="discount"):
        policy.change(lq_problem(horizon=5, discount=0.9), Scripted())
    assert (policy.planner, policy.problem) == before[1:]
    assert policy.state_dict()["planner"]["rounds"] is before[0]["planner"]["rounds"]
    assert policy(X)[0, 0] == 1.01
