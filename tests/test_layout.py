"""The folders: imports follow the arrows, packages and links agree, nothing leaks, nothing unsafe."""

from __future__ import annotations

import ast
import importlib
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("models", "planners", "envs", "experiments")
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = CONFIG["tool"]["setuptools"]


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).parts
            if folder == "mbrl" and inside[0] in PARTS:
                continue  # a link, followed by some versions of rglob
            yield path


LIBRARY = list(files("mbrl", *PARTS))
every_file = pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imports, those inside functions and TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
            if node.module == "mbrl":  # `from mbrl import planners`
                yield from (f"mbrl.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """Which of the five a dotted name belongs to."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in PARTS else pieces[0]


@every_file
def test_imports_follow_the_arrows(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0]
    names = set(imported(ast.parse(path.read_text())))
    assert not names & set(PARTS), "import mbrl.planners, not planners"
    ours = {part(name) for name in names if name.split(".")[0] == "mbrl"}
    allowed = {"mbrl": {"mbrl"}, "experiments": {"mbrl", *PARTS}}.get(here, {"mbrl", here})
    if path == ROOT / "mbrl" / "__main__.py":  # the entry point
        allowed = {"mbrl", "experiments"}
    assert ours <= allowed, f"{here} imports {sorted(ours - allowed)}"


def test_the_arrows_test_sees_something() -> None:
    assert len(LIBRARY) > 20
    tree = ast.parse("def f():\n    from mbrl import planners\n    import mbrl.envs.world")
    assert {part(name) for name in imported(tree)} == {"mbrl", "planners", "envs"}


def test_packages_on_disk_are_the_packages_listed() -> None:
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts).removeprefix("mbrl.")
        for path in LIBRARY
        if path.name == "__init__.py"
    }
    names = {name if name == "mbrl" else f"mbrl.{name}" for name in on_disk}
    assert names == set(SETUPTOOLS["packages"])
    for path in LIBRARY:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has modules, but no __init__.py"


def test_folders_are_mapped_and_linked() -> None:
    assert SETUPTOOLS["package-dir"] == {"mbrl": "mbrl", **{f"mbrl.{name}": name for name in PARTS}}
    for name in PARTS:
        link = ROOT / "mbrl" / name
        # A checkout without links holds text files with the target's path.
        target = link.readlink() if link.is_symlink() else Path(link.read_text().strip())
        assert target == Path("..") / name


def test_tools_agree_on_the_folders() -> None:
    tools = CONFIG["tool"]
    assert set(tools["coverage"]["run"]["source"]) == {"mbrl", *PARTS}
    assert set(tools["ruff"]["extend-exclude"]) == {f"mbrl/{name}" for name in PARTS}
    assert set(tools["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == set(PARTS)
    (pattern,) = tools["mypy"]["exclude"]
    assert all(name in pattern for name in PARTS)


def test_importing_everything_loads_no_bare_folder_and_no_experiment() -> None:
    modules = ["mbrl", "mbrl.planners", "mbrl.envs", "mbrl.models"]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import importlib\n"
        f"[importlib.import_module(name) for name in {modules}]\n"
        f"print([name for name in sys.modules if name in {PARTS} or name.startswith('mbrl.experiments')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["mbrl", "mbrl.planners", "mbrl.envs", "mbrl.models"])
def test_names_that_are_exported_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    for item in exported:
        assert hasattr(module, item), item


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Draws that read a global state unless they are given a generator, and calls that set one.
DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
SEEDS = {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed", "random.seed"}
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_"}


def faults(tree: ast.AST) -> list[str]:
    found = [name for name in imported(tree) if name.split(".")[0] in UNSAFE]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.split(".")[-1]
        has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
        if name in ("torch.load", "torch.save") or name in SEEDS:
            found.append(name)
        elif name.startswith("torch.") and (
            last in DRAWS or last.endswith("_like") and last.startswith("rand")
        ):
            if not has_generator:
                found.append(f"{name} without generator=")
        elif last in IN_PLACE and not has_generator:
            found.append(f"{name} without generator=")
        elif (
            name.startswith(("np.random.", "numpy.random."))
            and last
            not in (
                "default_rng",
                "get_state",
                "Generator",
            )
            or name.startswith("random.")
            and last not in ("Random", "getstate")
        ):
            found.append(name)
    return found


@every_file
def test_nothing_is_unpickled_and_no_global_random_state_is_used(path: Path) -> None:
    assert faults(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('x')",
        "torch.randn(3)",
        "torch.randn_like(x)",
        "x.normal_()",
        "torch.manual_seed(0)",
        "np.random.rand(3)",
        "numpy.random.seed(0)",
        "random.random()",
    ],
)
def test_faults_are_found(code: str) -> None:
    assert len(faults(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "torch.randn(3, generator=g)",
        "np.random.default_rng(0)",
        "x.normal_(generator=g)",
        "random.getstate()",
    ],
)
def test_what_is_fine_is_let_pass(code: str) -> None:
    assert faults(ast.parse(code)) == []


def test_pins_lie_within_the_declared_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = CONFIG["project"]
    extras = project["optional-dependencies"]
    declared = [Requirement(text) for text in (*project["dependencies"], *itertools.chain(*extras.values()))]
    for requirement in declared:
        if requirement.name == project["name"] or requirement.name not in pins:
            continue
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    core = {Requirement(text).name for text in (*project["dependencies"], *extras["dev"])} - {project["name"]}
    assert core <= pins.keys(), core - pins.keys()
