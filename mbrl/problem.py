"""Problem and Plan: what every planner takes and what every planner returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from mbrl.errors import ContractError
from mbrl.protocols import Cost, Dynamics, RateCost, Stochastic, Task
from mbrl.risk import Mean, Risk


@dataclass(frozen=True)
class Box:
    """Actions between `low` and `high`, elementwise. low, high: (nu,), finite or ±inf."""

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if low.ndim != 1 or low.shape != high.shape:
            raise ContractError(
                f"Box needs low and high of one shape (nu,), but got {tuple(low.shape)} and {tuple(high.shape)}."
            )
        if not bool((low <= high).all()):  # also false for NaN
            bad = int((~(low <= high)).nonzero()[0, 0])
            raise ContractError(
                f"Box needs low ≤ high, but action {bad} has low {float(low[bad])} and high {float(high[bad])}."
            )

    @property
    def nu(self) -> int:
        return self.low.shape[0]

    @property
    def bounded(self) -> bool:
        """Whether every bound is finite."""
        return bool(torch.isfinite(self.low).all() and torch.isfinite(self.high).all())

    @property
    def center(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def half_range(self) -> Tensor:
        return (self.high - self.low) / 2

    def clip(self, u: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(u, self.high.to(u)), self.low.to(u))

    def contains(self, u: Tensor) -> Tensor:
        """Whether each action is inside and not NaN: (...) bool for u (..., nu)."""
        return ((u >= self.low.to(u)) & (u <= self.high.to(u))).all(-1)


@dataclass(frozen=True)
class Discrete:
    """A finite set of actions. values: (n, nu)."""

    values: Tensor

    @property
    def nu(self) -> int:
        return self.values.shape[-1]


@dataclass(frozen=True)
class Constraint:
    """g(y, u, k, p) ≤ 0 or = 0, along the path or at the end.

    Attributes:
        fun: g (..., n) of y (..., ny), u (..., nu), the step k and the parameters p of that step. Along the path it is
            asked at the steps 0 … H−1; at the end, u and k are None.
        soft: weight of an exact penalty, in units of cost per unit of g; None: it must hold.
        name: for messages; the name of `fun` unless given.
    """

    fun: Callable[..., Tensor]
    kind: Literal["le", "eq"] = "le"
    at: Literal["path", "terminal"] = "path"
    soft: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("le", "eq") or self.at not in ("path", "terminal"):
            raise ContractError(
                f'Constraint needs kind "le" or "eq" and at "path" or "terminal", but got {self.kind!r} and {self.at!r}.'
            )
        if self.soft is not None and not 0 < self.soft < math.inf:
            raise ContractError(f"Constraint needs soft > 0 and finite, or None, but got {self.soft}.")

    @property
    def label(self) -> str:
        return self.name or getattr(self.fun, "__name__", type(self.fun).__name__)


@dataclass(frozen=True)
class TaskCost:
    """The cost of a reward task: cost = -reward. The only place where the sign changes."""

    task: Task

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        reward = self.task.reward(y, u, y_next)
        if not isinstance(reward, Tensor) or not reward.is_floating_point():
            kind = reward.dtype if isinstance(reward, Tensor) else type(reward).__name__
            raise ContractError(
                f"reward of {type(self.task).__name__} must return a tensor of floats, but it returned {kind}."
            )
        return -reward

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros(y.shape[:-1], dtype=y.dtype, device=y.device)


@dataclass(frozen=True)
class Integral:
    """∫ ℓ dt of a cost that is a rate ℓ(y, u, p), per second.

    A step costs dt (ℓ(y, u, p) + ℓ(y_next, u, p)) / 2, for every planner. Nonlinear MPC minimises the integral by the
    quadrature of its transcription, which is of higher order, and reports it as `info["objective"]`.

    Attributes:
        cost: has `rate(y, u, p)` and `terminal(y, p)`, each (...).
        dt: seconds per step, of the dynamics.
    """

    cost: RateCost
    dt: float

    def __post_init__(self) -> None:
        if not self.dt > 0:
            raise ContractError(f"Integral needs dt > 0 s, but got {self.dt}.")

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return (self.cost.rate(y, u, p) + self.cost.rate(y_next, u, p)) * (self.dt / 2)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return self.cost.terminal(y, p)

    def rate(self, y: Tensor, u: Tensor, p: Tensor | None) -> Tensor:
        return self.cost.rate(y, u, p)


D = TypeVar("D", bound=Dynamics | Stochastic, covariant=True)
C = TypeVar("C", bound=Cost, covariant=True)
A = TypeVar("A", bound=Box | Discrete, covariant=True)


@dataclass(frozen=True)
class Problem(Generic[D, C, A]):
    """minimise  E Σₖ γᵏ ℓ(yₖ, uₖ, yₖ₊₁) + γᴴ (m(y_H) + V(x_H))   over u₀ … u_{H-1} in `actions`.

    Attributes:
        dynamics: `Dynamics`, or `Stochastic` (then `particles` realisations are averaged by `risk`).
        cost: stage and terminal cost; see `TaskCost` for reward tasks.
        actions: `Box` or `Discrete`.
        horizon: H, in steps.
        discount: γ.
        params: (H+1, np) or (M, H+1, np): references, commands, cost weights, handed to the cost.
        terminated: y_next (..., ny) -> bool or probability (...). The cost of the terminating step
            counts; nothing after it does.
        termination_cost: added once where an episode ends early.
        constraints: for planners that handle them.
        risk: how particle costs become one number.
        particles: P, for stochastic dynamics.
        terminal_value: x (..., nx) -> cost-to-go (...), learned or analytic.
    """

    dynamics: D
    cost: C
    actions: A
    horizon: int
    discount: float = 1.0
    params: Tensor | None = None
    terminated: Callable[[Tensor], Tensor] | None = None
    termination_cost: float = 0.0
    constraints: tuple[Constraint, ...] = ()
    risk: Risk = field(default_factory=Mean)
    particles: int = 1
    terminal_value: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ContractError(f"Problem needs a horizon of at least 1 step, but got {self.horizon}.")
        if self.particles < 1:
            raise ContractError(f"Problem needs at least 1 particle, but got {self.particles}.")
        if not 0 < self.discount <= 1:
            raise ContractError(f"Problem needs a discount in (0, 1], but got {self.discount}.")
        if not math.isfinite(self.termination_cost):
            raise ContractError(f"Problem needs a finite termination_cost, but got {self.termination_cost}.")
        if not callable(self.risk):
            raise ContractError(f"Problem needs a Risk, such as Mean() or CVaR(0.2), but got {self.risk!r}.")
        if self.actions.nu != self.dynamics.nu:
            raise ContractError(
                f"The actions have nu = {self.actions.nu}, but {type(self.dynamics).__name__} takes "
                f"nu = {self.dynamics.nu}."
            )
        if self.params is not None and (
            self.params.ndim not in (2, 3) or self.params.shape[-2] != self.horizon + 1
        ):
            raise ContractError(
                f"params needs one row per step, (H+1, np) = ({self.horizon + 1}, np), or (M, H+1, np), "
                f"but got {tuple(self.params.shape)}."
            )


AnyDynamics = TypeVar("AnyDynamics", bound=Dynamics | Stochastic)
AnyActions = TypeVar("AnyActions", bound=Box | Discrete)


def from_task(
    dynamics: AnyDynamics, task: Task, actions: AnyActions, horizon: int, **options: Any
) -> Problem[AnyDynamics, TaskCost, AnyActions]:
    """A problem that maximises the task's reward and ends where the task ends."""
    return Problem(dynamics, TaskCost(task), actions, horizon, terminated=task.terminated, **options)


@dataclass(frozen=True)
class Plan:
    """What a planner found.

    Attributes:
        actions: (M, H, nu), inside the bounds.
        cost: (M,), of exactly these actions, evaluated on an independent draw.
        states: (M, H+1, nx), predicted (of the first particle if there are several), or None.
        K: (M, H, nu, ndx) feedback gains, or None.
        length: (M,) valid steps where a planner may return fewer than H, or None.
        info: health numbers, each (M,) or a scalar. Sampling planners add "candidates" (M, n, H, nu):
            a few plans of their last iteration, for drawing.
    """

    actions: Tensor
    cost: Tensor
    states: Tensor | None = None
    K: Tensor | None = None
    length: Tensor | None = None
    info: Mapping[str, Tensor | float | int | str] = field(default_factory=dict)
