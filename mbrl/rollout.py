"""Rolling a plan out and scoring it: the one place where costs of action sequences are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.problem import Problem
from mbrl.protocols import Dynamics, Stochastic


def realize(problem: Problem[Any, Any, Any], *, generator: Generator) -> tuple[Dynamics, int]:
    """A deterministic draw of the problem's dynamics and its number of particles P."""
    dynamics = problem.dynamics
    if isinstance(dynamics, Stochastic):
        # One particle has no axis of its own in `evaluate`.
        shape = (problem.particles, 1, 1) if problem.particles > 1 else (1, 1)
        return dynamics.realize(shape, problem.horizon, generator=generator), problem.particles
    return dynamics, 1


def rollout(dynamics: Dynamics, x0: Tensor, u: Tensor) -> Tensor:
    """States (..., H+1, nx) from x0 (..., nx) under u (..., H, nu)."""
    states = [x0]
    for k in range(u.shape[-2]):
        states.append(dynamics.step(states[-1], u[..., k, :], k))
    return torch.stack(states, -2)


@dataclass(frozen=True)
class Evaluation:
    """Scores of candidates.

    Attributes:
        cost: (M, B); +inf where a candidate diverged or its cost is not finite.
        diverged: (M, B) share of particles that left the finite numbers.
        states: (M, B, H+1, nx) of particle 0, or None.
        actions: (M, B, H, nu) that were taken, of particle 0, where the states are kept.
    """

    cost: Tensor
    diverged: Tensor
    states: Tensor | None = None
    actions: Tensor | None = None


def evaluate(
    problem: Problem[Any, Any, Any],
    dynamics: Dynamics,
    x0: Tensor,
    u: Tensor,
    *,
    particles: int = 1,
    keep_states: bool = False,
) -> Evaluation:
    """Scores candidate plans: particles, discount, termination, terminal terms and risk.

    cost = risk_p Σₖ γᵏ sₖ ℓ(yₖ, uₖ, yₖ₊₁) + …   with sₖ the probability of having survived until step k.

    Args:
        dynamics: a deterministic draw, see `realize`.
        x0: (M, nx).
        u: (M, B, H, nu).
        particles: P of the draw.
        keep_states: return the states too (of particle 0). Rows are then simulated past their end.
    """
    M, B, H, _ = u.shape
    x = x0[:, None].expand(M, B, -1)
    if particles > 1:
        x = x.expand(particles, M, B, -1)
        u = u.expand(particles, M, B, H, -1)
    steps = u.unbind(-2)
    return follow(problem, dynamics, x, lambda k, x: steps[k], horizon=H, keep_states=keep_states)


def follow(
    problem: Problem[Any, Any, Any],
    dynamics: Dynamics,
    x: Tensor,
    control: Callable[[int, Tensor], Tensor],
    *,
    horizon: int,
    keep_states: bool = False,
    jump: Callable[[int, Tensor], Tensor] | None = None,
) -> Evaluation:
    """`evaluate` of a policy instead of plans.

    Args:
        x: (M, B, nx), or (P, M, B, nx) for P particles.
        control: u (..., nu) at step k in the states x (..., nx).
        horizon: H, in steps.
        jump: from where a step leads to where the next begins, on a trajectory with gaps; its cost is paid before.
    """
    particles = x.shape[0] if x.ndim == 4 else 1
    y = dynamics.output(x)
    states, actions = [x], []

    total = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
    survival: Tensor | None = None  # probability of having survived; None while it is 1 for all
    diverged = torch.zeros_like(total, dtype=torch.bool)
    seen = torch.zeros_like(total)  # sum of every y on the way, finite only if each is
    weight = 1.0
    for k in range(horizon):
        u_k = control(k, x)
        x_next = dynamics.step(x, u_k, k)
        y_next = dynamics.output(x_next)
        met = y_next.sum(-1)
        seen = seen + (met if survival is None else torch.where(survival > 0, met, 0.0))
        stage = problem.cost.stage(y, u_k, y_next, k, _params(problem, k))
        if getattr(stage, "shape", None) != total.shape:
            raise ContractError(
                f"The stage cost of {_name(problem)} must have the shape of its inputs without the last axis, "
                f"{tuple(total.shape)}, but it returned {_shape(stage)}."
            )
        total = _add(total, stage, weight, survival)
        if problem.terminated is not None:
            end = problem.terminated(y_next)
            if getattr(end, "shape", None) != total.shape:
                raise ContractError(
                    f"terminated of {_name(problem)} must return shape {tuple(total.shape)}, "
                    f"but it returned {_shape(end)}."
                )
            # Asking whether anything ended costs less than the rest; on a GPU it would wait for the device.
            if end.is_cuda or bool(end.any()):
                end = end.to(total.dtype)
                before = torch.ones_like(total) if survival is None else survival
                # A NaN probability would end the row at no further cost.
                diverged |= (before > 0) & torch.isnan(end)
                if problem.termination_cost:
                    total = _add(total, end * problem.termination_cost, weight, before)
                survival = torch.where(before > 0, before * (1.0 - end), 0.0)
                if not (keep_states or x_next.requires_grad):
                    # Rows that ended are retired: simulators skip rows that are not finite.
                    x_next = torch.where((survival > 0)[..., None], x_next, torch.nan)
        weight *= problem.discount
        x, y = x_next, y_next
        if jump is not None:
            x = jump(k, x_next)
            y = dynamics.output(x)
        if keep_states:
            states.append(x)
            actions.append(u_k)

    ends = [problem.cost.terminal(y, _params(problem, horizon))]
    if problem.terminal_value is not None:
        ends.append(problem.terminal_value(x))
    for end in ends:
        if getattr(end, "shape", None) != total.shape:
            raise ContractError(
                f"The terminal cost of {_name(problem)}, and a terminal_value, must have the shape of their "
                f"inputs without the last axis, {tuple(total.shape)}, but one returned {_shape(end)}."
            )
    terminal = torch.stack(ends).sum(0)
    total = _add(total, terminal, weight, survival)
    diverged |= ~torch.isfinite(seen)
    total = torch.where(diverged | ~torch.isfinite(total), torch.inf, total)
    kept: tuple[Tensor, ...] = ()
    if keep_states:
        kept = (torch.stack(states, -2), torch.stack(actions, -2))
        kept = tuple(rows[0] for rows in kept) if particles > 1 else kept
    if particles > 1:
        cost = problem.risk(total)
        # A risk such as mean − κ·std would turn inf into NaN.
        cost = torch.where(torch.isinf(total).any(0) | torch.isnan(cost), torch.inf, cost)
        return Evaluation(cost, diverged.to(cost.dtype).mean(0), *kept)
    return Evaluation(total, diverged.to(total.dtype), *kept)


def _add(total: Tensor, cost: Tensor, weight: float, survival: Tensor | None) -> Tensor:
    """total + weight · survival · cost, without the cost where survival is 0: there it may be NaN."""
    if survival is not None:
        cost = torch.where(survival > 0, survival * cost, 0.0)
    return torch.add(total, cost, alpha=weight)


def _params(problem: Problem[Any, Any, Any], k: int) -> Tensor | None:
    """Parameters of step k that broadcast against (M, B, np)."""
    p = problem.params
    if p is None:
        return None
    return p[k] if p.ndim == 2 else p[:, None, k]


def _name(problem: Problem[Any, Any, Any]) -> str:
    return type(getattr(problem.cost, "task", problem.cost)).__name__


def _shape(value: object) -> str:
    """The shape of a tensor, or the type of what is none."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
