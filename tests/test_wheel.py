"""The wheel that users install: complete, importable from anywhere, and nothing else's name taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("models", "planners", "envs", "experiments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders behind that the next one would pick up."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    source.mkdir()
    if names:
        for name in names:
            if (ROOT / name).exists():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    else:  # not a git checkout
        shutil.copytree(
            ROOT,
            source,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(".*", "runs", "build"),
        )
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")  # made from the sdist
    return found


def test_every_module_once_and_no_foreign_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mbrl"}
    wanted = {f"mbrl/{path.relative_to(ROOT / 'mbrl')}" for path in (ROOT / "mbrl").glob("*.py")}
    for part in PARTS:
        wanted |= {f"mbrl/{part}/{path.relative_to(ROOT / part)}" for path in (ROOT / part).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == wanted
    assert "mbrl/py.typed" in names


def test_robots_are_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folder = ROOT / "envs" / "assets"
    assets = {f"mbrl/envs/assets/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    assert assets == {name for name in names if name.startswith("mbrl/envs/assets/")}


def test_it_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=120)
    assert {path.name for path in target.iterdir()} - {"bin", "mbrl"} == {
        path.name for path in target.glob("*.dist-info")
    }
    code = (
        "import mbrl, mbrl.planners, mbrl.envs, mbrl.models, sys\n"
        "from mbrl.planners import CEM\n"
        "problem = mbrl.envs.make_world('InvertedPendulum-v5').problem(3)\n"
        "CEM().check(problem)\n"
        "assert not {'planners', 'models', 'envs', 'experiments'} & set(sys.modules)\n"
        "print(mbrl.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert Path(out.stdout.strip().splitlines()[-1]).is_relative_to(target)


def test_the_command_is_declared(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(wheel)
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert f"mbrl = {project['scripts']['mbrl']}" in archive.read(entry).decode()
