"""Peers of a speed comparison: other libraries, each in a virtual environment and a process of its own.

A peer is a script that prepares its work, prints "ready", and for each line it reads does the work once and prints
one JSON line with "seconds" and whatever else it measured. So passes of all sides can be interleaved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mbrl.errors import MbrlError

FOLDER = Path("build", "peers")
# Freed memory is kept, on all sides: glibc gives large blocks back to the kernel and faults them in again.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def python_with(name: str, packages: Sequence[str]) -> str:
    """The interpreter of a virtual environment with these packages (no dependencies) in front of our own's."""
    folder = FOLDER.resolve() / name
    python = folder / "bin" / "python"
    stamp = folder / "installed.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != list(packages):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
        # torch and numpy are the same on both sides, and large. Found after the peer's own packages.
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        stamp.write_text(json.dumps(list(packages)))
    return str(python)


class Peer:
    """A running peer.

    Args:
        command: the script and its arguments, after the interpreter.
        python: the interpreter; our own unless given.
        threads: of its arithmetic.

    Raises:
        MbrlError: it ended before it was ready, or in a pass; its last words are told.
    """

    def __init__(self, command: Sequence[str], *, python: str = sys.executable, threads: int):
        environment = {**os.environ, **HEAP, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [python, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._read("ready")

    def run(self) -> dict[str, Any]:
        """One pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._read("{"))
        return result

    def _read(self, start: str) -> str:
        """The next line that starts so: libraries print things of their own."""
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        last = self._process.stderr.read().strip().splitlines()[-3:]
        raise MbrlError(f"A peer ended early ({' '.join(map(str, self._process.args))}): {' | '.join(last)}")  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def serve(work: Any) -> None:
    """Answer the lines of a `Peer`: `work()` returns the dict of one pass."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)
