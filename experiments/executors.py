"""Where jobs run: a pool of processes on this machine, a Ray cluster, or SLURM.

All take the same jobs and give the same outcomes, in the order in which they end. A worker that dies, killed or out of
memory, costs only its own job, which is tried again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, Protocol

from mbrl.errors import ContractError, MissingExtra
from mbrl.experiments.cells import Job, Outcome, run_job

_PR_SET_PDEATHSIG = 1
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

Work = Callable[[Job], Outcome]


class Executor(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> Iterator[Outcome]:
        """The outcomes as they come; with `alone`, no job runs beside another, so that its times mean something."""
        ...


@dataclass(frozen=True)
class LocalPool:
    """Processes on this machine, each on processors of its own.

    Attributes:
        workers: how many; 0 for as many as the processors allow.
        threads: of each.
        retries: how often a job whose worker died is tried again.
        work: what a job is run by.
    """

    workers: int = 0
    threads: int = 1
    retries: int = 2
    work: Work = run_job

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> Iterator[Outcome]:
        cores = sorted(os.sched_getaffinity(0))
        slots = 1 if alone else self.workers or max(1, len(cores) // self.threads)
        shares = [
            [cores[(i * self.threads + j) % len(cores)] for j in range(self.threads)] for i in range(slots)
        ]
        waiting = [(job, 1) for job in reversed(jobs)]
        running: dict[Future[Outcome], tuple[int, Job, int]] = {}
        pools: dict[int, ProcessPoolExecutor] = {}
        try:
            with _threads(self.threads):
                while waiting or running:
                    for slot in set(range(slots)) - {slot for slot, _, _ in running.values()}:
                        if waiting:
                            job, attempt = waiting.pop()
                            if slot not in pools:
                                pools[slot] = _pool(shares[slot])
                            try:
                                future = pools[slot].submit(self.work, job)
                            except BrokenProcessPool:  # it died between two jobs
                                pools[slot] = _pool(shares[slot])
                                future = pools[slot].submit(self.work, job)
                            running[future] = slot, job, attempt
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        slot, job, attempt = running.pop(future)
                        try:
                            yield _told(future.result(), attempt)
                        except BrokenProcessPool:
                            pools.pop(slot).shutdown(wait=False)
                            if attempt <= self.retries:
                                waiting.append((job, attempt + 1))
                            else:
                                yield _lost(job, attempt)
        finally:
            for pool in pools.values():
                for process in list(
                    (pool._processes or {}).values()
                ):  # or Ctrl-C would wait for whole episodes
                    process.terminate()
                pool.shutdown(wait=True, cancel_futures=True)


def _pool(cores: list[int]) -> ProcessPoolExecutor:
    """One process, so that it is known whose job died with it."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start, initargs=(cores,))


def _start(cores: list[int]) -> None:
    import mujoco

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers,
    if sys.platform == "linux":  # and the kernel does where the parent was killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, cores)
    mujoco.set_mju_user_warning(lambda text: None)  # of candidates that diverge, which are expected


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """How many threads libraries take in processes that are started inside."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _told(outcome: Outcome, attempts: int) -> Outcome:
    return outcome if attempts == 1 else replace(outcome, record=outcome.record | {"attempts": attempts})


def _lost(job: Job, attempts: int, why: str = "") -> Outcome:
    record = {"key": job.key, "cell": job.cell.identity, "seeds": list(job.seeds), "attempts": attempts}
    why = why or f"its worker died {attempts} times: killed, out of memory, or crashed outside of Python"
    return Outcome(record | {"crashed": why})


@dataclass(frozen=True)
class RayCluster:
    """Tasks on a Ray cluster, one processor per thread; timed jobs one after the other.

    Attributes:
        address: of the cluster; a new one on this machine, without its dashboard, unless given. Whoever reaches its ports
            needs Ray's token to use them, unless RAY_AUTH_MODE switches that off.
        workers: processors of that new one; 0 for all.
        threads: of each job.
        retries: how often a job whose worker died is tried again.
        work: what a job is run by.
    """

    address: str | None = None
    workers: int = 0
    threads: int = 1
    retries: int = 2
    work: Work = run_job

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> Iterator[Outcome]:
        try:
            import ray
        except ImportError:
            raise MissingExtra("--executor ray", "ray", "ray") from None
        with _threads(self.threads):
            if not ray.is_initialized():
                own: dict[str, Any] = {"num_cpus": self.workers or None, "include_dashboard": False}
                own |= {
                    "_system_config": {"worker_niceness": 0}
                }  # 15 unless told, which times would suffer from
                ray.init(**({"address": self.address} if self.address else own), log_to_driver=False)
            processors = ray.cluster_resources().get("CPU", 0)  # type: ignore[no-untyped-call]
            if self.threads > processors:
                raise ContractError(
                    f"A job needs {self.threads} processors, one for each of its threads, but the Ray cluster has "
                    f"{processors:g}. Give fewer --threads, or more --workers."
                )
            # Retried here and not by Ray, so that it can be told.
            task = ray.remote(num_cpus=self.threads, max_retries=0)(self.work)
            waiting = [(job, 1) for job in reversed(jobs)]
            running: dict[Any, tuple[Job, int]] = {}
            while waiting or running:
                while waiting and not (alone and running):
                    job, attempt = waiting.pop()
                    running[task.remote(job)] = job, attempt
                (ended,), _ = ray.wait(list(running), num_returns=1)
                job, attempt = running.pop(ended)
                try:
                    yield _told(ray.get(ended), attempt)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
                    if attempt <= self.retries:
                        waiting.append((job, attempt + 1))
                    else:
                        yield _lost(job, attempt)
                except ray.exceptions.RayError as error:  # of this job: the others go on
                    yield _lost(job, attempt, str(error))


@dataclass(frozen=True)
class SlurmQueue:
    """Jobs of a SLURM cluster, which share a file system with this machine; timed ones have a node to themselves.

    Attributes:
        folder: for the scripts and logs of the queue.
        threads: of each job.
        minutes: that a job may take.
        retries: how often a job that the queue has lost is tried again.
        cluster: "slurm", or "local" for processes on this machine.
        work: what a job is run by.
    """

    folder: Path
    threads: int = 1
    minutes: int = 240
    retries: int = 2
    cluster: Literal["slurm", "local"] = "slurm"
    work: Work = run_job

    def run(self, jobs: Sequence[Job], *, alone: bool = False) -> Iterator[Outcome]:
        try:
            import submitit
        except ImportError:
            raise MissingExtra("--executor slurm", "submitit", "slurm") from None
        queue = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        queue.update_parameters(timeout_min=self.minutes, cpus_per_task=self.threads)
        if alone:
            queue.update_parameters(slurm_exclusive="")
        waiting = [(job, 1) for job in reversed(jobs)]
        running: list[tuple[Any, Job, int]] = []
        with _threads(self.threads):
            while waiting or running:
                while waiting and not (alone and running):
                    job, attempt = waiting.pop()
                    running.append((queue.submit(self.work, job), job, attempt))
                ended = [entry for entry in running if entry[0].done()]
                running = [entry for entry in running if entry not in ended]
                for submitted, job, attempt in ended:
                    try:
                        yield _told(submitted.result(), attempt)
                    except submitit.core.utils.UncompletedJobError:
                        if attempt <= self.retries:
                            waiting.append((job, attempt + 1))
                        else:
                            yield _lost(job, attempt)
                if not ended:
                    time.sleep(1.0)


def executor_of(name: str, *, workers: int, threads: int, address: str | None, folder: Path) -> Executor:
    """The executor called so.

    Raises:
        ContractError: an address for one that has none.
    """
    if name == "slurm" and address is None:
        return SlurmQueue(folder / "slurm", threads)
    if name == "ray":
        return RayCluster(address, workers, threads)
    if address is not None:
        raise ContractError(f"Only --executor ray has an address, but --executor is {name}.")
    return LocalPool(workers, threads)
