"""Control splines: exact on polynomials, exact under shifts, fitted within the bounds."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from mbrl.planners import spline
from mbrl.planners.spline import Order
from tests.problems import seeded

orders = pytest.mark.parametrize("order", get_args(Order))
sizes = st.tuples(st.integers(1, 25), st.integers(1, 8))


@orders
@given(sizes)
def test_knots_cover_the_horizon_from_every_phase_and_no_more_than_needed(
    order: Order, size: tuple[int, int]
) -> None:
    horizon, spacing = size
    K = spline.knot_count(horizon, spacing, order)
    last = spacing - 1 + horizon - 1  # the last step at the latest phase, counted from the first knot
    if order == "zero":
        assert (K - 1) * spacing <= last < K * spacing
    elif spacing == 1:
        assert K == horizon
    else:
        assert last <= (K - 1) * spacing
        assert K == 2 or (K - 2) * spacing < last


@orders
@given(sizes)
def test_shapes(order: Order, size: tuple[int, int]) -> None:
    horizon, spacing = size
    K = spline.knot_count(horizon, spacing, order)
    knots = torch.zeros(2, 3, K, 4, dtype=torch.float64)
    phase = torch.tensor([0, spacing - 1])
    assert spline.interpolate(knots, phase, horizon, spacing, order).shape == (2, 3, horizon, 4)
    assert spline.fit(torch.zeros(2, horizon, 4), spacing, order).shape == (2, K, 4)


def polynomial(order: Order, t: torch.Tensor, spacing: int) -> torch.Tensor:
    """What each spline reproduces: a staircase, a line, a line (natural ends bend a cubic)."""
    return 0.3 + 0.02 * (t // spacing if order == "zero" else t)


@orders
@given(sizes, st.data())
def test_polynomials_are_exact_at_every_phase(
    order: Order, size: tuple[int, int], data: st.DataObject
) -> None:
    horizon, spacing = size
    phase = data.draw(st.integers(0, spacing - 1))
    K = spline.knot_count(horizon, spacing, order)
    moments = torch.arange(K, dtype=torch.float64) * spacing
    knots = polynomial(order, moments, spacing)[None, None, :, None]
    got = spline.interpolate(knots, torch.tensor([phase]), horizon, spacing, order)[0, 0, :, 0]
    wanted = polynomial(order, phase + torch.arange(horizon, dtype=torch.float64), spacing)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_cubic_spline_meets_its_knots_with_a_continuous_second_derivative() -> None:
    K, spacing = 6, 40
    knots = torch.randn(1, 1, K, 1, generator=seeded(), dtype=torch.float64)
    horizon = (K - 2) * spacing + 2
    assert spline.knot_count(horizon, spacing, "cubic") == K
    u = spline.interpolate(knots, torch.zeros(1, dtype=torch.long), horizon, spacing, "cubic")[0, 0, :, 0]
    torch.testing.assert_close(u[::spacing], knots[0, 0, : K - 1, 0])
    bend = u.diff(n=2)
    # It changes by a line within each piece, so its own steps are as small as the grid is fine.
    assert bend.diff().abs().max() < 0.2 * bend.abs().max()
    assert abs(bend[0]) < 0.05 * bend.abs().max()  # natural: none at the start


@orders
@given(sizes, st.data())
def test_shifting_is_dropping_steps(order: Order, size: tuple[int, int], data: st.DataObject) -> None:
    """Advance by n, then interpolate = interpolate, then drop n steps, as long as knots of the plan reach."""
    horizon, spacing = size
    phase = data.draw(st.integers(0, spacing - 1))
    n = data.draw(st.integers(0, horizon - 1))
    K = spline.knot_count(horizon, spacing, order)
    # All knots but the dropped and the repeated ones count: local splines compare exactly, a cubic one
    # sees its ends everywhere, so there a line is compared.
    moments = torch.arange(K, dtype=torch.float64)
    knots = (
        moments[None, :, None] / K
        if order == "cubic"
        else torch.randn(1, K, 1, generator=seeded(), dtype=torch.float64)
    )
    before = spline.interpolate(knots[:, None], torch.tensor([phase]), horizon, spacing, order)[0, 0]
    passed = torch.tensor([(phase + n) // spacing])
    moved = spline.advance(knots, passed)
    if order == "cubic":  # the line goes on where the last knot would be repeated
        moved = (moments + passed)[None, :, None] / K
    after = spline.interpolate(
        moved[:, None], torch.tensor([(phase + n) % spacing]), horizon, spacing, order
    )[0, 0]
    torch.testing.assert_close(after[: horizon - n], before[n:], rtol=0, atol=1e-12)


def test_advance_repeats_the_last_knot_and_moves_rows_by_themselves() -> None:
    knots = torch.arange(8.0).reshape(2, 4, 1)
    moved = spline.advance(knots, torch.tensor([1, 9]))
    assert moved[..., 0].tolist() == [[1, 2, 3, 3], [7, 7, 7, 7]]
    nested = spline.advance(knots[:, None].expand(2, 5, 4, 1), torch.tensor([1, 0]))
    assert nested[0, 4, :, 0].tolist() == [1, 2, 3, 3] and nested[1, 2, :, 0].tolist() == [4, 5, 6, 7]


@orders
@given(sizes)
def test_fit_recovers_what_a_spline_made(order: Order, size: tuple[int, int]) -> None:
    horizon, spacing = size
    K = spline.knot_count(horizon, spacing, order)
    moments = torch.arange(K, dtype=torch.float64) * spacing
    knots = polynomial(order, moments, spacing)[None, :, None]
    phase = torch.zeros(1, dtype=torch.long)
    actions = spline.interpolate(knots[:, None], phase, horizon, spacing, order)[:, 0]
    fitted = spline.fit(actions, spacing, order)
    torch.testing.assert_close(
        spline.interpolate(fitted[:, None], phase, horizon, spacing, order)[:, 0], actions, rtol=0, atol=1e-9
    )


@orders
@pytest.mark.parametrize(("horizon", "spacing"), [(5, 7), (12, 3), (17, 7), (30, 5)])
def test_fit_is_the_least_squares_fit_within_the_bounds(order: Order, horizon: int, spacing: int) -> None:
    actions = 2 * torch.rand(4, horizon, 2, generator=seeded(), dtype=torch.float64) - 1
    fitted = spline.fit(actions, spacing, order)
    assert fitted.abs().max() <= 1.0
    K = fitted.shape[1]
    phase = torch.zeros(1, dtype=torch.long)
    W = spline.interpolate(torch.eye(K, dtype=torch.float64)[None, None], phase, horizon, spacing, order)[
        0, 0
    ]
    for row in range(4):
        for i in range(2):
            best = lsq_linear(W.numpy(), actions[row, :, i].numpy(), bounds=(-1.0, 1.0), tol=1e-12)
            residual = float(
                np.square(W.numpy() @ fitted[row, :, i].numpy() - actions[row, :, i].numpy()).sum() / 2
            )
            assert residual <= best.cost + 1e-3 * (1 + best.cost)
