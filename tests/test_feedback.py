"""Plans on the clock: latency, gains between replans, and what is followed where a plan cannot be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import MPC, ContractError, Discrete, Observed, Plan, PlanWarning, Problem
from mbrl.checkpoints import pack, unpack
from mbrl.envs.systems import CartPole, Discretized
from mbrl.experiments.benchmarks import feedback
from mbrl.following import FOLLOWED
from mbrl.planners import ICEM, ILQR
from mbrl.symbolic import Symbolic
from tests.problems import DoubleIntegrator, Quadratic, box, lq_problem, seeded
from tests.test_mpc import Scripted, X


def scripted(planner: Any, **options: Any) -> MPC:
    return MPC(lq_problem(horizon=5), planner, estimator=Observed(), generator=seeded(), **options)


def taken(policy: MPC, steps: int) -> list[float]:
    return [policy(X)[0, 0].item() for _ in range(steps)]


@pytest.mark.parametrize(
    ("latency", "replan_every", "actions", "shifts"),
    [
        (2, 1, [0, 0, 1.00, 1.01, 2.00, 2.01, 3.00], [2, 2, 2]),  # as soon as the planner is free
        (1, 3, [0, 1.00, 1.01, 1.02, 2.00, 2.01, 2.02, 3.00], [3, 3]),
        (3, 3, [0, 0, 0, 1.00, 1.01, 1.02, 2.00, 2.01], [3, 3]),
        (1, 1, [0, 1.00, 2.00, 3.00], [1, 1, 1]),
    ],
)
def test_a_plan_is_followed_when_it_is_there(
    latency: int, replan_every: int, actions: list[float], shifts: list[int]
) -> None:
    planner = Scripted()
    policy = scripted(planner, latency=latency, replan_every=replan_every)
    assert taken(policy, len(actions)) == pytest.approx(actions)
    assert [int(line.split()[1]) for line in planner.log if line.startswith("shift")] == shifts
    assert policy.followed == {"gains": 0, "plan": 2 * (len(actions) - latency), "safe": 2 * latency}


def test_delay_is_reported_where_a_plan_was_begun() -> None:
    policy = scripted(Scripted(), latency=1, replan_every=3)
    found = []
    for _ in range(4):
        policy(X)
        assert policy.report is not None
        found.append((policy.report.delay, policy.report.plan_ms > 0, policy.report.k))
    assert found == [(1, True, 0), (None, False, 0), (None, False, 1), (1, True, 2)]


def balance() -> Problem[Any, Any, Any]:
    plant = Symbolic(Discretized(CartPole(), 0.04))
    upright = Quadratic(
        Q=(1.0, 10.0, 0.1, 0.1), R=(0.01,), Qf=(10.0, 100.0, 1.0, 10.0), goal=(0.0, math.pi, 0.0, 0.0)
    )
    return Problem(plant, upright, box(1, 20.0), 25)


LEAN = torch.tensor([[0.1, math.pi + 0.2, 0.0, 0.0], [0.0, math.pi - 0.1, 0.3, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("replan_every", [1, 5])
@pytest.mark.parametrize("latency", [1, 3])
def test_it_plans_from_where_it_will_be(latency: int, replan_every: int) -> None:
    """Where the model is the plant, the state that is predicted for a plan's beginning comes true, gains and all."""
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Spy(ILQR):
        def plan(self, problem: Any, x0: Tensor, *args: Any, **options: Any) -> Any:
            seen.append(x0)
            return super().plan(problem, x0, *args, **options)

    problem = balance()
    policy = MPC(
        problem,
        Spy(iterations=2),
        estimator=Observed(),
        generator=seeded(),
        latency=latency,
        replan_every=replan_every,
    )
    x, begun = LEAN, []
    states = []
    for t in range(20):
        states.append(x)
        u = policy(x)
        assert policy.report is not None
        if policy.report.delay is not None:
            begun.append(t)
        if t > latency:
            assert policy.report.state_error is not None
            assert policy.report.state_error.max() < 1e-9
        x = problem.dynamics.step(x, u, 0)
    for t, x0 in zip(begun, seen, strict=True):
        if t + latency < len(states):
            torch.testing.assert_close(x0, states[t + latency], rtol=0, atol=1e-12)
    assert len(begun) == math.ceil(20 / max(latency, replan_every))


def test_what_stochastic_dynamics_predict_is_a_draw() -> None:
    @dataclass(frozen=True)
    class Gusty:
        """A double integrator under a constant wind that is drawn anew for each call of `realize`."""

        nx: int = 2
        nu: int = 1
        ny: int = 2
        dt: float = 0.2

        def output(self, x: Tensor) -> Tensor:
            return x

        def realize(self, shape: tuple[int, ...], horizon: int, *, generator: torch.Generator) -> Any:
            wind = torch.rand((*shape, 1), generator=generator, dtype=torch.float64)

            class Draw(DoubleIntegrator):
                def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
                    assert isinstance(k, int) and 0 <= k < horizon
                    return DoubleIntegrator.step(self, x, u, k) + wind

            return Draw()

    problem: Problem[Any, Any, Any] = Problem(Gusty(), Quadratic(), box(1, 10.0), 5)
    policy = MPC(
        problem,
        ICEM(population=8, elites=2),
        estimator=Observed(),
        generator=seeded(),
        latency=2,
        replan_every=2,
    )
    policy(X)
    pending = policy._pending
    assert pending is not None and pending.plan.states is not None
    wind = torch.rand((1, 1, 1), generator=seeded(), dtype=torch.float64)
    rest = DoubleIntegrator().step(X, torch.zeros(2, 1, dtype=torch.float64), 0) + wind[0]
    there = DoubleIntegrator().step(rest, torch.zeros(2, 1, dtype=torch.float64), 1) + wind[0]
    torch.testing.assert_close(pending.plan.states[:, 0], there)


class Clock:
    """A clock that only a planner moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Slow(Scripted):
    """The n-th plan takes seconds[n], the last one's for all after it; one before them, made for nothing, a minute."""

    seconds: tuple[float, ...] = ()
    clock: Clock = field(default_factory=Clock)

    def plan(self, *args: Any, **options: Any) -> Any:
        result = super().plan(*args, **options)
        n = self.log.count("plan") - 1
        self.clock.now += self.seconds[min(n, len(self.seconds)) - 1] if n else 60.0
        return result


@pytest.mark.parametrize(
    ("seconds", "actions"),
    [
        # dt = 0.2 s. The first plan is expected at once and comes 2 steps late: entered at its step 2.
        ((0.3,), [0, 0, 1.02, 1.03, 2.00, 2.01, 3.00]),
        # It is expected after 2 steps and takes 1: followed at its time, not before.
        ((0.3, 0.1), [0, 0, 1.02, 1.03, 2.00, 3.00, 4.00]),
        # It is expected after 1 step and takes 3: the old plan goes on until it has run out.
        ((0.1, 0.55), [0, 1.01, 1.02, 1.03, 2.02, 2.03, 2.04, 3.00]),
        # As long as plans take 7 steps, each has 5 of its own when it comes, of which none is left at first.
        ((1.35,), [0] * 14 + [2.02, 2.03, 2.04, 0]),
    ],
)
def test_latency_is_measured(
    seconds: tuple[float, ...], actions: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("mbrl.mpc.time.perf_counter", clock)
    policy = scripted(Slow(seconds=seconds, clock=clock), latency="measured")
    assert taken(policy, len(actions)) == pytest.approx(actions)


def spoiled(bad: Callable[[Plan], Plan], first: int) -> Callable[[int, Plan], Plan]:
    return lambda n, plan: bad(plan) if n >= first else plan


@dataclass(frozen=True)
class WithGains(Scripted):
    """The same plans; gains of -1 on the position."""

    def plan(self, *args: Any, **options: Any) -> Any:
        plan, state = super().plan(*args, **options)
        K = torch.tensor([[-1.0, 0.0]], dtype=torch.float64).expand(len(plan.cost), self.H, -1, -1)
        return replace(plan, K=K), state


def test_the_ladder() -> None:
    """Gains, the plan without them, the safe action; each is counted."""
    planner = WithGains(spoil=spoiled(lambda plan: replace(plan, cost=plan.cost * math.nan), 2))
    policy = scripted(planner, safe_action=torch.tensor([-3.0]))
    start, push = X[:1], torch.tensor([[0.25, 0.0]], dtype=torch.float64)
    assert policy(start).item() == 1.0
    assert policy.report is not None and policy.report.plan.states is not None
    expected = policy.report.plan.states[0]
    with pytest.warns(PlanWarning, match="its cost is not finite"):
        assert policy(expected[None, 1] + push).item() == pytest.approx(1.01 - 0.25)  # the first plan's gains
    assert policy(start * math.nan).item() == pytest.approx(1.02)
    assert policy(expected[None, 3]).item() == pytest.approx(1.03)
    assert policy.report.predicted_cost is not None and torch.isfinite(policy.report.predicted_cost)
    assert policy(expected[None, 4]).item() == pytest.approx(1.04)
    for _ in range(2):  # it has run out
        assert policy(expected[None, 5]).item() == -3.0
        assert torch.isnan(policy.report.predicted_cost)
    assert policy.followed == {"gains": 4, "plan": 1, "safe": 2}
    assert policy.fallbacks == 6
    assert FOLLOWED[int(policy.report.followed)] == "safe"


def test_a_lost_state_is_waited_for() -> None:
    """Nothing can be planned from NaN: the plan goes on, and the search starts over when the state is back."""
    planner = Scripted()
    policy = scripted(planner)
    policy(X)
    with pytest.warns(PlanWarning, match="row 0 is not followed: the state is not finite"):
        assert policy(X * math.nan)[:, 0].tolist() == [1.01, 1.01]
    assert policy(X)[:, 0].tolist() == [1.0, 1.0]
    assert planner.log == ["check", "init", "plan", "init", "plan"]


def test_an_episode_that_ends_in_the_meantime() -> None:
    """Its plan is dropped, and so is the one that is being computed for it; the other row's are not."""
    policy = scripted(Scripted(), latency=2, replan_every=2)
    taken(policy, 5)  # at t = 4 plan 2 has come, and plan 3 was begun
    policy.reset(torch.tensor([True, False]))
    found = [policy(X)[:, 0].tolist() for _ in range(4)]
    # Plan 3 comes at t = 6 for row 1 only; the next one, the first of row 0, at t = 8.
    assert found == [pytest.approx(rows) for rows in ([0, 2.01], [0, 3.00], [0, 3.01], [1.00, 4.00])]
    policy.reset()
    assert taken(policy, 3) == [0, 0, 1.00]


@pytest.mark.parametrize("latency", [0, 2])
@pytest.mark.parametrize("planner", [ILQR(iterations=2), ICEM(population=16, elites=4)], ids=["ilqr", "icem"])
def test_a_resumed_policy_goes_on_to_the_last_bit(planner: Any, latency: int) -> None:
    problem: Problem[Any, Any, Any] = (
        balance() if isinstance(planner, ILQR) else lq_problem(horizon=8, limit=2.0)
    )
    nx = problem.dynamics.nx
    wind = 0.02 * torch.randn(14, 2, nx, generator=seeded(1), dtype=torch.float64)

    def policy() -> MPC:
        return MPC(
            problem,
            planner,
            estimator=Observed(),
            generator=seeded(),
            latency=latency,
            replan_every=3,
        )

    whole, x, saved = policy(), LEAN[:, :nx], []
    path = []
    for t in range(14):
        saved.append((pack(whole.state_dict()), whole.generator.get_state(), x))
        u = whole(x)
        path.append(u)
        x = problem.dynamics.step(x, u, 0) + wind[t]
        if t == 6:
            whole.reset(torch.tensor([False, True]))
    for t in (0, 1, 3, 4, 5, 7, 11):
        part = policy()
        tree, random, x = saved[t]
        part.load_state_dict(unpack(*copy.deepcopy(tree)))
        part.generator.set_state(random)
        for i in range(t, 14):
            u = part(x)
            assert torch.equal(u, path[i])
            x = problem.dynamics.step(x, u, 0) + wind[i]
            if i == 6:
                part.reset(torch.tensor([False, True]))
        assert (part.fallbacks, part.followed) == (whole.fallbacks, whole.followed)


@pytest.mark.parametrize("latency", [-1, 6, 1.5, True, "guessed", None])
def test_latencies_that_make_no_sense_are_refused(latency: Any) -> None:
    with pytest.raises(ContractError, match='latency of 0 to horizon = 5 control steps, or "measured"'):
        scripted(Scripted(), latency=latency)


def test_a_plan_must_last_until_the_next_one_comes() -> None:
    short = Scripted(spoil=lambda n, plan: replace(plan, length=torch.tensor([5, 2])))
    policy = scripted(short, latency=3)
    with pytest.warns(PlanWarning, match="row 1 is not followed: it has fewer than 3 valid steps"):
        found = [policy(X)[:, 0].tolist() for _ in range(4)]
    assert found == [[0, 0], [0, 0], [0, 0], [1.0, 0]]


@pytest.mark.parametrize(
    ("safe", "text"),
    [
        ([0.0, 0.0], r"safe_action \(nu,\) = \(1,\), but got \(2,\)"),
        ([99.0], r"between \[-10.0\] and \[10.0\], but got \[99.0\]"),
        ([math.nan], r"between \[-10.0\] and \[10.0\], but got \[nan\]"),
    ],
)
def test_safe_actions_are_actions(safe: list[float], text: str) -> None:
    with pytest.raises(ContractError, match=text):
        scripted(Scripted(), safe_action=torch.tensor(safe))


def test_safe_actions_of_discrete_ones() -> None:
    actions = Discrete(torch.tensor([[1.0], [2.0]]))
    problem: Problem[Any, Any, Any] = Problem(DoubleIntegrator(), Quadratic(), actions, 5)
    options: dict[str, Any] = {"estimator": Observed(), "generator": seeded()}
    assert MPC(problem, Scripted(), **options).safe_action.tolist() == [1.0]
    assert MPC(problem, Scripted(), safe_action=torch.tensor([2.0]), **options).safe_action.tolist() == [2.0]
    with pytest.raises(ContractError, match=r"one of \[\[1.0\], \[2.0\]\], but got \[0.0\]"):
        MPC(problem, Scripted(), safe_action=torch.tensor([0.0]), **options)


def test_gains_are_worth_more_the_longer_a_plan_is_followed() -> None:
    """Four cart-poles with other masses, pushed: with gains they stand where they fall without."""
    case, config = feedback.CASES["cart-pole"], feedback.Config(seeds=4, steps=80)
    cells = {
        (every, gains): feedback.run(case, config, gains=gains, every=every, latency=3)
        for every in (1, 20)
        for gains in (True, False)
    }
    assert all(cells[every, True]["fallen"] == 0 for every in (1, 20))
    assert cells[20, False]["fallen"] >= 3
    assert cells[1, True]["cost"] < cells[1, False]["cost"] < cells[20, False]["cost"]
    assert cells[20, True]["cost"] < 0.5 * cells[20, False]["cost"]
    assert cells[20, True]["followed"] == {"gains": 4 * 77, "plan": 0, "safe": 4 * 3}
    assert cells[20, False]["followed"] == {"gains": 0, "plan": 4 * 77, "safe": 4 * 3}
