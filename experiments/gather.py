"""Data to learn a model from: random episodes, and ones of a planner in the simulator whose actions are disturbed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.data import Transition
from mbrl.datasets import DatasetWriter
from mbrl.envs import World
from mbrl.estimators import FullState
from mbrl.experiments.contenders import contender, size_for
from mbrl.experiments.episodes import Episode, run_episodes
from mbrl.mpc import MPC
from mbrl.policies import RandomPolicy
from mbrl.problem import Box
from mbrl.protocols import Policy

NOISE = (0.1, 0.3, 0.6)
"""Standard deviations of the disturbance, as shares of half the action range; episodes take turns."""


class Disturbed:
    """Another policy's actions, with Gaussian noise of a deviation (M, 1) that is a share of half the range, clipped."""

    def __init__(self, policy: Policy, actions: Box, std: Tensor, *, generator: Generator):
        self.policy, self.actions, self.std, self.generator = policy, actions, std, generator

    def reset(self, mask: Tensor | None = None) -> None:
        self.policy.reset(mask)

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        u = self.policy(obs, info)
        noise = torch.randn(u.shape, generator=self.generator, dtype=u.dtype)
        return self.actions.clip(u + self.std.to(u) * self.actions.half_range.to(u) * noise)


def gather(
    world: World,
    folder: Path,
    transitions: int,
    *,
    seed: int = 0,
    steps: int = 200,
    horizon: int = 30,
    evaluations: int = 1_000,
    random_share: float = 0.25,
    together: int = 12,
    threads: int = 1,
) -> Path:
    """Record a data set of at least so many transitions; one that is already there is added to, up to that number.

    Shards of `together` episodes follow from the seed and their number alone, so a recording that was killed goes on as
    if it had not been.

    Args:
        steps: of an episode, at most.
        horizon, evaluations: of the planner, iCEM on the simulator.
        random_share: of the shards whose actions are uniformly random; the others are disturbed by `NOISE`.
        together: episodes of a shard.

    Raises:
        DataError: the folder cannot be written, or holds a data set that was recorded in another way.
    """
    metadata = {
        "world": world.name,
        "dt": world.model.opt.timestep * world.frame_skip,
        "seed": seed,
        "policy": f"{random_share:g} random, else iCEM at {evaluations} steps, horizon {horizon}, disturbed",
        "steps": steps,
        "together": together,
    }
    problem = world.problem(horizon, threads=threads)
    planner = contender("icem", size_for("icem", evaluations, problem))
    with DatasetWriter(folder, metadata) as writer:
        while writer.transitions < transitions:
            shard = writer.shards
            generator = torch.Generator().manual_seed(seed + 1_000_003 * shard)
            policy: Policy
            if int((shard + 1) * random_share) > int(shard * random_share) or not shard:
                policy = RandomPolicy(world.actions, generator=generator)
            else:
                std = torch.tensor([NOISE[i % len(NOISE)] for i in range(together)])[:, None]
                mpc = MPC(problem, planner, estimator=FullState(), generator=generator)
                policy = Disturbed(mpc, world.actions, std, generator=generator)
            seeds = [10_000 + seed * 100_000 + shard * together + i for i in range(together)]
            episodes = run_episodes(world, policy, seeds, steps=steps, audit_every=0, threads=threads)
            writer.append(Transition.cat([transitions_of(world, e) for e in episodes]))
    return folder


def transitions_of(world: World, episode: Episode) -> Transition:
    """The steps (T,) of an episode, without one that diverged."""
    T = len(episode.rewards) - episode.diverged
    y = episode.states[: T + 1, -world.layout.size :]
    last = torch.arange(T) == T - 1
    return Transition(
        y=y[:-1],
        u=episode.actions[:T].to(y),
        reward=episode.rewards[:T],
        y_next=y[1:],
        terminated=last & episode.terminated,
        truncated=last & (episode.truncated and not episode.diverged),
        episode=torch.full((T,), episode.seed),
    )
