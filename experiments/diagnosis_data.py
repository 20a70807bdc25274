"""The data of a diagnosis: what the model was fitted to, what it has not seen, and how that is collected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.collect import Collector
from mbrl.data import Transition
from mbrl.datasets import load_dataset
from mbrl.envs import World
from mbrl.errors import DataError, MbrlError
from mbrl.estimators import FullState
from mbrl.experiments.fit import split
from mbrl.models import Ensemble
from mbrl.mpc import MPC
from mbrl.planners import ICEM
from mbrl.policies import RandomPolicy
from mbrl.problem import Box
from mbrl.protocols import Policy
from mbrl.resumable import vectorize

_ENVS = 8
_REPLAN = 5  # control steps: half of the data need no better plans
_NOISE = 0.3  # share of the planner's actions that are random instead


@dataclass(frozen=True)
class Known:
    """Data for a diagnosis.

    Attributes:
        held_out: (N,), not seen by the fit.
        training: (N,), what the model was fitted to, or None where that is not known.
        notes: where they come from, in sentences.
    """

    held_out: Transition
    training: Transition | None
    notes: tuple[str, ...]


def find_data(
    folder: Path,
    model: Ensemble,
    world: World,
    *,
    held_out: Path | None,
    training: Path | None,
    transitions: int,
    horizon: int,
    seed: int,
) -> Known:
    """What is given, else what the model's folder tells, else for the held-out data fresh ones.

    Args:
        held_out, training: folders of data sets.
        transitions: how many to collect where there are none.
        horizon: of the planner that helps to collect them.

    Raises:
        DataError: what is given cannot be read, or has other sizes than the model.
    """
    notes = []
    fitted, unseen = None, None
    try:
        fitted, unseen, told = _of_folder(folder, model)
        notes += told
    except (MbrlError, OSError, ValueError) as error:  # the latter of JSON
        notes.append(f"The data that {folder} tells of cannot be read: {error}")
    if training is not None:
        fitted = read(training, model)
        notes.append(f"Training data: {len(fitted.reward):,} transitions of {training}.")
    if fitted is None:
        notes.append(
            "What the model was fitted to is not known, so nothing can be said of how far from it a planner goes. "
            "Give it: --training FOLDER."
        )
    if held_out is not None:
        unseen = read(held_out, model)
        notes.append(f"Held-out data: {len(unseen.reward):,} transitions of {held_out}.")
    if unseen is None:
        unseen = collect_mix(world, transitions, horizon, seed=seed)
        notes.append(
            f"Held-out data: none were given, so {len(unseen.reward):,} fresh transitions of {world.name} were "
            "collected, half of them with random actions and half with a planner on the simulator whose every third "
            "action or so is random. Others can be given: --held-out FOLDER."
        )
    return Known(unseen, fitted, tuple(notes))


def read(path: Path, model: Ensemble) -> Transition:
    """A data set as float32 rows on the CPU.

    Raises:
        DataError: it cannot be read, or has other sizes than the model.
    """
    rows = load_dataset(path).transition.to("cpu", torch.float32)
    sizes = rows.y.shape[-1], rows.u.shape[-1]
    if sizes != (model.ny, model.nu):
        raise DataError(
            f"The data set {path} has (ny, nu) = {sizes}, but the model has {(model.ny, model.nu)}. Give data of "
            "the model's world."
        )
    return rows


def _of_folder(folder: Path, model: Ensemble) -> tuple[Transition | None, Transition | None, list[str]]:
    """Training and held-out data that a training run or a fit has left, and where they come from."""
    if (folder / "checkpoints").is_dir() and (folder / "data").is_dir():
        rows = read(folder / "data", model)
        return rows, None, [f"Training data: the {len(rows.reward):,} transitions of the run in {folder}."]
    settings = folder / "config.json"
    if not settings.is_file():
        return None, None, []
    config = json.loads(settings.read_text(encoding="utf-8")).get("config", {})
    if not {"dataset", "test", "seed"} <= set(config):
        return None, None, []
    dataset = Path(config["dataset"])
    stored = load_dataset(dataset).transition
    rows = stored.to("cpu", torch.promote_types(stored.y.dtype, torch.float32))
    train, _, test = split(rows, config["test"], torch.Generator().manual_seed(config["seed"]))
    told = [f"Training data: the {len(train.reward):,} transitions of {dataset} that the fit has seen."]
    if len(test.reward) < 100:
        return train.to("cpu", torch.float32), None, told
    told.append(f"Held-out data: the {len(test.reward):,} transitions that the fit kept to report on.")
    return train.to("cpu", torch.float32), test.to("cpu", torch.float32), told


class Noisy:
    """A policy of which a share of the actions is replaced by uniform ones."""

    def __init__(self, policy: Policy, actions: Box, share: float, *, generator: Generator):
        self.policy, self.share, self.generator = policy, share, generator
        self.babble = RandomPolicy(actions, generator=generator)

    def reset(self, mask: Tensor | None = None) -> None:
        self.policy.reset(mask)

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        u = self.policy(obs, info)
        random = torch.rand((len(u), 1), generator=self.generator) < self.share
        return torch.where(random, self.babble(obs), u.double())


def collect_mix(world: World, transitions: int, horizon: int, *, seed: int) -> Transition:
    """Fresh transitions, half of random actions and half of a noisy planner on the simulator, as float32 rows."""
    generator = torch.Generator().manual_seed(seed)
    planner = ICEM(population=30, iterations=2)
    mpc = MPC(
        world.problem(horizon, threads=1),
        planner,
        estimator=FullState(),
        generator=generator,
        replan_every=min(_REPLAN, horizon),
    )
    policies: tuple[Policy, ...] = (
        RandomPolicy(world.actions, generator=generator),
        Noisy(mpc, world.actions, _NOISE, generator=generator),
    )
    parts: list[Transition] = []
    for i, policy in enumerate(policies):
        envs = vectorize(world.make, _ENVS)
        collector = Collector(envs, policy, output=world.measure, seed=seed + 1_000 * i)
        rows = collector.collect(max(1, transitions // (2 * _ENVS))).transition.to("cpu", torch.float32)
        envs.close()
        before = 1 + int(parts[0].episode.max()) if parts else 0
        parts.append(dataclasses.replace(rows, episode=rows.episode + before))
    return Transition.cat(parts)
