"""Nonlinear MPC on learned models: solvers outlive the weights, and the pieces of its benchmark."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mbrl import Constraint, Problem, evaluate
from mbrl.envs.systems import CartPole, Discretized
from mbrl.experiments.benchmarks import learned_nmpc
from mbrl.experiments.benchmarks.learned_nmpc import BOX, DT, Config, Pushed, Track, judge, motion, plant
from mbrl.experiments.benchmarks.nmpc_speed import SwingUp
from mbrl.models import Exported, MeanDynamics, scenarios
from mbrl.planners import NMPC, ScenarioNMPC
from mbrl.planners.nlp_solver import Solver
from tests.problems import seeded

SMALL = Config(
    steps=2,
    horizon=3,
    drive_steps=2,
    drive_horizon=3,
    hidden=(4,),
    episodes=3,
    log=2,
    epochs=1,
    generate_code=False,
)


def test_a_hundred_retrained_networks_are_planned_on_by_one_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own weights: plans differ, and their costs are those of the model that was given."""
    made = []
    plain = Solver.__init__

    def counted(self: Solver, *args: Any, **options: Any) -> None:
        made.append(self)
        plain(self, *args, **options)

    monkeypatch.setattr(Solver, "__init__", counted)
    data = motion(Pushed(Discretized(CartPole(), DT)), 3, 10, seeded())
    config = dataclasses.replace(SMALL, hidden=(5,))
    x, planner = torch.tensor([[0.0, 2.5, 0.0, 0.0]], dtype=torch.float64), NMPC(iterations=15)
    actions, solvers = set(), set()
    for seed in range(100):
        model = learned_nmpc.learn([data], 2, config, seeded(seed)).double()
        problem = Problem(
            Exported(MeanDynamics(model)),
            SwingUp(),
            BOX,
            4,
            constraints=(Constraint(Track(0.7), soft=10.0),),
        )
        state = planner.init(problem, x, generator=seeded())
        plan, _ = planner.plan(problem, x, state, generator=seeded())
        solvers.add(id(planner._program(problem).solver))
        actions.add(plan.actions.numpy().tobytes())
        fresh = evaluate(problem, problem.dynamics, x, plan.actions[:, None]).cost[:, 0]
        torch.testing.assert_close(plan.cost, fresh)
    assert len(made) == len(solvers) == 1 and len(actions) == 100


def test_scenarios_of_retrained_networks_share_one_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = Solver.__init__

    def counted(self: Solver, *args: Any, **options: Any) -> None:
        made.append(self)
        plain(self, *args, **options)

    monkeypatch.setattr(Solver, "__init__", counted)
    data = motion(Pushed(Discretized(CartPole(), DT)), 3, 10, seeded())
    x, planner = torch.tensor([[0.0, 2.5, 0.0, 0.0]], dtype=torch.float64), ScenarioNMPC(iterations=15)
    costs = set()
    for seed in range(5):
        model = learned_nmpc.learn([data], 2, SMALL, seeded(seed))
        problem = Problem(scenarios(model), SwingUp(), BOX, 4)
        plan, _ = planner.plan(problem, x, planner.init(problem, x, generator=seeded()), generator=seeded())
        costs.add(float(plan.cost))
    assert len(made) == 1 and len(costs) == 5


def test_judgement_of_a_run() -> None:
    up = [[0.0, math.pi + 0.1, 0.0, 0.0]] * 20
    fallen = [[0.0, 2.0, 0.0, 0.0]] * 5
    assert judge(fallen + up, 0.5) == {
        "up": True,
        "away": pytest.approx(0.1),
        "beyond": 0.0,
        "violated": False,
    }
    assert not judge(up + fallen, 0.5)["up"]
    assert judge([[0.0, -math.pi, 0.0, 0.0]] * 20, 0.5)["away"] == 0.0  # the other way round
    for far, violated in ((0.5005, False), (-0.502, True)):
        found = judge([[far, 0.0, 0.0, 0.0], *up], 0.5)
        assert found["violated"] is violated and found["beyond"] == pytest.approx(abs(far) - 0.5)


def test_plants_are_off_and_pushed_by_no_more_than_said() -> None:
    drawn = [plant(0.2, 3.0, seeded(seed)) for seed in range(200)]
    ratio = torch.stack([one.still.p for one in drawn]) / CartPole().p.double()  # type: ignore[misc]
    assert ratio.max() <= 1.2 and ratio.min() >= 1 / 1.2 and (ratio[:, 3] == 1).all()
    assert (ratio[:, :3].amax(0) > 1.15).all() and (ratio[:, :3].amin(0) < 1 / 1.15).all()
    pushes = [one.force for one in drawn]
    assert -3 <= min(pushes) < -2.8 and 2.8 < max(pushes) <= 3
    x, u = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(drawn[0].step(x, u, 0), drawn[0].still.step(x, u + pushes[0], 0))


def test_data_are_the_motion_of_the_plant() -> None:
    true = plant(0.2, 3.0, seeded(3))
    y, u, y_next = motion(true, 4, 6, seeded())
    assert y.shape == y_next.shape == (24, 4) and u.shape == (24, 1) and BOX.contains(u).all()
    torch.testing.assert_close(true.step(y, u, 0), y_next)
    assert torch.equal(y[1:6], y_next[:5])


def test_arms_share_everything_but_the_planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of one seed, resumed in between; start and plant are the same."""
    out = dataclasses.replace(SMALL, out=tmp_path / "r.json", picture=tmp_path / "r.png", seeds=1)
    learned_nmpc.main(dataclasses.replace(out, arms=("mean",)))
    learned_nmpc.main(dataclasses.replace(out, arms=("mean", "scenarios", "spread", "swing-up")))
    runs = json.loads(out.out.read_text())["runs"]
    assert [run["arm"] for run in runs] == ["mean", "scenarios", "spread", "swing-up"]
    assert len({tuple(run["path"][0]) for run in runs[:3]}) == 1
    assert out.picture.stat().st_size > 0
    with pytest.raises(SystemExit, match="other settings"):
        learned_nmpc.main(dataclasses.replace(out, horizon=4))
