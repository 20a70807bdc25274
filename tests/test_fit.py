"""mbrl fit: from a stored data set to a saved, recalibrated ensemble and its report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mbrl import DatasetWriter, Features, Transition
from mbrl.experiments import cli
from mbrl.experiments.calibration_plots import plot_calibration
from mbrl.experiments.fit import Config, Losses, main, split
from mbrl.models import Epoch, FitConfig, HorizonError, load_ensemble
from tests.problems import seeded

TINY = ["--members", "2", "--hidden", "16", "--fit.batch", "32"]


def walk(n: int, length: int = 50, ny: int = 3, seed: int = 0) -> Transition:
    """y' = 0.9 y + 0.3 u + noise of standard deviation 0.1, in episodes of `length` steps."""
    g = seeded(seed)
    y, rows = torch.zeros(ny), []
    for i in range(n):
        u = 2 * torch.rand(1, generator=g) - 1
        y_next = 0.9 * y + 0.3 * u + 0.1 * torch.randn(ny, generator=g)
        rows.append((y, u, y_next))
        y = y_next if (i + 1) % length else torch.randn(ny, generator=g)
    y_all, u_all, next_all = (torch.stack(parts) for parts in zip(*rows, strict=True))
    index = torch.arange(n)
    return Transition(
        y=y_all,
        u=u_all,
        reward=torch.zeros(n),
        y_next=next_all,
        terminated=torch.zeros(n, dtype=torch.bool),
        truncated=(index + 1) % length == 0,
        episode=index // length,
    )


def store(path: Path, transition: Transition, **metadata: Any) -> Path:
    with DatasetWriter(path, {"dt": 0.05, **metadata}) as data:
        half = len(transition.reward) // 2
        data.append(transition[:half])
        data.append(transition[half:])
    return path


def fit(data: Path, out: Path, *options: str) -> int:
    return cli.main(["fit", str(data), "--out", str(out), *TINY, *options])


def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return content


def test_a_data_set_becomes_a_calibrated_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = store(tmp_path / "data", walk(2_000))
    out = tmp_path / "run"
    assert fit(data, out, "--fit.epochs", "25", "--fit.batch", "64", "--test", "0.3") == 0
    found = report(out)
    assert found["transitions"] == {"fitted": 1_400, "recalibrated": 300, "reported": 300}
    said = found["calibration"]["recalibrated"]
    for level, share in said["coverage"].items():
        assert abs(share - float(level)) < 0.05
    assert said["rmse"] == pytest.approx([0.1] * 3, rel=0.15)
    assert said["aleatoric"] > 0.8 and len(said["coverage_each"]) == 3
    assert len(found["open_loop"]["error"]) == 30
    assert found["open_loop"]["error"][0] == pytest.approx(found["open_loop"]["spread"][0], rel=0.3)
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["fit"]["epochs"] and set(rows[0]) >= {"epoch", "train_0", "holdout_1"}
    best = [min(float(row[f"holdout_{e}"]) for row in rows) for e in range(2)]
    assert found["fit"]["best"] == pytest.approx(best, rel=0.02)
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["algorithm"] == "fit"

    model = load_ensemble(out / "model")
    assert model.features == Features(3) and model.dt == 0.05
    assert model.temperature.tolist() == found["temperature"] != [1.0] * 3
    y = torch.tensor([[0.5, -0.2, 0.0]])
    torch.testing.assert_close(
        model.predict(y, torch.ones(1, 1)).y_next.mean(0), 0.9 * y + 0.3, atol=0.05, rtol=0.0
    )
    shown = capsys.readouterr().out
    assert "truths inside 95 % intervals" in shown and str(out / "model") in shown.replace("\n", "")


def test_a_seed_gives_the_same_model(tmp_path: Path) -> None:
    data = store(tmp_path / "data", walk(300))
    state = torch.get_rng_state()
    models = []
    for name in ("a", "b"):
        assert fit(data, tmp_path / name, "--fit.epochs", "2", "--seed", "3", "--test", "0") == 0
        models.append(load_ensemble(tmp_path / name / "model").state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_world_of_the_data_gives_the_features(tmp_path: Path) -> None:
    data = store(tmp_path / "data", walk(300), world="Pendulum-v1")
    assert fit(data, tmp_path / "run", "--fit.epochs", "1", "--no-recalibrate", "--horizon", "80") == 0
    model = load_ensemble(tmp_path / "run" / "model")
    assert model.features == Features(3, unit=((0, 1),))
    assert model.temperature.tolist() == [1.0] * 3
    found = report(tmp_path / "run")
    assert list(found["calibration"]) == ["as fitted"]
    assert len(found["open_loop"]["error"]) == 30  # no piece of an episode is longer
    assert fit(data, tmp_path / "plain", "--fit.epochs", "1", "--world", "none", "--test", "0") == 0
    assert load_ensemble(tmp_path / "plain" / "model").features == Features(3)


def test_three_transitions_give_a_finite_model_and_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = store(tmp_path / "data", walk(3))
    assert fit(data, tmp_path / "run", "--fit.epochs", "2") == 0
    assert "Only 0 transitions are held out" in capsys.readouterr().out
    assert "note" in report(tmp_path / "run") and not (tmp_path / "run" / "calibration.png").exists()
    load_ensemble(tmp_path / "run" / "model")


def test_one_member_and_rows_out_of_order(tmp_path: Path) -> None:
    rows = walk(300)
    data = store(tmp_path / "data", rows[torch.randperm(300, generator=seeded())])
    assert fit(data, tmp_path / "run", "--members", "1", "--fit.epochs", "1") == 0
    found = report(tmp_path / "run")
    assert "in order of time" in found["open_loop"]["note"]
    assert found["calibration"]["recalibrated"]["rank"] is None
    assert (tmp_path / "run" / "calibration.png").exists()


def test_a_terminal_shows_every_member() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Losses(console, members=2, epochs=5) as progress:
        progress.show(Epoch(0, [1.5, 1.25], [0.5, 0.25], [True, True]))
        progress.show(Epoch(1, [1.0, math.nan], [0.75, math.nan], [False, False]))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for row in (r"0 +│ 1.0000 +│ 0.75000 +│ 0.50000 +│ 0", r"1 +│ nan +│ nan +│ 0.25000 +│ 0", "2/5"):
        assert re.search(row, shown)


def test_rollouts_that_diverge_are_told_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    horizon = HorizonError(torch.tensor([0.1, torch.inf, torch.nan]), torch.tensor([0.1, 0.2, torch.nan]))
    monkeypatch.setattr("mbrl.experiments.fit.horizon_error", lambda *_, **__: horizon)
    data = store(tmp_path / "data", walk(300))
    assert fit(data, tmp_path / "a [b] run", "--fit.epochs", "1", "--no-recalibrate") == 0
    assert report(tmp_path / "a [b] run")["open_loop"]["error"] == pytest.approx([0.1, None, None])
    assert "a [b] run" in capsys.readouterr().out


def test_a_plot_that_fails_costs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plot(path: Path, **_: Any) -> None:
        raise OSError(f"no space for {path.name}")

    monkeypatch.setattr("mbrl.experiments.fit.plot_calibration", plot)
    data = store(tmp_path / "data", walk(300))
    with pytest.raises(OSError, match="no space"):
        main(Config(dataset=data, out=tmp_path / "run", members=2, hidden=(16,), fit=FitConfig(epochs=1)))
    assert (
        load_ensemble(tmp_path / "run" / "model").temperature.tolist()
        == report(tmp_path / "run")["temperature"]
    )


@pytest.mark.parametrize("spoilt", [slice(3), slice(None)])
def test_plots_leave_out_what_is_not_finite(spoilt: slice, tmp_path: Path) -> None:
    disagreement, error = torch.rand(2, 30, generator=seeded())
    disagreement[spoilt], error[1] = torch.inf, torch.nan
    horizon = HorizonError(*torch.full((2, 5), torch.nan))
    plot_calibration(tmp_path / "a.png", {"as fitted": {0.5: math.nan}}, horizon, disagreement, error, 0.1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_data_in_which_nothing_varies_give_a_model_that_says_so(tmp_path: Path) -> None:
    rows = walk(300)
    data = store(
        tmp_path / "data",
        dataclasses.replace(rows, y=rows.y * 0, y_next=rows.y * 0 + 1, episode=torch.arange(300)),
    )
    assert fit(data, tmp_path / "run", "--fit.epochs", "1") == 0
    assert "Every step in the data is the same" in report(tmp_path / "run")["note"]
    y = torch.zeros(1, 3)
    assert torch.equal(load_ensemble(tmp_path / "run" / "model").predict(y, y[:, :1]).y_next.mean(0), y + 1)


def test_small_steps_far_from_zero_are_learned_from_float64(tmp_path: Path) -> None:
    rows = walk(1_000).to("cpu", torch.float64)
    far = dataclasses.replace(rows, y=1e6 + 1e-3 * rows.y, y_next=1e6 + 1e-3 * rows.y_next)
    data = store(tmp_path / "data", far)
    assert fit(data, tmp_path / "run", "--fit.epochs", "10") == 0
    assert max(report(tmp_path / "run")["fit"]["best"]) < 0.6
    scale = load_ensemble(tmp_path / "run" / "model").target_scale
    assert ((scale > 1e-4) & (scale < 1e-3)).all()


@pytest.mark.parametrize("size", [1e30, 1e39])
def test_numbers_that_are_too_large_are_told_before_there_is_a_folder(
    size: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = walk(60).to("cpu", torch.float64)
    data = store(tmp_path / "data", dataclasses.replace(rows, reward=size * rows.y[:, 0].abs()))
    assert fit(data, tmp_path / "run", "--learn-task") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "numbers up to 2e+16" in shown and "reward is" in shown and not (tmp_path / "run").exists()


def test_parts_are_whole_episodes_but_for_two_cuts() -> None:
    rows = walk(1_000, length=30)
    parts = split(rows, 0.3, seeded())
    assert [len(part.reward) for part in parts] == [700, 150, 150]
    seen = torch.cat([part.y[:, 0] for part in parts]).sort().values
    assert torch.equal(seen, rows.y[:, 0].sort().values)
    episodes = [set(part.episode.tolist()) for part in parts]
    assert len(episodes[0] & episodes[1]) <= 1 and len(episodes[1] & episodes[2]) <= 1
    assert max(episodes[2]) - min(episodes[2]) > len(episodes[2])  # drawn from all over
    for part in parts:
        inside = (part.episode[1:] == part.episode[:-1]).nonzero().flatten()
        assert torch.equal(part.y[inside + 1], part.y_next[inside])


@pytest.mark.parametrize(
    ("metadata", "options", "code", "answer"),
    [
        ({"world": "my-robot"}, [], 1, "recorded in a world that is not here: There is no world called"),
        ({}, ["--world", "Pendulm-v1"], 2, "There is no world called 'Pendulm-v1'"),
        ({"world": "pets-cartpole"}, [], 1, "has ny = 4, but the data set"),
        ({"dt": None}, [], 1, "does not tell its dt"),
        ({}, ["--dt", "-1"], 1, "dt > 0 s"),
        ({}, ["--test", "1"], 2, "0 ≤ test < 1"),
        ({}, ["--members", "0"], 1, "members ≥ 1"),
        ({}, ["--fit.batch", "0"], 2, "batch ≥ 1"),
        ({}, ["--fit.holdout", "1"], 2, "holdout, a share of the data, in [0, 1)"),
    ],
)
def test_bad_usage_is_told_and_leaves_no_folder(
    metadata: Any, options: Any, code: int, answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = store(tmp_path / "data", walk(60), **metadata)
    assert fit(data, tmp_path / "run", *options) == code
    shown = capsys.readouterr().err
    assert answer in " ".join(shown.split()) and "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_bad_data_sets_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path / "nothing", tmp_path / "run") == 1
    assert "Is this the folder of a data set?" in capsys.readouterr().err
    data = store(tmp_path / "data", walk(60))
    shard = data / "shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    assert fit(data, tmp_path / "run") == 1
    assert "1 bad of 2 shards; 30 of 60 transitions are good" in " ".join(capsys.readouterr().err.split())
    one = store(tmp_path / "one", walk(1))
    assert fit(one, tmp_path / "run") == 1
    assert "at least 2 transitions" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_fit_that_diverges_at_once_saves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = store(tmp_path / "data", walk(300))
    assert fit(data, tmp_path / "run", "--fit.learning-rate", "1e38") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "diverged in epoch 0" in shown and "--fit.learning-rate" in shown
    assert not (tmp_path / "run" / "model").exists()
    assert fit(data, tmp_path / "run") == 1
    assert "already holds config.json" in " ".join(capsys.readouterr().err.split())
