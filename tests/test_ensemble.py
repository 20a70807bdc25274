"""Ensembles: networks, heads, propagation, training, and what bad data does to them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import (
    Autodiff,
    Box,
    ContractError,
    Observed,
    Padded,
    Problem,
    check_dynamics,
    check_planner,
    evaluate,
    realize,
)
from mbrl.features import Features
from mbrl.models import (
    TS1,
    DisagreementCost,
    Ensemble,
    EnsembleMLP,
    FitConfig,
    MeanDynamics,
    MomentMatching,
    Thompson,
    Trainer,
    TSInf,
    WithDisagreement,
)
from mbrl.models.propagation import Draw
from mbrl.models.training import losses
from mbrl.planners import CEM
from tests.problems import seeded

SMALL: dict[str, Any] = {"members": 4, "hidden": (16, 16)}


FEATURES = {
    "all": Features(3),
    "angle, force and direction": Features(5, hidden=(2,), angles=(0,), absolute=(2,), unit=((3, 4),)),
    "goal": Features(4, constant=(3,), hidden=(1,)),
}
each_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=list(FEATURES))


def ensemble(features: Features = FEATURES["all"], nu: int = 2, **options: Any) -> Ensemble:
    model = Ensemble(features.ny, nu, 0.1, features=features, **{**SMALL, **options}, generator=seeded())
    with torch.no_grad():  # normalisers and bounds that do something
        for buffer in (model.input_mean, model.target_mean):
            buffer.uniform_(-1, 1, generator=seeded(1))
        for buffer in (model.input_scale, model.target_scale, model.temperature):
            buffer.uniform_(0.5, 2, generator=seeded(2))
        model.min_logvar.fill_(-3.0)
    return model


def batch(
    n: int, ny: int = 3, nu: int = 2, seed: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    return torch.randn(n, ny, generator=g, dtype=dtype), torch.randn(n, nu, generator=g, dtype=dtype)


def noisy(n: int, seed: int = 0, far: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """y' = y + sin 3y + u + noise of standard deviation 0.05 + 0.2 |y|, |y| ≤ far."""
    g = seeded(seed)
    y, u = far * (2 * torch.rand(n, 1, generator=g) - 1), 2 * torch.rand(n, 1, generator=g) - 1
    return y, u, y + torch.sin(3 * y) + u + (0.05 + 0.2 * y.abs()) * torch.randn(n, 1, generator=g)


def fitted(n: int = 2_000, epochs: int = 40, **config: Any) -> Ensemble:
    model = Ensemble(1, 1, 0.1, members=5, hidden=(32, 32), generator=seeded())
    Trainer(model, FitConfig(epochs=epochs, batch=64, **config)).fit(*noisy(n), generator=seeded())
    return model


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
def test_networks_answer_one_by_one_and_know_their_derivative(activation: Any, hidden: Any) -> None:
    net = EnsembleMLP(3, 4, members=2, hidden=hidden, activation=activation, generator=seeded()).double()
    z = torch.randn(2, 6, 3, generator=seeded(1), dtype=torch.float64)
    act = {"silu": torch.nn.functional.silu, "relu": torch.relu, "tanh": torch.tanh}[activation]
    out, J = net.value_and_jacobian(z)
    for e in range(2):
        h = z[e]
        for i, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
            h = h @ w[e] + b[e]
            h = act(h) if i < len(hidden) else h
        torch.testing.assert_close(net(z)[e], h)
    torch.testing.assert_close(out, net(z))
    for i in range(3):
        d = torch.zeros(3, dtype=torch.float64)
        d[i] = 1e-6
        torch.testing.assert_close(J[..., i], (net(z + d) - net(z - d)) / 2e-6, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net(z[0]), net(z[:1].expand(2, -1, -1)))
    torch.testing.assert_close(net.value_and_jacobian(z, 2), (out, J[:, :, :2]))


@each_feature
@pytest.mark.parametrize("way", [TS1, TSInf, Thompson, MeanDynamics, lambda m: m])
def test_the_contract_of_dynamics(way: Any, features: Features) -> None:
    model = ensemble(features).double()
    check_dynamics(way(model), *batch(4, features.ny, dtype=torch.float64))


@each_feature
def test_every_member_has_its_derivative(features: Features) -> None:
    model = ensemble(features).double()
    model.elites = torch.tensor([0, 2])
    y, u = batch(5, features.ny, dtype=torch.float64)
    fy, fu = model.linearize(y, u)
    for J, size, vary in ((fy, features.ny, 0), (fu, 2, 1)):
        assert J.shape == (2, 5, features.ny, size)
        for i in range(size):
            d = torch.zeros(size, dtype=torch.float64)
            d[i] = 1e-6
            up, down = ((y + s * d, u) if vary == 0 else (y, u + s * d) for s in (1, -1))
            numeric = (model.predict(*up).y_next - model.predict(*down).y_next) / 2e-6
            torch.testing.assert_close(J[..., i], numeric, rtol=1e-6, atol=1e-7)


@each_feature
def test_the_mean_has_the_derivatives_of_autodiff(features: Features) -> None:
    dynamics = MeanDynamics(ensemble(features).double())
    y, u = batch(5, features.ny, dtype=torch.float64)
    for closed, automatic in zip(
        dynamics.linearize(y, u, 0), Autodiff(dynamics).linearize(y, u, 0), strict=True
    ):
        torch.testing.assert_close(closed, automatic, rtol=1e-10, atol=1e-12)


@each_feature
def test_a_draw_is_a_member_plus_its_noise(features: Features) -> None:
    """Weights folded for planning, and the variance without softplus, say what `predict` says."""
    model = ensemble(features, reward=True)
    y, u = batch(6, features.ny)
    said = model.predict(y, u)
    members = torch.tensor([3, 1, 0])[None, :, None]  # (1, P, 1)
    noise = torch.randn(2, 3, 1, model.np, generator=seeded(3))
    draw = Draw(TSInf(model), members, noise)
    for k in (0, 1):
        for p, e in enumerate((3, 1, 0)):
            change = said.change[e] + said.variance[e].sqrt() * noise[k, p]
            expected = features.advance(y, change)
            torch.testing.assert_close(draw.step(y, u, k)[p], expected, rtol=1e-5, atol=1e-5)


def test_uncertainty_adds_up() -> None:
    """Aleatoric plus epistemic is the variance of the mixture: law of total variance."""
    model = ensemble()
    y, u = batch(1)
    said = model.predict(y, u)
    draw = TSInf(model).realize((40_000, 1, 1), 1, generator=seeded())
    sampled = draw.step(y[:, None], u[:, None], 0).reshape(-1, 3).var(0)
    torch.testing.assert_close(sampled, (said.aleatoric() + said.epistemic())[0], rtol=0.05, atol=0.0)


def test_shares_are_balanced_and_change_only_in_ts1() -> None:
    model = ensemble()
    one = TS1(model).realize((8, 1, 1), 5, generator=seeded())._members
    inf = TSInf(model).realize((8, 1, 1), 5, generator=seeded())._members
    assert one.shape == (5, 8, 1, 1) and inf.shape == (1, 8, 1, 1)
    for members in (*one, *inf):
        assert members.flatten().bincount(minlength=4).tolist() == [2, 2, 2, 2]
    assert any(not torch.equal(one[0], members) for members in one)
    alone = [int(TSInf(model).realize((1, 1), 1, generator=seeded(s))._members) for s in range(40)]
    assert set(alone) == {0, 1, 2, 3}  # one particle is not always the first network's


def test_thompson_keeps_one_member_over_plans_and_steps() -> None:
    model = ensemble(probabilistic=False)
    model.elites = torch.tensor([1, 3])
    y, u = batch(6)
    drawn = {Thompson.draw(model, generator=seeded(s)).member for s in range(20)}
    assert drawn == {1, 3}
    way = Thompson(model, member=3)
    for seed in range(2):
        step = way.realize((2, 1, 1), 4, generator=seeded(seed)).step
        torch.testing.assert_close(step(y[None], u[None], 2)[0, 0], model.predict(y, u).y_next[1])


def test_moment_matching_keeps_mean_and_variance() -> None:
    model = ensemble()
    y, u = batch(2)
    P = 20_000
    matched = MomentMatching(model).realize((P, 1, 1), 1, generator=seeded())
    plain = TS1(model).realize((P, 1, 1), 1, generator=seeded())
    a, b = (d.step(y[:, None], u[:, None], 0) for d in (matched, plain))
    torch.testing.assert_close(a.mean(0), b.mean(0), atol=0.05, rtol=0.0)
    torch.testing.assert_close(a.std(0), b.std(0), atol=0.0, rtol=0.05)
    assert not torch.equal(a, b)
    with pytest.raises(ContractError, match="P ≥ 2"):
        MomentMatching(model).realize((1, 1), 1, generator=seeded())


def test_moments_are_those_of_the_particles_that_are_left() -> None:
    """Of twenty, eight are over: the others are matched as if they were alone, and the eight stay as they are."""
    model = ensemble()
    y, u = batch(2)
    matched = MomentMatching(model).realize((20, 1, 1), 1, generator=seeded())
    x = y.expand(20, 1, 2, 3).clone()
    x[:8, :, 0] = torch.nan
    plain = Draw(TS1(model), matched._members, matched._noise)
    got, left = matched.step(x, u, 0)[:, 0], plain.step(x, u, 0)[8:, 0, 0]
    assert torch.isnan(got[:8, 0]).all()
    torch.testing.assert_close(got[8:, 0], left.mean(0) + left.std(0) * matched._again[0, 8:, 0, 0])
    torch.testing.assert_close(got[:, 1], matched.step(y.expand(20, 1, 2, 3), u, 0)[:, 0, 1])
    x[:19] = torch.nan  # one alone keeps its place
    torch.testing.assert_close(matched.step(x, u, 0)[19], plain.step(x, u, 0)[19])


@torch.no_grad()  # as planners score: rows that ended are then retired
def test_moments_are_matched_until_the_last_particle_ended() -> None:
    model = ensemble(Features(2), nu=1)
    limits = Box(torch.tensor([-1.0]), torch.tensor([1.0]))
    problem = Problem(
        MomentMatching(model), Quadratic(), limits, 6, particles=20, terminated=lambda y: y[..., 0] > 0.5
    )
    dynamics, particles = realize(problem, generator=seeded())
    x0, u = torch.zeros(1, 2), torch.rand(1, 8, 6, 1, generator=seeded())
    found = evaluate(problem, dynamics, x0, u, particles=particles)
    assert torch.isfinite(found.cost).all() and not found.diverged.any()


def test_moments_keep_unit_vectors() -> None:
    model = ensemble(FEATURES["angle, force and direction"])
    y, u = batch(2, 5)
    y_next = MomentMatching(model).realize((20, 1, 1), 1, generator=seeded()).step(y, u, 0)
    torch.testing.assert_close(y_next[..., 3:].norm(dim=-1), torch.ones(20, 1, 2))


@pytest.mark.parametrize("way", [TS1, MomentMatching])
def test_derivatives_of_a_draw_are_by_state_and_action_only(way: Any) -> None:
    model = ensemble()
    draw = way(model).realize((4, 1, 1), 2, generator=seeded())
    y, u = batch(2)
    for _ in range(2):  # as a planner by gradients does
        at = u.clone().requires_grad_()
        torch.autograd.backward(draw.step(y, at, 0).sum())
        assert at.grad is not None and at.grad.all()
    assert all(p.grad is None for p in model.parameters())
    assert not draw.step(y, u, 0).requires_grad


@pytest.mark.parametrize("k", [torch.tensor([0, 1]), torch.zeros(0)])
def test_a_draw_is_at_one_step(k: Tensor) -> None:
    draw = TS1(ensemble()).realize((4, 1, 1), 2, generator=seeded())
    y, u = batch(2)
    torch.testing.assert_close(draw.step(y, u, torch.tensor([1])), draw.step(y, u, 1))
    with pytest.raises(ContractError, match=f"one k for all rows, but got {len(k)}"):
        draw.step(y, u, k)


@pytest.mark.parametrize("member", [-1, 4])
def test_thompson_follows_a_member_that_there_is(member: int) -> None:
    with pytest.raises(ContractError, match=f"4 members, counted from 0, but got {member}"):
        Thompson(ensemble(), member=member)


def test_candidates_share_random_numbers() -> None:
    model = ensemble(Features(2), nu=1)
    problem = Problem(
        model, Quadratic(), Box(torch.tensor([-1.0]), torch.tensor([1.0])), horizon=3, particles=8
    )
    dynamics, particles = realize(problem, generator=seeded())
    u = torch.rand(1, 1, 3, 1, generator=seeded()).expand(2, 5, 3, 1)
    x0 = torch.randn(1, 2, generator=seeded()).expand(2, 2)
    cost = evaluate(problem, dynamics, x0, u, particles=particles).cost
    torch.testing.assert_close(cost, cost[:1, :1].expand(2, 5))


class Quadratic:
    def stage(self, y: Tensor, u: Tensor, y_next: Tensor, k: int, p: Tensor | None) -> Tensor:
        return (y_next**2).sum(-1) + (u**2).sum(-1)

    def terminal(self, y: Tensor, p: Tensor | None) -> Tensor:
        return torch.zeros_like(y[..., 0])


def test_disagreement_is_told_paid_for_and_stopped_at() -> None:
    model = ensemble(Features(2), nu=1)
    y, u = batch(6, 2, 1)
    way = WithDisagreement(TSInf(model))
    check_dynamics(WithDisagreement(TSInf(ensemble(Features(2), nu=1).double())), pad(y).double(), u.double())
    said = model.predict(y, u).change / model.target_scale
    expected = said.var(0, correction=0).mean(-1).sqrt()
    told = way.realize((3, 1), 1, generator=seeded()).step(pad(y), u, 0)
    torch.testing.assert_close(told[..., -1], expected.expand(3, 6))
    plain = TSInf(model).realize((3, 1), 1, generator=seeded()).step(y, u, 0)
    torch.testing.assert_close(told[..., :-1], plain)

    paid = DisagreementCost(Quadratic(), -2.0).stage(pad(y), u, told[0], 0, None)
    torch.testing.assert_close(paid, Quadratic().stage(y, u, plain[0], 0, None) - 2.0 * expected)

    limit = float(expected.detach().sort().values[2])  # three rows are above
    stopped = WithDisagreement(TSInf(model), limit).realize((3, 1), 1, generator=seeded()).step(pad(y), u, 0)
    assert torch.equal(torch.isnan(stopped).all(-1), (expected > limit).expand(3, 6))
    with pytest.raises(ContractError, match="at least 2 members"):
        WithDisagreement(TSInf(ensemble(members=1)))


def pad(y: Tensor) -> Tensor:
    """The state that an estimator of y makes for WithDisagreement."""
    return Padded(Observed(y.dtype))(y, None, None)


def test_planners_run_on_an_ensemble() -> None:
    model = ensemble(Features(2), nu=1)
    problem = Problem(
        TSInf(model), Quadratic(), Box(torch.tensor([-1.0]), torch.tensor([1.0])), horizon=4, particles=4
    )
    check_planner(CEM(population=16, iterations=2, elites=4), problem, torch.randn(2, 2, generator=seeded()))


def test_recovers_noise_that_depends_on_the_state() -> None:
    model = fitted()
    y = torch.tensor([[-0.8], [-0.4], [0.4], [0.8]])
    said = model.predict(y, torch.zeros(4, 1))
    truth = 0.05 + 0.2 * y.abs()
    assert ((said.aleatoric().sqrt() / truth - 1).abs() < 0.25).all()
    torch.testing.assert_close(said.y_next.mean(0), y + torch.sin(3 * y), atol=0.08, rtol=0.0)


def test_ignorance_grows_away_from_data_and_shrinks_with_data() -> None:
    few, many = fitted(60, epochs=150, holdout=0.0), fitted(4_000, holdout=0.0)
    inside, outside = torch.linspace(-0.9, 0.9, 7)[:, None], torch.tensor([[-4.0], [4.0]])
    spread = [
        [
            float(m.predict(y, torch.zeros_like(y)).epistemic().detach().sqrt().mean())
            for y in (inside, outside)
        ]
        for m in (few, many)
    ]
    assert spread[1][1] > 5 * spread[1][0]
    assert spread[0][0] > 2 * spread[1][0]


def test_members_keep_their_own_data_for_the_whole_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    trainer = Trainer(model, FitConfig(epochs=3, batch=16, holdout=0.0))
    step, seen = trainer._step, list[Tensor]()

    def spy(z: Tensor, t: Tensor, ends: Tensor | None) -> Tensor:
        seen.append(z)
        return step(z, t, ends)

    monkeypatch.setattr(trainer, "_step", spy)
    y, u, y_next = noisy(32)
    trainer.fit(y, u, y_next, generator=seeded())
    epochs = [torch.cat(seen[i : i + 2], 1)[..., 0].sort(-1).values for i in (0, 2, 4)]
    assert torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    assert not torch.equal(seen[0], seen[2])  # but in another order
    assert not torch.equal(epochs[0][0], epochs[0][1])  # and not the other members'
    assert len(set(epochs[0][0].tolist())) < 32  # drawn with replacement


def test_each_member_keeps_its_best_weights() -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    config = FitConfig(epochs=30, batch=32, learning_rate=0.03, elites=2)  # a rough ride
    y, u, y_next = noisy(400)
    trainer = Trainer(model, config)
    fit = trainer.fit(y, u, y_next, generator=seeded())
    lowest = [min(e.holdout[m] for e in fit.epochs if e.improved[m]) for m in range(4)]
    assert fit.best == lowest
    assert fit.elites == sorted(sorted(range(4), key=lambda m: lowest[m])[:2]) == model.elites.tolist()
    order = torch.randperm(400, generator=seeded())[:80]
    again = trainer._errors(model.inputs(y, u)[order], model.targets(y, y_next)[order])
    torch.testing.assert_close(again, torch.tensor(fit.best))


def test_learns_reward_and_termination() -> None:
    g = seeded()
    y, u = torch.randn(3_000, 2, generator=g), torch.randn(3_000, 1, generator=g)
    y_next = y + 0.1 * u
    reward, ends = y[:, 0] * 3 + 7, y_next[:, 1] > 0.5
    model = Ensemble(2, 1, 0.1, members=2, hidden=(32, 32), reward=True, termination=True, generator=g)
    Trainer(model, FitConfig(epochs=40)).fit(y, u, y_next, reward, ends, generator=g)
    said = model.predict(y[:500], u[:500])
    assert said.reward is not None and said.end is not None
    torch.testing.assert_close(said.reward.mean(0), reward[:500], atol=0.5, rtol=0.05)
    clear = (y_next[:500, 1] - 0.5).abs() > 0.15
    assert ((said.end.mean(0) > 0.5) == ends[:500])[clear].float().mean() > 0.98
    with pytest.raises(ContractError, match="learns the reward"):
        Trainer(model).fit(y, u, y_next, generator=g)


def test_mixed_precision_learns_as_well() -> None:
    exact, mixed = fitted(), fitted(mixed=True)
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    y = torch.linspace(-0.9, 0.9, 50)[:, None]
    errors = [
        float((m.predict(y, torch.zeros_like(y)).y_next.mean(0) - y - torch.sin(3 * y)).detach().abs().mean())
        for m in (exact, mixed)
    ]
    assert errors[1] < 1.3 * errors[0] + 0.01
    z, t = torch.randn(5, 30, 2, generator=seeded()), torch.randn(5, 30, 1, generator=seeded(1))
    apart = (losses(exact, z, t, mixed=True) - losses(exact, z, t)).abs() / losses(exact, z, t).abs()
    assert (apart > 0).all() and (apart < 0.1).all()


def test_the_best_weights_are_also_those_that_tell_the_end() -> None:
    g = seeded()
    y, u = torch.randn(200, 1, generator=g), torch.randn(200, 1, generator=g)
    model = Ensemble(1, 1, 0.1, **SMALL, termination=True, generator=g)
    trainer, ends = Trainer(model), (y[:, 0] > 0).float()
    z, t = model.inputs(y, u), model.targets(y, y)
    before = trainer._errors(z, t, ends)
    with torch.no_grad():
        model.net.biases[-1][..., -1] += 50.0  # sure that everything ends
    assert (trainer._errors(z, t, ends) > before + 0.1).all()


def test_easy_targets_leave_the_others_their_share() -> None:
    """With the likelihood alone a target without noise takes all of the gradient; see FitConfig.beta."""
    g = seeded()
    y, u = 4 * torch.rand(2_000, 2, generator=g) - 2, 2 * torch.rand(2_000, 1, generator=g) - 1
    y_next = torch.stack([y[:, 0] + 0.3 * u[:, 0], y[:, 1] + (y[:, 0] - 1).abs()], -1)
    errors = []
    for beta in (0.0, 0.5):
        model = Ensemble(2, 1, 0.1, members=2, hidden=(32, 32), generator=seeded())
        fit = Trainer(model, FitConfig(epochs=40, batch=64, beta=beta)).fit(y, u, y_next, generator=seeded())
        errors.append(max(fit.best))
    assert errors[1] < 0.3 * errors[0]


def test_deterministic_ensembles_have_no_noise() -> None:
    model = Ensemble(1, 1, 0.1, members=3, hidden=(32, 32), probabilistic=False, generator=seeded())
    Trainer(model, FitConfig(epochs=20)).fit(*noisy(1_000), generator=seeded())
    y, u = batch(3, 1, 1)
    assert not model.predict(y, u).variance.any()
    a, b = (TSInf(model).realize((3, 1, 1), 1, generator=seeded()).step(y, u, 0) for _ in range(2))
    assert torch.equal(a, b)


def weights(model: Ensemble) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_fit_that_diverges_keeps_the_last_good_weights() -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    trainer = Trainer(model, FitConfig(epochs=3))
    trainer.fit(*noisy(300), generator=seeded())
    before = weights(model)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e38
    fit = trainer.fit(*noisy(300), generator=seeded())
    assert "diverged" in fit.stopped
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert (
        "diverged" not in trainer.fit(*noisy(300), generator=seeded()).stopped
    )  # and the optimiser recovers


def test_a_refit_that_diverges_leaves_the_whole_model() -> None:
    """The normalisers too: the last good weights mean nothing with those of other data."""
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    Trainer(model, FitConfig(epochs=3, elites=2)).fit(*noisy(300), generator=seeded())
    model.temperature.fill_(1.5)
    before = copy.deepcopy(model.state_dict())
    y, u, y_next = noisy(300)
    fit = Trainer(model, FitConfig(epochs=3, learning_rate=1e30, clip=1e30)).fit(
        100 * y + 5, u, 100 * y_next, generator=seeded()
    )
    assert "member 3 diverged in epoch 0" in fit.stopped and fit.best == [torch.inf] * 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert fit.elites == before["elites"].tolist()


def test_a_blow_up_to_finite_weights_is_not_kept() -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    Trainer(model, FitConfig(epochs=10)).fit(*noisy(300), generator=seeded())
    before = copy.deepcopy(model.state_dict())
    fit = Trainer(model, FitConfig(epochs=10, learning_rate=1e4)).fit(*noisy(300), generator=seeded())
    assert all(torch.isfinite(torch.tensor(epoch.holdout)).all() for epoch in fit.epochs)
    assert "diverged" in fit.stopped
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_member_that_diverges_leaves_the_others_alone() -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    alone = copy.deepcopy(model)
    with torch.no_grad():
        model.net.weights[0][1] = 3e38
    y, u, y_next = noisy(300)
    config = FitConfig(epochs=10, batch=32)
    fit = Trainer(model, config).fit(y, u, y_next, generator=seeded())
    assert (
        fit.stopped
        == "all 10 epochs are done; member 1 diverged in epoch 0; the best weights before are kept"
    )
    assert fit.elites == model.elites.tolist() == [0, 2, 3] and fit.best[1] == torch.inf
    assert all(torch.isfinite(p).all() for p in model.parameters())
    best = Trainer(alone, config).fit(y, u, y_next, generator=seeded()).best
    for e in (0, 2, 3):  # but for the bounds of the variance, which all share
        assert fit.best[e] == pytest.approx(best[e], rel=0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0},
        {"epochs": 0},
        {"patience": -1},
        {"holdout": 1.0},
        {"holdout": -0.1},
        {"holdout": float("nan")},
        {"max_holdout": -1},
        {"elites": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"clip": 0.0},
        {"beta": -1.0},
        {"decays": ()},
        {"decays": (1e-5, -1.0)},
    ],
)
def test_settings_that_cannot_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=f"FitConfig needs .*{next(iter(wrong))}"):
        FitConfig(**wrong)


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_for_so_many_epochs(patience: int) -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    config = FitConfig(epochs=50, patience=patience, improvement=0.999)  # only the first epoch is one
    fit = Trainer(model, config).fit(*noisy(100), generator=seeded())
    assert len(fit.epochs) == 1 + patience and fit.stopped == f"no member improved for {patience} epochs"


@pytest.mark.parametrize("field", ["y", "u", "y_next", "reward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_refused(field: str, value: float) -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, reward=True, generator=seeded())
    before = copy.deepcopy(model.state_dict())
    y, u, y_next = noisy(50)
    data: dict[str, Any] = {"y": y, "u": u, "y_next": y_next, "reward": torch.zeros(50)}
    data[field].view(-1)[17] = value
    with pytest.raises(ContractError, match=f"{field} holds NaN or inf in 1 of 50 rows, first in row 17"):
        Trainer(model).fit(**data, generator=seeded())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("constant features", lambda y, u, n: (torch.full_like(y, 3.3e5), u, n)),
        ("duplicate rows", lambda y, u, n: tuple(v[:1].repeat(60, 1) for v in (y, u, n))),
        ("wild scales", lambda y, u, n: (1e12 * y, 1e-12 * u, 1e12 * n)),
        ("3 transitions", lambda y, u, n: (y[:3], u[:3], n[:3])),
    ],
)
def test_odd_data_gives_finite_models(what: str, change: Any) -> None:
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    y, u, y_next = change(*noisy(60))
    Trainer(model, FitConfig(epochs=5)).fit(y, u, y_next, generator=seeded())
    assert all(torch.isfinite(p).all() for p in model.state_dict().values())
    said = model.predict(y, u)
    assert torch.isfinite(said.y_next).all() and torch.isfinite(said.variance).all()


def test_what_does_not_vary_is_held_for_certain() -> None:
    """A column that is exactly 7, and one that always grows by 0.5: not noise in raw units, step upon step."""
    model = Ensemble(3, 1, 0.1, **SMALL, reward=True, generator=seeded())
    y, u, y_next = noisy(200)
    seven, count = torch.full_like(y, 7.0), 0.5 * torch.arange(200.0)[:, None]
    y, y_next = torch.cat([y, seven, count], -1), torch.cat([y_next, seven, count + 0.5], -1)
    Trainer(model, FitConfig(epochs=5)).fit(y, u, y_next, torch.full((200,), 2.0), generator=seeded())
    with torch.no_grad():
        said = model.predict(y, u)
        assert said.reward is not None and (said.reward == 2.0).all()
        assert (said.variance[..., 1:] == 0).all() and (said.variance[..., 0] > 0).all()
        draw, at = TSInf(model).realize((8, 1), 30, generator=seeded()), y[:4]
        for k in range(30):
            at = draw.step(at, u[:4], k)
        assert (at[..., 1] == 7.0).all() and torch.equal(at[..., 2], (count[:4, 0] + 15).expand(8, 4))
        told = WithDisagreement(TSInf(model)).realize((8, 1), 1, generator=seeded()).step(pad(y), u, 0)
    assert torch.isfinite(told).all() and (told[..., -1] > 0).all()


def test_small_numbers_are_no_constants() -> None:
    y, u, y_next = noisy(500)
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    fit = Trainer(model, FitConfig(epochs=30, batch=64)).fit(1e-14 * y, u, 1e-14 * y_next, generator=seeded())
    assert max(fit.best) < 0.5 and float(model.target_scale) < 1e-13


def test_both_kinds_of_uncertainty_are_of_the_same_numbers() -> None:
    model = ensemble(FEATURES["goal"])
    y, u = batch(5, 4)
    said = model.predict(y, u)
    assert said.epistemic().shape == said.aleatoric().shape == (5, 3)
    torch.testing.assert_close(said.epistemic(), said.y_next.var(0, correction=0)[:, :3])


def test_temperatures_are_of_the_weights_that_they_were_set_for() -> None:
    model = fitted(100, epochs=2)
    model.temperature.fill_(2.0)
    model.interval_scale.fill_(3.0)
    Trainer(model, FitConfig(epochs=2)).fit(*noisy(100), generator=seeded())
    assert float(model.temperature) == float(model.interval_scale) == 1.0


@pytest.mark.parametrize("size", [1e30, 1e39])
def test_numbers_whose_squares_are_lost_are_refused(size: float) -> None:
    """1e39 is finite in float64, so it is not called infinite."""
    model = Ensemble(1, 1, 0.1, **SMALL, generator=seeded())
    before = copy.deepcopy(model.state_dict())
    y, u, y_next = (v.double() for v in noisy(60))
    y_next[7] = -size
    with pytest.raises(ContractError, match=re.escape(f"y_next is {size:.3g} in row 7. Use larger units")):
        Trainer(model).fit(y, u, y_next, generator=seeded())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fits_are_repeatable_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (fitted(200, epochs=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_shapes_are_told() -> None:
    model = ensemble()
    y, u = batch(8)
    with pytest.raises(ContractError, match=r"u of shape \(8, 2\), but got \(8, 1\)"):
        Trainer(model).fit(y, u[:, :1], y, generator=seeded())
    for few in (0, 1):
        with pytest.raises(ContractError, match="at least 2 transitions"):
            Trainer(model).fit(y[:few], u[:few], y[:few], generator=seeded())
    with pytest.raises(ContractError, match="members ≥ 1"):
        Ensemble(1, 1, 0.1, members=0, generator=seeded())


def test_a_state_with_fewer_elites_than_members_comes_back() -> None:
    model, other = ensemble(), ensemble()
    model.elites = torch.tensor([3, 1])
    other.load_state_dict(model.state_dict())
    assert other.elites.tolist() == [3, 1]
