"""Model predictive control: the stateful shell that turns a planner into a policy."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from mbrl.checkpoints import check_state
from mbrl.errors import ContractError, PlanWarning
from mbrl.estimators import Padded
from mbrl.planner_checks import check_planner_state
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Estimator, Planner

T = TypeVar("T")


@dataclass(frozen=True)
class MPCReport:
    """What happened in one control step.

    Attributes:
        plan_ms: time spent in the planner; 0 where an old plan was followed.
        state_error: (M,) max |predicted − realised| of the state x that was just reached, or None at first;
            NaN in the first step of a later episode. Exactly 0 where the model is the plant; else it is
            ruled by solver internals, such as MuJoCo's warm start, that a state may hold. What a `Padded` estimator
            only adds is left out.
        output_error: (M,) the same of the output y, what the task reads.
        predicted_cost: (M,) stage cost that the plan expects of the action returned, or None.
        fallback: (M,) bool, true where the new plan was unusable and the old one was followed.
        plan: the plan that is being followed.
        x: (M, nx), the state that was planned from.
    """

    plan_ms: float
    state_error: Tensor | None
    output_error: Tensor | None
    predicted_cost: Tensor | None
    fallback: Tensor
    plan: Plan
    x: Tensor


class MPC:
    """Plans from the estimated state, executes the first actions, shifts, plans again. A `Policy`.

    A plan that comes with feedback gains K is followed with them between replans: clip(ū + K (x ⊖ x̄)).

    A plan that is not finite, leaves the bounds, has no finite cost or is too short is not followed: the
    old plan goes on, moved in time, or the middle of the bounds where there is none. This is counted in
    `fallbacks`, and warned about once. Rows whose state is not finite fare the same.

    Args:
        problem: what to solve. Its `params` stay as they are given: a moving reference is moved by
            setting `mpc.problem` to a copy with new params.
        planner: how; its `check` runs now, so a mismatch fails here and not at step 400.
        estimator: from observation and info to the state.
        generator: all randomness of the planner.
        replan_every: steps to follow a plan before the next one.
        guess: a plan to start the first search from.

    Raises:
        UnsupportedProblem: the problem lacks an ability that the planner needs.
        ContractError: the planner returned a plan or a state of wrong types or shapes, no row's state is finite,
            or the number of problems M changed without a `reset`.
    """

    def __init__(
        self,
        problem: Problem[Any, Any, Any],
        planner: Planner[Any],
        *,
        estimator: Estimator,
        generator: Generator,
        replan_every: int = 1,
        guess: Plan | None = None,
    ):
        if not 1 <= replan_every <= problem.horizon:
            raise ContractError(
                f"MPC needs 1 ≤ replan_every ≤ horizon = {problem.horizon}, but got {replan_every}."
            )
        planner.check(problem)
        self.problem, self.planner, self.estimator = problem, planner, estimator
        self.generator, self.replan_every, self.guess = generator, replan_every, guess
        self.fallbacks = 0
        self.report: MPCReport | None = None
        self._clear()

    def _clear(self) -> None:
        self._state: Any = None
        self._plan: Plan | None = None
        self._used = 0  # actions of the plan that were executed
        self._restart: Tensor | None = None  # (M,) rows whose episode ended
        self._last_action: Tensor | None = None

    def reset(self, mask: Tensor | None = None) -> None:
        if mask is not None:
            mask = torch.as_tensor(mask)
            rows = mask.shape if self._plan is None else self._plan.cost.shape
            if mask.dtype != torch.bool or mask.shape != rows:
                raise ContractError(
                    f"MPC.reset needs one bool per problem, (M,) = {tuple(rows)}, "
                    f"but got {tuple(mask.shape)} of {mask.dtype}."
                )
        self.estimator.reset(mask)
        if mask is None or self._plan is None:
            self._clear()
        else:
            self._restart = mask if self._restart is None else self._restart | mask
            if self._last_action is not None:
                self._last_action = torch.where(mask[:, None], 0.0, self._last_action)

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, as a tree of tensors for a checkpoint; a stateful estimator is not in it."""
        plan = self._plan
        return {
            "planner": None if self._state is None else _fields(self._state),
            "plan": None
            if plan is None
            else {name: value for name, value in _fields(plan).items() if name != "info"},
            "used": self._used,
            "restart": self._restart,
            "last_action": self._last_action,
            "fallbacks": self.fallbacks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an MPC with the same problem and planner.

        Raises:
            ContractError: it is of another planner, or of other sizes.
        """
        check_state(
            "MPC", state, {"planner": dict | None, "plan": dict | None, "used": int, "fallbacks": int}
        )
        check_state("MPC", state, {"restart": Tensor | None, "last_action": Tensor | None})
        self._clear()
        self._used, self._restart, self._last_action = state["used"], state["restart"], state["last_action"]
        self.fallbacks = state["fallbacks"]
        if state["plan"] is not None:
            self._plan = Plan(**state["plan"])
        if state["planner"] is not None:
            like = state["plan"]["actions"]
            x0 = like.new_zeros(len(like), self.problem.dynamics.nx)
            aside = torch.Generator(self.generator.device)  # the planner's own must not move
            fresh = self.planner.init(self.problem, x0, generator=aside, guess=self.guess)
            wanted, given = ({n: v.shape for n, v in s.items()} for s in (_fields(fresh), state["planner"]))
            if given != wanted:
                raise ContractError(
                    f"{type(self.planner).__name__} needs a state of {wanted}, but got {given}."
                )
            self._state = dataclasses.replace(fresh, **state["planner"])

    def __call__(self, obs: Tensor, info: Mapping[str, Any] | None = None) -> Tensor:
        x = self.estimator(obs, info, self._last_action)
        if self._plan is not None and len(x) != len(self._plan.actions):
            raise ContractError(
                f"MPC plans for M = {len(self._plan.actions)} problems, but got {len(x)} states. "
                "Call reset() before their number changes."
            )
        output = self.problem.dynamics.output
        state_error = output_error = None
        if self._plan is not None and self._plan.states is not None:
            expected = self._plan.states[:, self._used]
            # What is not measured cannot be compared.
            found = self.estimator.completed(x, expected) if isinstance(self.estimator, Padded) else x
            state_error = (expected - found).abs().amax(-1)
            output_error = (output(expected) - output(found)).abs().amax(-1)
            if self._restart is not None:  # another episode was not predicted
                state_error = torch.where(self._restart, torch.nan, state_error)
                output_error = torch.where(self._restart, torch.nan, output_error)
        plan_ms, fallback = 0.0, torch.zeros(len(x), dtype=torch.bool)
        if self._plan is None or self._used >= self.replan_every or self._restart is not None:
            tic = time.perf_counter()
            fallback = self._replan(x)
            plan_ms = 1e3 * (time.perf_counter() - tic)
        assert self._plan is not None  # _replan sets it
        plan, k = self._plan, self._used
        predicted = None
        if plan.states is not None:
            p = self.problem.params
            p_k = None if p is None else (p[k] if p.ndim == 2 else p[:, k])
            predicted = self.problem.cost.stage(
                output(plan.states[:, k]), plan.actions[:, k], output(plan.states[:, k + 1]), k, p_k
            )
        action = self._corrected(plan, k, x)
        self._used += 1
        self._last_action = action
        self.report = MPCReport(plan_ms, state_error, output_error, predicted, fallback, plan, x)
        return action

    def _corrected(self, plan: Plan, k: int, x: Tensor) -> Tensor:
        """The plan's action (M, nu) at step k, with its feedback on how far x is from where it expected to be."""
        action, dynamics = plan.actions[:, k], self.problem.dynamics
        if k == 0 or plan.K is None or plan.states is None:
            return action
        expected = plan.states[:, k]
        dx = dynamics.difference(expected, x) if hasattr(dynamics, "difference") else x - expected
        moved = action + (plan.K[:, k] @ dx.to(action)[..., None])[..., 0]
        if isinstance(self.problem.actions, Box):
            moved = self.problem.actions.clip(moved)
        # Where an old plan is followed, or x is lost, there is nothing to correct by.
        return torch.where(torch.isfinite(moved).all(-1, keepdim=True), moved, action)

    def _replan(self, x: Tensor) -> Tensor:
        """Plan from x and keep the result; return where it was unusable and the old plan goes on (M,)."""
        problem, old, used = self.problem, self._plan, self._used
        if problem.params is not None and problem.params.ndim == 3 and len(problem.params) != len(x):
            raise ContractError(
                f"MPC needs params (M, H+1, np) for M = {len(x)} problems, but got {tuple(problem.params.shape)}."
            )
        known = torch.isfinite(x).all(-1)
        if known.any() and not known.all():  # one lost row must not stop the others
            x = torch.where(known[:, None], x, x[known][0])
        if self._state is None:
            self._state = self.planner.init(problem, x, generator=self.generator, guess=self.guess)
            check_planner_state(type(self.planner).__name__, self._state, len(x))
        elif old is not None:
            self._state = self.planner.shift(self._state, old.actions[:, :used], x)
        if self._restart is not None:
            fresh = self.planner.init(problem, x, generator=self.generator, guess=self.guess)
            self._state = where(self._restart, fresh, self._state)

        returned: Any = self.planner.plan(problem, x, self._state, generator=self.generator)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Plan)):
            raise ContractError(
                f"{type(self.planner).__name__}.plan must return a Plan and the next state, "
                f"but returned a {type(returned).__name__}."
            )
        plan: Plan = returned[0]
        self._state = returned[1]
        self._check_plan(plan, len(x))
        steps = plan.actions.shape[1]
        finite = torch.isfinite(plan.actions).all((-1, -2))
        inside = torch.ones_like(finite)
        if isinstance(problem.actions, Box):
            inside = problem.actions.contains(plan.actions).all(-1)
        priced = ~torch.isnan(plan.cost) & (plan.cost < torch.inf)
        long = torch.ones_like(finite) if plan.length is None else plan.length >= self.replan_every
        usable = known & finite & inside & priced & long
        broken = ~(known & finite)
        if broken.any():  # or the planner could start from NaN for ever
            fresh = self.planner.init(problem, x, generator=self.generator, guess=self.guess)
            self._state = where(broken, fresh, self._state)
        if not usable.all() and not self.fallbacks:
            reasons = {
                "the state is not finite": known,
                "its actions are not finite": finite | ~known,
                "its actions leave the bounds": inside | ~finite,
                "its cost is not finite: every candidate diverged, or the task returns NaN": priced,
                f"it has fewer than {self.replan_every} valid steps": long,
            }
            reason = next(text for text, fine in reasons.items() if not fine.all())
            warnings.warn(
                f"A plan of {type(self.planner).__name__} for row {int((~usable).nonzero()[0, 0])} is not followed: "
                f"{reason}. An older plan, or the middle of the bounds, is followed instead. This is said once; "
                "`fallbacks` counts.",
                PlanWarning,
                stacklevel=3,
            )
        if not usable.all():
            rest = self._default(plan.actions)
            if old is not None:
                end = old.actions[:, -1:].expand(-1, steps, -1)  # plans may differ in length
                moved = torch.cat([old.actions[:, used:], end], 1)[:, :steps]
                rest = (
                    moved if self._restart is None else torch.where(self._restart[:, None, None], rest, moved)
                )
            actions = torch.where(usable[:, None, None], plan.actions, rest)
            states = plan.states
            if states is not None:  # what is predicted of an abandoned plan says nothing of the old one
                states = torch.where(usable[:, None, None], states, torch.nan)
            plan = dataclasses.replace(plan, actions=actions, states=states)
            self.fallbacks += int((~usable).sum())
        self._plan, self._used, self._restart = plan, 0, None
        return ~usable

    def _check_plan(self, plan: Plan, M: int) -> None:
        """Refuse what is no tensor or of a wrong shape: it would broadcast, or fail far from here."""
        H, dynamics = self.problem.horizon, self.problem.dynamics
        shape: tuple[int, ...] = getattr(plan.actions, "shape", ())
        steps = shape[1] if len(shape) == 3 and self.replan_every <= shape[1] <= H else H
        wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
            "actions (M, H, nu)": (plan.actions, (M, steps, dynamics.nu)),
            "cost (M,)": (plan.cost, (M,)),
        }
        if plan.states is not None:
            wanted["states (M, H+1, nx), x0 first,"] = (plan.states, (M, steps + 1, dynamics.nx))
        if plan.K is not None:
            ndx = getattr(dynamics, "ndx", dynamics.nx)
            wanted["K (M, H, nu, ndx)"] = (plan.K, (M, steps, dynamics.nu, ndx))
        if plan.length is not None:
            wanted["length (M,)"] = (plan.length, (M,))
        for what, (value, sizes) in wanted.items():
            if not isinstance(value, Tensor) or value.shape != sizes:
                got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise ContractError(
                    f"{type(self.planner).__name__}.plan must return {what} = {sizes}, but returned {got}."
                )

    def _default(self, like: Tensor) -> Tensor:
        """The action to take where there is no plan at all: the middle of the bounds, or what is nearest to 0."""
        actions = self.problem.actions
        if isinstance(actions, Box):
            middle = torch.where(
                torch.isfinite(actions.center), actions.center, actions.clip(torch.zeros_like(actions.low))
            )
        else:
            middle = actions.values[0]
        return middle.to(like).expand_as(like)


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def where(mask: Tensor, a: T, b: T) -> T:
    """Rows of the dataclass `a` where mask (M,) is true, else of `b`: its tensors have leading M."""
    fields = {}
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        new, old = getattr(a, field.name), getattr(b, field.name)
        fields[field.name] = torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return dataclasses.replace(a, **fields)  # type: ignore[type-var]
