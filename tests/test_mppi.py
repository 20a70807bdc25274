"""MPPI: the weights of the reference, the automatic temperature and what it leaves unchanged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbrl.planners import MPPI, SamplingState
from mbrl.planners.mppi import auto_temperature, path_integral_weights
from tests.problems import seeded


def effective(weights: torch.Tensor) -> torch.Tensor:
    return 1.0 / weights.square().sum(-1)


def test_update_is_the_formula_of_the_reference() -> None:
    """In double precision by hand: w ∝ exp(−S/λ − c Uᵀ Σ⁻¹ ε), U + Σ w ε."""
    M, B, K, nu, temperature, c, std = 2, 7, 3, 2, 0.7, 0.4, 0.3
    nominal = torch.randn(M, K, nu, generator=seeded(), dtype=torch.float64)
    knots = torch.randn(M, B, K, nu, generator=seeded(1), dtype=torch.float64)
    cost = torch.rand(M, B, generator=seeded(2), dtype=torch.float64)
    cost[1, 3] = torch.inf
    planner = MPPI(population=B, temperature=temperature, action_cost=c, std=std)
    state, weights = planner.update(SamplingState(nominal, torch.zeros(M, dtype=torch.long)), knots, cost)
    for m in range(M):
        raw = []
        for b in range(B):
            inner = sum(
                float(nominal[m, k, i]) * (float(knots[m, b, k, i]) - float(nominal[m, k, i])) / std**2
                for k in range(K)
                for i in range(nu)
            )
            s = float(cost[m, b])
            raw.append(math.exp(-s / temperature - c * inner) if math.isfinite(s) else 0.0)
        wanted = torch.tensor([w / sum(raw) for w in raw], dtype=torch.float64)
        torch.testing.assert_close(weights[m], wanted)
        torch.testing.assert_close(
            state.solution[m], nominal[m] + torch.einsum("b,bki->ki", wanted, knots[m] - nominal[m])
        )


# Apart by 1 at least: ties count as several samples, and an offset rounds fine differences away.
costs = st.lists(st.integers(-1000, 1000).map(float), min_size=20, max_size=60, unique=True)


@given(costs, st.floats(0.05, 0.9))
def test_automatic_temperature_hits_its_target(values: list[float], share: float) -> None:
    cost = torch.tensor([values], dtype=torch.float64)
    weights = path_integral_weights(cost, auto_temperature(cost, share))
    assert float(effective(weights)) == pytest.approx(max(1.0, share * len(values)), rel=1e-3)


@given(costs, st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_offset_and_scale_of_the_cost_do_not_matter(values: list[float], offset: float, scale: float) -> None:
    cost = torch.tensor([values], dtype=torch.float64)
    plain = path_integral_weights(cost, auto_temperature(cost, 0.2))
    moved = scale * cost + offset
    torch.testing.assert_close(
        path_integral_weights(moved, auto_temperature(moved, 0.2)), plain, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_absurd_cost_does_not_blur_the_others(dtype: torch.dtype) -> None:
    cost = torch.rand(2, 40, generator=seeded(), dtype=dtype)
    cost[1, 3] = 1e30
    weights = path_integral_weights(cost, auto_temperature(cost, 0.1))
    assert effective(weights).tolist() == pytest.approx([4.0, 4.0], rel=1e-3)


def test_costs_that_are_not_finite_weigh_nothing() -> None:
    cost = torch.tensor([[torch.inf, 1.0, 2.0, torch.inf], [torch.inf] * 4, [3.0] * 4], dtype=torch.float64)
    temperature = auto_temperature(cost, 0.5)
    assert torch.isfinite(temperature).all()
    weights = path_integral_weights(cost, temperature)
    assert weights[0, 0] == weights[0, 3] == 0.0 and float(weights[0].sum()) == pytest.approx(1.0)
    assert (weights[1] == 0.0).all()
    torch.testing.assert_close(weights[2], torch.full((4,), 0.25, dtype=torch.float64))


def test_huge_costs_neither_overflow_nor_underflow() -> None:
    cost = torch.tensor([[1e30, 2e30, 3e30, -1e30]], dtype=torch.float64)
    weights = path_integral_weights(cost, torch.ones(1, dtype=torch.float64))
    assert weights.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_first_candidate_is_the_nominal_plan() -> None:
    planner = MPPI(population=9, std=0.2)
    state = planner.start(torch.full((2, 5, 3), 0.1), torch.zeros(2, dtype=torch.long))
    knots = planner.propose(state, 0, True, generator=seeded())
    assert knots.shape == (2, 9, 5, 3)
    assert torch.equal(knots[:, 0], state.solution)
    assert not torch.equal(knots[:, 1], state.solution)
