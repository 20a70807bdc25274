"""MPC: when it plans, what it shifts, and what it does when a plan cannot be used."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mbrl import (
    MPC,
    Autodiff,
    Box,
    ContractError,
    FullState,
    Observed,
    Plan,
    PlanWarning,
    Policy,
    Problem,
    RandomPolicy,
    UnsupportedProblem,
)
from mbrl.estimators import Padded
from mbrl.following import FOLLOWED
from mbrl.planners import ICEM, ILQR
from tests.problems import DoubleIntegrator, Quadratic, box, lq_problem, seeded


@dataclass(frozen=True)
class Counted:
    """rounds (M,): plans since the start; moved (M,): steps shifted."""

    rounds: Tensor
    moved: Tensor


@dataclass(frozen=True)
class Scripted:
    """Plans that say who they are: action k of the n-th plan is n + k / 100."""

    H: int = 5
    spoil: Callable[[int, Plan], Plan] = lambda n, plan: plan
    log: list[str] = field(default_factory=list)

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        self.log.append("check")
        if problem.discount != 1.0:
            raise UnsupportedProblem("Scripted needs discount 1.")

    def init(
        self, problem: Problem[Any, Any, Any], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> Counted:
        self.log.append("init")
        return Counted(torch.zeros(len(x0), dtype=torch.long), torch.zeros(len(x0), dtype=torch.long))

    def shift(self, state: Counted, actions_taken: Tensor, x_now: Tensor) -> Counted:
        self.log.append(f"shift {actions_taken.shape[1]}")
        return replace(state, moved=state.moved + actions_taken.shape[1])

    def plan(
        self, problem: Problem[Any, Any, Any], x0: Tensor, state: Counted, *, generator: Generator
    ) -> tuple[Plan, Counted]:
        self.log.append("plan")
        state = replace(state, rounds=state.rounds + 1)
        n = self.log.count("plan")
        k = torch.arange(self.H, dtype=torch.float64) / 100
        actions = (state.rounds[:, None] + k)[..., None]
        states = [x0]
        for i in range(self.H):
            states.append(problem.dynamics.step(states[-1], actions[:, i], i))
        plan = Plan(actions, torch.zeros(len(x0), dtype=torch.float64), torch.stack(states, 1))
        return self.spoil(n, plan), state


def mpc(planner: Any, replan_every: int = 1, **options: Any) -> MPC:
    return MPC(
        lq_problem(horizon=5, **options),
        planner,
        estimator=Observed(),
        generator=seeded(),
        replan_every=replan_every,
    )


X = torch.zeros(2, 2, dtype=torch.float64)


def test_plans_every_n_steps_and_shifts_by_the_steps_taken() -> None:
    planner = Scripted()
    policy = mpc(planner, replan_every=3)
    taken = [policy(X)[0, 0].item() for _ in range(7)]
    assert taken == pytest.approx([1.00, 1.01, 1.02, 2.00, 2.01, 2.02, 3.00])
    assert planner.log == ["check", "init", "plan", "shift 3", "plan", "shift 3", "plan"]
    assert isinstance(policy, Policy)


def test_bounds_that_were_tightened_hold_for_an_older_plan_too() -> None:
    policy = mpc(Scripted(), replan_every=3)
    assert policy(X).max() == pytest.approx(1.0)
    policy.problem = replace(policy.problem, actions=box(1, 0.5))
    assert policy(X).max() == 0.5


def test_plan_time_is_reported_where_it_was_spent() -> None:
    policy = mpc(Scripted(), replan_every=2)
    times = []
    for _ in range(4):
        policy(X)
        assert policy.report is not None
        times.append(policy.report.plan_ms)
    assert times[0] > 0 and times[2] > 0 and times[1] == times[3] == 0.0


def test_reset_starts_over() -> None:
    planner = Scripted()
    policy = mpc(planner)
    policy(X)
    policy(X)
    policy.reset()
    assert policy(X)[0, 0].item() == 1.0
    assert planner.log.count("init") == 2


def test_reset_of_some_rows_leaves_the_others_alone() -> None:
    planner = Scripted()
    policy = mpc(planner, replan_every=3)
    policy(X)
    policy(X)
    policy.reset(torch.tensor([True, False]))
    # It plans at once, since row 0 has no plan for its new episode; row 1 is at its second plan.
    assert policy(X)[:, 0].tolist() == pytest.approx([1.0, 2.0])
    assert policy(X)[:, 0].tolist() == pytest.approx([1.01, 2.01])
    policy.reset(torch.tensor([True, False]))
    policy.reset(torch.tensor([False, True]))
    assert policy(X)[:, 0].tolist() == pytest.approx([1.0, 1.0])


def test_a_reset_of_no_row_changes_nothing() -> None:
    """As vector loops call it at each step, with what has ended."""
    planner = Scripted()
    policy = mpc(planner, replan_every=3)
    for _ in range(6):
        policy(X)
        policy.reset(torch.zeros(2, dtype=torch.bool))
    assert planner.log == ["check", "init", "plan", "shift 3", "plan"]


def spoiled(row: int, change: Callable[[Plan], Plan]) -> Callable[[int, Plan], Plan]:
    """From the second plan on, row `row` is changed."""

    def spoil(n: int, plan: Plan) -> Plan:
        if n < 2:
            return plan
        bad = change(plan)
        actions, cost = plan.actions.clone(), plan.cost.clone()
        actions[row], cost[row] = bad.actions[row], bad.cost[row]
        return replace(plan, actions=actions, cost=cost)

    return spoil


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda plan: replace(plan, actions=plan.actions * math.nan), "actions are not finite"),
        (lambda plan: replace(plan, actions=plan.actions + math.inf), "actions are not finite"),
        (lambda plan: replace(plan, actions=plan.actions + 1e3), "actions leave the bounds"),
        (lambda plan: replace(plan, cost=plan.cost + math.inf), "cost is not finite"),
        (lambda plan: replace(plan, cost=plan.cost * math.nan), "cost is not finite"),
    ],
    ids=["nan", "inf", "outside", "cost inf", "cost nan"],
)
def test_a_plan_that_cannot_be_used_leaves_the_old_one(change: Callable[[Plan], Plan], reason: str) -> None:
    policy = mpc(Scripted(spoil=spoiled(1, change)))
    assert policy(X)[:, 0].tolist() == [1.0, 1.0]
    with pytest.warns(PlanWarning, match=f"Scripted for row 1 is not followed: .*{reason}"):
        second = policy(X)[1, 0].item()
    # Row 1 follows its first plan, step after step, and takes the safe action after its end.
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanWarning)  # it was said once
        old = [second, *(policy(X)[1, 0].item() for _ in range(5))]
    assert old == pytest.approx([1.01, 1.02, 1.03, 1.04, 0.0, 0.0])
    assert policy.fallbacks == 6
    assert policy.report is not None and policy.report.fallback.tolist() == [False, True]
    assert policy.report.predicted_cost is not None
    assert torch.isnan(policy.report.predicted_cost).tolist() == [False, True]
    assert [FOLLOWED[i] for i in policy.report.followed] == ["plan", "safe"]
    assert policy.followed == {"gains": 0, "plan": 12, "safe": 2}


def test_without_an_old_plan_the_middle_of_the_bounds_is_taken() -> None:
    policy = mpc(Scripted(spoil=lambda n, plan: replace(plan, cost=plan.cost + math.inf)))
    assert policy(X).tolist() == [[0.0], [0.0]]
    policy.reset(torch.tensor([True, False]))
    policy(X)
    assert policy.fallbacks == 4


def test_a_lost_row_does_not_stop_the_others() -> None:
    policy = mpc(Scripted())
    policy(X)
    lost = torch.tensor([[0.0, 0.0], [math.nan, 0.0]], dtype=torch.float64)
    with pytest.warns(PlanWarning, match="row 1 is not followed: the state is not finite"):
        action = policy(lost)
    assert action[:, 0].tolist() == pytest.approx([2.0, 1.01])
    assert policy.report is not None and policy.report.fallback.tolist() == [False, True]


def test_too_few_valid_steps_are_not_followed() -> None:
    policy = mpc(Scripted(spoil=lambda n, plan: replace(plan, length=torch.tensor([5, 1]))), replan_every=2)
    with pytest.warns(PlanWarning, match="row 1 is not followed: it has fewer than 2 valid steps"):
        assert policy(X)[:, 0].tolist() == [1.0, 0.0]


def test_an_ended_episode_leaves_no_last_action() -> None:
    seen: list[Tensor | None] = []

    class Spy(Observed):
        def __call__(self, obs: Tensor, info: Any, last_action: Tensor | None) -> Tensor:
            seen.append(last_action)
            return super().__call__(obs, info, last_action)

    policy = MPC(lq_problem(horizon=5), Scripted(), estimator=Spy(), generator=seeded())
    policy(X)
    policy.reset(torch.tensor([True, False]))
    policy(X)
    assert seen[0] is None and seen[1] is not None and seen[1].tolist() == [[0.0], [1.0]]


def test_without_bounds_it_is_finite_too() -> None:
    problem = Problem(DoubleIntegrator(), Quadratic(), box(1, math.inf), 5)
    planner = Scripted(spoil=lambda n, plan: replace(plan, actions=plan.actions * math.nan))
    policy = MPC(problem, planner, estimator=Observed(), generator=seeded())
    assert policy(X).tolist() == [[0.0], [0.0]]


def test_a_row_whose_plan_is_not_finite_starts_its_search_over() -> None:
    planner = Scripted(spoil=spoiled(1, lambda plan: replace(plan, actions=plan.actions * math.nan)))
    policy = mpc(planner)
    for _ in range(3):
        policy(X)
    assert policy._state.rounds.tolist() == [3, 0]


@pytest.mark.parametrize("shape", [(1, 5, 1), (2, 5, 2), (2, 5), (2, 6, 1), (2, 1, 1)])
def test_plans_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    planner = Scripted(spoil=lambda n, plan: replace(plan, actions=torch.zeros(shape, dtype=torch.float64)))
    with pytest.raises(ContractError, match=r"Scripted.plan must return actions \(M, H, nu\) = \(2, 5, 1\)"):
        mpc(planner, replan_every=2)(X)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"actions": np.zeros((2, 5, 1))}, r"actions (M, H, nu) = (2, 5, 1), but returned a ndarray"),
        ({"cost": None}, "cost (M,) = (2,), but returned a NoneType"),
        ({"cost": torch.zeros(2, 1)}, "cost (M,) = (2,), but returned (2, 1)"),
        ({"cost": torch.tensor(0.0)}, "cost (M,) = (2,), but returned ()"),
        ({"states": torch.zeros(2, 5, 2)}, "x0 first, = (2, 6, 2), but returned (2, 5, 2)"),
        ({"states": torch.zeros(2, 6, 3)}, "x0 first, = (2, 6, 2), but returned (2, 6, 3)"),
        ({"length": [5, 5]}, "length (M,) = (2,), but returned a list"),
    ],
)
def test_malformed_plans_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ContractError, match=re.escape(text)):
        mpc(Scripted(spoil=lambda n, plan: replace(plan, **change)))(X)


def test_a_planner_returns_a_plan_and_a_state() -> None:
    class Forgetful(Scripted):
        def plan(self, *given: Any, **options: Any) -> Any:
            return None

    with pytest.raises(
        ContractError, match="Forgetful.plan must return a Plan and the next state, but returned a NoneType"
    ):
        mpc(Forgetful())(X)


@pytest.mark.parametrize("state", [None, {"rounds": X}, Counted(torch.zeros(2), torch.zeros(()))])
def test_states_that_could_not_be_reset_by_rows_are_refused(state: Any) -> None:
    class Own(Scripted):
        def init(self, *given: Any, **options: Any) -> Any:
            return state

    with pytest.raises(ContractError, match="Own needs a state"):
        mpc(Own())(X)


def test_masks_have_one_bool_per_problem() -> None:
    policy = mpc(Scripted())
    policy(X)
    for mask in (torch.tensor([True]), torch.tensor([1, 0]), torch.tensor(True)):
        with pytest.raises(ContractError, match=r"one bool per problem, \(M,\) = \(2,\), but got"):
            policy.reset(mask)
    policy(X)
    policy.reset(np.array([True, False]))  # type: ignore[arg-type]
    assert policy(X)[:, 0].tolist() == [1.0, 3.0]


def test_the_number_of_problems_changes_by_a_reset_only() -> None:
    policy = mpc(Scripted())
    policy(X)
    with pytest.raises(ContractError, match=r"plans for M = 2 problems, but got 1 states. Call reset\(\)"):
        policy(X[:1])
    policy.reset()
    assert policy(X[:1]).shape == (1, 1)


def test_a_mismatch_fails_when_it_is_built() -> None:
    with pytest.raises(UnsupportedProblem, match="discount 1"):
        mpc(Scripted(), discount=0.9)
    for steps in (0, 6):
        with pytest.raises(ContractError, match="1 ≤ replan_every ≤ horizon = 5"):
            mpc(Scripted(), replan_every=steps)


def test_prediction_error() -> None:
    policy = mpc(Scripted(), replan_every=2)
    plant = DoubleIntegrator()
    x = X
    policy(x)
    assert policy.report is not None and policy.report.state_error is None
    for k in range(3):
        x = plant.step(x, policy.report.plan.actions[:, policy.report.k], 0)
        x = x + torch.tensor([[0.0, 0.0], [0.25, 0.0]], dtype=torch.float64) * (k == 1)  # a push of row 1
        policy(x)
        assert policy.report.state_error is not None
        assert policy.report.state_error.tolist() == pytest.approx([0.0, 0.25 if k == 1 else 0.0], abs=1e-12)
    policy.reset(torch.tensor([False, True]))
    policy(x)
    error = policy.report.state_error
    assert isinstance(error, Tensor)
    assert torch.isnan(error).tolist() == [False, True]  # another episode


@dataclass(frozen=True)
class Rewarding(DoubleIntegrator):
    """x = (p, v, reward of the last step), of which the world shows the first two."""

    nx: int = 3
    ny: int = 3

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return torch.cat([DoubleIntegrator.step(self, x, u, k), torch.full_like(x[..., :1], 7.0)], -1)


def test_what_the_world_does_not_show_is_not_compared() -> None:
    problem = replace(lq_problem(horizon=5), dynamics=Rewarding())
    problem = replace(problem, cost=Quadratic(Q=(1.0, 1.0, 0.0), Qf=(1.0, 1.0, 0.0)))
    policy = MPC(problem, Scripted(), estimator=Padded(Observed()), generator=seeded())
    action = policy(X)
    policy(DoubleIntegrator().step(X, action, 0) + torch.tensor([0.0, 0.25]))
    assert policy.report is not None
    for error in (policy.report.state_error, policy.report.output_error):
        assert error is not None and error.tolist() == pytest.approx([0.25, 0.25], abs=1e-12)


def test_predicted_cost_is_the_stage_cost_of_the_action_taken() -> None:
    params = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)

    @dataclass(frozen=True)
    class Clock(Quadratic):
        def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
            assert p is not None
            return p[..., 1] + u[..., 0]

    for given in (params, params.expand(2, 6, 2)):
        problem = Problem(DoubleIntegrator(), Clock(), box(1, 10.0), 5, params=given)
        policy = MPC(problem, Scripted(), estimator=Observed(), generator=seeded(), replan_every=2)
        for k in range(4):
            action = policy(X)
            assert policy.report is not None and policy.report.predicted_cost is not None
            wanted = params[k % 2, 1] + action[:, 0]
            torch.testing.assert_close(policy.report.predicted_cost, wanted)


def test_params_are_given_for_every_problem() -> None:
    policy = mpc(Scripted(), params=torch.zeros(3, 6, 1, dtype=torch.float64))
    with pytest.raises(ContractError, match=r"params .* for M = 2 problems, but got \(3, 6, 1\)"):
        policy(X)


def test_shorter_plans_are_followed_and_fallen_back_on() -> None:
    def spoil(n: int, plan: Plan) -> Plan:
        short = replace(plan, actions=plan.actions[:, :2], states=None, length=torch.full((2,), 2))
        return short if n == 1 else replace(plan, cost=plan.cost + math.inf)

    policy = mpc(Scripted(spoil=spoil))
    assert [policy(X)[0, 0].item() for _ in range(4)] == pytest.approx([1.0, 1.01, 0.0, 0.0])


def test_a_shorter_plan_that_cannot_be_used_meets_a_reset_of_some_rows() -> None:
    def spoil(n: int, plan: Plan) -> Plan:
        return plan if n == 1 else Plan(plan.actions[:, :2], plan.cost + math.inf, length=torch.full((2,), 2))

    policy = mpc(Scripted(spoil=spoil))
    policy(X)
    policy.reset(torch.tensor([True, False]))
    assert policy(X)[:, 0].tolist() == pytest.approx([0.0, 1.01])


def test_closed_loop_reaches_the_origin() -> None:
    problem = lq_problem(horizon=12, limit=2.0)
    policy = MPC(problem, ICEM(), estimator=Observed(), generator=seeded(), replan_every=2)
    x = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    for _ in range(50):
        x = problem.dynamics.step(x, policy(x), 0)
    assert x.abs().max() < 0.2  # what the sampling noise leaves
    assert policy.fallbacks == 0


def test_estimators() -> None:
    full = FullState()
    assert full(X, {"state": [1.0, 2.0]}, None).tolist() == [[1.0, 2.0]]
    assert full(X, {"state": torch.ones(3, 2)}, None).shape == (3, 2)
    with pytest.raises(ContractError, match=r"no info"):
        full(X, None, None)
    with pytest.raises(ContractError, match=r"the keys \['reward', 'time'\].*World.make"):
        full(X, {"time": 0.0, "reward": 1.0}, None)
    seen = Observed(torch.float32)(torch.ones(4), None, None)
    assert seen.shape == (1, 4) and seen.dtype == torch.float32


def test_random_actions_for_one_observation_and_for_many() -> None:
    policy = RandomPolicy(box(3, 2.0), generator=seeded())
    assert policy(torch.zeros(17)).shape == (1, 3) and policy(torch.zeros(5, 17)).shape == (5, 3)


def test_gains_correct_what_was_not_expected_between_replans() -> None:
    """A pendulum held upright by a plan of 25 steps: the wind throws it over, unless the plan's gains are applied."""
    from mbrl.envs.systems import Discretized, Pendulum

    plant = Autodiff(Discretized(Pendulum(), 0.05))
    limit = torch.tensor([20.0], dtype=torch.float64)
    upright = Quadratic(Q=(10.0, 1.0), R=(0.01,), Qf=(100.0, 10.0), goal=(math.pi, 0.0))
    problem = Problem(plant, upright, Box(-limit, limit), 25)
    ends = {}
    for gains in (True, False):

        @dataclass(frozen=True)
        class Blind(ILQR):
            def plan(self, *args: Any, **options: Any) -> Any:
                plan, state = super().plan(*args, **options)
                return replace(plan, K=None), state

        planner = ILQR(iterations=20) if gains else Blind(iterations=20)
        policy = MPC(problem, planner, estimator=Observed(), generator=seeded(), replan_every=25)
        x, wind = torch.tensor([[math.pi, 0.0]], dtype=torch.float64), seeded(1)
        for _ in range(25):
            u = policy(x)
            assert bool((u.abs() <= limit).all())
            x = plant.step(x, u, 0) + 0.05 * torch.randn(x.shape, generator=wind, dtype=x.dtype)
        ends[gains] = abs(float(x[0, 0]) - math.pi)
    assert ends[True] < 0.1 and ends[False] > 0.5, ends


def test_gains_of_a_wrong_shape_are_told() -> None:
    policy = mpc(Scripted(spoil=lambda n, plan: replace(plan, K=torch.zeros(2, 5, 2))), replan_every=2)
    with pytest.raises(ContractError, match=r"K \(M, H, nu, ndx\) = \(2, 5, 1, 2\)"):
        policy(X)
