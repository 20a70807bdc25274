"""Compiled kernels: loops over small matrices, for which a Python or torch loop is 10 to 25 times slower."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

# NaN and inf keep their meaning: an exploding rollout must show.
_MATH = {"contract", "reassoc", "nsz", "arcp"}
_WORTH = 2_000  # steps of a horizon for which it pays to wake threads, which takes about 0.1 ms


def kernel(function: F) -> F:
    """A compiled function, kept on disk between runs, that other threads need not wait for."""
    return cast(F, njit(function, cache=True, nogil=True, fastmath=_MATH, error_model="numpy"))


def in_threads(work: Callable[[int, int], None], n: int, *, steps: int) -> None:
    """Call `work(start, stop)` on parts of 0 … n, each in a thread, as many as torch has, or on all of it at once.

    Args:
        work: calls a kernel; parts must not write to the same places.
        steps: how many steps of a horizon all of it takes.
    """
    threads = min(torch.get_num_threads(), n)
    if threads <= 1 or steps < _WORTH:
        work(0, n)
        return
    edges = [n * i // threads for i in range(threads + 1)]
    for done in [_pool(threads).submit(work, *part) for part in pairwise(edges)]:
        done.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mbrl")
