"""A learned model in place of the simulator: `mbrl mpc --model FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mbrl import Collector, RandomPolicy, vectorize
from mbrl.data import Replay
from mbrl.envs import make_world
from mbrl.experiments.cli import main
from mbrl.experiments.learned import learned_problem, load_model
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
    path = tmp_path_factory.mktemp("learned") / "model"
    save_ensemble(path, model)
    return path


def balance(folder: Path | None, out: Path, *options: str) -> list[dict[str, str]]:
    """metrics.csv of 40 steps of balancing."""
    import csv

    model = [] if folder is None else ["--model", str(folder)]
    code = main(
        ["mpc", "--env", ENV, "--planner", "icem", "--planner.population", "40", "--horizon", "15"]
        + ["--steps", "40", "--no-video", "--out", str(out), *model, *options]
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


def test_a_model_of_another_world_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mpc", "--env", "HalfCheetah-v5", "--model", str(folder), "--out", str(tmp_path / "a")]) == 1
    assert "it was learned on another world" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_model_of_another_control_step_is_refused(folder: Path) -> None:
    model = load_model(folder)
    model.dt *= 2
    with pytest.raises(Exception, match="learned at 0.08 s"):
        learned_problem(make_world(ENV), model, 5, propagation="tsinf", particles=2, kappa=0.0)


def test_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mpc", "--env", ENV, "--model", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["mpc", "--env", ENV, "--model", str(tmp_path / "empty"), "--out", str(tmp_path / "b")]) == 1
    assert "error:" in capsys.readouterr().err
