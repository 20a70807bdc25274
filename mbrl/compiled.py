"""Compiled kernels: loops over small matrices, for which a Python or torch loop is 10 to 25 times slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import torch
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

# NaN and inf keep their meaning: an exploding rollout must show.
_MATH = {"contract", "reassoc", "nsz", "arcp"}


def kernel(function: F) -> F:
    """A compiled function, kept on disk between runs."""
    return cast(F, njit(function, cache=True, fastmath=_MATH, error_model="numpy"))


def parallel_kernel(function: F) -> F:
    """The same, whose `prange` loops take all processors."""
    return cast(F, njit(function, cache=True, parallel=True, fastmath=_MATH, error_model="numpy"))


def use_threads(steps: int) -> bool:
    """Whether so many steps of a horizon are worth starting threads for; if so, as many are set as torch has."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if threads == 1 or steps < 2_000:
        return False
    numba.set_num_threads(threads)
    return True
