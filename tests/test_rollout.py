"""evaluate(): one score for all planners, against a plain Python loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from mbrl import (
    Box,
    ContractError,
    CVaR,
    Mean,
    MeanStd,
    Optimistic,
    Problem,
    Risk,
    Worst,
    evaluate,
    realize,
    rollout,
)
from tests.problems import DoubleIntegrator, Noisy, Quadratic, box, lq_problem, riccati, seeded


@dataclass(frozen=True)
class Steered:
    """The state is the action just taken: costs and ends can be laid out by hand."""

    nx: int = 1
    nu: int = 1
    ny: int = 1
    dt: float = 1.0

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return u + 0.0 * x

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Reached:
    """ℓ = y', terminal = 100 y."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return y_next[..., 0]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return 100.0 * y[..., 0]


def score(plan: list[float], **options: Any) -> float:
    problem = Problem(Steered(), Reached(), box(1, 1e9), len(plan), **options)
    u = torch.tensor(plan, dtype=torch.float64).reshape(1, 1, -1, 1)
    return float(evaluate(problem, problem.dynamics, torch.zeros(1, 1, dtype=torch.float64), u).cost)


def at(value: float) -> Callable[[Tensor], Tensor]:
    return lambda y: y[..., 0] == value


def test_discount_and_terminal_cost() -> None:
    assert score([1.0, 2.0, 3.0], discount=0.5) == pytest.approx(1 + 0.5 * 2 + 0.25 * 3 + 0.125 * 300)


def test_the_cost_of_the_terminating_step_counts_and_nothing_after_it() -> None:
    assert score([1.0, 2.0, 3.0, 4.0], terminated=at(2.0)) == 3.0
    assert score([1.0, 2.0, 3.0], terminated=at(3.0)) == 6.0  # no terminal cost after an end
    assert score([1.0, 2.0, 3.0, 4.0], terminated=at(2.0), termination_cost=7.0, discount=0.5) == 1 + 0.5 * (
        2 + 7
    )


def test_probabilities_of_ending_weigh_what_follows() -> None:
    assert score([1.0, 2.0], terminated=lambda y: torch.full_like(y[..., 0], 0.25)) == pytest.approx(
        1 + 0.75 * 2 + 0.75**2 * 200
    )
    value = score([1.0, 2.0], terminated=lambda y: torch.full_like(y[..., 0], 0.25), termination_cost=4.0)
    assert value == pytest.approx(1 + 0.25 * 4 + 0.75 * (2 + 0.25 * 4) + 0.75**2 * 200)


def test_terminal_value_counts_once_discounted() -> None:
    assert score([1.0], discount=0.5, terminal_value=lambda x: 10.0 * x[..., 0]) == pytest.approx(
        1 + 0.5 * 110
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_costs_infinity(bad: float) -> None:
    assert score([1.0, bad, 1.0]) == math.inf
    assert score([1.0, 1.0, bad]) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_after_the_end_nothing_can_go_wrong(bad: float) -> None:
    """0 · NaN is NaN: rows that ended must be masked, not multiplied away."""
    assert score([1.0, 2.0, bad, bad], terminated=at(2.0)) == 3.0
    value = score(
        [1.0, 2.0, 5.0], terminated=at(2.0), terminal_value=lambda x: torch.full_like(x[..., 0], bad)
    )
    assert value == 3.0


@dataclass(frozen=True)
class BadCost(Reached):
    bad: float = math.nan
    final: bool = False

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return torch.where((y_next[..., 0] == 5.0) & (not self.final), self.bad, y_next[..., 0])

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.where((y[..., 0] == 5.0) & self.final, self.bad, 0.0 * y[..., 0])


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_costs_that_are_not_finite_cost_infinity(bad: float, final: bool) -> None:
    problem = Problem(Steered(), BadCost(bad, final), box(1, 9.0), 2)
    u = torch.tensor([[1.0, 2.0], [1.0, 5.0]], dtype=torch.float64).reshape(1, 2, 2, 1)
    result = evaluate(problem, problem.dynamics, torch.zeros(1, 1, dtype=torch.float64), u)
    assert result.cost.tolist() == [[3.0, math.inf]]
    assert result.diverged.tolist() == [[0.0, 0.0]]  # the states stayed finite


def test_a_termination_probability_of_nan_is_not_an_exit() -> None:
    assert (
        score([1.0, 2.0, 3.0], terminated=lambda y: torch.where(y[..., 0] == 2, torch.nan, 0.0)) == math.inf
    )


def test_diverged_is_the_share_of_particles() -> None:
    problem = Problem(Noisy(), Quadratic(), box(1, 1.0), 2, particles=4)
    drawn, P = realize(problem, generator=seeded())

    @dataclass(frozen=True)
    class Failing:
        nx: int = 2
        nu: int = 1
        ny: int = 2
        dt: float = 0.2

        def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
            x_next = drawn.step(x, u, k).clone()
            x_next[1] = torch.nan
            return x_next

        def output(self, x: Tensor) -> Tensor:
            return x

    x0, u = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 3, 2, 1, dtype=torch.float64)
    result = evaluate(problem, Failing(), x0, u, particles=P)
    assert (result.diverged == 0.25).all() and torch.isinf(result.cost).all()


def test_states_are_those_of_the_first_particle() -> None:
    problem = Problem(Noisy(), Quadratic(), box(1, 1.0), 3, particles=5)
    drawn, P = realize(problem, generator=seeded())
    x0 = torch.randn(2, 2, generator=seeded(), dtype=torch.float64)
    u = torch.randn(2, 4, 3, 1, generator=seeded(), dtype=torch.float64)
    result = evaluate(problem, drawn, x0, u, particles=P, keep_states=True)
    first, _ = realize(problem, generator=seeded())
    wanted = rollout(first, x0[None, :, None].expand(P, 2, 4, 2), u.expand(P, 2, 4, 3, 1))
    assert result.states is not None
    torch.testing.assert_close(result.states, wanted[0])


def test_rollout_of_a_linear_system() -> None:
    problem = lq_problem(horizon=5)
    x0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    _, actions = riccati(problem, x0)
    states = rollout(problem.dynamics, x0, actions)
    A, B_ = problem.dynamics.A, problem.dynamics.B
    x = x0[0]
    for k in range(5):
        x = A @ x + B_ @ actions[0, k]
        torch.testing.assert_close(states[0, k + 1], x)


@dataclass(frozen=True)
class Parametric:
    """ℓ = p₀ · u² + y'₀, terminal p₁ · y₀."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        assert p is not None
        return p[..., 0] * u[..., 0] ** 2 + y_next[..., 0]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        assert p is not None
        return p[..., 1] * y[..., 0]


@given(
    M=st.integers(1, 3),
    B=st.integers(1, 3),
    H=st.integers(1, 4),
    P=st.integers(1, 4),
    discount=st.floats(0.3, 1.0),
    end=st.sampled_from(["never", "hard", "soft"]),
    alpha=st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
    per_problem=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equal_to_a_plain_loop(
    M: int,
    B: int,
    H: int,
    P: int,
    discount: float,
    end: str,
    alpha: float | None,
    per_problem: bool,
    seed: int,
) -> None:
    generator = seeded(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = draw(M, H + 1, 2) if per_problem else draw(H + 1, 2)
    ends: dict[str, Callable[[Tensor], Tensor] | None] = {
        "never": None,
        "hard": lambda y: y[..., 0] > 0.4,
        "soft": lambda y: torch.sigmoid(y[..., 0]),
    }
    problem = Problem(
        Noisy(),
        Parametric(),
        box(1, 9.0),
        H,
        discount=discount,
        params=params,
        terminated=ends[end],
        termination_cost=0.7,
        risk=Mean() if alpha is None else CVaR(alpha),
        particles=P,
        terminal_value=lambda x: x[..., 1],
    )
    x0, u = draw(M, 2), draw(M, B, H, 1)
    drawn, particles = realize(problem, generator=seeded(seed))
    got = evaluate(problem, drawn, x0, u, particles=particles).cost
    assert got.shape == (M, B)

    wind = 0.5 * torch.randn(P, generator=seeded(seed), dtype=torch.float64)
    dt, plant = 0.2, DoubleIntegrator()
    assert plant.dt == dt
    for m in range(M):
        rows = params[m] if per_problem else params
        for b in range(B):
            totals = []
            for i in range(P):
                p, v = (float(value) for value in x0[m])
                total, survival, weight = 0.0, 1.0, 1.0
                for k in range(H):
                    a = float(u[m, b, k, 0])
                    push = a + float(wind[i])
                    p, v = p + dt * v + dt**2 / 2 * push, v + dt * push
                    total += weight * survival * (float(rows[k, 0]) * a**2 + p)
                    chance = {"never": 0.0, "hard": float(p > 0.4), "soft": 1 / (1 + math.exp(-p))}[end]
                    total += weight * survival * chance * (0.7 if end != "never" else 0.0)
                    survival *= 1 - chance
                    weight *= discount
                total += weight * survival * (float(rows[H, 1]) * p + v)
                totals.append(total)
            worst = sorted(totals, reverse=True)
            n = P if alpha is None else max(1, math.ceil(alpha * P - 1e-9))
            assert float(got[m, b]) == pytest.approx(sum(worst[:n]) / n, rel=1e-9, abs=1e-9)


def test_risk_never_hides_a_particle_that_failed() -> None:
    @dataclass(frozen=True)
    class MeanLessSpread:
        def __call__(self, cost: Tensor) -> Tensor:
            return cost.mean(0) - cost.std(0)

    problem = Problem(Noisy(), Reached(), box(1, 1.0), 1, particles=3, risk=MeanLessSpread())

    @dataclass(frozen=True)
    class OneFails:
        nx: int = 2
        nu: int = 1
        ny: int = 2
        dt: float = 0.2

        def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
            x_next = x + u
            x_next[0, 0, 1] = torch.nan
            return x_next

        def output(self, x: Tensor) -> Tensor:
            return x

    x0, u = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    assert evaluate(problem, OneFails(), x0, u, particles=3).cost.tolist() == [[0.0, math.inf]]


def test_cvar_counts_particles() -> None:
    cost = torch.arange(100.0, dtype=torch.float64)[:, None]
    assert float(CVaR(0.07)(cost)) == pytest.approx(96.0)  # 0.07 · 100 rounds to 7.000000000000001
    assert float(CVaR(0.0)(cost)) == 99.0 and float(CVaR(1.0)(cost)) == float(Mean()(cost)) == 49.5
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(ContractError, match=r"a share in \[0, 1\]"):
            CVaR(share)


@dataclass(frozen=True)
class WrongShape(Reached):
    where: str = "stage"

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return y_next if self.where == "stage" else y_next[..., 0]

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return y if self.where == "terminal" else y[..., 0]


@pytest.mark.parametrize("where", ["stage", "terminal", "end", "value"])
def test_wrong_shapes_are_named(where: str) -> None:
    problem = Problem(Steered(), WrongShape(where), box(1, 1.0), 2)
    if where == "end":
        problem = replace(problem, terminated=lambda y: y > 0)
    if where == "value":
        problem = replace(problem, terminal_value=lambda x: x)
    x0, u = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 3, 2, 1, dtype=torch.float64)
    with pytest.raises(ContractError, match=r"WrongShape.*\(2, 3\).*\(2, 3, 1\)"):
        evaluate(problem, problem.dynamics, x0, u)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"horizon": 0}, "horizon of at least 1"),
        ({"termination_cost": torch.nan}, "a finite termination_cost, but got nan"),
        ({"risk": "mean"}, r"a Risk, such as Mean\(\) .* but got 'mean'"),
        ({"particles": 0}, "at least 1 particle"),
        ({"discount": 0.0}, r"discount in \(0, 1\]"),
        ({"discount": math.nan}, r"discount in \(0, 1\]"),
        ({"actions": box(2, 1.0)}, "actions have nu = 2"),
        ({"params": torch.zeros(3, 1)}, r"\(H\+1, np\) = \(6, np\)"),
        ({"params": torch.zeros(6)}, r"\(H\+1, np\) = \(6, np\)"),
    ],
)
def test_problems_without_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ContractError, match=text):
        Problem(**{"dynamics": Steered(), "cost": Reached(), "actions": box(1, 1.0), "horizon": 5, **options})


def test_boxes() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    limits = Box(low, high)
    assert limits.bounded and limits.nu == 2
    assert limits.center.tolist() == [0.0, 2.0] and limits.half_range.tolist() == [1.0, 2.0]
    u = torch.tensor([[-2.0, 5.0], [0.0, 1.0], [math.nan, 1.0]])
    assert limits.clip(u)[:2].tolist() == [[-1.0, 4.0], [0.0, 1.0]]
    assert limits.contains(u).tolist() == [False, True, False]
    with pytest.raises(ContractError, match="action 1 has low 5.0 and high 4.0"):
        Box(torch.tensor([-1.0, 5.0]), high)
    with pytest.raises(ContractError, match="low ≤ high"):
        Box(torch.tensor([math.nan, 0.0]), high)
    with pytest.raises(ContractError, match=r"\(2,\) and \(1,\)"):
        Box(low, high[:1])


def test_risks_on_known_costs() -> None:
    cost = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    assert float(MeanStd(2.0)(cost)) == pytest.approx(4 + 2 * math.sqrt(5))
    assert float(MeanStd(-2.0)(cost)) == pytest.approx(4 - 2 * math.sqrt(5))
    assert float(Worst()(cost)) == float(CVaR(0.0)(cost)) == 7.0
    assert float(Optimistic(0.5)(cost)) == 2.0 and float(Optimistic(0.0)(cost)) == 1.0
    with pytest.raises(ContractError, match="finite kappa"):
        MeanStd(math.nan)
    with pytest.raises(ContractError, match="alpha, a share"):
        Optimistic(1.5)


@pytest.mark.parametrize("risk", [Mean(), MeanStd(1.0), MeanStd(-1.0), Worst(), Optimistic(0.5), CVaR(0.5)])
def test_a_particle_that_diverges_is_never_hoped_away(risk: Risk) -> None:
    """Optimism must not choose a plan one of whose particles left the numbers."""
    problem = Problem(Gusty(), Reached(), box(1, 1.0), horizon=1, particles=4, risk=risk)
    dynamics, particles = realize(problem, generator=seeded())
    cost = evaluate(problem, dynamics, torch.zeros(1, 1), torch.zeros(1, 2, 1, 1), particles=particles).cost
    assert torch.isinf(cost).all()


@dataclass(frozen=True)
class Gusty:
    """Half of the particles blow up."""

    nx: int = 1
    nu: int = 1
    ny: int = 1
    dt: float = 0.1
    gust: Tensor | None = None

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Gusty:
        gust = torch.zeros(shape)
        gust[::2] = torch.nan
        return replace(self, gust=gust)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        assert self.gust is not None
        return x + u + self.gust[..., None]

    def output(self, x: Tensor) -> Tensor:
        return x
