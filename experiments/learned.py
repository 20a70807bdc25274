"""A model that was learned earlier, as what a control run plans with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mbrl.envs import World
from mbrl.errors import CheckpointError, ContractError
from mbrl.experiments import pets
from mbrl.models import Ensemble, Exported, MeanDynamics, Propagation, from_heads, load_ensemble, scenarios
from mbrl.problem import Constraint, Problem
from mbrl.protocols import Dynamics, Stochastic
from mbrl.risk import Mean, MeanStd

PROPAGATIONS: dict[str, Callable[[Ensemble], Dynamics | Stochastic]] = {
    **pets.PROPAGATIONS,
    "mean": MeanDynamics,
    "expression": lambda model: Exported(MeanDynamics(model)),
    "scenarios": scenarios,
}


def load_model(folder: Path) -> Ensemble:
    """The ensemble of a training run, of a fit, or of `save_ensemble`, on the CPU.

    Raises:
        CheckpointError: the folder holds none, or a damaged one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Give that of a training run or of `mbrl fit`.")
    if (folder / "checkpoints").is_dir():
        return pets.load_model(folder)
    fitted = folder / "model"
    return load_ensemble(fitted if fitted.is_dir() else folder)


def learned_problem(
    world: World,
    model: Ensemble,
    horizon: int,
    *,
    propagation: str,
    particles: int,
    kappa: float,
    learned_task: bool = False,
    constraints: tuple[Constraint, ...] = (),
) -> Problem[Any, Any, Any]:
    """The world's task, or the one that was learned, on a learned model.

    Args:
        propagation: one of `PROPAGATIONS`; particles are only of those that draw them.

    Raises:
        ContractError: the model was learned on another world, or has other sizes, features or another control step.
    """
    if model.world not in (None, world.name):
        raise ContractError(f"A model for {world.name} is needed, but this one was learned on {model.world}.")
    wanted = (world.features.ny, world.actions.nu)
    if (model.ny, model.nu) != wanted:
        raise ContractError(
            f"A model for {world.name} needs (ny, nu) = {wanted}, but this one has {(model.ny, model.nu)}: "
            "it was learned on another world."
        )
    dt = world.model.opt.timestep * world.frame_skip
    if not math.isclose(model.dt, dt, rel_tol=1e-6):
        raise ContractError(
            f"A model for {world.name} needs its control step, {dt:g} s, but this one was learned at {model.dt:g} s."
        )
    if model.features != world.features:
        raise ContractError(
            f"A model for {world.name} needs {world.features}, but this one has {model.features}: it was learned on "
            "another world, or with features of its own."
        )
    way = PROPAGATIONS[propagation](model)
    options: dict[str, Any] = {
        "particles": particles if propagation in pets.PROPAGATIONS else 1,
        "risk": MeanStd(kappa) if kappa else Mean(),
    }
    if learned_task:
        assert isinstance(way, Propagation)  # see mpc.Config
        return from_heads(way, world.actions, horizon, **options)
    return world.problem(horizon, dynamics=way, constraints=constraints, **options)
