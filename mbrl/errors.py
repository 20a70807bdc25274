"""Errors that say what was needed, what was given and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MbrlError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedProblem(MbrlError, TypeError):
    """A planner was given a problem that lacks an ability it needs."""


class ContractError(MbrlError, ValueError):
    """A model, task, planner or policy broke its contract (shape, dtype, range, NaN)."""


class PlanWarning(RuntimeWarning):
    """A planner returned a plan that cannot be followed; an older one was followed instead."""


class UnknownName(MbrlError, KeyError):
    """A name that is not in the list of valid names; the message suggests near ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str]):
        names = sorted(valid)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Valid names: {', '.join(names)}."
        self.message = f"There is no {kind} called {name!r}. {hint}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class MissingExtra(MbrlError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""

    def __init__(self, what: str, package: str, extra: str):
        super().__init__(
            f"{what} needs the package {package}, which is not installed. "
            f'Install it: pip install "mbrl-kit[{extra}]"'
        )


class RunFolderError(MbrlError, OSError):
    """A run folder cannot be used: not writable, or held by another run."""


class EnvError(MbrlError, RuntimeError):
    """An environment failed, or returned what cannot be used; the message tells which one and when."""


class DataError(MbrlError, OSError):
    """A data set cannot be read or written; the message tells what is still good."""


class CheckpointError(MbrlError, OSError):
    """A checkpoint cannot be read or written; the message tells which one is good."""


def require(user: str, part: str, given: object, abilities: Iterable[str], remedy: str) -> None:
    """Raise `UnsupportedProblem` unless `given` has every attribute in `abilities`.

    Args:
        user: who needs it, e.g. "ILQR".
        part: which part of the problem, e.g. "dynamics".
        given: the object to inspect.
        abilities: attribute names that must exist.
        remedy: a sentence that says what to do.
    """
    missing = [name for name in abilities if not hasattr(given, name)]
    if missing:
        raise UnsupportedProblem(
            f"{user} needs {part} with {', '.join(missing)}, but {type(given).__name__} lacks "
            f"{'it' if len(missing) == 1 else 'them'}. {remedy}"
        )
