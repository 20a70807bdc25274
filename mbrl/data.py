"""Transitions, and the buffer that holds them: real or imagined, on any device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError
from mbrl.storage import available_memory

_FLOATS = ("y", "u", "reward", "y_next")


@dataclass(frozen=True)
class Transition:
    """Steps of a world, with any common leading shape (...).

    Attributes:
        y: (..., ny), what the task reads; not the environment's observation.
        u: (..., nu), the action that was executed.
        reward: (...).
        y_next: (..., ny), in the same episode: at an end it is the last y, not the first of the next episode.
        terminated: (...) bool, the task ended the episode. Only this stops bootstrapping.
        truncated: (...) bool, something else did, such as a time limit.
        episode: (...) int64; no two episodes that are stored together share a number.
    """

    y: Tensor
    u: Tensor
    reward: Tensor
    y_next: Tensor
    terminated: Tensor
    truncated: Tensor
    episode: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def map(self, fun: Callable[[Tensor], Tensor]) -> Transition:
        """`fun` of every field."""
        return Transition(**{name: fun(value) for name, value in self.tensors().items()})

    def __getitem__(self, index: Any) -> Transition:
        """Part of the leading shape."""
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Transition:
        """On another device, and the floating-point fields in another dtype."""
        return self.map(lambda value: value.to(device, dtype if value.is_floating_point() else None))

    def flat(self) -> Transition:
        """With the leading shape (N,)."""
        n = self.reward.ndim
        return self.map(lambda value: value.reshape(-1, *value.shape[n:]))

    @staticmethod
    def cat(parts: Sequence[Transition]) -> Transition:
        """Joined along the first axis. At least one part."""
        return Transition(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].tensors()}
        )

    def check(self) -> None:
        """Raise ContractError unless shapes and dtypes fit and all numbers are finite."""
        lead = tuple(self.reward.shape)
        ny, nu = (tuple(value.shape[-1:]) or (1,) for value in (self.y, self.u))
        for name, value in self.tensors().items():
            wanted = lead + {"y": ny, "u": nu, "y_next": ny}.get(name, ())
            if tuple(value.shape) != wanted:
                raise ContractError(
                    f"Transition.{name} needs the shape {wanted}, since reward has {lead}, but has "
                    f"{tuple(value.shape)}. All fields share the leading shape; only y, u and y_next have one axis more."
                )
            kind = {"episode": torch.int64, "terminated": torch.bool, "truncated": torch.bool}.get(
                name, self.y.dtype
            )
            if value.dtype != kind or (name == "y" and not value.is_floating_point()):
                raise ContractError(
                    f"Transition.{name} has the dtype {value.dtype}, but y, u, reward and y_next need one floating-point "
                    "dtype, terminated and truncated bool, episode int64. Convert it with .to(dtype)."
                )
        for name in _FLOATS:
            value = getattr(self, name)
            if not bool(torch.isfinite(value).all()):
                self._refuse(name, value)

    def _refuse(self, name: str, value: Tensor) -> None:
        rows = ~torch.isfinite(value.reshape(self.reward.numel(), -1))
        bad = rows.any(-1).nonzero()[:, 0]
        row = int(bad[0])
        number = float(value.reshape(self.reward.numel(), -1)[row][rows[row]][0])
        more = f", and in {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ContractError(
            f"Transition.{name} is {number} in row {row} (episode {int(self.episode.reshape(-1)[row])}){more}. "
            "Nothing was stored. End the episode before such a step and leave the step out: a simulation that "
            "diverged, a reward that divides by zero, or a policy that returned NaN is nothing to learn from."
        )


def runs(transition: Transition) -> tuple[Tensor, Tensor]:
    """Which rows follow each other: order (N,) sorts the rows by episode and time, and run (N,) numbers,
    in that order, the unbroken pieces of episodes. Rows of one episode must be in order of time.

    Raises:
        ContractError: a row does not start where the row before it in its episode ended.
    """
    order = torch.argsort(transition.episode, stable=True)
    rows = transition[order]
    joined = (rows.episode[1:] == rows.episode[:-1]) & ~(rows.terminated | rows.truncated)[:-1]
    broken = joined & (rows.y[1:] != rows.y_next[:-1]).any(-1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0, 0]) + 1
        raise ContractError(
            f"Row {int(order[first])}, of episode {int(rows.episode[first])}, does not start where the row before it "
            "in that episode ended. Add the steps of an episode in order of time and leave none out, and give no two "
            "episodes the same number."
        )
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[1:] = ~joined
    return order, starts.cumsum(0) - 1


class Replay:
    """A ring buffer of transitions: the oldest are overwritten. Memory is allocated at once.

    Args:
        capacity: in transitions.
        ny, nu: sizes of y and u.
        device: where the buffer lives; what is added is moved there.
        dtype: of the floating-point fields; what is added is converted. A model learns the changes of y, and in
            float32 those below a ten-millionth of y are lost: choose float64 for small steps far from 0.

    Raises:
        ContractError: it needs more memory than is available, or a size is below 1.
    """

    def __init__(
        self,
        capacity: int,
        ny: int,
        nu: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if min(capacity, ny, nu) < 1:
            raise ContractError(
                f"Replay needs capacity, ny and nu of at least 1, but got {capacity}, {ny} and {nu}."
            )
        self.capacity, self.ny, self.nu = capacity, ny, nu
        self.device, self.dtype = torch.device(device), dtype
        row = (2 * ny + nu + 1) * dtype.itemsize + 2 * torch.bool.itemsize + torch.int64.itemsize
        room = available_memory(self.device)
        if room is not None and row * capacity > room:
            raise ContractError(
                f"Replay needs {row * capacity / 2**30:.1f} GiB for {capacity} transitions of {row} bytes, but "
                f"{self.device} has {room / 2**30:.1f} GiB available. Choose a capacity below {room // row}."
            )

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(capacity, *size, dtype=dtype, device=self.device)

        self._rows = Transition(
            y=empty(ny),
            u=empty(nu),
            reward=empty(),
            y_next=empty(ny),
            terminated=empty(dtype=torch.bool),
            truncated=empty(dtype=torch.bool),
            episode=empty(dtype=torch.int64),
        )
        self.clear()

    def clear(self) -> None:
        self._size = 0
        self._next = 0  # where the next row goes

    def __len__(self) -> int:
        return self._size

    def add(self, transition: Transition) -> None:
        """Append transitions of any leading shape, all or none.

        Rows of one episode must come in order of time if `trajectories` is to be asked for.

        Raises:
            ContractError: wrong shapes or sizes, or numbers that are not finite (in the buffer's dtype).
        """
        rows = self._converted(transition)[-self.capacity :]  # an index must not hold a place twice
        index = (self._next + torch.arange(len(rows.reward), device=self.device)) % self.capacity
        for name, store in self._rows.tensors().items():
            store[index] = getattr(rows, name)
        self._next = (self._next + len(index)) % self.capacity
        self._size = min(self._size + len(index), self.capacity)

    def _converted(self, transition: Transition) -> Transition:
        """(N,) rows on the buffer's device and in its dtype."""
        transition.check()
        sizes = transition.y.shape[-1], transition.u.shape[-1]
        if sizes != (self.ny, self.nu):
            raise ContractError(f"Replay holds (ny, nu) = {(self.ny, self.nu)}, but got {sizes}.")
        rows = transition.flat().to(self.device, self.dtype)
        if transition.y.dtype != self.dtype:
            rows.check()  # what is finite in float64 may be inf in float32
        return rows

    def _index(self, age: Tensor) -> Tensor:
        """Where the rows are, counted from the oldest."""
        return (self._next - self._size + age) % self.capacity

    def sample(self, n: int, *, generator: Generator) -> Transition:
        """n transitions (n,), uniformly and with replacement.

        Raises:
            ContractError: the buffer is empty.
        """
        if not self._size:
            raise ContractError("Replay is empty, so there is nothing to sample. Add transitions first.")
        age = torch.randint(self._size, (n,), generator=generator, device=generator.device)
        return self._rows[self._index(age.to(self.device))]

    def all(self) -> Transition:
        """A copy (len,) of what is stored, oldest first."""
        return self._rows[self._index(torch.arange(self._size, device=self.device))]

    def trajectories(self, length: int) -> tuple[Tensor, Tensor]:
        """Every window of `length` steps within one episode, by episode and time: y (N, length+1, ny), u (N, length, nu).

        Raises:
            ContractError: length < 1, or rows of an episode do not follow each other.
        """
        if length < 1:
            raise ContractError(f"trajectories needs a length of at least 1 step, but got {length}.")
        rows = self.all()
        order, run = runs(rows)
        first = (run[length - 1 :] == run[: max(len(run) - length + 1, 0)]).nonzero()[:, 0]
        window = order[first[:, None] + torch.arange(length, device=self.device)]
        return torch.cat([rows.y[window], rows.y_next[window[:, -1:]]], 1), rows.u[window]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of what is stored, oldest first; with it the buffer samples the same again."""
        return self.all().tensors()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of a `state_dict`.

        Raises:
            ContractError: fields are missing, of another dtype or size, or do not fit into the capacity.
        """
        names = set(self._rows.tensors())
        if set(state) != names:
            raise ContractError(
                f"Replay needs a state with the keys {', '.join(sorted(names))}, but got {', '.join(sorted(state))}."
            )
        rows = Transition(**state)
        if rows.y.dtype != self.dtype:
            raise ContractError(f"Replay holds {self.dtype}, but the state has {rows.y.dtype}.")
        rows = self._converted(rows)
        if len(rows.reward) > self.capacity:
            raise ContractError(
                f"The state has {len(rows.reward)} transitions, but Replay holds {self.capacity}. Make it larger."
            )
        self.clear()
        self.add(rows)
