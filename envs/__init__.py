"""True worlds: Gymnasium's MuJoCo environments, MJCF robots and real robots."""

from mbrl.envs.layout import Layout
from mbrl.envs.limits import Within
from mbrl.envs.mjcf import MjcfEnv, load_mjcf, mjcf_world
from mbrl.envs.mujoco import MujocoDynamics, RandomizedMujoco, read_state, scaled_model, write_state
from mbrl.envs.pendulum import Pendulum
from mbrl.envs.smooth import smooth_contacts
from mbrl.envs.world import WithState, World, gym_world
from mbrl.envs.worlds import WORLDS, make_training_world, make_world

__all__ = [
    "WORLDS",
    "Layout",
    "MjcfEnv",
    "MujocoDynamics",
    "Pendulum",
    "RandomizedMujoco",
    "WithState",
    "Within",
    "World",
    "gym_world",
    "load_mjcf",
    "make_training_world",
    "make_world",
    "mjcf_world",
    "read_state",
    "scaled_model",
    "smooth_contacts",
    "write_state",
]
