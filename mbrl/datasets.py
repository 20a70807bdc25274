"""Data sets: folders of immutable shards that are verified before they are read."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock

from mbrl.data import Transition
from mbrl.errors import ContractError, DataError
from mbrl.storage import (
    Damaged,
    available_memory,
    digest,
    parse_json,
    parse_tensors,
    read_file,
    replace,
    tensor_bytes,
    write_file,
)

_MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard-\d{6,}\.safetensors")
_TYPES = {"ny": int, "nu": int, "dtype": str, "transitions": int, "metadata": dict, "shards": list}
_SHARD_TYPES = {"name": str, "sha256": str, "bytes": int, "transitions": int}


@dataclass(frozen=True)
class Dataset:
    """What `load_dataset` read.

    Attributes:
        transition: (N,), in the order in which it was appended.
        metadata: as given to `DatasetWriter`.
        lost: number of transitions in shards that were skipped.
        problems: what is wrong with each of them.
    """

    transition: Transition
    metadata: Mapping[str, Any]
    lost: int = 0
    problems: tuple[str, ...] = ()


class DatasetWriter:
    """Appends shards to a data set, an existing one too. Only one writer may have it open.

    Every shard is on the disk before `append` returns, and none is ever written again. A kill at any moment, or
    a full disk, costs at most the shard that was being written.

    Args:
        path: of the folder; created with its parents.
        metadata: JSON types, e.g. the world's name, dt and task. Given again, it must be the same.

    Raises:
        DataError: not writable, in use by another writer, damaged, or recorded with other metadata.
        ContractError: the metadata are not JSON.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any] | None = None):
        self.path = Path(path)
        given = _json({} if metadata is None else dict(metadata))
        self._lock = filelock.FileLock(self.path / "writer.lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            for left in self.path.glob("*.tmp"):  # by a writer that was killed
                left.unlink()
        except filelock.Timeout:
            raise DataError(
                f"{self.path} is being written by another process. Choose another folder."
            ) from None
        except OSError as error:
            self.close()
            raise DataError(f"The data set {self.path} cannot be written: {error}.") from error
        try:
            self._content = _manifest(self.path) if (self.path / _MANIFEST).exists() else None
            old = _json(self._content["metadata"]) if self._content else given
            if metadata is not None and old != given:
                raise DataError(
                    f"{self.path} was recorded with the metadata {old}, but {given} was given. "
                    "Choose another folder, put back the data that belong there, or leave the metadata out."
                )
        except BaseException:
            self.close()
            raise
        self._metadata = json.loads(given)

    def append(self, transition: Transition) -> None:
        """Add transitions of any leading shape as one shard.

        Raises:
            ContractError: numbers that are not finite, or sizes or dtype that differ from the shards before.
            DataError: writing failed; the shards before are kept.
        """
        transition.check()
        rows = transition.flat()
        n = len(rows.reward)
        if n == 0:
            return
        kind = {
            "ny": rows.y.shape[-1],
            "nu": rows.u.shape[-1],
            "dtype": str(rows.y.dtype).removeprefix("torch."),
        }
        old = self._content or {**kind, "transitions": 0, "metadata": self._metadata, "shards": []}
        differ = [
            f"{key} = {value} instead of {old[key]}" for key, value in kind.items() if value != old[key]
        ]
        if differ:
            raise ContractError(
                f"The data set {self.path} was given {', '.join(differ)}. Convert it, or start another."
            )
        data = tensor_bytes(rows.tensors())
        name = f"shard-{len(old['shards']):06d}.safetensors"
        shard = {"name": name, "sha256": digest(data), "bytes": len(data), "transitions": n}
        content = {**old, "transitions": old["transitions"] + n, "shards": [*old["shards"], shard]}
        # The shard first: a manifest never lists what is not there. A shard that is not listed does not count.
        self._write(name, data)
        self._write(_MANIFEST, _signed(content).encode())
        self._content = content

    @property
    def transitions(self) -> int:
        """How many there are."""
        return 0 if self._content is None else int(self._content["transitions"])

    @property
    def shards(self) -> int:
        """How many there are."""
        return 0 if self._content is None else len(self._content["shards"])

    def cut(self, transitions: int) -> None:
        """Forget the shards after the first `transitions`, as a run must that goes on from an older checkpoint.

        Raises:
            DataError: no shard ends there.
        """
        if transitions == self.transitions:
            return
        shards = self._content["shards"] if self._content else []
        kept, n = [], 0
        for shard in shards:
            if n < transitions:
                kept.append(shard)
                n += shard["transitions"]
        if self._content is None or n != transitions:
            raise DataError(
                f"{self.path} cannot be cut to {transitions} of its {self.transitions} transitions: no shard ends there. "
                "Restore the folder, with its manifest."
            )
        forgotten = shards[len(kept) :]
        self._content = {**self._content, "transitions": n, "shards": kept}
        self._write(_MANIFEST, _signed(self._content).encode())
        for shard in forgotten:
            (self.path / shard["name"]).unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.path / f"{name}.tmp"
        try:
            write_file(temporary, data)
            replace(temporary, self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            kept = self._content["transitions"] if self._content else 0
            raise DataError(
                f"Writing {len(data)} bytes to {self.path / name} failed: {error.strerror or error} "
                f"({shutil.disk_usage(self.path).free / 2**20:.0f} MiB free). The {kept} transitions before are kept. "
                "Make room and append again."
            ) from error

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_dataset(path: str | Path, strict: bool = True) -> Dataset:
    """Read a data set, every shard verified against the manifest's checksum before it is parsed.

    Args:
        path: of the folder.
        strict: refuse a data set with a bad shard. Else such shards are skipped, and `Dataset.lost` counts what
            was in them.

    Raises:
        DataError: no data set, a damaged manifest, no good shard, or, if strict, any bad one. The message names
            shard and cause, and tells what is still good.
    """
    path = Path(path)
    content = _manifest(path)
    shards = content["shards"]
    if not shards:
        raise DataError(f"{path} holds no transitions: its manifest lists no shards. Record some first.")
    needed = 2 * sum(shard["bytes"] for shard in shards)  # the shards, and all of them joined
    room = available_memory()
    if room is not None and needed > room:
        raise DataError(
            f"Reading {path} needs about {needed / 2**30:.1f} GiB of memory, but {room / 2**30:.1f} GiB are available."
        )
    good: list[Transition] = []
    problems: list[str] = []
    lost = 0
    for shard in shards:
        try:
            good.append(_read(path, shard, content))
        except Damaged as error:
            problems.append(f"{shard['name']}: {error}")
            lost += shard["transitions"]
    if problems and (strict or not good):
        n, all_n = content["transitions"] - lost, content["transitions"]
        remedy = "load_dataset(path, strict=False) reads those." if good else "Nothing can be read."
        raise DataError(
            f"{path} has {len(problems)} bad of {len(shards)} shards; {n} of {all_n} transitions are good. {remedy} "
            f"{'; '.join(problems)}."
        )
    return Dataset(Transition.cat(good), content["metadata"], lost, tuple(problems))


def _read(path: Path, shard: Mapping[str, Any], content: Mapping[str, Any]) -> Transition:
    """The rows (n,) of a shard, or Damaged."""
    data = read_file(path / shard["name"], sha256=shard["sha256"], size=shard["bytes"])
    tensors = parse_tensors(data)
    try:
        rows = Transition(**tensors)
        rows.check()
    except (TypeError, ContractError) as error:
        raise Damaged(f"it holds no transitions ({error})") from error
    found = (
        *rows.reward.shape,
        *rows.y.shape[1:],
        *rows.u.shape[1:],
        str(rows.y.dtype).removeprefix("torch."),
    )
    wanted = (shard["transitions"], content["ny"], content["nu"], content["dtype"])
    if found != wanted:
        raise Damaged(f"it holds (transitions, ny, nu, dtype) = {found}, but the manifest says {wanted}")
    return rows


def _json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"Metadata must be JSON types with finite numbers, but {error}.") from error


def _signed(content: Mapping[str, Any]) -> str:
    """The manifest: its content, and the checksum of that."""
    return json.dumps({"sha256": digest(_json(content).encode()), "content": content}, indent=1) + "\n"


def _manifest(path: Path) -> dict[str, Any]:
    """The content of a verified manifest."""
    try:
        value = parse_json(read_file(path / _MANIFEST))
        content = value.get("content") if isinstance(value, dict) else None
        if not isinstance(content, dict) or value.get("sha256") != digest(_json(content).encode()):
            raise Damaged("its content does not match its own SHA-256, so it was changed")
        _check_types(content, _TYPES)
        for shard in content["shards"]:
            _check_types(shard, _SHARD_TYPES)
            if not _SHARD.fullmatch(shard["name"]):
                raise Damaged(f"it lists a shard named {shard['name']!r}")
    except (Damaged, ContractError) as error:
        found = sorted(file.name for file in path.glob("shard-*.safetensors"))
        remedy = (
            f"The {len(found)} shards in the folder can be read one by one, unverified, with safetensors."
            if found
            else "Is this the folder of a data set?"
        )
        raise DataError(f"The manifest {path / _MANIFEST} cannot be used: {error}. {remedy}") from error
    return content


def _check_types(value: object, types: Mapping[str, type]) -> None:
    if not isinstance(value, dict) or set(value) != set(types):
        raise Damaged(f"it needs the keys {', '.join(types)}")
    for key, kind in types.items():
        if type(value[key]) is not kind or (kind is int and value[key] < 0):
            raise Damaged(f"{key} is {str(value[key])[:80]!r}")
