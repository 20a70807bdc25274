"""Work for executors, which run it in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from mbrl.experiments.cells import Cell, Job, Outcome, run_job

CELL = Cell(
    env="InvertedPendulum-v5",
    model="simulator",
    fingerprint=None,
    planner="cem",
    budget="evaluations",
    amount=300.0,
    horizon=4,
    steps=5,
    propagation="mean",
    particles=1,
    threads=1,
)


def told(job: Job) -> Outcome:
    """Nothing but what the job was, and when and where."""
    tic = time.time()
    time.sleep(0.2)
    record = {"key": job.key, "cell": job.cell.identity, "seeds": list(job.seeds), "episodes": []}
    return Outcome(
        record
        | {"pid": os.getpid(), "from": tic, "to": time.time(), "threads": os.environ["OMP_NUM_THREADS"]}
    )


def killed_once(job: Job) -> Outcome:
    """`told`, but the first worker that meets the first seed is killed, as if memory had run out."""
    marker = Path(job.cell.model)
    if job.seeds[0] == 0 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return told(job)


def killed(job: Job) -> Outcome:
    """`told`, but every worker that meets the first seed is killed."""
    if job.seeds[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return told(job)


def played(job: Job) -> Outcome:
    return run_job(job)
