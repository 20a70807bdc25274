"""The command line: any order of options, clear answers to bad input, and Ctrl-C."""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mujoco
import pytest
import torch

from mbrl.envs import gym_world
from mbrl.experiments import cli, control, mpc, pets
from mbrl.experiments.benchmarks import returns
from mbrl.experiments.report import write_report
from mbrl.planners import CEM, ILQR, RandomShooting

SHORT = ["mpc", "--env", "InvertedPendulum-v5", "--horizon", "5", "--no-video", "--threads", "1"]
TINY = [*SHORT, "--planner.population", "8"]


@pytest.fixture(autouse=True)
def _restore() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    mujoco.set_mju_user_warning(None)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_options_come_in_any_order() -> None:
    config = cli.parse(["mpc", "--planner.population", "500", "--env", "Hopper-v5", "--planner", "cem"])
    assert config == cli.parse(["mpc", "--planner=cem", "--env=Hopper-v5", "--planner.population=500"])
    assert config == mpc.Config(planner=CEM(population=500), env="Hopper-v5")


@pytest.mark.parametrize(
    "name", [name for name in control.PLANNERS if name not in ("ddp", "nmpc", "scenario-nmpc")]
)
def test_every_planner_runs_from_the_command_line(name: str, tmp_path: Path) -> None:
    """But those that need more than a simulator; see test_nmpc_cli.py."""
    options = [] if issubclass(control.PLANNERS[name], ILQR) else ["--planner.population", "8"]
    options += ["--planner.elites", "3"] if name in ("cem", "icem") else []
    assert (
        cli.main([*SHORT, "--planner", name, *options, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    )
    assert len(rows(tmp_path / "run")) == 2


def test_ilqr_differentiates_the_simulator(tmp_path: Path) -> None:
    """Its own numbers are in the report, those of sampling planners are not; its plans can be drawn."""
    command = ["mpc", "--env", "HalfCheetah-v5", "--planner", "ilqr", "--horizon", "8", "--steps", "3"]
    assert cli.main([*command, "--no-video", "--threads", "1", "--out", str(tmp_path / "run")]) == 0
    assert cli.parse(command).planner.iterations == 3
    assert all(
        float(row["state_error"] or 0) == 0 and float(row["planner/slope"]) > 0
        for row in rows(tmp_path / "run")
    )
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Damping" in page and "Effective samples" not in page and "plans are not drawn" not in page


def test_ddp_needs_second_derivatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which a simulator has not; see test_learned.py for a model that has."""
    assert cli.main([*SHORT, "--planner", "ddp", "--out", str(tmp_path / "run")]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "DDP needs" in told and "curvature" in told and "ILQR" in told
    assert not (tmp_path / "run").exists()


def test_latency_and_the_safe_action(tmp_path: Path) -> None:
    """Until the first plan comes, the safe action; the numbers of a plan stand where it was begun."""
    options = ["--planner", "ilqr", "--steps", "7", "--latency", "2", "--replan-every", "3"]
    out = tmp_path / "run"
    assert cli.main([*SHORT, *options, "--safe-action", "0.5", "--out", str(out)]) == 0
    written = rows(out)
    assert [row["followed"] for row in written] == ["safe"] * 2 + ["gains"] * 5
    assert [row["delay"] for row in written] == ["2", "", "", "2", "", "", "2"]
    assert [bool(row["planner/iterations"]) for row in written] == [True, False, False] * 2 + [True]
    assert all(float(row["state_error"]) < 1e-9 for row in written[3:])
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "A plan was followed 2 steps after it was begun." in text
    assert (
        "5 were a plan&#x27;s, corrected by its feedback gains, 0 a plan&#x27;s as they were, and 2 the safe"
        in text
    )
    assert "Cost per iteration" in text and "Phase portrait: hinge" in text and "Control: slide" in text


def test_a_safe_action_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SHORT, "--safe-action", "0.5", "1", "--out", str(tmp_path / "run")]) == 1
    assert "safe_action (nu,) = (1,), but got (2,)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_sampling_planners_are_listed() -> None:
    from mbrl import planners
    from mbrl.planners import SamplingPlanner

    exported = {getattr(planners, name) for name in planners.__all__}
    kinds = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, SamplingPlanner)}
    assert kinds - {SamplingPlanner} == set(pets.PLANNERS.values()) < set(control.PLANNERS.values())


def test_a_run_leaves_config_metrics_and_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (
        cli.main([*TINY, "--planner", "mppi", "--steps", "10", "--replan-every", "2", "--out", str(out)]) == 0
    )
    assert (
        json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]["planner"]["type"] == "MPPI"
    )
    written = rows(out)
    assert tuple(written[0]) == mpc.COLUMNS
    assert [float(row["return"]) for row in written] == [float(n) for n in range(1, 11)]
    assert [bool(row["plan_ms"]) for row in written] == [True, False] * 5  # planned every second step
    assert all(float(row["state_error"]) == 0 for row in written[1:])  # the model is the plant
    assert "MPPI" in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "run.lock").exists()


def test_exact_plans_with_the_plant(tmp_path: Path) -> None:
    options = [*TINY, "--env", "pup-walk", "--planner", "mppi", "--planner.population", "4", "--steps", "3"]
    for exact, where in ((["--exact"], "in the true simulator"), ([], "in a cheaper model of the plant")):
        out = tmp_path / where
        assert cli.main([*options, *exact, "--out", str(out)]) == 0
        errors = [float(row["state_error"]) for row in rows(out)[1:]]
        assert all(error == 0 for error in errors) == bool(exact)
        assert where in (out / "report.html").read_text(encoding="utf-8")


def test_smooth_plans_with_smooth_contacts_and_acts_in_the_plant(tmp_path: Path) -> None:
    """Before the Hopper lands both agree; the report says what was planned with."""
    options = [
        "mpc",
        "--env",
        "Hopper-v5",
        "--planner",
        "ilqr",
        "--horizon",
        "5",
        "--steps",
        "9",
        "--no-video",
    ]
    errors = {}
    for smooth in ([], ["--smooth"]):
        out = tmp_path / f"run{len(smooth)}"
        assert cli.main([*options, *smooth, "--out", str(out)]) == 0
        errors[bool(smooth)] = [float(row["state_error"]) for row in rows(out)[1:]]
        said = "a copy of the true simulator with smooth contacts" in (out / "report.html").read_text("utf-8")
        assert said == bool(smooth)
    assert max(errors[False]) == 0 < max(errors[True])


def test_a_seed_gives_the_same_run(tmp_path: Path) -> None:
    returns = []
    for n in range(2):
        cli.main(
            [
                *TINY,
                "--env",
                "Reacher-v5",
                "--planner",
                "mppi",
                "--steps",
                "4",
                "--out",
                str(tmp_path / str(n)),
            ]
        )
        returns.append([row["return"] for row in rows(tmp_path / str(n))])
    assert returns[0] == returns[1]


def test_a_deadline_is_the_planners_budget(tmp_path: Path) -> None:
    options = ["--planner", "mppi", "--steps", "1", "--budget-ms", "500"]
    assert cli.main([*TINY, *options, "--out", str(tmp_path / "run")]) == 0
    assert float(rows(tmp_path / "run")[0]["planner/iterations"]) > 1
    saved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["config"]
    assert saved["planner"]["budget_ms"] == saved["budget_ms"] == 500
    assert "was missed" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_deadline_that_one_iteration_misses_is_told(tmp_path: Path) -> None:
    options = ["--planner", "mppi", "--planner.population", "300", "--steps", "2", "--budget-ms", "0.01"]
    assert cli.main([*TINY, *options, "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The deadline of 0.01 ms was missed" in text


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["mpc", "--planner", "cm"], "Did you mean cem"),
        (["mpc", "--planner"], "Valid names: cem"),
        (["mpc", "--env", "Hoper-v5"], "Did you mean Hopper-v5"),
        (["mpc", "--env", "Pendulum-v1"], "has no MuJoCo simulator"),
        (["mpc", "--planner", "cem", "--planner.populaton", "4"], "--planner.population"),
        (["mpc", "--planner", "cem", "--planner.population", "1"], "population ≥ 2"),
        (["mpc", "--steps", "0"], "steps ≥ 1"),
        (["mpc", "--replan-every", "40"], "replan_every"),
        (["mpc", "--latency", "-1"], "latency of 0 to horizon = 30"),
        (["mpc", "--latency", "31"], "latency of 0 to horizon = 30"),
        (["mpc", "--latency", "1.5"], "latency"),
        (["mpc", "--exact", "--model", "runs/model"], "give one of them"),
        (["mpc", "--smooth", "--exact"], "give one of them"),
        (["mpc", "--smooth", "--model", "runs/model"], "give one of them"),
        (["mpc", "--budget-ms", "inf"], "finite budget_ms > 0"),
        (["mpc", "--budget-ms", "nan"], "finite budget_ms > 0"),
        (["mpc", "--budget-ms", "0"], "finite budget_ms > 0"),
        (["mpc", "--seed", "-1"], "0 ≤ seed"),
        (["fit", "data", "--out", "run", "--seed", "99999999999999999999"], "seed < 2**63"),
        (["fit", "data", "--out", "run", "--hidden", "8", "0"], "hidden ≥ 1"),
        (["fit", "data", "--out", "run", "--dt", "inf"], "finite dt"),
        (["fit", "data", "--out", "run", "--device", "warp"], "but got 'warp'"),
        (["resume", "run", "--planner", "mppi"], "`mbrl resume` has no planner to choose"),
        (["fit", "data", "--out", "run", "--planner", "mppi"], "`mbrl fit` has no planner to choose"),
        (["check-env", "Hopper-v5", "--steps", "0"], "steps ≥ 1"),
        (["check-env", "Antv5"], "Did you mean Ant-v5"),
        (["lst"], "check-env"),
        ([], "mpc"),
    ],
)
def test_wrong_usage_is_answered_with_2(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert answer in " ".join(shown.replace("│", " ").split()) and "Traceback" not in shown


def test_an_unknown_gl_is_answered_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "elg")
    assert cli.main(["list"]) == 2
    assert "Did you mean egl" in capsys.readouterr().err


def test_gl_is_chosen_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    cli.choose_gl()
    assert os.environ["MUJOCO_GL"] == "egl"

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cli.choose_gl()
    assert os.environ["MUJOCO_GL"] == "disable"


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert cli.main(["mpc", "--planner", "mppi", "--help"]) == 0
    assert "--planner.temperature" in capsys.readouterr().out
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "HalfCheetah-v5" in shown and "Pendulum-v1" in shown and "predictive-sampling" in shown


@pytest.mark.parametrize("taken", ["a file", "a run"])
def test_an_unusable_folder_is_one_sentence(
    taken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    if taken == "a file":
        out.write_text("")
    else:
        assert cli.main([*TINY, "--planner", "mppi", "--steps", "1", "--out", str(out)]) == 0
    assert cli.main([*TINY, "--planner", "mppi", "--steps", "1", "--out", str(out)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error:") and "--out" in shown and shown.count("\n") == 1


def test_nan_plans_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbrl.planners import MPPI

    update = MPPI.update
    calls = iter(range(100))

    def broken(self: Any, state: Any, knots: Any, cost: Any) -> Any:
        state, weights = update(self, state, knots, cost)
        if next(calls) == 2:
            return dataclasses.replace(state, solution=state.solution * torch.nan), weights
        return state, weights

    monkeypatch.setattr(MPPI, "update", broken)
    assert cli.main([*TINY, "--planner", "mppi", "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    fallbacks = [row["fallback"] for row in rows(tmp_path / "run")]
    assert fallbacks[:3] == ["0", "0", "1"]
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "the new plan was unusable" in text
    assert "Every predicted state came true to the last bit" in text  # those of the old plan, too


def test_a_run_without_any_usable_plan_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mbrl.planners import MPPI

    update = MPPI.update

    def broken(self: Any, state: Any, knots: Any, cost: Any) -> Any:
        state, weights = update(self, state, knots, cost)
        return dataclasses.replace(state, solution=state.solution * torch.nan), weights

    monkeypatch.setattr(MPPI, "update", broken)
    assert cli.main([*TINY, "--planner", "mppi", "--steps", "3", "--out", str(tmp_path / "run")]) == 1
    assert "None of the 3 plans was usable" in capsys.readouterr().err
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "No step had a prediction" in text and "came true" not in text


def test_diverging_physics_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbrl.envs import WithState

    step = WithState.step

    def explode(self: Any, action: Any) -> Any:
        if self.unwrapped.data.time > 0.1:
            self.unwrapped.data.qvel[0] = 1e12
        return step(self, action)

    monkeypatch.setattr(WithState, "step", explode)
    assert cli.main([*TINY, "--planner", "mppi", "--steps", "9", "--out", str(tmp_path / "run")]) == 0
    last = rows(tmp_path / "run")[-1]
    assert (last["truncated"], last["diverged"]) == ("1", "1") and int(last["step"]) < 8
    assert last["reward"] == "nan" and float(last["return"]) == int(last["step"])  # 1 for each step before
    assert "physics diverged" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_diverged_step_is_no_part_of_a_benchmarks_return(monkeypatch: pytest.MonkeyPatch) -> None:
    from mbrl.envs import WithState

    step = WithState.step

    def lost(self: Any, action: Any) -> Any:
        obs, reward, terminated, truncated, info = step(self, action)
        if self.unwrapped.data.time > 0.1:
            return obs, float("nan"), terminated, True, {**info, "diverged": True}
        return obs, reward, terminated, truncated, info

    monkeypatch.setattr(WithState, "step", lost)
    world = gym_world("InvertedPendulum-v5")
    problem = world.problem(5, threads=1)
    result = returns.episode(world, problem, RandomShooting(population=8), 0, steps=9)
    assert result["truncated"] and result["return"] == result["steps"] - 1 > 0


def test_an_unexpected_error_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbrl.envs import WithState

    step, calls = WithState.step, iter(range(100))

    def fail(self: Any, action: Any) -> Any:
        if next(calls) == 3:
            raise ZeroDivisionError
        return step(self, action)

    monkeypatch.setattr(WithState, "step", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main([*TINY, "--planner", "mppi", "--steps", "9", "--out", str(tmp_path / "run")])
    assert len(rows(tmp_path / "run")) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_writes_the_report(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "mbrl",
        *TINY,
        "--planner",
        "mppi",
        "--steps",
        "100000",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    patience = time.monotonic() + 60
    while not ((out / "metrics.csv").exists() and len((out / "metrics.csv").read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < patience, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "interrupted after" in (out / "report.html").read_text(encoding="utf-8")
    assert len(rows(out)) >= 3 and not (out / "run.lock").exists()


def test_ctrl_c_in_parse_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_ctrl_c_while_the_report_is_written_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def slow(*args: Any, **options: Any) -> Path:
        signal.raise_signal(signal.SIGINT)
        return write_report(*args, **options)

    monkeypatch.setattr(mpc, "write_report", slow)
    assert cli.main([*TINY, "--planner", "mppi", "--steps", "2", "--out", str(tmp_path / "run")]) == 130
    assert "</html>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_mujoco_warns_as_before_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def mine(text: str) -> None: ...

    mujoco.set_mju_user_warning(mine)
    assert cli.main(["list"]) == 0
    assert mujoco.get_mju_user_warning() is mine
    mujoco.set_mju_user_warning(None)
    assert cli.main(["check-env", "Hoper-v5"]) == 2
    assert mujoco.get_mju_user_warning() is None
