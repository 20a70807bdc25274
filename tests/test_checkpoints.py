"""Checkpoints: what goes in comes back exactly, and neither kill, full disk nor flipped bit costs an older one."""

from __future__ import annotations

import errno
import json
import math
import pickle
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mbrl import Checkpoints, ContractError, Replay, pack, unpack
from mbrl.errors import CheckpointError
from mbrl.storage import parse_tensors, tensor_bytes
from tests.kills import Killed, interrupted, survive_kills
from tests.test_data import steps


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, NaN included."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def state(step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return {"model/w": torch.full((4, 3), float(step))}, {"step": step}


tensors = st.sampled_from(
    [
        torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.bool),
        torch.tensor([0.1, torch.nan, -torch.inf], dtype=torch.bfloat16),
        torch.arange(5, dtype=torch.uint8),
    ]
)
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**128), 2**128), st.floats(), st.text(max_size=5), tensors
)
keys = st.one_of(st.integers(0, 3), st.sampled_from(["a", "a/b", "b", "0", "tensor", "dict", ""]))


@given(
    st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
        ),
        max_leaves=12,
    )
)
def test_any_tree_comes_back(tree: Any) -> None:
    packed, meta = pack({"tree": tree})
    loaded = parse_tensors(tensor_bytes(packed)), json.loads(json.dumps(meta, allow_nan=False))
    assert same(unpack(*loaded), {"tree": tree})


def test_training_goes_on_exactly(tmp_path: Path) -> None:
    """Module, Adam, schedule, replay and generator: ten steps after a resume equal ten without one."""

    def parts(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        with torch.no_grad():
            for weight in model.parameters():
                weight.uniform_(-1, 1, generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
        return (
            model,
            optimizer,
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            Replay(50, 2, 1),
            generator,
        )

    def train(run: tuple[Any, ...], n: int) -> None:
        model, optimizer, schedule, replay, generator = run
        for _ in range(n):
            batch = replay.sample(16, generator=generator)
            optimizer.zero_grad()
            (model(batch.y) - batch.y_next).square().mean().backward()
            optimizer.step()
            schedule.step()

    run = parts(0)
    run[3].add(steps(20, 15))
    train(run, 10)
    states = {"model": run[0], "optimizer": run[1], "schedule": run[2], "replay": run[3]}
    tree = {name: part.state_dict() for name, part in states.items()}
    Checkpoints(tmp_path).save(
        10, *pack({**tree, "generator": run[4].get_state()}), finite=("model", "optimizer")
    )
    train(run, 10)

    resumed = parts(1)
    step, *packed = Checkpoints(tmp_path).load()
    loaded = unpack(*packed)
    for part, name in zip(resumed, states, strict=False):
        part.load_state_dict(loaded[name])
    resumed[4].set_state(loaded["generator"])
    train(resumed, 10)
    assert step == 10
    for one, two in zip(run[:3], resumed[:3], strict=True):
        assert same(_dict(one.state_dict()), _dict(two.state_dict()))
    assert torch.equal(run[4].get_state(), resumed[4].get_state())


def _dict(state: Any) -> Any:
    return dict(state) if isinstance(state, OrderedDict) else state


def test_names_that_look_alike_are_kept_apart() -> None:
    tree = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4)}
    assert same(unpack(*pack(tree)), tree)


def test_tied_weights_and_views_can_be_saved(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tree = {"one": weight, "two": weight, "part": weight[:, 1:3]}
    Checkpoints(tmp_path).save(0, *pack(tree))
    assert same(unpack(*Checkpoints(tmp_path).load()[1:]), tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, np.zeros(3)]}, "a/1 is a ndarray.*torch.as_tensor"),
        ({"a": {1, 2}}, "a is a set"),
        ({"a": {(1, 2): 3}}, "keys of a must be str or int"),
        ({"a": np.int64(3)}, "a is a int64"),
    ],
)
def test_what_cannot_be_packed_is_named(tree: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        pack(tree)


@pytest.mark.parametrize(
    "meta", [{"tensor": "x"}, {"a": 1, "b": 2}, {"dict": 3}, {"float": "one"}, {"code": "1"}]
)
def test_what_pack_has_not_made_is_not_unpacked(meta: Any) -> None:
    with pytest.raises(CheckpointError, match="not made by pack"):
        unpack({}, meta)


def test_the_newest_are_kept_and_the_one_just_written_always(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 100, 20, 1):
        assert checkpoints.save(step, *state(step)) == tmp_path / f"step_{step}"
        assert step in checkpoints.steps() and len(checkpoints.steps()) <= 2
    assert checkpoints.steps() == [1, 100]
    step, loaded, meta = checkpoints.load()
    assert step == 100 and same((loaded, meta), state(100))
    assert same(checkpoints.load(1)[1:], state(1))
    assert {entry.name for entry in tmp_path.iterdir()} == {"step_1", "step_100"}


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(0, *state(0))
    assert {file.name for file in path.iterdir()} == {"tensors.safetensors", "meta.json", "SHA256SUMS"}
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True
        )


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    bad = {"model/w": torch.tensor([1.0, torch.nan]), "model_2/w": torch.tensor([torch.inf])}
    with pytest.raises(ContractError, match="model/w has 1 values that are not finite.*nothing was saved"):
        checkpoints.save(0, bad, {}, finite=("model",))
    with pytest.raises(ContractError, match="finite names 'modle'.*there are"):
        checkpoints.save(0, bad, {}, finite=("modle",))
    assert checkpoints.steps() == []
    bad["model/w"] = torch.tensor([1.0, 2.0])
    checkpoints.save(0, bad, {}, finite=("model",))  # model_2 is another one
    assert checkpoints.steps() == [0]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="keep ≥ 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ContractError, match="step ≥ 0"):
        Checkpoints(tmp_path).save(-1, {}, {})
    with pytest.raises(ContractError, match="meta must be JSON.*Use pack"):
        Checkpoints(tmp_path).save(0, {}, {"loss": float("nan")})


def test_there_may_be_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.latest_good() is None
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        checkpoints.load()
    checkpoints.save(3, *state(3))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 in .*has steps \[3\]"):
        checkpoints.load(4)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "SHA256SUMS"])
@pytest.mark.parametrize("fault", ["flip first", "flip last", "truncate", "empty", "missing", "pickle"])
def test_damage_is_found_and_the_newest_good_one_named(tmp_path: Path, file: str, fault: str) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    for step in (1, 2, 3):
        checkpoints.save(step, *state(step))
    path = tmp_path / "c" / "step_3" / file
    if fault.startswith("flip"):
        flip(path, 0 if fault == "flip first" else -2)
    elif fault == "missing":
        path.unlink()
    else:
        data = {
            "truncate": path.read_bytes()[:-3],
            "empty": b"",
            "pickle": pickle.dumps(Trap(tmp_path / "run")),
        }
        path.write_bytes(data[fault])
    with pytest.raises(
        CheckpointError,
        match=r"step_3 is damaged: .*newest good one is of step 2: load\(2\), or delete step_3",
    ):
        checkpoints.load()
    assert checkpoints.latest_good() == 2 and same(checkpoints.load(2)[1:], state(2))
    assert not (tmp_path / "run").exists()
    checkpoints.save(3, *state(3))  # a run that went on from 2 comes here again
    assert same(checkpoints.load()[1:], state(3))


def test_with_nothing_good_that_is_said(tmp_path: Path) -> None:
    (Checkpoints(tmp_path).save(1, *state(1)) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="meta.json: it is missing. No other is good"):
        Checkpoints(tmp_path).load()
    assert Checkpoints(tmp_path).latest_good() is None


def test_a_good_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *state(1))
    checkpoints.save(1, *state(1))
    with pytest.raises(CheckpointError, match="is a good checkpoint with other contents"):
        checkpoints.save(1, *state(2))
    assert same(checkpoints.load()[1:], state(1))


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_end_at_any_moment_of_a_save_costs_nothing(tmp_path: Path, error: BaseException) -> None:
    saved = 0
    for moment in range(100):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, keep=2)
        for step in (1, 2):
            checkpoints.save(step, *state(step))
        try:
            with interrupted(moment, error):
                checkpoints.save(3, *state(3))
            saved += 1
        except Killed:
            pass
        except CheckpointError as reported:
            assert "No space left" in str(reported) and "MiB free" in str(reported)
            assert not list(folder.glob(".tmp-step*"))
        newest = checkpoints.latest_good()
        assert newest in (2, 3) and same(checkpoints.load()[1:], state(newest))
        assert len(checkpoints.steps()) >= 2
        checkpoints.save(4, *state(4))
        assert checkpoints.load()[0] == 4 and len(list(folder.iterdir())) == 2
        if saved:
            assert moment == 7  # three files, two folders, two names
            return
    raise AssertionError("never finished")


def test_kills_while_saving_lose_nothing(tmp_path: Path) -> None:
    code = """
import torch
from mbrl.checkpoints import Checkpoints

def work(folder, told):
    checkpoints = Checkpoints(folder)
    first = max(checkpoints.steps(), default=0) + 1
    for step in range(first, 10**9):
        checkpoints.save(step, {"w": torch.full((50_000,), float(step))}, {"step": step})
        told(step)

def verify(folder, last):
    checkpoints = Checkpoints(folder)
    step, tensors, meta = checkpoints.load()
    assert step in (last, last + 1), (step, last)
    assert meta == {"step": step} and (tensors["w"] == step).all()
    steps = checkpoints.steps()
    assert all(checkpoints.load(old)[1]["w"][0] == old for old in steps)
    assert len(steps) >= min(3, last), steps
"""
    survive_kills(code, tmp_path)
