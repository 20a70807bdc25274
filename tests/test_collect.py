"""The collector: every stored step really happened, in that order, and none is a reset in disguise."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from mbrl import Collector, ContractError, EnvError, Replay, Resumable, pack, unpack, vectorize
from mbrl.envs import make_world


class Counting(gymnasium.Env[Any, Any]):
    """Observes (environment, episode, time); reward = 100·episode + time + 1. The lengths say when episodes end:
    a positive one terminates, a negative one truncates. What `fault` returns or raises replaces a step.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, i: int, lengths: list[int], fault: Callable[[int, int, int], Any] | None = None):
        self.i, self.lengths, self.fault = i, lengths, fault
        self.episode = -1
        self.acted = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.observe(), {"diverged": False, "double": 2.0 * self.observe()}

    def observe(self) -> np.ndarray:
        return np.array([self.i, self.episode, self.time], np.float32)

    def step(self, action: Any) -> Any:
        self.time += 1
        self.acted = action
        length = self.lengths[self.episode % len(self.lengths)]
        done = self.time == abs(length)
        info = {"diverged": False, "double": 2.0 * self.observe()}
        step = (
            self.observe(),
            100.0 * self.episode + self.time,
            done and length > 0,
            done and length < 0,
            info,
        )
        fault = self.fault and self.fault(self.i, self.episode, self.time)
        return fault(step) if fault else step


class Uniform:
    """Random actions; remembers which environments were reset before each call."""

    def __init__(self, seed: int = 0, nu: int = 2):
        self.generator, self.nu = Generator().manual_seed(seed), nu
        self.resets: list[Tensor | None] = []
        self.seen: list[Tensor] = []

    def reset(self, mask: Tensor | None = None) -> None:
        self.resets.append(mask)

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        self.seen.append(obs)
        return 2 * torch.rand(len(obs), self.nu, generator=self.generator) - 1


def shown(obs: Tensor, info: Mapping[str, Any]) -> Tensor:
    return obs


def counting(lengths: list[list[int]], fault: Any = None, seed: int = 0) -> Collector:
    makers = [lambda i=i, own=own: Counting(i, own, fault) for i, own in enumerate(lengths)]
    # Without copies the observations change under the hands of whoever keeps them.
    env = SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    return Collector(env, Uniform(), output=shown, seed=seed)


@given(
    st.lists(st.lists(st.integers(-5, 5).filter(bool), min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_no_reset_is_taken_for_a_step(lengths: list[list[int]], calls: list[int]) -> None:
    collector, M = counting(lengths), len(lengths)
    made = [collector.collect(n) for n in calls]
    parts = [one.transition for one in made]
    for n, part in zip(calls, parts, strict=True):
        assert part.reward.shape == (n * M,)  # nothing was dropped either
    rows = [tuple(row) for part in parts for row in part.y.long().tolist()]

    # What must come, env by env, written down without an environment.
    expected, ends, numbers, started = [], [], {}, M
    clock = {i: (0, 0) for i in range(M)}
    for i in range(M):
        numbers[i, 0] = i
    for _ in range(sum(calls)):
        for i, own in enumerate(lengths):
            episode, time = clock[i]
            length = own[episode % len(own)]
            done = time + 1 == abs(length)
            expected.append((i, episode, time, done and length > 0, done and length < 0))
            clock[i] = (episode + 1, 0) if done else (episode, time + 1)
            if done:
                ends.append((sum(100.0 * episode + t + 1 for t in range(time + 1)), time + 1))
                numbers[i, episode + 1] = started
                started += 1
    assert rows == [row[:3] for row in expected]
    step = torch.tensor([0.0, 0.0, 1.0])
    flags = iter(expected)
    for part in parts:
        assert torch.equal(part.y_next, part.y + step)
        assert torch.equal(part.reward, 100 * part.y[:, 1] + part.y_next[:, 2])
        for y, terminated, truncated, episode in zip(
            part.y.long().tolist(), part.terminated, part.truncated, part.episode, strict=True
        ):
            assert (bool(terminated), bool(truncated)) == next(flags)[3:]
            assert int(episode) == numbers[y[0], y[1]]
    assert [
        end for one in made for end in zip(one.returns.tolist(), one.lengths.tolist(), strict=True)
    ] == ends
    assert sum(one.diverged for one in made) == 0


def test_the_policy_hears_of_every_end() -> None:
    collector = counting([[2], [3]])
    collector.collect(4)
    policy: Any = collector.policy
    assert policy.resets[0] is None
    assert [mask.tolist() for mask in policy.resets[1:]] == [[True, False], [False, True], [True, False]]
    assert policy.seen[2].tolist() == [[0, 1, 0], [1, 0, 2]]  # it acts on the new episode, not on the old end


def test_what_is_stored_is_what_acted() -> None:
    collector = counting([[9]])
    made = collector.collect(3)
    envs: Any = collector.env
    assert torch.equal(made.transition.u[-1], torch.as_tensor(envs.envs[0].acted))


def test_y_comes_from_the_info_of_the_same_episode() -> None:
    collector = counting([[2], [-3]])
    collector.output = lambda obs, info: torch.as_tensor(info["double"])
    one = collector.collect(7).transition
    two = counting([[2], [-3]]).collect(7).transition
    assert torch.equal(one.y, 2 * two.y) and torch.equal(one.y_next, 2 * two.y_next)


def test_trajectories_of_what_was_collected() -> None:
    replay = Replay(100, 3, 2)
    replay.add(counting([[2, -4], [3]]).collect(9).transition)
    y, _ = replay.trajectories(3)
    assert (y[:, 1:] - y[:, :-1] == torch.tensor([0.0, 0.0, 1.0])).all()
    # Environment 0: one window in each of two times 2, 4 steps: (2)(4)(2)(1 of 4); environment 1: three of 3.
    assert y[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 0], [1, 2, 0]]


def diverge(ends: bool) -> Any:
    def fault(i: int, episode: int, time: int) -> Any:
        def lost(step: Any) -> Any:
            return np.full(3, np.nan, np.float32), np.nan, False, ends, {**step[4], "diverged": True}

        return lost if (i, episode, time) == (1, 0, 3) else None

    return fault


def test_a_step_that_diverged_is_dropped_and_counted() -> None:
    made = counting([[9], [4]], diverge(ends=True)).collect(5)
    rows = made.transition
    rows.check()
    assert made.diverged == 1 and len(rows.reward) == 9
    assert rows.y[rows.y[:, 0] == 1].tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert rows.episode[rows.y[:, 0] == 1].tolist() == [1, 1, 2, 2]
    assert made.returns.tolist() == [1.0 + 2.0] and made.lengths.tolist() == [2]


def test_an_environment_that_goes_on_after_it_diverged_is_refused() -> None:
    with pytest.raises(
        EnvError, match=r'Environment 1, in step 3 .* set info\["diverged"\], but did not end'
    ):
        counting([[9], [4]], diverge(ends=False)).collect(5)


def test_a_reset_to_nan_is_refused() -> None:
    collector = counting([[9], [4]])
    collector.output = lambda obs, info: torch.where(
        obs[:, 1:2] > 0, torch.nan, obs
    )  # from the second episode on
    with pytest.raises(
        EnvError, match="Environment 1, in step 1 of episode 2 .* returned a y that is not finite"
    ):
        collector.collect(9)
    assert len(collector.gathered().transition.reward) == 8


def test_nothing_that_is_not_finite_is_kept_and_what_came_before_is() -> None:
    def fault(i: int, episode: int, time: int) -> Any:
        return (lambda step: (step[0], np.inf, *step[2:])) if (i, episode, time) == (1, 1, 2) else None

    collector = counting([[9], [3]], fault, seed=40)
    with pytest.raises(
        EnvError,
        match=r"Environment 1, in step 2 of episode 2 \(step 5 since the reset with seed 41\), .*reward",
    ):
        collector.collect(9)
    made = collector.gathered()
    made.transition.check()
    assert len(made.transition.reward) == 8 and made.lengths.tolist() == [3]


def raising(i: int, episode: int, time: int) -> Any:
    def fail(step: Any) -> Any:
        raise ValueError("the motor is on fire")

    return fail if (i, episode, time) == (1, 1, 1) else None


def test_an_error_tells_environment_step_and_seed_and_collecting_can_go_on() -> None:
    collector = counting([[9], [3]], raising, seed=7)
    with pytest.raises(
        EnvError,
        match=r"Environment 1, in step 1 of episode 2 \(step 4 since the reset with seed 8\), failed: "
        "ValueError: the motor is on fire",
    ) as caught:
        collector.collect(9)
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(collector.gathered().transition.reward) == 6
    after = collector.collect(2).transition
    assert after.episode.tolist() == [3, 4, 3, 4] and after.y[:, 2].tolist() == [0, 0, 1, 1]
    envs: Any = collector.env
    assert [env.np_random_seed for env in envs.envs] == [9, 10]  # not the seeds that led to the error
    policy: Any = collector.policy
    assert policy.resets[-1] is None


def dying(i: int, episode: int, time: int) -> Any:
    if raising(i, episode, time):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking, from Python 3.12 on
@pytest.mark.filterwarnings("ignore:.*(Worker|last exception|Traceback|close):UserWarning")  # Gymnasium's log
@pytest.mark.parametrize(
    ("fault", "why"), [(raising, "ValueError: the motor is on fire"), (dying, "its process died")]
)
def test_an_error_in_another_process_tells_the_same(fault: Any, why: str) -> None:
    makers = [lambda i=i: Counting(i, [3], fault) for i in range(2)]
    env = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP, context="fork")
    collector = Collector(env, Uniform(), output=shown, seed=0)
    try:
        with pytest.raises(EnvError, match=rf"Environment 1, in step 1 of episode 3 .*{why}"):
            collector.collect(9)
    finally:
        env.close(terminate=True)
    assert torch.equal(collector.gathered().transition.y, counting([[3], [3]]).collect(3).transition.y)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    env = SyncVectorEnv([lambda: Counting(0, [3])], autoreset_mode=mode)
    with pytest.raises(ContractError, match=f"{mode}.*autoreset_mode=AutoresetMode.SAME_STEP"):
        Collector(env, Uniform(), output=shown, seed=0)


def test_other_actions_than_vectors_are_refused() -> None:
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ContractError, match=r"Box of shape \(nu,\).*Discrete\(2\)"):
        Collector(env, Uniform(), output=shown, seed=0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (torch.zeros(1, 2), r"must return actions \(M, nu\) = \(2, 2\), but returned \(1, 2\)"),
        (torch.tensor([[0.0, 0.0], [0.0, torch.nan]]), "between .* for environment 1"),
        (torch.tensor([[0.0, 1.1], [0.0, 0.0]]), "between .* for environment 0.*Clip"),
    ],
)
def test_actions_that_break_the_contract_never_act(action: Tensor, message: str) -> None:
    collector = counting([[5], [5]])
    collector.collect(2)
    policy, collector.policy = collector.policy, _Fixed(action)
    with pytest.raises(ContractError, match=f"_Fixed {message}|_Fixed must return actions {message}"):
        collector.collect(1)
    collector.policy = policy
    assert collector.collect(1).transition.y[:, 2].tolist() == [2, 2]


class _Fixed(Uniform):
    def __init__(self, action: Tensor):
        super().__init__()
        self.action = action

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        return self.action


def test_y_of_a_wrong_shape_is_refused() -> None:
    collector = counting([[5], [5]])
    collector.output = lambda obs, info: obs[0]
    with pytest.raises(ContractError, match=r"output must return .*n = 2 .*returned \(3,\)"):
        collector.collect(1)
    with pytest.raises(ContractError, match="has not completed a step"):
        collector.gathered()
    with pytest.raises(ContractError, match="at least 1 step"):
        collector.collect(0)


def pendulum(M: int = 2, policy: Uniform | None = None, make: Any = None) -> Collector:
    """Its episodes end by falling over, after a random reset, within a few steps."""
    world = make_world("InvertedPendulum-v5")
    env = vectorize(world.make, M) if make is None else make(world.make)

    def output(obs: Tensor, info: Mapping[str, Any]) -> Tensor:
        return torch.as_tensor(info["state"])

    return Collector(env, policy or Uniform(nu=1), output=output, seed=3)


def test_a_resumed_collector_goes_on_exactly() -> None:
    whole = pendulum()
    first = whole.collect(33)
    state = whole.state_dict()
    tensors, meta = pack({"collector": state, "policy": whole.policy.generator.get_state()})  # type: ignore[attr-defined]
    one = whole.collect(40)

    tree = unpack(tensors, json.loads(json.dumps(meta)))
    policy = Uniform(nu=1)
    policy.generator.set_state(tree["policy"])
    resumed = pendulum(policy=policy)
    resumed.load_state_dict(tree["collector"])
    two = resumed.collect(40)
    assert len(first.returns) and len(one.returns) > 1 and not first.transition.truncated.any()
    for name, value in one.transition.tensors().items():
        assert torch.equal(value, two.transition.tensors()[name]), name
    assert torch.equal(one.returns, two.returns) and torch.equal(one.lengths, two.lengths)
    assert torch.equal(policy.seen[0], whole.policy.seen[33])  # type: ignore[attr-defined]


def test_without_snapshots_episodes_start_anew() -> None:
    def bare(make: Any) -> SyncVectorEnv:
        return SyncVectorEnv([make, make], autoreset_mode=AutoresetMode.SAME_STEP)

    whole, resumed = pendulum(make=bare), pendulum(make=bare)
    last = whole.collect(33).transition.episode.max()
    state = whole.state_dict()
    assert state["envs"] is None
    resumed.load_state_dict(state)
    after = resumed.collect(1).transition
    assert after.episode.tolist() == [last + 1, last + 2]
    fresh = vectorize(make_world("InvertedPendulum-v5").make, 2)
    _, info = fresh.reset(seed=3 + 2)  # new seeds: the old ones would repeat the first episodes
    assert torch.equal(after.y, torch.as_tensor(info["state"]))


class Restless(Counting):
    """Keeps a count that no reset takes back, so that nothing can be replayed."""

    def observe(self) -> np.ndarray:
        self.count = getattr(self, "count", 0) + 1
        return np.array([self.i, self.count, self.time], np.float32)


def test_what_cannot_be_replayed_is_warned_about() -> None:
    env = vectorize(lambda: Restless(0, [9]), 2)
    collector = Collector(env, Uniform(), output=shown, seed=0)
    collector.collect(3)
    with pytest.warns(RuntimeWarning, match=r"Environments \[0, 1\] did not come back.*start anew"):
        collector.load_state_dict(collector.state_dict())
    assert collector.collect(1).transition.y[:, 2].tolist() == [0, 0]


def test_a_state_of_other_environments_is_refused() -> None:
    with pytest.raises(ContractError, match="of 1 environments, but Collector has 2"):
        counting([[5], [5]]).load_state_dict(counting([[5]]).state_dict())


def test_a_snapshot_before_the_first_reset_is_none() -> None:
    assert Resumable(Counting(0, [3])).snapshot is None
