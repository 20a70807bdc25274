"""The compiled sweeps: box QP and Riccati recursion against other solvers."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mbrl.planners import sweeps


def random_qp(seed: int, n: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    return A @ A.T + 0.1 * np.eye(n), 3 * rng.normal(size=n), -rng.uniform(0, 1, n), rng.uniform(0, 1, n)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 8))
def test_box_qp_against_scipy(seed: int, n: int) -> None:
    H, g, low, high = random_qp(seed, n)
    x, free, L = np.zeros(n), np.empty(n, dtype=bool), np.empty((n, n))
    size = sweeps.box_qp(H, g, low, high, x, free, L)
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
    assert sweeps.box_qp(np.diag([1.0, -1.0]), np.ones(2), -bound, bound, x, free, L) == -1
    assert sweeps.box_qp(np.full((2, 2), np.nan), np.ones(2), -bound, bound, x, free, L) == -1


@pytest.mark.parametrize("pinned", [0.0, 0.5])
def test_box_qp_with_a_pinned_number(pinned: float) -> None:
    """Its bounds are one value: it stays there and is never free."""
    low, high = np.array([pinned, -9.0]), np.array([pinned, 9.0])
    x, free, L = np.zeros(2), np.empty(2, dtype=bool), np.empty((2, 2))
    assert sweeps.box_qp(np.array([[2.0, 1.0], [1.0, 2.0]]), np.ones(2), low, high, x, free, L) == 1
    np.testing.assert_allclose(x, [pinned, -(1 + pinned) / 2])
    assert free.tolist() == [False, True]


def test_backward_sweep_is_the_riccati_recursion() -> None:
    """A long horizon reaches scipy's solution of the algebraic equation, for all problems at once."""
    M, H, n, m = 3, 400, 2, 1
    A, B = np.array([[1, 0.1], [0, 1]]), np.array([[0.005], [0.1]])
    P = scipy.linalg.solve_discrete_are(A, B, np.eye(2), np.eye(1))
    shape = (M, H)
    k, K = np.zeros((M, H, m)), np.zeros((M, H, m, n))
    value = np.empty((M, n + n * n))
    free = np.full((M, H, m), np.inf)
    failed = sweeps.backward(
        fx=np.tile(A, (*shape, 1, 1)),
        fu=np.tile(B, (*shape, 1, 1)),
        lx=np.zeros((M, H + 1, n)),
        lu=np.zeros((M, H, m)),
        lxx=np.tile(np.eye(2), (M, H + 1, 1, 1)),
        luu=np.tile(np.eye(1), (*shape, 1, 1)),
        lux=np.zeros((M, H, m, n)),
        excess=np.zeros((M, 0, 1, 1)),
        fzz=np.zeros((M, 0, 1, 1, 1)),
        low=-free,
        high=free,
        damping=np.zeros(M),
        damp_state=False,
        k=k,
        K=K,
        gain=np.zeros((M, 2)),
        value=value,
    )
    assert failed.tolist() == [-1] * M
    np.testing.assert_allclose(K[:, 0], np.tile([[-0.9170745631, -1.6355961850]], (M, 1, 1)), atol=1e-9)
    np.testing.assert_allclose(value[:, n:].reshape(M, n, n), np.tile(P, (M, 1, 1)), atol=1e-8)
