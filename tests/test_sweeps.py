"""The compiled sweeps: box QP and Riccati recursion against other solvers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl.compiled import in_threads
from mbrl.horizon import AffinePolicy, Derivatives
from mbrl.planners import sweeps
from mbrl.planners.box_qp import box_qp


def random_qp(seed: int, n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    return A @ A.T + 0.1 * np.eye(n), 3 * rng.normal(size=n), -rng.uniform(0, 1, n), rng.uniform(0, 1, n)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8))
def test_box_qp_against_scipy(seed: int, n: int) -> None:
    H, g, low, high = random_qp(seed, n)
    x, free, L = np.zeros(n), np.empty(n, dtype=bool), np.empty((n, n))
    size = box_qp(H, g, low, high, x, free, L)
    wanted = scipy.optimize.lsq_linear(
        np.linalg.cholesky(H).T, -np.linalg.solve(np.linalg.cholesky(H), g), (low - 1e-15, high), tol=1e-15
    ).x
    assert size == free.sum()
    np.testing.assert_allclose(x, wanted, atol=1e-6)
    slope = H @ x + g
    assert np.abs(slope[free]).max(initial=0.0) < 1e-9
    assert bool(
        (np.where(x == low, slope, -slope)[~free] > 0).all()
    )  # held by a bound that it pushes against
    if size:
        F = np.tril(L[:size, :size])
        np.testing.assert_allclose(F @ F.T, H[np.ix_(free, free)], atol=1e-9)


def test_box_qp_refuses_what_has_no_minimum_inside() -> None:
    x, free, L = np.zeros(2), np.empty(2, dtype=bool), np.empty((2, 2))
    bound = np.full(2, np.inf)
    assert box_qp(np.diag([1.0, -1.0]), np.ones(2), -bound, bound, x, free, L) == -1
    assert box_qp(np.full((2, 2), np.nan), np.ones(2), -bound, bound, x, free, L) == -1


@pytest.mark.parametrize("pinned", [0.0, 0.5])
def test_box_qp_with_a_pinned_number(pinned: float) -> None:
    """Its bounds are one value: it stays there and is never free."""
    low, high = np.array([pinned, -9.0]), np.array([pinned, 9.0])
    x, free, L = np.zeros(2), np.empty(2, dtype=bool), np.empty((2, 2))
    assert box_qp(np.array([[2.0, 1.0], [1.0, 2.0]]), np.ones(2), low, high, x, free, L) == 1
    np.testing.assert_allclose(x, [pinned, -(1 + pinned) / 2])
    assert free.tolist() == [False, True]


def test_backward_sweep_is_the_riccati_recursion() -> None:
    """A long horizon reaches the gains of scipy's solution of the algebraic equation, for all problems at once."""
    M, H, n, m = 3, 400, 2, 1
    F = np.array([[1, 0.1, 0.005], [0, 1, 0.1]])
    step = np.concatenate([F.ravel(), np.zeros(n + m), np.eye(n + m).ravel()])
    D = Derivatives(
        np.tile(step, (M, H, 1)), np.tile(np.concatenate([np.zeros(n), np.eye(n).ravel()]), (M, 1))
    )
    zeros, free = np.zeros, np.full(m, np.inf)
    policy = AffinePolicy(
        zeros((M, H + 1, n)),
        zeros((M, H, m)),
        zeros((M, H, m)),
        zeros((M, H, m, n)),
        zeros((M, 0, n)),
        -free,
        free,
    )
    whole = zeros(M, dtype=np.int64)
    progress = sweeps.Progress(
        np.ones(M), zeros(M), np.ones(M), whole.copy(), whole.copy(), zeros(M), zeros((M, 2)), zeros(M)
    )
    sweeps.backward(0, 2, np.array([0, 2]), D, policy, progress, False, 1e-9)
    gains = np.array([[-0.9170745631, -1.6355961850]])
    np.testing.assert_allclose(policy.K[[0, 2], 0], [gains, gains], atol=1e-9)
    assert (policy.K[1] == 0).all()  # which was not asked for
    assert progress.status.tolist() == [sweeps.CONVERGED, sweeps.ONGOING, sweeps.CONVERGED]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_parts_in_threads_are_the_whole(threads: int) -> None:
    before, done = torch.get_num_threads(), np.zeros(7, dtype=int)

    def part(start: int, stop: int) -> None:
        done[start:stop] += 1

    def fails(start: int, stop: int) -> None:
        raise ValueError("a part")

    torch.set_num_threads(threads)
    try:
        in_threads(part, 7, steps=10_000)
        in_threads(part, 7, steps=10)  # too little to share
        in_threads(part, 0, steps=10_000)
        assert (done == 2).all()
        with pytest.raises(ValueError, match="a part"):
            in_threads(fails, 7, steps=10_000)
    finally:
        torch.set_num_threads(before)
