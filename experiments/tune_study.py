"""The trials of a search: what was tried, what came of it, and what to try next, in one SQLite file."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import filelock
import numpy as np

from mbrl.errors import ContractError, DataError, MissingExtra
from mbrl.experiments.spaces import Choice, Point, Range, Space
from mbrl.runs import environment, readable_errors

_NAME = "tune"
_PACKAGES = ("optuna", "mbrl-kit", "torch", "mujoco", "numpy")


@dataclass(frozen=True)
class Trial:
    """One point of the space that was tried to its end.

    Attributes:
        index: how many came before it.
        state: "pruned": given up after some seeds, for most trials had done better by then.
        returns: of the seeds that were played.
        facts: more numbers about it; and `why` it crashed.
    """

    index: int
    state: Literal["complete", "pruned", "crashed"]
    point: dict[str, Any]
    returns: list[float]
    facts: dict[str, Any]

    @property
    def value(self) -> float:
        """The mean return; NaN if it crashed."""
        return statistics.fmean(self.returns) if self.returns and self.state != "crashed" else math.nan


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """The complete one of the highest mean return, the first of those that tie."""
    complete = (trial for trial in trials if trial.state == "complete")
    return max(complete, key=lambda trial: (trial.value, -trial.index), default=None)


class Study:
    """`study.db` in a folder, an optuna study. Held by one search at a time; what `tell` was told survives a kill.

    A trial that was running when the search was killed is marked as failed, and its point is tried again. The sampler
    is seeded anew for each trial, by the seed and the trial's index, so that what it proposes is a function of the
    trials that are finished, and not of how often the search was interrupted.

    Args:
        folder: created with its parents.
        about: JSON types that tell what is searched; a study that is there must agree.
        first: the point to try first.

    Raises:
        MissingExtra: optuna is not installed.
        RunFolderError: not writable, or in use.
        ContractError: the folder holds another study.
        DataError: the file is damaged, or of another version of optuna.

    Reference: Bergstra et al. 2011, "Algorithms for hyper-parameter optimization" (the tree-structured Parzen
        estimator); Akiba et al. 2019 (optuna).
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], space: Space, *, first: Point, seed: int):
        try:
            import optuna
        except ImportError:
            raise MissingExtra("mbrl tune", "optuna", "tune") from None
        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder, self.path = folder, folder / "study.db"
        self.space, self._first, self._seed = space, dict(first), seed
        self._distributions = {name: self._distribution(kind) for name, kind in space.items()}
        with readable_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / "tune.lock")
            lock.acquire(timeout=0)
        with contextlib.ExitStack() as stack:
            stack.callback(lock.release)
            if not self.path.exists():
                self._create(about)
            self._storage = self._open(self.path)
            stack.callback(_close, self._storage)
            with self._usable():
                self._study = optuna.load_study(
                    study_name=_NAME, storage=self._storage, pruner=optuna.pruners.MedianPruner()
                )
                known = self._study.user_attrs
                self._agree(known["about"], about)
                now = environment_of_search()
                self.changed = {
                    name: (before, now.get(name))
                    for name, before in known["versions"].items()
                    if before != now.get(name)
                }
                self.killed = self._requeue()
            self._closing = stack.pop_all()

    def _distribution(self, kind: Range | Choice) -> Any:
        of = self._optuna.distributions
        if isinstance(kind, Choice):
            return of.CategoricalDistribution(kind.names)
        if kind.whole:
            return of.IntDistribution(int(kind.low), int(kind.high), log=kind.log)
        return of.FloatDistribution(kind.low, kind.high, log=kind.log)

    def _open(self, path: Path) -> Any:
        import sqlalchemy

        url = sqlalchemy.URL.create("sqlite", database=str(path.absolute())).render_as_string()
        with self._usable():
            return self._optuna.storages.RDBStorage(url)

    def _create(self, about: Mapping[str, Any]) -> None:
        """Under another name first: a kill must not leave half of the tables."""
        part = self.path.with_suffix(".part")
        for old in self.folder.glob(f"{part.name}*"):  # and its journal
            old.unlink()
        storage = self._open(part)
        with self._usable():
            study = self._optuna.create_study(storage=storage, study_name=_NAME, direction="maximize")
            study.set_user_attr("about", dict(about))
            study.set_user_attr("versions", environment_of_search())
        _close(storage)
        part.replace(self.path)

    def _agree(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        differ = [
            f"{name} is {there.get(name)} there, but {here.get(name)} here"
            if not isinstance(here.get(name), dict)
            else f"the {name} is another one"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        if differ:
            raise ContractError(
                f"{self.folder} holds another search: {'; '.join(differ)}. Give the same options to go on with it, "
                "or another folder: --out."
            )

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        import sqlalchemy

        try:
            yield
        except (
            KeyError,
            RuntimeError,
            sqlalchemy.exc.DatabaseError,
            self._optuna.exceptions.OptunaError,
        ) as error:
            raise DataError(
                f"{self.path} is not the study of a search, or it is damaged, or its disk is full "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Restore it, or give another folder: --out."
            ) from error

    def _requeue(self) -> int:
        """Mark what a kill has left as failed and try it again; returns how many trials were ever killed.

        A point that is not complete yet is proposed again as it was, since the sampler starts from the same seed.
        """
        state = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        waiting = {trial.user_attrs["index"] for trial in trials if trial.state == state.WAITING}
        for trial in trials:
            if trial.state == state.RUNNING:
                index = trial.user_attrs.get("index")
                whole = trial.params.keys() == self.space.keys() and "why" not in trial.user_attrs
                if whole and index is not None and index not in waiting:
                    self._study.enqueue_trial(trial.params, user_attrs={"index": index})
                self._study.tell(trial.number, state=state.FAIL)
        trials = self._study.get_trials(deepcopy=False)
        return sum(trial.state == state.FAIL and "why" not in trial.user_attrs for trial in trials)

    def trials(self) -> list[Trial]:
        """Those that are finished, in their order."""
        state = self._optuna.trial.TrialState
        words: dict[Any, Any] = {
            state.COMPLETE: "complete",
            state.PRUNED: "pruned",
            state.FAIL: "crashed",
        }
        with self._usable():
            return [
                Trial(
                    trial.user_attrs["index"],
                    words[trial.state],
                    dict(trial.params),
                    trial.user_attrs.get("returns", []),
                    trial.user_attrs["facts"],
                )
                for trial in self._study.get_trials(deepcopy=False)
                if trial.state in (state.COMPLETE, state.PRUNED)
                or (trial.state == state.FAIL and "why" in trial.user_attrs)
            ]

    def ask(self) -> Asked:
        """What to try next."""
        index, optuna = len(self.trials()), self._optuna
        seed = int(np.random.default_rng([self._seed, index]).integers(2**32))
        with self._usable():
            self._study.sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=False
            )
            waiting = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
            if index == 0 and not waiting:
                self._study.enqueue_trial(self._first, user_attrs={"index": 0})
            trial = self._study.ask(self._distributions)
            trial.set_user_attr("index", index)
            return Asked(self, trial, index)

    def remember(self, key: str, value: Any) -> None:
        """Keep JSON types under a name."""
        with self._usable():
            self._study.set_user_attr(key, value)

    def recall(self, key: str, default: Any) -> Any:
        with self._usable():
            return self._study.user_attrs.get(key, default)

    def importance(self) -> dict[str, float]:
        """How much each parameter matters among the better half of the trials, in shares of 1, largest first.

        Reference: Watanabe, Bansal & Hutter 2023, "PED-ANOVA".
        """
        values = [trial.value for trial in self.trials() if trial.state == "complete"]
        if len(values) < 8 or len(set(values)) < 3:
            return {}
        evaluator = self._optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        with self._usable():
            return dict(self._optuna.importance.get_param_importances(self._study, evaluator=evaluator))

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Asked:
    """A point to try, until it is told what came of it."""

    study: Study
    _trial: Any
    index: int

    @property
    def point(self) -> dict[str, Any]:
        return dict(self._trial.params)

    def hopeless(self, value: float, step: int) -> bool:
        """Whether a mean of `value` after `step` seeds is below the median of the trials so far."""
        with self.study._usable():
            self._trial.report(value, step)
            return bool(self._trial.should_prune())

    def tell(self, returns: list[float], facts: Mapping[str, Any], *, pruned: bool = False) -> None:
        """The trial is finished, or given up."""
        state = self.study._optuna.trial.TrialState
        with self.study._usable():
            self._trial.set_user_attr("returns", returns)
            self._trial.set_user_attr("facts", dict(facts))
            if pruned:
                self.study._study.tell(self._trial, state=state.PRUNED)
            else:
                self.study._study.tell(self._trial, statistics.fmean(returns))

    def crashed(self, why: str, facts: Mapping[str, Any]) -> None:
        """The trial gave no return and shall not be tried again."""
        with self.study._usable():
            self._trial.set_user_attr("facts", {**facts, "why": why})
            self._trial.set_user_attr("why", why)
            self.study._study.tell(self._trial, state=self.study._optuna.trial.TrialState.FAIL)


def environment_of_search() -> dict[str, str]:
    """The versions that what is proposed and what is returned depend on."""
    import optuna

    found: dict[str, str] = environment()["versions"] | {"optuna": optuna.__version__}
    return {name: found[name] for name in _PACKAGES}


def _close(storage: Any) -> None:
    storage.remove_session()
    storage.engine.dispose()
