"""Tuning: equal work, spaces whose corners are planners, kills that repeat nothing, honest winners, bad input."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy.orm
import torch
from rich.console import Console

from mbrl.envs import gym_world, make_world
from mbrl.errors import ContractError, DataError, MbrlError, MissingExtra, UnknownName
from mbrl.experiments import cli, control, tune
from mbrl.experiments.contenders import contender, size_for
from mbrl.experiments.spaces import (
    SPACES,
    Choice,
    Range,
    candidates,
    default_of,
    planner_of,
    sampled,
    space_of,
)
from mbrl.experiments.tune import Config, Search
from mbrl.experiments.tune_report import Confirmation
from mbrl.experiments.tune_study import Study
from mbrl.planners import ICEM, MPPI
from mbrl.runs import from_plain

H, BUDGET = 5, 150
TINY: dict[str, Any] = {
    "planner": "mppi",
    "env": "cart-pole",
    "model": "analytic",
    "evaluations": BUDGET,
    "horizon": H,
    "steps": 3,
    "seeds": 2,
    "trials": 12,
    "fresh": 3,
}


class Killed(BaseException):
    """Like a kill: passes every `except Exception`."""


@pytest.fixture(autouse=True)
def _restore() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(folder: Path, **changes: Any) -> list[dict[str, str]]:
    """The rows of trials.csv, without what depends on the clock."""
    config = Config(**{**TINY, "out": folder, **changes})
    tune.main(config, Console(file=io.StringIO()))
    return rows(folder)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("plan_ms", "load", "seconds")} for row in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def corners(space: Any) -> Any:
    ends = [kind.names if isinstance(kind, Choice) else (kind.low, kind.high) for kind in space.values()]
    return (dict(zip(space, corner, strict=True)) for corner in itertools.product(*ends))


@pytest.mark.parametrize("name", SPACES)
def test_every_corner_is_a_planner_that_plans_and_spends_the_budget(name: str) -> None:
    for evaluations, horizon in ((22 * H, H), (3_000, 30)):
        space = space_of(name, (horizon, horizon), evaluations=evaluations)
        total = candidates(evaluations, horizon)
        for point in corners(space):
            planner = planner_of(name, point, horizon, evaluations=evaluations)
            assert total - 3 * planner.iterations < sampled(planner) <= total, point
    timed = space_of(name, (H, H))
    for point in corners(timed):
        assert planner_of(name, point, H, budget_ms=5.0).budget_ms == 5.0


@pytest.mark.parametrize("name", SPACES)
def test_plans_of_random_points_take_the_steps_that_were_counted(name: str) -> None:
    world = make_world("cart-pole")
    problem = world.problem(H, dynamics=world.analytic)
    x0 = torch.zeros(1, problem.dynamics.nx, dtype=torch.float64)
    space = space_of(name, (H, H), evaluations=400)
    for point in itertools.islice(corners(space), 5, None, 61):
        planner = planner_of(name, point, H, evaluations=400)
        generator = torch.Generator().manual_seed(0)
        state = planner.init(problem, x0, generator=generator)
        plan, _ = planner.plan(problem, x0, state, generator=generator)
        assert plan.info["model_steps"] == (sampled(planner) + 2) * H <= 400
        assert plan.actions.isfinite().all()


@pytest.mark.parametrize("name", SPACES)
def test_the_defaults_are_those_that_are_compared_elsewhere(name: str) -> None:
    problem = gym_world("InvertedPendulum-v5").problem(30)
    space = space_of(name, (30, 30), evaluations=3_000)
    ours = planner_of(name, default_of(name, space, 30), 30, evaluations=3_000)
    theirs: Any = contender(name, size_for(name, 3_000, problem))
    differ = {k for k, v in vars(ours).items() if v != getattr(theirs, k)}
    assert differ <= {"population", "elites"}
    assert abs(ours.population - theirs.population) <= 2


@pytest.mark.parametrize("name", SPACES)
def test_ranges_hold_the_defaults_and_name_fields(name: str) -> None:
    space = space_of(name, (10, 40), evaluations=10_000)
    planner = control.PLANNERS[name]()
    for key, kind in space.items():
        assert key in ("elite_share", "horizon") or hasattr(planner, key)
        value = default_of(name, space, 30)[key]
        if isinstance(kind, Range):
            assert kind.low < kind.high and kind.low <= value <= kind.high
            if hasattr(planner, key):
                assert value == getattr(planner, key)  # not moved to an edge


def test_every_trial_spends_the_same(whole: Path) -> None:
    found = rows(whole)
    assert len(found) == 12 and {row["state"] for row in found} == {"complete"}
    for row in found:
        assert BUDGET - int(row["iterations"]) * H < float(row["model_steps"]) <= BUDGET
    assert len({row["population"] for row in found}) > 1


def test_horizons_are_tuned_at_equal_work(tmp_path: Path) -> None:
    found = run(tmp_path, horizons=(3, 6), trials=5)
    assert len({row["horizon"] for row in found}) > 1
    for row in found:
        steps = int(row["horizon"]) * int(row["iterations"])
        assert BUDGET - steps - int(row["horizon"]) < float(row["model_steps"]) <= BUDGET


def test_the_winner_can_be_used_and_is_confirmed_on_fresh_seeds(whole: Path) -> None:
    best = json.loads((whole / "best.json").read_text(encoding="utf-8"))
    found = rows(whole)
    top = max(found, key=lambda row: float(row["mean_return"]))
    assert best["trial"] == int(top["trial"])
    planner = from_plain(best["planner"], MPPI, [MPPI], "best.json")
    config = cli.parse(shlex.split(best["command"])[1:])
    assert config.planner == planner and (config.horizon, config.steps) == (H, 3)
    assert "simulator" in best["note"]  # mbrl mpc has no analytic model for this planner
    fresh = best["fresh"]
    assert not set(fresh["seeds"]) & set(best["tuning"]["seeds"])
    search = Search(Config(**TINY))
    again = [episode.total for episode in search.play(best["point"], fresh["seeds"])]
    assert again == fresh["returns"]
    default = [episode.total for episode in search.play(search.default, fresh["seeds"])]
    assert default == fresh["default"]
    gain = sum(a - b for a, b in zip(again, default, strict=True)) / 3
    assert fresh["difference"]["value"] == pytest.approx(gain)


def test_the_report_stands_alone(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    best = json.loads((whole / "best.json").read_text(encoding="utf-8"))
    assert best["fresh"]["verdict"] in page and "mbrl mpc" in page
    assert not re.search(r"(src|href)=|url\(|http", page)
    before = page.split("<script>")[0]  # what is there without JavaScript
    assert before.count("<svg") >= 2 + len(SPACES["mppi"]) and "History" in before
    assert all(f"<td>{row['trial']}</td>" in before for row in rows(whole))


def test_resuming_after_kills_goes_on_with_the_same_sequence(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an episode, and after writes of every kind: while a study is made, a point proposed, a result recorded."""
    played, written = 0, 0
    play, commit = Search.play, sqlalchemy.orm.Session.commit

    def dies(*args: Any) -> Any:
        nonlocal played
        played += 1
        if played in (2, 6):
            raise Killed
        return play(*args)

    def writes(session: Any) -> None:
        nonlocal written
        written += 1
        commit(session)
        if written in (4, 21, 43, 66, 89, 112, 135, 158):
            raise Killed

    monkeypatch.setattr(Search, "play", dies)
    monkeypatch.setattr(sqlalchemy.orm.Session, "commit", writes)
    kills = 0
    while True:
        try:
            run(tmp_path)
            break
        except Killed:
            kills += 1
            assert kills < 20
    assert kills == 10
    assert rows(tmp_path) == rows(whole)
    ours, theirs = (json.loads((f / "best.json").read_text(encoding="utf-8")) for f in (tmp_path, whole))
    assert {k: ours[k] for k in ("fresh", "tuning", "planner")} == {
        k: theirs[k] for k in ("fresh", "tuning", "planner")
    }
    before = played
    assert run(tmp_path) == rows(whole) and played == before  # nothing is left to play


def test_a_longer_search_begins_with_the_shorter(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, trials=3, fresh=2) == rows(whole)[:3]
    assert run(tmp_path, trials=5, fresh=2) == rows(whole)[:5]


_CLI = """
import os, signal, sys
sys.path.insert(0, {root!r})
from mbrl.experiments import cli, tune
real = tune.Search.play
for moment, number in ((5, signal.SIGKILL), (3, signal.SIGINT)):  # imports take longer than searches, so they are shared
    if os.fork():
        print("ended", os.wait()[1], flush=True)
        continue
    played = 0
    def play(*args):
        global played
        played += 1
        found = real(*args)
        if played == moment:
            os.kill(os.getpid(), number)
        return found
    tune.Search.play = play
    os._exit(cli.main(sys.argv[1:]))
"""


def test_sigkill_and_ctrl_c(whole: Path, tmp_path: Path) -> None:
    words = ["tune", "--env", "cart-pole", "--model", "analytic", "--planner", "mppi", "--trials", "12"]
    words += [
        "--evaluations",
        str(BUDGET),
        "--horizon",
        str(H),
        "--steps",
        "3",
        "--seeds",
        "2",
        "--fresh",
        "3",
    ]
    code = _CLI.format(root=str(Path(__file__).resolve().parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    killed, stopped = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ended"))
    assert os.WTERMSIG(killed) == signal.SIGKILL
    assert os.waitstatus_to_exitcode(stopped) == 130, done.stderr
    assert "Going on after 4 trials. Killed on the way and tried again: 1." in done.stdout
    assert rows(tmp_path) == rows(whole)[:7]  # 4, and 3 more, the last of which was finished
    best = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    assert best["fresh"] is None
    assert "not confirmed yet" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert run(tmp_path, trials=8, fresh=2) == rows(whole)[:8]


def test_a_trial_that_crashes_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Search.play, 0

    def play(search: Search, point: Any, seeds: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError("by something")
        return real(search, point, seeds)

    monkeypatch.setattr(Search, "play", play)
    tune.main(Config(**{**TINY, "trials": 4, "fresh": 2, "out": tmp_path}), Console(width=300))
    assert "2/4" in (told := capsys.readouterr().out) and "crashed: ZeroDivisionError: by something" in told
    found = rows(tmp_path)
    assert [row["state"] for row in found] == ["complete", "crashed", "complete", "complete"]
    assert found[1]["why"] == "ZeroDivisionError: by something" and found[1]["mean_return"] == ""
    assert "ZeroDivisionError" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(run(tmp_path, trials=5, fresh=2)) == 5  # and it is not tried again


def test_a_return_that_was_cut_short_by_diverging_physics_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Search.play
    monkeypatch.setattr(
        Search, "play", lambda *args: [replace(episode, diverged=True) for episode in real(*args)]
    )
    with pytest.raises(MbrlError, match=r"None of the 2 trials gave a return.*diverged from seed 0"):
        run(tmp_path, trials=2)
    assert [row["state"] for row in rows(tmp_path)] == ["crashed"] * 2
    assert not (tmp_path / "best.json").exists()


def test_under_a_deadline_bad_trials_are_pruned_and_the_load_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**{**TINY, "evaluations": None, "budget_ms": 4.0})
    (episode,) = Search(config).play(Search(config).default, [0])

    def play(search: Search, point: Any, seeds: Any) -> Any:
        """Returns that depend on the point alone: a far std is bad."""
        assert len(seeds) == 1  # one after another where time counts
        return [replace(episode, rewards=-(point["std"] - torch.tensor([0.4])).abs())]

    monkeypatch.setattr(Search, "play", play)
    found = run(tmp_path, evaluations=None, budget_ms=4.0, seeds=3, trials=14)
    states = [row["state"] for row in found]
    assert set(states[:5]) == {"complete"} and "pruned" in states
    pruned = [row for row in found if row["state"] == "pruned"]
    assert all(row["return_seed_0"] and not row["return_seed_2"] for row in pruned)
    complete = [float(row["mean_return"]) for row in found if row["state"] == "complete"]
    assert max(float(row["mean_return"]) for row in pruned) < max(complete)
    with (tmp_path / "trials.csv").open(newline="", encoding="utf-8") as file:
        assert all(float(row["load"]) >= 0 and float(row["plan_ms"]) > 0 for row in csv.DictReader(file))
    best = json.loads((tmp_path / "best.json").read_text(encoding="utf-8"))
    config = cli.parse(shlex.split(best["command"])[1:])
    assert config.budget_ms == 4.0 and best["planner"]["budget_ms"] == 4.0
    assert config.planner.population == best["point"]["population"]
    assert "under a load of" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("default", "winner", "trial", "word"),
    [
        ((1.0, 2.0, 3.0, 4.0), (3.0, 4.1, 5.0, 6.2), 3, "Tuning pays"),
        ((1.0, 2.0, 3.0, 4.0), (0.0, 1.1, 2.0, 3.2), 3, "The defaults win"),
        ((1.0, 2.0, 3.0, 4.0), (2.0, 1.1, 4.0, 3.2), 3, "No difference can be told"),
        ((1.0, 2.0), (1.0, 2.0), 0, "No trial beat the defaults"),
        ((1.0, None, 3.0, 4.0), (3.0, 2.0, 5.0, 6.2), 3, "Tuning pays"),
        ((None, 1.0), (1.0, None), 2, "nothing can be said"),
    ],
)
def test_the_verdict_follows_the_interval(default: Any, winner: Any, trial: int, word: str) -> None:
    found = Confirmation(trial, default, winner)
    assert word in found.words()[-1]
    told = " ".join(found.words()[:-1])
    assert ("diverged" in told) == (None in default or None in winner)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--planner", "icen"], "Did you mean icem"),
        (["--planner", "ilqr"], "ilqr has no search space"),
        (["--env", "cart-pol"], "cart-pole"),
        (["--trials", "0"], "trials ≥ 1"),
        (["--minutes", "0"], "minutes > 0"),
        (["--trials", "0", "--minutes", "0"], "got 0 and 0.0"),
        (["--budget-ms", "5"], "got both"),
        (["--horizons", "9", "9"], "first < second"),
        (["--seeds", "0"], "got 0"),
        (["--fresh", "1"], "2 fresh ones"),
        (["--evaluations", "40"], "at least 660 steps of the model"),
        (["--model", "/nowhere"], "no folder /nowhere"),
        (["--env", "Hopper-v5", "--model", "analytic"], "no analytic model"),
    ],
)
def test_bad_input_is_told(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", *([] if "--evaluations" in options else ["--evaluations", "700"]), *options]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) in (1, 2)
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_a_budget_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 2 and "but got neither" in capsys.readouterr().err
    with pytest.raises(UnknownName):
        Config(planner="nothing", evaluations=1_000)
    assert cli.parse(["tune", "--evaluations", "1000"]).planner == "icem"


def test_a_folder_of_another_search_is_told_with_what_differs(whole: Path) -> None:
    with pytest.raises(
        ContractError,
        match=r"another search: amount is 150.0 there, but 200.0 here; the space is another one; steps is 3 there",
    ):
        run(whole, evaluations=200, steps=5)
    with pytest.raises(ContractError, match="planner is mppi there, but cem here"):
        run(whole, planner="cem")


def test_a_search_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    search = Search(Config(**TINY))
    with (
        Study(tmp_path, search.about(), search.space, first=search.default, seed=0),
        pytest.raises(MbrlError, match="in use by another run"),
    ):
        run(tmp_path)


def test_other_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"no database, but long enough to be looked at " * 40)
    with pytest.raises(DataError, match=r"study\.db is not the study of a search"):
        run(tmp_path)


def test_half_a_study_is_made_anew(tmp_path: Path, whole: Path) -> None:
    """A kill while the tables are made leaves another file."""
    (tmp_path / "study.part").write_bytes((whole / "study.db").read_bytes()[:9_000])
    assert run(tmp_path, trials=2, fresh=2) == rows(whole)[:2]


def test_versions_that_changed_are_told(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(tmp_path, trials=1, fresh=2)
    from mbrl.experiments import tune_study

    now = tune_study.environment_of_search()
    monkeypatch.setattr(tune_study, "environment_of_search", lambda: {**now, "optuna": "9.9"})
    search = Search(Config(**TINY))
    with Study(tmp_path, search.about(), search.space, first=search.default, seed=0) as study:
        assert study.changed == {"optuna": (now["optuna"], "9.9")}


def test_optuna_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"mbrl-kit\[tune\]"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_icem_can_be_tuned_in_the_simulator(tmp_path: Path) -> None:
    changes = {"planner": "icem", "env": "InvertedPendulum-v5", "model": "simulator", "trials": 2, "fresh": 2}
    run(tmp_path / "a folder?with #% signs", **changes)
    best = json.loads((tmp_path / "a folder?with #% signs" / "best.json").read_text(encoding="utf-8"))
    planner = from_plain(best["planner"], ICEM, [ICEM], "best.json")
    assert cli.parse(shlex.split(best["command"])[1:]).planner == planner and best["note"] == ""


def test_the_page_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "tune.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([a-z-]+)` \| ([a-z_, ]+) \|$", page, flags=re.MULTILINE))
    assert told == {name: ", ".join(space) for name, space in SPACES.items()}
    (line,) = re.findall(r"^mbrl tune .*", page, flags=re.MULTILINE)
    assert cli.parse(shlex.split(line)[1:]).trials == 50
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    assert runpy.run_path(str(tmp_path / "page.py"))["planner"].population >= 4
