"""Learned models for nonlinear MPC, at many places at once: what `casadi_export` says, as products of matrices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import casadi
import numpy as np
import numpy.typing as npt

from mbrl.programs import program, registers, run

Array = npt.NDArray[np.float64]


class BatchedNetworks:
    """x_next, its Jacobian and the Hessian of λᵀ x_next of n places, the mean over networks.

    Args:
        see: (x, u) -> what the networks see, and its derivative by (x, u).
        bend: (x, u, g) -> the Hessian of gᵀ times what they see.
        move: (x, answer, λ) -> x_next, its derivative by both, the Hessian of λᵀ x_next by both, its gradient by the
            answer.
        sizes: of the layers, inputs and predictions included.
        activate: of an array, the activation and its first two derivatives, the second None where it is 0.
    """

    def __init__(
        self,
        see: casadi.Function,
        bend: casadi.Function,
        move: casadi.Function,
        *,
        ny: int,
        nu: int,
        sizes: tuple[int, ...],
        members: int,
        activate: Any,
    ):
        self._see, self._bend, self._move = _Rows(see), _Rows(bend), _Rows(move)
        # With fewer derivatives.
        self._look, self._step, self._turn = _Rows(see, 1), _Rows(move, 1), _Rows(move, 2)
        self._ny, self._nu, self._sizes, self._members = ny, nu, sizes, members
        self._activate = activate

    def __call__(
        self, x: Array, u: Array, theta: Array, multipliers: Array | None = None, *, order: int = 0
    ) -> tuple[Array, Array | None, Array | None]:
        """x (n, ny), u (n, nu), λ (n, ny) -> x_next (n, ny), J (n, ny, ny + nu), H (n, ny + nu, ny + nu).

        Args:
            order: of the derivatives that are wanted; the others are None.
        """
        n, ny, d = len(x), self._ny, self._ny + self._nu
        ends = np.cumsum([0, self._sizes[0], self._sizes[0], self._sizes[-1], self._sizes[-1]])
        input_mean, input_scale, target_mean, target_scale = (theta[a:b] for a, b in pairwise(ends))
        seen, *by_s = (self._see if order else self._look)(x, u)
        z = (seen - input_mean) / input_scale
        Z = by_s[0].reshape(n, d, -1) / input_scale if order else np.empty(0)  # ∂z/∂s, transposed
        lam = np.zeros((n, ny)) if multipliers is None else multipliers
        total, J, H = np.zeros((n, ny)), np.zeros((n, ny, d)), np.zeros((n, d, d))
        T = np.zeros((n, ny + self._sizes[-1], d))
        T[:, :ny, :ny] = np.eye(ny)
        start = int(ends[-1])
        for _ in range(self._members):
            h, S, passed = z, Z, []
            for i, (a, b) in enumerate(pairwise(self._sizes)):
                weight = theta[start : start + a * b].reshape(b, a).T
                bias = theta[start + a * b : start + a * b + b]
                start += (a + 1) * b
                h = h @ weight + bias
                A = (S.reshape(n * d, a) @ weight).reshape(n, d, b) if order else S
                if i < len(self._sizes) - 2:
                    h, slope, bend = self._activate(h)
                    passed.append((weight, A, slope, bend))
                    S = A * slope[:, None] if order else S
                else:
                    S = A
            answer = h * target_scale + target_mean
            if not order:
                total += self._step(x, answer, lam)[0]
                continue
            reached, by_both, *second = (self._turn if order == 1 else self._move)(x, answer, lam)
            total += reached
            T[:, ny:] = (S * target_scale).swapaxes(1, 2)
            J += by_both.reshape(n, -1, ny).swapaxes(1, 2) @ T
            if order < 2:
                continue
            bent, by_answer = second
            H += T.swapaxes(1, 2) @ bent.reshape(n, len(T[0]), -1) @ T
            g = (by_answer * target_scale) @ weight.T
            for weight, A, slope, bend in reversed(passed):
                if bend is not None:
                    H += (A * (g * bend)[:, None]) @ A.swapaxes(1, 2)
                g = (g * slope) @ weight.T
            (seen_bend,) = self._bend(x, u, g / input_scale)
            H += seen_bend.reshape(n, d, d)
        E = self._members
        return total / E, J / E if order else None, H / E if order == 2 else None


class _Rows:
    """A function of scalar expressions, of arrays (n, …) whose rows are its arguments; results flat, column by column.

    Args:
        results: how many of them are wanted; all unless given.
    """

    def __init__(self, function: casadi.Function, results: int | None = None):
        given = [casadi.SX.sym(f"i{i}", function.numel_in(i)) for i in range(function.n_in())]
        made = function.call(given)[:results]
        self._sizes = [int(r.numel()) for r in made]
        whole = casadi.vertcat(*[casadi.vec(casadi.densify(r)) for r in made])
        self._program = program(casadi.Function("rows", given, [casadi.cse(whole)]))

    def __call__(self, *arguments: Array) -> list[Array]:
        w = registers(self._program, len(arguments[0]))
        start = 0
        for a in arguments:
            w[start : start + a.shape[1]] = a.T
            start += a.shape[1]
        run(self._program, w)
        whole = w[self._program.outputs].T
        return [np.ascontiguousarray(part) for part in np.split(whole, np.cumsum(self._sizes)[:-1], 1)]
