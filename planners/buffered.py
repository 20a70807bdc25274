"""CasADi functions on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import casadi
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Buffered:
    """A function that reads and writes arrays where they are: calls that convert to CasADi's matrices cost 0.1 ms.

    Args:
        function: of dense arguments and results. Its matrices are the transposes of the arrays.
        shapes: of the results; None: it is not asked for. Results are overwritten by the next call.
    """

    def __init__(self, function: casadi.Function, shapes: Sequence[tuple[int, ...] | None]):
        self._memory, self._call = function.buffer()
        self.results = [np.empty(0 if shape is None else shape) for shape in shapes]
        for i, result in enumerate(self.results):
            if result.size:
                self._memory.set_res(i, result.data)

    def __call__(self, *arguments: Array) -> list[Array]:
        held = [np.ascontiguousarray(a, dtype=np.float64) for a in arguments]  # CasADi keeps addresses only
        for i, argument in enumerate(held):
            self._memory.set_arg(i, argument.data)
        self._call()
        return self.results
