"""Model predictive control: the stateful shell that turns a planner into a policy."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Generator, Tensor

from mbrl.checkpoints import check_state
from mbrl.errors import ContractError, PlanWarning
from mbrl.estimators import Padded
from mbrl.following import FOLLOWED, either, follow, idle, later, predict, safe_action_of, upcoming
from mbrl.planner_checks import check_planner_state
from mbrl.problem import Plan, Problem
from mbrl.protocols import Estimator, Planner
from mbrl.usable import check_shapes, faults_of

T = TypeVar("T")


@dataclass(frozen=True)
class MPCReport:
    """What happened in one control step. Errors and the predicted cost are computed when they are asked for.

    Attributes:
        problem: what was solved.
        plan_ms: time spent in the planner; 0 where no plan was begun.
        fallback: (M,) bool, true where the plan that was begun is unusable and the old one goes on.
        plan: the plan that is being followed.
        x: (M, nx), the estimated state.
        expected: (M, nx), the state that had been predicted for now, or None where nothing had; NaN in the first step of
            a later episode.
        arrived: x, but with what a `Padded` estimator only adds as it was expected.
        k: the step of the plan that was taken.
        followed: (M,) where the action comes from, an index into `FOLLOWED`: "gains", "plan" or "safe".
        begun: the plan that was begun, or None.
        delay: control steps until it is followed, or None.
    """

    problem: Problem[Any, Any, Any]
    plan_ms: float
    fallback: Tensor
    plan: Plan
    x: Tensor
    expected: Tensor | None
    arrived: Tensor
    k: int
    followed: Tensor
    begun: Plan | None
    delay: int | None

    @cached_property
    def state_error(self) -> Tensor | None:
        """(M,) max |predicted − realised| of the state that was just reached; None at first, NaN where nothing was predicted.

        Exactly 0 where the model is the plant; else it is ruled by solver internals that a state may hold, such as
        MuJoCo's warm start.
        """
        return None if self.expected is None else (self.expected - self.arrived).abs().amax(-1)

    @cached_property
    def output_error(self) -> Tensor | None:
        """(M,) the same of the output y, what the task reads."""
        if self.expected is None:
            return None
        output = self.problem.dynamics.output
        error: Tensor = (output(self.expected) - output(self.arrived)).abs().amax(-1)
        return error

    @cached_property
    def predicted_cost(self) -> Tensor | None:
        """(M,) stage cost that the plan expects of its action, or None; NaN where the plan has run out."""
        plan, k, p = self.plan, self.k, self.problem.params
        if plan.states is None:
            return None
        if k >= plan.actions.shape[1]:
            return torch.full_like(plan.cost, torch.nan)
        output = self.problem.dynamics.output
        p_k = None if p is None else (p[k] if p.ndim == 2 else p[:, k])
        cost: Tensor = self.problem.cost.stage(
            output(plan.states[:, k]), plan.actions[:, k], output(plan.states[:, k + 1]), k, p_k
        )
        return cost if plan.length is None else torch.where(k < plan.length, cost, torch.nan)


@dataclass(frozen=True)
class Pending:
    """A plan that is being computed. It is followed from the control step `arrives` on; its step 0 is that of `begins`.

    usable: (M,) the rows that are to be followed.
    """

    plan: Plan
    usable: Tensor
    begins: int
    arrives: int


class MPC:
    """Plans from the estimated state, executes the first actions, shifts, plans again. A `Policy`.

    Plans are indexed by absolute time. The one that is followed gives at each step the best that can be had of three,
    counted in `followed`: its action corrected by its feedback gains, clip(ū + K (x ⊖ x̄)), if it has any; its action
    as it is, where the state is not finite; the safe action, where the plan has run out or there is none.

    A plan that is not finite, leaves the bounds, has no finite cost or is too short is not followed: the
    old plan goes on, with its gains. This is counted in `fallbacks`, and warned about once. Rows whose state is not
    finite fare the same.

    With a latency, a plan is followed only so many steps after it was begun. It is made for the state that the model
    predicts for then, under the old plan, which is followed until then; the next one is begun when it is there.

    Args:
        problem: what to solve. Its `params` stay as they are given, for the steps of a plan: a moving reference is
            moved by setting `mpc.problem` to a copy with new params. With a latency their first row is that of the step
            at which the plan arrives.
        planner: how; its `check` runs now, so a mismatch fails here and not at step 400.
        estimator: from observation and info to the state.
        generator: all randomness of the planner.
        replan_every: steps from the beginning of one plan to that of the next.
        guess: a plan to start the first search from.
        latency: control steps that planning takes, or "measured": the time that each plan took, over the problem's dt,
            rounded up, and expected of the next plan too. Results then depend on the machine.
        safe_action: (nu,), the middle of the bounds unless given.

    Raises:
        UnsupportedProblem: the problem lacks an ability that the planner needs.
        ContractError: the planner returned a plan or a state of wrong types or shapes, no row's first state is finite,
            or the number of problems M changed without a `reset`.

    Reference: Howell et al. 2022, "Predictive sampling: real-time behaviour synthesis with MuJoCo", for plans that are
        indexed by time while the next one is computed.
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
        latency: int | Literal["measured"] = 0,
        safe_action: Tensor | None = None,
    ):
        if not 1 <= replan_every <= problem.horizon:
            raise ContractError(
                f"MPC needs 1 ≤ replan_every ≤ horizon = {problem.horizon}, but got {replan_every}."
            )
        if latency != "measured" and (
            not isinstance(latency, int) or isinstance(latency, bool) or not 0 <= latency <= problem.horizon
        ):
            raise ContractError(
                f"MPC needs a latency of 0 to horizon = {problem.horizon} control steps, or "
                f'"measured", but got {latency!r}.'
            )
        planner.check(problem)
        self.problem, self.planner, self.estimator = problem, planner, estimator
        self.generator, self.replan_every, self.guess = generator, replan_every, guess
        self.latency = latency
        self.safe_action = safe_action_of(problem, safe_action)
        self.fallbacks = 0
        self.followed = dict.fromkeys(FOLLOWED, 0)
        self.report: MPCReport | None = None
        self._clear()

    def _clear(self) -> None:
        self._state: Any = None
        self._now = 0  # control steps since the start
        self._plan: Plan | None = None
        self._begins = 0  # the control step of the plan's step 0
        self._pending: Pending | None = None
        self._begun: int | None = None  # when the last plan was
        self._took = 0  # control steps, where they are measured
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
            return
        if not mask.any():
            return
        steps = self._plan.actions.shape[1]
        self._plan = either(self._plan, ~mask, later(self._plan, steps, steps, self.safe_action))
        if self._pending is not None:
            self._pending = dataclasses.replace(self._pending, usable=self._pending.usable & ~mask)
        self._restart = mask if self._restart is None else self._restart | mask
        if self._last_action is not None:
            self._last_action = torch.where(mask[:, None], 0.0, self._last_action)

    def change(self, problem: Problem[Any, Any, Any], planner: Planner[Any]) -> None:
        """From the next plan on solve `problem` by `planner`, whose search starts from the last plan's actions.

        The plan that is followed goes on until the next one is there. The horizon may change: what a longer one lacks
        is filled with the safe action.

        Raises:
            UnsupportedProblem: as for a new MPC; nothing has changed then.
            ContractError: likewise; or the horizon is shorter than a plan must be.
        """
        if problem.horizon < self._least:
            raise ContractError(
                f"MPC needs a horizon of {self._least} steps or more, for so long a plan is followed, "
                f"but got {problem.horizon}."
            )
        planner.check(problem)
        state = None
        if self._plan is not None and self.report is not None:
            last = self._plan if self._pending is None else self._completed(self._pending)
            guess = Plan(upcoming(last, 0, problem.horizon, self.safe_action), last.cost)
            state = planner.init(problem, self.report.x, generator=self.generator, guess=guess)
            check_planner_state(type(planner).__name__, state, len(last.actions))
        self.problem, self.planner, self._state = problem, planner, state

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, as a tree of tensors for a checkpoint; a stateful estimator is not in it."""
        pending = None if self._pending is None else _fields(self._pending)
        return {
            "planner": None if self._state is None else _fields(self._state),
            "plan": None if self._plan is None else _numbers(self._plan),
            "pending": None if pending is None else {**pending, "plan": _numbers(pending["plan"])},
            "now": self._now,
            "begins": self._begins,
            "begun": self._begun,
            "took": self._took,
            "restart": self._restart,
            "last_action": self._last_action,
            "fallbacks": self.fallbacks,
            "followed": dict(self.followed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an MPC with the same problem and planner.

        Raises:
            ContractError: it is of another planner, or of other sizes.
        """
        trees, numbers = ("planner", "plan", "pending"), ("now", "begins", "took", "fallbacks")
        check_state("MPC", state, dict.fromkeys(trees, dict | None) | dict.fromkeys(numbers, int))
        check_state("MPC", state, {"begun": int | None, "followed": dict})
        check_state("MPC", state, {"restart": Tensor | None, "last_action": Tensor | None})
        self._clear()
        self._now, self._begins, self._begun = state["now"], state["begins"], state["begun"]
        self._took, self._restart, self._last_action = state["took"], state["restart"], state["last_action"]
        self.fallbacks, self.followed = state["fallbacks"], dict(state["followed"])
        if state["plan"] is not None:
            self._plan = Plan(**state["plan"])
        if state["pending"] is not None:
            self._pending = Pending(**{**state["pending"], "plan": Plan(**state["pending"]["plan"])})
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
        expected, arrived = self._expected(x)
        self._arrive()
        plan_ms, fallback = 0.0, torch.zeros(len(x), dtype=torch.bool)
        begun, delay = None, None
        if self._pending is None and (
            self._begun is None or self._now - self._begun >= self.replan_every or self._restart is not None
        ):
            if self.latency == "measured" and self._begun is None:
                self._warm_up(x)
            tic = time.perf_counter()
            self._pending = self._begin(x)
            plan_ms = 1e3 * (time.perf_counter() - tic)
            begun, fallback = self._pending.plan, ~self._pending.usable
            if self.latency == "measured":
                self._took = math.ceil(1e-3 * plan_ms / self.problem.dynamics.dt)
                self._pending = dataclasses.replace(self._pending, arrives=self._now + self._took)
            delay = max(self._pending.begins, self._pending.arrives) - self._now
            self._arrive()
        assert self._plan is not None  # _begin sets it
        plan, k = self._plan, self._now - self._begins
        action, followed = follow(self.problem, plan, k, x, self.safe_action)
        for name, rows in zip(FOLLOWED, followed.bincount(minlength=len(FOLLOWED)).tolist(), strict=True):
            self.followed[name] += rows
        self._now += 1
        self._last_action = action
        self.report = MPCReport(
            problem=self.problem,
            plan_ms=plan_ms,
            fallback=fallback,
            plan=plan,
            x=x,
            expected=expected,
            arrived=arrived,
            k=k,
            followed=followed,
            begun=begun,
            delay=delay,
        )
        return action

    def _expected(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Where the plan expected to be now, (M, nx), and x (M, nx), completed by it: what is not measured cannot be
        compared."""
        if self._plan is None or self._plan.states is None:
            return None, x
        k, states = self._now - self._begins, self._plan.states
        expected = states[:, k] if k < states.shape[1] else torch.full_like(x, torch.nan)
        estimator = self.estimator
        return expected, estimator.completed(x, expected) if isinstance(estimator, Padded) else x

    def _arrive(self) -> None:
        """Follow the plan that is being computed, if its time has come."""
        new = self._pending
        if new is None or self._now < max(new.begins, new.arrives):
            return
        self._plan, self._begins, self._pending = self._completed(new), new.begins, None

    def _completed(self, new: Pending) -> Plan:
        """The plan that is being computed; in the rows where it is unusable, the one that is followed, at the same time."""
        if new.usable.all():
            return new.plan
        assert self._plan is not None  # _begin sets it
        n, steps = new.begins - self._begins, new.plan.actions.shape[1]
        return either(new.plan, new.usable, later(self._plan, n, steps, self.safe_action))

    def _begin(self, x: Tensor) -> Pending:
        """Plan from where x (M, nx) will have led when the plan arrives."""
        problem = self.problem
        if problem.params is not None and problem.params.ndim == 3 and len(problem.params) != len(x):
            raise ContractError(
                f"MPC needs params (M, H+1, np) for M = {len(x)} problems, but got {tuple(problem.params.shape)}."
            )
        if self._plan is None:
            self._plan, self._begins = idle(problem, x, self.safe_action), self._now
        old, k = self._plan, self._now - self._begins
        ahead = min(self._took, problem.horizon) if self.latency == "measured" else self.latency
        if ahead:
            x = predict(problem, old, k, x, ahead, self.safe_action, generator=self.generator)
        known = torch.isfinite(x).all(-1)
        if known.any() or self._begun is None:
            plan, faults = self._search(x, known, upcoming(old, 0, k + ahead, self.safe_action))
        else:
            plan, faults, self._state = old, {"the state is not finite": ~known}, None
        self._begun, self._restart = self._now, None
        usable = ~torch.stack(list(faults.values())).any(0)
        if not usable.all() and not self.fallbacks:
            row = int((~usable).nonzero()[0, 0])
            fault = next(text for text, rows in faults.items() if rows[row])
            told = plan.info.get("explanation")
            fault = f"{fault} ({told})" if told else fault
            warnings.warn(
                f"A plan of {type(self.planner).__name__} for row {row} is not followed: {fault}. An older plan, or "
                "the safe action, is followed instead. This is said once; `fallbacks` counts.",
                PlanWarning,
                stacklevel=3,
            )
        self.fallbacks += int((~usable).sum())
        return Pending(plan, usable, self._now + ahead, self._now + ahead)

    def _warm_up(self, x: Tensor) -> None:
        """Plan once for nothing: what happens only once, imports and compilation, is no latency of a plan."""
        if torch.isfinite(x).all():
            aside = torch.Generator(self.generator.device)
            aside.set_state(self.generator.get_state())
            state = self.planner.init(self.problem, x, generator=aside, guess=self.guess)
            self.planner.plan(self.problem, x, state, generator=aside)

    def _search(self, x: Tensor, known: Tensor, taken: Tensor) -> tuple[Plan, dict[str, Tensor]]:
        """The planner's plan from x, and what is wrong with it in which rows (M,).

        Args:
            known: (M,), where x is finite.
            taken: (M, n, nu), what is done between the beginnings of the planner's last plan and of this one.
        """
        problem = self.problem
        if known.any() and not known.all():  # one lost row must not stop the others
            x = torch.where(known[:, None], x, x[known][0])
        if self._state is None:
            self._state = self.planner.init(problem, x, generator=self.generator, guess=self.guess)
            check_planner_state(type(self.planner).__name__, self._state, len(x))
        else:
            self._state = self.planner.shift(self._state, taken, x)
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
        check_shapes(type(self.planner).__name__, plan, problem, M=len(x), least=self._least)
        faults = {"the state is not finite": ~known, **faults_of(plan, problem, least=self._least)}
        broken = ~(known & torch.isfinite(plan.actions).all((-1, -2)))
        if broken.any():  # or the planner could start from NaN for ever
            fresh = self.planner.init(problem, x, generator=self.generator, guess=self.guess)
            self._state = where(broken, fresh, self._state)
        return plan, faults

    @property
    def _least(self) -> int:
        """Steps that a plan must have: it is followed for so long."""
        return self.replan_every if self.latency == "measured" else max(self.replan_every, self.latency)


def _numbers(plan: Plan) -> dict[str, Any]:
    return {name: value for name, value in _fields(plan).items() if name != "info"}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def where(mask: Tensor, a: T, b: T) -> T:
    """Rows of the dataclass `a` where mask (M,) is true, else of `b`: its tensors have leading M."""
    fields = {}
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        new, old = getattr(a, field.name), getattr(b, field.name)
        fields[field.name] = torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return dataclasses.replace(a, **fields)  # type: ignore[type-var]
