"""Tasks for legged robots: walk at a commanded velocity, stand up, keep standing.

All read a robot whose first joint is free and whose actuators are position targets of the other
joints, one each, in their order. Rewards of `Walk` and `StandUp` lie in (0, 1], so an early end can never pay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mbrl.envs.layout import Layout


def body_z(quaternion: Tensor) -> Tensor:
    """The body's z axis in the world (..., 3), of unit quaternions (..., 4), w first."""
    w, x, y, z = quaternion.unbind(-1)
    return torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)


def _score(*terms: tuple[Tensor, float]) -> Tensor:
    """1 / (1 + Σ (e / scale)²), in (0, 1], of (errors e (..., n), scale) pairs."""
    errors = torch.cat([e for e, _ in terms], -1)
    scales = errors.new_tensor([scale for e, scale in terms for _ in range(e.shape[-1])])
    return 1.0 / (1.0 + (errors / scales).square().sum(-1))


@dataclass(frozen=True)
class Walk:
    """Walk along the world's x axis at `speed`, feet lifted after a clock.

    reward = 1 / (1 + Σ (error / scale)²), so each scale is an error that halves the reward alone.
    The clock asks only that each foot be lifted in its turn: where the feet go and when they push
    is up to the planner.

    Attributes:
        layout: holds "qpos", "qvel", "time" and each of `feet`.
        home: (nj,), joint angles of the standing pose, rad.
        feet: names of layout fields, world positions of the feet.
        offsets: when each foot is lifted, in periods; the default is a trot of front left, front
            right, rear left, rear right.
        ground: height of a foot that stands, m.
        height: of the trunk when standing, m.
        speed: commanded, m/s.
        period: of the gait, s.
        lift: peak height of a swinging foot, m.
        swing: share of the period that a foot is in the air.
    """

    layout: Layout
    home: Tensor
    feet: tuple[str, ...]
    ground: float
    height: float
    speed: float
    period: float = 0.5
    lift: float = 0.05
    swing: float = 0.5
    offsets: tuple[float, ...] = (0.0, 0.5, 0.5, 0.0)

    velocity_scale: float = 0.1  # m/s, along the track
    drift_scale: float = 0.3  # m/s across the track
    track_scale: float = 0.3  # m beside the track
    heading_scale: float = 0.25  # 2 sin(yaw / 2), nearly rad
    tilt_scale: float = 0.2  # sine of the tilt
    spin_scale: float = 5.0  # rad/s, all axes
    height_scale: float = 0.03  # m
    bounce_scale: float = 1.0  # m/s, vertical
    foot_scale: float = 0.03  # m from the clock's foot height
    pose_scale: float = 0.8  # rad from the standing pose
    effort_scale: float = 2.0  # rad between targets and joints, which is torque / kp

    def foot_heights(self, time: Tensor) -> Tensor:
        """Heights (..., n_feet) above the ground that the clock asks for at time (..., 1)."""
        phase = (time / self.period + time.new_tensor(self.offsets)).remainder(1.0)
        return self.lift * torch.sin(math.pi * phase / self.swing) * (phase < self.swing)

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        at = self.layout
        q, v = y_next[..., at["qpos"]], y_next[..., at["qvel"]]
        quaternion, joints = q[..., 3:7], q[..., 7:]
        feet = y_next[..., [at[foot].start + 2 for foot in self.feet]]
        wanted = self.ground + self.foot_heights(y_next[..., at["time"]])
        return _score(
            (v[..., :1] - self.speed, self.velocity_scale),
            (v[..., 1:2], self.drift_scale),
            (q[..., 1:2], self.track_scale),
            (2 * quaternion[..., 3:], self.heading_scale),  # while the trunk is level
            (body_z(quaternion)[..., :2], self.tilt_scale),
            (v[..., 3:6], self.spin_scale),
            (q[..., 2:3] - self.height, self.height_scale),
            (v[..., 2:3], self.bounce_scale),
            (feet - wanted, self.foot_scale),
            (joints - self.home, self.pose_scale),
            (u - joints, self.effort_scale),
        )

    def observe(self, y: Tensor) -> Tensor:
        """What a policy sees: all but the way gone and the time, of which only the clock's phase."""
        at = self.layout
        angle = 2 * math.pi / self.period * y[..., at["time"]]
        q, v = y[..., at["qpos"]], y[..., at["qvel"]]
        return torch.cat([q[..., 1:], v, angle.sin(), angle.cos()], -1)

    def terminated(self, y_next: Tensor) -> Tensor:
        """Whether the trunk is low or tilted by more than 60°."""
        q = y_next[..., self.layout["qpos"]]
        upright = body_z(q[..., 3:7])[..., 2]
        return (upright < 0.5) | (q[..., 2] < 0.5 * self.height)


@dataclass(frozen=True)
class StandUp:
    """Get up from any pose and stand still; never ends.

    reward = 1 / (1 + Σ (error / scale)²).

    Attributes:
        layout: holds "qpos" and "qvel".
        home: (nj,), joint angles of the standing pose, rad.
        height: of the trunk when standing, m.
    """

    layout: Layout
    home: Tensor
    height: float

    height_scale: float = 0.05  # m
    tilt_scale: float = 0.4  # distance of the body's z axis from the vertical; 2 is upside down
    pose_scale: float = 0.8  # rad from the standing pose
    speed_scale: float = 0.6  # m/s
    spin_scale: float = 4.0  # rad/s
    effort_scale: float = 2.0  # rad between targets and joints, which is torque / kp

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        q, v = y_next[..., self.layout["qpos"]], y_next[..., self.layout["qvel"]]
        joints = q[..., 7:]
        return _score(
            (q[..., 2:3] - self.height, self.height_scale),
            (body_z(q[..., 3:7]) - q.new_tensor([0.0, 0.0, 1.0]), self.tilt_scale),
            (joints - self.home, self.pose_scale),
            (v[..., :3], self.speed_scale),
            (v[..., 3:6], self.spin_scale),
            (u - joints, self.effort_scale),
        )

    def terminated(self, y_next: Tensor) -> Tensor:
        return torch.zeros(y_next.shape[:-1], dtype=torch.bool, device=y_next.device)


@dataclass(frozen=True)
class Balance:
    """Keep standing; ends where the robot has fallen.

    reward = 1 − Σ (error / scale)²,   and −fall at the step at which the robot falls.

    A sum of squares, for planners that follow gradients: it still slopes where a body has nearly fallen. What is held
    over the feet is the capture point, where a step would have to land to stop the body.

    Attributes:
        layout: holds "qpos", "qvel" and each of `feet`.
        home: (nj,), joint angles of the standing pose, rad.
        feet: names of layout fields, world positions of the feet.
        height: of the trunk when standing, m.
        fall: cost of falling.

    Reference: Pratt et al. 2006, "Capture point".
    """

    layout: Layout
    home: Tensor
    feet: tuple[str, ...]
    height: float
    fall: float = 200.0

    height_scale: float = 0.1  # m
    tilt_scale: float = 0.4  # distance of the body's z axis from the vertical
    capture_scale: float = 0.1  # m from the capture point to the middle of the feet, horizontally
    spin_scale: float = 4.0  # rad/s
    speed_scale: float = 1.0  # m/s
    pose_scale: float = 1.0  # rad from the standing pose
    motion_scale: float = 20.0  # rad/s of the joints
    effort_scale: float = 2.0  # rad between targets and joints, which is torque / kp

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        q, v = y_next[..., self.layout["qpos"]], y_next[..., self.layout["qvel"]]
        feet = torch.stack([y_next[..., self.layout[foot]] for foot in self.feet]).mean(0)
        fall_time = math.sqrt(self.height / 9.81)  # s, of an inverted pendulum
        capture = q[..., :2] + fall_time * v[..., :2] - feet[..., :2]
        errors = (
            (q[..., 2:3] - self.height, self.height_scale),
            (body_z(q[..., 3:7]) - q.new_tensor([0.0, 0.0, 1.0]), self.tilt_scale),
            (capture, self.capture_scale),
            (v[..., :3], self.speed_scale),
            (v[..., 3:6], self.spin_scale),
            (q[..., 7:] - self.home, self.pose_scale),
            (v[..., 6:], self.motion_scale),
            (u - q[..., 7:], self.effort_scale),
        )
        cost = torch.stack([(e / scale).square().sum(-1) for e, scale in errors]).sum(0)
        return 1.0 - cost - self.fall * self.terminated(y_next)

    def terminated(self, y_next: Tensor) -> Tensor:
        """Whether the trunk is low or tilted by more than 60°."""
        q = y_next[..., self.layout["qpos"]]
        return (body_z(q[..., 3:7])[..., 2] < 0.5) | (q[..., 2] < 0.5 * self.height)
