"""What no planner can beat: the exact optimum of a world that is linear and pays a quadratic reward."""

from __future__ import annotations

import dataclasses

import torch
from torch import Generator, Tensor
from torch.func import grad, hessian, jacfwd, vmap

from mbrl.envs import World
from mbrl.errors import ContractError
from mbrl.planners.lqr import Regulator, finite_lqr

_POINTS, _REACH = (
    32,
    10.0,
)  # where linearity is checked: how many, and their standard deviation in the units of y


def lq_regulator(world: World, steps: int) -> Regulator:
    """The feedback that earns most in the `steps` steps of an episode; its value is minus the return, without bounds.

    y' = A y + B u + c,   −reward(y, u, y') = ½ yᵀQy + ½ uᵀRu + uᵀNy + qᵀy + rᵀu + d

    A, B and c are those of the world's analytic step, which is the simulator's; nothing is paid after the last step.

    Raises:
        ContractError: steps < 1; the world has no analytic model; its reward has no maximum; or, at random points, its
            step is not linear, its reward not quadratic, or its task ends.
    """
    if world.analytic is None:
        raise ContractError(
            f"The optimum of {world.name} needs the plant as an expression, world.analytic, but it has none."
        )
    if steps < 1:
        raise ContractError(f"The optimum of {world.name} needs steps ≥ 1, but got {steps}.")
    analytic, task, ny, nu = world.analytic, world.task, world.analytic.ny, world.actions.nu
    points = _REACH * torch.randn(_POINTS, ny + nu, generator=Generator().manual_seed(0), dtype=torch.float64)
    points[0] = 0

    def step(z: Tensor) -> Tensor:
        return analytic.step(z[:ny], z[ny:], 0)

    def paid(z: Tensor) -> Tensor:
        return -task.reward(z[:ny], z[ny:], step(z))

    F, H = vmap(jacfwd(step))(points), vmap(hessian(paid))(points)
    for what, values in (("the slope of its step", F), ("the curvature of its reward", H)):
        if not torch.allclose(values, values[:1], rtol=1e-9, atol=1e-9):
            raise ContractError(
                f"The optimum of {world.name} needs linear dynamics and a quadratic reward, but {what} changes from "
                "place to place. Compare with iLQR or NMPC on the true model instead."
            )
    if task.terminated(points[:, :ny]).any():
        raise ContractError(
            f"The optimum of {world.name} needs episodes of {steps} steps, but its task may end them earlier."
        )
    origin = points[0]
    A, B, slope, curvature = F[0, :, :ny], F[0, :, ny:], grad(paid)(origin), H[0]
    regulator = finite_lqr(
        A,
        B,
        curvature[:ny, :ny],
        curvature[ny:, ny:],
        horizon=steps,
        N=curvature[ny:, :ny],
        c=step(origin),
        q=slope[:ny],
        r=slope[ny:],
        final=torch.zeros_like(A),
        final_slope=torch.zeros_like(origin[:ny]),
    )
    left = torch.arange(steps, -1, -1, dtype=torch.float64)
    return dataclasses.replace(regulator, s=regulator.s + left * paid(origin))


def riccati_optimum(world: World, y0: Tensor, steps: int) -> Tensor:
    """The largest return (M,) that any controls earn from y0 (M, ny) in `steps` steps of the world.

    Raises:
        ContractError: as `lq_regulator`; y0 has another shape; or the best controls lie outside the world's bounds, so
            that what can be earned within them has no closed form.
    """
    regulator, y, bounds = lq_regulator(world, steps), y0.double(), world.actions
    assert world.analytic is not None  # or there were no regulator
    if y.ndim != 2 or y.shape[1] != world.analytic.ny:
        raise ContractError(
            f"The optimum of {world.name} needs y0 of shape (M, {world.analytic.ny}), but got {tuple(y0.shape)}."
        )
    for t in range(steps):
        u = regulator.act(y, t)
        if ((u < bounds.low) | (u > bounds.high)).any():
            raise ContractError(
                f"The optimum of {world.name} needs controls within {bounds.low.tolist()} and {bounds.high.tolist()}, "
                f"but from these states it takes up to {float(u.abs().max()):.3g} at step {t}. Start nearer to the goal."
            )
        y = world.analytic.step(y, u, t)
    return -regulator.value(y0.double(), 0)
