"""`mbrl mpc --planner nmpc`: on the analytic world, on learned models, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from mbrl import Constraint, ContractError, Plan
from mbrl.envs import WORLDS, Within, World, make_world
from mbrl.envs.cart_pole import cart_pole
from mbrl.errors import PlanWarning
from mbrl.experiments import cli, control, motion_plots, mpc
from mbrl.experiments.recording import Recording, tracked_body
from mbrl.models import Ensemble, FitConfig, Trainer, save_ensemble
from mbrl.planners import NMPC, ScenarioNMPC
from tests.problems import seeded

SHORT = ["mpc", "--env", "cart-pole", "--horizon", "8", "--steps", "3", "--no-video"]


@pytest.fixture(autouse=True)
def _restore() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    mujoco.set_mju_user_warning(None)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def told(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ensemble, fitted to random steps of the analytic model about the hanging pole."""
    world, generator = make_world("cart-pole"), seeded()
    assert world.analytic is not None
    reach = torch.tensor([0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
    y = reach * (2 * torch.rand(600, 4, generator=generator, dtype=torch.float64) - 1)
    u = 40 * torch.rand(600, 1, generator=generator, dtype=torch.float64) - 20
    model = Ensemble(4, 1, 0.05, features=world.features, members=3, hidden=(24,), generator=generator)
    data = (part.float() for part in (y, u, world.analytic.step(y, u, 0)))
    Trainer(model, FitConfig(batch=32, epochs=40)).fit(*data, generator=generator)
    model.world = "cart-pole"
    path = tmp_path_factory.mktemp("learned") / "model"
    save_ensemble(path, model)
    return path


def test_options_of_the_program_come_in_any_order() -> None:
    words = [
        ["--planner.solver", "ipopt"],
        ["--planner", "nmpc"],
        ["--env=cart-pole"],
        ["--planner.transcription=radau"],
    ]
    wanted = mpc.Config(planner=NMPC(solver="ipopt", transcription="radau"), env="cart-pole")
    for order in ([0, 1, 2, 3], [3, 2, 0, 1], [1, 3, 0, 2]):
        assert cli.parse(["mpc", *(word for i in order for word in words[i])]) == wanted
    simpson = ["--planner.transcription", "hermite-simpson", "--planner", "nmpc", "--planner.solver", "sqp"]
    config = cli.parse(["mpc", "--env", "cart-pole", *simpson])
    assert config.planner == NMPC(transcription="hermite-simpson", solver="sqp")


@pytest.mark.parametrize(
    "options", [[], ["--planner.solver", "ipopt", "--planner.transcription", "radau"], ["--latency", "1"]]
)
def test_a_run_on_the_analytic_model(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main([*SHORT, "--planner", "nmpc", *options, "--out", str(out)]) == 0
    shown = told(capsys)
    assert "NMPC plans to the horizon: that the task may end an episode earlier is left out." in shown
    assert "Of 3 programs: 3 optimal." in shown and "The constraint track was held in all 4 states" in shown
    written = rows(out)
    assert [row["planner/status"] for row in written] == ["0.0"] * 3
    assert all(float(row["planner/gap"]) < 1e-6 and float(row["planner/violation"]) < 1e-6 for row in written)
    assert all(row["planner/explanation"] == "" for row in written)
    if not options:  # by shooting the model is the plant
        assert all(float(row["output_error"]) < 1e-6 for row in written[1:])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "ahead in the analytic model" in page and "Feasibility" in page and "Constraint: track" in page
    assert "simulated 0 candidate" not in page and "a few of the plans" not in page


@pytest.mark.parametrize("planner", ["cem", "ilqr"])
def test_one_flag_swaps_the_planner(planner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others plan in the simulator and hold no constraints, which is said."""
    options = ["--planner", planner, *(["--planner.population", "40"] if planner == "cem" else [])]
    assert cli.main([*SHORT, *options, "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    shown = told(capsys)
    assert "holds no constraints: track is left out and only watched." in shown
    assert "constraint The constraint track was held" in shown and "programs" not in shown
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Constraint: track" in page and "ahead in the true simulator" in page and "Feasibility" not in page


@pytest.mark.parametrize("planner", ["nmpc", "scenario-nmpc"])
def test_a_run_on_a_learned_model(
    planner: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--planner", planner, "--model", str(folder), "--threads", "1", "--out", str(out)]
    assert cli.main([*SHORT, *words]) == 0
    assert "Of 3 programs: 3 optimal." in told(capsys)
    written = rows(out)
    errors = [float(row["output_error"]) for row in written[1:]]
    assert 1e-6 < max(errors) < 1.0 and all(row["fallback"] == "0" for row in written)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "a learned model" in page and "plans are not drawn" in page and "Constraint: track" in page


@pytest.mark.parametrize("planner", ["nmpc", "scenario-nmpc"])
def test_a_run_of_a_robot_on_a_learned_model(planner: str, tmp_path: Path) -> None:
    """A network that has learned nothing yet."""
    world = make_world("HalfCheetah-v5")
    ny, nu, dt = world.features.ny, world.actions.nu, world.dynamics(threads=1).dt
    model = Ensemble(ny, nu, dt, features=world.features, members=2, hidden=(4,), generator=seeded())
    model.world = "HalfCheetah-v5"
    save_ensemble(tmp_path / "model", model)
    words = ["--planner", planner, "--env", "HalfCheetah-v5", "--model", str(tmp_path / "model")]
    out = tmp_path / "run"
    assert cli.main([*SHORT, "--horizon", "2", *words, "--threads", "1", "--out", str(out)]) == 0
    written = rows(out)
    assert [row["followed"] for row in written] == ["plan"] * 3
    assert all(0 < float(row["planner/iterations"]) and float(row["planner/status"]) == 0 for row in written)


@pytest.mark.parametrize("planner", ["nmpc", "scenario-nmpc"])
def test_the_problem_on_a_learned_model(planner: str, folder: Path) -> None:
    """The mean as one expression, or each elite as a scenario; constraints in, the end of an episode out."""
    config = cli.parse(["mpc", "--env", "cart-pole", "--planner", planner, "--model", str(folder)])
    world = make_world("cart-pole")
    problem, _ = control.plan_in(config, world)
    many = isinstance(config.planner, ScenarioNMPC)
    members = problem.dynamics.members if many else [problem.dynamics]
    assert len(members) == (3 if many else 1) and len({member.expression for member in members}) == 1
    assert problem.constraints == world.constraints and problem.terminated is None and problem.particles == 1
    sampled, _ = control.plan_in(dataclasses.replace(config, planner=cli.parse(["mpc"]).planner), world)
    assert sampled.constraints == () and sampled.terminated is not None and sampled.particles == 20


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--planner", "nmpc"], "the simulator of HalfCheetah-v5 is none. Plan in a model that was learned on it, --model FOLDER, or take a world with an analytic model: --env acrobot | cart-pole | double-integrator | pendulum."),
        (["--planner", "scenario-nmpc"], "ScenarioNMPC plans for all members of a learned ensemble, but none is given: --model FOLDER"),
        (["--planner", "nmcp"], "Did you mean nmpc"),
        (["--planner", "nmpc", "--env", "cartpole"], "Did you mean"),
        (["--planner", "nmpc", "--planner.solver", "ipot"], "ipopt"),
        (["--planner", "nmpc", "--planner.transcription", "shoting"], "shooting"),
        (["--planner", "nmpc", "--planner.population", "9"], "--planner.population"),
        (["--planner", "nmpc", "--planner.iterations", "0"], "iterations ≥ 1"),
        (["--planner", "nmpc", "--planner.transcription", "hermite-simpson"], 'Use solver="ipopt"'),
        (["--planner", "nmpc", "--env", "cart-pole", "--exact"], "Leave --exact out"),
        (["--planner", "nmpc", "--env", "cart-pole", "--smooth"], "Leave --smooth out"),
        (["--planner", "nmpc", "--env", "cart-pole", "--kappa", "1"], "needs a learned model for kappa"),
        (["--planner", "nmpc", "--model", "x", "--particles", "7", "--kappa", "1"], "NMPC plans on the mean of a learned ensemble, by the world's reward. Leave --particles and --kappa out."),
        (["--planner", "scenario-nmpc", "--model", "x", "--propagation", "mean"], "plans on each member of a learned ensemble, by the world's reward. Leave --propagation out."),
        (["--planner", "nmpc", "--model", "x", "--learned-task"], "Leave --learned-task out."),
        (["--planner", "nmpc", "--env", "cart-pole", "--planner.final-time", "1", "2", "--planner.solver", "ipopt", "--planner.transcription", "radau"], "Leave --planner.final-time out"),
        (["--planner", "nmpc", "--env", "cart-pole", "--budget-ms", "5"], "cannot stop the solver fatrop"),
        (["--planner", "nmpc", "--env", "cart-pole", "--planner.final-time", "1", "2", "--planner.solver", "ipopt"], "a free final_time needs steps of any length"),
    ],
)  # fmt: skip
def test_wrong_usage_is_answered_with_2(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["mpc", *arguments]) == 2
    shown = told(capsys)
    assert answer in shown and "Traceback" not in shown


def test_a_learned_mean_may_be_asked_for(folder: Path) -> None:
    words = [
        "mpc",
        "--env",
        "cart-pole",
        "--planner",
        "nmpc",
        "--propagation",
        "mean",
        "--model",
        str(folder),
    ]
    assert cli.parse(words).propagation == "mean"


def test_collocation_of_a_net_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--planner", "nmpc", "--planner.transcription", "radau", "--model", str(folder)]
    assert cli.main([*SHORT, *words, "--out", str(tmp_path / "run")]) == 1
    assert "needs dynamics that are an ODE, but Exported only has steps" in told(capsys)
    assert not (tmp_path / "run").exists()


def use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the command line know a cart-pole with other constraints."""

    def build() -> World:
        return dataclasses.replace(cart_pole(), **changes)

    monkeypatch.setitem(WORLDS, "cart-pole", dataclasses.replace(WORLDS["cart-pole"], build=build))


def test_why_plans_are_not_followed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pole is to be turned, and turned slowly, at once."""
    turned = Constraint(Within(1, 0.5, 1.0), name="turned")
    slow = Constraint(Within(3, -0.1, 0.1), name="slow")
    use(monkeypatch, constraints=(turned, slow))
    out = tmp_path / "run"
    with pytest.warns(PlanWarning, match="turned"):
        assert cli.main([*SHORT, "--planner", "nmpc", "--out", str(out)]) == 1
    shown = told(capsys)
    assert "Of 3 programs: 3 what must hold does not hold." in shown
    why = r"3 times: slow\[0\] is violated by # at step #, turned\[1\] is violated by # at step # \(fatrop"
    assert re.search(f"solver {why}", shown)
    assert re.search(rf"None of the 3 plans was usable \({why}", shown)
    assert "constraint The constraint turned was violated in 4 of 4 states, by at most 0." in shown
    written = rows(out)
    assert all("turned[1] is violated by 0." in row["planner/explanation"] for row in written)
    assert [row["fallback"] for row in written] == ["1"] * 3
    assert [row["followed"] for row in written] == ["safe"] * 3  # and yet an action, within the bounds
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Of 3 programs: 3 what must hold does not hold." in page
    assert 'class="marked"' in page and "Shaded: violated by more than 0.001." in page


def recording(world: World, positions: list[float], actions: list[float]) -> Recording:
    """A run through these positions of the cart."""
    states = [torch.tensor([9.0, q, 0.0, 0.0, 0.0], dtype=torch.float64) for q in positions]
    taken = [torch.tensor([u], dtype=torch.float64) for u in actions]
    return Recording(world, world.problem(4, dynamics=world.analytic), states, taken, [], [])


def test_plans_in_the_analytic_model_are_drawn() -> None:
    """The end of the pole hangs under the cart, then stands over it."""
    world = make_world("cart-pole")
    states = torch.zeros(1, 5, 4, dtype=torch.float64)
    states[0, 1:, 0], states[0, 1:, 1] = 0.5, torch.pi
    run = recording(world, [0.0, 0.0], [0.0])
    plan = Plan(actions=torch.zeros(1, 4, 1), cost=torch.zeros(1), states=states)
    run.plans.append(plan)
    body = tracked_body(world.model)
    path = run.traces(0, body)
    assert run.shows_plans and world.model.body(body).name == "pole" and path.shape == (1, 5, 3)
    np.testing.assert_allclose(path[0, :2], [[0.0, 0.0, -0.5], [0.5, 0.0, 0.5]], atol=1e-12)


def test_violations_are_counted_at_every_state() -> None:
    """At the last state with the action before it; an equation by |g|."""
    world = make_world("cart-pole")
    (track,) = world.constraints
    weak = Constraint(functools.partial(lambda low, y, u, k, p: u.abs() - low, 1.5), name="weak", soft=2.0)
    still = Constraint(lambda y, u, k, p: y[..., :1] * k, kind="eq", name="still")
    world = dataclasses.replace(world, constraints=(track, weak, still))
    run = recording(world, [0.0, 1.25, 1.0005, -1.5], [0.0, 2.0, 3.0])
    assert run.violations() == {"track": (2, 0.5), "weak": (3, 1.5), "still": (3, 4.5)}
    held = run.constrained()
    assert held["track"].shape == (4, 2) and held["weak"][:, 0].tolist() == [-1.5, 0.5, 1.5, 1.5]


def test_constraints_are_drawn_with_their_bounds() -> None:
    world = make_world("cart-pole")
    text = motion_plots.constraints(recording(world, [0.0, 1.25, 0.5, -1.5], [0.0] * 3))
    titles = re.findall(r"<h3>([^<]+)</h3>", text)
    assert titles == ["Constraint: track", "g of track"]
    position, g = text.split("<div class='card'>")[1:]
    assert "Dashed: the limits, -1 and 1" in position and position.count('class="limit"') == 2
    assert g.count('class="limit"') == 1 and "the largest of its 2 numbers" in g
    width = 520 - 58 - 14
    for chart in (position, g):  # from half-way before to half-way after each; the end has no after
        bands = re.findall(r'class="marked" x="([\d.]+)" y="12" width="([\d.]+)"', chart)
        found = [float(number) for band in bands for number in band]
        wanted = [58 + width / 6, width / 3, 58 + width * 5 / 6, width / 6]
        assert found == pytest.approx(wanted, abs=0.1)
    soft = dataclasses.replace(
        world, constraints=(Constraint(lambda y, u, k, p: -u.abs() - 1.0, soft=3.0, name="push"),)
    )
    text = motion_plots.constraints(recording(soft, [0.0, 1.25], [0.0]))
    assert "It is soft" in text and "held" in text and "marked" not in text
    assert (
        motion_plots.constraints(recording(dataclasses.replace(world, constraints=()), [0.0, 1.0], [0.0]))
        == ""
    )


def test_terminal_constraints_of_a_world_are_refused() -> None:
    world = make_world("cart-pole")
    with pytest.raises(ContractError, match='constraints of cart-pole need at="path"'):
        dataclasses.replace(world, constraints=(Constraint(Within(0, -1.0, 1.0), at="terminal"),))
