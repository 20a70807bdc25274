"""Compiled kernels: loops over small matrices, for which a Python or torch loop is 10 to 25 times slower."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import torch
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

# NaN and inf keep their meaning: an exploding rollout must show.
_MATH = {"contract", "reassoc", "nsz", "arcp"}
_WORTH = 2_000  # steps of a horizon for which it pays to wake threads, which takes about 0.1 ms
_HERE = Path(__file__).resolve().parent
_SOURCES = (
    "compiled",
    "horizon",
    "horizon_kernels",
    "programs",
    "planners/box_qp",
    "planners/separable",
    "planners/sweeps",
)


@lru_cache(maxsize=1)
def _folder(parent: str) -> str:
    """Where compiled code is kept. A kernel holds others of other files, of whose changes numba does not know."""
    sources = b"".join((_HERE / f"{name}.py").read_bytes() for name in _SOURCES)
    return str(Path(parent) / f"kernels-{hashlib.sha256(sources).hexdigest()[:16]}")


def kernel(function: F) -> F:
    """A compiled function, kept on disk between runs, that other threads need not wait for."""
    config: Any = numba.config
    before = config.CACHE_DIR  # of NUMBA_CACHE_DIR, if that is set
    config.CACHE_DIR = _folder(before or str(_HERE / "__pycache__"))
    try:
        return cast(F, njit(function, cache=True, nogil=True, fastmath=_MATH, error_model="numpy"))
    finally:
        config.CACHE_DIR = before


def in_threads(work: Callable[[int, int], None], n: int, *, steps: int) -> None:
    """Call `work(start, stop)` on parts of 0 … n, each in a thread, as many as torch has, or on all of it at once.

    Args:
        work: calls a kernel; parts must not write to the same places.
        steps: how many steps of a horizon all of it takes.
    """
    threads = torch.get_num_threads()
    parts = min(threads, n)
    if parts <= 1 or steps < _WORTH:
        work(0, n)
        return
    edges = [n * i // parts for i in range(parts + 1)]
    for done in [_pool(threads).submit(work, *part) for part in pairwise(edges)]:
        done.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mbrl")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
