"""The nonlinear program of optimal control: where its variables and constraints stand.

Variables are ordered by stage, [x₀ u₀ e₀ x₁ u₁ e₁ … x_H e_H T], and so are the constraints, [gap₀ (x₀) c₀ gap₁ c₁ …]:
the order that structured solvers ask for. e holds what a transcription adds (states at collocation points, controls at
midpoints) and slacks of soft constraints; T is a free final time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mbrl.planners.buffered import Array
from mbrl.planners.separable import Indices, Lanes, Part, Separable
from mbrl.planners.transcription import Stage
from mbrl.problem import Constraint

Bounds = tuple[Array, Array, Array, Array]
"""Of z and of g, each lower and upper."""


class OptimalControl:
    """The program of H equal steps and an end, whose branches share their controls in the first steps.

    Args:
        path, end: its elements.
        horizon: H.
        shared: for how many steps.
        lanes: see `Separable`.

    Attributes:
        states: (H+1, S nx), where the states of all branches are in z.
        controls: (H, S, nu), where those of each branch are; shared ones are at one place.
        own: (H, S, n), what the transcription adds.
        ahead: (S, n), controls at the end, of a transcription that has some.
        rest: (H+1, n), all variables of a stage but its states, -1 where there are fewer.
        stages: (H+1, n), where states and rest of a stage, the multipliers of their bounds and those of its constraints are
            in (z, multipliers of its bounds, multipliers of g), -1 where there are fewer.
        slacks: (n,), all slack variables.
        time: (0,) or (1,), T.
        rows: (H+1, m), where the constraints of a stage are in g, -1 where there are fewer.
        program: f, g and their derivatives. Its `fixed` are x₀: rows of the first stage, after its gap.

    Constraints that no control enters are not asked at step 0, where nothing can change them, nor at the end. The others
    are asked at the end of the last step, if it has a control of its own.
    """

    def __init__(
        self,
        path: Stage,
        end: Stage,
        *,
        horizon: int,
        shared: int,
        lanes: Callable[..., Lanes],
    ):
        self.path, self.end, self.horizon = path, end, horizon
        H, at = horizon, path.variables
        S, nx, nu = len(at["x"]), len(at["x"][0]), len(at["u"][0])
        n_own, n_slack, n_ahead = (len(at[name][0]) for name in ("own", "slack", "ahead"))
        z = _Counter()
        states, controls, own, slack, rest = [], [], [], [], []
        for k in range(H):
            states.append(z(S * nx))
            start = z.total
            controls.append(np.tile(z(nu), (S, 1)) if k < shared else z(S * nu).reshape(S, nu))
            own.append(z(S * n_own).reshape(S, n_own))
            slack.append(z(n_slack))
            rest.append(np.arange(start, z.total))
        states.append(z(S * nx))
        start = z.total
        self.ahead = z(S * n_ahead).reshape(S, n_ahead)
        slack.append(z(len(end.variables["slack"][0])))
        self.time = z(len(at["T"][0]))
        rest.append(np.arange(start, z.total))
        self.states, self.controls, self.own = np.stack(states), np.stack(controls), np.stack(own)
        self.slacks, self.rest, self.branches = np.concatenate(slack), _padded(rest), S

        variables = np.empty((path.element.value.numel_in(0), H), dtype=np.int64)
        for k in range(H):
            pieces = {
                "x": states[k].reshape(S, nx),
                "u": controls[k],
                "own": own[k],
                "x_next": states[k + 1].reshape(S, nx),
                "ahead": (controls[k + 1] if k + 1 < H else self.ahead)[:, :n_ahead],
                "slack": slack[k][None],
                "T": self.time[None],
            }
            for name, places in at.items():
                for place, piece in zip(places, pieces[name], strict=True):
                    variables[place, k] = piece

        g, first = _Counter(), np.empty(0, dtype=np.int64)
        path_rows = np.full((path.element.nc, H), -1, dtype=np.int64)
        for k in range(H):
            path_rows[: path.gaps, k] = g(path.gaps)
            first = g(S * nx) if k == 0 else first
            asked = np.arange(path.gaps, path.element.nc)
            asked = asked[~path.state_only[asked]] if k == 0 else asked
            known = path.at_end if k < H - 1 else path.at_end & path.state_only
            asked = asked[~known[asked]]
            path_rows[asked, k] = g(len(asked))
        end_rows = g(end.element.nc)
        self.path_rows, self.end_rows = path_rows, end_rows
        stages = [column[column >= 0] for column in path_rows.T]
        self.rows = _padded([np.concatenate([stages[0], first]), *stages[1:], end_rows])
        primal = np.concatenate([self.states, self.rest], -1)
        self.stages = np.concatenate([primal, _behind(primal, z.total), _behind(self.rows, 2 * z.total)], -1)
        outer = path.surroundings
        self.program = Separable(
            [
                Part(path.element, variables, path_rows, None if outer is None else outer.lanes),
                Part(end.element, np.concatenate([states[H], slack[H]])[:, None], end_rows[:, None]),
            ],
            (first, states[0]),
            nz=z.total,
            ng=g.total,
            lanes=lanes,
        )

        self._least, self._most = np.full(z.total, -np.inf), np.full(z.total, np.inf)
        self._least[self.slacks] = 0.0
        self._lowest, self._highest = np.zeros(g.total), np.zeros(g.total)
        for rows, _, constraint in self.named():
            if constraint.kind == "le":
                self._lowest[rows] = -np.inf

    def bounds(self, low: Array, high: Array, final_time: tuple[float, float] | None) -> Bounds:
        """Bounds of z and of g, each lower and upper; low, high: (nu,), of the controls."""
        lower, upper = self._least.copy(), self._most.copy()
        for places in (self.controls, *((self.own, self.ahead) if self.ahead.size else ())):
            lower[places], upper[places] = low, high
        if final_time is not None:
            lower[self.time], upper[self.time] = final_time
        return lower, upper, self._lowest, self._highest

    def named(self) -> list[tuple[Indices, Indices, Constraint]]:
        """Rows in g of each constraint, the steps that they belong to, and the constraint."""
        result = []
        for part in self.path.constraints:
            rows = self.path_rows[part.rows]
            steps = np.broadcast_to(np.arange(self.horizon), rows.shape)
            result.append((rows[rows >= 0], steps[rows >= 0], part.constraint))
        for part in self.end.constraints:
            rows = self.end_rows[part.rows]
            result.append((rows, np.full_like(rows, self.horizon), part.constraint))
        return result

    def structure(self) -> dict[str, Any]:
        """What fatrop has to know; it needs stages that meet in their states only."""
        H, n = self.horizon, self.states.shape[1]
        ng = [(row >= 0).sum() - (n if k < H else 0) for k, row in enumerate(self.rows)]
        return {
            "N": H,
            "nx": [n] * (H + 1),
            "nu": [int((row >= 0).sum()) for row in self.rest],
            "ng": [int(m) for m in ng],
        }


def _behind(places: Indices, n: int) -> Indices:
    return np.where(places < 0, -1, places + n)


class _Counter:
    """Hands out numbers in order."""

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, n: int) -> Indices:
        self.total += n
        return np.arange(self.total - n, self.total)


def _padded(rows: Sequence[Indices]) -> Indices:
    result = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result
