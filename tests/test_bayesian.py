"""Bayesian networks: the ELBO and its gradient, what is known where, and rollouts through drawn networks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import ContractError, Features, check_dynamics
from mbrl.models import BayesianConfig, BayesianModel, BayesianTrainer, calibrate
from tests.problems import seeded


def bayesian(**options: Any) -> BayesianModel:
    model = BayesianModel(
        **{"ny": 2, "nu": 1, "dt": 0.1, "hidden": (6,), "prior": 0.7, "generator": seeded(), **options}
    )
    with torch.no_grad():  # deviations that differ
        for i, rho in enumerate((*model.weight_rho, *model.bias_rho)):
            rho.uniform_(-3, 0, generator=seeded(i))
        for bias in model.center.net.biases:
            bias.normal_(generator=seeded(9))
    return model.double()


def noisy(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """y' = y + sin 3y + u + noise of standard deviation 0.1, |y| ≤ 1."""
    g = seeded(seed)
    y, u = (2 * torch.rand(n, 1, generator=g) - 1 for _ in range(2))
    return y, u, y + torch.sin(3 * y) + u + 0.1 * torch.randn(n, 1, generator=g)


def fitted(n: int, epochs: int) -> BayesianModel:
    model = BayesianModel(1, 1, 0.1, hidden=(32,), generator=seeded())
    config = BayesianConfig(epochs=epochs, learning_rate=0.01)
    BayesianTrainer(model, config).fit(*noisy(n), generator=seeded())
    return model


@torch.no_grad()
def test_kl_is_that_of_samples() -> None:
    """KL = E[log q(w) − log p(w)] over w ~ q."""
    model, expected = bayesian(), 0.0
    for mean, std, s in model.posterior():
        e = torch.randn(20_000, *mean.shape, generator=seeded(1), dtype=mean.dtype)
        w = mean + std * e
        expected += float((-(e**2) / 2 - std.log() + w**2 / (2 * s**2) + math.log(s)).mean(0).sum())
    assert float(model.kl()) == pytest.approx(expected, rel=5e-3)


@torch.no_grad()
def test_kl_is_zero_at_the_prior() -> None:
    model = bayesian()
    with torch.no_grad():
        for mean, _, _ in model.posterior():
            mean.zero_()
        for rho, w in zip(model.weight_rho, model.center.net.weights, strict=True):
            rho.fill_(math.log(math.expm1(0.7 / math.sqrt(w.shape[1]))))
        for rho in model.bias_rho:
            rho.fill_(math.log(math.expm1(0.7)))
    assert float(model.kl()) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    model = bayesian()
    z, t = (torch.randn(5, n, generator=seeded(n), dtype=torch.float64) for n in (3, 2))

    def loss() -> Tensor:
        return model.loss(z, t, 50, generator=seeded(4))

    learned = [p for p in model.parameters() if p.requires_grad]
    for p, gradient in zip(learned, torch.autograd.grad(loss(), learned), strict=True):
        flat = p.detach().view(-1)
        for i in range(0, len(flat), 5):
            value, ends = float(flat[i]), []
            for step in (1e-6, -1e-6):
                flat[i] = value + step
                ends.append(float(loss().detach()))
            flat[i] = value
            assert float(gradient.flatten()[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


def test_drawing_sums_is_drawing_weights() -> None:
    """Local reparameterisation: a row's outputs have the same distribution as those of drawn networks."""
    model = bayesian()
    z = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    by_sums = model.outputs(z.expand(40_000, -1), generator=seeded(1)).detach()
    by_weights = model.draw(40_000, generator=seeded(2)).net(z)[:, 0]
    torch.testing.assert_close(by_sums.mean(0), by_weights.mean(0), rtol=0.0, atol=0.05)
    torch.testing.assert_close(by_sums.std(0), by_weights.std(0), rtol=0.02, atol=0.0)


def test_without_hidden_layers_it_finds_the_exact_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    """t = w z + b + ε with known σ: the mean-field posterior has precision 1/s² + Σ z² / σ², the exact mean."""
    model = BayesianModel(1, 1, 0.1, hidden=(), prior=0.3, generator=seeded()).double()
    z = torch.randn(40, 2, generator=seeded(), dtype=torch.float64)
    z = z - z.mean(0)  # the bias is independent then
    t = z @ torch.tensor([[0.8], [-0.5]], dtype=torch.float64)
    known = lambda out: (out[..., :1], torch.zeros_like(out[..., :1]), None)
    monkeypatch.setattr(model.center, "heads", known)  # σ = 1, whatever the network says
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    g = seeded(1)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 800)
        optimizer.zero_grad()
        torch.autograd.backward(model.loss(z, t, 40, generator=g))
        optimizer.step()
    (mean, std, s), _ = model.posterior()
    eye = torch.eye(2, dtype=torch.float64)
    exact = torch.linalg.solve(z.T @ z + eye / s**2, z.T @ t)
    torch.testing.assert_close(mean[0, :, :1].detach(), exact, rtol=0.0, atol=0.03)
    precision = z.pow(2).sum(0) + 1 / s**2
    torch.testing.assert_close(std[0, :, 0].detach(), precision.rsqrt(), rtol=0.08, atol=0.0)


def test_ignorance_grows_away_from_data_and_shrinks_with_data() -> None:
    few, many = fitted(40, 400), fitted(2_000, 25)
    inside, outside = torch.linspace(-0.9, 0.9, 7)[:, None], torch.tensor([[-6.0], [6.0]])
    spread = [
        [
            float(m.draw(100, generator=seeded()).predict(y, torch.zeros_like(y)).epistemic().sqrt().mean())
            for y in (inside, outside)
        ]
        for m in (few, many)
    ]
    assert spread[1][1] > 5 * spread[1][0] and spread[0][1] > 2 * spread[0][0]
    assert spread[0][0] > 2 * spread[1][0]
    said = many.draw(50, generator=seeded()).predict(inside, torch.zeros_like(inside))
    torch.testing.assert_close(said.y_next.mean(0), inside + torch.sin(3 * inside), atol=0.1, rtol=0.0)
    assert float(said.aleatoric().sqrt().mean()) == pytest.approx(0.1, rel=0.3)
    found = calibrate(many.draw(50, generator=seeded()), *noisy(1_000, seed=1))
    assert found.coverage[0.95] > 0.93  # mean-field posteriors leave the noise a little too wide


@pytest.mark.parametrize("features", [Features(2), Features(3, angles=(0,), hidden=(1,), constant=(2,))])
def test_the_contract_of_dynamics(features: Features) -> None:
    model = bayesian(ny=features.ny, features=features)
    g = seeded()
    x, u = (torch.randn(4, n, generator=g, dtype=torch.float64) for n in (features.ny, 1))
    check_dynamics(model, x, u)


def test_each_particle_has_a_network_of_its_own_up_to_a_limit() -> None:
    model = bayesian(networks=8)
    x, u = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    model.center.temperature.zero_()  # no noise: only networks differ
    for particles, networks in ((5, 5), (20, 8)):
        draw = model.realize((particles, 1, 1), 3, generator=seeded())
        for k in (0, 2):  # the same in every step
            assert len(set(draw.step(x, u, k)[:, 0, 0, 0].tolist())) == networks
        torch.testing.assert_close(draw.step(x, u, 0), draw.step(x, u, 2))


def test_fits_are_repeatable_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (fitted(50, 3).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_fit_that_diverges_keeps_the_last_good_weights() -> None:
    model = BayesianModel(1, 1, 0.1, hidden=(8,), generator=seeded())
    trainer = BayesianTrainer(model, BayesianConfig(epochs=3))
    trainer.fit(*noisy(100), generator=seeded())
    before = copy.deepcopy(model.state_dict())
    trainer.optimizer.param_groups[0]["lr"] = 1e38
    y, u, y_next = noisy(100)
    fit = trainer.fit(100 * y + 5, u, 100 * y_next, generator=seeded())  # of other scales
    assert "diverged in epoch 0" in fit.stopped and fit.best == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "all 3" in trainer.fit(*noisy(100), generator=seeded()).stopped  # and the optimiser recovers


def test_bad_input_is_told() -> None:
    with pytest.raises(ContractError, match="prior > 0"):
        bayesian(prior=0.0)
    y, u, y_next = noisy(20)
    y[3] = torch.inf
    with pytest.raises(ContractError, match="y holds NaN or inf in 1 of 20 rows"):
        BayesianTrainer(bayesian(ny=1)).fit(y, u, y_next, generator=seeded())
