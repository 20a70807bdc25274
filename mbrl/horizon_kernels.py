"""The compiled loops of `mbrl.symbolic_horizon`: blocks of lanes, each lane a candidate or a step of the horizon."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mbrl.compiled import kernel
from mbrl.horizon import AffinePolicy, Derivatives, Rollout
from mbrl.programs import Program, registers, run

LANES = 32  # at a time: the registers of a few hundred instructions stay in the first cache


class Loop(NamedTuple):
    """What a closed loop is made of.

    Attributes:
        step: (x, u, k, p) → (x_next, cost of the step, 1 where the episode ends there).
        end: (x, p) → cost of the end.
        difference, retract: of the tangent space.
        discount, termination_cost: of the problem.
    """

    step: Program
    end: Program
    difference: Program
    retract: Program
    discount: float
    termination_cost: float


@kernel
def roll(
    start: int, stop: int, rows: np.ndarray, x0: np.ndarray, policy: AffinePolicy, alpha: np.ndarray,
    feedback: np.ndarray, params: np.ndarray, loop: Loop, result: Rollout,
) -> None:  # fmt: skip
    """Fill candidates `start` to `stop` of the (n B) in `result`; see `Horizon.roll`. params: (M or 1, H+1, np)."""
    for first in range(start, stop, LANES):
        last = min(first + LANES, stop)
        _roll(first, last, rows, x0, policy, alpha, feedback, params, loop, result)


@kernel
def _roll(
    start: int, stop: int, rows: np.ndarray, x0: np.ndarray, policy: AffinePolicy, alpha: np.ndarray,
    feedback: np.ndarray, params: np.ndarray, loop: Loop, result: Rollout,
) -> None:  # fmt: skip
    L, B, (H, nu), nx, ndx = stop - start, len(alpha), policy.u.shape[1:], x0.shape[1], policy.K.shape[3]
    step, end = registers(loop.step, L), registers(loop.end, L)
    away, move = registers(loop.difference, L), registers(loop.retract, L)
    place = np.empty((3, L), dtype=np.int64)
    total, seen, alive, weight = np.zeros(L), np.zeros(L), np.ones(L), 1.0
    outputs, gaps = loop.step.outputs, policy.gap.shape[1] > 0
    for j in range(L):
        place[0, j], place[1, j] = (start + j) // B, (start + j) % B
        place[2, j] = rows[place[0, j]]
        for c in range(nx):
            result.states[place[0, j], place[1, j], 0, c] = x0[place[2, j], c]
    for t in range(H):
        for j in range(L):
            i, b, r = place[0, j], place[1, j], place[2, j]
            for c in range(nx):
                step[c, j] = result.states[i, b, t, c]
                away[c, j], away[nx + c, j] = policy.x[r, t, c], step[c, j]
        run(loop.difference, away)
        for j in range(L):
            i, b, r = place[0, j], place[1, j], place[2, j]
            for c in range(nu):
                u = policy.u[r, t, c] + alpha[b] * policy.k[r, t, c]
                if feedback[b] != 0.0:
                    for d in range(ndx):
                        u += feedback[b] * policy.K[r, t, c, d] * away[loop.difference.outputs[d], j]
                u = np.maximum(np.minimum(u, policy.high[c]), policy.low[c])
                step[nx + c, j] = result.actions[i, b, t, c] = u
            step[nx + nu, j] = t
            for c in range(params.shape[2]):
                step[nx + nu + 1 + c, j] = params[r % len(params), t, c]
        run(loop.step, step)
        for j in range(L):
            if alive[j] > 0.0:  # else the cost counts for nothing, and may be NaN
                over = step[outputs[nx + 1], j]
                for c in range(nx):
                    seen[j] += step[outputs[c], j]
                total[j] += weight * alive[j] * step[outputs[nx], j]
                if over != 0.0:
                    total[j] += weight * alive[j] * loop.termination_cost * over
                    alive[j] *= 1.0 - over
        weight *= loop.discount
        for j in range(L):
            i, b, r = place[0, j], place[1, j], place[2, j]
            for c in range(nx):
                result.states[i, b, t + 1, c] = step[outputs[c], j]
            if gaps:
                for c in range(nx):
                    move[c, j] = step[outputs[c], j]
                for c in range(ndx):
                    move[nx + c, j] = (alpha[b] - 1.0) * policy.gap[r, t, c]
        if gaps:
            run(loop.retract, move)
            for j in range(L):
                for c in range(nx):
                    result.states[place[0, j], place[1, j], t + 1, c] = move[loop.retract.outputs[c], j]
    for j in range(L):
        i, b, r = place[0, j], place[1, j], place[2, j]
        for c in range(nx):
            end[c, j] = result.states[i, b, H, c]
        for c in range(params.shape[2]):
            end[nx + c, j] = params[r % len(params), H, c]
    run(loop.end, end)
    for j in range(L):
        if alive[j] > 0.0:
            total[j] += weight * alive[j] * end[loop.end.outputs[0], j]
        finite = abs(total[j] + seen[j]) < np.inf
        result.cost[place[0, j], place[1, j]] = total[j] if finite else np.inf


@kernel
def expand(
    start: int, stop: int, rows: np.ndarray, policy: AffinePolicy, params: np.ndarray, weights: np.ndarray,
    stage: Program, D: Derivatives,
) -> None:  # fmt: skip
    """Fill steps `start` to `stop` of the (n H) in `D.steps`; see `Horizon.expand`.

    Args:
        params, weights: (M or 1, H+1, np) and (n or 1, H+1).
        stage: (x, u, x_next, k, weight, p) → a row of `D.steps`.
    """
    for first in range(start, stop, LANES):
        _expand(first, min(first + LANES, stop), rows, policy, params, weights, stage, D)


@kernel
def _expand(
    start: int, stop: int, rows: np.ndarray, policy: AffinePolicy, params: np.ndarray, weights: np.ndarray,
    stage: Program, D: Derivatives,
) -> None:  # fmt: skip
    L, (H, nu), nx = stop - start, policy.u.shape[1:], policy.x.shape[2]
    w = registers(stage, L)
    for j in range(L):
        i, t = (start + j) // H, (start + j) % H
        r = rows[i]
        for c in range(nx):
            w[c, j], w[nx + nu + c, j] = policy.x[r, t, c], policy.x[r, t + 1, c]
        for c in range(nu):
            w[nx + c, j] = policy.u[r, t, c]
        w[2 * nx + nu, j], w[2 * nx + nu + 1, j] = t, weights[i % len(weights), t]
        for c in range(params.shape[2]):
            w[2 * nx + nu + 2 + c, j] = params[r % len(params), t, c]
    run(stage, w)
    for j in range(L):
        i, t = (start + j) // H, (start + j) % H
        for c in range(len(stage.outputs)):
            D.steps[i, t, c] = w[stage.outputs[c], j]


@kernel
def expand_ends(
    rows: np.ndarray, policy: AffinePolicy, params: np.ndarray, weights: np.ndarray, terminal: Program,
    D: Derivatives,
) -> None:  # fmt: skip
    """Fill `D.ends` by `terminal`: (x, weight, p) → a row of it."""
    n, H, nx = len(rows), policy.u.shape[1], policy.x.shape[2]
    w = registers(terminal, n)
    for i in range(n):
        for c in range(nx):
            w[c, i] = policy.x[rows[i], H, c]
        w[nx, i] = weights[i % len(weights), H]
        for c in range(params.shape[2]):
            w[nx + 1 + c, i] = params[rows[i] % len(params), H, c]
    run(terminal, w)
    for i in range(n):
        for c in range(len(terminal.outputs)):
            D.ends[i, c] = w[terminal.outputs[c], i]
