"""Ensembles on disk: what was saved comes back, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mbrl import CheckpointError, Checkpoints, ContractError, Features, pack, unpack
from mbrl.models import Ensemble, TSInf, load_ensemble, save_ensemble
from tests.problems import seeded

FEATURES = Features(6, hidden=(0,), angles=(1,), constant=(5,), unit=((2, 3), (4,)))


def ensemble(**options: Any) -> Ensemble:
    model = Ensemble(6, 2, 0.05, features=FEATURES, members=3, hidden=(8, 4), **options, generator=seeded())
    y, u = (torch.randn(20, n, generator=seeded(n)) for n in (6, 2))
    model.normalise(y, u, y + 1, y[:, 0])
    model.elites = torch.tensor([2, 0])
    model.temperature.fill_(1.7)
    return model


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"probabilistic": False, "activation": "relu"}, {"reward": True, "termination": True}],
)
def test_what_was_saved_comes_back(options: Any, double: bool, tmp_path: Path) -> None:
    model = ensemble(**options)
    model = model.double() if double else model
    save_ensemble(tmp_path / "model", model)
    loaded = load_ensemble(tmp_path / "model")
    assert loaded.features == FEATURES and loaded.dt == 0.05 and repr(loaded) == repr(model)
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]) and value.dtype == state[name].dtype
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    y, u = (torch.randn(4, n, generator=seeded(n)) for n in (6, 2))
    steps = [TSInf(m).realize((4, 1), 1, generator=seeded()).step(y, u, 0) for m in (model, loaded)]
    assert torch.equal(*steps)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = ensemble()
    with torch.no_grad():
        model.net.weights[1][2, 0, 0] = torch.nan
    with pytest.raises(ContractError, match=r"model/net.weights.1 has 1 values that are not finite"):
        save_ensemble(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


def test_another_ensemble_is_not_overwritten(tmp_path: Path) -> None:
    model = ensemble()
    save_ensemble(tmp_path, model)
    save_ensemble(tmp_path, model)  # the same may be saved again
    model.temperature.fill_(1.0)
    with pytest.raises(CheckpointError, match="is not overwritten"):
        save_ensemble(tmp_path, model)


def changed(what: str, tree: Any) -> Any:
    """A checkpoint with good checksums that lies."""
    architecture, model = tree["architecture"], tree["model"]
    match what:
        case "kind":
            tree["kind"] = "another"
        case "no tree":
            return [1, 2]
        case "no architecture":
            del tree["architecture"]
        case "wider":
            architecture["hidden"] = (8, 5)
        case "huge":
            architecture["hidden"] = (10**6, 10**6)
        case "words":
            architecture["members"] = "three"
        case "unknown field":
            architecture["color"] = "red"
        case "activation":
            architecture["activation"] = "sulu"
        case "features":
            architecture["features"]["hidden"] = (17,)
        case "huge features":
            architecture["ny"] = architecture["features"]["ny"] = 10**10
        case "missing weight":
            del model["net.biases.0"]
        case "nan":
            model["net.biases.0"][0] = torch.nan
        case "integers":
            model["net.biases.0"] = model["net.biases.0"].long()
        case "dtypes":
            model["input_mean"] = model["input_mean"].double()
        case "elites":
            model["elites"] = torch.tensor([3])
        case "no elites":
            model["elites"] = model["elites"][:0]
        case "elites twice":
            model["elites"] = torch.tensor([1, 1])
    return tree


@pytest.mark.parametrize(
    ("what", "answer"),
    [
        ("kind", "another kind"),
        ("no tree", "another kind"),
        ("no architecture", "architecture"),
        ("wider", "size mismatch"),
        ("huge", "size mismatch"),
        ("words", "no ensemble that can be used"),
        ("unknown field", "color"),
        ("activation", "Did you mean silu"),
        ("features", "indices below 6"),
        ("huge features", "inputs, but has"),
        ("missing weight", "net.biases.0"),
        ("nan", "not finite"),
        ("integers", "no ensemble that can be used"),
        ("dtypes", "several dtypes"),
        ("elites", r"elites are \[3\] of 3 members"),
        ("no elites", r"elites are \[\]"),
        ("elites twice", r"elites are \[1, 1\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(what: str, answer: str, tmp_path: Path) -> None:
    save_ensemble(tmp_path / "good", ensemble())
    _, tensors, meta = Checkpoints(tmp_path / "good").load()
    Checkpoints(tmp_path / "bad").save(0, *pack(changed(what, unpack(tensors, meta))))
    with pytest.raises(CheckpointError, match=answer):
        load_ensemble(tmp_path / "bad")


def test_damage_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_ensemble(tmp_path)
    file = save_ensemble(tmp_path, ensemble()) / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_ensemble(tmp_path)
