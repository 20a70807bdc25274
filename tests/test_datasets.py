"""Data sets: a kill costs one shard at most, and what was damaged is never read."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import pickle
import resource
import struct
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbrl import ContractError, DatasetWriter, MissingExtra, Transition, load_dataset
from mbrl.errors import DataError
from mbrl.minari import from_minari, to_minari
from tests.kills import Killed, interrupted, survive_kills
from tests.test_checkpoints import Trap, flip
from tests.test_data import equal, spoiled, steps

METADATA = {"world": "Hopper-v5", "dt": 0.008, "task": {"speed": 1.0}}
PARTS = [steps(3), steps(2, 2, first=1), steps(5, first=3, terminated=False)]


def write(path: Path, *parts: Transition) -> Path:
    with DatasetWriter(path, METADATA) as writer:
        for part in parts or PARTS:
            writer.append(part)
    return path


def shard(path: Path, i: int) -> Path:
    return path / f"shard-{i:06d}.safetensors"


def test_what_was_written_is_read(tmp_path: Path) -> None:
    data = load_dataset(write(tmp_path / "a" / "b"))
    assert equal(data.transition, Transition.cat(PARTS))
    assert data.metadata == METADATA and data.lost == 0 and data.problems == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes_and_any_leading_shape_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    part = steps(6).to("cpu", dtype)
    write(tmp_path, part.map(lambda value: value.reshape(2, 3, *value.shape[1:])), part[:0], part[2])
    data = load_dataset(tmp_path).transition
    assert equal(data, Transition.cat([part, part[2:3]]))
    assert not shard(tmp_path, 2).exists()  # nothing is no shard


def test_writing_goes_on_where_it_stopped_and_old_shards_stay_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, PARTS[0])
    before = shard(tmp_path, 0).stat()
    shard(tmp_path, 1).write_text("a shard of a writer that was killed before it was listed")
    (tmp_path / "shard-000001.safetensors.tmp").write_text("half of one")
    with DatasetWriter(tmp_path) as writer:
        writer.append(PARTS[1])
    with DatasetWriter(tmp_path, METADATA) as writer:
        writer.append(PARTS[2])
    assert equal(load_dataset(tmp_path).transition, Transition.cat(PARTS))
    assert load_dataset(tmp_path).metadata == METADATA
    after = shard(tmp_path, 0).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert not list(tmp_path.glob("*.tmp"))


def test_other_metadata_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r'was recorded with.*0\.008.*"dt": 0\.01.*another folder'):
        DatasetWriter(tmp_path, {**METADATA, "dt": 0.01})
    with pytest.raises(ContractError, match="Metadata must be JSON"):
        DatasetWriter(tmp_path, {"dt": float("nan")})
    DatasetWriter(tmp_path).close()  # and neither has kept the lock


def test_two_writers_never_share_a_data_set(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path), pytest.raises(DataError, match="being written by another"):
        DatasetWriter(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (spoiled(steps(3), "y", 2, torch.nan), "y is nan in row 2"),
        (dataclasses.replace(steps(3), u=torch.zeros(3, 2)), "nu = 2 instead of 1"),
        (steps(3).to("cpu", torch.float64), "dtype = float64 instead of float32"),
    ],
)
def test_what_does_not_belong_is_not_written(tmp_path: Path, part: Transition, message: str) -> None:
    with DatasetWriter(tmp_path) as writer:
        writer.append(PARTS[0])
        with pytest.raises(ContractError, match=message):
            writer.append(part)
        writer.append(PARTS[1])
    assert equal(load_dataset(tmp_path).transition, Transition.cat(PARTS[:2]))


def test_a_folder_without_a_data_set_says_so(tmp_path: Path) -> None:
    DatasetWriter(tmp_path).close()
    with pytest.raises(DataError, match=r"manifest.json cannot be used: it is missing.*Is this the folder"):
        load_dataset(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        DatasetWriter(tmp_path / "file")


def header(path: Path, size: int) -> None:
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])


FAULTS: dict[str, Callable[[Path], Any]] = {
    "flip": lambda path: flip(path, -9),
    "flip in the header": lambda path: flip(path, 20),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: path.rename(path.with_suffix("")).with_suffix(path.suffix).mkdir(),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap(path.parent / "run"))),
    "huge header": lambda path: header(path, 2**63),
    "another shard": lambda path: path.write_bytes(shard(path.parent, 0).read_bytes()),
}


SIGNED = ("truncate", "longer", "empty", "pickle", "huge header", "another shard")


@pytest.mark.parametrize(("fault", "signed"), [*((f, False) for f in FAULTS), *((f, True) for f in SIGNED)])
def test_a_bad_shard_is_named_and_the_good_ones_are_read(tmp_path: Path, fault: str, signed: bool) -> None:
    """Also with a manifest that vouches for it: a hostile data set, not a damaged one."""
    path = write(tmp_path)
    FAULTS[fault](shard(path, 1))
    if signed:
        sign(path, 1)
    with pytest.raises(
        DataError, match=r"1 bad of 3 shards; 8 of 12 transitions.*strict=False.*shard-000001"
    ):
        load_dataset(path)
    data = load_dataset(path, strict=False)
    assert equal(data.transition, Transition.cat([PARTS[0], PARTS[2]]))
    assert data.lost == 4 and len(data.problems) == 1 and data.problems[0].startswith("shard-000001")
    assert not (path / "run").exists()


def content(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())["content"]


def publish(path: Path, content: Any) -> None:
    """A manifest with a valid checksum."""
    text = json.dumps(content, sort_keys=True).encode()
    value = {"sha256": sha256(text).hexdigest(), "content": content}
    (path / "manifest.json").write_text(json.dumps(value))


def sign(path: Path, i: int) -> None:
    """Make the manifest agree with a shard."""
    data, new = shard(path, i).read_bytes(), content(path)
    new["shards"][i] |= {"sha256": sha256(data).hexdigest(), "bytes": len(data)}
    publish(path, new)


@given(st.lists(st.tuples(st.integers(0, 699), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_hostile_shard_gives_transitions_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile"
    if not path.exists():
        write(path, PARTS[0])
    original = safetensors.torch.save(PARTS[0].tensors())
    data = bytearray(original)
    for position, value in changes:
        data[position % len(data)] = value
    shard(path, 0).write_bytes(data)
    sign(path, 0)
    try:
        rows = load_dataset(path).transition
    except DataError as error:
        assert "shard-000000" in str(error)
    else:
        rows.check()
        assert rows.y.shape == (3, 2)


def test_a_shard_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    safetensors.torch.save_file({"weights": torch.zeros(3)}, shard(path, 1))
    sign(path, 1)
    with pytest.raises(DataError, match="shard-000001.safetensors: it holds no transitions"):
        load_dataset(path)


def test_with_no_good_shard_nothing_is_returned(tmp_path: Path) -> None:
    path = write(tmp_path, PARTS[0])
    flip(shard(path, 0), -1)
    with pytest.raises(DataError, match="0 of 3 transitions are good. Nothing can be read"):
        load_dataset(path, strict=False)


@pytest.mark.parametrize("position", [3, 120, 300, -20])
def test_a_changed_manifest_is_refused(tmp_path: Path, position: int) -> None:
    path = write(tmp_path)
    flip(path / "manifest.json", position)
    for strict in (True, False):
        with pytest.raises(
            DataError, match=r"manifest.*cannot be used.*The 3 shards .* one by one, unverified"
        ):
            load_dataset(path, strict)
    with pytest.raises(DataError, match="cannot be used"):
        DatasetWriter(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("ny"),
        lambda c: c.update(transitions="12"),
        lambda c: c.update(shards=[3]),
        lambda c: c["shards"][0].update(name="../shard-000000.safetensors"),
        lambda c: c["shards"][0].update(name="/etc/passwd"),
        lambda c: c["shards"][0].update(bytes=-1),
        lambda c: c["shards"][0].update(transitions=True),
        lambda c: c["metadata"].update(dt=math.inf),
        lambda c: c["metadata"].update(dt=math.nan),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path, new = write(tmp_path), content(tmp_path)
    change(new)
    publish(path, new)
    with pytest.raises(DataError, match="manifest.*cannot be used"):
        load_dataset(path)


def test_a_data_set_without_shards_holds_no_transitions(tmp_path: Path) -> None:
    with DatasetWriter(write(tmp_path)) as writer:
        writer.cut(0)
    with pytest.raises(DataError, match="holds no transitions: its manifest lists no shards"):
        load_dataset(tmp_path)


def test_without_a_manifest_there_is_nothing_to_cut(tmp_path: Path) -> None:
    (write(tmp_path) / "manifest.json").unlink()
    with DatasetWriter(tmp_path) as writer, pytest.raises(DataError, match="cannot be cut to 3 of its 0"):
        writer.cut(3)
    assert shard(tmp_path, 0).exists()


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", "{}", '{"content": 1}', "\0"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="cannot be used"):
        load_dataset(tmp_path)


def test_more_than_the_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path, new = write(tmp_path), content(tmp_path)
    new["shards"][1]["bytes"] = 2**45
    publish(path, new)
    with pytest.raises(DataError, match=r"needs about 65536.0 GiB of memory, but"):
        load_dataset(path)


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_end_at_any_moment_of_an_append_costs_that_shard_at_most(
    tmp_path: Path, error: BaseException
) -> None:
    for moment in range(100):
        path = write(tmp_path / str(moment), *PARTS[:2])
        done = False
        with DatasetWriter(path) as writer:
            try:
                with interrupted(moment, error):
                    writer.append(PARTS[2])
                done = True
            except Killed:
                pass
            except DataError as reported:
                assert "No space left" in str(reported) and "The 7 transitions before are kept" in str(
                    reported
                )
                assert not list(path.glob("*.tmp"))
        found = load_dataset(path).transition
        assert equal(found, Transition.cat(PARTS)) or (not done and equal(found, Transition.cat(PARTS[:2])))
        if done:
            assert moment == 6  # for shard and manifest each: file, name, folder
            return
        with DatasetWriter(path) as writer:
            writer.append(PARTS[0])
        assert len(load_dataset(path).transition.reward) == len(found.reward) + 3
    raise AssertionError("never finished")


def test_a_file_that_cannot_grow_costs_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = steps(2000)
    with DatasetWriter(tmp_path) as writer:
        writer.append(PARTS[0])
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
            with pytest.raises(
                DataError, match=r"File too large .*MiB free.*The 3 transitions before are kept"
            ):
                writer.append(big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.append(big)
    assert equal(load_dataset(tmp_path).transition, Transition.cat([PARTS[0], big]))
    assert {file.name for file in tmp_path.iterdir()} <= {
        "manifest.json",
        "shard-000000.safetensors",
        "shard-000001.safetensors",
        "writer.lock",
    }


def test_kills_while_writing_cost_the_unfinished_shard_at_most(tmp_path: Path) -> None:
    code = """
import torch
from mbrl.data import Transition
from mbrl.datasets import DatasetWriter, load_dataset

def shard(number):
    value = torch.full((300,), float(number))
    ends = torch.zeros(300, dtype=torch.bool)
    y = value[:, None].expand(300, 17)
    return Transition(y, y[:, :6], value, y, ends, ends, value.long())

def work(folder, told):
    writer = DatasetWriter(folder, {"dt": 0.1})
    first = len(writer._content["shards"]) if writer._content else 0
    for number in range(first, 10**9):
        writer.append(shard(number))
        told(number)

def verify(folder, last):
    rows = load_dataset(folder).transition
    shards = rows.reward.reshape(-1, 300)
    assert len(shards) in (last + 1, last + 2), (len(shards), last)
    assert (shards == torch.arange(len(shards))[:, None]).all()
    assert (rows.y == rows.reward[:, None]).all()
"""
    survive_kills(code, tmp_path)


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari wants an author, an address, a link, …
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minari_and_back(minari: Any, dtype: torch.dtype) -> None:
    episodes = Transition.cat([steps(3, 5), steps(4, first=2, terminated=False)]).to("cpu", dtype)
    mixed = episodes[
        torch.tensor([0, 3, 4, 1, 8, 5, 2, 6, 9, 10, 7, 11])
    ]  # as a vector of environments gives them
    dataset = to_minari(mixed, "mbrl/test-v0", description="a test")
    assert dataset.total_episodes == 3 and dataset.total_steps == 12
    assert equal(from_minari("mbrl/test-v0"), episodes)
    assert equal(from_minari(dataset), episodes)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_that_are_damaged_or_not_vectors_are_refused(minari: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none-v0 cannot be read"):
        from_minari("mbrl/none-v0")
    to_minari(steps(3), "mbrl/test-v0")
    (file,) = tmp_path.rglob("*.hdf5")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="test-v0 cannot be read"):
        from_minari("mbrl/test-v0")
    box = minari.create_dataset_from_buffers(
        "mbrl/discrete-v0",
        [
            minari.data_collector.EpisodeBuffer(
                observations=np.zeros((3, 2), np.float32),
                actions=np.zeros(2, np.int64),
                rewards=np.zeros(2),
                terminations=np.zeros(2, bool),
                truncations=np.zeros(2, bool),
            )
        ],
        observation_space=gymnasium.spaces.Box(-1, 1, (2,)),
        action_space=gymnasium.spaces.Discrete(2),
    )
    with pytest.raises(ContractError, match=r"needs observations \(T\+1, ny\) and actions \(T, nu\).*\(2,\)"):
        from_minari(box)


def test_without_minari_the_pip_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    for call in (lambda: from_minari("a-v0"), lambda: to_minari(steps(3), "a-v0")):
        with pytest.raises(MissingExtra, match=r'pip install "mbrl-kit\[minari\]"'):
            call()


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    write(tmp_path)
    load_dataset(tmp_path)
    assert before == (len(os.listdir("/proc/self/fd")) if before else 0)
