"""Ridge regression: exact on linear worlds, honest about noise, and plain about bad data."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mbrl import Box, ContractError, Features, Problem, check_dynamics
from mbrl.models import LinearGaussian, LinearModel
from tests.problems import DoubleIntegrator, Quadratic, box, lq_problem, riccati, seeded


def integrator(n: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(seed)
    y, u = (torch.randn(n, size, generator=g, dtype=torch.float64) for size in (2, 1))
    push = noise * torch.tensor([1.0, 3.0]) * torch.randn(n, 2, generator=g, dtype=torch.float64)
    return y, u, DoubleIntegrator().step(y, u, 0) + push


def test_a_linear_system_is_recovered() -> None:
    model, truth = LinearModel(2, 1, 0.2, ridge=0.0), DoubleIntegrator()
    model.fit(*integrator(10))
    y, u, y_next = integrator(50, seed=1)
    torch.testing.assert_close(model.step(y, u, 0), y_next, rtol=1e-12, atol=1e-12)
    fx, fu = model.linearize(y, u, 0)
    torch.testing.assert_close(fx, truth.A.expand(50, 2, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fu, truth.B.expand(50, 2, 1), rtol=1e-12, atol=1e-12)
    assert (model.std < 1e-12).all()


def test_the_optimal_actions_of_the_model_are_those_of_the_world() -> None:
    model = LinearModel(2, 1, 0.2)
    model.fit(*integrator(400, noise=0.01))
    fx, fu = model.linearize(torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), 0)

    @dataclass(frozen=True)
    class Learned(DoubleIntegrator):
        @property
        def A(self) -> Tensor:
            return fx

        @property
        def B(self) -> Tensor:
            return fu

    problem: Problem[DoubleIntegrator, Quadratic, Box] = Problem(Learned(), Quadratic(), box(1, 10.0), 6)
    x0 = torch.tensor([[1.0, -0.5], [0.2, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(riccati(problem, x0)[1], riccati(lq_problem(), x0)[1], rtol=0.02, atol=0.01)


def test_ridge_is_the_stated_minimum() -> None:
    """The gradient of Σ ‖t − W z‖² + ridge ‖W‖² is zero."""
    model = LinearModel(2, 1, 0.2, ridge=7.0)
    y, u, y_next = integrator(30, noise=0.1)
    model.fit(y, u, y_next)
    z = (torch.cat([y, u], -1) - model.input_mean) / model.input_scale
    t = (y_next - y - model.target_mean) / model.target_scale
    gradient = z.T @ (z @ model.weights - t) + 7.0 * model.weights
    assert float(gradient.abs().max()) < 1e-10


def test_noise_is_recovered_and_drawn() -> None:
    model = LinearModel(2, 1, 0.2)
    model.fit(*integrator(20_000, noise=0.1))
    torch.testing.assert_close(model.std, torch.tensor([0.1, 0.3], dtype=torch.float64), rtol=0.03, atol=0.0)
    y, u, _ = integrator(1, seed=2)
    draw = LinearGaussian(model).realize((20_000, 1), 2, generator=seeded())
    first, second = (draw.step(y, u, k)[:, 0] for k in (0, 1))
    torch.testing.assert_close(first.std(0), model.std, rtol=0.03, atol=0.0)
    torch.testing.assert_close(first.mean(0), model.step(y, u, 0)[0], rtol=0.0, atol=0.01)
    assert not torch.equal(first, second)


def test_few_data_do_not_look_free_of_noise() -> None:
    """Over many small sets the variance has no bias: it is divided by the degrees of freedom."""
    found = []
    for seed in range(300):
        model = LinearModel(2, 1, 0.2, ridge=0.0)
        model.fit(*integrator(8, noise=0.1, seed=seed))
        found.append(model.std**2)
    torch.testing.assert_close(
        torch.stack(found).mean(0), torch.tensor([0.01, 0.09], dtype=torch.float64), rtol=0.15, atol=0.0
    )


@pytest.mark.parametrize(
    "features",
    [
        Features(3),
        Features(5, hidden=(2,), angles=(0,), absolute=(2,), unit=((3, 4),)),
        Features(4, constant=(3,), hidden=(1,)),
    ],
)
def test_the_contract_of_dynamics(features: Features) -> None:
    g = seeded()
    y, y_next = (torch.randn(40, features.ny, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.randn(40, 2, generator=g, dtype=torch.float64)
    model = LinearModel(features.ny, 2, 0.1, features=features)
    model.fit(y, u, y_next)
    check_dynamics(model, y[:4], u[:4])
    check_dynamics(LinearGaussian(model), y[:4], u[:4])


def test_what_is_seen_as_sine_and_cosine_is_learned_as_such() -> None:
    g = seeded()
    y, u = 3 * torch.randn(200, 2, generator=g), torch.randn(200, 1, generator=g)
    y_next = y + torch.stack([0.1 * y[:, 1], 0.5 * y[:, 0].sin() + u[:, 0]], -1)
    model = LinearModel(2, 1, 0.1, features=Features(2, angles=(0,)), ridge=0.0)
    model.fit(y, u, y_next)
    torch.testing.assert_close(model.step(y, u, 0), y_next, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_odd_data_give_finite_models(ridge: float) -> None:
    y, u, y_next = integrator(60)
    for data in (
        (torch.full_like(y, 3.3e5), u, y_next),
        (y[:1].repeat(60, 1), u[:1].repeat(60, 1), y_next[:1].repeat(60, 1)),
        (1e12 * y, 1e-12 * u, 1e12 * y_next),
        (y[:2], u[:2], y_next[:2]),
    ):
        model = LinearModel(2, 1, 0.2, ridge=ridge)
        model.fit(*data)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert torch.isfinite(model.step(data[0], data[1], 0)).all()


def test_small_changes_of_large_numbers_are_learned_in_float64() -> None:
    y, u, _ = integrator(200)
    y = 1e3 + 1e-4 * y
    y_next = 1e3 + 0.5 * (y - 1e3)
    model = LinearModel(2, 1, 0.2)
    model.fit(y, u, y_next)
    torch.testing.assert_close(model.step(y, u, 0), y_next, rtol=0.0, atol=1e-8)


def test_bad_input_is_told_and_changes_nothing() -> None:
    y, u, y_next = integrator(20)
    model = LinearModel(2, 1, 0.2)
    model.fit(y, u, y_next)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = y.clone()
    bad[7, 1] = torch.nan
    with pytest.raises(ContractError, match="y holds NaN or inf in 1 of 20 rows, first in row 7"):
        model.fit(bad, u, y_next)
    with pytest.raises(ContractError, match=r"u of shape \(20, 1\), but got \(20, 2\)"):
        model.fit(y, y, y_next)
    with pytest.raises(ContractError, match="at least 2 transitions"):
        model.fit(y[:1], u[:1], y_next[:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ContractError, match="ridge ≥ 0"):
        LinearModel(2, 1, 0.2, ridge=-1.0)
    with pytest.raises(ContractError, match="features for 3"):
        LinearModel(2, 1, 0.2, features=Features(3))
