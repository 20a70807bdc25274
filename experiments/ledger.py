"""The results of a comparison: one line of JSON for each job, only ever appended to."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbrl.errors import DataError, RunFolderError
from mbrl.experiments.cells import Cell, Job, Outcome
from mbrl.runs import readable_errors


class Ledger:
    """`cells.jsonl` in a folder, and `films/` beside it. Held by one comparison at a time.

    A record is on the disk before `add` returns; a line that a kill cut short is dropped when the ledger is opened.

    Args:
        folder: created with its parents.

    Raises:
        RunFolderError: not writable, or in use.
        DataError: a line within is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / "cells.jsonl"
        with readable_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.folder / "compare.lock")
            self._lock.acquire(timeout=0)
        try:
            self.records = self._read()
            with readable_errors(self.folder):
                self._file = self.path.open("a", encoding="utf-8")
        except BaseException:
            self._lock.release()
            raise

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole, _, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(self.path, len(whole) + 1 if whole else 0)
        records = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                record["key"], record["cell"], record["seeds"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path} is damaged in line {number}: {type(error).__name__} {error}. Restore the file, or "
                    "delete the line."
                ) from error
            records.append(record)
        return records

    def add(self, outcome: Outcome) -> None:
        """Append what a job has left.

        Raises:
            RunFolderError: it cannot be written; what was written before is kept.
        """
        try:
            self._file.write(json.dumps(outcome.record, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunFolderError(
                f"Writing to {self.path} failed: {error.strerror or error}. What was written before is kept."
            ) from error
        self.records.append(outcome.record)
        if outcome.films is not None:
            with contextlib.suppress(OSError, SafetensorError):  # no picture is worth a result
                (self.folder / "films").mkdir(exist_ok=True)
                save_file({"states": outcome.films.contiguous()}, self._film(outcome.record["key"]))

    def done(self, cell: Cell) -> list[dict[str, Any]]:
        """The records of a cell that need not be made again: those with episodes, or the newest refusal."""
        found = [record for record in self.records if record["cell"] == cell.identity]
        played = [record for record in found if "episodes" in record]
        return played or [record for record in found if "refused" in record][-1:]

    def missing(self, cell: Cell, seeds: Iterable[int], batch: int) -> Iterator[Job]:
        """Jobs for the seeds that have no episode yet, `batch` at a time."""
        records = self.done(cell)
        if any("refused" in record for record in records):
            return
        have = {seed for record in records for seed in record["seeds"]}
        left = [seed for seed in seeds if seed not in have]
        for first in range(0, len(left), batch):
            yield Job(cell, tuple(left[first : first + batch]))

    def crash(self, cell: Cell) -> str | None:
        """Why the newest try of the cell failed, if it did."""
        found = [record for record in self.records if record["cell"] == cell.identity]
        return found[-1].get("crashed") if found else None

    def film(self, key: str) -> Tensor | None:
        """(T+1, nx) states of a job's first seed, if they are there and whole."""
        try:
            return load_file(self._film(key))["states"]
        except (OSError, SafetensorError, KeyError):
            return None

    def _film(self, key: str) -> Path:
        return self.folder / "films" / f"{key}.safetensors"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported by the write that hit it
            self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
