"""LQR and LQG against answers that are known in closed form, and against optimisation and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mbrl import ContractError
from mbrl.planners.lqr import Regulator, finite_lqr, infinite_lqr, kalman_filter
from tests.problems import seeded

A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.005], [0.1]], dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def test_scalar_values_are_the_golden_ratio_and_fibonacci() -> None:
    phi = (1 + 5**0.5) / 2
    endless = infinite_lqr(ONE, ONE, ONE, ONE)
    assert float(endless.P) == pytest.approx(phi, abs=1e-12) and float(endless.K) == pytest.approx(
        phi - 1, abs=1e-12
    )
    P = finite_lqr(ONE, ONE, ONE, ONE, horizon=6).P.flatten().tolist()
    fibonacci = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377]
    ratios = [fibonacci[2 * i + 1] / fibonacci[2 * i] for i in range(7)]  # 1, 3/2, 8/5, …
    assert P[::-1] == pytest.approx(ratios, rel=1e-12)
    kalman = kalman_filter(ONE, ONE, ONE, noise=ONE, measurement=ONE)
    assert float(kalman.S) == pytest.approx(phi, abs=1e-12) and float(kalman.L) == pytest.approx(
        phi - 1, abs=1e-12
    )


def test_double_integrator() -> None:
    endless = infinite_lqr(A, B, eye(2), ONE)
    np.testing.assert_allclose(endless.K, [[0.9170745631, 1.6355961850]], atol=1e-9)
    np.testing.assert_allclose(endless.P, [[17.8349313, 10.0124922], [10.0124922, 17.8565865]], atol=1e-6)
    long = finite_lqr(A, B, eye(2), ONE, horizon=400)
    torch.testing.assert_close(long.K[0], endless.K)
    # In continuous time K = (1, √3); the gain of small steps tends to it.
    h = 1e-4
    fine = infinite_lqr(
        torch.tensor([[1, h], [0, 1]]).double(),
        torch.tensor([[h * h / 2], [h]]).double(),
        h * eye(2),
        h * ONE,
    )
    np.testing.assert_allclose(fine.K, [[1.0, 3**0.5]], atol=1e-3)


def general(H: int) -> dict[str, Tensor]:
    """Everything there is: time-varying, affine, with cross terms."""
    g = seeded(3)
    n, m = 3, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(H, *shape, generator=g, dtype=torch.float64)

    Z = draw(n + m, n + m)
    cost = Z @ Z.mT + 0.1 * eye(n + m)
    terms = {
        "A": 0.5 * draw(n, n),
        "B": draw(n, m),
        "Q": cost[:, :n, :n],
        "R": cost[:, n:, n:],
        "N": cost[:, n:, :n],
    }
    return terms | {"c": draw(n), "q": draw(n), "r": draw(m)}


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_general_problem_against_optimisation(discount: float) -> None:
    H, terms = 5, general(5)
    final, slope = 2 * eye(3), torch.ones(3, dtype=torch.float64)
    x0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    regulator = finite_lqr(**terms, horizon=H, final=final, final_slope=slope, discount=discount)

    def cost(u: Tensor) -> Tensor:
        x, total = x0, torch.zeros((), dtype=torch.float64)
        for t in range(H):
            A, B, Q, R, N, c, q, r = (terms[name][t] for name in ("A", "B", "Q", "R", "N", "c", "q", "r"))
            stage = 0.5 * x @ Q @ x + 0.5 * u[t] @ R @ u[t] + u[t] @ N @ x + q @ x + r @ u[t]
            total = total + discount**t * stage
            x = A @ x + B @ u[t] + c
        return total + discount**H * (0.5 * x @ final @ x + slope @ x)

    x, actions = x0, []
    for t in range(H):
        actions.append(regulator.act(x, t))
        x = terms["A"][t] @ x + terms["B"][t] @ actions[-1] + terms["c"][t]
    u = torch.stack(actions)
    assert float(cost(u)) == pytest.approx(float(regulator.value(x0, 0)), rel=1e-10)
    numeric = scipy.optimize.minimize(
        lambda v: float(cost(torch.from_numpy(v).view(H, 2))), np.zeros(2 * H), tol=1e-12
    )
    assert float(cost(u)) <= numeric.fun + 1e-9
    np.testing.assert_allclose(u.flatten(), numeric.x, atol=1e-4)


def simulate(regulator: Regulator, W: Tensor, steps: int, seed: int) -> float:
    """Average cost per step of the closed loop under noise of covariance W."""
    x = torch.zeros(2_000, 2, dtype=torch.float64)
    L, total = torch.linalg.cholesky(W), 0.0
    generator = seeded(seed)
    for t in range(steps):
        u = regulator.act(x)
        if t >= steps // 2:
            total += float((0.5 * x.square().sum(-1) + 0.5 * u.square().sum(-1)).mean())
        x = x @ A.T + u @ B.T + torch.randn(x.shape, generator=generator, dtype=x.dtype) @ L.T
    return total / (steps - steps // 2)


def test_certainty_equivalence() -> None:
    """Noise changes the cost by ½ tr(P W) a step, and the gains not at all."""
    W = torch.tensor([[0.02, 0.01], [0.01, 0.05]], dtype=torch.float64)
    calm, noisy = (infinite_lqr(A, B, eye(2), ONE, noise=noise) for noise in (None, W))
    assert torch.equal(calm.K, noisy.K) and float(calm.s) == 0
    assert simulate(noisy, W, 300, 0) == pytest.approx(float(noisy.s), rel=0.02)
    ends = [finite_lqr(A, B, eye(2), ONE, horizon=30, noise=noise) for noise in (None, W)]
    assert torch.equal(ends[0].K, ends[1].K) and float(ends[1].s[0]) > float(ends[0].s[0]) == 0
    worse = Regulator(1.3 * noisy.K, noisy.k, noisy.P, noisy.p, noisy.s)
    assert simulate(worse, W, 300, 0) > simulate(noisy, W, 300, 0)


def test_discounted_value_is_the_limit_of_long_horizons() -> None:
    W = 0.1 * eye(2)
    endless = infinite_lqr(A, B, eye(2), ONE, noise=W, discount=0.95)
    long = finite_lqr(A, B, eye(2), ONE, horizon=600, noise=W, discount=0.95)
    torch.testing.assert_close(long.P[0], endless.P)
    torch.testing.assert_close(long.s[0], endless.s)
    cross = 0.3 * torch.ones(1, 2, dtype=torch.float64)
    crossed = infinite_lqr(A, B, eye(2), ONE, N=cross)
    torch.testing.assert_close(finite_lqr(A, B, eye(2), ONE, N=cross, horizon=400).K[0], crossed.K)


def test_lqg_average_cost() -> None:
    """½ (tr(P W) + tr(Kᵀ (R + BᵀPB) K Σ)) with Σ the error covariance after the measurement, and no filter gain beats it."""
    W, V = 0.01 * eye(2), 0.2 * ONE
    C = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    regulator = infinite_lqr(A, B, eye(2), ONE, noise=W)
    observer = kalman_filter(A, B, C, noise=W, measurement=V)
    K, P = regulator.K, regulator.P
    formula = float(0.5 * ((P @ W).trace() + (K.T @ (ONE + B.T @ P @ B) @ K @ observer.after).trace()))

    def average(share: float) -> float:
        g, x = seeded(1), torch.zeros(4_000, 2, dtype=torch.float64)
        guess, total, steps = torch.zeros_like(x), 0.0, 400

        def noise(n: int, variance: float) -> Tensor:
            return torch.randn(4_000, n, generator=g, dtype=torch.float64) * math.sqrt(variance)

        for t in range(steps):
            z = x @ C.T + noise(1, 0.2)
            corrected = observer.correct(guess, z)
            corrected = guess + share * (corrected - guess)
            u = regulator.act(corrected)
            if t >= 100:
                total += float((0.5 * x.square().sum(-1) + 0.5 * u.square().sum(-1)).mean())
            x = x @ A.T + u @ B.T + noise(2, 0.01)
            guess = observer.predict(corrected, u)
        return total / (steps - 100)

    best = average(1.0)
    assert best == pytest.approx(formula, rel=0.02)
    assert average(0.6) > best and average(1.6) > best


def test_what_has_no_answer_is_told() -> None:
    with pytest.raises(ContractError, match="positive definite"):
        finite_lqr(A, B, eye(2), 0 * ONE, final=0 * eye(2), horizon=3)
    with pytest.raises(ContractError, match=r"Q of shape \(2, 2\)"):
        finite_lqr(A, B, eye(3), ONE, horizon=3)
    with pytest.raises(ContractError, match="stabilised"):
        infinite_lqr(2 * eye(2), torch.zeros(2, 1).double(), eye(2), ONE)
