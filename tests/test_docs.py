"""The Python on the documentation pages runs, page by page, from top to bottom."""

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["your_robot.md", "your_planner.md"])
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
