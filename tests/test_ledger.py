"""The ledger of a comparison: nothing finished is lost, nothing is done twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbrl.errors import DataError, RunFolderError
from mbrl.experiments.cells import Cell, Job, Outcome
from mbrl.experiments.ledger import Ledger
from tests.jobs import CELL


def outcome(cell: Cell, seeds: tuple[int, ...], **found: object) -> Outcome:
    job = Job(cell, seeds)
    record = {"key": job.key, "cell": cell.identity, "seeds": list(seeds)}
    return Outcome(record | (found or {"episodes": [{"seed": seed, "return": 1.0} for seed in seeds]}))


def test_what_was_added_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    film = torch.arange(6.0).reshape(3, 2)
    with Ledger(tmp_path) as ledger:
        ledger.add(replace(outcome(CELL, (0, 1)), films=film))
    with Ledger(tmp_path) as ledger:
        (record,) = ledger.done(CELL)
        assert record["seeds"] == [0, 1]
        found = ledger.film(record["key"])
        assert found is not None
        assert torch.equal(found, film)
        assert ledger.film("another") is None
        (tmp_path / "films" / f"{record['key']}.safetensors").write_bytes(b"damaged")
        assert ledger.film(record["key"]) is None  # no picture is worth a report


def test_only_missing_seeds_make_jobs(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(outcome(CELL, (0, 1)))
        ledger.add(outcome(replace(CELL, horizon=5), (2, 3)))  # another cell
        assert [job.seeds for job in ledger.missing(CELL, range(7), 3)] == [(2, 3, 4), (5, 6)]
        assert not list(ledger.missing(CELL, range(2), 3))


def test_a_refusal_is_final_and_a_crash_is_not(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(outcome(CELL, (0,), refused="it cannot"))
        assert not list(ledger.missing(CELL, range(3), 1))
        other = replace(CELL, planner="icem")
        ledger.add(outcome(other, (0,), crashed="it broke"))
        assert [job.seeds for job in ledger.missing(other, range(2), 2)] == [(0, 1)]
        assert ledger.crash(other) == "it broke"
        assert ledger.crash(CELL) is None


def test_the_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(outcome(CELL, (0,)))
        ledger.add(outcome(CELL, (1,)))
    path = tmp_path / "cells.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in (first + 1, first + 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        with Ledger(tmp_path) as ledger:
            assert [job.seeds for job in ledger.missing(CELL, range(2), 1)] == [(1,)]
            ledger.add(outcome(CELL, (1,)))
        assert path.read_bytes() == whole


def test_damage_within_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(outcome(CELL, (0,)))
        ledger.add(outcome(CELL, (1,)))
    path = tmp_path / "cells.jsonl"
    damaged = path.read_text().replace('"seeds"', '"seds"', 1)
    path.write_text(damaged)
    with pytest.raises(DataError, match=r"cells.jsonl is damaged in line 1: KeyError 'seeds'. Restore"):
        Ledger(tmp_path)
    assert path.read_text() == damaged


def test_two_comparisons_never_share_a_folder(tmp_path: Path) -> None:
    with Ledger(tmp_path), pytest.raises(RunFolderError, match="in use"):
        Ledger(tmp_path)
    Ledger(tmp_path).close()


def test_a_full_disk_costs_only_the_line_that_did_not_fit(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.add(outcome(CELL, (0,)))
        file, ledger._file = ledger._file, open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
        with pytest.raises(RunFolderError, match="No space left on device. What was written before is kept"):
            ledger.add(outcome(CELL, (1,)))
        file.close()
    with Ledger(tmp_path) as ledger:
        assert [json.loads(line)["seeds"] for line in ledger.path.read_text().splitlines()] == [[0]]


def test_the_key_is_of_all_that_a_result_depends_on() -> None:
    changes = {
        "env": "Hopper-v5",
        "model": "analytic",
        "fingerprint": "ab",
        "planner": "icem",
        "budget": "ms",
    }
    numbers: dict[str, Any] = {
        "amount": 1.0,
        "horizon": 9,
        "steps": 9,
        "propagation": "ts1",
        "particles": 2,
        "threads": 2,
    }
    keys = {Job(replace(CELL, **{name: value}), (0,)).key for name, value in {**changes, **numbers}.items()}
    keys |= {Job(CELL, (0,)).key, Job(CELL, (1,)).key, Job(CELL, (0, 1)).key}
    assert len(keys) == len(changes) + len(numbers) + 3
    learned = replace(CELL, model="runs/model", fingerprint="ab")
    assert Job(learned, (0,)).key == Job(replace(learned, model="/home/me/runs/model/"), (0,)).key
    assert Job(replace(CELL), (0,)).key == Job(CELL, (0,)).key
