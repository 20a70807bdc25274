"""The benchmark against crocoddyl and mpc.pytorch: its problems are theirs, and its parts are accounted for."""

from __future__ import annotations

import pytest
import torch

from mbrl.experiments.benchmarks import ilqr_speed
from mbrl.experiments.benchmarks.ilqr_speed import CASES, PLANNERS, against, cost
from mbrl.planners import ILQR
from tests.problems import seeded


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=list(PLANNERS))
def test_the_unicycle_ends_where_crocoddyl_does(planner: ILQR) -> None:
    """250.0393199732 from (−1, −1, 1), as SolverDDP of crocoddyl 3.2.1; and the time of the solve is in its parts."""
    problem = CASES["unicycle"].problem()
    x0 = torch.tensor([CASES["unicycle"].first], dtype=torch.float64)

    def solve() -> torch.Tensor:
        state = planner.init(problem, x0, generator=seeded())
        return planner.plan(problem, x0, state, generator=seeded())[0].actions

    assert float(cost(problem, x0, solve())) == pytest.approx(250.0393199732, rel=1e-9)
    parts = ilqr_speed.shares(solve, seconds=0.01)
    assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(1.0)
    assert list(parts) == ["roll-outs", "derivatives", "backward sweeps", "the rest"]


def test_starts_are_of_the_right_kind() -> None:
    for case in CASES.values():
        x0 = case.starts(seeded())
        assert x0.shape == (case.many, case.problem().dynamics.nx) and x0[0].tolist() == list(case.first)
    torch.testing.assert_close(x0[:, :2].norm(dim=1), torch.ones(len(x0)).double())  # cosine and sine


def test_costs_are_compared_problem_by_problem() -> None:
    found = against(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.0, 1.0, -2.0]))
    assert found == {"most_above": 1.0, "higher": 1, "lower": 1}


def test_controls_beyond_the_limits_are_no_solution() -> None:
    problem = CASES["bounded LQ"].problem()
    with pytest.raises(ValueError, match="up to 2"):
        cost(problem, torch.zeros(1, 2).double(), torch.full((1, 30, 1), 2.0).double())
