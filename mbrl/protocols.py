"""The contracts between models, costs, planners and policies.

Shapes and names, used verbatim everywhere:

    M  problems planned at once        x, u       (..., nx), (..., nu)
    B  candidates in planning          states     (M, B, H+1, nx)
    P  particles                       actions    (..., H, nu)
    H  horizon in steps                particles  (P, M, B, nx)
    nx, nu, ny  state, action, output size

Order: anything that broadcasts, then time, then feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from torch import Generator, Tensor

if TYPE_CHECKING:
    from mbrl.features import Features
    from mbrl.problem import Box, Plan, Problem


@runtime_checkable
class Dynamics(Protocol):
    """All that a sampling planner needs to know about a world or a learned model."""

    @property
    def nx(self) -> int:
        """State size."""
        ...

    @property
    def nu(self) -> int:
        """Action size."""
        ...

    @property
    def ny(self) -> int:
        """Output size: what the task reads."""
        ...

    @property
    def dt(self) -> float:
        """Seconds per step."""
        ...

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        """Next state (..., nx) from x (..., nx) and u (..., nu); k is the step of the plan.

        Rows are independent. A row that diverges, or that was not finite, comes back as NaN.
        """
        ...

    def output(self, x: Tensor) -> Tensor:
        """y (..., ny), what the task reads, of the state x (..., nx)."""
        ...


@runtime_checkable
class Stochastic(Protocol):
    """Dynamics that must be drawn before use: ensembles, probabilistic nets, randomised simulators."""

    @property
    def nx(self) -> int: ...
    @property
    def nu(self) -> int: ...
    @property
    def ny(self) -> int: ...
    @property
    def dt(self) -> float: ...

    def output(self, x: Tensor) -> Tensor: ...

    def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Dynamics:
        """Independent functions of leading shape `shape`, which broadcasts against x.shape[:-1].

        In planning `shape` is (P, 1, 1). The result holds no randomness, so all candidates that are
        rolled out through it share random numbers. Planners draw afresh in each iteration.
        """
        ...


@runtime_checkable
class Cost(Protocol):
    """A cost to minimise, in terms of the outputs y."""

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        """Cost (...) of one step. y, y_next: (..., ny); u: (..., nu); p: parameters of step k, (..., np)."""
        ...

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        """Cost (...) of ending at y (..., ny)."""
        ...


@runtime_checkable
class RateCost(Protocol):
    """A cost per second, for `Integral`."""

    def rate(self, y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        """Cost (...) per second. y: (..., ny), u: (..., nu); p: parameters of the step, (..., np)."""
        ...

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        """Cost (...) of ending at y (..., ny)."""
        ...


@runtime_checkable
class Task(Protocol):
    """What a user wants: a reward and an end, as functions of the output y. Torch-traceable."""

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        """Reward (...) of one step. y, y_next: (..., ny); u: (..., nu)."""
        ...

    def terminated(self, y_next: Tensor) -> Tensor:
        """Whether the episode ends at y_next (..., ny): bool (...)."""
        ...


class TrainingWorld(Protocol):
    """What a training loop needs of a true world, MuJoCo's or not: to act in it, and to learn it in y."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> Task: ...
    @property
    def actions(self) -> Box: ...
    @property
    def features(self) -> Features:
        """What a learned model sees of y, and what it predicts."""
        ...

    def make(self, **options: Any) -> Any:
        """The Gymnasium environment."""
        ...

    def measure(self, obs: Any, info: Mapping[str, Any]) -> Tensor:
        """y (M, ny) of what `reset` or `step` of one environment, or of a vector of M, has returned."""
        ...

    def observe(self, y: Tensor) -> Tensor:
        """The environment's observation (..., nobs) of y (..., ny)."""
        ...


S = TypeVar("S")


@runtime_checkable
class Planner(Protocol[S]):
    """A frozen dataclass of hyper-parameters. State in, state out: it owns no model, device or RNG."""

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        """Raise `UnsupportedProblem`, naming the missing ability and the remedy."""
        ...

    def init(
        self, problem: Problem[Any, Any, Any], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> S:
        """A fresh state, a frozen dataclass of tensors with leading M. x0: (M, nx)."""
        ...

    def shift(self, state: S, actions_taken: Tensor, x_now: Tensor) -> S:
        """The state moved on by the executed actions (M, n, nu); x_now: (M, nx). Called by MPC only."""
        ...

    def plan(
        self, problem: Problem[Any, Any, Any], x0: Tensor, state: S, *, generator: Generator
    ) -> tuple[Plan, S]:
        """The plan from x0 (M, nx) and the new state. Never shifts."""
        ...


@runtime_checkable
class Policy(Protocol):
    """What acts in a world: MPC, a trained actor and a random policy are all one."""

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget the episode, of all M worlds or of those where mask (M,) is true."""
        ...

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        """Actions (M, nu) for the observations (M, nobs)."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """From what the world shows to the state that the planner starts from."""

    def reset(self, mask: Tensor | None = None) -> None: ...

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None, last_action: Tensor | None) -> Tensor:
        """x (M, nx) from obs (M, nobs), the info of the world, and the last action (M, nu) if any."""
        ...
