"""`check_planner`: the contract of planners, checked on a small linear-quadratic problem or on yours."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl.checks import fail, gap, same
from mbrl.derivatives import Euclidean
from mbrl.errors import ContractError, UnsupportedProblem
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Planner, Stochastic
from mbrl.rollout import evaluate


@dataclass(frozen=True)
class _Plant(Euclidean):
    """Two double integrators; NaN where an action exceeds `limit`. x = (p, v)."""

    limit: float = torch.inf
    nx: int = 4
    nu: int = 2
    ny: int = 4
    dt: float = 0.1

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        p, v = x[..., :2], x[..., 2:]
        x_next = torch.cat([p + self.dt * v + self.dt**2 / 2 * u, v + self.dt * u], -1)
        return torch.where((u > self.limit).any(-1, keepdim=True), torch.nan, x_next)

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        one, none = torch.eye(2).to(x), torch.zeros(2, 2).to(x)
        fx = torch.cat([torch.cat([one, self.dt * one], 1), torch.cat([none, one], 1)])
        fu = torch.cat([self.dt**2 / 2 * one, self.dt * one])
        return fx.expand(*x.shape[:-1], 4, 4), fu.expand(*x.shape[:-1], 4, 2)

    def curvature(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 4, 6, 6)

    def curvature_output(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 4, 4, 4)

    def output(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class _Effort:
    """Quadratic about `goal`; `bad` where the first action exceeds `limit`."""

    goal: float = 0.0
    limit: float = torch.inf
    bad: float = torch.nan

    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        cost = (y[..., :2] - self.goal).square().sum(-1) + 0.1 * y[..., 2:].square().sum(-1)
        cost = cost + 0.05 * u.square().sum(-1)
        return torch.where(u[..., 0] > self.limit, self.bad, cost)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return 5.0 * (y[..., :2] - self.goal).square().sum(-1)


def _small_problem(cost: _Effort | None = None, plant: _Plant | None = None) -> Problem[Any, Any, Box]:
    # Bounds that are neither symmetric nor alike, so that a mix-up of actions shows.
    box = Box(torch.tensor([-1.0, -2.0], dtype=torch.float64), torch.tensor([1.5, 1.0], dtype=torch.float64))
    return Problem(plant or _Plant(), cost or _Effort(), box, horizon=8)


def _small_x0(M: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(M, 4, generator=generator, dtype=torch.float64)


def check_planner(
    planner: Planner[Any],
    problem: Problem[Any, Any, Any] | None = None,
    x0: Tensor | None = None,
    *,
    seed: int = 0,
) -> None:
    """Check a planner against its contract on a built-in linear-quadratic problem and, if given, on yours.

    A frozen dataclass; shapes and dtype of plan and state; actions in the bounds; the cost that is reported
    is the cost of the actions returned; the same seed gives the same plan and no global random state is
    touched; rows of a batch are independent; nothing given is changed; shifting; warm starts that help;
    candidates whose cost is not finite are never chosen, and with none left the plan before stays.

    Args:
        planner: with its hyper-parameters. Without `budget_ms`, which depends on the machine.
        problem: one more problem to check on; for planners that refuse the built-in one, the only one.
        x0: (M, nx) with M ≥ 2 different states, needed with `problem`.
        seed: of the planner.

    Raises:
        ContractError: with what was needed, what came and what is most likely wrong.
        UnsupportedProblem: the planner refuses every problem there is.
    """
    name = type(planner).__name__
    parameters = getattr(type(planner), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        fail(
            name,
            "to be a frozen dataclass of hyper-parameters",
            "it is not",
            "a missing @dataclass(frozen=True); what changes belongs into the state",
        )
    if (problem is None) != (x0 is None):
        raise ContractError("check_planner needs problem and x0 together, or neither.")
    if problem is not None and x0 is not None:
        if x0.ndim != 2 or len(x0) < 2 or same(x0[0], x0[1]):
            raise ContractError(
                f"check_planner needs x0 (M, nx) with M ≥ 2 different rows, but got {tuple(x0.shape)}."
            )
        planner.check(problem)
        _check_plan(name, planner, problem, x0, seed)
        _check_shift(name, planner, problem, x0, seed)
    try:
        planner.check(_small_problem())
    except UnsupportedProblem:
        if problem is None:
            raise
        return
    _check_plan(name, planner, _small_problem(), _small_x0(), seed)
    _check_plan(name, planner, _small_problem(), _small_x0().float(), seed)
    _check_shift(name, planner, _small_problem(), _small_x0(), seed)
    _check_warm_start(name, planner, seed)
    _check_not_finite(name, planner, seed)


def _run(planner: Planner[Any], problem: Problem[Any, Any, Any], x0: Tensor, seed: int) -> tuple[Plan, Any]:
    generator = torch.Generator(x0.device).manual_seed(seed)
    state = planner.init(problem, x0, generator=generator)
    return planner.plan(problem, x0, state, generator=generator)


def _tensors(state: Any) -> dict[str, Tensor]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def check_planner_state(name: str, state: Any, M: int) -> None:
    """Refuse a planner's state that is no frozen dataclass of tensors with leading M."""
    parameters = getattr(type(state), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        fail(
            name,
            "a state that is a frozen dataclass",
            f"it is {type(state).__name__}",
            "a missing @dataclass(frozen=True)",
        )
    for field, value in _tensors(state).items():
        if not isinstance(value, Tensor) or value.ndim < 1 or value.shape[0] != M:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            fail(
                name,
                f"a state of tensors with leading M = {M}, so that finished rows can be reset",
                f"its field {field} has {got}",
                "a scalar or a built solver was stored; use a tensor (M,), and keep solvers outside",
            )


def _check_plan(
    name: str, planner: Planner[Any], problem: Problem[Any, Any, Any], x0: Tensor, seed: int
) -> None:
    M, H, nu = len(x0), problem.horizon, problem.dynamics.nu
    given = {"x0": x0, **_arrays(problem.actions)}
    if problem.params is not None:
        given["params"] = problem.params
    copies = {key: value.clone() for key, value in given.items()}
    randomness = _global_randomness()
    plan, state = _run(planner, problem, x0, seed)
    moved = [
        where
        for where, before, now in zip(
            ("torch", "numpy", "random"), randomness, _global_randomness(), strict=True
        )
        if before != now
    ]
    if moved:
        fail(
            name,
            "to draw from `generator` only",
            f"the global state of {', '.join(moved)} moved",
            "a draw without generator=",
        )
    for key, copy in copies.items():
        if not same(given[key], copy):
            fail(name, f"to leave {key} alone", "it changed", "an in-place operation on an argument")

    steps = plan.actions.shape[1] if plan.actions.ndim == 3 else -1
    if plan.actions.shape != (M, steps, nu) or not 1 <= steps <= H or (steps < H and plan.length is None):
        fail(
            name,
            f"actions (M, H, nu) = {(M, H, nu)}, or fewer steps with `length`",
            f"the plan has {tuple(plan.actions.shape)}",
            "an axis is missing: plans are batched over M problems",
        )
    if plan.actions.dtype != x0.dtype or plan.actions.device != x0.device:
        fail(
            name,
            f"actions of the dtype and device of x0, {x0.dtype} on {x0.device}",
            f"they are {plan.actions.dtype} on {plan.actions.device}",
            "a tensor was made without dtype= and device= of x0",
        )
    if plan.cost.shape != (M,):
        fail(name, f"cost (M,) = ({M},)", f"it is {tuple(plan.cost.shape)}", "a sum over a wrong axis")
    if plan.states is not None:
        if plan.states.shape != (M, steps + 1, problem.dynamics.nx):
            fail(
                name,
                f"states (M, H+1, nx) = {(M, steps + 1, problem.dynamics.nx)}",
                f"they are {tuple(plan.states.shape)}",
                "x0 is left out, or the candidates' axis is left in",
            )
        if not same(plan.states[:, 0], x0, 1e-6):
            fail(name, "states that start with x0", "they start elsewhere", "the first state is x1")
    _check_inside(name, problem, plan)
    check_planner_state(name, state, M)

    again, _ = _run(planner, problem, x0, seed)
    if not same(again.actions, plan.actions):
        fail(
            name,
            "the same plan from the same generator seed",
            gap(again.actions, plan.actions),
            "state kept in the planner or the problem, a draw without generator=, or budget_ms",
        )
    other = x0.clone()
    other[1] = x0[0] if len(x0) == 2 else x0[2]
    changed, _ = _run(planner, problem, other, seed)
    if not same(changed.actions[0], plan.actions[0], 1e-6):
        fail(
            name,
            "independent rows",
            f"another x0 in row 1 changed the plan of row 0: {gap(changed.actions[0], plan.actions[0])}",
            "a mean, minimum or temperature over the batch axis",
        )
    if not isinstance(problem.dynamics, Stochastic) and plan.length is None:
        fresh = evaluate(problem, problem.dynamics, x0, plan.actions[:, None]).cost[:, 0]
        if not same(plan.cost, fresh, 1e-3 if x0.dtype == torch.float32 else 1e-6):
            fail(
                name,
                "the cost of exactly the actions that are returned",
                f"against evaluate(problem, dynamics, x0, actions) {gap(plan.cost, fresh)}",
                "the cost of the best candidate is reported with the actions of the mean, or they are clipped later",
            )


def _check_inside(name: str, problem: Problem[Any, Any, Any], plan: Plan) -> None:
    if isinstance(problem.actions, Box):
        inside = problem.actions.contains(plan.actions)
        if not inside.all():
            row, k = (~inside).nonzero()[0].tolist()
            fail(
                name,
                "actions inside the bounds",
                f"row {row} takes {plan.actions[row, k].tolist()} in step {k}",
                "a spline overshoots its knots, or center + half_range · 1 rounds past the bound; clip at the end",
            )


def _arrays(actions: Any) -> dict[str, Tensor]:
    return {f"actions.{field.name}": getattr(actions, field.name) for field in dataclasses.fields(actions)}


def _global_randomness() -> tuple[str, str, str]:
    legacy = np.random.get_state(legacy=False)
    return str(torch.get_rng_state().tolist()), str(legacy["state"]), str(random.getstate())


def _check_shift(
    name: str, planner: Planner[Any], problem: Problem[Any, Any, Any], x0: Tensor, seed: int
) -> None:
    plan, state = _run(planner, problem, x0, seed)
    before = {key: value.clone() for key, value in _tensors(state).items()}
    for n in (1, min(3, plan.actions.shape[1])):
        moved = planner.shift(state, plan.actions[:, :n], x0)
        check_planner_state(name, moved, len(x0))
        for key, value in _tensors(moved).items():
            if value.shape != before[key].shape or value.dtype != before[key].dtype:
                fail(
                    name,
                    f"shift to keep the shape and dtype of the state's {key}, {tuple(before[key].shape)}",
                    f"after {n} steps it is {tuple(value.shape)} {value.dtype}",
                    "the steps taken are dropped and none are added at the end",
                )
        after, _ = planner.plan(problem, x0, moved, generator=torch.Generator(x0.device).manual_seed(seed))
        _check_inside(name, problem, after)
    for key, value in _tensors(state).items():
        if not same(value, before[key]):
            fail(
                name,
                "shift and plan to leave the given state alone",
                f"its {key} changed",
                "an in-place operation, or the state shares memory with the candidates",
            )


def _check_warm_start(name: str, planner: Planner[Any], seed: int) -> None:
    """On average over replans, the plan from a shifted state is not worse than one from a fresh state."""
    problem, x = _small_problem(), _small_x0(16)
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.Generator().manual_seed(seed + 1)
    state = planner.init(problem, x, generator=generator)
    plan, state = planner.plan(problem, x, state, generator=generator)
    warm, cold = [], []
    for _ in range(6):
        x = problem.dynamics.step(x, plan.actions[:, 0], 0)
        state = planner.shift(state, plan.actions[:, :1], x)
        plan, state = planner.plan(problem, x, state, generator=generator)
        warm.append(plan.cost.mean())
        cold.append(
            planner.plan(problem, x, planner.init(problem, x, generator=fresh), generator=fresh)[
                0
            ].cost.mean()
        )
    a, b = float(torch.stack(warm).mean()), float(torch.stack(cold).mean())
    # Planners that carry nothing over are even: a share for the luck of their draws.
    if not a <= 1.05 * b:
        fail(
            name,
            "a warm start that is not worse than a cold one on average",
            f"over 6 replans of 16 problems the mean cost is {a:.4g} warm and {b:.4g} cold",
            "shift moves the wrong way or by a wrong number of steps, or an old cost is compared with new ones",
        )


def _check_not_finite(name: str, planner: Planner[Any], seed: int) -> None:
    x0 = _small_x0()
    goal = 10.0  # far away, so that the cheapest finite plan lies at the edge of what is forbidden
    cases: tuple[tuple[str, Problem[Any, Any, Box], Callable[[Tensor], Tensor]], ...] = (
        ("a state of NaN", _small_problem(_Effort(goal), _Plant(limit=0.9)), lambda u: u.amax(-1)),
        ("a cost of NaN", _small_problem(_Effort(goal, 0.9, torch.nan)), lambda u: u[..., 0]),
        ("a cost of -inf", _small_problem(_Effort(goal, 0.9, -torch.inf)), lambda u: u[..., 0]),
    )
    for what, problem, measure in cases:
        plan, _ = _run(planner, problem, x0, seed)
        worst = float(measure(plan.actions).max())
        if not torch.isfinite(plan.cost).all() or worst > 0.9:
            fail(
                name,
                "never to choose a plan whose cost is not finite",
                f"where an action above 0.9 leads to {what}, it chose {worst:.3g} at a cost of {plan.cost.tolist()}",
                "NaN wins a comparison, or enters a mean with weight 0 (0 · NaN); mask with torch.where",
            )

    plan, state = _run(planner, _small_problem(), x0, seed)
    lost = _small_problem(plant=_Plant(limit=-torch.inf))
    kept, after = planner.plan(lost, x0, state, generator=torch.Generator().manual_seed(seed + 1))
    if not same(kept.actions, plan.actions, 1e-6) or not bool((kept.cost == torch.inf).all()):
        fail(
            name,
            "to keep the plan before and to report +inf where no candidate is finite",
            f"it costs {kept.cost.tolist()}, and of its actions and those before {gap(kept.actions, plan.actions)}",
            "a mean over candidates that all failed, or an argmin over NaN",
        )
    recovered, _ = planner.plan(
        _small_problem(), x0, after, generator=torch.Generator().manual_seed(seed + 2)
    )
    if not torch.isfinite(recovered.cost).all():
        fail(
            name,
            "to recover once candidates are finite again",
            f"the next plan costs {recovered.cost.tolist()}",
            "NaN entered the state",
        )
