"""Collecting transitions from vectorized Gymnasium environments."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from mbrl.checkpoints import check_state
from mbrl.data import Transition
from mbrl.errors import ContractError, EnvError
from mbrl.protocols import Policy

Output = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""y (n, ny) of the observations (n, ...) and the info of n environments, row by row."""

_FINAL = ("final_obs", "final_info", "_final_obs", "_final_info")


@dataclass(frozen=True)
class Collected:
    """What a number of steps gave.

    Attributes:
        transition: (N,), by time, then by environment.
        returns: (E,) float64, undiscounted, of the episodes that ended, in order of their end. An episode that
            diverged counts up to there.
        lengths: (E,) int64, in steps.
        episodes: (E,) int64, their numbers.
        diverged: number of steps that were dropped because the simulation left the finite numbers.
    """

    transition: Transition
    returns: Tensor
    lengths: Tensor
    episodes: Tensor
    diverged: int


class Collector:
    """Runs a policy in a vector environment and keeps what happened.

    An episode's last y_next comes from its own last observation, never from the next episode. A step whose
    info["diverged"] is true is dropped, counted, and ends its episode.

    Args:
        env: M environments in a vector that resets in the same step, such as `vectorize` makes; actions in a Box.
        policy: is told of every episode's end by `reset(mask)`.
        output: how y follows from what the environments show.
        seed: of the first reset; environment i gets seed + i.

    Raises:
        ContractError: another autoreset mode, or actions that are not a Box of shape (nu,).
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], policy: Policy, *, output: Output, seed: int):
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ContractError(
                f"Collector needs a vector environment that resets in the same step, but {env} has "
                f"autoreset_mode = {mode}, with which a reset is reported as a step of reward 0 or not at all. Make "
                "it with SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), or with mbrl.vectorize(make, n)."
            )
        space = env.single_action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise ContractError(
                f"Collector needs actions in a Box of shape (nu,), but {env} has {space}. "
                "Wrap the environments in gymnasium.wrappers.TransformAction."
            )
        self.env, self.policy, self.output, self.seed = env, policy, output, seed
        self._space, self._M = space, env.num_envs
        self._obs: Tensor | None = None  # None: reset before the next step
        self._info: dict[str, Any] = {}
        self._y = torch.empty(0)
        self._episode = torch.zeros(self._M, dtype=torch.int64)
        self._episodes = 0  # started so far
        self._resets = 0  # of the whole vector
        self._steps = 0  # since the last of them
        self._returns = torch.zeros(self._M, dtype=torch.float64)
        self._lengths = torch.zeros(self._M, dtype=torch.int64)
        self._start_gathering()

    def collect(self, steps: int) -> Collected:
        """The next `steps` of every environment: steps × M transitions, less those that diverged.

        After an error, what was gathered before it is still to be had from `gathered`. Where the error came from
        the environments all of them are reset before the next step; their episodes then stay without an end.

        Raises:
            EnvError: an environment raised, returned a reward or y that is not finite, or diverged without an end.
            ContractError: the policy returned a wrong shape, NaN or actions out of bounds, or y has a wrong shape.
        """
        if steps < 1:
            raise ContractError(f"collect needs at least 1 step, but got {steps}.")
        self._start_gathering()
        for _ in range(steps):
            self._step()
        return self.gathered()

    def gathered(self) -> Collected:
        """What the last `collect` has gathered, all of it or up to an error.

        Raises:
            ContractError: not a single step.
        """
        if not self._parts:
            raise ContractError("Collector has not completed a step, so nothing was gathered.")
        return Collected(
            Transition.cat(self._parts),
            torch.tensor([end[0] for end in self._ends], dtype=torch.float64),
            torch.tensor([end[1] for end in self._ends], dtype=torch.int64),
            torch.tensor([end[2] for end in self._ends], dtype=torch.int64),
            self._diverged,
        )

    def _start_gathering(self) -> None:
        self._parts: list[Transition] = []
        self._ends: list[tuple[float, int, int]] = []
        self._diverged = 0

    def _restart(self) -> None:
        """Reset everything, with seeds that were not used before."""
        self._resets += 1
        self._steps = 0
        self._begin(torch.ones(self._M, dtype=torch.bool))
        try:
            obs, info = self.env.reset(seed=self._seed())
        except Exception as error:
            raise self._failure(error) from error
        self.policy.reset()
        y = self._read(obs, info, self._M)
        self._obs, self._info, self._y = _tensor(obs), info, y

    def _seed(self) -> int:
        """Of environment 0 at the last reset of the whole vector."""
        return self.seed + self._M * (self._resets - 1)

    def _begin(self, mask: Tensor) -> None:
        """New episodes where mask (M,) is true."""
        n = int(mask.sum())
        self._episode[mask] = self._episodes + torch.arange(n)
        self._episodes += n
        self._returns[mask] = 0.0
        self._lengths[mask] = 0

    def _step(self) -> None:
        if self._obs is None:
            self._restart()
        action = self._act()
        y, self._obs = self._y, None  # whatever fails from here on, the environments are ahead of us
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._failure(error) from error

        terminated, truncated = torch.as_tensor(terminated), torch.as_tensor(truncated)
        final = {key: value for key, value in info.items() if key in _FINAL}
        info = {key: value for key, value in info.items() if key not in _FINAL}
        y_now = self._read(obs, info, self._M)
        y_next, lost = y_now.clone(), _flag(info, "diverged", self._M)
        ended = terminated | truncated
        if bool(ended.any()):
            if "final_obs" not in final:
                raise EnvError(
                    f"{self.env} ended an episode without final_obs, so its last observation is lost."
                )
            rows = ended.numpy()
            last = np.stack(list(final["final_obs"][rows]))
            last_info = _rows(final.get("final_info", {}), rows)
            y_next[ended] = self._read(last, last_info, len(last))
            lost[ended] = _flag(last_info, "diverged", len(last))

        transition = Transition(
            y=y,
            u=torch.as_tensor(action).to(y),
            reward=torch.as_tensor(reward).to(y),
            y_next=y_next,
            terminated=terminated.to(y.device),
            truncated=truncated.to(y.device),
            episode=self._episode.to(y.device),
        )
        if bool((lost & ~ended).any()):
            i = int((lost & ~ended).nonzero()[0, 0])
            raise EnvError(
                f'{self._where(i)} set info["diverged"], but did not end the episode. Truncate it there.'
            )
        keep = ~lost
        self._check(transition, keep)
        self._parts.append(transition[keep.to(y.device)])
        self._diverged += int(lost.sum())
        self._steps += 1
        self._lengths += keep
        self._returns += torch.where(lost, 0.0, torch.as_tensor(reward, dtype=torch.float64))

        if bool(ended.any()):
            numbers = (self._returns, self._lengths, self._episode)
            self._ends += zip(*(number[ended].tolist() for number in numbers), strict=True)
            self._begin(ended)
            self.policy.reset(ended)
        self._obs, self._info, self._y = _tensor(obs), info, y_now

    def _act(self) -> np.ndarray:
        """The policy's actions (M, nu) as the environments take them."""
        assert self._obs is not None  # _step resets first
        given, name = self.policy(self._obs, self._info), type(self.policy).__name__
        wanted = (self._M, *self._space.shape)
        if tuple(given.shape) != wanted:
            raise ContractError(
                f"{name} must return actions (M, nu) = {wanted}, but returned {tuple(given.shape)}."
            )
        action: np.ndarray = given.detach().cpu().numpy().astype(self._space.dtype)
        inside = ((action >= self._space.low) & (action <= self._space.high)).all(-1)  # false for NaN too
        if not inside.all():
            i = int(np.flatnonzero(~inside)[0])
            raise ContractError(
                f"{name} must return actions between {self._space.low} and {self._space.high}, but returned "
                f"{action[i]} for environment {i}. Clip them, noise included, so that what is stored is what acted."
            )
        return action

    def _read(self, obs: Any, info: Mapping[str, Any], n: int) -> Tensor:
        """y (n, ny) of n environments."""
        if not isinstance(obs, np.ndarray):
            raise ContractError(
                f"Collector needs observations that are arrays, but got a {type(obs).__name__}. "
                "Wrap the environments in gymnasium.wrappers.FlattenObservation."
            )
        y = self.output(_tensor(obs), info)
        if y.ndim != 2 or len(y) != n or not y.is_floating_point():
            raise ContractError(
                f"output must return floating-point y (n, ny) for the n = {n} environments it is given, row by row, "
                f"but returned {tuple(y.shape)} of {y.dtype}."
            )
        return y

    def _check(self, transition: Transition, keep: Tensor) -> None:
        for name in ("y", "reward", "y_next"):
            value = getattr(transition, name).reshape(self._M, -1)
            bad = keep & ~torch.isfinite(value).all(-1).cpu()
            if bool(bad.any()):
                i = int(bad.nonzero()[0, 0])
                raise EnvError(
                    f"{self._where(i)} returned a {name} that is not finite, {value[i].tolist()}, for the action "
                    f"{transition.u[i].tolist()}. Nothing of this step was kept. An environment whose simulation "
                    'diverges should truncate the episode and set info["diverged"] = True.'
                )

    def _failure(self, error: Exception) -> EnvError:
        i = _culprit(self.env, error)
        where = f"One of {self.env}, reset with seed {self._seed()}" if i is None else self._where(i)
        dead = isinstance(error, EOFError | BrokenPipeError | ConnectionResetError)
        why = "its process died, perhaps for lack of memory" if dead else f"{type(error).__name__}: {error}"
        return EnvError(f"{where} failed: {why}")

    def _where(self, i: int) -> str:
        return (
            f"Environment {i}, in step {int(self._lengths[i]) + 1} of episode {int(self._episode[i])} "
            f"(step {self._steps + 1} since the reset with seed {self._seed() + i}),"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, but for the policy: a tree for `mbrl.checkpoints.pack`.

        Running episodes are in it if every environment has a `snapshot`, as `Resumable` gives it; else episodes
        start anew at a resume. Of the info only arrays of numbers are kept.
        """
        counters = {
            "episode": self._episode.clone(),
            "episodes": self._episodes,
            "resets": self._resets,
            "steps": self._steps,
            "returns": self._returns.clone(),
            "lengths": self._lengths.clone(),
        }
        if self._obs is None or not self._resumable():
            return {**counters, "envs": None}
        envs: Any = self.env.unwrapped
        return {
            **counters,
            "envs": list(envs.get_attr("snapshot")),
            "obs": self._obs.clone(),
            "info": _numbers(self._info),
            "y": self._y.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the environments are reset, and their running episodes replayed.

        Where they cannot be, episodes start anew at the next step; if replaying did not lead to the same
        observations this is warned about.

        Raises:
            ContractError: another number of environments, or no such state.
        """
        check_state("Collector", state, {"episode": Tensor, "returns": Tensor, "lengths": Tensor})
        check_state("Collector", state, {"episodes": int, "resets": int, "steps": int, "envs": list | None})
        if state["envs"] is not None:
            check_state("Collector", state, {"obs": Tensor, "info": dict, "y": Tensor})
        if len(state["episode"]) != self._M:
            raise ContractError(
                f"The state is of {len(state['episode'])} environments, but Collector has {self._M}. Make as many."
            )
        self._episode, self._episodes = state["episode"].clone(), state["episodes"]
        self._resets, self._steps = state["resets"], state["steps"]
        self._returns, self._lengths = state["returns"].clone(), state["lengths"].clone()
        self._obs = None
        self._start_gathering()
        if state["envs"] is None or not self._resumable():
            return
        envs: Any = self.env.unwrapped
        envs.set_attr("snapshot", list(state["envs"]))
        replayed = envs.get_attr("snapshot")
        differ = [
            i
            for i, (new, old) in enumerate(zip(replayed, state["envs"], strict=True))
            if not torch.equal(new["obs"], old["obs"])
        ]
        if differ:
            warnings.warn(
                f"Environments {differ} did not come back to where they were when their actions were replayed, so all "
                "episodes start anew. They are not deterministic, or machine or versions have changed.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        self._obs, self._info, self._y = state["obs"].clone(), _arrays(state["info"]), state["y"].clone()

    def _resumable(self) -> bool:
        call = getattr(self.env.unwrapped, "call", None)  # of Gymnasium's own vectors
        return call is not None and all(call("has_wrapper_attr", "snapshot"))


def _tensor(obs: np.ndarray) -> Tensor:
    """A copy, since an environment may write into its own arrays."""
    return torch.as_tensor(np.array(obs))


def _flag(info: Mapping[str, Any], key: str, n: int) -> Tensor:
    """(n,) bool; false where an environment has not set it."""
    return torch.as_tensor(np.asarray(info.get(key, np.zeros(n)), dtype=bool).copy())


def _rows(info: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Some environments of a vector's info."""
    return {
        key: _rows(value, rows) if isinstance(value, Mapping) else value[rows] for key, value in info.items()
    }


def _numbers(info: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of numbers in an info, as tensors."""
    kept: dict[str, Any] = {}
    for key, value in info.items():
        if isinstance(value, Mapping):
            kept[key] = _numbers(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            kept[key] = torch.as_tensor(value.copy())
    return kept


def _arrays(info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.numpy() if isinstance(value, Tensor) else _arrays(value) for key, value in info.items()
    }


def _culprit(env: VectorEnv[Any, Any, Any], error: Exception) -> int | None:
    """Which environment raised. Vector environments do not tell, but their own frame knows whose turn it was."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_locals.get("self") is env.unwrapped:
            turns = (frame.f_locals.get(name) for name in ("index", "env_idx", "i"))
            found = next((turn for turn in turns if isinstance(turn, int)), found)
    return found
