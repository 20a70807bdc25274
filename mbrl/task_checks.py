"""`check_task`: does a task agree with the world that it describes?"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from mbrl.checks import fail, gap, same
from mbrl.errors import ContractError
from mbrl.problem import Box
from mbrl.protocols import Dynamics, Task

_NOT_FINITE = "a division by zero, a root of 0, or the NaN of another branch of a product (use torch.where)"


class TaskWorld(Protocol):
    """What `check_task` needs of a world; `mbrl.envs.World` has it."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> Task: ...
    @property
    def actions(self) -> Box: ...
    @property
    def action_dtype(self) -> torch.dtype: ...
    def observe(self, y: Tensor) -> Tensor: ...
    def make(self) -> Any: ...
    def dynamics(self, *, threads: int) -> Dynamics: ...


def check_task(world: TaskWorld, *, steps: int = 200, seed: int = 0) -> list[str]:
    """Check that a world's task and model say what its real environment does, under random actions.

    The state that the model predicts must equal the environment's exactly; reward, end and observation,
    computed from y, must agree with what the environment returned (to 1e-6). Reward and end must be finite,
    of the right shape for any leading dimensions, and torch.func-traceable.

    Args:
        world: the world.
        steps: of the environment; it is reset when an episode ends.
        seed: of the first reset and of the actions.

    Returns:
        Warnings: what is allowed, but often a mistake.

    Raises:
        ContractError: with what was needed, what came and what is most likely wrong.
    """
    if not world.actions.bounded:
        raise ContractError(
            "check_task draws actions, so it needs finite bounds. Give finite ones: Box(low, high)."
        )
    user = f"The task {type(world.task).__name__} of {world.name}"
    task, dynamics, env = world.task, world.dynamics(threads=1), world.make()
    generator = torch.Generator().manual_seed(seed)
    remarks: list[str] = []
    lowest = torch.inf
    ends = ended_at_once = False
    ys: list[Tensor] = []
    us: list[Tensor] = []
    try:
        _, info = env.reset(seed=seed)
        for k in range(steps):
            x = torch.as_tensor(info["state"])
            y = dynamics.output(x)
            if k == 0:
                end = task.terminated(y)
                check_value(user, "terminated", end, ())
                check_finite(user, "end", end, "at the first state")
                ended_at_once = bool(end)
            u = _random_action(world.actions, generator).to(world.action_dtype)
            obs, reward, terminated, truncated, info = env.step(u.numpy())
            if info.get("diverged"):
                remarks.append(f"the simulation diverged in step {k} under the random action {u.tolist()}")
                _, info = env.reset()
                continue
            x_next = torch.as_tensor(info["state"])
            u = u.to(x.dtype)
            y_next = dynamics.output(x_next)
            predicted = dynamics.step(x, u, 0)
            if not same(predicted, x_next):
                fail(
                    f"The model of {world.name}",
                    f"the exact state that the environment reached in step {k}",
                    gap(predicted, x_next),
                    "frame_skip, the action's dtype or the model differ, or the state misses something",
                )
            value = task.reward(y, u, y_next)
            check_value(user, "reward", value, ())
            moment = f"in step {k} after the action {u.tolist()}"
            check_finite(user, "reward", value, moment)
            if abs(float(value) - float(reward)) > 1e-6 * max(1.0, abs(float(reward))):
                fail(
                    user,
                    f"the reward of the environment, {float(reward):.9g} in step {k}",
                    f"it is {float(value):.9g}",
                    "another weight or frame, or a field of y that lags by a physics step",
                )
            end = task.terminated(y_next)
            check_value(user, "terminated", end, ())
            check_finite(user, "end", end, moment)
            if bool(end) != bool(terminated):
                fail(
                    user,
                    f"terminated = {bool(terminated)}, as in the environment's step {k}",
                    f"it is {bool(end)}",
                    "another range, < in place of ≤, or an end that depends on more than y_next",
                )
            seen = world.observe(y_next)
            if not same(seen, torch.as_tensor(obs), 1e-6):
                fail(
                    user,
                    f"observe(y) to be the environment's observation, {obs.shape} in step {k}",
                    gap(seen, torch.as_tensor(obs)),
                    "another order, a missing clip, or a field of y that lags by a physics step",
                )
            ys.append(torch.stack([y, y_next]))
            us.append(u)
            ends |= bool(terminated)
            if not terminated:
                lowest = min(lowest, float(value))
            if terminated or truncated:
                _, info = env.reset()
    finally:
        env.close()
    if not ys:
        fail(
            user, "at least one step that does not diverge", f"all {steps} diverged", "the model is unstable"
        )
    _check_batches(user, task, torch.stack(ys), torch.stack(us))

    if ended_at_once:
        remarks.append("the first state of the first episode already counts as terminated")
    if ends and lowest < 0:
        remarks.append(
            f"a terminating task can have rewards below 0 (here down to {lowest:.3g}): dying may look like an exit; "
            "add a bonus for staying alive, or give the Problem a termination_cost"
        )
    return remarks


def _random_action(actions: Box, generator: Generator) -> Tensor:
    share = torch.rand(actions.nu, generator=generator, dtype=actions.low.dtype)
    return actions.clip(actions.low + share * (actions.high - actions.low))


def check_value(user: str, what: str, value: object, shape: tuple[int, ...]) -> None:
    """Refuse a value of a task that is no tensor of this shape."""
    if not isinstance(value, Tensor):
        fail(
            user,
            f"{what} to return a tensor",
            f"it returned {type(value).__name__}",
            "float(…) or bool(…) inside",
        )
    if value.shape != shape:
        fail(
            user,
            f"{what} to return the shape of its inputs without the last axis, {shape}",
            f"it returned {tuple(value.shape)}",
            "y[0] in place of y[..., 0], or a sum without dim=-1",
        )

    if what == "reward" and not value.is_floating_point():
        fail(user, "reward to return floats", f"it returned {value.dtype}", "a comparison without .to(y)")


def check_finite(user: str, what: str, value: Tensor, moment: str) -> None:
    """Refuse a reward or an end () that is NaN or infinite."""
    if not torch.isfinite(value):
        fail(user, f"finite {what}s", f"the {what} is {float(value)} {moment}", _NOT_FINITE)


def _check_batches(user: str, task: Task, ys: Tensor, us: Tensor) -> None:
    """Leading shapes and tracing. ys: (n, 2, ny), us: (n, nu)."""
    rows = torch.arange(6) % len(us)
    y, y_next, u = ys[rows, 0], ys[rows, 1], us[rows]
    rewards = torch.stack([task.reward(*row) for row in zip(y, u, y_next, strict=True)])
    ends = torch.stack([task.terminated(row) for row in y_next])
    for shape in ((5,), (2, 3)):
        n = torch.Size(shape).numel()

        def batch(t: Tensor, n: int = n, shape: tuple[int, ...] = shape) -> Tensor:
            return t[:n].reshape(*shape, *t.shape[1:])

        for what, got, wanted in (
            ("reward", task.reward(batch(y), batch(u), batch(y_next)), batch(rewards)),
            ("terminated", task.terminated(batch(y_next)), batch(ends)),
        ):
            check_value(user, what, got, shape)
            if not same(got.to(wanted), wanted, 1e-9):
                fail(
                    user,
                    f"{what} of each row by itself",
                    "rows of a batch differ",
                    "rows mix over a batch axis",
                )
    try:
        torch.func.vmap(task.reward)(y, u, y_next)
        torch.func.vmap(task.terminated)(y_next)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # forward mode loads torch.jit code of its own
            torch.func.jacfwd(task.reward, argnums=(0, 1, 2))(y[0], u[0], y_next[0])
    except RuntimeError as error:
        fail(
            user,
            "to be traceable by torch.func (vmap, jacfwd)",
            f"tracing failed with: {str(error).splitlines()[0]}",
            "an `if` or float(…) on a tensor, an in-place write, or numpy inside",
        )
