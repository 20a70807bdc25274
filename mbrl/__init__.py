"""The vocabulary of model-based reinforcement learning and trajectory optimization.

One `Problem` holds the true simulator or a learned model; every planner takes it and returns a
`Plan`; `MPC` turns a planner into a policy. Shapes and names are in `mbrl.protocols`.
"""

from mbrl.checkpoints import Checkpoints, pack, unpack
from mbrl.checks import check_dynamics
from mbrl.collect import Collected, Collector
from mbrl.data import Replay, Transition
from mbrl.datasets import Dataset, DatasetWriter, load_dataset
from mbrl.derivatives import Autodiff, Euclidean, FiniteDifference
from mbrl.errors import (
    CheckpointError,
    ContractError,
    DataError,
    EnvError,
    MbrlError,
    MissingExtra,
    PlanWarning,
    RunFolderError,
    UnknownName,
    UnsupportedProblem,
)
from mbrl.estimators import FullState, Measured, Observed, Padded, WithLastAction
from mbrl.features import Features
from mbrl.mpc import MPC, MPCReport
from mbrl.planner_checks import check_planner
from mbrl.policies import RandomPolicy
from mbrl.previous_action import WithPreviousAction
from mbrl.problem import Box, Constraint, Discrete, Plan, Problem, TaskCost, from_task
from mbrl.protocols import Cost, Dynamics, Estimator, Planner, Policy, Stochastic, Task, TrainingWorld
from mbrl.quadratize import Expansion, quadratize
from mbrl.resumable import Resumable, vectorize
from mbrl.risk import CVaR, Mean, MeanStd, Optimistic, Risk, Worst
from mbrl.rollout import Evaluation, evaluate, follow, realize, rollout
from mbrl.scenarios import Scenarios
from mbrl.task_checks import check_task

__all__ = [
    "MPC",
    "Autodiff",
    "Box",
    "CVaR",
    "CheckpointError",
    "Checkpoints",
    "Collected",
    "Collector",
    "Constraint",
    "ContractError",
    "Cost",
    "DataError",
    "Dataset",
    "DatasetWriter",
    "Discrete",
    "Dynamics",
    "EnvError",
    "Estimator",
    "Euclidean",
    "Evaluation",
    "Expansion",
    "Features",
    "FiniteDifference",
    "FullState",
    "MPCReport",
    "MbrlError",
    "Mean",
    "MeanStd",
    "Measured",
    "MissingExtra",
    "Observed",
    "Optimistic",
    "Padded",
    "Plan",
    "PlanWarning",
    "Planner",
    "Policy",
    "Problem",
    "RandomPolicy",
    "Replay",
    "Resumable",
    "Risk",
    "RunFolderError",
    "Scenarios",
    "Stochastic",
    "Task",
    "TaskCost",
    "TrainingWorld",
    "Transition",
    "UnknownName",
    "UnsupportedProblem",
    "WithLastAction",
    "WithPreviousAction",
    "Worst",
    "check_dynamics",
    "check_planner",
    "check_task",
    "evaluate",
    "follow",
    "from_task",
    "load_dataset",
    "pack",
    "quadratize",
    "realize",
    "rollout",
    "unpack",
    "vectorize",
]
