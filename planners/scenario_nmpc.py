"""Nonlinear MPC against a finite set of models at once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbrl.errors import ContractError, UnsupportedProblem, require
from mbrl.expressions import Expression
from mbrl.planners.buffered import Array
from mbrl.planners.nmpc import NMPC
from mbrl.planners.nmpc_program import Settings
from mbrl.problem import Problem


@dataclass(frozen=True, kw_only=True)
class ScenarioNMPC(NMPC):
    """NMPC whose plan is to hold for every member of `Scenarios`: ensemble members, or values of parameters.

    Each member is a branch with states of its own, under common controls; the cost is the mean over the branches.

    Attributes:
        shared: for how many steps the controls are common; then each branch has its own, as if by then one knew which
            member is true. All steps unless given, which is the most cautious.
        spread: hard and soft constraints hold for the mean of the branches plus so many standard deviations of them (a
            chance constraint, if g were normal), instead of for each branch. Equations hold for each.

    `Plan.actions` are the mean over the branches and `Plan.states` are those of the first one; `Plan.cost` is the
    problem's risk of the branches' costs, each under its own controls; `info["violation"]` is the largest of any
    branch.

    Reference: Lucia, Finkler & Engell 2013, "Multi-stage nonlinear model predictive control applied to a semi-batch
        polymerization reactor under uncertainty".
    """

    shared: int | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared is not None and self.shared < 1:
            raise ContractError(f"ScenarioNMPC needs shared ≥ 1 steps, or None, but got {self.shared}.")
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ContractError(f"ScenarioNMPC needs a finite spread ≥ 0, or None, but got {self.spread}.")

    def _check_dynamics(self, dynamics: Any) -> None:
        members = getattr(dynamics, "members", None)
        if not members:
            raise UnsupportedProblem(
                f"ScenarioNMPC needs dynamics with members, but {type(dynamics).__name__} has none. Use "
                "Scenarios(models), scenarios(ensemble), or NMPC for a single model."
            )
        for member in members:
            remedy = (
                "Wrap each: Symbolic(dynamics) if it is written in torch, Exported(model) if it was learned."
            )
            require("ScenarioNMPC", "members", member, ("expression", "theta"), remedy)

    def _expressions(self, problem: Problem[Any, Any, Any]) -> tuple[Expression, ...]:
        return tuple(member.expression for member in problem.dynamics.members)

    def _theta(self, problem: Problem[Any, Any, Any]) -> Array:
        return np.concatenate([member.theta for member in problem.dynamics.members])

    def _settings(self, problem: Problem[Any, Any, Any]) -> Settings:
        shared = problem.horizon if self.shared is None else min(self.shared, problem.horizon)
        return dataclasses.replace(super()._settings(problem), shared=shared, spread=self.spread)
