"""Small box-constrained quadratic programs, compiled."""

from __future__ import annotations

import numpy as np

from mbrl.compiled import kernel


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
