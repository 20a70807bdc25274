"""The benchmark against do-mpc: its problems are do-mpc's, and its figures mean what they say."""

from __future__ import annotations

import numpy as np
import pytest

from mbrl.experiments.benchmarks import nmpc_speed, plants
from mbrl.planners import NMPC


def test_the_swing_up_is_that_of_the_peers() -> None:
    """296.84007 by CasADi and fatrop by hand; do-mpc 5.1.2, whose prediction is more accurate than RK4, 296.83341."""
    result = nmpc_speed.our_swing_up(nmpc_speed.SWING_UP["ours"])
    assert result["cost"] == pytest.approx(296.84007, rel=1e-6)
    assert np.array(result["states"]).shape == (plants.STEPS + 1, 4) and len(result["wall_s"]) == plants.STEPS


def test_the_reactor_runs_as_in_do_mpc() -> None:
    """The first inputs, the last state and the cost of its closed loop with n_robust 0."""
    planner = nmpc_speed.REACTOR["ours, collocation"]
    assert isinstance(planner, NMPC)
    result = nmpc_speed.our_reactor(planner)
    assert result["cost"] == pytest.approx(0.015078585764628578, rel=1e-4)
    np.testing.assert_allclose(result["inputs"][0], [9.828522771434606, -0.1019670275427123], atol=1e-2)
    wanted = [0.7048881272425117, 0.5999989757577804, 139.9873998768864, 138.8779517298409]
    np.testing.assert_allclose(result["states"][-1], wanted, rtol=1e-3)


def test_times_are_medians_over_passes_of_each_step() -> None:
    seconds = [[0.9, 0.1, 0.2], [0.7, 0.3, 0.4], [0.8, 0.2, 9.0]]
    summary = nmpc_speed.summarise([{"processor_s": s, "wall_s": s, "cost": 1.0} for s in seconds])
    assert summary["processor_ms"] == pytest.approx([800, 200, 400])
    assert (summary["median_ms"], summary["worst_ms"], summary["first_ms"]) == pytest.approx((400, 400, 800))


def test_closed_loops_are_apart_by_the_share_of_the_largest_value() -> None:
    x, y = {"states": [[1.0, 10.0], [2.0, -20.0]]}, {"states": [[1.0, 10.0], [2.2, -20.0]]}
    assert nmpc_speed.apart(x, y) == pytest.approx(0.2 / 2.2)
    case = {"sides": {"ours": {"costs": [2.0, 4.0]}, "ours, real-time iteration": {"costs": [2.0, 5.0]}}}
    assert nmpc_speed.recovery(case) == pytest.approx([0.0, 0.25])
