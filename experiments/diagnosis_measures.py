"""What a learned model knows, measured on data: calibration, errors, disagreement, maps, reward and end, neighbours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np
import scipy.stats
import torch
from scipy.spatial import cKDTree
from torch import Generator, Tensor

from mbrl.data import Transition
from mbrl.envs import World
from mbrl.errors import ContractError, UnknownName
from mbrl.experiments.fit import windows
from mbrl.models import Calibration, Ensemble, HorizonError, calibrate, disagreement_and_error, horizon_error
from mbrl.models.calibration import GRID, LEVELS

CELLS = 24
"""Along each side of a map."""
_STRIPS = 12  # into which a number of y is cut, to see how the error varies along it


@dataclass(frozen=True)
class OneStep:
    """One-step predictions on N transitions.

    Attributes:
        calibration: None where the model claims no uncertainty.
        disagreement, error: (N,), means over the normalised outputs.
        rank: Spearman's correlation of the two; NaN where one does not vary.
        output_error: (n,), root mean square error of each predicted number, in deviations of its true changes.
    """

    calibration: Calibration | None
    disagreement: Tensor
    error: Tensor
    rank: float
    output_error: Tensor


@dataclass(frozen=True)
class Heads:
    """Reward and end of N transitions, as predicted and as they were.

    Attributes:
        learned: whether the reward is that of a learned head, and not the task's on predicted outputs.
        learned_end: the same of the end.
        reward_rmse, reward_bias: root mean square and mean of predicted minus true.
        reward_std: deviation of the true rewards.
        confusion: [[went on & so predicted, went on & end predicted], [ended & missed, ended & predicted]].
    """

    learned: bool
    learned_end: bool
    reward_rmse: float
    reward_bias: float
    reward_std: float
    confusion: list[list[int]]


@dataclass(frozen=True)
class Map:
    """Means over the cells of a grid of two numbers of y; NaN where there are no data.

    Attributes:
        names: of the two numbers.
        low, high: (2,), the limits.
        count, error, disagreement: (CELLS, CELLS), the second index along the first number.
    """

    names: tuple[str, str]
    low: list[float]
    high: list[float]
    count: np.ndarray
    error: np.ndarray
    disagreement: np.ndarray


def labels(world: World) -> list[str]:
    """A name for every number of y: `qpos/hinge`, `xpos/tip[0]`."""
    model = world.model
    names: list[str] = []
    joints = {"qpos": _of_joints(model, model.jnt_qposadr, model.nq)}
    joints["qvel"] = _of_joints(model, model.jnt_dofadr, model.nv)
    for name in world.layout.names:
        where = world.layout[name]
        size = where.stop - where.start
        if name in joints:
            names += [f"{name}/{joint}" for joint in joints[name]]
        else:
            names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
    return names


def _of_joints(model: mujoco.MjModel, address: np.ndarray, size: int) -> list[str]:
    ends = [*address[1:].tolist(), size]
    names: list[str] = []
    for j, (start, end) in enumerate(zip(address.tolist(), ends, strict=True)):
        joint = model.joint(j).name or str(j)
        names += [joint] if end - start == 1 else [f"{joint}[{i}]" for i in range(end - start)]
    return names


@torch.no_grad()
def one_step(model: Ensemble, rows: Transition, unit: Tensor) -> OneStep:
    """One-step predictions against the truth; unit (n,): by which the errors of the outputs are divided."""
    data = rows.y, rows.u, rows.y_next
    try:
        calibration = calibrate(model, *data, levels=(*LEVELS, *GRID))
    except ContractError:  # a single deterministic member claims no uncertainty
        calibration = None
    disagreement, error = disagreement_and_error(model, *data)
    change = model.predict(rows.y, rows.u).change.mean(0)
    off = (change - model.features.targets(rows.y, rows.y_next).to(change)) / unit
    return OneStep(calibration, disagreement, error, rank(disagreement, error), (off**2).mean(0).sqrt())


def unit_of(model: Ensemble, rows: Transition) -> Tensor:
    """(n,) deviations of the true changes; 1 where they do not vary."""
    std = model.features.targets(rows.y, rows.y_next).std(0)
    return torch.where(std > 0, std, 1.0)


def rank(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of what is finite; NaN where one does not vary."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    if len(a) < 2 or float(a.std()) == 0 or float(b.std()) == 0:
        return math.nan
    return float(scipy.stats.spearmanr(a, b).statistic)


def open_loop(
    model: Ensemble, rows: Transition, length: int, unit: Tensor, *, generator: Generator
) -> HorizonError | None:
    """Errors of open-loop predictions, in `unit` (ny,); None where rows do not follow each other."""
    try:
        y, u = windows(rows, length, generator=generator)
    except ContractError:
        return None
    return horizon_error(model, y, u, unit=unit, generator=generator)


@torch.no_grad()
def heads(model: Ensemble, rows: Transition, world: World) -> Heads:
    """Reward and end by the learned heads if there are any, else by the world's task on predicted outputs."""
    said = model.predict(rows.y, rows.u)
    y_next = said.y_next.mean(0)
    reward = world.task.reward(rows.y, rows.u, y_next) if said.reward is None else said.reward.mean(0)
    end = world.task.terminated(y_next).float() if said.end is None else said.end.mean(0)
    off, ended, predicted = reward - rows.reward, rows.terminated, end > 0.5
    return Heads(
        learned=said.reward is not None,
        learned_end=said.end is not None,
        reward_rmse=float((off**2).mean().sqrt()),
        reward_bias=float(off.mean()),
        reward_std=float(rows.reward.std()),
        confusion=[[int((was & says).sum()) for says in (~predicted, predicted)] for was in (~ended, ended)],
    )


class Neighbours:
    """Distances to the nearest training data, in the model's normalised inputs."""

    def __init__(self, model: Ensemble, training: Transition):
        self._model = model
        self._tree = cKDTree(self._inputs(training.y, training.u))

    def _inputs(self, y: Tensor, u: Tensor) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = self._model.inputs(y.float(), u.float()).numpy()
        return found

    def distance(self, y: Tensor, u: Tensor) -> Tensor:
        """(N,) of y (N, ny), u (N, nu); of what is not finite it is infinite."""
        z = self._inputs(y, u)
        finite = np.isfinite(z).all(-1)
        found = np.full(len(z), np.inf)
        found[finite] = self._tree.query(z[finite])[0]
        return torch.from_numpy(found)


def wrapped(model: Ensemble, y: Tensor) -> Tensor:
    """y (N, ny) with its angles between −π and π."""
    y = y.clone()
    angles = list(model.features.angles)
    y[:, angles] = torch.atan2(y[:, angles].sin(), y[:, angles].cos())
    return y


def choose(names: list[str], wanted: tuple[str, ...], y: Tensor, error: Tensor) -> tuple[int, int]:
    """The two numbers of y for the maps: those wanted, by name or number, else those along which the error varies most.

    Raises:
        UnknownName: there is no such number.
        ContractError: not two different ones.
    """
    chosen = []
    for name in wanted:
        if name.isdigit() and int(name) < len(names):
            chosen.append(int(name))
        elif name in names:
            chosen.append(names.index(name))
        else:
            raise UnknownName("number of y", name, names)
    if not chosen:
        shares = [_explained(y[:, i], error) for i in range(len(names))]
        chosen = sorted(sorted(range(len(names)), key=shares.__getitem__)[-2:])
    if len(chosen) != 2 or chosen[0] == chosen[1]:
        raise ContractError(
            f"Maps need two different numbers of y, but got {', '.join(wanted) or 'a y of one number'}."
        )
    return chosen[0], chosen[1]


def _explained(values: Tensor, error: Tensor) -> float:
    """Share of the variance of the logarithm of the error that is between strips of equally many values."""
    if float(values.std()) == 0:
        return -1.0
    size = error.clamp(min=1e-12).log()
    strips = torch.tensor_split(size[values.argsort()], _STRIPS)
    between = sum(len(strip) * float(strip.mean() - size.mean()) ** 2 for strip in strips if len(strip))
    return between / max(float(((size - size.mean()) ** 2).sum()), 1e-12)


def make_map(names: list[str], pair: tuple[int, int], y: Tensor, disagreement: Tensor, error: Tensor) -> Map:
    """Means of disagreement and error (N,) over the cells of a grid over two numbers of y (N, ny).

    Its limits leave out a hundredth of the data on each side.
    """
    points = y[:, list(pair)].double().numpy()
    low, high = np.quantile(points, 0.01, axis=0), np.quantile(points, 0.99, axis=0)
    high = np.where(high > low, high, low + 1.0)
    grid: list[np.ndarray] = []
    for weights in (None, error, disagreement):
        found, _, _ = np.histogram2d(
            points[:, 1],
            points[:, 0],
            bins=CELLS,
            range=[[low[1], high[1]], [low[0], high[0]]],
            weights=None if weights is None else weights.double().numpy(),
        )
        grid.append(found)
    count = grid[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.where(count > 0, total / count, np.nan) for total in grid[1:]]
    return Map((names[pair[0]], names[pair[1]]), low.tolist(), high.tolist(), count, means[0], means[1])
