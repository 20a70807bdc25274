"""mbrl diagnose: a sled that is learned in a second, four models of it, and what a user can get wrong."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from mbrl import DatasetWriter, Transition
from mbrl.collect import Collector
from mbrl.envs import World, make_world, mjcf_world
from mbrl.errors import RunFolderError
from mbrl.experiments import cli, verdict
from mbrl.experiments.benchmarks import diagnosis
from mbrl.experiments.benchmarks.record import RESULTS
from mbrl.experiments.charts import heat_map, scatter_chart
from mbrl.experiments.diagnose import Config, diagnose, parting
from mbrl.experiments.diagnosis_data import collect_mix, find_data
from mbrl.experiments.diagnosis_measures import (
    CELLS,
    Neighbours,
    choose,
    heads,
    labels,
    make_map,
    one_step,
    unit_of,
    wrapped,
)
from mbrl.experiments.diagnosis_numbers import Diagnosis
from mbrl.experiments.diagnosis_plans import STRONGER, Tried, rewards_along, search
from mbrl.experiments.diagnosis_report import write_report
from mbrl.features import Features
from mbrl.models import Ensemble, FitConfig, MeanDynamics, Trainer, save_ensemble
from mbrl.policies import RandomPolicy
from mbrl.resumable import vectorize
from mbrl.rollout import evaluate
from tests.problems import seeded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "diagnose.md"
SLED = """
<mujoco>
  <option timestep="0.05"/>
  <worldbody>
    <body><joint name="x" type="slide" axis="1 0 0" damping="0.5"/><geom size="0.1" mass="1" contype="0"/></body>
    <body><joint name="z" type="slide" axis="0 1 0" damping="0.5"/><geom size="0.1" mass="1" contype="0"/></body>
  </worldbody>
  <actuator><motor joint="x" ctrlrange="-3 3"/><motor joint="z" ctrlrange="-3 3"/></actuator>
</mujoco>
"""
SMALL = ["--evaluations", "900", "--horizon", "5", "--steps", "4", "--seeds", "1", "--checked", "2"]
SMALL += ["--transitions", "100"]


class ToTheCorner:
    """reward = −|(x, z) − (1, 1)|²; an episode ends where x is beyond 3 m."""

    def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
        return -((y_next[..., :2] - 1) ** 2).sum(-1)

    def terminated(self, y_next: Tensor) -> Tensor:
        return y_next[..., 0].abs() > 3


def sled() -> World:
    def start(model: Any, data: Any, rng: np.random.Generator) -> None:
        data.qpos[:] = rng.uniform(-0.5, 0.5, 2)

    return mjcf_world("sled", SLED, ToTheCorner(), frame_skip=2, reset=start, max_steps=40)


def drive(world: World, steps: int, seed: int) -> Transition:
    """Random actions, as float32 rows."""
    envs = vectorize(world.make, 10)
    policy = RandomPolicy(world.actions, generator=seeded(seed))
    rows = Collector(envs, policy, output=world.measure, seed=seed).collect(steps).transition
    envs.close()
    return rows.to("cpu", torch.float32)


def learn(world: World, rows: Transition, epochs: int = 40) -> Ensemble:
    dt = world.model.opt.timestep * world.frame_skip
    model = Ensemble(world.features.ny, world.actions.nu, dt, members=4, hidden=(24,), generator=seeded())
    fit = FitConfig(batch=64, epochs=epochs, learning_rate=5e-3)
    Trainer(model, fit).fit(rows.y, rows.u, rows.y_next, generator=seeded())
    model.world = world.name
    return model


@pytest.fixture(scope="module")
def world() -> World:
    return sled()


@pytest.fixture(scope="module")
def rows(world: World) -> Transition:
    return drive(world, 80, 0)


@pytest.fixture(scope="module")
def good(world: World, rows: Transition) -> Ensemble:
    return learn(world, rows)


def examined(
    folder: Path,
    world: World,
    model: Ensemble,
    training: Transition,
    *planners: str,
    evaluations: int = 4_000,
) -> Diagnosis:
    """A diagnosis of a model in the folder, with data of its own."""
    save_ensemble(folder / "model", model)
    for name, part in (("training", training), ("held", drive(world, 40, 1))):
        with DatasetWriter(folder / name) as data:
            data.append(part)
    config = Config(
        folder=folder / "model",
        planners=planners,
        evaluations=evaluations,
        horizon=8,
        steps=6,
        seeds=2,
        checked=3,
        particles=4,
        held_out=folder / "held",
        training=folder / "training",
    )
    return diagnose(config, model, world, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def fed(
    tmp_path_factory: pytest.TempPathFactory, world: World, rows: Transition, good: Ensemble
) -> Diagnosis:
    """The good model, under a planner with a sensible budget."""
    return examined(tmp_path_factory.mktemp("fed"), world, good, rows, "icem")


def test_a_good_model_is_fine_and_a_starved_planner_is_stuck(
    tmp_path: Path, world: World, rows: Transition, good: Ensemble, fed: Diagnosis
) -> None:
    assert fed.verdict is not None and fed.verdict.name == "fine"
    e = fed.findings["icem"].evidence
    assert e.plans == 6 and e.diverged == 0 and abs(e.gap) < 0.05 and e.model < 0.05
    assert (fed.findings["icem"].parted == 8).all()
    assert np.mean(fed.findings["icem"].trial.returns) > np.mean(fed.random) + 1
    tried = fed.findings["icem"].trial.tried
    assert (tried.best >= tried.stronger_realised - 1e-9).all()
    assert (tried.stronger_imagined >= tried.imagined.sum(-1) - 1e-4).all()

    starved = examined(tmp_path, world, good, rows, "random-shooting", evaluations=720)
    found = starved.findings["random-shooting"]
    assert found.verdict.name == "solver stuck" and found.evidence.solver > 0.33
    assert abs(found.evidence.gap) < 0.05


def test_an_output_that_was_learned_wrong_is_named(tmp_path: Path, world: World, rows: Transition) -> None:
    y_next = rows.y_next.clone()
    y_next[:, 2] += 0.3
    model = learn(world, dataclasses.replace(rows, y_next=y_next))
    found = examined(tmp_path, world, model, rows, "icem").findings["icem"]
    assert found.verdict.name == "model exploited" and "qvel/x" in found.verdict.remedy
    assert found.evidence.worst == "qvel/x" and found.evidence.coverage < 0.2
    assert (found.parted < 8).any()


def test_a_model_of_a_tenth_of_the_states_is_uncertain_or_exploited(
    tmp_path: Path, world: World, rows: Transition
) -> None:
    few = rows[(rows.y[:, 0] < 0) & (rows.u[:, 0] < 0)][:30]
    found = examined(tmp_path, world, learn(world, few, 20), few, "icem").findings["icem"]
    assert found.verdict.name in ("model uncertain here", "model exploited")
    assert found.evidence.off > 0.25 and found.evidence.worst_error > 0.5


class Links(HTMLParser):
    """Everything that a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {k}" for k, _ in attrs if k in ("src", "href", "data", "srcset")]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fit of random steps of cart-pole, with the data set that it was made from."""
    folder = tmp_path_factory.mktemp("cart-pole")
    cart = make_world("cart-pole")
    with DatasetWriter(folder / "data", {"world": "cart-pole", "dt": 0.05}) as data:
        data.append(drive(cart, 120, 0))
    options = ["--members", "3", "--hidden", "16", "--fit.epochs", "3", "--test", "0.4"]
    assert cli.main(["fit", str(folder / "data"), "--out", str(folder / "fit"), *options]) == 0
    return folder


def test_the_command_reports(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One seed; a planner that cannot run is told and costs the others nothing."""
    out = tmp_path / "out"
    planners = ["--planners", "icem", "ilqr", "fddp", "--particles", "9", "--maps", "qpos/hinge", "3"]
    assert cli.main(["diagnose", str(stored / "fit"), "--out", str(out), *SMALL, *planners]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the fit kept to report on" in shown and "What to do" in shown
    assert "icem needs at least 990 steps" in shown
    found = json.loads((out / "report.json").read_text())
    assert set(found["planners"]) == {"ilqr", "fddp"} and set(found["refused"]) == {"icem"}
    assert found["verdict"]["name"] in {said["name"] for said in found["planners"].values()}
    assert found["outputs"] == ["qpos/slider", "qpos/hinge", "qvel/slider", "qvel/hinge"]
    for said in (found["held_out"], found["planners"]["ilqr"]["one_step"]):
        assert {"nll", "coverage", "expected_error", "rank"} <= set(said)
    assert len(found["planners"]["ilqr"]["open_loop"]["planned"]["error"]) == 5
    assert found["planners"]["ilqr"]["distance_median"] > 0
    with (out / "metrics.csv").open() as file:
        plans = list(csv.DictReader(file))
    assert [row["planner"] for row in plans] == ["ilqr"] * 2 + ["fddp"] * 2
    assert [row["step"] for row in plans] == ["0", "3"] * 2
    page = (out / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.found == [] and "http" not in re.sub(r"xmlns='[^']*'", "", page) and "url(" not in page
    for words in ("icem was not run", "Error against horizon", "Coverage", "qpos/hinge (units of y)"):
        assert words in page
    assert "nan" not in page


def test_a_model_of_which_nothing_is_known(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No training data, no held-out data, a single deterministic member, nobody has named its world."""
    cart = make_world("cart-pole")
    model = Ensemble(
        4, 1, 0.05, features=cart.features, members=1, hidden=(8,), probabilistic=False, generator=seeded()
    )
    save_ensemble(tmp_path / "model", model)
    command = [
        "diagnose",
        str(tmp_path / "model"),
        "--out",
        str(tmp_path / "out"),
        *SMALL,
        "--planners",
        "ilqr",
    ]
    assert cli.main(command) == 1
    assert "--env NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main([*command, "--env", "cart-pole"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "is not known" in shown and "fresh transitions" in shown
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["planners"]["ilqr"]["evidence"]["distance"] is None
    assert found["planners"]["ilqr"]["evidence"]["coverage"] is None
    assert "nll" not in found["held_out"]


def test_no_planner_can_run(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--planners", "icem", "--particles", "90"]
    assert cli.main(["diagnose", str(stored / "fit"), "--out", str(tmp_path / "out"), *options]) == 0
    assert "there is no verdict" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] is None
    assert "icem was not run" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "answer"),
    [
        (["--env", "pets-cartpole"], 1, "this one was learned on cart-pole"),
        (["--env", "cart-pol"], 2, "There is no world called 'cart-pol'"),
        (["--env", "Pendulum-v1"], 1, "has no MuJoCo simulator"),
        (["--planners", "ice"], 2, "There is no planner called 'ice'"),
        (["--planner", "icem"], 2, "--planners icem"),
        (["--maps", "qpos/hinge", "qpos/wheel"], 2, "qpos/slider"),
        (["--maps", "1"], 2, "two numbers of y"),
        (["--maps", "1", "qpos/hinge"], 1, "two different numbers"),
        (["--seeds", "0"], 2, "seeds ≥ 1"),
        (["--held-out", "WRONG"], 1, "(ny, nu) = (4, 2), but the model has (4, 1)"),
        (["--training", "WRONG"], 1, "(ny, nu) = (4, 2), but the model has (4, 1)"),
        (["--training", "NONE"], 1, "folder of a data set"),
    ],
)
def test_bad_usage_is_told(
    options: list[str],
    code: int,
    answer: str,
    stored: Path,
    rows: Transition,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with DatasetWriter(tmp_path / "WRONG") as data:
        data.append(rows)
    options = [str(tmp_path / word) if word in ("WRONG", "NONE") else word for word in options]
    command = ["diagnose", str(stored / "fit"), "--out", str(tmp_path / "out"), *SMALL, *options]
    assert cli.main(command) == code
    shown = capsys.readouterr().err
    assert answer in " ".join(shown.split()) and "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_rewards_of_steps_add_up_to_the_return(world: World) -> None:
    """An end inside the plan included."""
    problem = world.problem(8, threads=1)
    env = world.make()
    _, info = env.reset(seed=0)
    env.close()
    x = torch.as_tensor(info["state"])[None].repeat(3, 1)
    x[2, 1] = 2.9  # m, after the time: the next steps to the right end the episode
    u = torch.stack([torch.zeros(8, 2), -torch.ones(8, 2), 3 * torch.ones(8, 2)]).double()
    each = rewards_along(problem, problem.dynamics, x, u)
    whole = evaluate(problem, problem.dynamics, x, u[:, None]).cost[:, 0]
    torch.testing.assert_close(each.sum(-1), -whole)
    assert each[2, -1] == 0 and (each[:2] < 0).all()


def test_a_search_starts_from_the_plan_and_finds_better_ones(world: World, good: Ensemble) -> None:
    problem = dataclasses.replace(world.problem(8, dynamics=MeanDynamics(good)), particles=1)
    x, u = torch.zeros(3, 4), torch.zeros(3, 8, 2)
    plans = search(problem, x, u, 8_000, polish=good, generator=seeded())
    assert plans.shape == (3, 4, 8, 2) and torch.equal(plans[:, 0], u)
    cost = evaluate(problem, problem.dynamics, x, plans).cost
    assert (cost[:, 1:] < cost[:, :1]).all()
    assert (plans >= world.actions.low).all() and (plans <= world.actions.high).all()


def test_the_step_at_which_sums_part() -> None:
    nothing = torch.zeros(3, 4)
    imagined = torch.tensor([[0.0, 0.2, 0.2, 0.0], [0.5, -0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    fields = {field.name: nothing for field in dataclasses.fields(Tried)}
    tried = Tried(**{**fields, "imagined": imagined, "realised": nothing, "babble_std": 0.0})  # type: ignore[arg-type]
    assert parting(tried, 0.3).tolist() == [2, 0, 4]


def test_errors_outputs_and_neighbours(world: World, rows: Transition, good: Ensemble) -> None:
    unit = unit_of(good, rows)
    before = one_step(good, rows, unit)
    shifted = dataclasses.replace(rows, y_next=rows.y_next + torch.tensor([0.0, 0.0, 0.0, 1.0]))
    after = one_step(good, shifted, unit)
    assert after.output_error.argmax() == 3 and torch.equal(after.output_error[:3], before.output_error[:3])
    assert float(after.output_error[3]) == pytest.approx(1 / float(unit[3]), rel=0.1)
    neighbours = Neighbours(good, rows)
    assert float(neighbours.distance(rows.y, rows.u).max()) == 0
    far = neighbours.distance(rows.y + 3 * good.input_scale[:4], rows.u)
    assert 1 < float(far.median()) < 2 * 3 * 4**0.5
    assert torch.isinf(neighbours.distance(rows.y[:1] * torch.nan, rows.u[:1])).all()


def test_reward_and_end_are_counted(world: World, rows: Transition, good: Ensemble) -> None:
    found = heads(good, rows, world)
    assert not found.learned and found.reward_rmse < 0.2 * found.reward_std
    assert sum(map(sum, found.confusion)) == len(rows.reward)
    gone = dataclasses.replace(rows[:3], y=rows.y[:3] * 0 + 4, terminated=torch.tensor([True, False, True]))
    assert heads(good, gone, world).confusion == [[0, 1], [0, 2]]
    learned = Ensemble(4, 2, 0.1, hidden=(8,), reward=True, termination=True, generator=seeded())
    found = heads(learned, rows, world)
    assert found.learned and found.learned_end


def test_maps_show_where(world: World) -> None:
    y = torch.rand(4_000, 4, generator=seeded())
    error = 0.01 + (y[:, 2] > 0.5) * y[:, 1]
    names = labels(world)
    assert names == ["qpos/x", "qpos/z", "qvel/x", "qvel/z"]
    assert choose(names, (), y, error) == (1, 2)
    assert choose(names, ("3", "qpos/x"), y, error) == (3, 0)
    found = make_map(names, (1, 2), y, 2 * error, error)
    assert found.names == ("qpos/z", "qvel/x") and found.count.shape == (CELLS, CELLS)
    np.testing.assert_allclose(found.disagreement, 2 * found.error)
    lower, upper = found.error[: CELLS // 2 - 1], found.error[CELLS // 2 + 1 :]
    assert np.nanmax(lower) < 0.02 and np.nanmax(upper) > 0.8
    assert (np.diff(np.nanmean(upper, 0)) > -0.02).all()  # it rises along the first number


def test_maps_take_angles_once_around() -> None:
    model = Ensemble(2, 1, 0.1, features=Features(2, angles=(1,)), hidden=(4,), generator=seeded())
    y = torch.tensor([[7.0, 7.0], [-9.0, -3.0]])
    torch.testing.assert_close(wrapped(model, y), torch.tensor([[7.0, 7.0 - 2 * torch.pi], [-9.0, -3.0]]))


def test_charts_leave_out_what_cannot_be_drawn() -> None:
    points = {"a": [(1.0, 2.0), (np.nan, 1.0)], "b": [(0.0, 1.0)], "c": [(2.0, 3.0)]}
    plain = scatter_chart(points, xlabel="x", label="y", diagonal=True)
    assert plain.count("class='mark") + plain.count('class="mark') == 3 and "limit" in plain
    assert scatter_chart(points, xlabel="x", label="y", log=True).count('class="mark') == 2
    assert scatter_chart({"a": []}, xlabel="x", label="y") == ""
    picture = heat_map(
        [[1.0, np.nan], [0.0, 10.0]], across=(0, 1), up=(0, 1), xlabel="x", label="y", unit="n"
    )
    assert picture.count("fill=") == 2 + 24
    assert heat_map([[np.nan]], across=(0, 1), up=(0, 1), xlabel="x", label="y", unit="n") == ""


def test_fresh_data_are_of_two_policies() -> None:
    rows = collect_mix(make_world("InvertedPendulum-v5"), 160, 5, seed=0)
    assert len(rows.reward) == 160 and not torch.equal(rows.u[:80].std(), rows.u[80:].std())
    assert not set(rows.episode[:80].tolist()) & set(rows.episode[80:].tolist())


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path, fed: Diagnosis) -> None:
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(fed, Config(folder=tmp_path), tmp_path / "nowhere" / "report.html")


def test_the_data_of_a_training_run_are_its_training_data(
    tmp_path: Path, world: World, rows: Transition, good: Ensemble
) -> None:
    (tmp_path / "checkpoints").mkdir()
    with DatasetWriter(tmp_path / "data") as data:
        data.append(rows)
    options: dict[str, Any] = {"held_out": None, "training": None, "transitions": 32, "horizon": 3, "seed": 0}
    known = find_data(tmp_path, good, world, **options)
    assert known.training is not None and torch.equal(known.training.y, rows.y)
    assert len(known.held_out.reward) == 32 and "fresh" in known.notes[1]
    (tmp_path / "data" / "manifest.json").write_text("{")
    known = find_data(tmp_path, good, world, **options)
    assert known.training is None and "cannot be read" in known.notes[0]
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in find_data(tmp_path, good, world, **options).notes[0]


def test_the_page_tells_thresholds_and_results_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for said, value in (
        ("promises more than {:g} more, and earns more than {:g} more", verdict.STUCK),
        ("more than {:g} above the realised one", verdict.GAP),
        ("off by more than {:g} either way", verdict.OFF),
        ("model's part is above {:g}", verdict.LACK),
        ("a search with {} times the evaluations", STRONGER),
        ("more than {:.0f} % of the truths", 100 * verdict.KNOWS),
        ("or more than {:.0f} % are", 100 * verdict.HALF_KNOWS),
    ):
        assert said.format(value, value) in " ".join(page.split())
    assert (verdict.WARNS, verdict.WRONG) == (2, 0.5)  # "twice", "half a deviation"
    table = page.split("<!-- diagnosis -->\n")[1].split("\n<!-- /diagnosis -->")[0]
    content = json.loads((RESULTS / "diagnosis.json").read_text(encoding="utf-8"))
    assert table == diagnosis.summary(content)
    for result in content["results"]:  # thresholds were not changed after the measurement
        assert verdict.judge(verdict.Evidence(**result["evidence"])).name == result["verdict"]


@pytest.mark.parametrize(
    "line", re.findall(r"^mbrl (diagnose .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
)
def test_the_commands_of_the_page_are_understood(line: str) -> None:
    assert isinstance(cli.parse(line.split()), Config)
