"""The tangent space of a MuJoCo state: (dq, dv, da), in which quaternions are rotation vectors."""

from __future__ import annotations

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbrl import quaternions

_BEFORE = mujoco.mjtState.mjSTATE_TIME


class TangentSpace:
    """Moves and compares rows of mjSTATE_INTEGRATION, as mj_integratePos and mj_differentiatePos do with positions.

    What is no position, velocity or activation (time, warm start, mocap, …) is kept, and not compared.
    """

    def __init__(self, model: mujoco.MjModel):
        start = mujoco.mj_stateSize(model, _BEFORE)
        self.nq, self.nv, self.na = int(model.nq), int(model.nv), int(model.na)
        self._start, self._stop = start, start + self.nq + self.nv + self.na
        # Runs of the position: (where in qpos, where in qvel, whether a quaternion).
        self._runs: list[tuple[slice, slice, bool]] = []
        for joint in range(model.njnt):
            q, v = int(model.jnt_qposadr[joint]), int(model.jnt_dofadr[joint])
            kind = mujoco.mjtJoint(model.jnt_type[joint])
            if kind == mujoco.mjtJoint.mjJNT_FREE:
                self._add(q, v, 3)
                self._runs.append((slice(q + 3, q + 7), slice(v + 3, v + 6), True))
            elif kind == mujoco.mjtJoint.mjJNT_BALL:
                self._runs.append((slice(q, q + 4), slice(v, v + 3), True))
            else:
                self._add(q, v, 1)

    @property
    def size(self) -> int:
        """ndx."""
        return 2 * self.nv + self.na

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        """x (..., n ≥ the row), moved by dx (..., ndx); what follows the row is kept."""
        rows = np.broadcast_shapes(x.shape[:-1], dx.shape[:-1])
        x, dx = x.expand(*rows, -1), dx.expand(*rows, -1)
        qpos, dq = x[..., self._start : self._start + self.nq], dx[..., : self.nv]
        moved = [
            quaternions.retract(qpos[..., q], dq[..., v]) if turns else qpos[..., q] + dq[..., v]
            for q, v, turns in self._runs
        ]
        rest = x[..., self._start + self.nq : self._stop] + dx[..., self.nv :]
        return torch.cat([x[..., : self._start], *moved, rest, x[..., self._stop :]], -1)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """The dx (..., ndx) that leads from x to y (..., n)."""
        p, q = (state[..., self._start : self._start + self.nq] for state in (x, y))
        moved = [
            quaternions.difference(p[..., i], q[..., i]) if turns else q[..., i] - p[..., i]
            for i, _, turns in self._runs
        ]
        rest = slice(self._start + self.nq, self._stop)
        return torch.cat([*moved, y[..., rest] - x[..., rest]], -1)

    def _add(self, q: int, v: int, n: int) -> None:
        """n numbers that are no quaternion, joined to the run before where they follow it."""
        if self._runs and not self._runs[-1][2]:
            before, of, _ = self._runs[-1]
            self._runs[-1] = (slice(before.start, q + n), slice(of.start, v + n), False)
        else:
            self._runs.append((slice(q, q + n), slice(v, v + n), False))
