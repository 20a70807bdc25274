"""A learned model in place of the simulator: `mbrl mpc --model FOLDER`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from mbrl import Collector, RandomPolicy, vectorize
from mbrl.data import Replay
from mbrl.envs import make_world
from mbrl.errors import ContractError
from mbrl.experiments.cli import main
from mbrl.experiments.learned import learned_problem, load_model
from mbrl.features import Features
from mbrl.models import Ensemble, FitConfig, Trainer, save_ensemble

ENV = "InvertedPendulum-v5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ensemble, fitted to random steps of the world."""
    world = make_world(ENV)
    generator = torch.Generator().manual_seed(0)
    collector = Collector(
        vectorize(world.make, 4),
        RandomPolicy(world.actions, generator=generator),
        output=world.measure,
        seed=0,
    )
    replay = Replay(1_000, world.features.ny, world.actions.nu)
    replay.add(collector.collect(150).transition)
    dt = world.model.opt.timestep * world.frame_skip
    model = Ensemble(
        world.features.ny, 1, dt, features=world.features, members=3, hidden=(32, 32), generator=generator
    )
    data = replay.all()
    Trainer(model, FitConfig(batch=32, epochs=30)).fit(data.y, data.u, data.y_next, generator=generator)
    model.world = ENV
    path = tmp_path_factory.mktemp("learned") / "model"
    save_ensemble(path, model)
    return path


def balance(folder: Path | None, out: Path, *options: str) -> list[dict[str, str]]:
    """metrics.csv of 40 steps of balancing."""
    model = [] if folder is None else ["--model", str(folder)]
    code = main(
        ["mpc", "--env", ENV, "--planner", "icem", "--planner.population", "40", "--horizon", "15"]
        + ["--steps", "40", "--threads", "1", "--no-video", "--out", str(out), *model, *options]
    )
    assert code == 0
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "moments", "mean"])
def test_the_pole_stays_up_on_the_learned_model(folder: Path, tmp_path: Path, propagation: str) -> None:
    rows = balance(folder, tmp_path / "run", "--propagation", propagation, "--particles", "6")
    assert len(rows) == 40  # InvertedPendulum ends when the pole falls
    errors = [float(row["output_error"]) for row in rows if row["output_error"]]
    assert 0 < max(errors) < 2.0  # it is not the simulator that plans
    report = (tmp_path / "run" / "report.html").read_text()
    assert "a learned model" in report and "true simulator" not in report
    assert "plans are not drawn" in report and "expects the" not in report
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["model"]


@pytest.mark.parametrize("planner", ["ilqr", "ddp"])
def test_planners_with_derivatives_take_the_models(folder: Path, tmp_path: Path, planner: str) -> None:
    """First ones in closed form, second ones by automatic differentiation of the mean."""
    out = tmp_path / "run"
    command = ["mpc", "--env", ENV, "--model", str(folder), "--propagation", "mean", "--planner", planner]
    assert main([*command, "--horizon", "8", "--steps", "2", "--no-video", "--out", str(out)]) == 0
    with (out / "metrics.csv").open() as file:
        assert all(float(row["planner/slope"]) >= 0 for row in csv.DictReader(file))


def test_a_model_of_another_world_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mpc", "--env", "HalfCheetah-v5", "--model", str(folder), "--out", str(tmp_path / "a")]) == 1
    assert "this one was learned on InvertedPendulum-v5" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_model_of_another_control_step_is_refused(folder: Path) -> None:
    model = load_model(folder)
    model.dt *= 2
    with pytest.raises(ContractError, match=r"learned at 0.08 s"):
        learned_problem(make_world(ENV), model, 5, propagation="tsinf", particles=2, kappa=0.0)


def test_a_model_of_a_world_of_the_same_sizes_is_refused(folder: Path) -> None:
    world, model = make_world("pets-cartpole"), load_model(folder)
    assert model.world == ENV
    with pytest.raises(ContractError, match="this one was learned on InvertedPendulum-v5"):
        learned_problem(world, model, 5, propagation="tsinf", particles=2, kappa=0.0)
    model.world, model.features = None, Features(4)
    with pytest.raises(ContractError, match="with features of its own"):
        learned_problem(world, model, 5, propagation="tsinf", particles=2, kappa=0.0)


def test_the_model_of_a_training_run_whatever_its_device(tmp_path: Path) -> None:
    from mbrl.experiments import pets
    from mbrl.planners import ICEM

    config = pets.Config(
        planner=ICEM(population=6, iterations=1, elites=2),
        steps=30,
        random_steps=20,
        horizon=3,
        particles=2,
        members=2,
        hidden=(8,),
        learn_task=True,
        fit=FitConfig(epochs=2),
        out=tmp_path / "run",
    )
    run = pets.main(config)
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(saved))
    model = load_model(run)
    assert model.input_mean.device.type == "cpu" and model.input_mean.any() and model.world == "pets-cartpole"
    words = [
        "--planner",
        "mppi",
        "--planner.population",
        "8",
        "--threads",
        "1",
        "--horizon",
        "4",
        "--steps",
        "3",
        "--particles",
        "2",
        "--no-video",
    ]
    words += ["--model", str(run), "--learned-task", "--out", str(tmp_path / "control")]
    assert main(["mpc", "--env", "pets-cartpole", *words]) == 0


def test_a_task_that_was_not_learned_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(folder), "--learned-task", "--out", str(tmp_path / "a")]
    assert main(["mpc", "--env", ENV, *words]) == 1
    assert "needs an ensemble that learns the reward" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--kappa", "1"], "needs a learned model for kappa"),
        (["--model", "x", "--kappa", "1", "--propagation", "mean"], "kappa needs 2 particles"),
        (["--model", "x", "--particles", "1", "--propagation", "moments"], "moments needs 2 particles"),
        (["--model", "x", "--learned-task", "--propagation", "mean"], "A learned task needs particles"),
    ],
)
def test_settings_without_effect_are_refused(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mpc", "--env", ENV, *words]) != 0
    assert answer in capsys.readouterr().err


def test_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mpc", "--env", ENV, "--model", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["mpc", "--env", ENV, "--model", str(tmp_path / "empty"), "--out", str(tmp_path / "b")]) == 1
    assert "There is no checkpoint in" in capsys.readouterr().err
