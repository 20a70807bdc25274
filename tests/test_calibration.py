"""Calibration: known coverage, known temperature, known growth of errors, and a real robot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mbrl import ContractError
from mbrl.features import Features
from mbrl.models import Ensemble, calibrate, horizon_error, recalibrate
from tests.problems import seeded


def knows_nothing(std: float, members: int = 1, nu: int = 1, probabilistic: bool = True) -> Ensemble:
    """Predicts no change, with this standard deviation in both of two numbers."""
    model = Ensemble(
        2, nu, 0.1, members=members, hidden=(4,), probabilistic=probabilistic, generator=seeded()
    )
    with torch.no_grad():
        for p in model.net.parameters():
            p.zero_()
        model.min_logvar.fill_(-20.0)  # the bounds are far: the variance is 1
        model.max_logvar.fill_(20.0)
        model.target_scale.fill_(std)
    return model


def walk(n: int, std: tuple[float, float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    y, u = torch.randn(n, 2, generator=g), torch.randn(n, 1, generator=g)
    return y, u, y + torch.tensor(std) * torch.randn(n, 2, generator=g)


def test_the_truth_is_calibrated() -> None:
    said = calibrate(knows_nothing(0.3), *walk(20_000, (0.3, 0.3)))
    for level, share in said.coverage.items():
        assert abs(share - level) < 0.01
    assert said.expected_error < 0.01
    torch.testing.assert_close(said.rmse, torch.tensor([0.3, 0.3]), atol=0.01, rtol=0.0)
    assert said.nll == pytest.approx(0.5 * (1 + math.log(2 * math.pi)), abs=0.02)
    assert said.aleatoric == 1.0 and said.epistemic == 0.0


def test_coverage_of_a_wrong_width_is_the_normal_distributions() -> None:
    """Deviations twice too wide: 68.27 % of the truth lies within half a predicted deviation of … the 38.3 % interval."""
    said = calibrate(knows_nothing(2.0), *walk(20_000, (1.0, 1.0)), levels=(0.382925,))
    assert said.coverage[0.382925] == pytest.approx(0.682689, abs=0.01)


def test_recalibration_finds_the_temperature_of_each_number() -> None:
    model, data = knows_nothing(1.0), walk(20_000, (0.2, 3.0))
    found = recalibrate(model, *data)
    torch.testing.assert_close(found, torch.tensor([0.2, 3.0]), rtol=0.04, atol=0.0)
    said = calibrate(model, *walk(20_000, (0.2, 3.0), seed=1))
    assert max(abs(share - level) for level, share in said.coverage.items()) < 0.01
    torch.testing.assert_close(recalibrate(model, *data), found, rtol=0.02, atol=0.0)  # it stays there
    noise = model.realize((40_000, 1), 1, generator=seeded()).step(torch.zeros(1, 2), torch.zeros(1, 1), 0)
    torch.testing.assert_close(noise[:, 0].std(0), torch.tensor([0.2, 3.0]), rtol=0.05, atol=0.0)


def test_members_that_disagree_too_much_get_honest_intervals() -> None:
    """Two members that differ by ± 1 around a mean that errs by 0.1: no temperature can tell."""
    model = knows_nothing(0.01, members=2)
    with torch.no_grad():
        model.net.biases[-1][0, 0, :2], model.net.biases[-1][1, 0, :2] = 100.0, -100.0  # in scales of 0.01
    recalibrate(model, *walk(20_000, (0.1, 0.1)))
    said = calibrate(model, *walk(20_000, (0.1, 0.1), seed=1))
    assert max(abs(share - level) for level, share in said.coverage.items()) < 0.01
    torch.testing.assert_close(model.interval_scale, torch.tensor([0.1, 0.1]), rtol=0.05, atol=0.0)
    assert said.epistemic > 0.99


def test_disagreement_ranks_errors() -> None:
    """Two members that differ by 2 y₀: where they do, errors are as large."""
    model = knows_nothing(0.01, members=2)
    with torch.no_grad():
        model.net.activation = "relu"
        model.net.weights[0][:, 0, 0] = 1.0
        model.net.weights[1][0, 0, 0], model.net.weights[1][1, 0, 0] = 100.0, -100.0
    g = seeded()
    y, u = torch.rand(2_000, 2, generator=g), torch.zeros(2_000, 1)
    y_next = y + torch.stack([y[:, 0], torch.zeros(2_000)], -1) * torch.randn(2_000, 1, generator=g)
    said = calibrate(model, y, u, y_next)
    assert said.rank > 0.4 and said.epistemic > 0.4
    shuffled = y_next - y
    assert calibrate(model, y, u, y + shuffled[torch.randperm(2_000, generator=g)]).rank < 0.1


def test_errors_grow_with_the_horizon_as_they_must() -> None:
    """The world adds u = 1 per step, the model predicts rest: the error after h steps is h, the spread 0.1 √h."""
    model = knows_nothing(0.1)
    y = torch.arange(6.0)[None, :, None].expand(400, 6, 2) + torch.randn(400, 1, 1, generator=seeded())
    found = horizon_error(model, y, torch.ones(400, 5, 1), particles=200, generator=seeded())
    scale = y.reshape(-1, 2).std(0)[0]
    steps = torch.arange(1.0, 6.0)
    torch.testing.assert_close(found.error, steps / scale, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(found.spread, 0.1 * steps.sqrt() / scale, rtol=0.05, atol=0.0)


def test_a_model_that_claims_nothing_is_refused() -> None:
    model = knows_nothing(1.0, probabilistic=False)
    with pytest.raises(ContractError, match="deterministic and has a single member"):
        calibrate(model, *walk(10, (1.0, 1.0)))


def test_what_is_certain_and_right_is_no_division_by_zero() -> None:
    """A number that never varied, and members without noise that agree on half of the rows."""
    model = knows_nothing(1.0, members=2, probabilistic=False)
    with torch.no_grad():
        model.target_scale[1] = 0.0
        model.net.activation = "relu"
        model.net.weights[0][:, 0, 0] = 1.0
        model.net.weights[1][0, 0, 0], model.net.weights[1][1, 0, 0] = 0.5, -0.5  # ± y₀ / 2 where y₀ > 0
    y, u, _ = walk(4_000, (1.0, 1.0))
    noise = y[:, 0].clamp(min=0.0) * torch.randn(4_000, generator=seeded()) / 2
    y_next = y + torch.stack([noise, torch.zeros(4_000)], -1)
    said = calibrate(model, y, u, y_next)
    assert said.epistemic == 1.0 and said.aleatoric == 0.0 and math.isfinite(said.nll)
    assert said.coverage[0.5] == pytest.approx(0.5 + 0.5 / 2, abs=0.02)  # the other half is exact
    assert said.coverage_each[:, 1].tolist() == [1.0] * 3
    recalibrate(model, y, u, y_next)
    assert model.temperature.tolist() == [1.0, 1.0]  # which has nothing to scale


def test_errors_of_what_never_varies_are_not_divided_by_nothing() -> None:
    y = torch.randn(50, 6, 2, generator=seeded())
    y[..., 1] = 7.0
    found = horizon_error(knows_nothing(1.0), y, torch.zeros(50, 5, 1), generator=seeded())
    assert float(found.error.max()) < 2 and float(found.spread.max()) < 10


def test_features_are_respected() -> None:
    """Errors are those of what the model predicts, not of what it carries over."""
    model = Ensemble(
        3, 1, 0.1, features=Features(3, constant=(1,)), members=2, hidden=(4,), generator=seeded()
    )
    y = torch.randn(50, 3, generator=seeded())
    said = calibrate(model, y, torch.zeros(50, 1), y + 1)
    assert said.rmse.shape == (2,) and said.coverage_each.shape == (3, 2)
