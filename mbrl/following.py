"""Following a plan: at its own time, with its feedback gains, and what is done where that is impossible."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.problem import Box, Plan, Problem
from mbrl.rollout import realize

FOLLOWED = ("gains", "plan", "safe")
"""Where an action comes from, the best first: the plan corrected by its gains, the plan as it is, the safe action."""


def follow(
    problem: Problem[Any, Any, Any], plan: Plan, k: int, x: Tensor, safe: Tensor
) -> tuple[Tensor, Tensor]:
    """The action at step k of a plan, in the state x (M, nx): the best that can be had of

        clip(ūₖ + Kₖ (x ⊖ x̄ₖ))    where the plan has gains and states, and this is finite
        ūₖ                        where it has not, or x is lost
        the safe action           where the plan has run out

    Args:
        safe: (nu,).

    Returns:
        Actions (M, nu), and which of `FOLLOWED` each is, (M,).
    """
    M, steps, _ = plan.actions.shape
    safe = safe.to(plan.actions).expand(M, -1)
    if k >= steps:
        return safe, torch.full((M,), FOLLOWED.index("safe"), device=x.device)
    action, box = plan.actions[:, k], problem.actions
    if isinstance(box, Box):
        action = box.clip(action)  # the problem may have been changed since the plan was made
    followed = torch.full((M,), FOLLOWED.index("plan"), device=x.device)
    if plan.K is not None and plan.states is not None:
        expected, dynamics = plan.states[:, k], problem.dynamics
        dx = dynamics.difference(expected, x) if hasattr(dynamics, "difference") else x - expected
        moved = action + (plan.K[:, k] @ dx.to(action)[..., None])[..., 0]
        if isinstance(box, Box):
            moved = box.clip(moved)
        # On a manifold x ⊖ x is 0 to rounding only.
        moved = torch.where((x == expected).all(-1, keepdim=True), action, moved)
        finite = torch.isfinite(moved).all(-1)
        action = torch.where(finite[:, None], moved, action)
        followed = torch.where(finite, FOLLOWED.index("gains"), followed)
    if plan.length is not None:
        over = k >= plan.length
        action = torch.where(over[:, None], safe, action)
        followed = torch.where(over, FOLLOWED.index("safe"), followed)
    return action, followed


def predict(
    problem: Problem[Any, Any, Any],
    plan: Plan,
    k: int,
    x: Tensor,
    steps: int,
    safe: Tensor,
    *,
    generator: Generator,
) -> Tensor:
    """The state (M, nx) after following the plan for some steps, from x at its step k; of one draw of `Stochastic` dynamics."""
    dynamics, _ = realize(dataclasses.replace(problem, particles=1), generator=generator)
    for i in range(k, k + steps):
        action, _ = follow(problem, plan, i, x, safe)
        at = min(i, problem.horizon - 1)  # a plan that has run out has no step of its own
        x = dynamics.step(x[:, None], action[:, None], at)[:, 0]
    return x


def idle(problem: Problem[Any, Any, Any], x: Tensor, safe: Tensor) -> Plan:
    """A plan of no valid step: the safe action, whatever happens."""
    M = len(x)
    return Plan(
        actions=safe.to(x).expand(M, problem.horizon, -1),
        cost=x.new_full((M,), torch.nan),
        length=torch.zeros(M, dtype=torch.long, device=x.device),
    )


def upcoming(plan: Plan, n: int, steps: int, safe: Tensor) -> Tensor:
    """The plan's actions (M, steps, nu) from its step n on; where it has run out, the safe action."""
    kept = plan.actions[:, n : n + steps]
    missing = steps - kept.shape[1]
    return torch.cat([kept, safe.to(kept).expand(len(kept), missing, -1)], 1) if missing else kept


def later(plan: Plan, n: int, steps: int, safe: Tensor) -> Plan:
    """The plan from its step n on, `steps` long; where it has run out, the safe action and no prediction."""
    M, before, _ = plan.actions.shape

    def cut(values: Tensor, count: int, fill: Tensor) -> Tensor:
        kept = values[:, n : n + count]
        return torch.cat([kept, fill.to(kept).expand(M, count - kept.shape[1], *kept.shape[2:])], 1)

    nan = plan.cost.new_tensor(torch.nan)
    length = torch.full((M,), before, device=plan.cost.device) if plan.length is None else plan.length
    return dataclasses.replace(
        plan,
        actions=upcoming(plan, n, steps, safe),
        states=None if plan.states is None else cut(plan.states, steps + 1, nan),
        K=None if plan.K is None else cut(plan.K, steps, nan),
        length=(length - n).clamp(0, steps),
    )


def either(new: Plan, usable: Tensor, old: Plan) -> Plan:
    """The rows of a new plan that are usable (M,); in the others, the old one, as long and at the same time."""
    if usable.all():
        return new

    def rows(a: Tensor, b: Tensor | None) -> Tensor:
        b = a.new_tensor(torch.nan) if b is None else b.to(a)
        return torch.where(usable.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    steps = new.actions.shape[1]
    length = torch.full_like(usable, steps, dtype=torch.long) if new.length is None else new.length
    return dataclasses.replace(
        new,
        actions=rows(new.actions, old.actions),
        states=None if new.states is None else rows(new.states, old.states),
        K=None if new.K is None else rows(new.K, old.K),
        length=rows(length, old.length),
    )


def safe_action_of(problem: Problem[Any, Any, Any], given: Tensor | None) -> Tensor:
    """The safe action (nu,): the given one, else the middle of the bounds or what is nearest to 0 where they are infinite.

    Raises:
        ContractError: it is none of the problem's actions.
    """
    actions = problem.actions
    if given is None:
        if not isinstance(actions, Box):
            first: Tensor = actions.values[0]
            return first
        nearest = actions.clip(torch.zeros_like(actions.low))
        return torch.where(torch.isfinite(actions.center), actions.center, nearest)
    if tuple(given.shape) != (actions.nu,):
        raise ContractError(f"MPC needs a safe_action (nu,) = ({actions.nu},), but got {tuple(given.shape)}.")
    if isinstance(actions, Box):
        fine = bool(torch.isfinite(given).all()) and bool(actions.contains(given))
        allowed = f"between {actions.low.tolist()} and {actions.high.tolist()}"
    else:
        fine = bool((actions.values == given.to(actions.values)).all(-1).any())
        allowed = f"that is one of {actions.values.tolist()}"
    if not fine:
        raise ContractError(f"MPC needs a safe_action {allowed}, but got {given.tolist()}.")
    return given
