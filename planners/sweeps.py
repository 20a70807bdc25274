"""Compiled backward sweeps: the Riccati recursion of iLQR and DDP, with box limits on the controls."""

from __future__ import annotations

import numpy as np
from numba import prange

from mbrl.compiled import kernel, parallel_kernel


@kernel
def cholesky(A: np.ndarray, n: int) -> bool:
    """Replace the lower triangle of A (n, n) by its Cholesky factor; false if A is not positive definite."""
    for j in range(n):
        d = A[j, j]
        for k in range(j):
            d -= A[j, k] * A[j, k]
        if not d > 1e-14 * abs(A[j, j]):  # also for NaN
            return False
        d = np.sqrt(d)
        A[j, j] = d
        for i in range(j + 1, n):
            s = A[i, j]
            for k in range(j):
                s -= A[i, k] * A[j, k]
            A[i, j] = s / d
    return True


@kernel
def solve(L: np.ndarray, n: int, b: np.ndarray) -> None:
    """Replace b (n,) by the solution of L Lᵀ x = b."""
    for i in range(n):
        s = b[i]
        for k in range(i):
            s -= L[i, k] * b[k]
        b[i] = s / L[i, i]
    for i in range(n - 1, -1, -1):
        s = b[i]
        for k in range(i + 1, n):
            s -= L[k, i] * b[k]
        b[i] = s / L[i, i]


@kernel
def box_qp(
    H: np.ndarray,
    g: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    free: np.ndarray,
    L: np.ndarray,
) -> int:
    """Minimise ½ xᵀHx + gᵀx over low ≤ x ≤ high by projected Newton steps.

    Args:
        H: (n, n), symmetric; its free part must be positive definite.
        x: (n,), where to start; replaced by the minimum.
        free: (n,) bool, replaced by which numbers are not held by a bound.
        L: (n, n), replaced by the Cholesky factor of the free part of H, in its leading rows.

    Returns:
        How many are free, or −1 where that part of H is not positive definite.

    Reference: Tassa et al. 2014, "Control-limited differential dynamic programming", section IV and boxQP.m.
    """
    n = len(g)
    slope, search, trial = np.empty(n), np.empty(n), np.empty(n)
    for i in range(n):
        x[i] = min(max(x[i], low[i]), high[i])
        free[i] = True
    size, factored = 0, False
    value = _value(H, g, x)
    for iteration in range(100):
        for i in range(n):
            slope[i] = g[i]
            for j in range(n):
                slope[i] += H[i, j] * x[j]
        changed = False
        for i in range(n):
            held = (
                (x[i] <= low[i] and slope[i] > 0) or (x[i] >= high[i] and slope[i] < 0) or low[i] == high[i]
            )
            changed = changed or free[i] == held
            free[i] = not held
        if changed or not factored:
            size = 0
            for i in range(n):
                if free[i]:
                    column = 0
                    for j in range(i + 1):
                        if free[j]:
                            L[size, column] = H[i, j]
                            column += 1
                    size += 1
            if not cholesky(L, size):
                return -1
            factored = True
        norm, scale = 0.0, 0.0
        for i in range(n):
            scale = max(scale, abs(g[i]))
            if free[i]:
                norm = max(norm, abs(slope[i]))
        if size == 0 or norm <= 1e-12 * (1 + scale):
            return size
        column = 0
        for i in range(n):
            if free[i]:
                search[column] = -slope[i]
                column += 1
        solve(L, size, search)
        column, descent = size, 0.0
        for i in range(n - 1, -1, -1):  # spread the free entries out, from the last
            if free[i]:
                column -= 1
                search[i] = search[column]
                descent += search[i] * slope[i]
            else:
                search[i] = 0.0
        if not descent < 0:
            return size
        step = 1.0
        while True:
            for i in range(n):
                trial[i] = min(max(x[i] + step * search[i], low[i]), high[i])
            reached = _value(H, g, trial)
            if reached - value <= 0.1 * step * descent or step < 1e-20:
                break
            step *= 0.6
        gain = value - reached
        for i in range(n):
            x[i] = trial[i]
        value = reached
        # The set of free entries must be that of the last x: look once more before leaving.
        if iteration > 0 and gain <= 1e-14 * abs(value) and not changed:
            return size
    return size


@kernel
def _value(H: np.ndarray, g: np.ndarray, x: np.ndarray) -> float:
    value = 0.0
    for i in range(len(g)):
        row = g[i]
        for j in range(len(g)):
            row += 0.5 * H[i, j] * x[j]
        value += row * x[i]
    return value


@kernel
def backward(
    fx: np.ndarray, fu: np.ndarray, lx: np.ndarray, lu: np.ndarray, lxx: np.ndarray, luu: np.ndarray,
    lux: np.ndarray, excess: np.ndarray, fzz: np.ndarray, low: np.ndarray, high: np.ndarray,
    damping: np.ndarray, damp_state: bool, k: np.ndarray, K: np.ndarray, gain: np.ndarray, value: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """One backward sweep of each of M problems.

    Args:
        fx … lux: as in `Expansion`.
        excess, fzz: as there, or of length 0 along H for Gauss-Newton.
        low, high: (M, H, nu), bounds of the change of the control.
        damping: (M,) λ, added to Quu, or to Vxx where `damp_state`.
        k, K: (M, H, nu) and (M, H, nu, ndx), replaced by the controls' change and the feedback gains; k enters as
            where to start the box QP.
        gain: (M, 2), replaced by (Σ kᵀQu, ½ Σ kᵀQuu k), so that α changes the cost by α gain₀ + α² gain₁.
        value: (M, ndx + ndx²), replaced by slope and bend of the cost-to-go at the start.

    Returns:
        (M,), −1 where the sweep succeeded, else the step at which Quu was not positive definite.

    The value follows the plain Quu and Qux with all four terms, since damped gains do not minimise it.
    Where the exact Quu is not positive definite, that step falls back to Gauss-Newton.

    Reference: Tassa et al. 2012, "Synthesis and stabilization of complex behaviors", equations 5 to 11; 2014, III.
    """
    M = len(fu)
    failed = np.full(M, -1)
    for i in range(M):
        failed[i] = _backward(
            fx[i], fu[i], lx[i], lu[i], lxx[i], luu[i], lux[i], excess[i], fzz[i], low[i], high[i],
            damping[i], damp_state, k[i], K[i], gain[i], value[i],
        )  # fmt: skip
    return failed


@parallel_kernel
def backward_parallel(
    fx: np.ndarray, fu: np.ndarray, lx: np.ndarray, lu: np.ndarray, lxx: np.ndarray, luu: np.ndarray,
    lux: np.ndarray, excess: np.ndarray, fzz: np.ndarray, low: np.ndarray, high: np.ndarray,
    damping: np.ndarray, damp_state: bool, k: np.ndarray, K: np.ndarray, gain: np.ndarray, value: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """`backward` on all processors. To start them takes longer than a few problems."""
    M = len(fu)
    failed = np.full(M, -1)
    for i in prange(M):
        failed[i] = _backward(
            fx[i], fu[i], lx[i], lu[i], lxx[i], luu[i], lux[i], excess[i], fzz[i], low[i], high[i],
            damping[i], damp_state, k[i], K[i], gain[i], value[i],
        )  # fmt: skip
    return failed


@kernel
def _backward(
    fx: np.ndarray, fu: np.ndarray, lx: np.ndarray, lu: np.ndarray, lxx: np.ndarray, luu: np.ndarray,
    lux: np.ndarray, excess: np.ndarray, fzz: np.ndarray, low: np.ndarray, high: np.ndarray,
    damping: float, damp_state: bool, k: np.ndarray, K: np.ndarray, gain: np.ndarray, value: np.ndarray,
) -> int:  # fmt: skip
    H, n, m = fu.shape
    N = n + m
    Vx, V, W = lx[H].copy(), lxx[H].copy(), np.empty((n, n))
    F, VF = np.empty((n, N)), np.empty((n, N))
    Q, D, Q1 = np.empty((N, N)), np.empty((N, N)), np.empty(N)
    Quu, Qux, L = np.empty((m, m)), np.empty((m, n)), np.empty((m, m))
    free, column = np.empty(m, dtype=np.bool_), np.empty(m)
    gain[0] = gain[1] = 0.0
    for t in range(H - 1, -1, -1):
        for a in range(n):
            for b in range(n):
                F[a, b] = fx[t, a, b]
            for b in range(m):
                F[a, n + b] = fu[t, a, b]
        # Q1 = ℓ_z + Fᵀ Vx;  Q = ℓ_zz + Fᵀ V F
        for a in range(N):
            s = lx[t, a] if a < n else lu[t, a - n]
            for c in range(n):
                s += F[c, a] * Vx[c]
            Q1[a] = s
        _congruence(F, V, VF, Q)
        for a in range(n):
            for b in range(n):
                Q[a, b] += lxx[t, a, b]
            for b in range(m):
                Q[n + b, a] += lux[t, b, a]
                Q[a, n + b] = Q[n + b, a]
        for a in range(m):
            for b in range(m):
                Q[n + a, n + b] += luu[t, a, b]
        if len(fzz):  # second order, where it leaves Quu positive definite
            for a in range(N):
                for b in range(N):
                    s = excess[t, a, b]
                    for c in range(n):
                        s += Vx[c] * fzz[t, c, a, b]
                    D[a, b] = s
            for a in range(m):
                for b in range(m):
                    L[a, b] = Q[n + a, n + b] + D[n + a, n + b]
            if cholesky(L, m):
                for a in range(N):
                    for b in range(N):
                        Q[a, b] += D[a, b]
        # What the controls are chosen by: damped.
        for a in range(m):
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
        if t < H - 1:
            for a in range(m):
                k[t, a] = k[t + 1, a]
        size = box_qp(Quu, Q1[n:], low[t], high[t], k[t], free, L)
        if size < 0:
            return t
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
    for a in range(n):
        value[a] = Vx[a]
        for b in range(n):
            value[n + a * n + b] = V[a, b]
    return -1


@kernel
def _congruence(F: np.ndarray, V: np.ndarray, VF: np.ndarray, Q: np.ndarray) -> None:
    """Q = Fᵀ V F of F (n, N) and symmetric V (n, n); VF (n, N) is scratch."""
    n, N = F.shape
    for a in range(n):
        for b in range(N):
            VF[a, b] = 0.0
        for c in range(n):
            v = V[a, c]
            for b in range(N):
                VF[a, b] += v * F[c, b]
    for a in range(N):
        for b in range(N):
            Q[a, b] = 0.0
    for c in range(n):
        for a in range(N):
            f = F[c, a]
            if f != 0.0:
                for b in range(N):
                    Q[a, b] += f * VF[c, b]
