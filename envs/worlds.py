"""The worlds that the command line knows by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mbrl.envs.cart_pole import cart_pole
from mbrl.envs.classic import acrobot, double_integrator, pendulum
from mbrl.envs.g1 import g1_stand
from mbrl.envs.panda import panda_push, panda_reach
from mbrl.envs.pendulum import Pendulum
from mbrl.envs.pets import pets_cartpole, pets_halfcheetah, pets_pusher, pets_reacher3d
from mbrl.envs.robots import go2_stand, go2_stand_up, go2_walk, pup_walk
from mbrl.envs.world import World, gym_world
from mbrl.errors import UnknownName
from mbrl.protocols import TrainingWorld


@dataclass(frozen=True)
class Entry:
    """How to build a world, one line about it, and whether it has an `analytic` model."""

    build: Callable[..., World]
    about: str
    analytic: bool = False


WORLDS: dict[str, Entry] = {
    name: Entry(functools.partial(gym_world, name), about)
    for name, about in {
        "Ant-v5": "Gymnasium: walk on four legs (8 actions)",
        "HalfCheetah-v5": "Gymnasium: run in the plane (6 actions)",
        "Hopper-v5": "Gymnasium: hop on one leg (3 actions)",
        "Humanoid-v5": "Gymnasium: walk on two legs (17 actions)",
        "HumanoidStandup-v5": "Gymnasium: stand up from the floor (17 actions)",
        "InvertedDoublePendulum-v5": "Gymnasium: balance two poles on a cart (1 action)",
        "InvertedPendulum-v5": "Gymnasium: balance a pole on a cart (1 action)",
        "Pusher-v5": "Gymnasium: push a cylinder with an arm (7 actions)",
        "Reacher-v5": "Gymnasium: reach with a two-link arm (2 actions)",
        "Swimmer-v5": "Gymnasium: swim (2 actions)",
        "Walker2d-v5": "Gymnasium: walk in the plane (6 actions)",
    }.items()
}
WORLDS |= {
    "acrobot": Entry(acrobot, "Swing up two links from the elbow (1 action, analytic)", analytic=True),
    "cart-pole": Entry(
        cart_pole, "Swing up a pole on a cart, on a short track (1 action, analytic)", analytic=True
    ),
    "double-integrator": Entry(
        double_integrator,
        "Bring a point on a line to rest; the optimum is known (1 action, analytic)",
        analytic=True,
    ),
    "g1-stand": Entry(g1_stand, "Unitree G1: stand while being pushed (29 actions)"),
    "go2-stand": Entry(go2_stand, "Unitree Go2: stand while being pushed (12 actions)"),
    "go2-stand-up": Entry(go2_stand_up, "Unitree Go2: get up from lying on its side (12 actions)"),
    "go2-walk": Entry(go2_walk, "Unitree Go2: walk at a commanded velocity (12 actions)"),
    "panda-push": Entry(panda_push, "Franka Panda: push a cube to a goal (7 actions)"),
    "panda-reach": Entry(panda_reach, "Franka Panda: reach a point (7 actions)"),
    "pendulum": Entry(
        pendulum, "Swing up a pendulum whose motor is weak (1 action, analytic)", analytic=True
    ),
    "pets-cartpole": Entry(pets_cartpole, "PETS: swing up a pole on a cart (1 action)"),
    "pets-halfcheetah": Entry(pets_halfcheetah, "PETS: run in the plane (6 actions)"),
    "pets-pusher": Entry(pets_pusher, "PETS: push a cylinder with an arm (7 actions)"),
    "pets-reacher3d": Entry(pets_reacher3d, "PETS: reach a point in space with an arm (7 actions)"),
    "pup-walk": Entry(pup_walk, "Small quadruped of our own: walk at a commanded velocity (8 actions)"),
}


def make_world(name: str, **options: Any) -> World:
    """The world called `name`; options go to its builder.

    Raises:
        UnknownName: no such world; near names are suggested.
        MissingExtra: the robot's model comes with an optional package.
    """
    if name not in WORLDS:
        raise UnknownName("world", name, WORLDS)
    return WORLDS[name].build(**options)


def make_training_world(name: str, **options: Any) -> TrainingWorld:
    """A world to learn in: those of `make_world`, and Pendulum-v1, which has no simulator to plan with.

    Raises:
        UnknownName: no such world; near names are suggested.
    """
    return Pendulum(**options) if name == Pendulum.name else make_world(name, **options)
