"""The command `mbrl`: control robots and watch them, train agents, fit and diagnose models, compare and tune planners.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

from mbrl.errors import ContractError, MbrlError, UnknownName

_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}


@dataclass(frozen=True)
class List:
    """List the worlds and the planners."""


@dataclass(frozen=True)
class CheckEnv:
    """Check that a world and its task agree with what its environment really does.

    Attributes:
        name: of the world.
        steps: random steps to compare.
        seed: of the environment and the actions.
    """

    name: tyro.conf.Positional[str]
    steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seed < 0:
            raise ContractError(
                f"A check needs steps ≥ 1 and seed ≥ 0, but got {self.steps} and {self.seed}."
            )


@dataclass(frozen=True)
class Resume:
    """Go on with a training run that was killed or interrupted, number for number.

    Attributes:
        folder: of the run.
        steps: in all, if not those that it was started with.
    """

    folder: tyro.conf.Positional[Path]
    steps: int | None = None


@dataclass(frozen=True)
class Evaluate:
    """Mean return of a trained agent over fresh episodes.

    Attributes:
        folder: of the training run.
        episodes: how many.
        device: of model and planner; that of the run unless given.
    """

    folder: tyro.conf.Positional[Path]
    episodes: int = 10
    device: str | None = None

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ContractError(f"An evaluation needs episodes ≥ 1, but got {self.episodes}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code."""
    console, errors = Console(), Console(stderr=True)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            choose_gl()
            command = parse(words)
        except SystemExit as leave:  # tyro: --help, or an unknown option
            return leave.code if isinstance(leave.code, int) else 2
        except MbrlError as error:
            complain(errors, error)
            return 2
        with count_warnings(console):
            return run(command, console, words)
    except MbrlError as error:
        complain(errors, error)
        return 2 if isinstance(error, UnknownName) else 1
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        return 130


def choose_gl() -> None:
    """Settle how MuJoCo renders, before anything imports it: it reads MUJOCO_GL once.

    Without a screen it needs EGL. A library that is missing would make the import of MuJoCo fail, so
    rendering is then switched off and only the video is lost.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    known = ("egl", "osmesa", "glfw", "glx", "wgl", "cgl", "disable", "disabled", "off", "false", "0")
    if wanted not in ("", *known, "enable", "enabled", "on", "true", "1"):
        raise UnknownName("MUJOCO_GL", wanted, known)
    if not wanted and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        wanted = os.environ["MUJOCO_GL"] = "egl"
    try:
        if sys.platform == "linux" and wanted in _LIBRARIES:
            ctypes.CDLL(_LIBRARIES[wanted])
    except OSError:
        os.environ["MUJOCO_GL"] = "disable"


def parse(argv: list[str]) -> Any:
    """The command of `argv` as a dataclass.

    Options of the planner depend on which planner it is, so its name is taken out first; then options
    may come in any order.
    """
    from mbrl.experiments import compare, control, diagnose, fit, mpc, pets, tune, view

    name: str | None = None
    rest = []
    words = iter(argv)
    for word in words:
        if word == "--planner":
            name = next(words, "")
        elif word.startswith("--planner="):
            name = word.removeprefix("--planner=")
        else:
            rest.append(word)
    train = rest[:1] == ["train"]
    if train and (len(rest) < 2 or rest[1] != "pets"):
        raise UnknownName("training algorithm", rest[1] if len(rest) > 1 else "", ["pets"])
    if name is not None and rest[:1] in (["compare"], ["diagnose"]):
        raise ContractError(f"`mbrl {rest[0]}` tries several planners. Name them so: --planners {name}.")
    if name is not None and rest and rest[0] in ("fit", "resume", "eval", "list", "check-env"):
        raise ContractError(f"`mbrl {rest[0]}` has no planner to choose. Leave --planner {name} out.")
    if rest[:1] == ["tune"]:  # its planner has no options: they are what is looked for
        return tyro.cli(tune.Config, args=["--planner", name or "icem", *rest[1:]], prog="mbrl tune")
    if name is None:
        name = "cem" if train else "icem"
    planners = pets.PLANNERS if train else control.PLANNERS
    if name not in planners:
        raise UnknownName("planner", name, planners)
    planner = planners[name]
    if train:
        kind = pets.Config[planner]  # type: ignore[valid-type]
        start = kind(planner=pets.PLANNER if name == "cem" else planner())
        return tyro.cli(kind, args=rest[2:], default=start, prog="mbrl train pets")
    commands: dict[str, Any] = {
        "mpc": mpc.Config[planner],  # type: ignore[valid-type]
        "view": view.Config[planner],  # type: ignore[valid-type]
        "train": pets.Config[planner],  # type: ignore[valid-type]
        "compare": compare.Config,
        "tune": tune.Config,
        "fit": fit.Config,
        "diagnose": diagnose.Config,
        "resume": Resume,
        "eval": Evaluate,
        "list": List,
        "check-env": CheckEnv,
    }
    if rest[:1] in (["mpc"], ["view"]):
        controlled = commands[rest[0]]
        start = controlled(planner=control.STARTS.get(name) or planner())
        config = tyro.cli(controlled, args=rest[1:], default=start, prog=f"mbrl {rest[0]}")
        control.check(config)
        return config
    if rest and rest[0] in commands:  # tyro's messages are shorter without the level of sub-commands
        return tyro.cli(commands[rest[0]], args=rest[1:], prog=f"mbrl {rest[0]}")
    return tyro.extras.subcommand_cli_from_dict(
        commands, args=rest, prog="mbrl", description="Model-based control of robots."
    )


def run(command: Any, console: Console, argv: Sequence[str] = ()) -> int:
    from mbrl.envs import WORLDS, Pendulum, make_world
    from mbrl.experiments import compare, control, diagnose, fit, mpc, pets, tune, view

    match command:
        case List():
            planners = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in control.PLANNERS.items()}
            worlds = {name: entry.about for name, entry in WORLDS.items()}
            for title, lines in (
                (
                    "Worlds",
                    {**worlds, Pendulum.name: "Gymnasium: swing up a pole (1 action); for mbrl train only"},
                ),
                ("Planners", planners),
            ):
                console.print(f"[bold]{title}[/bold]")
                width = max(map(len, lines))
                for name, about in lines.items():
                    console.print(
                        f"  {name:<{width}}  [dim]{escape(about)}[/dim]", highlight=False, soft_wrap=True
                    )
        case CheckEnv():
            world = make_world(command.name)
            from mbrl.task_checks import check_task

            warnings = check_task(world, steps=command.steps, seed=command.seed)
            for warning in warnings:
                console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)
            console.print(f"{command.name} passed the check with {len(warnings)} warnings.", highlight=False)
        case mpc.Config():
            mpc.main(command, console)
        case view.Config():
            view.main(command, console)
        case pets.Config():
            pets.main(command, console)
        case fit.Config():
            fit.main(command, console)
        case compare.Config():
            compare.main(command, console, command=["mbrl", *argv])
        case tune.Config():
            tune.main(command, console)
        case diagnose.Config():
            diagnose.main(command, console)
        case Resume():
            config = pets.config_of(command.folder)
            if command.steps is not None:
                config = dataclasses.replace(config, steps=command.steps)
            pets.main(config, console, resume=command.folder)
        case Evaluate():
            pets.evaluate_run(command.folder, command.episodes, console, command.device)
    return 0


def complain(console: Console, error: MbrlError) -> None:
    console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def count_warnings(console: Console) -> Iterator[None]:
    """Count MuJoCo's warnings, without their numbers, instead of filling stderr and MUJOCO_LOG.TXT; show them after.

    Candidate plans that diverge give thousands; they are expected and never chosen.
    """
    import mujoco

    counts: Counter[str] = Counter()
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: counts.update([re.sub(r"-?\d[\d.]*", "#", str(text))]))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
        show_warnings(console, counts)


def show_warnings(console: Console, counts: Counter[str]) -> None:
    for text, n in counts.most_common(3):
        if "deprecated" in text:  # of the model's XML: nothing that a user could do about it
            continue
        console.print(
            f"[dim]MuJoCo warned {n} times: {escape(text[:200])}[/dim]", highlight=False, soft_wrap=True
        )
