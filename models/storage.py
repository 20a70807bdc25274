"""Ensembles on disk: the architecture beside the weights, so that a folder is all that is needed to load one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbrl.checkpoints import Checkpoints, pack, unpack
from mbrl.errors import CheckpointError
from mbrl.features import Features
from mbrl.models.ensemble import Ensemble

_KIND = "mbrl.models.Ensemble"


def save_ensemble(path: str | Path, model: Ensemble) -> Path:
    """Save an ensemble as a checkpoint in a folder of its own; returns the checkpoint's folder.

    Raises:
        ContractError: a weight is not finite; nothing was saved.
        CheckpointError: writing failed, or the folder holds another ensemble.
    """
    architecture = {
        "ny": model.ny,
        "nu": model.nu,
        "dt": model.dt,
        "features": dataclasses.asdict(model.features),
        "members": model.members,
        "hidden": tuple(w.shape[-1] for w in model.net.weights)[:-1],
        "activation": model.net.activation,
        "probabilistic": model.probabilistic,
        "reward": model.learns_reward,
        "termination": model.learns_termination,
    }
    tree = {"kind": _KIND, "world": model.world, "architecture": architecture, "model": model.state_dict()}
    tensors, meta = pack(tree)
    return Checkpoints(path).save(0, tensors, meta, finite=("model",))


def load_ensemble(path: str | Path) -> Ensemble:
    """The ensemble that `save_ensemble` left in a folder, on the CPU and in its own dtype.

    Raises:
        CheckpointError: there is none, it is damaged, or weights and architecture do not belong together.
    """
    _, tensors, meta = Checkpoints(path).load()
    tree = unpack(tensors, meta)
    if not isinstance(tree, dict) or tree.get("kind") != _KIND:
        raise CheckpointError(f"{path} holds a checkpoint of another kind, not of an ensemble.")
    try:
        architecture: dict[str, Any] = dict(tree["architecture"])
        seen = architecture.pop("features")
        # Before the indices below ny are counted one by one.
        inputs = seen["ny"] - len(seen["hidden"]) + len(seen["angles"]) + architecture["nu"]
        if inputs != len(tree["model"]["input_mean"]):
            raise ValueError(f"it needs {inputs} inputs, but has {len(tree['model']['input_mean'])}")
        features = Features(**seen)
        with torch.device("meta"):  # no memory before the sizes are known to be those of the weights
            model = Ensemble(**architecture, features=features, generator=torch.Generator())
        model.load_state_dict(tree["model"], assign=True)
        model.world = None if tree.get("world") is None else str(tree["world"])
        check_ensemble(model)
    except Exception as error:  # what was written by hand can make torch raise anything
        raise CheckpointError(
            f"{path} holds no ensemble that can be used: {error}. Fit and save it again."
        ) from error
    return model


def check_ensemble(model: Ensemble) -> None:
    """What shapes do not tell."""
    values: dict[str, Tensor] = model.state_dict()
    elites = values.pop("elites")
    if {value.dtype for value in values.values()} != {model.input_mean.dtype}:
        raise ValueError("its weights have several dtypes")
    for name, value in values.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} has values that are not finite")
    chosen = elites.tolist()
    if elites.dtype != torch.int64 or elites.ndim != 1 or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"its elites are {chosen}")
    if not set(chosen) <= set(range(model.members)):
        raise ValueError(f"its elites are {chosen} of {model.members} members")
