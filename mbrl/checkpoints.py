"""Checkpoints: trees of tensors and plain values that come back exactly, or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from mbrl.errors import CheckpointError, ContractError
from mbrl.storage import (
    Damaged,
    digest,
    parse_json,
    parse_tensors,
    read_file,
    replace,
    sync_folder,
    tensor_bytes,
    write_file,
)

_TENSORS, _META, _SUMS = "tensors.safetensors", "meta.json", "SHA256SUMS"


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """A tree's tensors by name, and the tree as JSON with names in their place; `unpack` inverts it.

    Trees are nested dicts (with str or int keys), lists and tuples of tensors, str, int, float, bool and None:
    the state_dicts of modules, optimizers, `Replay` and `Collector`, and `Generator.get_state()`. Tensors come
    back on the CPU and without gradients, mappings as dicts.

    Raises:
        ContractError: something else, or another kind of key; the message tells where.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: tuple[str, ...]) -> Any:
        here = "/".join(path) or "the tree"
        if isinstance(value, Tensor):
            name = "/".join(path) or "tensor"
            while name in tensors:  # {"a/b": …, "a": {"b": …}}, {1: …, "1": …}
                name += "'"
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            if not all(type(key) in (str, int) for key in value):
                raise ContractError(f"The keys of {here} must be str or int, but are {list(value)[:5]}.")
            return {"dict": [[key, visit(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [visit(item, (*path, str(i))) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(float(value))}  # JSON has no such numbers
        if value is None or isinstance(value, str | int | float):
            return value
        raise ContractError(
            f"{here} is a {type(value).__name__}, which a checkpoint cannot hold. Convert it to a tensor, with "
            "torch.as_tensor, or to int, float, str, list or dict."
        )

    return tensors, visit(tree, ())


def unpack(tensors: Mapping[str, Tensor], meta: Any) -> Any:
    """The tree of which `pack` made these.

    Raises:
        CheckpointError: `pack` has not made these.
    """
    if isinstance(meta, list):
        return [unpack(tensors, item) for item in meta]
    if not isinstance(meta, dict):
        return meta
    try:
        ((kind, value),) = meta.items()
        if kind == "dict":
            return {key: unpack(tensors, item) for key, item in value}
        if kind == "tuple":
            return tuple(unpack(tensors, item) for item in value)
        if kind == "float":
            return float(value)
        if kind == "tensor":
            return tensors[value]
        raise KeyError(kind)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{str(meta)[:200]} was not made by pack, or not with these tensors."
        ) from error


def check_state(user: str, state: object, kinds: Mapping[str, type | UnionType]) -> None:
    """Raise ContractError unless the state that `user` is to go on from is a dict with values of these kinds."""
    if not isinstance(state, Mapping):
        raise ContractError(
            f"{user} needs a state with {', '.join(kinds)}, but got a {type(state).__name__}."
        )
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):
            found = f"{key} is a {type(state[key]).__name__}" if key in state else "there is none"
            name = kind.__name__ if isinstance(kind, type) else kind
            raise ContractError(f"{user} needs a state with {key} ({name}), but {found}.")


class Checkpoints:
    """The folder of a run's checkpoints, the newest few of them: `step_N/` with `tensors.safetensors`,
    `meta.json` and `SHA256SUMS` (as `sha256sum -c` reads it).

    A checkpoint is complete and on the disk before it gets its name, and is then never written again; older ones
    are removed only after that. So neither a kill nor a full disk costs one that was there. One process may save.

    Args:
        folder: created with its parents at the first save.
        keep: how many to keep.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        if keep < 1:
            raise ContractError(f"Checkpoints needs keep ≥ 1, but got {keep}.")
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """The steps of all checkpoints, good or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (re.fullmatch(r"step_(\d+)", entry.name) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, finite: Sequence[str] = ()
    ) -> Path:
        """Write the checkpoint of a step, then remove the oldest above `keep`; returns its folder.

        Args:
            step: ≥ 0.
            tensors, meta: e.g. of `pack`; meta is JSON types.
            finite: tensors that must hold neither NaN nor inf, by name or by "folder": "model" guards "model/w".

        Raises:
            ContractError: one of them does, or no tensor has such a name, or meta is not JSON.
            CheckpointError: writing failed, or a good checkpoint of this step with other contents exists.
        """
        _check_finite(tensors, finite)
        if step < 0:
            raise ContractError(f"save needs a step ≥ 0, but got {step}.")
        try:
            text = json.dumps(meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ContractError(
                f"meta must be JSON types with finite numbers, but {error}. Use pack."
            ) from error
        files = {_TENSORS: tensor_bytes(tensors), _META: text.encode()}
        files[_SUMS] = "".join(f"{digest(data)}  {name}\n" for name, data in files.items()).encode()

        target = self.folder / f"step_{step}"
        temporary = self.folder / f".tmp-step_{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".tmp-*"):  # by a process that was killed
                shutil.rmtree(left)
            if target.exists() and self._keeps(step, files[_SUMS]):
                return target
            temporary.mkdir()
            for name, data in files.items():
                write_file(temporary / name, data)
            sync_folder(temporary)
            replace(temporary, target)
            for old in self._surplus(step):
                self._remove(old)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            free = "unknown"
            with contextlib.suppress(OSError):
                free = f"{shutil.disk_usage(self.folder).free / 2**20:.0f} MiB"
            raise CheckpointError(
                f"Saving {sum(map(len, files.values()))} bytes to {target} failed: {error.strerror or error} ({free} "
                f"free). The checkpoints of steps {self.steps()} are kept. Make room, or choose another folder."
            ) from error
        return target

    def _keeps(self, step: int, sums: bytes) -> bool:
        """Whether the checkpoint of this step is this one already; a damaged one is removed."""
        try:
            self._read(step)
            same = read_file(self.folder / f"step_{step}" / _SUMS) == sums
        except Damaged:
            self._remove(step)
            return False
        if not same:
            raise CheckpointError(
                f"{self.folder / f'step_{step}'} is a good checkpoint with other contents, and is not overwritten. "
                "Save to another folder, or delete it."
            )
        return True

    def _surplus(self, step: int) -> list[int]:
        older = [other for other in self.steps() if other != step]
        return older[: max(len(older) - self.keep + 1, 0)]

    def _remove(self, step: int) -> None:
        """Under another name, so that a kill in between leaves nothing that looks like a damaged checkpoint."""
        waste = self.folder / f".tmp-old_{step}"
        os.replace(self.folder / f"step_{step}", waste)
        shutil.rmtree(waste)

    def load(self, step: int | None = None) -> tuple[int, dict[str, Tensor], Any]:
        """Step, tensors (on the CPU) and meta of the newest checkpoint, or of a step's, verified first.

        Raises:
            CheckpointError: there is none, or it is damaged; the message names the newest good one.
        """
        steps = self.steps()
        if not steps or step not in (None, *steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(f"There is no {wanted} in {self.folder}, which has steps {steps}.")
        step = steps[-1] if step is None else step
        try:
            return step, *self._read(step)
        except Damaged as error:
            good = self.latest_good()
            remedy = "No other is good."
            if good is not None:
                later = " and ".join(f"step_{other}" for other in steps if other > good)
                remedy = f"The newest good one is of step {good}: load({good}), or delete {later} to go on from there."
            raise CheckpointError(f"{self.folder / f'step_{step}'} is damaged: {error}. {remedy}") from error

    def latest_good(self) -> int | None:
        """The newest step whose checkpoint is undamaged, or None."""
        for step in reversed(self.steps()):
            with contextlib.suppress(Damaged):
                self._read(step)
                return step
        return None

    def _read(self, step: int) -> tuple[dict[str, Tensor], Any]:
        path = self.folder / f"step_{step}"
        name = _SUMS
        try:
            lines = read_file(path / _SUMS).decode(errors="replace").splitlines()
            pairs = [line.partition("  ") for line in lines]
            sums = {file: sha256 for sha256, _, file in pairs}
            if set(sums) != {_TENSORS, _META}:
                raise Damaged(f"it lists {sorted(sums)}")
            name = _META
            meta = parse_json(read_file(path / _META, sha256=sums[_META]))
            name = _TENSORS
            return parse_tensors(read_file(path / _TENSORS, sha256=sums[_TENSORS])), meta
        except Damaged as error:
            raise Damaged(f"{name}: {error}") from error


def _check_finite(tensors: Mapping[str, Tensor], finite: Sequence[str]) -> None:
    for guard in finite:
        names = [name for name in tensors if name == guard or name.startswith(f"{guard}/")]
        if not names:
            raise ContractError(
                f"finite names {guard!r}, but no tensor is called that or {guard}/…; there are {sorted(tensors)[:10]}."
            )
        for name in names:
            bad = int((~torch.isfinite(tensors[name])).sum())
            if bad:
                raise ContractError(
                    f"{name} has {bad} values that are not finite, so nothing was saved. Go back to the last "
                    "checkpoint, and lower the learning rate or clip the gradients."
                )
