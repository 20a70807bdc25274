"""The public checkers accept what is right and name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from mbrl import ContractError, TaskCost, check_dynamics, check_task
from mbrl.envs import World, gym_world, mjcf_world
from mbrl.envs.gym_tasks import TASKS
from tests.problems import DoubleIntegrator, Noisy, Windy, seeded
from tests.test_mujoco import CART, Upright

X = torch.randn(4, 2, generator=seeded(), dtype=torch.float64)
U = torch.randn(4, 1, generator=seeded(1), dtype=torch.float64)


@dataclass(frozen=True)
class Linear(DoubleIntegrator):
    """With derivatives, and a spare first axis for sign mistakes."""

    sign: float = 1.0

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.A.expand(len(x), 2, 2), self.sign * self.B.expand(len(x), 2, 1)

    def linearize_output(self, x: Tensor) -> Tensor:
        return torch.eye(2, dtype=torch.float64).expand(len(x), 2, 2)


@dataclass(frozen=True)
class Circle:
    """An angle on the circle, stored as (cos, sin); its tangent space has one dimension. u turns it."""

    nx: int = 2
    nu: int = 1
    ny: int = 2
    ndx: int = 1
    dt: float = 0.1
    wrong: bool = False

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        return self.retract(x, self.dt * u * (1 + x[..., 1:] ** 2))

    def output(self, x: Tensor) -> Tensor:
        return x.clone()

    def retract(self, x: Tensor, dx: Tensor) -> Tensor:
        c, s = dx[..., 0].cos(), dx[..., 0].sin()
        return torch.stack([c * x[..., 0] - s * x[..., 1], s * x[..., 0] + c * x[..., 1]], -1)

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        if self.wrong:
            x, y = y, x
        cross = x[..., 0] * y[..., 1] - x[..., 1] * y[..., 0]
        return torch.atan2(cross, (x * y).sum(-1))[..., None]

    def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
        fx = 1 + self.dt * u[..., 0] * 2 * x[..., 1] * x[..., 0]
        return fx[..., None, None], self.dt * (1 + x[..., 1] ** 2)[..., None, None]

    def linearize_output(self, x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1], x[..., 0]], -1)[..., None]


ANGLES = torch.tensor([0.1, 1.0, 2.5, -3.0], dtype=torch.float64)
ON_CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)


def test_what_is_right_passes() -> None:
    check_dynamics(DoubleIntegrator(), X, U)
    check_dynamics(DoubleIntegrator(), X.float(), U.float())
    check_dynamics(Linear(), X, U)
    check_dynamics(Noisy(), X, U)
    check_dynamics(Circle(), ON_CIRCLE, U)


def variant(**members: Any) -> Any:
    return type("Variant", (DoubleIntegrator,), members)()


def broken(**sizes: Any) -> Any:
    return DoubleIntegrator(**sizes)


def in_place(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    x += 0.1
    return x.clone()


def squeezed(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    return DoubleIntegrator.step(self, x, u, k)[..., :1]


def random(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    return DoubleIntegrator.step(self, x, u, k) + 1e-6 * torch.randn_like(x)


def centred(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    return DoubleIntegrator.step(self, x, u, k) - (x.mean(0) if x.ndim > 1 else 0.0)


def all_or_nothing(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    x_next = DoubleIntegrator.step(self, x, u, k)
    return x_next if bool(torch.isfinite(x_next).all()) else x_next * torch.nan


def cleaned(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    return DoubleIntegrator.step(self, x, u, k).nan_to_num()


def front_axis(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
    return torch.cat([x[:, :1] + 0.2 * x[:, 1:], x[:, 1:] + 0.2 * u], 1) if x.ndim == 2 else x + 0.2 * u


def buffered() -> Any:
    buffer = torch.zeros(4, 2, dtype=torch.float64)

    def step(self: Any, x: Tensor, u: Tensor, k: Any) -> Tensor:
        result = DoubleIntegrator.step(self, x, u, k)
        if x.shape != buffer.shape:
            return result
        return buffer.copy_(result)

    return step


@pytest.mark.parametrize(
    ("dynamics", "text"),
    [
        (broken(nx=2.0), "nx, an int of at least 1"),
        (broken(dt=0), "seconds per step"),
        (broken(nu=3), r"x (B, 2) and u (B, 3)"),
        (variant(step=in_place), "to leave x and u alone"),
        (variant(step=squeezed), "step to return (4, 2)"),
        (variant(step=random), "two calls with the same arguments disagree"),
        (variant(step=centred), "agree with the same rows in one batch"),
        (variant(step=all_or_nothing), "a NaN state in row 1 changed the other rows"),
        (variant(step=cleaned), "a row with a NaN state to come out as NaN"),
        (variant(step=front_axis), "agree with the same rows in one batch"),
        (variant(step=buffered()), "a view of an internal buffer"),
        (variant(output=lambda self, x: x[..., :1]), "ny is wrong"),
        (variant(output=lambda self, x: x if x.ndim == 2 else x.flip(-1)), "output of x (nx,)"),
    ],
)
def test_check_dynamics_finds(dynamics: Any, text: str) -> None:
    with pytest.raises(ContractError, match=re.escape(text)):
        check_dynamics(dynamics, X, U)


def test_check_dynamics_finds_wrong_derivatives() -> None:
    with pytest.raises(ContractError, match="fu to be the derivative"):
        check_dynamics(Linear(sign=-1.0), X, U)
    with pytest.raises(ContractError, match=r"difference\(x, retract\(x, d\)\) = d"):
        check_dynamics(Circle(wrong=True), ON_CIRCLE, U)

    class Ill(Circle):
        def linearize(self, x: Tensor, u: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
            fx, fu = super().linearize(x, u, k)
            return torch.ones_like(fx), fu

    with pytest.raises(ContractError, match="fx to be the derivative"):
        check_dynamics(Ill(), ON_CIRCLE, U)


def test_check_dynamics_finds_wrong_draws() -> None:
    @dataclass(frozen=True)
    class Global(Noisy):
        def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Windy:
            return Windy(torch.randn(*shape, 1, dtype=torch.float64), self.nominal)

    with pytest.raises(ContractError, match="the same seed gave another function"):
        check_dynamics(Global(), X, U)

    @dataclass(frozen=True)
    class Shapeless(Noisy):
        def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Windy:
            return super().realize((1, 1, 1), horizon, generator=generator)

    with pytest.raises(ContractError, match=r"realize\(\(3, 1, 1\)\)"):
        check_dynamics(Shapeless(), X, U)

    class Shared(Noisy):
        def realize(self, shape: tuple[int, ...], horizon: int, *, generator: Generator) -> Windy:
            if not hasattr(Shared, "drawn"):
                Shared.drawn = super().realize(shape, horizon, generator=generator)  # type: ignore[attr-defined]
            drawn: Windy = Shared.drawn  # type: ignore[attr-defined]
            if drawn.wind.shape[:-1] == shape:
                drawn.wind.copy_(super().realize(shape, horizon, generator=generator).wind)
            return drawn

    with pytest.raises(ContractError, match="stepping another realisation"):
        check_dynamics(Shared(), X, U)


def test_check_dynamics_wants_two_rows() -> None:
    with pytest.raises(ContractError, match="B ≥ 2"):
        check_dynamics(DoubleIntegrator(), X[:1], U[:1])
    with pytest.raises(ContractError, match="B ≥ 2"):
        check_dynamics(DoubleIntegrator(), X[0], U[0])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_gymnasium_tasks(name: str) -> None:
    warnings = check_task(gym_world(name), steps=60)
    # These three can fall below 0 while alive, in Gymnasium too.
    assert all("dying may look like an exit" in warning for warning in warnings)
    assert not warnings or name in ("Ant-v5", "Hopper-v5", "Walker2d-v5")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Ant-v5", {"contact_cost_weight": 0, "include_cfrc_ext_in_observation": False}),
        ("Ant-v5", {"exclude_current_positions_from_observation": False, "healthy_z_range": (0.3, 0.9)}),
        ("Humanoid-v5", {"contact_cost_weight": 0, "include_cfrc_ext_in_observation": False}),
        ("Humanoid-v5", {"include_cinert_in_observation": False, "ctrl_cost_weight": 0.3}),
        ("HumanoidStandup-v5", {"include_cvel_in_observation": False, "impact_cost_weight": 1e-3}),
        ("Hopper-v5", {"terminate_when_unhealthy": False, "forward_reward_weight": 2.0}),
        ("Swimmer-v5", {"frame_skip": 2, "exclude_current_positions_from_observation": False}),
        ("Reacher-v5", {"reward_control_weight": 0.3}),
        ("Pusher-v5", {"reward_near_weight": 2.0}),
        ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0}),
    ],
)
def test_gymnasium_options_keep_their_meaning(name: str, options: dict[str, Any]) -> None:
    check_task(gym_world(name, **options), steps=40)


def test_own_robots() -> None:
    world = mjcf_world("cart", CART, Upright(), ("qpos", "qvel", "site_xpos/tip", "cfrc_ext"), frame_skip=2)
    check_task(world, steps=100)


class Wrong(Upright):
    """Right in the environment, wrong in the task that is checked."""

    def __init__(self, **members: Callable[..., Any]):
        for key, value in members.items():
            setattr(self, key, value)


def cart_world(**members: Callable[..., Any]) -> World:
    honest = mjcf_world("cart", CART, Upright())
    return replace(honest, task=Wrong(**members))


def upright(y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
    return Upright().reward(y, u, y_next)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"reward": lambda y, u, n: upright(y, u, n)[..., None]}, r"it returned (1,)"),
        (
            {"reward": lambda y, u, n: float(upright(y, u, n))},
            "reward to return a tensor, but it returned float",
        ),
        (
            {"reward": lambda y, u, n: upright(y, u, n) * torch.nan},
            "the reward is nan in step 0 after the action [",
        ),
        ({"reward": lambda y, u, n: n[..., 1].abs() < 0.5}, "floats, but it returned torch.bool"),
        (
            {"terminated": lambda n: n[..., 1] * torch.nan},
            "finite ends, but the end is nan at the first state",
        ),
        (
            {"terminated": lambda n: torch.where(n[..., 3] == 0, 0.0, torch.nan)},
            "finite ends, but the end is nan in step 0 after the action [",
        ),
        ({"reward": lambda y, u, n: upright(y, u, n) + 1e-3}, "the reward of the environment"),
        (
            {"terminated": lambda n: n[..., 1].abs() > -1.0},
            "terminated = False, as in the environment's step 0",
        ),
        ({"terminated": lambda n: bool(n[1].abs() > 0.5)}, "terminated to return a tensor"),
        ({"observe": lambda y: y[..., :-1]}, "the environment's observation, (4,) in step 0"),
        ({"observe": lambda y: y * (1 + 1e-3)}, "the environment's observation"),
        ({"terminated": lambda n: n[1].abs() > 0.5}, "terminated to return the shape of its inputs"),
        (
            {
                "reward": lambda y, u, n: (
                    upright(y, u, n) if n.ndim < 2 else upright(y, u, n).mean() + 0 * n[..., 0]
                )
            },
            "reward of each row by itself",
        ),
        (
            {"terminated": lambda n: n[..., 1].abs() > 0.5 if float(n.sum()) < 1e9 else n[..., 1] > 0},
            "traceable by torch.func",
        ),
    ],
)
def test_check_task_finds(members: dict[str, Any], text: str) -> None:
    with pytest.raises(ContractError, match=re.escape(text)):
        check_task(cart_world(**members), steps=8)


def test_check_task_finds_another_model() -> None:
    world = mjcf_world("cart", CART, Upright())
    other = mjcf_world("cart", CART.replace('mass="1"', 'mass="1.001"'), Upright())
    liar = replace(world, build=lambda model, **options: world.build(other.model, **options))
    with pytest.raises(ContractError, match="the exact state that the environment reached in step 0"):
        check_task(liar, steps=3)
    check_task(replace(world, model=other.model), steps=3)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"reward": lambda y, u, n: n}, r"The task Wrong of cart needs reward to return the shape"),
        ({"reward": lambda y, u, n: 1.0}, "reward to return a tensor, but it returned float"),
        ({"terminated": lambda n: n > 0.5}, "but it returned (4,)"),
        ({"terminated": lambda n: False}, "terminated to return a tensor, but it returned bool"),
        (
            {"reward": lambda y, u, n: upright(y, u, n) * torch.nan},
            "The task Wrong of cart needs finite rewards, but the reward is nan in step 0 after the action [0.5]",
        ),
        (
            {"terminated": lambda n: n[..., 1] * torch.nan},
            "The task Wrong of cart needs finite ends, but the end is nan in step 0 after the action [0.5]",
        ),
        ({"reward": lambda y, u, n: n[..., 1] < 0.5}, "floats, but it returned torch.bool"),
    ],
)
def test_environments_check_their_task(members: dict[str, Any], text: str) -> None:
    world = mjcf_world("cart", CART, Wrong(**members))
    env = world.make()
    env.reset(seed=0)
    with pytest.raises(ContractError, match=re.escape(text)):
        env.step(np.array([0.5], dtype=np.float32))
    with pytest.raises(ContractError):
        check_task(world, steps=3)


def test_check_task_warns() -> None:
    def start(model: Any, data: Any, rng: Any) -> None:
        data.qpos[1] = 0.6

    (warning,) = check_task(mjcf_world("cart", CART, Upright(), reset=start), steps=3)
    assert "the first state of the first episode already counts as terminated" in warning
    low = mjcf_world("cart", CART, Costly())
    (warning,) = check_task(low, steps=300)
    assert "rewards below 0 (here down to -" in warning and "termination_cost" in warning


class Costly(Upright):
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return super().reward(y, u, y_next) - 1.0


@pytest.mark.parametrize(
    ("reward", "got"),
    [(None, "NoneType"), (np.zeros(3), "ndarray"), (torch.zeros(3, dtype=torch.bool), "torch.bool")],
)
def test_planning_names_a_reward_that_cannot_be_negated(reward: Any, got: str) -> None:
    cost = TaskCost(Wrong(reward=lambda y, u, n: reward))
    with pytest.raises(
        ContractError, match=f"reward of Wrong must return a tensor of floats, but it returned {got}"
    ):
        cost.stage(X[:3], U[:3], X[:3], 0, None)
