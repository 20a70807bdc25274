"""A session: what is changed while an episode runs, and what a push does to the plant and not to the plan."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from mbrl import ContractError, UnknownName
from mbrl.envs import make_world
from mbrl.envs.pushes import Pushable
from mbrl.experiments import cli, view
from mbrl.experiments.session import Pace, Session

FAST = ["--horizon", "8", "--threads", "1", "--planner.population", "12"]


def session(*options: str, planner: str = "predictive-sampling", env: str = "cart-pole") -> Session:
    return Session(cli.parse(["view", "--planner", planner, "--env", env, *FAST, *options]))


def run(watched: Session, steps: int) -> list[Any]:
    """Numbers of the steps taken."""
    rows = []
    for _ in range(steps):
        watched.step()
        rows.append(watched.row)
    return rows


def forces(watched: Session) -> np.ndarray:
    """What the state that the planner starts from says of applied forces, (nbody, 6)."""
    model = watched.world.model
    data = mujoco.MjData(model)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, watched.state.numpy()[: mujoco.mj_stateSize(model, kind)], kind)
    return np.array(data.xfrc_applied)


def test_it_is_the_episode_that_mpc_runs(tmp_path: Path) -> None:
    options = ["--planner", "icem", "--env", "Hopper-v5", *FAST, "--planner.elites", "4", "--seed", "3"]
    out = tmp_path / "run"
    assert cli.main(["mpc", *options, "--steps", "4", "--no-video", "--out", str(out)]) == 0
    with (out / "metrics.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    watched = run(Session(cli.parse(["view", *options])), 4)
    for name in ("return", "plan_cost", "planner/effective_samples", "time"):
        assert [row[name] for row in watched] == [float(row[name]) for row in written]


def test_a_changed_planner_starts_from_the_last_plan() -> None:
    """With 2 candidates and no time to search, the plan is as good as what it starts from."""
    costs = []
    for forget in (False, True):
        watched = session("--horizon", "25")
        run(watched, 12)
        assert watched.plan is not None
        watched.change(population=2)
        if forget:
            watched.policy.reset()
        run(watched, 1)
        costs.append(watched.row["plan_cost"])
    warm, cold = costs
    assert warm < cold - 5


@pytest.mark.parametrize(
    "planner", ["icem", "cem", "mppi", "cma-es", "predictive-sampling", "random-shooting"]
)
@pytest.mark.parametrize("horizon", [3, 12])
def test_the_horizon_changes_from_the_next_plan_on(planner: str, horizon: int) -> None:
    options = ["--planner.elites", "3"] if planner in ("icem", "cem") else []
    watched = session(*options, planner=planner)
    run(watched, 2)
    watched.change(horizon=horizon, population=14)
    assert watched.plan is not None and watched.plan.actions.shape[1] == 8
    run(watched, 2)
    assert watched.plan.actions.shape[1] == horizon
    assert watched.parameters()["horizon"] == horizon and watched.parameters()["population"] == 14
    assert watched.policy.fallbacks == 0


@pytest.mark.parametrize("planner", ["ilqr", "fddp", "nmpc"])
def test_planners_that_do_not_sample_change_too(planner: str) -> None:
    options = ["--env", "cart-pole", "--horizon", "8", "--threads", "1"]
    watched = Session(cli.parse(["view", "--planner", planner, *options]))
    run(watched, 2)
    watched.change(iterations=1, horizon=10)
    run(watched, 2)
    assert watched.plan is not None and watched.plan.actions.shape[1] == 10
    assert watched.parameters()["iterations"] == 1 and watched.policy.fallbacks == 0
    assert watched.traces(sampled=True).shape == (1, 11, 3)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"population": 1}, "population ≥ 2"),
        ({"population": 8.5}, "population needs a whole number, but got 8.5"),
        ({"std": math.nan}, "std needs a number, but got nan"),
        ({"std": "wide"}, "std needs a number, but got 'wide'"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_what_is_refused_changes_nothing(values: dict[str, Any], told: str) -> None:
    watched = session()
    run(watched, 1)
    before = watched.policy.planner, watched.policy.problem
    with pytest.raises(ContractError, match=told):
        watched.change(**values)
    assert (watched.policy.planner, watched.policy.problem) == before
    run(watched, 1)
    with pytest.raises(UnknownName, match="population"):
        watched.change(populaton=8)


def test_a_horizon_must_last_until_the_next_plan() -> None:
    watched = session("--replan-every", "4")
    with pytest.raises(ContractError, match="horizon of 4 steps or more"):
        watched.change(horizon=3)


def test_a_push_moves_the_plant_and_not_the_model() -> None:
    """The plan's prediction is exact, since it is made with the plant, but for the steps of the push."""
    watched, still = session(), session()
    run(watched, 3), run(still, 3)
    assert torch.equal(watched.state, still.state)
    watched.push(np.array([30.0, 0.0, 0.0]), 2)
    assert watched.pushed is not None and watched.pushed.tolist() == [30.0, 0.0, 0.0]
    errors = [row["output_error"] for row in run(watched, 2)]
    assert not forces(watched).any() and watched.pushed is None
    errors += [row["output_error"] for row in run(watched, 3)]
    # A row tells of the state that it starts from.
    assert [error > 1e-3 for error in errors] == [False, True, True, False, False]
    assert max(errors[:1] + errors[3:]) == 0
    run(still, 2)
    assert not torch.equal(watched.state, still.state)


def test_forces_of_the_world_itself_stay() -> None:
    world = make_world("cart-pole")
    env: Any = Pushable(world.build(world.model), body=2)
    env.reset(seed=0)
    env.unwrapped.data.xfrc_applied[2, 0] = 1.0
    env.push(np.array([2.0, 0.0, 0.0]), 1)
    env.step(np.zeros(1, np.float32))
    assert env.unwrapped.data.xfrc_applied[2].tolist() == [1.0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("force", "steps"), [([math.nan, 0, 0], 1), ([1.0, 0], 1), ([1.0, 0, 0], 0)])
def test_no_push(force: list[float], steps: int) -> None:
    with pytest.raises(ContractError, match="A push needs"):
        session().push(np.array(force), steps)


def test_reset_takes_the_next_seed() -> None:
    watched = session("--seed", "5")
    run(watched, 3)
    watched.push(np.ones(3), 9)
    watched.reset()
    assert (watched.seed, watched.steps, watched.total, watched.pushed) == (6, 0, 0.0, None)
    assert watched.plan is None and len(watched.traces(sampled=True)) == 0 and watched.row == {}
    _, info = make_world("cart-pole").make().reset(seed=6)
    assert np.array_equal(watched.state, info["state"])
    run(watched, 1)


def test_without_a_planner_the_robot_gets_the_safe_action_until_it_ends() -> None:
    watched = session(env="InvertedPendulum-v5")
    run(watched, 1)
    plans = watched.policy.followed.copy()
    watched.plan_or_not(False)
    watched.push(np.array([20.0, 0.0, 0.0]), 5)
    while watched.ended is None:
        assert watched.steps < 200
        watched.step()
        assert watched.plan is None and "plan_ms" not in watched.row
    assert watched.ended == "terminated" and watched.policy.followed == plans
    with pytest.raises(ContractError, match=r"over \(terminated\)"):
        watched.step()
    watched.reset()
    watched.plan_or_not(True)
    run(watched, 1)
    assert watched.plan is not None


def test_the_time_limit_is_told() -> None:
    watched = session()
    watched.plan_or_not(False)
    run(watched, 200)
    assert watched.ended == "time limit"


def test_traces_start_at_the_robot() -> None:
    watched = session()
    data = mujoco.MjData(watched.world.model)
    before = watched.state
    run(watched, 1)
    paths = watched.traces(sampled=True)
    assert paths.shape[1:] == (9, 3) and len(paths) > 3
    assert np.array_equal(watched.traces(sampled=False), paths[:1])
    mujoco.mj_resetData(watched.world.model, data)
    data.qpos[:] = before[1:3]
    mujoco.mj_kinematics(watched.world.model, data)
    assert np.allclose(paths[:, 0], data.xipos[watched.tracked])


def test_pace() -> None:
    pace = Pace(0.05, speed=0.5)
    assert pace.wait(10.0) == 0 and math.isnan(pace.factor)
    for now in (10.0, 10.1, 10.2):
        pace.stepped(now)
    assert pace.wait(10.25) == pytest.approx(0.05) and pace.factor == pytest.approx(0.5)
    pace.stepped(10.35)  # a little late, which is made up for
    assert pace.wait(10.35) == pytest.approx(0.05)
    pace.stepped(11.0)  # too late
    assert pace.wait(11.0) == pytest.approx(0.1)
    pace.stepped(11.5)
    assert pace.factor == pytest.approx(0.05 / 0.5)
    pace.restart()
    assert pace.wait(11.5) == 0 and math.isnan(pace.factor)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--speed", "0"], "speed from 0.05 to 2"),
        (["--port", "70000"], "port from 1 to 64000"),
        (["--threads", "-1"], "threads ≥ 0"),
    ],
)
def test_options_that_make_no_sense(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["view", *options]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_planner_is_chosen_as_for_mpc() -> None:
    config = cli.parse(["view", "--planner.population", "50", "--env", "Hopper-v5", "--planner", "cem"])
    assert isinstance(config, view.Config) and config.planner.population == 50 and config.host == "127.0.0.1"
