"""mbrl compare: from the command line to the page, killed and resumed, with cells that cannot run."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbrl.envs import make_world
from mbrl.errors import ContractError, MissingExtra, UnknownName
from mbrl.experiments import cli, compare
from mbrl.experiments.cells import Job, run_job
from mbrl.experiments.ledger import Ledger
from mbrl.models import Ensemble, save_ensemble
from tests.jobs import CELL

ENV = "InvertedPendulum-v5"
SMALL = ["--steps", "6", "--horizon", "4", "--evaluations", "300", "--workers", "1", "--no-video"]


def untimed(folder: Path) -> dict[str, Any]:
    """What the ledger holds, by job, but for times and machines."""
    found = {}
    for line in (folder / "cells.jsonl").read_text().splitlines():
        record = json.loads(line)
        for episode in record.get("episodes", []):
            for name in ("plan_ms", "plan_ms_worst", "late"):
                del episode[name]
        assert record["key"] not in found, "a job was done twice"
        found[record["key"]] = {k: v for k, v in record.items() if k not in ("wall_s", "machine")}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three planners in the simulator and on the analytic model, one of them refused, over two worlds."""
    path = tmp_path_factory.mktemp("compare")
    words = ["compare", "--envs", "double-integrator", ENV, "--models", "simulator", "analytic"]
    words += ["--planners", "cem", "ilqr", "nmpc", "--seeds", "3", *SMALL, "--out", str(path)]
    assert cli.main(words) == 0
    return path


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rows(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = json.loads((folder / "results.json").read_text())["cells"]
    return {(row["env"], row["kind"], row["planner"]): row for row in found}


def test_every_cell_has_its_numbers_or_says_why_not(folder: Path) -> None:
    found = rows(folder)
    assert len(found) == 2 * 2 * 3
    assert "lacks them. Wrap it: Symbolic" in found[ENV, "simulator", "nmpc"]["why"]
    assert found[ENV, "analytic", "cem"]["why"] == f"{ENV} has no analytic model."
    for key, row in found.items():
        if "why" in row:
            assert (key[1], key[2]) == ("simulator", "nmpc") or key[:2] == (ENV, "analytic")
            continue
        assert row["seeds"] == 3
        if key[0] != ENV:  # where every step earns 1
            assert row["return"]["low"] <= row["return"]["value"] <= row["return"]["high"]
        assert 0 < row["model_steps"] <= 300
        assert row["gap"] == pytest.approx(0.0, abs=1e-6)  # the model is the plant
        assert (row["certified"] is None) == (key[2] == "cem")


def test_the_oracle_of_a_linear_quadratic_world_is_never_beaten(folder: Path) -> None:
    gaps: dict[Any, Any] = {
        key[1:]: row.get("optimality_gap") for key, row in rows(folder).items() if key[0] != ENV
    }
    assert 0 <= gaps["analytic", "ilqr"] < gaps["analytic", "cem"]
    assert gaps["simulator", "ilqr"] == pytest.approx(gaps["analytic", "ilqr"], rel=1e-3)
    assert all(row.get("optimality_gap") is None for key, row in rows(folder).items() if key[0] == ENV)


def test_the_table_of_episodes_has_a_row_for_each(folder: Path) -> None:
    with (folder / "cells.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 7 * 3
    assert {row["seed"] for row in found} == {"0", "1", "2"}
    mean = sum(float(r["return"]) for r in found if (r["env"], r["planner"]) == (ENV, "cem")) / 3
    assert mean == pytest.approx(rows(folder)[ENV, "simulator", "cem"]["return"]["value"])


def test_the_page_asks_for_nothing_and_reads_without_scripts(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", page)
    bare = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    for text in (
        "double-integrator",
        "Riccati optimum",
        "has no analytic model",
        "mbrl compare --envs",
        "cem",
    ):
        assert text in bare
    assert "nan" not in re.sub(r"<[^>]*>", " ", bare).lower().split()


def test_the_same_command_again_runs_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "cells.jsonl").read_bytes()
    words = ["compare", "--envs", "double-integrator", ENV, "--models", "simulator", "analytic"]
    words += ["--planners", "cem", "ilqr", "nmpc", "--seeds", "3", *SMALL, "--out", str(folder)]
    assert cli.main(words) == 0
    assert "Every cell is finished." in capsys.readouterr().out
    assert (folder / "cells.jsonl").read_bytes() == before


def test_a_killed_comparison_loses_and_repeats_nothing(tmp_path: Path) -> None:
    words = ["compare", "--envs", ENV, "--planners", "random-shooting", "cem", "icem", "mppi", "ilqr"]
    words += ["--seeds", "4", "--batch", "2", *SMALL]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    ledger, kept = tmp_path / "killed" / "cells.jsonl", b""
    for lines in (2, 5):
        run = subprocess.Popen(
            [sys.executable, "-m", "mbrl", *words, "--out", str(tmp_path / "killed")],
            stdout=subprocess.DEVNULL,
        )
        while run.poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") < lines):
            time.sleep(0.02)
        workers = children(run.pid)
        run.kill()
        run.wait()
        assert run.returncode == -signal.SIGKILL, "it had ended before it was killed"
        assert workers
        while any(Path(f"/proc/{worker}").exists() for worker in workers):  # they die with it
            time.sleep(0.02)
        assert ledger.read_bytes().startswith(kept)
        kept = ledger.read_bytes()[: ledger.read_bytes().rindex(b"\n") + 1]
    assert cli.main([*words, "--out", str(tmp_path / "killed")]) == 0
    assert ledger.read_bytes().startswith(kept)
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_a_larger_comparison_adds_to_what_is_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_bytes((folder / "cells.jsonl").read_bytes())
    config = compare.Config(
        envs=(ENV,), planners=("cem", "mppi"), seeds=5, steps=6, horizon=4, evaluations=300, out=tmp_path
    )
    with Ledger(tmp_path) as ledger:
        jobs = compare.jobs_of(config, compare.cells_of(config), ledger)
    assert [(job.cell.planner, job.seeds) for job in jobs] == [
        ("random", (3, 4)),
        ("cem", (3, 4)),
        ("mppi", (0, 1, 2, 3, 4)),
    ]


def test_planners_meet_the_same_starts() -> None:
    films = []
    for planner in ("cem", "ilqr", "random"):
        film = run_job(Job(CELL.__class__(**{**vars(CELL), "planner": planner}), (7, 8))).films
        assert film is not None
        films.append(film[0])
    assert torch.equal(films[0], films[1])
    assert torch.equal(films[0], films[2])


def test_one_seed_has_no_intervals_and_says_so(tmp_path: Path) -> None:
    words = ["compare", "--envs", ENV, "--planners", "cem", "--seeds", "1", *SMALL, "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert rows(tmp_path)[ENV, "simulator", "cem"]["return"]["low"] is None
    assert "one seed, so without intervals" in (tmp_path / "report.html").read_text()


def test_a_wall_clock_half_is_sized_by_the_clock(tmp_path: Path) -> None:
    words = ["compare", "--envs", ENV, "--planners", "cem", "ilqr", "--seeds", "2", *SMALL]
    assert cli.main([*words, "--evaluations", "0", "--budget-ms", "5", "--out", str(tmp_path)]) == 0
    for planner in ("cem", "ilqr"):
        row = rows(tmp_path)[ENV, "simulator", planner]
        assert row["size"] >= 1
        assert row["plan_ms"] > 0
        assert 0 <= row["late"] <= 1
    record = json.loads((tmp_path / "cells.jsonl").read_text().splitlines()[-1])
    assert record["machine"]["cpu"]
    assert record["machine"]["load"] >= 0


def test_times_of_several_machines_are_not_mixed_in_silence(tmp_path: Path) -> None:
    words = [
        "compare",
        "--envs",
        ENV,
        "--planners",
        "cem",
        "mppi",
        "--seeds",
        "2",
        *SMALL,
        "--evaluations",
        "0",
    ]
    words += ["--budget-ms", "2", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert "are mixed here" not in (tmp_path / "report.html").read_text()
    ledger = tmp_path / "cells.jsonl"
    *before, last = ledger.read_text().splitlines()
    moved = json.loads(last)
    moved["machine"]["cpu"] = "Another Processor"
    ledger.write_text("\n".join([*before, json.dumps(moved)]) + "\n")
    assert cli.main([*words, "--no-run"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Times of 2 machines are mixed here</b>" in page
    assert "Another Processor" in page


def test_a_cell_that_crashes_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, size: int) -> Any:
        raise ZeroDivisionError("as a defect would")

    config = compare.Config(envs=(ENV,), planners=("cem",), seeds=2, steps=6, horizon=4, evaluations=300)
    (random, cem) = compare.cells_of(config)
    with Ledger(tmp_path) as ledger:
        ledger.add(run_job(Job(random, (0, 1))))
        with monkeypatch.context() as patch:
            patch.setattr("mbrl.experiments.cells.contender", broken)
            ledger.add(run_job(Job(cem, (0, 1))))
        assert ledger.crash(cem) == "ZeroDivisionError: as a defect would"
        assert [job.cell.planner for job in compare.jobs_of(config, [random, cem], ledger)] == ["cem"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, generator = make_world("double-integrator"), torch.Generator().manual_seed(0)
    model = Ensemble(2, 1, 0.05, features=world.features, hidden=(8,), generator=generator)
    model.world = world.name
    return save_ensemble(tmp_path_factory.mktemp("learned") / "model", model).parent


def test_a_learned_model_is_judged_in_the_true_world(learned: Path, tmp_path: Path) -> None:
    words = ["compare", "--envs", ENV, "double-integrator", "--models", "simulator", str(learned)]
    words += ["--planners", "cem", "ilqr", "nmpc", "--seeds", "2", *SMALL, "--out", str(tmp_path)]
    assert cli.main(words) == 0
    found = rows(tmp_path)
    assert (ENV, "learned", "cem") not in found
    for planner in ("cem", "ilqr"):
        assert abs(found["double-integrator", "learned", planner]["gap"]) > 1e-3  # it knows nothing yet
    page = (tmp_path / "report.html").read_text()
    assert "<th>less on simulator</th>" in page


def test_two_models_of_one_world_are_never_pooled(learned: Path, tmp_path: Path) -> None:
    world, generator = make_world("double-integrator"), torch.Generator().manual_seed(1)
    other = Ensemble(2, 1, 0.05, features=world.features, hidden=(8,), generator=generator)
    other.world = world.name
    folder = save_ensemble(tmp_path / "other" / "model", other).parent
    words = ["compare", "--envs", "double-integrator", "--models", "simulator", str(learned), str(folder)]
    assert cli.main([*words, "--planners", "cem", "--seeds", "3", *SMALL, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    names = {f"learned ({learned.name})", f"learned ({folder.name})"}
    if learned.name == folder.name:
        names = {f"learned ({learned})", f"learned ({folder})"}
    assert {cell["model"] for cell in found["cells"]} == {"simulator", *names}
    assert {score["model"]: score["tasks"] for score in found["scores"]} == dict.fromkeys(
        ["simulator", *names], 1
    )


def test_a_refusal_is_one_of_the_planner_not_of_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may be mended is tried again: a missing package, a damaged file."""
    config = compare.Config(envs=(ENV,), planners=("cem",), seeds=1, steps=6, horizon=4, evaluations=300)
    _, cem = compare.cells_of(config)
    with Ledger(tmp_path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr("mbrl.experiments.cells.make_world", missing_extra)
            ledger.add(run_job(Job(cem, (0,))))
        assert "which is not installed" in str(ledger.crash(cem))
        assert len(compare.jobs_of(config, [cem], ledger)) == 1
        small = replace(cem, amount=10.0)
        ledger.add(run_job(Job(small, (0,))))
        assert "but the budget is 10" in ledger.done(small)[0]["refused"]
        assert not compare.jobs_of(config, [small], ledger)


def missing_extra(name: str) -> Any:
    raise MissingExtra(name, "robots", "robots")


def test_results_of_another_version_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compare.Config(envs=(ENV,), planners=("cem",), seeds=1, steps=6, horizon=4, evaluations=300)
    cells = compare.cells_of(config)
    with Ledger(tmp_path) as ledger:
        for cell in cells:
            ledger.add(run_job(Job(cell, (0,))))
        assert not compare.jobs_of(config, cells, ledger)
        monkeypatch.setattr("mbrl.experiments.cells._FORMAT", 0)
        assert len(compare.jobs_of(config, cells, ledger)) == 2


def test_a_model_that_has_moved_is_the_same_model(learned: Path, tmp_path: Path) -> None:
    words = ["compare", "--envs", "double-integrator", "--planners", "cem", "--seeds", "2", *SMALL]
    words += ["--out", str(tmp_path / "out")]
    assert cli.main([*words, "--models", str(learned)]) == 0
    before = (tmp_path / "out" / "cells.jsonl").read_bytes()
    shutil.copytree(learned, tmp_path / "elsewhere")
    assert cli.main([*words, "--models", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "out" / "cells.jsonl").read_bytes() == before
    both = compare.Config(envs=("double-integrator",), models=(str(learned), str(tmp_path / "elsewhere")))
    with pytest.raises(ContractError, match="hold the same model"):
        compare.cells_of(both)


def test_a_model_of_another_world_is_refused_before_anything_runs(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--envs", "Hopper-v5", "--models", str(learned), "--out", str(tmp_path / "none")]
    assert cli.main(words) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "was learned on double-integrator, but Hopper-v5 are compared. Add double-integrator to" in told
    assert not (tmp_path / "none").exists()


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean"):
        compare.Config(planners=("cemm",))
    with pytest.raises(UnknownName, match="There is no world"):
        compare.Config(envs=("Hoper-v5",))
    with pytest.raises(ContractError, match="needs a budget"):
        compare.Config(evaluations=0)
    with pytest.raises(ContractError, match="--planners names cem twice"):
        compare.Config(planners=("cem", "icem", "cem"))
    with pytest.raises(ContractError, match="seeds, steps, batch, threads"):
        compare.Config(seeds=0)
    with pytest.raises(ContractError, match="There is no folder"):
        compare.main(compare.Config(run=False, out=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ContractError, match=r"nothing to report in .*: no cell has an episode \(not run yet\)"
    ):
        compare.main(compare.Config(run=False, out=tmp_path / "empty"))
