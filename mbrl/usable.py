"""Whether a plan can be followed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mbrl.errors import ContractError
from mbrl.problem import Box, Plan, Problem


def check_shapes(name: str, plan: Plan, problem: Problem[Any, Any, Any], *, M: int, least: int) -> None:
    """Refuse what is no tensor or of a wrong shape: it would broadcast, or fail far from here.

    Args:
        name: of the planner, for messages.
        least: steps that a plan must have.
    """
    H, dynamics = problem.horizon, problem.dynamics
    shape: tuple[int, ...] = getattr(plan.actions, "shape", ())
    steps = shape[1] if len(shape) == 3 and least <= shape[1] <= H else H
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
            raise ContractError(f"{name}.plan must return {what} = {sizes}, but returned {got}.")


def faults_of(plan: Plan, problem: Problem[Any, Any, Any], *, least: int) -> dict[str, Tensor]:
    """What makes a plan unusable, and in which rows (M,)."""
    finite = torch.isfinite(plan.actions).all((-1, -2))
    inside = torch.ones_like(finite)
    if isinstance(problem.actions, Box):
        inside = problem.actions.contains(plan.actions).all(-1)
    long = torch.ones_like(finite) if plan.length is None else plan.length >= least
    return {
        "its actions are not finite": ~finite,
        "its actions leave the bounds": ~inside,
        "its cost is not finite: every candidate diverged, or the task returns NaN": ~torch.isfinite(
            plan.cost
        ),
        f"it has fewer than {least} valid steps": ~long,
    }
