"""Episodes in the true world, and data recorded from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl.datasets import load_dataset
from mbrl.envs import make_world
from mbrl.estimators import FullState
from mbrl.experiments.episodes import run_episodes
from mbrl.experiments.gather import Disturbed, gather
from mbrl.mpc import MPC
from mbrl.planners import CEM
from mbrl.policies import RandomPolicy


def random_policy(world: Any, seed: int = 0) -> RandomPolicy:
    return RandomPolicy(world.actions, generator=torch.Generator().manual_seed(seed))


def planned(world: Any, problem: Any, planner: Any = CEM(population=12, iterations=2, elites=3)) -> MPC:  # noqa: B008
    return MPC(problem, planner, estimator=FullState(), generator=torch.Generator().manual_seed(0))


def test_an_episode_is_what_the_environment_did() -> None:
    world = make_world("Hopper-v5")
    (episode,) = run_episodes(world, random_policy(world), (3,), steps=80)
    env = world.make()
    env.reset(seed=3)
    total, terminated = 0.0, False
    for action in episode.actions:
        _, reward, terminated, _, info = env.step(action.numpy().astype(np.float32))
        total += float(reward)
    assert terminated
    assert episode.terminated
    assert not episode.truncated
    assert len(episode.states) == len(episode.rewards) + 1 < 80
    assert episode.total == pytest.approx(total)
    assert torch.equal(episode.states[-1], torch.as_tensor(info["state"]))
    assert episode.planned.isnan().all()  # of a policy that does not plan


def test_episodes_that_have_ended_wait_and_change_nothing() -> None:
    """Each of several stops at its own end."""
    world = make_world("Hopper-v5")
    together = run_episodes(world, random_policy(world), (0, 1, 2, 3), steps=60)
    assert len({len(episode.rewards) for episode in together}) > 1
    for episode in together:
        env = world.make()
        env.reset(seed=episode.seed)
        for action in episode.actions:
            _, _, terminated, truncated, info = env.step(action.numpy().astype(np.float32))
        assert (terminated, truncated) == (episode.terminated, episode.truncated)
        assert torch.equal(episode.states[-1], torch.as_tensor(info["state"]))


def test_plans_on_the_plant_come_true_and_others_do_not() -> None:
    world = make_world("pendulum")
    problem = world.problem(8, threads=1)
    for episode in run_episodes(world, planned(world, problem), (0, 1), steps=6):
        torch.testing.assert_close(episode.planned, episode.realised, rtol=1e-12, atol=1e-12)
        assert (episode.model_steps == (2 * 12 + 2) * 8).all()
        assert (episode.plan_ms > 0).all()
        assert episode.certified.isnan().all()  # a sampling planner certifies nothing

    class Heavier:
        """The simulator with half the torque."""

        def __getattr__(self, name: str) -> Any:
            return getattr(problem.dynamics, name)

        def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
            reached: Tensor = problem.dynamics.step(x, 0.5 * u, k)
            return reached

    wrong = dataclasses.replace(problem, dynamics=Heavier())
    (episode,) = run_episodes(world, planned(world, wrong), (0,), steps=6, audit_every=2)
    known = ~episode.realised.isnan()
    assert known.tolist() == [True, False, True, False, True, False]
    assert ((episode.planned - episode.realised)[known].abs() > 1e-5).all()


def test_a_disturbed_policy_stays_in_bounds_and_is_as_wild_as_told() -> None:
    world = make_world("pendulum")

    class Still:
        def reset(self, mask: Tensor | None = None) -> None:
            pass

        def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
            return torch.zeros(len(obs), 1, dtype=torch.float64)

    std = torch.tensor([[0.0], [0.1], [2.0]])
    policy = Disturbed(Still(), world.actions, std, generator=torch.Generator().manual_seed(0))
    u = torch.stack([policy(torch.zeros(3, 2)) for _ in range(400)])[..., 0] / world.actions.high
    assert (u[:, 0] == 0).all()
    assert float(u[:, 1].std()) == pytest.approx(0.1, rel=0.1)
    assert float(u.abs().max()) == 1.0


def test_recording_goes_on_where_it_was_and_is_data_to_learn_from(tmp_path: Path) -> None:
    world = make_world("pendulum")
    options: dict[str, Any] = {
        "steps": 10,
        "horizon": 4,
        "evaluations": 120,
        "together": 2,
        "random_share": 0.5,
    }
    gather(world, tmp_path / "whole", 60, **options)
    gather(world, tmp_path / "parts", 20, **options)
    gather(world, tmp_path / "parts", 60, **options)
    whole, parts = (load_dataset(tmp_path / name) for name in ("whole", "parts"))
    for name, value in whole.transition.tensors().items():
        assert torch.equal(value, parts.transition.tensors()[name])
    data = whole.transition
    assert len(data.reward) == 60
    assert len(set(data.episode.tolist())) == 6
    assert whole.metadata["world"] == "pendulum"
    torch.testing.assert_close(data.reward, world.task.reward(data.y, data.u, data.y_next))
    same = data.episode[1:] == data.episode[:-1]
    assert torch.equal(data.y[1:][same], data.y_next[:-1][same])
