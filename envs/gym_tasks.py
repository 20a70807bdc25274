"""Tasks of Gymnasium's eleven MuJoCo v5 environments, equal to the environments' own rewards and ends.

Each is a function of y, so the same object scores the simulator, a learned model that predicts y and
imagined rollouts. `observe(y)` is the environment's observation. Weights and ranges are read from
the environment, so the keyword arguments of `gymnasium.make` keep their meaning.

Reference: Gymnasium 1.4, `gymnasium.envs.mujoco.*_v5`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mbrl.envs.layout import Layout
from mbrl.features import Features, indices


class GymTask(ABC):
    """A task whose constructor copies what it needs from an environment. qpos and qvel open every y.

    Attributes:
        absolute: the first positions, of which the reward sees only changes; observations may leave them out.
        skipped: how many of them this environment does leave out.
        angles: the positions that a learned model sees as sine and cosine.
    """

    absolute = 1
    angles: tuple[int, ...] = ()

    def __init__(self, env: Any, layout: Layout):
        self.layout = layout
        self.dt = float(env.dt)
        self.q, self.v = layout["qpos"], layout["qvel"]
        excludes = getattr(env, "_exclude_current_positions_from_observation", False)
        self.skipped = self.absolute if excludes else 0
        self.copy(env)

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        """The fields of MjData that y holds."""
        return ("qpos", "qvel")

    @abstractmethod
    def copy(self, env: Any) -> None:
        """Keep the environment's weights and ranges."""

    @property
    def features(self) -> Features:
        """What a learned model sees of y, and what it predicts."""
        return Features(self.layout.size, hidden=tuple(range(self.absolute)), angles=self.angles)

    @abstractmethod
    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor: ...

    @abstractmethod
    def terminated(self, y_next: Tensor) -> Tensor: ...

    @abstractmethod
    def observe(self, y: Tensor) -> Tensor:
        """The environment's observation (..., nobs) of y (..., ny)."""


def _square(u: Tensor) -> Tensor:
    return (u * u).sum(-1)


def _never(y: Tensor) -> Tensor:
    return torch.zeros(y.shape[:-1], dtype=torch.bool, device=y.device)


def _inside(value: Tensor, bounds: tuple[float, float]) -> Tensor:
    return (bounds[0] < value) & (value < bounds[1])


class _Runner(GymTask):
    """Forward speed of the first coordinate less an action cost; never ends."""

    forward: float
    action: float

    def copy(self, env: Any) -> None:
        self.forward, self.action = env._forward_reward_weight, env._ctrl_cost_weight

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return self.forward * (y_next[..., 0] - y[..., 0]) / self.dt - self.action * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    def observe(self, y: Tensor) -> Tensor:
        return y[..., self.skipped :]


class HalfCheetah(_Runner):
    """Run forward."""

    angles = (2,)


class Swimmer(_Runner):
    """Swim forward."""

    absolute = 2
    angles = (2,)


class _Hopping(GymTask):
    """Forward speed and a bonus for staying upright; ends at a fall."""

    angles = (2,)
    forward: float
    action: float
    bonus: float
    height: tuple[float, float]
    angle: tuple[float, float]

    def copy(self, env: Any) -> None:
        self.forward, self.action = env._forward_reward_weight, env._ctrl_cost_weight
        self.bonus, self.ends = env._healthy_reward, env._terminate_when_unhealthy
        self.height, self.angle = env._healthy_z_range, env._healthy_angle_range
        self.range = getattr(env, "_healthy_state_range", None)

    def healthy(self, y: Tensor) -> Tensor:
        upright = _inside(y[..., 1], self.height) & _inside(y[..., 2], self.angle)
        if self.range is None:
            return upright
        return upright & _inside(y[..., 2 : self.v.stop], self.range).all(-1)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        speed = (y_next[..., 0] - y[..., 0]) / self.dt
        return self.forward * speed + self.bonus * self.healthy(y_next) - self.action * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return ~self.healthy(y_next) if self.ends else _never(y_next)

    def observe(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., self.skipped : self.q.stop], y[..., self.v].clamp(-10, 10)], -1)


class Hopper(_Hopping):
    """Hop forward on one leg."""


class Walker2d(_Hopping):
    """Walk forward on two legs in the plane."""


class _Contact(GymTask):
    """What Ant and the Humanoids share: contact forces in the reward or the observation."""

    absolute = 2

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        weight = getattr(env, "_contact_cost_weight", getattr(env, "_impact_cost_weight", 0.0))
        names = ["qpos", "qvel"]
        names += ["cinert"] * bool(getattr(env, "_include_cinert_in_observation", False))
        names += ["cvel"] * bool(getattr(env, "_include_cvel_in_observation", False))
        names += ["qfrc_actuator"] * bool(getattr(env, "_include_qfrc_actuator_in_observation", False))
        names += ["cfrc_ext"] * bool(weight or env._include_cfrc_ext_in_observation)
        return tuple(names)

    @property
    def features(self) -> Features:
        # Body fields follow from positions and velocities. Those of a position change as it does; the
        # others are predicted as they are.
        derived = [name for name in self.layout.names if name not in ("qpos", "qvel")]
        moving = [name for name in derived if name.startswith(("xpos", "subtree_com"))]
        return Features(
            self.layout.size,
            hidden=(0, 1, *indices(*(self.layout[name] for name in derived))),
            absolute=indices(*(self.layout[name] for name in derived if name not in moving)),
            unit=((3, 4, 5, 6),),  # the quaternion of the root
        )

    def _forces(self, y: Tensor) -> Tensor:
        return y[..., self.layout["cfrc_ext"]]


class Ant(_Contact):
    """Walk forward on four legs."""

    forward: float
    action: float
    contact: float
    bonus: float
    height: tuple[float, float]

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        return (*_Contact.fields(env), f"xpos/{env._main_body}")

    def copy(self, env: Any) -> None:
        self.forward, self.action = env._forward_reward_weight, env._ctrl_cost_weight
        self.contact, self.force_range = env._contact_cost_weight, env._contact_force_range
        self.bonus, self.ends, self.height = (
            env._healthy_reward,
            env._terminate_when_unhealthy,
            env._healthy_z_range,
        )
        self.x = self.layout[f"xpos/{env._main_body}"].start
        self.observes_forces = env._include_cfrc_ext_in_observation

    def healthy(self, y: Tensor) -> Tensor:
        z = y[..., 2]
        return torch.isfinite(y[..., : self.v.stop]).all(-1) & (self.height[0] <= z) & (z <= self.height[1])

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        speed = (y_next[..., self.x] - y[..., self.x]) / self.dt
        reward = self.forward * speed + self.bonus * self.healthy(y_next) - self.action * _square(u)
        if self.contact:
            reward = reward - self.contact * _square(self._forces(y_next).clamp(*self.force_range))
        return reward

    def terminated(self, y_next: Tensor) -> Tensor:
        return ~self.healthy(y_next) if self.ends else _never(y_next)

    def observe(self, y: Tensor) -> Tensor:
        parts = [y[..., self.skipped : self.v.stop]]
        if self.observes_forces:
            parts.append(self._forces(y)[..., 6:].clamp(*self.force_range))  # without the world body
        return torch.cat(parts, -1)


class _HumanoidBody(_Contact):
    """The Humanoids' observation."""

    def _parts(self, env: Any) -> None:
        self.parts = [slice(self.skipped, self.v.stop)]
        for name, skip in (("cinert", 10), ("cvel", 6), ("qfrc_actuator", 6), ("cfrc_ext", 6)):
            if getattr(env, f"_include_{name}_in_observation"):
                where = self.layout[name]
                self.parts.append(
                    slice(where.start + skip, where.stop)
                )  # without the world body, or the root

    def observe(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., part] for part in self.parts], -1)


class Humanoid(_HumanoidBody):
    """Walk forward on two legs."""

    forward: float
    action: float
    contact: float
    bonus: float
    height: tuple[float, float]

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        return (*_Contact.fields(env), "subtree_com/0")

    def copy(self, env: Any) -> None:
        self._parts(env)
        self.forward, self.action = env._forward_reward_weight, env._ctrl_cost_weight
        self.contact, self.contact_range = env._contact_cost_weight, env._contact_cost_range
        self.bonus, self.ends, self.height = (
            env._healthy_reward,
            env._terminate_when_unhealthy,
            env._healthy_z_range,
        )
        self.x = self.layout["subtree_com/0"].start  # of the whole body: its centre of mass

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        speed = (y_next[..., self.x] - y[..., self.x]) / self.dt
        alive = _inside(y_next[..., 2], self.height)
        reward = self.forward * speed + self.bonus * alive - self.action * _square(u)
        if self.contact:
            reward = reward - (self.contact * _square(self._forces(y_next))).clamp(*self.contact_range)
        return reward

    def terminated(self, y_next: Tensor) -> Tensor:
        return ~_inside(y_next[..., 2], self.height) if self.ends else _never(y_next)


class HumanoidStandup(_HumanoidBody):
    """Stand up from the floor."""

    action: float
    impact: float

    def copy(self, env: Any) -> None:
        self._parts(env)
        self.up, self.action = env._uph_cost_weight, env._ctrl_cost_weight
        self.impact, self.impact_range = env._impact_cost_weight, env._impact_cost_range
        self.timestep = float(env.model.opt.timestep)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        reward = y_next[..., 2] / self.timestep - self.action * _square(u) + 1.0
        if self.impact:
            reward = reward - (self.impact * _square(self._forces(y_next))).clamp(*self.impact_range)
        return reward

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)


class Reacher(GymTask):
    """Bring the fingertip of a planar two-link arm to the target."""

    near: float
    action: float

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        return ("qpos", "qvel", "xpos/fingertip", "xpos/target")

    def copy(self, env: Any) -> None:
        self.near, self.action = env._reward_dist_weight, env._reward_control_weight
        self.tip, self.target = self.layout["xpos/fingertip"], self.layout["xpos/target"]

    @property
    def features(self) -> Features:
        target = (2, 3, self.v.start + 2, self.v.start + 3, *indices(self.target))
        return Features(self.layout.size, hidden=target + indices(self.tip), angles=(0, 1), constant=target)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        gap = y_next[..., self.tip] - y_next[..., self.target]
        distance: Tensor = gap.norm(dim=-1)
        return -self.near * distance - self.action * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    def observe(self, y: Tensor) -> Tensor:
        joints = y[..., :2]
        gap = y[..., self.tip] - y[..., self.target]
        velocity = y[..., self.v.start : self.v.start + 2]
        return torch.cat([joints.cos(), joints.sin(), y[..., 2 : self.q.stop], velocity, gap[..., :2]], -1)


class Pusher(GymTask):
    """Push a cylinder to the goal with a seven-joint arm."""

    near: float
    far: float
    action: float

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        return ("qpos", "qvel", "xpos/tips_arm", "xpos/object", "xpos/goal")

    def copy(self, env: Any) -> None:
        self.near, self.far = env._reward_near_weight, env._reward_dist_weight
        self.action = env._reward_control_weight
        self.tip, self.object, self.goal = (
            self.layout[f"xpos/{body}"] for body in ("tips_arm", "object", "goal")
        )

    @property
    def features(self) -> Features:
        goal = (9, 10, self.v.start + 9, self.v.start + 10, *indices(self.goal))
        return Features(self.layout.size, hidden=(7, 8, *goal), constant=goal)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        body = y_next[..., self.object]
        near: Tensor = (body - y_next[..., self.tip]).norm(dim=-1)
        far: Tensor = (body - y_next[..., self.goal]).norm(dim=-1)
        return -self.near * near - self.far * far - self.action * _square(u)

    def terminated(self, y_next: Tensor) -> Tensor:
        return _never(y_next)

    def observe(self, y: Tensor) -> Tensor:
        velocity = y[..., self.v.start : self.v.start + 7]
        return torch.cat([y[..., :7], velocity, y[..., self.tip.start : self.goal.stop]], -1)


class InvertedPendulum(GymTask):
    """Keep a pole on a cart upright."""

    absolute = 0  # the rail ends
    angles = (1,)

    def copy(self, env: Any) -> None:
        pass

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return (~self.terminated(y_next)).to(y.dtype)

    def terminated(self, y_next: Tensor) -> Tensor:
        return ~torch.isfinite(y_next).all(-1) | (y_next[..., 1].abs() > 0.2)

    def observe(self, y: Tensor) -> Tensor:
        return y


class InvertedDoublePendulum(GymTask):
    """Keep two poles on a cart upright."""

    absolute = 0  # the rail ends

    bonus: float

    @staticmethod
    def fields(env: Any) -> tuple[str, ...]:
        return ("qpos", "qvel", "site_xpos/0", "qfrc_constraint")

    def copy(self, env: Any) -> None:
        self.bonus = env._healthy_reward
        self.tip, self.force = self.layout["site_xpos/0"], self.layout["qfrc_constraint"].start

    @property
    def features(self) -> Features:
        forces = indices(self.layout["qfrc_constraint"])
        return Features(self.layout.size, hidden=indices(self.tip) + forces, angles=(1, 2), absolute=forces)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        x, _, z = y_next[..., self.tip].unbind(-1)
        _, v1, v2 = y_next[..., self.v].unbind(-1)
        distance = 0.01 * x**2 + (z - 2) ** 2
        return self.bonus * ~self.terminated(y_next) - distance - 1e-3 * v1**2 - 5e-3 * v2**2

    def terminated(self, y_next: Tensor) -> Tensor:
        return y_next[..., self.tip.stop - 1] <= 1

    def observe(self, y: Tensor) -> Tensor:
        angles, force = y[..., 1 : self.q.stop], y[..., self.force : self.force + 1]
        velocity = y[..., self.v].clamp(-10, 10)
        return torch.cat([y[..., :1], angles.sin(), angles.cos(), velocity, force.clamp(-10, 10)], -1)


TASKS: dict[str, type[GymTask]] = {
    f"{task.__name__}-v5": task
    for task in (
        Ant,
        HalfCheetah,
        Hopper,
        Humanoid,
        HumanoidStandup,
        InvertedDoublePendulum,
        InvertedPendulum,
        Pusher,
        Reacher,
        Swimmer,
        Walker2d,
    )
}
