"""Training by PETS: it learns, and a run that was killed goes on number for number."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mbrl import ContractError
from mbrl.checkpoints import Checkpoints, pack, unpack
from mbrl.collect import Collector
from mbrl.envs import make_training_world
from mbrl.errors import CheckpointError, RunFolderError
from mbrl.experiments import cli, pets
from mbrl.models import FitConfig, WithHeads
from mbrl.planners import CEM, ICEM, MPPI
from mbrl.runs import from_plain, plain

TINY: dict[str, Any] = {
    "planner": ICEM(population=8, iterations=1, elites=2),
    "env": "pets-cartpole",
    "random_steps": 20,
    "horizon": 4,
    "particles": 2,
    "members": 2,
    "hidden": (8,),
    "fit": FitConfig(epochs=2, batch=32),
}
WORDS = [
    *("train", "pets", "--planner", "icem", "--planner.population", "8", "--planner.iterations", "1"),
    *(
        "--planner.elites",
        "2",
        "--random-steps",
        "20",
        "--horizon",
        "4",
        "--particles",
        "2",
        "--members",
        "2",
    ),
    *(
        "--hidden",
        "8",
        "--fit.epochs",
        "2",
        "--fit.batch",
        "32",
        "--refit",
        "15",
        "--steps",
        "130",
        "--envs",
        "2",
    ),
]


@pytest.fixture(autouse=True)
def _restore() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (folder / "metrics.csv").open() as file:
        return [
            {k: v for k, v in row.items() if not k.endswith(("_s", "_ms"))} for row in csv.DictReader(file)
        ]


def state(folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    step, tensors, _ = Checkpoints(folder / "checkpoints").load()
    return step, tensors


def same(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    (step_a, tensors_a), (step_b, tensors_b) = state(a), state(b)
    assert step_a == step_b and tensors_a.keys() == tensors_b.keys()
    for name, value in tensors_a.items():
        assert torch.equal(value, tensors_b[name]), name


@pytest.mark.parametrize("refit", ["once", "episode", 30])
def test_the_three_forms_of_the_loop(refit: Any, tmp_path: Path) -> None:
    folder = pets.main(pets.Config(**TINY, refit=refit, steps=450, out=tmp_path / "run"))
    fits = [int(row["step"]) for row in rows(folder) if row["kind"] == "fit"]
    assert fits == {"once": [20], "episode": [20, 200, 400], 30: [20, *range(30, 451, 30)]}[refit]
    assert [row["length"] for row in rows(folder) if row["kind"] == "episode"] == ["200", "200"]


def test_thompson_plans_each_episode_on_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []
    believe = pets.Agent.believe

    def spy(self: pets.Agent, member: int | None = None) -> None:
        believe(self, member)
        assert self.member is not None
        drawn.append((self.member, self.policy.problem.dynamics.member))

    monkeypatch.setattr(pets.Agent, "believe", spy)
    config = {**TINY, "members": 4, "propagation": "thompson", "refit": "once", "steps": 1_010}
    pets.main(pets.Config(**config, out=tmp_path / "run"))
    assert len(drawn) == 6  # after the fit, and after each of five episodes
    assert all(a == b for a, b in drawn) and len({a for a, _ in drawn}) > 1


def test_learns_the_task_as_well(tmp_path: Path) -> None:
    folder = pets.main(pets.Config(**TINY, learn_task=True, steps=450, out=tmp_path / "run"))
    assert len([row for row in rows(folder) if row["kind"] == "fit"]) == 3
    step, agent = pets.load_agent(folder)
    assert step == 450 and agent.model.learns_reward and agent.model.learns_termination
    assert isinstance(agent.policy.problem.dynamics, WithHeads)


def test_rest_draws_plans_to_the_middle() -> None:
    agent = pets.Agent(pets.Config(**TINY, rest=2.0), make_training_world("pets-cartpole"))
    value = agent.policy.problem.terminal_value
    assert value is not None
    assert value(torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 1.0]])).tolist() == [0.0, 4.0]
    with pytest.raises(ContractError, match="finite rest ≥ 0"):
        pets.Config(**TINY, rest=-1.0)
    with pytest.raises(ContractError, match="needs envs = 1"):
        pets.Config(**TINY, propagation="thompson", envs=2)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--particles", "1", "--kappa", "1"], "kappa and propagation moments need 2 particles"),
        (["--particles", "1", "--propagation", "moments"], "kappa and propagation moments need 2 particles"),
        (["--random-steps", "1"], "random_steps ≥ 2"),
        (["--eval-every", "-5"], "eval_every ≥ 0"),
        (["--seed", "99999999999999999999"], "seed < 2**63"),
        (["--seed", "-1"], "0 ≤ seed"),
        (["--hidden", "8", "0"], "hidden ≥ 1"),
        (["--device", "warp"], "but got 'warp'"),
    ],
)
def test_what_cannot_train_is_refused_before_there_is_a_folder(
    words: list[str], answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*WORDS, *words, "--out", str(tmp_path / "run")]) != 0
    assert answer in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_thompson_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second episode, which another network plans; the third begins after the resume."""
    config = {**TINY, "members": 4, "propagation": "thompson", "learn_task": True, "refit": 90, "steps": 430}
    whole = pets.main(pets.Config(**config, out=tmp_path / "whole"))
    collect, calls = Collector.collect, iter(range(10_000))

    def fail(self: Any, steps: int) -> Any:
        if next(calls) == 300:
            raise ZeroDivisionError
        return collect(self, steps)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Collector, "collect", fail)
        pets.main(pets.Config(**config, out=tmp_path / "cut"))
    folder = tmp_path / "cut"
    assert 200 < state(folder)[0] < 301
    pets.main(pets.config_of(folder), resume=folder)
    same(whole, folder)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mid-episode, several environments, evaluations in between."""
    config = {**TINY, "refit": 15, "steps": 130, "envs": 2, "eval_every": 60, "eval_episodes": 2}
    whole = pets.main(pets.Config(**config, out=tmp_path / "whole"))
    collect, calls = Collector.collect, iter(range(10_000))

    def fail(self: Any, steps: int) -> Any:
        if next(calls) == 37:  # not at a checkpoint
            raise ZeroDivisionError
        return collect(self, steps)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Collector, "collect", fail)
        pets.main(pets.Config(**config, out=tmp_path / "cut"))
    folder = tmp_path / "cut"
    assert state(folder)[0] < 74
    pets.main(pets.config_of(folder), resume=folder)
    same(whole, folder)


@pytest.mark.parametrize("call", [5, 21])  # before the first fit, and after it
def test_ctrl_c_saves_and_goes_on_exactly(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**TINY, "refit": 15, "steps": 60, "envs": 2}
    whole = pets.main(pets.Config(**config, out=tmp_path / "whole"))
    collect, calls = Collector.collect, iter(range(1, 10_000))

    def interrupt(self: Any, steps: int) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return collect(self, steps)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Collector, "collect", interrupt)
        pets.main(pets.Config(**config, out=tmp_path / "cut"))
    folder = tmp_path / "cut"
    assert state(folder)[0] == 2 * call  # nothing was lost
    pets.main(pets.config_of(folder), resume=folder)
    same(whole, folder)


@pytest.mark.parametrize(
    ("kind", "name", "call", "shards"), [(Collector, "collect", 7, 0), (Checkpoints, "save", 1, 1)]
)
def test_stopped_before_the_first_checkpoint_starts_again(
    kind: type,
    name: str,
    call: int,
    shards: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {**TINY, "refit": 15, "steps": 60, "envs": 2}
    whole = pets.main(pets.Config(**config, out=tmp_path / "whole"))
    folder, function, calls = tmp_path / "cut", getattr(kind, name), iter(range(1, 10_000))

    def fail(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise ZeroDivisionError
        return function(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(kind, name, fail)
        pets.main(pets.Config(**config, out=folder))
    assert len(list((folder / "data").glob("shard-*"))) == shards
    assert cli.main(["resume", str(folder)]) == 0
    assert "no checkpoint yet, so it starts again" in " ".join(capsys.readouterr().out.split())
    same(whole, folder)


def test_lost_checkpoints_do_not_start_a_run_again(run: Path) -> None:
    folder, before = run, rows(run)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        pets.main(pets.config_of(folder), resume=folder)
    assert rows(folder) == before


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def start(*words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mbrl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start(*WORDS, "--out", str(tmp_path / "whole")).wait() == 0
    folder = tmp_path / "killed"
    process = start(*WORDS, "--out", str(folder))
    kills = 0
    for after in (2, 4):  # checkpoints; then somewhere in the work that follows
        while len(list((folder / "checkpoints").glob("step_*"))) < min(after, 3) and process.poll() is None:
            time.sleep(0.005)
        time.sleep(0.03 * after)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process = start("resume", str(folder))
    assert process.wait() == 0
    assert kills >= 1  # else nothing was tested
    same(tmp_path / "whole", folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ by their seeds; copy them."""
    folder = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        pets.main(pets.Config(**TINY, refit=20, steps=60, seed=seed, out=folder / str(seed)))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "0", tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda c: [], "config.json needs config, algorithm, run"),
        (lambda c: {"algorithm": "pets"}, "config.json needs config, algorithm, run"),
        (lambda c: c["config"].update(refit="sometimes"), r"config.refit needs .* but is 'sometimes'"),
        (lambda c: c["config"].update(propagation="nope"), r"config.propagation needs .* but is 'nope'"),
        (lambda c: c["config"].update(planner=None), r"config.planner needs .* but is 'None'"),
        (
            lambda c: c["config"].update(planner={"type": "Config"}),
            "config.planner.type needs RandomShooting",
        ),
        (lambda c: c["config"].update(steps="60"), "config.steps needs int, but is '60'"),
        (lambda c: c["config"].update(hidden=[8, "8"]), r"config.hidden\[1\] needs int"),
        (lambda c: c["config"]["fit"].update(decays=[None]), r"config.fit.decays\[0\] needs float"),
        (lambda c: c["config"]["fit"].update(decay=1.0), "config.fit.decay is unknown to FitConfig"),
        (lambda c: c["config"]["fit"].pop("batch"), "config.fit.batch is missing"),
        (lambda c: c["config"].update(particles=0), "config cannot be used: .*particles"),
        (lambda c: c["config"].update(device="warp"), "config cannot be used: .*'warp'"),
        (lambda c: c.update(run="another"), "config.json is of another run"),
        (lambda c: c["config"].update(hidden=[9]), "size mismatch"),
        (lambda c: c["config"].update(planner=plain(MPPI())), "MPPI needs a state of"),
        (lambda c: c["config"].update(horizon=5), "ICEM needs a state of"),
    ],
)
def test_a_config_that_was_changed_is_refused(
    change: Callable[[Any], Any], answer: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((run / "config.json").read_text())
    changed = change(content)
    content = changed if changed in ([], {"algorithm": "pets"}) else content
    (run / "config.json").write_text(json.dumps(content))
    assert cli.main(["resume", str(run), "--steps", "65"]) == 1
    shown = capsys.readouterr().err
    assert re.search(answer, shown) and str(run) in shown


def test_a_network_that_fits_no_memory_is_refused_before_it_is_made(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    content["config"]["hidden"] = [10**12]
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="size mismatch"):
        pets.load_agent(run)


def test_a_config_that_never_ends_is_refused(run: Path) -> None:
    (run / "config.json").write_text("[" * 200_000)
    with pytest.raises(RunFolderError, match=r"config.json: it is no valid JSON"):
        pets.config_of(run)


def test_every_planner_comes_back_from_its_config(tmp_path: Path) -> None:
    kinds = (pets.Config, FitConfig, *pets.PLANNERS.values())
    for planner in pets.PLANNERS.values():
        config: Any = pets.Config(planner=planner(), refit=7, fit=FitConfig(patience=None, decays=(0.5,)))
        stored = json.loads(json.dumps(plain(config)))
        assert from_plain(stored, pets.Config, kinds, "config") == config


def changed(tree: Any, path: str, value: Any) -> Any:
    """The tree of a checkpoint with another value at a/b/c, or as a whole."""
    *parents, last = path.split("/")
    inner = tree
    for key in parents:
        inner = inner[key]
    if not last:
        return value
    inner[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "commands", "answer"),
    [
        ("", [1, 2], "resume eval", "needs a state with run, transitions, wall_s, but got a list"),
        ("", {"kind": "mbrl.models.Ensemble"}, "resume eval", "with run .str., but there is none"),
        ("wall_s", None, "resume eval", "wall_s is a NoneType"),
        ("transitions", "a", "resume eval", "transitions is a str"),
        ("transitions", 10**6, "resume", "cannot be cut to 1000000 of its 60"),
        ("fits", "x", "resume", "fits is a str"),
        ("agent", "x", "resume eval", "got a str|agent is a str"),
        ("agent/model/elites", torch.tensor([7]), "resume eval", r"elites are \[7\] of 2 members"),
        ("agent/model/net.biases.0", torch.full((2, 1, 8), torch.nan), "resume eval", "not finite"),
        ("agent/optimizer", {}, "resume", "does not fit"),
        ("agent/generator", torch.zeros(3, dtype=torch.uint8), "resume", "does not fit"),
        ("agent/policy", {}, "resume", "MPC needs a state with planner"),
        ("collector", {"episode": torch.zeros(1)}, "resume", "Collector needs a state with returns"),
        ("collector/envs", [{}], "resume", "Resumable needs a state with start"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    path: str, value: Any, commands: str, answer: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(run / "checkpoints")
    step, tensors, meta = checkpoints.load()
    checkpoints.save(step + 1, *pack(changed(unpack(tensors, meta), path, value)))
    for command in commands.split():
        assert cli.main([command, str(run)]) == 1
        shown = capsys.readouterr().err
        assert re.search(answer, shown) and str(run) in shown


@pytest.mark.parametrize(
    ("part", "answer"), [("data", "put back the data"), ("checkpoints", "config.json is of another run")]
)
def test_parts_of_another_run_are_refused(
    part: str, answer: str, run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / part)
    shutil.copytree(finished / "1" / part, run / part)
    assert cli.main(["resume", str(run), "--steps", "65"]) == 1
    assert answer in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_taken(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert cli.main([*WORDS, "--out", str(run)]) == 1
        assert f"mbrl resume {run}" in " ".join(capsys.readouterr().err.split())
        (run / "run.lock").touch()  # as if it was killed
    assert sorted(path.name for path in run.parent.iterdir()) == ["run"]
    assert pets.load_agent(run)[0] == 60
    monkeypatch.chdir(run.parent)
    for name in ("pets-pets-cartpole-0", "pets-pets-cartpole-0-2"):  # a name of its own finds a free number
        assert cli.main([*WORDS, "--steps", "4"]) == 0
        assert (run.parent / "runs" / name / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_of_a_gpu_is_evaluated_without_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run / "config.json").read_text())
    content["config"]["device"] = "cuda"
    (run / "config.json").write_text(json.dumps(content))
    words = ["eval", str(run), "--episodes", "1"]
    assert cli.main(words) == 1
    assert "Choose another with --device" in capsys.readouterr().err
    assert cli.main([*words, "--device", "cpu"]) == 0


def test_a_damaged_checkpoint_names_the_newest_good_one(run: Path) -> None:
    folder = run
    steps = Checkpoints(folder / "checkpoints").steps()
    file = folder / "checkpoints" / f"step_{steps[-1]}" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"of step {steps[-2]}: .* or delete step_{steps[-1]}"):
        pets.main(pets.config_of(folder), resume=folder)
    shutil.rmtree(file.parent)
    assert pets.main(pets.config_of(folder), resume=folder) == folder
    assert state(folder)[0] == steps[-1]


def test_a_first_fit_that_diverges_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--fit.learning-rate", "1e30", "--fit.clip", "1e30"]
    assert cli.main([*WORDS, *wild, "--out", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr()
    assert "diverged in epoch 0" in shown.out
    assert "The first fit gave no model" in shown.err and "--fit.learning-rate" in shown.err
    assert not (tmp_path / "run" / "checkpoints").exists()  # and nothing untrained was saved


def test_a_later_fit_that_diverges_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = pets.Agent.fit

    def spoil(self: pets.Agent) -> Any:
        wild = bool(self.model.input_mean.any())  # it was fitted before
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = 1e30 if wild else group["lr"]
        return fit(self)

    monkeypatch.setattr(pets.Agent, "fit", spoil)
    console = Console(record=True, width=200, file=io.StringIO())
    folder = pets.main(pets.Config(**TINY, refit=20, steps=40, out=tmp_path / "run"), console)
    said = console.export_text()
    assert "all 2 epochs are done" in said and "diverged in epoch" in said
    assert all(value.isfinite().all() for value in pets.load_model(folder).state_dict().values())


def test_learns_to_balance(tmp_path: Path) -> None:
    """A few hundred steps of the inverted pendulum are enough to hold it far longer than random actions do."""
    config = pets.Config(
        planner=CEM(population=60, iterations=3, elites=8),
        env="InvertedPendulum-v5",
        steps=220,
        random_steps=120,
        horizon=12,
        particles=4,
        members=3,
        hidden=(48, 48),
        fit=FitConfig(epochs=150, batch=64),
        out=tmp_path / "run",
    )
    folder = pets.main(config)
    lengths = [int(float(row["length"])) for row in rows(folder) if row["kind"] == "episode"]
    random = [
        n for n, end in zip(lengths, torch.tensor(lengths).cumsum(0).tolist(), strict=True) if end <= 120
    ]
    assert len(lengths) == len(random) or max(lengths[len(random) :]) > 2 * max(random)
    agent = pets.Agent(config, make_training_world(config.env))
    _, tensors, meta = Checkpoints(folder / "checkpoints").load()
    agent.load_state_dict(unpack(tensors, meta)["agent"])
    assert torch.isfinite(agent.model.target_scale).all()


def test_bad_words_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "petz"]) == 2
    assert "Did you mean pets?" in capsys.readouterr().err
    assert cli.main(["train", "pets", "--env", "pets-cartpol"]) == 2
    assert "pets-cartpole" in capsys.readouterr().err
    assert cli.main(["resume", str(tmp_path)]) == 1
    assert "holds no run to go on with" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ContractError, match="refit needs"):
        pets.Config(**TINY, refit=0)
    other = {"config": {"type": "Config"}, "algorithm": "dyna", "run": "1"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(RunFolderError, match="another kind"):
        pets.config_of(tmp_path)
