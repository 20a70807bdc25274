"""Where jobs run: side by side or alone, in what order, and what happens to those whose worker dies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbrl.errors import ContractError
from mbrl.experiments.cells import Job, Outcome
from mbrl.experiments.executors import Executor, LocalPool, RayCluster, SlurmQueue, executor_of
from tests.jobs import CELL, killed, killed_once, played, told


def jobs(n: int, **changes: Any) -> list[Job]:
    return [Job(replace(CELL, **changes), (seed,)) for seed in range(n)]


def by_seed(outcomes: Iterator[Outcome]) -> dict[int, dict[str, Any]]:
    return {outcome.record["seeds"][0]: outcome.record for outcome in outcomes}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


def test_every_job_is_run_once_on_its_threads() -> None:
    found = by_seed(LocalPool(2, work=told).run(jobs(4)))
    assert sorted(found) == [0, 1, 2, 3]
    assert all(record["threads"] == "1" and "attempts" not in record for record in found.values())
    assert len({record["pid"] for record in found.values()}) == 2


@pytest.mark.parametrize("where", ["local", "ray"])
def test_no_job_runs_beside_one_that_is_to_be_alone(where: str, ray_cluster: None) -> None:
    executor = LocalPool(2, work=told) if where == "local" else RayCluster(workers=2, work=told)
    found = sorted(by_seed(executor.run(jobs(3), alone=True)).values(), key=lambda record: record["from"])
    assert len(found) == 3
    assert all(a["to"] <= b["from"] for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("where", ["local", "ray", "slurm"])
def test_a_job_whose_worker_was_killed_is_run_again_and_told(
    where: str, ray_cluster: None, tmp_path: Path
) -> None:
    executors: dict[str, Executor] = {
        "local": LocalPool(2, work=killed_once),
        "ray": RayCluster(workers=2, work=killed_once),
        "slurm": SlurmQueue(tmp_path, cluster="local", work=killed_once),  # its scripts, run on this machine
    }
    found = by_seed(executors[where].run(jobs(2, model=str(tmp_path / "killed"))))
    assert sorted(found) == [0, 1]
    assert found[0]["attempts"] == 2
    assert "attempts" not in found[1]
    assert all("episodes" in record for record in found.values())


def test_a_job_that_always_loses_its_worker_is_given_up_and_costs_no_other() -> None:
    found = by_seed(LocalPool(2, work=killed).run(jobs(3)))
    assert found[0]["attempts"] == 3
    assert "worker died 3 times" in found[0]["crashed"]
    assert "episodes" in found[1]
    assert "episodes" in found[2]


def test_results_do_not_depend_on_where_jobs_run(ray_cluster: None) -> None:
    """Every untimed column, to the last bit."""
    cells = [replace(CELL, planner=planner) for planner in ("cem", "ilqr", "random")]
    work = [Job(cell, (0, 1, 2)) for cell in cells]

    def untimed(executor: Executor) -> dict[str, str]:
        found = {}
        for outcome in executor.run(work):
            episodes = outcome.record["episodes"]
            for episode in episodes:
                for name in ("plan_ms", "plan_ms_worst", "late"):
                    del episode[name]
            found[outcome.record["key"]] = json.dumps(episodes)
        return found

    local, ray = untimed(LocalPool(2, work=played)), untimed(RayCluster(workers=2, work=played))
    assert len(local) == 3
    assert local == ray


def test_an_address_belongs_to_ray(tmp_path: Path) -> None:
    options: dict[str, Any] = {"workers": 1, "threads": 1, "folder": tmp_path}
    assert isinstance(executor_of("ray", address="10.0.0.1:6379", **options), RayCluster)
    assert isinstance(executor_of("slurm", address=None, **options), SlurmQueue)
    with pytest.raises(ContractError, match="Only --executor ray has an address, but --executor is local"):
        executor_of("local", address="10.0.0.1:6379", **options)
