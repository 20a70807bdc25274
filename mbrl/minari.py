"""Minari data sets: offline data of others in, ours out. Needs the extra `minari`."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch

from mbrl.data import Transition, runs
from mbrl.errors import ContractError, DataError, MissingExtra


def _minari() -> Any:
    try:
        import h5py  # noqa: F401  # its storage
        import minari
        import minari.data_collector
    except ImportError as error:
        raise MissingExtra("Reading or writing a Minari data set", "minari", "minari") from error
    return minari


def to_minari(transition: Transition, dataset_id: str, **options: Any) -> Any:
    """Write transitions as the Minari data set `dataset_id`, with y as observation; returns it.

    Every unbroken piece of an episode becomes an episode. Its rows must be in order of time.

    Args:
        transition: any leading shape.
        dataset_id: e.g. "pendulum/random-v0"; Minari puts it below MINARI_DATASETS_PATH.
        options: as for `minari.create_dataset_from_buffers`, e.g. author or description.

    Raises:
        MissingExtra: Minari is not installed.
        ContractError: numbers that are not finite, or rows of an episode that do not follow each other.
    """
    minari = _minari()
    transition.check()
    rows = transition.flat().to("cpu")
    order, run = runs(rows)
    buffers = []
    for index in torch.split(order, torch.bincount(run).tolist()):
        episode = rows[index]
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=torch.cat([episode.y, episode.y_next[-1:]]).numpy(),
                actions=episode.u.numpy(),
                rewards=episode.reward.numpy(),
                terminations=episode.terminated.numpy(),
                truncations=episode.truncated.numpy(),
            )
        )

    def space(n: int) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-np.inf, np.inf, (n,), rows.y.numpy().dtype)

    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        observation_space=space(rows.y.shape[-1]),
        action_space=space(rows.u.shape[-1]),
        **options,
    )


def from_minari(dataset: Any) -> Transition:
    """The transitions (N,) of a local Minari data set, given itself or by its id, with its observation as y.

    Episodes are numbered from 0. What is not floating point becomes float32; u and reward take the dtype of y.

    Raises:
        MissingExtra: Minari is not installed.
        DataError: there is no such data set, it is damaged, or empty.
        ContractError: observations or actions are not vectors, or numbers are not finite.
    """
    minari = _minari()
    name = dataset if isinstance(dataset, str) else dataset.id
    try:
        if isinstance(dataset, str):
            dataset = minari.load_dataset(dataset)
        episodes = list(dataset.iterate_episodes())
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"The Minari data set {name} cannot be read: {error}") from error
    parts = []
    for number, episode in enumerate(episodes):
        y, u = np.asarray(episode.observations), np.asarray(episode.actions)
        if y.ndim != 2 or u.ndim != 2 or y.dtype == object:
            raise ContractError(
                f"from_minari needs observations (T+1, ny) and actions (T, nu), but {name} has "
                f"{y.shape} and {u.shape}. Flatten the data set's spaces first."
            )
        states = torch.as_tensor(y)
        states = states if states.is_floating_point() else states.float()
        parts.append(
            Transition(
                y=states[:-1],
                u=torch.as_tensor(u).to(states),
                reward=torch.as_tensor(episode.rewards).to(states),
                y_next=states[1:],
                terminated=torch.as_tensor(episode.terminations).bool(),
                truncated=torch.as_tensor(episode.truncations).bool(),
                episode=torch.full((len(u),), number),
            )
        )
    if not parts:
        raise DataError(f"The Minari data set {name} has no episodes.")
    transition = Transition.cat(parts)
    transition.check()
    return transition
