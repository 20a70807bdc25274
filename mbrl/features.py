"""Features: what a learned model sees of y, and how its answer becomes the next y."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mbrl.errors import ContractError


def indices(*fields: slice) -> tuple[int, ...]:
    """The places in y of fields of a layout."""
    return tuple(i for field in fields for i in range(field.start, field.stop))


@dataclass(frozen=True)
class Features:
    """What a learned model sees of y (..., ny), and what it predicts.

    A number of y that is not named below is seen as it is and predicted as its change.

    Attributes:
        ny: size of y.
        hidden: not seen: a position that the physics does not depend on, or what other numbers determine.
        angles: seen as sine and cosine, rad.
        constant: carried over and not predicted, such as a goal.
        absolute: predicted as they are, such as forces.
        unit: runs of y that are unit vectors, such as quaternions or (cos, sin): scaled back to length 1
            after each step.

    Raises:
        ContractError: an index is outside y or named twice where that has no meaning, a unit vector is empty or
            in pieces, or nothing is left to see or to predict.
    """

    ny: int
    hidden: tuple[int, ...] = ()
    angles: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    absolute: tuple[int, ...] = ()
    unit: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        unit = tuple(i for run in self.unit for i in run)
        for named in (self.hidden + self.angles, self.constant + self.absolute + unit):
            if len(set(named)) < len(named) or not set(named) <= set(range(self.ny)):
                raise ContractError(
                    f"Features needs indices below {self.ny}, each once in hidden and angles and once in "
                    f"constant, absolute and unit, but got {self}."
                )
        if any(not run or run != tuple(range(run[0], run[0] + len(run))) for run in self.unit):
            raise ContractError(
                f"Features needs unit vectors of numbers that stand together in y, but got {self.unit}."
            )
        if max(len(self.hidden), len(self.constant)) >= self.ny:
            raise ContractError(
                f"Features needs at least one number of y that is not hidden and one that is not constant, but got {self}."
            )

    @property
    def predicted(self) -> tuple[int, ...]:
        """The indices of y that a model predicts, in the order of its answer."""
        return tuple(i for i in range(self.ny) if i not in self.constant)

    def inputs(self, y: Tensor) -> Tensor:
        """What a model sees (..., nf) of y (..., ny)."""
        return torch.cat(self.seen(y), -1)

    def seen(self, y: Tensor) -> list[Tensor]:
        """`inputs` in parts, for who has more to put beside them."""
        if len(self._sights) == 1 and not self.hidden and not self.angles:
            return [y]
        seen = [y[..., part] for kind, part in self._sights if kind == "as it is"]
        angles = [y[..., part] for kind, part in self._sights if kind == "angle"]
        return [*seen, *(a.sin() for a in angles), *(a.cos() for a in angles)]

    def targets(self, y: Tensor, y_next: Tensor) -> Tensor:
        """What a model should answer (..., n) where y (..., ny) became y_next (..., ny)."""
        parts = [
            y_next[..., part] if kind == "absolute" else y_next[..., part] - y[..., part]
            for kind, part in self._changes
            if kind != "constant"
        ]
        return torch.cat(parts, -1)

    def advance(self, y: Tensor, answer: Tensor) -> Tensor:
        """y_next (..., ny) of y (..., ny) and a model's answer (..., n)."""
        parts = []
        start = 0
        for kind, part in self._changes:
            new = y[..., part]
            if kind != "constant":
                stop = start + part.stop - part.start
                said = answer[..., start:stop]
                new = said if kind == "absolute" else new + said
                start = stop
            parts.append(_scaled(kind, new))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def rescaled(self, y: Tensor) -> Tensor:
        """y (..., ny) with its unit vectors scaled back to length 1."""
        return (
            torch.cat([_scaled(kind, y[..., part]) for kind, part in self._changes], -1) if self.unit else y
        )

    def linearize(self, y: Tensor, answer: Tensor, J: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of y_next of n models: (n, B, ny, ny) by y (B, ny) and (n, B, ny, nu) by u (B, nu).

        answer: (n, B, n_predicted), and J: (n, B, n_predicted, nf + nu), its derivative by what a model
        sees of y, and by u.
        """
        y, answer, J = y[None], answer.to(y), J.to(y)
        seen = [part for kind, part in self._sights if kind == "as it is"]
        angles = [part for kind, part in self._sights if kind == "angle"]
        plain, turns = (sum(part.stop - part.start for part in parts) for parts in (seen, angles))
        by_seen, by_sin, by_cos, by_u = torch.split(
            J, [plain, turns, turns, J.shape[-1] - plain - 2 * turns], -1
        )
        D = J.new_zeros(*J.shape[:-1], self.ny + by_u.shape[-1])  # the answer's derivative by (y, u)
        D[..., self.ny :] = by_u
        for part, block in zip(seen, _pieces(by_seen, seen), strict=True):
            D[..., part] = block
        for part, sin, cos in zip(angles, _pieces(by_sin, angles), _pieces(by_cos, angles), strict=True):
            angle = y[..., None, part]
            D[..., part] = sin * angle.cos() - cos * angle.sin()

        F = J.new_zeros(*J.shape[:2], self.ny, D.shape[-1])
        start = 0
        for kind, part in self._changes:
            rows, stop = F[..., part, :], start
            if kind != "constant":
                stop = start + part.stop - part.start
                rows.copy_(D[..., start:stop, :])
            if kind != "absolute":
                rows[..., part].diagonal(dim1=-2, dim2=-1).add_(1)
            if kind.startswith("unit"):  # of v / |v|: what is across v, over |v|
                v = y[..., part] + answer[..., start:stop]
                length = v.norm(dim=-1, keepdim=True)
                along = (v / length)[..., None]
                rows.copy_((rows - along * (along * rows).sum(-2, keepdim=True)) / length[..., None])
            start = stop
        return F[..., : self.ny], F[..., self.ny :]

    # Slices, not index tensors: nothing has to be moved to the device of y.

    @cached_property
    def _sights(self) -> list[tuple[str, slice]]:
        kinds = dict.fromkeys(self.hidden, "hidden") | dict.fromkeys(self.angles, "angle")
        return _runs(kinds, self.ny, "as it is")

    @cached_property
    def _changes(self) -> list[tuple[str, slice]]:
        kinds = dict.fromkeys(self.constant, "constant") | dict.fromkeys(self.absolute, "absolute")
        kinds |= {i: f"unit {k}" for k, run in enumerate(self.unit) for i in run}
        return _runs(kinds, self.ny, "change")


def _pieces(block: Tensor, parts: list[slice]) -> tuple[Tensor, ...]:
    """The columns of a block (..., n), part by part."""
    return torch.split(block, [part.stop - part.start for part in parts], -1)


def _scaled(kind: str, part: Tensor) -> Tensor:
    return part / part.norm(dim=-1, keepdim=True) if kind.startswith("unit") else part


def _runs(kinds: dict[int, str], ny: int, default: str) -> list[tuple[str, slice]]:
    """Neighbours of one kind as one slice, in order."""
    runs = []
    for kind, group in groupby(range(ny), lambda i: kinds.get(i, default)):
        run = list(group)
        runs.append((kind, slice(run[0], run[-1] + 1)))
    return runs
