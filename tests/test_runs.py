"""Run folders: nothing lost, nothing shared."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mbrl.errors import RunFolderError
from mbrl.planners import CEM
from mbrl.runs import FILES, RunFolder

COLUMNS = ("step", "value")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b", COLUMNS) as folder:
        folder.log({"step": 0, "value": None})
        folder.log({"step": 1, "value": 0.1})
        assert rows(folder.path / "metrics.csv") == [
            {"step": "0", "value": ""},
            {"step": "1", "value": "0.1"},
        ]


def test_config_names_types_and_versions(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", COLUMNS) as folder:
        folder.save_config(CEM(population=50))
    saved = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert saved["config"]["type"] == "CEM" and saved["config"]["population"] == 50
    assert {"python", "torch", "mujoco", "gymnasium", "numpy"} <= saved["versions"].keys()


def test_a_live_run_keeps_its_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path, COLUMNS), pytest.raises(RunFolderError, match="in use by another run"):
        RunFolder(tmp_path, COLUMNS)


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    RunFolder(tmp_path, COLUMNS).close()
    with pytest.raises(RunFolderError, match="already holds metrics.csv.*--out"):
        RunFolder(tmp_path, COLUMNS)


def test_a_killed_run_keeps_its_rows_and_frees_its_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mbrl.runs import RunFolder; f = RunFolder(sys.argv[1], ('step', 'value'));"
        "f.log({'step': 7, 'value': 1}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    for name in ("report.html", "video.mp4"):
        (tmp_path / name).write_text("old")
    assert (tmp_path / "run.lock").exists()
    with RunFolder(tmp_path, COLUMNS) as folder:
        folder.log({"step": 0, "value": 2})
    assert rows(tmp_path / "metrics.csv")[0]["step"] == "0"
    assert rows(tmp_path / "metrics.killed1.csv")[0]["step"] == "7"
    for name in ("report.killed1.html", "video.killed1.mp4"):
        assert (tmp_path / name).read_text() == "old"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_user_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunFolderError, match=f"already holds {name}.*--out"):
        RunFolder(tmp_path, COLUMNS)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "run.lock").exists()


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        with RunFolder.numbered(tmp_path / "run", COLUMNS) as folder:
            paths.append(folder.path.name)
    assert paths == ["run", "run-2", "run-3"]


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def start(_: int) -> str:
        together.wait()
        with RunFolder.numbered(tmp_path / "runs" / "run", COLUMNS) as folder:
            folder.log({"step": 0, "value": 1})
            return folder.path.name

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(start, range(8)))
    assert set(names) == {"run", *(f"run-{n}" for n in range(2, 9))}


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda data: data.replace(b"1,", b"x1,"), "damaged in line 3: invalid literal"),
        (lambda data: data.replace(b"1,", b"\xb9,"), "damaged in line 3: 'utf-8' codec"),
        (lambda data: data.replace(b"1,", b"\r\n1,"), "damaged in line 3: 0 instead of 2 values"),
        (lambda data: data.replace(b"1,", b"1;"), "damaged in line 3: 1 instead of 2 values"),
        (lambda data: data.replace(b"step", b"\xb9tep"), "not of this kind of run"),
    ],
)
def test_damaged_rows_are_told_on_resume(
    damage: Callable[[bytes], bytes], answer: str, tmp_path: Path
) -> None:
    with RunFolder(tmp_path, COLUMNS) as folder:
        for step in range(3):
            folder.log({"step": step, "value": 0.5})
    file = tmp_path / "metrics.csv"
    good = file.read_bytes()
    file.write_bytes(damage(good))
    with pytest.raises(RunFolderError, match=answer):
        RunFolder(tmp_path, COLUMNS, resume_at=1)
    assert file.read_bytes() == damage(good)
    file.write_bytes(good + b"3,0.")  # cut short by a kill
    RunFolder(tmp_path, COLUMNS, resume_at=1).close()
    assert [row["step"] for row in rows(file)] == ["0", "1"]


def test_an_unwritable_folder_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunFolderError, match=r"cannot be written: .*file is a file.*--out"):
            RunFolder(path, COLUMNS)
    with pytest.raises(RunFolderError, match=r"file is a file"):
        RunFolder.numbered(tmp_path / "file" / "run", COLUMNS)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, COLUMNS)
    folder._file.close()
    folder._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    folder._writer = csv.DictWriter(folder._file, COLUMNS)
    with pytest.raises(RunFolderError, match="No space left"):
        folder.log({"step": 0, "value": 1})
    folder.close()
    assert not (tmp_path / "run.lock").exists()
