"""Where optional packages keep the robots of MuJoCo Menagerie."""

from __future__ import annotations

import importlib
from pathlib import Path

from mbrl.errors import MissingExtra


def menagerie(robot: str, package: str, *, used_by: str) -> Path:
    """The folder of a Menagerie robot inside an installed envpool asset package.

    Args:
        robot: folder name in MuJoCo Menagerie, e.g. "unitree_g1".
        package: the distribution that holds it.
        used_by: who asks, for the message.

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        assets = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingExtra(used_by, package, "robots") from error
    return Path(assets.asset_path()) / "mujoco/playground/assets/mujoco_menagerie" / robot
