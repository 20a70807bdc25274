"""The second-order model of a problem about a trajectory: what LQR, iLQR and DDP minimise.

The derivatives of the cost come from automatic differentiation of the cost alone, by (y, u, y_next); those of the
dynamics and of the output come from the dynamics, however they get them. So one task serves every planner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, vmap

from mbrl.errors import ContractError
from mbrl.problem import Problem


@dataclass(frozen=True)
class Expansion:
    """Derivatives along M trajectories of H steps, n = ndx + nu. Costs are discounted, as in the sum.

    Attributes:
        fx, fu: (M, H, ndx, ndx) and (M, H, ndx, nu), of the next state.
        lx, lu: (M, H+1, ndx) and (M, H, nu), of the cost of each step; the last of lx is of the terminal cost.
        lxx, luu, lux: (M, H+1, ndx, ndx), (M, H, nu, nu) and (M, H, nu, ndx), by Gauss-Newton: the curvature of
            dynamics and output is left out.
        excess: (M, H, n, n), what the exact Hessian of the cost of a step has in addition, or None.
        fzz: (M, H, ndx, n, n), second derivatives of the next state by (x, u), or None.
    """

    fx: Tensor
    fu: Tensor
    lx: Tensor
    lu: Tensor
    lxx: Tensor
    luu: Tensor
    lux: Tensor
    excess: Tensor | None = None
    fzz: Tensor | None = None


def quadratize(
    problem: Problem[Any, Any, Any],
    x: Tensor,
    u: Tensor,
    *,
    exact: bool = False,
    reached: Tensor | None = None,
) -> Expansion:
    """Derivatives of dynamics and cost along trajectories x (M, H+1, nx) and u (M, H, nu).

    A cost ℓ(y, u, y_next) of the state that is reached is one of (x, u) by the chain rule. After an episode has
    ended on the trajectory its cost counts for nothing; where it ends is not differentiated.

    Args:
        exact: with second derivatives of dynamics and output; the dynamics need `curvature`, see `Autodiff`.
        reached: (M, H, nx), where each step leads, if that is not the next of x; its cost is paid there.

    Raises:
        ContractError: the cost cannot be differentiated by torch.func.
    """
    dynamics, H, nu = problem.dynamics, u.shape[1], u.shape[2]
    steps = torch.arange(H, device=x.device)
    fx, fu = dynamics.linearize(x[:, :-1], u, steps)
    G = dynamics.linearize_output(x)
    y = dynamics.output(x)
    G_next, y_next = G[:, 1:], y[:, 1:]
    if reached is not None:
        G_next, y_next = dynamics.linearize_output(reached), dynamics.output(reached)
    ndx, ny = fx.shape[-1], y.shape[-1]
    weight = weights(problem, y)

    # z = (y, u, y_next) as a linear function J of (x, u).
    J = torch.cat(
        [
            torch.cat([G[:, :-1], G.new_zeros(*u.shape[:2], ny, nu)], -1),
            torch.cat([u.new_zeros(*u.shape[:2], nu, ndx), torch.eye(nu).to(u).expand(*u.shape[:2], -1, -1)], -1),
            G_next @ torch.cat([fx, fu], -1),
        ],
        -2,
    )  # fmt: skip
    z = torch.cat([y[:, :-1], u, y_next], -1)

    def stage(z: Tensor, k: Tensor, p: Tensor | None) -> Tensor:
        cost: Tensor = problem.cost.stage(z[:ny], z[ny : ny + nu], z[ny + nu :], k, p)
        return cost

    def slope_and_bend(z: Tensor, J: Tensor, k: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor]:
        slope = grad(stage)
        return slope(z, k, p), jacfwd(lambda d: slope(z + J @ d, k, p))(J.new_zeros(J.shape[-1]))

    params = problem.params if problem.params is None else problem.params.to(x).expand(len(x), -1, -1)
    p = None if params is None else params[:, :-1].flatten(0, 1)
    try:
        lz, HJ = vmap(slope_and_bend, (0, 0, 0, None if p is None else 0))(
            z.flatten(0, 1), J.flatten(0, 1), steps.repeat(len(x)), p
        )
        p = None if params is None else params[:, -1]
        end_slope, end_bend = vmap(_terminal, (None, None, 0, 0, None if p is None else 0))(
            problem, ndx, x[:, -1], y[:, -1], p
        )
    except RuntimeError as error:
        name = type(getattr(problem.cost, "task", problem.cost)).__name__
        raise ContractError(
            f"{name} must be differentiable by torch.func: out-of-place torch operations on the tensors given, no "
            f".item(), no `if` on their values. torch says: {error}"
        ) from error
    lz, HJ = lz.reshape(z.shape), HJ.reshape(J.shape)
    w = weight[:, :-1, None]
    slope = w * (J.mT @ lz[..., None])[..., 0]
    bend = w[..., None] * (J.mT @ HJ)
    bend = (bend + bend.mT) / 2
    (ex, ey), (exx, eyy) = end_slope, end_bend
    end, w_end = G[:, -1], weight[:, -1]
    last_x = w_end[:, None] * (ex + (end.mT @ ey[..., None])[..., 0])
    last_xx = w_end[:, None, None] * (exx + end.mT @ eyy @ end)

    excess = fzz = None
    if exact:
        fzz, Gxx = dynamics.curvature(x[:, :-1], u, steps), dynamics.curvature_output(x)
        Gxx_next = Gxx[:, 1:] if reached is None else dynamics.curvature_output(reached)
        ly, ly_next = lz[..., :ny], lz[..., ny + nu :]
        F = torch.cat([fx, fu], -1)
        c = (G_next.mT @ ly_next[..., None])[..., 0]
        excess = torch.einsum("mki,mkiab->mkab", c, fzz)
        excess = excess + F.mT @ torch.einsum("mki,mkiab->mkab", ly_next, Gxx_next) @ F
        excess[..., :ndx, :ndx] += torch.einsum("mki,mkiab->mkab", ly, Gxx[:, :-1])
        excess = w[..., None] * excess
        last_xx = last_xx + w_end[:, None, None] * torch.einsum("mi,miab->mab", ey, Gxx[:, -1])
    return Expansion(
        fx=fx,
        fu=fu,
        lx=torch.cat([slope[..., :ndx], last_x[:, None]], 1),
        lu=slope[..., ndx:],
        lxx=torch.cat([bend[..., :ndx, :ndx], last_xx[:, None]], 1),
        luu=bend[..., ndx:, ndx:],
        lux=bend[..., ndx:, :ndx],
        excess=excess,
        fzz=fzz,
    )


def _terminal(
    problem: Problem[Any, Any, Any], ndx: int, x: Tensor, y: Tensor, p: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Slopes by dx (ndx,) and y (ny,), and bends, of terminal value and terminal cost."""
    zero = x.new_zeros(ndx)
    retract = getattr(problem.dynamics, "retract", torch.add)

    def end(y: Tensor) -> Tensor:
        cost: Tensor = problem.cost.terminal(y, p)
        return cost

    def value(dx: Tensor) -> Tensor:
        assert problem.terminal_value is not None
        return problem.terminal_value(retract(x, dx))

    if problem.terminal_value is None:
        vx, vxx = zero, x.new_zeros(len(zero), len(zero))
    else:
        vx, vxx = grad(value)(zero), hessian(value)(zero)
    return (vx, grad(end)(y)), (vxx, hessian(end)(y))


def weights(problem: Problem[Any, Any, Any], y: Tensor) -> Tensor:
    """γᵏ times the probability of having survived until step k, (M, H+1), along y (M, H+1, ny)."""
    weight = problem.discount ** torch.arange(y.shape[1]).to(y)
    weight = weight.expand(len(y), -1)
    if problem.terminated is None:
        return weight
    alive = (1.0 - problem.terminated(y[:, 1:]).to(y)).cumprod(1)
    return weight * torch.cat([torch.ones_like(alive[:, :1]), alive], 1)
