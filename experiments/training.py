"""What every training run leaves behind, and how one that was killed goes on."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from mbrl.checkpoints import Checkpoints, check_state, pack, unpack
from mbrl.data import Transition
from mbrl.datasets import DatasetWriter, load_dataset
from mbrl.errors import CheckpointError, ContractError, RunFolderError
from mbrl.runs import RunFolder, environment, from_plain
from mbrl.storage import Damaged, parse_json, read_file


class TrainingRun:
    """The folder of a training run: config, metrics (CSV and TensorBoard), data as shards, checkpoints.

    Attributes:
        step: environment steps so far; the loop counts them.
        state: the tree that the newest checkpoint was saved with, or None at a fresh start.
        recorded: the real transitions up to that checkpoint, or None.

    Args:
        out: of a fresh run; must not hold one already.
        name: of a fresh run without `out`, which goes to runs/NAME, or the next free number if that is taken.
        config: what a resumed run will be started with.
        algorithm: its name on the command line.
        columns: of metrics.csv, without step, kind and wall_s.
        metadata: of the data set.
        keep: checkpoints to keep.
        resume: the folder of the run to go on with. What was written after its newest checkpoint is cut off; a run
            that was killed before its first one starts again, which gives the same numbers.
            Warns where versions or thread count differ, since it then goes on, but not number for number.

    Raises:
        RunFolderError, CheckpointError, DataError: the folder cannot be used; what to do is told.
    """

    def __init__(
        self,
        out: Path | None,
        config: Any,
        *,
        name: str,
        algorithm: str,
        columns: Sequence[str],
        metadata: Mapping[str, Any],
        keep: int,
        console: Console,
        resume: Path | None = None,
    ):
        self.step, self.state, self.recorded = 0, None, None
        columns = ("step", "kind", *columns, "wall_s")
        self._console, self._started = console, time.perf_counter()
        if resume is None:
            self._run = uuid.uuid4().hex
            if out is None:
                self._folder = RunFolder.numbered(Path("runs", name), columns)
            else:
                _refuse_runs(out)
                self._folder = RunFolder(out, columns)
            self._folder.save_config(config, algorithm=algorithm, run=self._run)
        else:
            self._run = _read(resume)["run"]
            _warn_of_changes(resume)
            if _has_begun(resume):
                self.step, self.state = newest(resume)
                self._started -= self.state["wall_s"]
            else:
                console.print(
                    f"{resume} has no checkpoint yet, so it starts again from its config.json.",
                    highlight=False,
                    soft_wrap=True,
                )
            self._folder = RunFolder(resume, columns, resume_at=self.step)
        self.path = self._folder.path
        self._checkpoints = Checkpoints(self.path / "checkpoints", keep)
        try:
            self._data = DatasetWriter(self.path / "data", {**metadata, "run": self._run})
            self._data.cut(0 if self.state is None else self.state["transitions"])
            if self.state is not None:
                self.recorded = load_dataset(self._data.path).transition
        except BaseException:
            self._folder.close()
            raise
        self._board = SummaryWriter(
            str(self.path / "tensorboard"), purge_step=None if resume is None else self.step + 1
        )
        self._fresh: list[Transition] = []  # since the last checkpoint
        console.print(f"{algorithm} -> {self.path}", highlight=False, soft_wrap=True)

    def record(self, transition: Transition) -> None:
        """Real transitions, for the next checkpoint."""
        self._fresh.append(transition.to("cpu", torch.float32))

    def log(self, kind: str, **values: float) -> None:
        """One row of metrics, of the current step."""
        wall_s = round(time.perf_counter() - self._started, 2)
        self._folder.log({"step": self.step, "kind": kind, "wall_s": wall_s, **values})
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, self.step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(f"  {self.step:>6} {kind}: {text}", highlight=False)

    def say(self, text: str) -> None:
        """A line for whoever watches, of the current step."""
        self._console.print(f"  {self.step:>6} {text}", highlight=False, markup=False, soft_wrap=True)

    @property
    def unsaved(self) -> bool:
        """Whether there are transitions since the last checkpoint."""
        return bool(self._fresh)

    def save(self, state: Mapping[str, Any], *, finite: Sequence[str]) -> None:
        """A checkpoint of the tree `state`; tensors named in `finite` must be that."""
        if self._fresh:
            self._data.append(Transition.cat(self._fresh))
            self._fresh.clear()
        more = {
            "run": self._run,
            "transitions": self._data.transitions,
            "wall_s": time.perf_counter() - self._started,
        }
        tensors, meta = pack({**state, **more})
        self._checkpoints.save(self.step, tensors, meta, finite=finite)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._board.close()
        self._data.close()
        self._folder.close()


def _refuse_runs(folder: Path) -> None:
    """`RunFolder` sets aside the files of a run that was killed; this one could still be resumed."""
    held = [name for name in ("config.json", "checkpoints", "data") if (folder / name).exists()]
    if held:
        raise RunFolderError(
            f"{folder} already holds {' and '.join(held)}. Go on with that run, mbrl resume {folder}, or choose "
            "another folder with --out, or delete it."
        )


def check_device(name: str) -> None:
    """Raise ContractError unless torch can use the device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ContractError(
            f"A device that torch can use here is needed, but got {name!r}: {reason}. Choose another with --device."
        ) from error


def _has_begun(folder: Path) -> bool:
    """Whether a run has saved its first checkpoint, even if that is lost: its data then have later shards."""
    shards = list((folder / "data").glob("shard-*.safetensors"))
    return bool(Checkpoints(folder / "checkpoints").steps()) or len(shards) > 1


def config_of(folder: Path, algorithm: str, kind: type, types: Sequence[type], **changes: Any) -> Any:
    """What a run was started with, a `kind` made of `types`, but for `changes`.

    Raises:
        RunFolderError: no config there, one of another algorithm, one of another version, or a damaged one.
    """
    content = _read(folder)
    if content["algorithm"] != algorithm:
        raise RunFolderError(f"{folder} holds a run of another kind, not of `mbrl train {algorithm}`.")
    config = {**content["config"], "out": None, **changes}
    return from_plain(config, kind, types, f"{folder / 'config.json'}: config")


def newest(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a run's newest checkpoint, and the tree that it holds.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another run.
    """
    step, tensors, meta = Checkpoints(folder / "checkpoints").load()
    with fitting(folder / "checkpoints" / f"step_{step}"):
        tree = unpack(tensors, meta)
        check_state("A training run", tree, {"run": str, "transitions": int, "wall_s": float})
        if tree["run"] != _read(folder)["run"]:
            raise ContractError("config.json is of another run")
    return step, tree


@contextmanager
def fitting(checkpoint: Path) -> Iterator[None]:
    """A CheckpointError instead of whatever is raised where a checkpoint holds something else than is needed."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(
            f"{checkpoint} does not fit what config.json describes: {reason}. It was written by another "
            "version of this program or for another run, or config.json was changed: restore it, or train again."
        ) from error


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = parse_json(read_file(file))
    except Damaged as error:
        raise RunFolderError(f"{folder} holds no run to go on with: config.json: {error}.") from error
    kinds = {"config": dict, "algorithm": str, "run": str}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), v) for k, v in kinds.items()):
        raise RunFolderError(
            f"{folder} holds no run to go on with: config.json needs {', '.join(kinds)}. "
            "It is none of `mbrl train`, or one of another version of this program."
        )
    return content


def _warn_of_changes(folder: Path) -> None:
    """Say so where a run will go on, but not number for number."""
    content, now = _read(folder), environment()
    for key in ("versions", "torch_threads"):
        if now[key] != content.get(key):
            warnings.warn(
                f"The run in {folder} had {key} = {content.get(key)}, now it is {now[key]}: it goes on, but not "
                "number for number.",
                RuntimeWarning,
                stacklevel=3,
            )
