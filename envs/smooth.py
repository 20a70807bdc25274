"""Contacts that set in gradually, for planners that follow gradients."""

from __future__ import annotations

import copy

import mujoco


def smooth_contacts(model: mujoco.MjModel) -> mujoco.MjModel:
    """A copy of the model in which contacts and limits of joints and tendons begin at next to no force.

    The impedance d ∈ (0, 1) of a constraint, its share of what would stop it, rises from solimp[0] at the surface to
    solimp[1] at the depth solimp[2], 1 mm by default. MuJoCo's default begins at 0.9, so that the next velocity jumps
    at touch-down, and a difference across it divides the jump by ε. Here it begins at 0, which MuJoCo takes as 1e-4:
    the jump is some 10,000 times smaller. Equality constraints and dry friction act at all times, so they have no such
    jump and stay as they are.

    Reference: Howell et al. 2022, "Predictive Sampling", whose software MuJoCo MPC plans with gradients on such a
        model; MuJoCo 4.0 documentation, "Solver parameters".
    Differs: limits of tendons and the global override of contacts, too.
    """
    smooth = copy.copy(model)
    for solimp in (smooth.geom_solimp, smooth.pair_solimp, smooth.jnt_solimp, smooth.tendon_solimp_lim):
        solimp[:, 0] = 0.0
    smooth.opt.o_solimp[0] = 0.0
    return smooth
