"""MuJoCo as a Dynamics: many problems and candidates in one threaded, bit-exact call.

A state is x = [mjSTATE_INTEGRATION row | y]: everything that the next step depends on (positions,
velocities, activations, warm start, time, mocap, …), then the output exactly as an environment's
MjData holds it after the step. `output` is a slice; `step` ignores the second part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property

import mujoco
import mujoco.batch
import numpy as np
import torch
from torch import Generator, Tensor

from mbrl.envs.layout import Layout
from mbrl.envs.tangent import TangentSpace
from mbrl.errors import ContractError, UnknownName

_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
# The four warnings that say that a simulation left the finite numbers.
_BAD = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADCTRL) + 1)

# mj_step does not fill these; Gymnasium's environments run mj_rnePostConstraint after it.
_POST = frozenset({"cfrc_ext", "cfrc_int", "cacc"})
# Fields that MuJoCo computes with the accelerations, beyond the stage of velocities, or that are inputs.
_FORCES = _POST | {
    "qacc", "qacc_warmstart", "qacc_smooth", "qfrc_constraint", "qfrc_inverse", "qfrc_actuator", "qfrc_smooth",
    "actuator_force", "act_dot", "efc_force", "ctrl", "qfrc_applied", "xfrc_applied", "energy",
}  # fmt: skip


def diverged(data: mujoco.MjData) -> bool:
    """Whether this simulation has left the finite numbers since its last reset.

    MuJoCo then resets it to the default pose without a word; only the warning counters tell.
    """
    return any(warning.number for warning in data.warning[_BAD])


def read_state(model: mujoco.MjModel, data: mujoco.MjData, layout: Layout) -> np.ndarray:
    """x (nx,) of a running simulation, as `MujocoDynamics` takes it."""
    n = mujoco.mj_stateSize(model, _STATE)
    x = np.empty(n + layout.size)
    mujoco.mj_getState(model, data, x[:n], _STATE)
    layout.read(data, x[n:])
    return x


def write_state(model: mujoco.MjModel, data: mujoco.MjData, x: np.ndarray | Tensor) -> None:
    """Set a simulation to the state x (nx,) and compute its derived fields (for drawing, not for stepping)."""
    mujoco.mj_setState(
        model, data, np.asarray(x, dtype=np.float64)[: mujoco.mj_stateSize(model, _STATE)], _STATE
    )
    mujoco.mj_forward(model, data)


class MujocoDynamics:
    """The true simulator: one control step is `frame_skip` physics steps under a constant control.

    Results are bit-identical to a loop over `mj_step`, at any number of threads. Rows that diverge,
    or that are not finite when they come in, leave as NaN; the latter cost nothing.

    Args:
        model: planned with as it is; it may differ from the plant in time step, integrator, masses, …
        layout: what y holds.
        frame_skip: physics steps per control step.
        threads: of the simulation; 0 for all processors.
        action_dtype: what the real environment rounds actions to before it applies them.

    Raises:
        ContractError: `frame_skip` or `threads` is too small, or a flag of the model makes steps depend on
            more than the state.

    Reference: MuJoCo 4.0 documentation, "Batch"; Gymnasium's MujocoEnv for the order of operations.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        layout: Layout,
        *,
        frame_skip: int = 1,
        threads: int = 0,
        action_dtype: torch.dtype = torch.float64,
    ):
        if frame_skip < 1:
            raise ContractError(f"MujocoDynamics needs frame_skip ≥ 1, but got {frame_skip}.")
        if threads < 0:
            raise ContractError(f"MujocoDynamics needs threads ≥ 0 (0 is all processors), but got {threads}.")
        bits = mujoco.mjtEnableBit
        for flag, bit in (("sleep", bits.mjENBL_SLEEP), ("ipc", bits.mjENBL_IPC)):
            if model.opt.enableflags & int(bit):  # MuJoCo keeps books on them outside of the state
                raise ContractError(
                    "MujocoDynamics needs a model whose next step follows from its state, but this one has "
                    f'<flag {flag}="enable"/>. Remove it from the MJCF, for the plant as well.'
                )
        self.model, self.layout, self.frame_skip = model, layout, frame_skip
        self.threads, self.action_dtype = threads, action_dtype
        self._row = mujoco.mj_stateSize(model, _STATE)
        self._sources = layout.sources
        self._post = not self._sources.isdisjoint(_POST)
        self._scratch = mujoco.MjData(model)
        self._batch: mujoco.batch.Batch | None = None
        self._reader: mujoco.batch.Batch | None = None
        self._models: Sequence[mujoco.MjModel] | None = None  # of the rows, where they differ
        self._tangent = TangentSpace(model)

    @property
    def nx(self) -> int:
        return int(self._row + self.layout.size)

    @property
    def nu(self) -> int:
        return int(self.model.nu)

    @property
    def ny(self) -> int:
        return self.layout.size

    @property
    def dt(self) -> float:
        return float(self.model.opt.timestep * self.frame_skip)

    @property
    def ndx(self) -> int:
        """Size of the tangent space: positions (quaternions as rotation vectors), velocities, activations."""
        return self._tangent.size

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        """x (..., nx) moved by dx (..., ndx). Derived fields keep their values; see `refreshed`."""
        return self._tangent.retract(x, dx)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        """The dx (..., ndx) that leads from x to y (..., nx)."""
        return self._tangent.difference(x, y)

    @cached_property
    def unrounded(self) -> MujocoDynamics:
        """The same simulator with actions as they are given, for finite differences."""
        if self.action_dtype == torch.float64:
            return self
        return MujocoDynamics(self.model, self.layout, frame_skip=self.frame_skip, threads=self.threads)

    def output(self, x: Tensor) -> Tensor:
        return x[..., self._row :]

    def refreshed(self, x: Tensor) -> Tensor:
        """x (..., nx) with y's fields as they are at x itself, where after a step they lag by a physics step.

        What depends on accelerations and forces keeps its value, so its derivative by the state is 0.
        """
        rows = x.reshape(-1, self.nx)
        n = len(rows)
        if self._reader is None or self._reader.nsim < n:  # its own, for a step goes on from what it finds
            self._reader = mujoco.batch.Batch(self.model, n, self.threads)
            for name in self._sources:
                self._reader.bind(name)
        batch = self._reader
        torch.from_numpy(batch.state)[:n].copy_(rows[:, : self._row])
        batch.forward(ids=np.arange(n, dtype=np.int32), stage=int(mujoco.mjtStage.mjSTAGE_VEL))
        fresh = rows.clone()
        self.layout.read({name: batch.bind(name) for name in self._sources}, fresh.numpy()[:, self._row :])
        settled = torch.from_numpy(self._settled)
        fresh[:, self._row :] = torch.where(settled, fresh[:, self._row :], rows[:, self._row :])
        fresh[~torch.isfinite(rows).all(-1)] = torch.nan
        return fresh.reshape(x.shape)

    @cached_property
    def _settled(self) -> np.ndarray:
        """(ny,), which numbers of y follow from positions and velocities alone."""
        sensors = np.repeat(
            self.model.sensor_needstage <= int(mujoco.mjtStage.mjSTAGE_VEL), self.model.sensor_dim
        )
        fields = {}
        for name in self._sources:
            shape = np.atleast_1d(getattr(self._scratch, name)).shape
            fields[name] = np.full((1, *shape), name not in _FORCES)
        if "sensordata" in fields:
            fields["sensordata"] = sensors[None]
        settled = np.zeros((1, self.ny), dtype=bool)
        self.layout.read(fields, settled)
        return settled.reshape(-1)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor = 0) -> Tensor:
        if x.shape[-1] != self.nx or u.shape[-1] != self.nu:
            raise ContractError(
                f"MujocoDynamics needs x (..., {self.nx}) and u (..., {self.nu}), "
                f"but got {tuple(x.shape)} and {tuple(u.shape)}."
            )
        shape = torch.Size(np.broadcast_shapes(x.shape[:-1], u.shape[:-1]))
        n = shape.numel()
        if self._models is not None and n > len(self._models):
            raise ContractError(f"MujocoDynamics has {len(self._models)} models, but got {n} rows.")
        if n == 0:
            return torch.empty(*shape, self.nx, dtype=torch.float64)
        batch = self._batch_for(n)
        state, control = torch.from_numpy(batch.state)[:n], torch.from_numpy(batch.bind("ctrl"))[:n]
        state.view(*shape, -1).copy_(x[..., : self._row])
        control.copy_(u.to(self.action_dtype).expand(*shape, -1).reshape(n, -1))

        # Rows that were lost are NaN throughout, so their time tells. What else is not finite, MuJoCo reports.
        live = torch.isfinite(state[:, 0])
        every = bool(live.all())
        ids = np.arange(n, dtype=np.int32) if every else np.flatnonzero(live.numpy()).astype(np.int32)
        x_next = torch.empty(n, self.nx, dtype=torch.float64)
        if len(ids):
            warnings = batch.warning[:n, _BAD, 1]
            warnings[:] = 0
            batch.step(ids=None if len(ids) == batch.nsim else ids, nstep=self.frame_skip)
            self._collect(batch, ids, x_next.numpy())
            if warnings.any():
                x_next[torch.from_numpy(warnings.any(-1))] = torch.nan
        if not every:
            x_next[~live] = torch.nan
        return x_next.view(*shape, self.nx)

    def _collect(self, batch: mujoco.batch.Batch, ids: np.ndarray, x_next: np.ndarray) -> None:
        """Copy the states and outputs of the batch into x_next (n, nx)."""
        fields = {name: batch.bind(name) for name in self._sources}
        if self._post:
            stacks = {name: np.zeros_like(fields[name]) for name in self._sources & _POST}
            for i in ids:
                batch.get_data(i, self._scratch)
                mujoco.mj_rnePostConstraint(self._model_of(i), self._scratch)
                for name, stack in stacks.items():
                    stack[i] = getattr(self._scratch, name)
            fields |= stacks
        x_next[:, : self._row] = batch.state[: len(x_next)]
        self.layout.read(fields, x_next[:, self._row :])

    def _model_of(self, i: int) -> mujoco.MjModel:
        return self.model if self._models is None else self._models[i]

    def _batch_for(self, n: int) -> mujoco.batch.Batch:
        """A batch of at least n simulations; one of the largest size serves all smaller calls."""
        if self._batch is None or self._batch.nsim < n:
            self._batch = mujoco.batch.Batch(self.model, n, self.threads, persistent=self._post)
            for name in (*self._sources, "ctrl"):
                self._batch.bind(name)
        return self._batch

    def _set_models(self, models: Sequence[mujoco.MjModel]) -> None:
        """Simulate row i of the next calls with models[i]."""
        batch = self._batch_for(len(models))
        # Rows beyond are not used, but need a model.
        batch.set_models([*models, *[models[0]] * (batch.nsim - len(models))])
        self._models = models


class RandomizedMujoco:
    """Simulators whose model fields are uncertain: `Stochastic` dynamics, so risk works on simulators.

    `n` models are drawn once; each realisation assigns them to the particles in a fresh balanced
    permutation, so P = n particles see every model once.

    Args:
        nominal: the simulator to randomise.
        scales: MjModel field -> (low, high), the range of the factor that each model draws for the
            whole field; see `scaled_model`.
        n: number of models.
        generator: draws the factors.

    Raises:
        UnknownName: no such MjModel field.
        ContractError: n is below 1.
    """

    def __init__(
        self,
        nominal: MujocoDynamics,
        scales: Mapping[str, tuple[float, float]],
        n: int,
        *,
        generator: Generator,
    ):
        if n < 1:
            raise ContractError(f"RandomizedMujoco needs at least 1 model, but got n = {n}.")
        self.nominal = nominal
        self.models = [
            scaled_model(nominal.model, draw) for draw in draw_scales(scales, n, generator=generator)
        ]
        # A batch of its own, so that the nominal one keeps its model.
        self._simulator = MujocoDynamics(
            nominal.model,
            nominal.layout,
            frame_skip=nominal.frame_skip,
            threads=nominal.threads,
            action_dtype=nominal.action_dtype,
        )

    @property
    def nx(self) -> int:
        return self.nominal.nx

    @property
    def nu(self) -> int:
        return self.nominal.nu

    @property
    def ny(self) -> int:
        return self.nominal.ny

    @property
    def dt(self) -> float:
        return self.nominal.dt

    def output(self, x: Tensor) -> Tensor:
        return self.nominal.output(x)

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> RealizedMujoco:
        count = int(np.prod(shape))
        rounds = -(-count // len(self.models))
        pick = torch.cat([torch.randperm(len(self.models), generator=generator) for _ in range(rounds)])[
            :count
        ]
        return RealizedMujoco(self._simulator, self.models, pick.view(shape))


class RealizedMujoco:
    """A draw of `RandomizedMujoco`: pick (...), the number of each row's model, broadcasts against x.shape[:-1]."""

    def __init__(self, simulator: MujocoDynamics, models: Sequence[mujoco.MjModel], pick: Tensor):
        self.simulator, self.models, self.pick = simulator, models, pick
        self._rows: list[mujoco.MjModel] = []
        self._shape: torch.Size | None = None

    @property
    def nx(self) -> int:
        return self.simulator.nx

    @property
    def nu(self) -> int:
        return self.simulator.nu

    @property
    def ny(self) -> int:
        return self.simulator.ny

    @property
    def dt(self) -> float:
        return self.simulator.dt

    def output(self, x: Tensor) -> Tensor:
        return self.simulator.output(x)

    def step(self, x: Tensor, u: Tensor, k: int | Tensor = 0) -> Tensor:
        shape = torch.Size(np.broadcast_shapes(x.shape[:-1], u.shape[:-1], self.pick.shape))
        if shape != self._shape:
            self._rows = [self.models[i] for i in self.pick.expand(shape).reshape(-1).tolist()]
            self._shape = shape
        if self.simulator._models is not self._rows:  # another draw has used it since
            self.simulator._set_models(self._rows)
        return self.simulator.step(x.expand(*shape, -1), u, k)


def draw_scales(
    scales: Mapping[str, tuple[float, float]], n: int, *, generator: Generator
) -> list[dict[str, float]]:
    """n draws of one factor per field, uniform in its range."""
    draws = torch.rand(n, len(scales), generator=generator, dtype=torch.float64)
    return [
        {
            name: low + float(r) * (high - low)
            for r, (name, (low, high)) in zip(row, scales.items(), strict=True)
        }
        for row in draws
    ]


def scaled_model(model: mujoco.MjModel, scales: Mapping[str, float]) -> mujoco.MjModel:
    """A copy of the model with fields multiplied; "body_mass" takes the inertia along.

    "geom_friction" scales sliding friction only. Derived constants are computed anew.

    Raises:
        UnknownName: no such field, or not an array of floats.
        ContractError: a factor is negative or not finite.
    """
    changed = copy.copy(model)
    for name, factor in scales.items():
        if not _is_float(changed, name):
            fields = [field for field in mujoco.batch.MODEL_FIELDS if _is_float(changed, field)]
            raise UnknownName("MjModel field of floats", name, fields)
        if not 0 <= factor < np.inf:
            raise ContractError(f"scaled_model needs finite factors ≥ 0, but got {factor} for {name}.")
        if name == "geom_friction":
            changed.geom_friction[:, 0] *= factor
        else:
            getattr(changed, name)[:] *= factor
        if name == "body_mass":
            changed.body_inertia[:] *= factor
    mujoco.mj_setConst(changed, mujoco.MjData(changed))
    return changed


def _is_float(model: mujoco.MjModel, name: str) -> bool:
    values = getattr(model, name, None) if name in mujoco.batch.MODEL_FIELDS else None
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"
