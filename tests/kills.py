"""Killing a process that writes, at random moments and at every single one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The writers are forks of one process, since importing torch for each takes longer than their lives.
_HARNESS = """
import os, random, signal, sys, time
os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads, and would wait for them
sys.path.insert(0, sys.argv[1])
{code}
folder, kills = sys.argv[2], int(sys.argv[3])
for n in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            work(folder, lambda i: os.write(writing, i.to_bytes(8, "big")))
        finally:
            os._exit(1)
    os.close(writing)
    told = os.read(reading, 8)
    assert told, "the writer failed by itself"
    time.sleep(random.Random(n).uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer failed by itself"
    while more := os.read(reading, 1 << 16):
        told = (told + more)[-8:]
    os.close(reading)
    verify(folder, int.from_bytes(told, "big"))
    print("killed")
"""


def survive_kills(code: str, folder: Path, kills: int = 8) -> None:
    """Run `work(folder, told)` of the code, which writes for ever and tells the number of each finished write,
    kill it, and run `verify(folder, last)`, which asserts that this write can be read; again and again.
    """
    command = [sys.executable, "-c", _HARNESS.format(code=code), str(ROOT), str(folder), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["killed"] * kills


class Killed(BaseException):
    """Like a kill: passes every `except Exception` and `except OSError`."""


@contextmanager
def interrupted(step: int, error: BaseException) -> Iterator[None]:
    """Raise instead of call number `step` of those that make what was written durable, or visible."""
    calls = 0

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise error
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, guard(getattr(os, name)))
        yield
