"""Run folders: what a run leaves behind, and the guard that two runs never share one."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import filelock
import torch

from mbrl.errors import ContractError, RunFolderError

FILES = ("config.json", "metrics.csv", "report.html", "video.mp4")
"""What a run writes, and therefore what it may not find."""

_UNUSABLE = (
    "It was written by another version of this program, or was changed: restore it, or start another run."
)

_PACKAGES = ("mbrl-kit", "torch", "mujoco", "gymnasium", "numpy")


class RunFolder:
    """A folder that belongs to one run: `config.json`, `metrics.csv` and whatever else the run writes.

    Every row of metrics.csv is on its way to the disk before `log` returns, so a crash loses nothing.
    `run.lock` is held while the run lives and removed at its end. Where a run was killed the lock file
    is left without an owner: the next run may take the folder, and the old files are kept beside the new.

    Args:
        path: created with its parents.
        columns: of metrics.csv; the first is the step.
        resume_at: go on with the run that is there; rows of later steps are cut off metrics.csv.

    Raises:
        RunFolderError: not writable, in use by a live run, already holds one of `FILES`, or, to resume,
            does not hold the run's metrics.csv.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], *, resume_at: int | None = None):
        self.path = Path(path)
        lock = self.path / "run.lock"
        if resume_at is not None:
            with readable_errors(self.path):
                self._lock = filelock.FileLock(lock)
                self._lock.acquire(timeout=0)
                try:
                    self._cut(columns, resume_at)
                    self._file = (self.path / "metrics.csv").open("a", newline="", encoding="utf-8")
                except BaseException:
                    self._lock.release()
                    raise
            self._writer = csv.DictWriter(self._file, columns)
            return
        with readable_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            crashed = lock.exists()
            if not crashed:
                self._refuse_files()
            self._lock = filelock.FileLock(lock)
            self._lock.acquire(timeout=0)
            try:
                if crashed:
                    self._set_aside()
                else:
                    self._refuse_files()  # a run that came and went since the first look
                self._file = (self.path / "metrics.csv").open("x", newline="", encoding="utf-8")
            except BaseException:
                self._lock.release()
                raise
        self._writer = csv.DictWriter(self._file, columns)
        self._write(self._writer.writeheader)

    @classmethod
    def numbered(cls, path: str | Path, columns: Sequence[str]) -> RunFolder:
        """`path`, or the first of path-2, path-3, … that no run has used."""
        for n in itertools.count(1):
            free = Path(path) if n == 1 else Path(f"{path}-{n}")
            with readable_errors(free):
                free.parent.mkdir(parents=True, exist_ok=True)
                try:
                    free.mkdir()  # claims it: of runs that start together only one succeeds
                except FileExistsError:
                    continue
            return cls(free, columns)
        raise AssertionError("unreachable")

    def save_config(self, config: Any, **more: Any) -> None:
        """Write config.json: the config, versions, machine and thread count, and `more`."""
        text = json.dumps({"config": plain(config), **environment(), **more}, indent=2, ensure_ascii=False)
        self._write(lambda: (self.path / "config.json").write_text(text + "\n", encoding="utf-8"))

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.csv."""
        self._write(lambda: self._writer.writerow(row))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write that hit it
            self._file.close()
        (self.path / "run.lock").unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, write: Any) -> None:
        try:
            write()
            self._file.flush()
        except OSError as error:
            raise RunFolderError(
                f"Writing to {self.path} failed: {error.strerror or error}. What was written before is kept."
            ) from error

    def _refuse_files(self) -> None:
        held = [name for name in FILES if (self.path / name).exists()]
        if held:
            raise RunFolderError(
                f"{self.path} already holds {' and '.join(held)}, which a run would overwrite. "
                "Choose another folder with --out, or delete it."
            )

    def _cut(self, columns: Sequence[str], step: int) -> None:
        """Keep the header and the rows up to `step`; a last line that a kill cut short goes too."""
        file = self.path / "metrics.csv"
        try:
            lines = file.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} holds no run to go on with: metrics.csv is missing.") from None
        if not lines or lines[0].strip() != ",".join(columns).encode():
            raise RunFolderError(f"{file} is not of this kind of run: its columns are {lines[:1]}.")
        rows = []
        for n, line in enumerate(lines[1:], 2):
            if n == len(lines) and not line.endswith(b"\n"):
                break
            try:
                values = next(csv.reader([line.decode()]))
                if len(values) != len(columns):
                    raise ValueError(f"{len(values)} instead of {len(columns)} values")
                late = int(values[0]) > step
            except (ValueError, csv.Error) as error:
                raise RunFolderError(
                    f"{file} is damaged in line {n}: {error}. Restore the file, or delete the line."
                ) from error
            if not late:
                rows.append(line)
        temporary = file.with_suffix(".tmp")
        temporary.write_bytes(b"".join([lines[0], *rows]))
        temporary.replace(file)

    def _set_aside(self) -> None:
        """Rename what a killed run has left, so that neither run overwrites the other."""
        for name in FILES:
            old = self.path / name
            if old.exists():
                n = next(
                    n for n in itertools.count(1) if not old.with_suffix(f".killed{n}{old.suffix}").exists()
                )
                old.rename(old.with_suffix(f".killed{n}{old.suffix}"))


@contextlib.contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is opened, as a RunFolderError."""
    try:
        yield
    except RunFolderError:
        raise
    except filelock.Timeout:
        raise RunFolderError(
            f"{path} is in use by another run that is still alive. Choose another folder with --out."
        ) from None
    except OSError as error:
        file = next((p for p in (path, *path.parents) if p.is_file()), None)
        why = f"{file} is a file" if file else error.strerror or error
        raise RunFolderError(
            f"The run folder {path} cannot be written: {why}. Choose a writable folder with --out."
        ) from error


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all: an interrupt must not cost the one that was there.

    Raises:
        RunFolderError: it cannot be written; nothing is left of it.
    """
    part = path.with_suffix(f"{path.suffix}.part")
    try:
        part.write_text(text, encoding="utf-8")
        return part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror or error}. What was written before is kept."
        ) from error


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on besides its config."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            versions[package] = "not installed"
    machine = {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {"versions": versions, "machine": machine, "torch_threads": torch.get_num_threads()}


def plain(value: Any) -> Any:
    """A config as JSON types; dataclasses name their type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def from_plain(value: Any, kind: Any, types: Sequence[type], where: str) -> Any:
    """What `plain` made these JSON types of; lists come back as tuples.

    Args:
        kind: what it must be: a dataclass, or the annotation of a field.
        types: the dataclasses that it may hold.
        where: the file and what in it is read, for messages.

    Raises:
        RunFolderError: fields are unknown, missing or of another type, or their values are refused.
    """
    origin, options = get_origin(kind), get_args(kind)
    if isinstance(kind, TypeVar):
        return from_plain(value, kind.__bound__, types, where)
    if dataclasses.is_dataclass(origin or kind) and isinstance(value, Mapping):
        return _instance(value, origin or kind, types, where)
    if origin is tuple and isinstance(value, list):
        return tuple(from_plain(item, options[0], types, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (Union, UnionType):
        for option in options:
            with contextlib.suppress(RunFolderError):
                return from_plain(value, option, types, where)
    if origin is Literal and value in options:
        return value
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    name = kind.__name__ if isinstance(kind, type) and not options else str(kind).replace("typing.", "")
    raise RunFolderError(f"{where} needs {name}, but is {str(value)[:80]!r}. {_UNUSABLE}")


def _instance(value: Mapping[str, Any], base: type, types: Sequence[type], where: str) -> Any:
    """One of `types` that is a `base`."""
    known: dict[str, Any] = {kind.__name__: kind for kind in types if issubclass(kind, base)}
    kind = known.get(str(value.get("type")))
    if kind is None:
        raise RunFolderError(
            f"{where}.type needs {' or '.join(known)}, but is {value.get('type')!r}. {_UNUSABLE}"
        )
    hints = get_type_hints(kind)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    for name in sorted(hints.keys() ^ (value.keys() - {"type"})):
        fault = "is missing" if name in hints else f"is unknown to {kind.__name__}"
        raise RunFolderError(f"{where}.{name} {fault}. {_UNUSABLE}")
    fields = {name: from_plain(value[name], hint, types, f"{where}.{name}") for name, hint in hints.items()}
    try:
        return kind(**fields)
    except ContractError as error:
        raise RunFolderError(f"{where} cannot be used: {error} {_UNUSABLE}") from error
