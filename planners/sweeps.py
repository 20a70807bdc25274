"""Compiled sweeps of iLQR and DDP: the Riccati recursion with box limits, and the choice of a step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mbrl.compiled import kernel
from mbrl.horizon import AffinePolicy, Derivatives, Rollout
from mbrl.planners.box_qp import box_qp, cholesky, solve

ONGOING, CONVERGED, STUCK, NOT_FINITE, NOWHERE = range(5)  # how a search stands or ended
_FACTOR, _LEAST, _MOST = 1.6, 1e-6, 1e10  # of the schedule of the damping λ
_DAMPED = 1e-5  # from this λ on a small step may be the damping's doing, and is no convergence
_ROUNDING = 1e-14  # a fall of the cost by less than this share of it cannot be seen


class Progress(NamedTuple):
    """Where the searches of M problems stand; the kernels change it in place.

    Attributes:
        cost: (M,), of the trajectory that the policy is about.
        damping, growth: (M,), λ and the factor that it last changed by.
        status, iterations: (M,), one of the constants above, and how many steps were tried.
        slope: (M,), mean over time of max |k| / (|u| + 1).
        gain: (M, 2), g: a step α is expected to change the cost by α g₀ + α² g₁.
        price: (M,), what a unit of gap is worth in cost when steps are compared.
    """

    cost: np.ndarray
    damping: np.ndarray
    growth: np.ndarray
    status: np.ndarray
    iterations: np.ndarray
    slope: np.ndarray
    gain: np.ndarray
    price: np.ndarray


@kernel
def backward(
    start: int, stop: int, rows: np.ndarray, D: Derivatives, policy: AffinePolicy, progress: Progress,
    damp_state: bool, tolerance: float,
) -> None:  # fmt: skip
    """New k, K and expected gain of the problems `rows` (n,), whose derivatives D are, or an end of their search.

    Only of those at the places `start` to `stop` of `rows`. The damping λ is raised until every Quu is positive
    definite. λ is added to Quu, or to Vxx where `damp_state`.

    Reference: Tassa et al. 2012, "Synthesis and stabilization of complex behaviors", equations 5 to 11; 2014,
        "Control-limited differential dynamic programming", section III.
    """
    for i in range(start, stop):
        _gains(i, rows[i], D, policy, progress, damp_state, tolerance)


@kernel
def _gains(
    i: int, r: int, D: Derivatives, policy: AffinePolicy, progress: Progress, damp_state: bool,
    tolerance: float,
) -> None:  # fmt: skip
    if not _finite(i, D):
        progress.status[r] = NOT_FINITE
        return
    K = policy.K[r].copy()
    while not _sweep(i, r, D, policy, progress, damp_state):
        raise_damping(r, progress)
        if progress.status[r] != ONGOING:
            policy.K[r] = K
            return
    H, nu = policy.k.shape[1:]
    slope = 0.0
    for t in range(H):
        worst = 0.0
        for a in range(nu):
            worst = max(worst, abs(policy.k[r, t, a]) / (abs(policy.u[r, t, a]) + 1.0))
        slope += worst / H
    progress.slope[r] = slope
    if policy.gap.shape[1] > 0:
        _expect(i, r, D, policy, progress)
    invisible = -progress.gain[r].sum() <= _ROUNDING * abs(progress.cost[r])
    if (slope < tolerance or invisible) and progress.damping[r] < _DAMPED and _gap(r, policy) == 0.0:
        progress.status[r] = CONVERGED


@kernel
def _finite(i: int, D: Derivatives) -> bool:
    return bool(abs(D.steps[i].sum() + D.ends[i].sum()) < np.inf)  # isfinite does not see NaN here


@kernel
def _gap(r: int, policy: AffinePolicy) -> float:
    return float(np.abs(policy.gap[r]).sum())


@kernel
def raise_damping(r: int, progress: Progress) -> None:
    progress.growth[r] = max(_FACTOR, progress.growth[r] * _FACTOR)
    progress.damping[r] = max(_LEAST, progress.damping[r] * progress.growth[r])
    if progress.damping[r] > _MOST:
        progress.status[r] = STUCK


@kernel
def _sweep(
    i: int, r: int, D: Derivatives, policy: AffinePolicy, progress: Progress, damp_state: bool
) -> bool:
    """One sweep from the end to the start; false where Quu is not positive definite.

    The value follows the plain Quu and Qux with all four terms, since damped gains do not minimise it.
    Where the exact Quu is not positive definite, that step falls back to Gauss-Newton.
    """
    H, m, n = policy.K.shape[1:]
    N = n + m
    at_slope, at_bend = n * N, n * N + N
    at_excess, at_fzz = at_bend + N * N, at_bend + 2 * N * N
    damping, k, K, gain = progress.damping[r], policy.k[r], policy.K[r], progress.gain[r]
    steps, end = D.steps[i], D.ends[i]
    exact, gaps = steps.shape[1] > at_excess, policy.gap.shape[1] > 0
    Vx, V, W = end[:n].copy(), end[n:].copy().reshape(n, n), np.empty((n, n))
    F, VF = np.empty((n, N)), np.empty((n, N))
    Q, B, Q1 = np.empty((N, N)), np.empty((N, N)), np.empty(N)
    Quu, Qux, L = np.empty((m, m)), np.empty((m, n)), np.empty((m, m))
    free, column, low, high = np.empty(m, dtype=np.bool_), np.empty(m), np.empty(m), np.empty(m)
    gain[0] = gain[1] = 0.0
    for t in range(H - 1, -1, -1):
        for a in range(n):
            for b in range(N):
                F[a, b] = steps[t, a * N + b]
        if gaps:  # the slope where the step leads to
            for a in range(n):
                VF[a, 0] = Vx[a]
                for b in range(n):
                    VF[a, 0] += V[a, b] * policy.gap[r, t, b]
            for a in range(n):
                Vx[a] = VF[a, 0]
        # Q1 = ℓ_z + Fᵀ Vx;  Q = ℓ_zz + Fᵀ V F
        for a in range(N):
            Q1[a] = steps[t, at_slope + a]
            for b in range(N):
                Q[a, b] = steps[t, at_bend + a * N + b]
        for c in range(n):
            for a in range(N):
                Q1[a] += F[c, a] * Vx[c]
        _add_congruence(F, V, VF, Q)
        if exact:  # second order, where it leaves Quu positive definite
            for a in range(N):
                for b in range(N):
                    B[a, b] = Q[a, b] + steps[t, at_excess + a * N + b]
                    for c in range(n):
                        B[a, b] += Vx[c] * steps[t, at_fzz + (c * N + a) * N + b]
            for a in range(m):
                for b in range(m):
                    L[a, b] = B[n + a, n + b]
            if cholesky(L, m):
                Q, B = B, Q
        # What the controls are chosen by: damped.
        for a in range(m):
            low[a], high[a] = policy.low[a] - policy.u[r, t, a], policy.high[a] - policy.u[r, t, a]
            for b in range(m):
                Quu[a, b] = Q[n + a, n + b]
            for b in range(n):
                Qux[a, b] = Q[n + a, b]
        if damping > 0.0:
            for a in range(m):
                if not damp_state:
                    Quu[a, a] += damping
                else:
                    for b in range(m):
                        for c in range(n):
                            Quu[a, b] += damping * F[c, n + a] * F[c, n + b]
                    for b in range(n):
                        for c in range(n):
                            Qux[a, b] += damping * F[c, n + a] * F[c, b]
        size = _newton(Quu, Q1, low, high, k[t], L)
        for a in range(m):
            free[a] = True
        if size < 0:  # a bound is in the way, or Quu is not positive definite
            if t < H - 1:
                for a in range(m):
                    k[t, a] = k[t + 1, a]
            size = box_qp(Quu, Q1[n:], low, high, k[t], free, L)
            if size < 0:
                return False
        for b in range(n):
            row = 0
            for a in range(m):
                K[t, a, b] = 0.0
                if free[a]:
                    column[row] = -Qux[a, b]
                    row += 1
            solve(L, size, column)
            row = 0
            for a in range(m):
                if free[a]:
                    K[t, a, b] = column[row]
                    row += 1
        # Vx = Qx + Kᵀ Quu k + Kᵀ Qu + Quxᵀ k;  V = Qxx + Kᵀ Quu K + Kᵀ Qux + Quxᵀ K
        for a in range(m):
            s = 0.0
            for b in range(m):
                s += Q[n + a, n + b] * k[t, b]
            column[a] = s
            gain[0] += k[t, a] * Q1[n + a]
            gain[1] += 0.5 * k[t, a] * s
        for a in range(n):
            s = Q1[a]
            for c in range(m):
                s += K[t, c, a] * (column[c] + Q1[n + c]) + Q[n + c, a] * k[t, c]
            Vx[a] = s
        for c in range(m):
            for b in range(n):
                s = Q[n + c, b]
                for d in range(m):
                    s += Q[n + c, n + d] * K[t, d, b]
                VF[0, b] = s  # a row of Quu K + Qux
            for a in range(n):
                for b in range(n):
                    add = K[t, c, a] * VF[0, b] + Q[n + c, a] * K[t, c, b]
                    W[a, b] = add if c == 0 else W[a, b] + add
        for a in range(n):
            for b in range(n):
                W[a, b] += Q[a, b]
        for a in range(n):
            for b in range(n):
                V[a, b] = 0.5 * (W[a, b] + W[b, a])
    return True


@kernel
def _newton(
    Quu: np.ndarray, Q1: np.ndarray, low: np.ndarray, high: np.ndarray, k: np.ndarray, L: np.ndarray
) -> int:
    """Replace k (m,) by the minimum without bounds; m, or −1 where that leaves them or there is none."""
    m = len(Quu)
    n = len(Q1) - m
    for a in range(m):
        for b in range(a + 1):
            L[a, b] = Quu[a, b]
    if not cholesky(L, m):
        return -1
    for a in range(m):
        k[a] = -Q1[n + a]
    solve(L, m, k)
    for a in range(m):
        if not low[a] <= k[a] <= high[a]:
            return -1
    return m


@kernel
def _add_congruence(F: np.ndarray, V: np.ndarray, VF: np.ndarray, Q: np.ndarray) -> None:
    """Q += Fᵀ V F of F (n, N) and symmetric V (n, n); VF (n, N) is scratch."""
    n, N = F.shape
    for a in range(n):
        for b in range(N):
            VF[a, b] = 0.0
        for c in range(n):
            v = V[a, c]
            for b in range(N):
                VF[a, b] += v * F[c, b]
    for c in range(n):
        for a in range(N):
            f = F[c, a]
            if f != 0.0:
                for b in range(N):
                    Q[a, b] += f * VF[c, b]


@kernel
def _expect(i: int, r: int, D: Derivatives, policy: AffinePolicy, progress: Progress) -> None:
    """The expected gain where there are gaps: the quadratic model of the cost along the linear model of the states.

    Without gaps the backward sweep has it. The price of gaps becomes such that closing them pays.
    """
    H, m, n = policy.K.shape[1:]
    N, steps = n + m, D.steps[i]
    z, x = np.zeros(N), np.empty(n)
    first, second = 0.0, 0.0
    for t in range(H):
        for a in range(m):
            z[n + a] = policy.k[r, t, a]
            for b in range(n):
                z[n + a] += policy.K[r, t, a, b] * z[b]
        for a in range(N):
            first += steps[t, n * N + a] * z[a]
            for b in range(N):
                second += 0.5 * z[a] * steps[t, n * N + N + a * N + b] * z[b]
        for a in range(n):
            x[a] = policy.gap[r, t, a]
            for b in range(N):
                x[a] += steps[t, a * N + b] * z[b]
        for a in range(n):
            z[a] = x[a]
    for a in range(n):
        first += D.ends[i, a] * z[a]
        for b in range(n):
            second += 0.5 * z[a] * D.ends[i, n + a * n + b] * z[b]
    progress.gain[r, 0], progress.gain[r, 1] = first, second
    gap = _gap(r, policy)
    if gap > 0.0:
        progress.price[r] = max(progress.price[r], 2.0 * (first + max(0.0, second)) / gap)


@kernel
def accept(
    rows: np.ndarray, alphas: np.ndarray, result: Rollout, ratio: float, tolerance: float, last: bool,
    policy: AffinePolicy, progress: Progress,
) -> np.ndarray:  # fmt: skip
    """Take the cheapest of the steps `alphas` (B,) that brings `ratio` of what is expected; where there is none, (k,).

    Gaps have a price when steps are compared; a step α leaves 1 − α of them.

    Args:
        last: no other steps will be tried: a problem without a step has converged, as far as rounding lets one see, or
            gets more damping.
    """
    left = np.empty(len(rows), dtype=np.bool_)
    for i in range(len(rows)):
        r = rows[i]
        before, gap = progress.cost[r], 0.0
        if policy.gap.shape[1] > 0:
            gap = _gap(r, policy)
        best, most = -1, 0.0
        for b in range(len(alphas)):
            closed = alphas[b] * progress.price[r] * gap
            fall = before - result.cost[i, b] + closed
            expected = closed - alphas[b] * (progress.gain[r, 0] + alphas[b] * progress.gain[r, 1])
            if fall > most and fall >= ratio * expected and abs(result.cost[i, b]) < np.inf:
                best, most = b, fall
        left[i] = best < 0
        if best >= 0:
            progress.cost[r] = result.cost[i, best]
            policy.x[r], policy.u[r] = result.states[i, best], result.actions[i, best]
            if gap > 0.0:
                policy.gap[r] *= 1.0 - alphas[best]
            progress.growth[r] = min(1.0 / _FACTOR, progress.growth[r] / _FACTOR)
            progress.damping[r] *= progress.growth[r]
            if progress.damping[r] <= _LEAST:
                progress.damping[r] = 0.0
            small = most <= tolerance**2 * abs(before)
            if small and progress.damping[r] < _DAMPED and alphas[best] * gap == gap:
                progress.status[r] = CONVERGED
        elif last:
            expected = progress.price[r] * gap - progress.gain[r].sum()
            if expected <= 1e-12 * max(abs(before), 1e-300) and gap == 0.0:
                progress.status[r] = CONVERGED
            else:
                raise_damping(r, progress)
    return rows[left]
