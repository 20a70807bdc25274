"""Compiled kernels: loops over small matrices, for which a Python or torch loop is 10 to 25 times slower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

# NaN and inf keep their meaning: an exploding rollout must show.
_MATH = {"contract", "reassoc", "nsz", "arcp"}


def kernel(function: F) -> F:
    """A compiled function, kept on disk between runs."""
    return cast(F, njit(function, cache=True, fastmath=_MATH))


def parallel_kernel(function: F) -> F:
    """The same, whose `prange` loops take all processors."""
    return cast(F, njit(function, cache=True, parallel=True, fastmath=_MATH))
