"""The Python on the documentation pages runs, page by page, from top to bottom."""

import json
import math
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl.envs import mjcf_world
from mbrl.experiments.benchmarks import (
    fidelity,
    manipulation_and_balance,
    readme,
    readme_simulators,
    readme_tables,
)
from mbrl.experiments.benchmarks.record import RESULTS
from tests.test_mujoco import CART, Upright

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    "page",
    [
        "your_robot.md",
        "your_planner.md",
        "learn_a_model.md",
        "uncertainty.md",
        "trajectory_optimization.md",
        "nonlinear_mpc.md",
        "view.md",
        "compare.md",
    ],
)
def test_page_runs(page: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script), run_name="__main__")


def test_pages_keep_their_promise() -> None:
    """30 lines for a robot (its model apart), 50 for a planner."""
    robot = re.findall(r"```python\n(.*?)```", (DOCS / "your_robot.md").read_text(), flags=re.DOTALL)[0]
    model = re.search(r'XML = """.*?"""\n', robot, flags=re.DOTALL)
    assert model is not None
    assert len(robot.replace(model.group(), "").strip().splitlines()) <= 30
    planner = re.findall(r"```python\n(.*?)```", (DOCS / "your_planner.md").read_text(), flags=re.DOTALL)[0]
    assert len(planner.strip().splitlines()) <= 50


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert target.startswith(("http://", "https://", "mailto:")) or (page.parent / target).exists(), (
            target
        )


def section(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def test_nan_is_no_exact_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Upright):
        def reward(self, y: Tensor, u: Tensor, y_next: Tensor) -> Tensor:
            return super().reward(y, u, y_next) * torch.nan

    config = fidelity.Config(random_steps=2)
    world = replace(mjcf_world("cart", CART, Upright()), task=Lost())
    errors = fidelity.task_errors(world, np.float32, config)
    assert math.isnan(errors["reward"]) and errors["observation"] == 0

    errors["observation"] = math.nan
    case = {
        "config": vars(config),
        "state_error": {"1": 0.0, "2": math.nan},
        "float32": errors,
        "float64": errors,
    }
    monkeypatch.setattr(readme_simulators, "load", lambda _: [{"worlds": {"cart": case}}])
    text = readme_simulators.fidelity()
    assert "exactly 0 in 0 of 1 worlds" in text and "observation | within nan" in text


def test_readme_is_filled_from_the_result_files(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    readme.main(page)
    text = page.read_text(encoding="utf-8")
    for name in readme.SECTIONS:
        assert section(text, name).strip()
    robots = section(text, "robots")
    assert robots.count("`g1-hold`") == 1 and "hold the stance (no planner)" in robots
    assert robots.count("`panda-push`") == 1  # seeds that the settings never saw are no other case
    readme.main(page)
    assert page.read_text(encoding="utf-8") == text  # a second time changes nothing


def test_what_is_not_measured_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    page = tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", page)
    readme.main(page)
    text = page.read_text(encoding="utf-8")
    for name in set(readme.SECTIONS) - {"worlds"}:
        assert section(text, name).strip() == "Not measured yet."


def test_other_settings_are_another_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "robots").mkdir()
    result = json.loads((RESULTS / "robots" / "panda-push-0.json").read_text())
    for seed, std in enumerate((0.25, 0.5, 0.5)):
        changed = result | {"seed": seed, "planner": result["planner"] | {"std": std}}
        (tmp_path / "robots" / f"panda-push-{seed}.json").write_text(json.dumps(changed))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    lines = readme_simulators.robots().splitlines()[2:]
    assert [("1 of 1" in line, "std 0.25" in line) for line in lines] == [(True, True), (False, False)]
    assert "2 of 2" in lines[1] and "std 0.5" in lines[1]


def test_mcnemar() -> None:
    """Ten plants on which the planners differ, seven to three: 2 P(X ≤ 3) of B(10, 1/2) = 352 / 1024."""
    a = [5] * 7 + [None] * 3 + [9, None]
    b = [None] * 7 + [1] * 3 + [2, None]
    assert readme_tables.mcnemar(a, b) == pytest.approx(352 / 1024)
    assert readme_tables.mcnemar(a, a) == 1


def test_old_result_files_are_still_read() -> None:
    folder = RESULTS / "robots"
    case = manipulation_and_balance.CASES["panda-push"]
    (result,) = manipulation_and_balance.run("panda-push", case, [0], 1, folder)
    assert "load 8.6" in manipulation_and_balance._row(result)
    new = result | {"machine": {"load": 0.0}}
    assert "load 0.0" in manipulation_and_balance._row(new)


def test_robustness_sentence_follows_from_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = readme_simulators.robustness()
    arms = {arm["arm"]: arm["fell_at"] for arm in readme_tables.load("robustness/*.json")}
    p = readme_tables.mcnemar(arms["nominal"], arms["sampled, worst case"])
    assert text.count("\n|") == 6 and readme_tables.chance(p) in text
    (tmp_path / "robustness").mkdir()
    for path in (RESULTS / "robustness").glob("*.json"):
        arm = json.loads(path.read_text())
        if arm["arm"] == "nominal":
            arm |= {"falls": arm["seeds"], "fell_at": [7] * arm["seeds"]}
        (tmp_path / "robustness" / path.name).write_text(json.dumps(arm))
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    text = readme_simulators.robustness()
    assert "“sampled” fell less often than “nominal”" in text and ", significant (p < 0.01)" in text


def test_readme_example_runs(tmp_path: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), flags=re.DOTALL)[0]
    assert "range(100)" in block
    script = tmp_path / "readme.py"
    script.write_text(block.replace("range(100)", "range(2)"))
    steps = runpy.run_path(str(script), run_name="__main__")
    assert steps["info"]["state"].shape == (steps["problem"].dynamics.nx,)
