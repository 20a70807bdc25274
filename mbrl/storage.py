"""Files that a kill, a full disk or a flipped bit cannot turn into something else without a word."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor


class Damaged(Exception):
    """What is wrong with a file, in words; who reads the file says which one and what to do."""


def write_file(path: Path, data: bytes) -> None:
    """Write and fsync a file. Whoever needs all or nothing writes to a temporary name."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(source: Path, target: Path) -> None:
    """Give `source` its final name, and make the name durable."""
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. A no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file."""
    # Copies, since the format refuses tensors that share memory, such as tied weights.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies)


def read_file(path: Path, *, sha256: str | None = None, size: int | None = None) -> bytes:
    """The bytes of a file.

    Raises:
        Damaged: missing, unreadable, of another size or checksum, or larger than the memory available.
    """
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            raise Damaged(f"it has {found} bytes instead of {size}")
        room = available_memory()
        if room is not None and found > room:
            raise Damaged(f"its {found / 2**30:.1f} GiB do not fit into the {room / 2**30:.1f} GiB available")
        data = path.read_bytes()
    except FileNotFoundError:
        raise Damaged("it is missing") from None
    except OSError as error:
        raise Damaged(f"it cannot be read ({error.strerror or error})") from error
    if sha256 is not None and digest(data) != sha256:
        raise Damaged("its SHA-256 differs from the recorded one, so bytes were changed")
    return data


def parse_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        Damaged: not a safetensors file.
    """
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # a hostile header can make the parser, or torch behind it, raise anything
        raise Damaged(f"it is no valid safetensors file ({error})") from error


def parse_json(data: bytes) -> Any:
    """The value of a JSON file.

    Raises:
        Damaged: not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is no valid JSON ({error})") from error


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be allocated on a device, or None where that cannot be known."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        # A container is killed at its own limit, which the machine's number does not show.
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # another system, or no limit ("max")
        pass
    return min(limits, default=None)
