"""Linear dynamics, quadratic cost: optimal feedback in closed form, and the filter that belongs to it.

x' = A x + B u + c + w,   ℓ = ½ xᵀQx + ½ uᵀRu + uᵀNx + qᵀx + rᵀu,   V(x) = ½ xᵀPx + pᵀx + s,   u = −K x − k

The noise w changes what is paid (s), not what to do: certainty equivalence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from mbrl.errors import ContractError


@dataclass(frozen=True)
class Regulator:
    """Feedback u = −K x − k and cost-to-go ½ xᵀPx + pᵀx + s; with a leading axis of time where it varies.

    Attributes:
        K: (..., nu, nx). k: (..., nu).
        P: (..., nx, nx). p: (..., nx). s: (...); of a finite horizon one row more than of the feedback.
    """

    K: Tensor
    k: Tensor
    P: Tensor
    p: Tensor
    s: Tensor

    def act(self, x: Tensor, t: int | None = None) -> Tensor:
        """u (..., nu) in x (..., nx), at step t of a finite horizon."""
        K, k = (self.K, self.k) if t is None else (self.K[t], self.k[t])
        return -(x @ K.mT) - k

    def value(self, x: Tensor, t: int | None = None) -> Tensor:
        """The cost-to-go (...) from x (..., nx): a `terminal_value` for other planners."""
        P, p, s = (self.P, self.p, self.s) if t is None else (self.P[t], self.p[t], self.s[t])
        quadratic: Tensor = 0.5 * ((x @ P) * x).sum(-1) + x @ p + s
        return quadratic


def finite_lqr(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    horizon: int,
    final: Tensor | None = None,
    N: Tensor | None = None,
    c: Tensor | None = None,
    q: Tensor | None = None,
    r: Tensor | None = None,
    final_slope: Tensor | None = None,
    noise: Tensor | None = None,
    discount: float = 1.0,
) -> Regulator:
    """The optimum over H steps. Each argument is constant, or varies with a leading axis of H.

    Args:
        A, B, c: (nx, nx), (nx, nu) and (nx,), of the dynamics.
        Q, R, N, q, r: (nx, nx), (nu, nu), (nu, nx), (nx,) and (nu,), of the cost; R + γ BᵀPB must be positive definite.
        final, final_slope: (nx, nx) and (nx,), the cost of the last state; Q and q of the last step unless given.
        noise: (nx, nx), covariance of w.
        discount: γ.

    Raises:
        ContractError: shapes do not fit, or the cost has no minimum.

    Reference: Bertsekas 2017, "Dynamic programming and optimal control" I, section 3.1.
    """
    H, n, m = horizon, A.shape[-1], B.shape[-1]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    shapes = {"A": (A, (n, n)), "B": (B, (n, m)), "Q": (Q, (n, n)), "R": (R, (m, m)), "N": (N, (m, n))}
    shapes |= {"c": (c, (n,)), "q": (q, (n,)), "r": (r, (m,)), "noise": (noise, (n, n))}
    full = {name: _over_time(name, value, shape, H) for name, (value, shape) in shapes.items()}
    A, B, Q, R, N, c, q, r, noise = (full[name] for name in shapes)
    P = Q[-1] if final is None else final.double()
    p = q[-1] if final_slope is None else final_slope.double()
    s = A.new_zeros(())
    values, gains = [(P, p, s)], []
    for t in range(H - 1, -1, -1):
        drift = P @ c[t] + p  # slope of the cost-to-go where the state lands without x and u
        Quu = R[t] + discount * B[t].T @ P @ B[t]
        Qux = N[t] + discount * B[t].T @ P @ A[t]
        Qu = r[t] + discount * B[t].T @ drift
        factor, failed = torch.linalg.cholesky_ex(Quu)
        if bool(failed):
            raise ContractError(
                f"LQR needs R + γ BᵀPB to be positive definite, but at step {t} it is\n{Quu.numpy()}.\n"
                "A control that costs nothing and changes nothing has no best value: give R a positive diagonal."
            )
        K = torch.cholesky_solve(Qux, factor)
        k = torch.cholesky_solve(Qu[:, None], factor)[:, 0]
        s = discount * (s + 0.5 * c[t] @ P @ c[t] + p @ c[t] + 0.5 * (P @ noise[t]).trace()) - 0.5 * Qu @ k
        p = q[t] + discount * A[t].T @ drift - Qux.T @ k
        P = Q[t] + discount * A[t].T @ P @ A[t] - Qux.T @ K
        P = (P + P.T) / 2
        values.append((P, p, s))
        gains.append((K, k))
    K, k = (torch.stack(parts) for parts in zip(*reversed(gains), strict=True))
    P, p, s = (torch.stack(parts) for parts in zip(*reversed(values), strict=True))
    return Regulator(K, k, P, p, s)


def infinite_lqr(
    A: Tensor,
    B: Tensor,
    Q: Tensor,
    R: Tensor,
    *,
    N: Tensor | None = None,
    noise: Tensor | None = None,
    discount: float = 1.0,
) -> Regulator:
    """The optimum without end, from the algebraic Riccati equation; arguments as for `finite_lqr`, without time.

    With noise, s is the discounted sum of what it costs; without discount that is infinite, and s is the average
    cost per step instead, ½ tr(P W).

    Raises:
        ContractError: there is no stabilising solution: (A, B) is not stabilisable, or Q sees an unstable mode not.
    """
    arrays = [np.asarray(v.detach().double()) for v in (A, B, Q, R)]
    cross = None if N is None else np.asarray(N.detach().double()).T
    root = np.sqrt(discount)
    try:
        P = scipy.linalg.solve_discrete_are(root * arrays[0], root * arrays[1], arrays[2], arrays[3], s=cross)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise ContractError(
            f"LQR needs (A, B) that can be stabilised and a cost that sees what is unstable. SciPy says: {error}"
        ) from error
    P = torch.from_numpy(P)
    A, B, R = A.double(), B.double(), R.double()
    Qux = discount * B.T @ P @ A + (0 if N is None else N.double())
    K = torch.linalg.solve(R + discount * B.T @ P @ B, Qux)
    W = torch.zeros_like(A) if noise is None else noise.double()
    average = 0.5 * (P @ W).trace()
    s = average if discount == 1 else discount * average / (1 - discount)
    return Regulator(K, K.new_zeros(K.shape[0]), P, P.new_zeros(P.shape[0]), s)


@dataclass(frozen=True)
class Filter:
    """The steady Kalman filter of x' = A x + B u + w, z = C x + v: x̂ ← x̂⁻ + L (z − C x̂⁻).

    Attributes:
        L: (nx, nz), the gain. S: (nx, nx), covariance of the error before a measurement; `after` it, (nx, nx).
    """

    A: Tensor
    B: Tensor
    C: Tensor
    L: Tensor
    S: Tensor

    @property
    def after(self) -> Tensor:
        return self.S - self.L @ self.C @ self.S

    def correct(self, x: Tensor, z: Tensor) -> Tensor:
        """x̂ (..., nx), once z (..., nz) is seen."""
        return x + (z - x @ self.C.mT) @ self.L.mT

    def predict(self, x: Tensor, u: Tensor) -> Tensor:
        """x̂⁻ (..., nx) after u (..., nu)."""
        return x @ self.A.mT + u @ self.B.mT


def kalman_filter(A: Tensor, B: Tensor, C: Tensor, *, noise: Tensor, measurement: Tensor) -> Filter:
    """The filter for w of covariance `noise` (nx, nx) and v of `measurement` (nz, nz).

    With `infinite_lqr` this is LQG: acting on x̂ as if it were x is optimal.

    Raises:
        ContractError: (A, C) cannot be observed well enough.

    Reference: Anderson & Moore 1979, "Optimal filtering", chapter 4.
    """
    dual = infinite_lqr(A.mT, C.mT, noise, measurement)  # the same equation, transposed
    S, C, V = dual.P, C.double(), measurement.double()
    L = torch.linalg.solve(C @ S @ C.T + V, C @ S).T
    return Filter(A.double(), B.double(), C, L, S)


def _over_time(name: str, value: Tensor | None, shape: tuple[int, ...], H: int) -> Tensor:
    if value is None:
        return torch.zeros((), dtype=torch.float64).expand(H, *shape)
    if value.shape[-len(shape) :] != shape or value.shape[: -len(shape)] not in ((), (H,)):
        raise ContractError(
            f"LQR needs {name} of shape {shape} or {(H, *shape)}, but got {tuple(value.shape)}."
        )
    return value.double().expand(H, *shape)
