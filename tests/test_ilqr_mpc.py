"""The benchmark of iLQR-MPC: its problems, and that its table says who wins."""

from pathlib import Path

import pytest
import torch

from mbrl.envs import gym_world
from mbrl.experiments.benchmarks import ilqr_mpc, readme_derivatives, readme_tables
from mbrl.experiments.benchmarks.record import write


@pytest.mark.parametrize("name", ilqr_mpc.CASES)
def test_every_planner_takes_the_problem_of_its_case(name: str) -> None:
    case, world = ilqr_mpc.CASES[name], gym_world(name)
    planners = case.planners({"icem": 16, "icem-own": 16, "polish": 12})
    assert set(planners) <= set(ilqr_mpc.PLANNERS) and {"ilqr", "icem", "polish"} <= set(planners)
    for planner, how in planners.items():
        problem = case.problem(world, planner)
        how.check(problem)
        assert problem.dynamics.dt == pytest.approx(world.dynamics().dt)
        own = planner == "icem-own"
        assert problem.horizon == (case.own_horizon if own else case.horizon)


def test_hoppers_cost_slopes_where_its_reward_does_not() -> None:
    """Leaning, low and slow: the reward knows speed only; the cost has the curvature that iLQR works with."""
    world = gym_world("Hopper-v5")
    cost = ilqr_mpc.hop(world)
    _, info = world.make().reset(seed=0)
    y = torch.as_tensor(info["state"])[-world.layout.size :]
    low = y.clone()
    low[cost.z], low[cost.pitch] = 1.0, 0.1
    u = torch.zeros(3, dtype=torch.float64)

    def stage(y_next: torch.Tensor) -> torch.Tensor:
        return cost.stage(y, u, y_next, 0, None)

    slope, bend = torch.func.grad(stage)(low), torch.func.hessian(stage)(low)
    assert slope[cost.z] < 0 < slope[cost.pitch] and slope[cost.x] < 0
    assert all(bend[i, i] > 0 for i in (cost.x, cost.z, cost.pitch, cost.rate))

    def reward(y_next: torch.Tensor) -> torch.Tensor:
        return world.task.reward(y, u, y_next)

    assert torch.func.hessian(reward)(low).abs().max() == 0
    assert torch.func.grad(reward)(low)[[cost.z, cost.pitch]].abs().max() == 0


@pytest.mark.parametrize(
    ("ilqr", "own", "said"),
    [
        ((9.0, 8.0), (7.0, 6.0), "better on 2 of 2 seeds"),
        ((3.0, 2.0), (7.0, 6.0), "better on 0 of 2 seeds"),
        ((9.0, 2.0), (7.0, 6.0), "better on 1 of 2 seeds"),
    ],
)
def test_the_table_compares_with_the_better_icem(
    ilqr: tuple[float, ...],
    own: tuple[float, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for planner, returns in {"ilqr": ilqr, "icem": (1.0, 1.0), "icem-own": own}.items():
        for seed, value in enumerate(returns):
            result = {"env": "Hopper-v5", "planner": planner, "seed": seed, "return": value, "fell": False}
            result |= {"cpu_ms": {"mean": 5.0}, "wall_ms": {"median": 6.0}, "machine": {"load": 1.0}}
            result |= {"wanted_steps": 10, "settings": {}, "horizon": 4}
            write(tmp_path / "ilqr_mpc" / "Hopper-v5" / f"{planner}-{seed}.json", result)
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    text = readme_derivatives.ilqr_on_robots()
    assert f"Hopper-v5: iLQR against the iCEM of the higher mean, {said}." in text
    head, rule = text.splitlines()[:2]
    assert head.count("|") == rule.count("|") == text.splitlines()[2].count("|")
    assert text.count("**") == 2 and "| iCEM, reward |" in text
