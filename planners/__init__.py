"""Planners: frozen dataclasses of hyper-parameters that turn a Problem into a Plan."""

from mbrl.planners.augmented_lagrangian import AugmentedLagrangian
from mbrl.planners.cem import CEM
from mbrl.planners.cma_es import CMAES
from mbrl.planners.gradient_shooting import GradientShooting
from mbrl.planners.icem import ICEM
from mbrl.planners.ilqr import DDP, FDDP, ILQR, ILQRState
from mbrl.planners.lqr import Filter, Regulator, finite_lqr, infinite_lqr, kalman_filter
from mbrl.planners.mppi import MPPI
from mbrl.planners.nmpc import NMPC, NMPCState
from mbrl.planners.polish import Polish
from mbrl.planners.predictive_sampling import PredictiveSampling
from mbrl.planners.random_shooting import RandomShooting
from mbrl.planners.sampling import SamplingPlanner, SamplingState
from mbrl.planners.scenario_nmpc import ScenarioNMPC

__all__ = [
    "CEM",
    "CMAES",
    "DDP",
    "FDDP",
    "ICEM",
    "ILQR",
    "MPPI",
    "NMPC",
    "AugmentedLagrangian",
    "Filter",
    "GradientShooting",
    "ILQRState",
    "NMPCState",
    "Polish",
    "PredictiveSampling",
    "RandomShooting",
    "Regulator",
    "SamplingPlanner",
    "SamplingState",
    "ScenarioNMPC",
    "finite_lqr",
    "infinite_lqr",
    "kalman_filter",
]
