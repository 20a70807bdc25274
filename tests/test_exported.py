"""Exported models are proven equal to torch, share one expression, and follow a fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import casadi
import numpy as np
import pytest
import torch
from torch import nn

from mbrl import ContractError, Features, UnsupportedProblem, check_dynamics
from mbrl.expressions import Expressible, Expression
from mbrl.models import (
    TS1,
    BayesianModel,
    Ensemble,
    Exported,
    LinearGaussian,
    LinearModel,
    MeanDynamics,
    MomentMatching,
    Thompson,
    Trainer,
    TSInf,
    WithDisagreement,
    WithHeads,
    casadi_expression,
    exported,
    scenarios,
)
from tests.problems import DoubleIntegrator, seeded

FEATURES = {
    "plain": Features(3),
    "angles": Features(4, angles=(1, 3)),
    "unit": Features(5, unit=((1, 2), (3, 4))),
    "absolute": Features(4, absolute=(0, 2)),
    "constant": Features(4, constant=(3,)),
    "hidden": Features(4, hidden=(0,)),
    "all": Features(7, hidden=(2,), angles=(5, 0), absolute=(2,), unit=((3, 4),), constant=(1, 6)),
}


def ensemble(features: Features | None = None, *, seed: int = 0, **options: Any) -> Ensemble:
    """A network as after a fit: weights and normalisers that are not neutral."""
    features = features or Features(3)
    given = {"members": 3, "hidden": (9, 6), "generator": seeded(seed), **options}
    model = Ensemble(features.ny, 2, 0.1, features=features, **given)
    with torch.no_grad():
        for i, value in enumerate((*model.net.biases, model.input_mean, model.target_mean)):
            value.normal_(generator=seeded(seed + i))
        for value in (model.input_scale, model.target_scale):
            value.uniform_(0.1, 3, generator=seeded(seed))
    return model


def linear(features: Features | None = None) -> LinearModel:
    features = features or Features(3)
    g = seeded()
    y, y_next = (torch.randn(60, features.ny, generator=g, dtype=torch.float64) for _ in range(2))
    model = LinearModel(features.ny, 2, 0.1, features=features)
    model.fit(
        features.rescaled(y), torch.randn(60, 2, generator=g, dtype=torch.float64), features.rescaled(y_next)
    )
    return model


@pytest.mark.parametrize("features", FEATURES.values(), ids=list(FEATURES))
@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_every_activation_and_feature_is_proven(features: Features, activation: Any) -> None:
    errors = Exported(MeanDynamics(ensemble(features, activation=activation))).errors()
    assert len(errors) == 6 and max(errors.values()) < 1e-12


@pytest.mark.parametrize("features", FEATURES.values(), ids=list(FEATURES))
def test_linear_models_are_proven(features: Features) -> None:
    Exported(linear(features))


@pytest.mark.parametrize(
    "options",
    [
        {"members": 1, "probabilistic": False},
        {"members": 5, "probabilistic": False, "hidden": ()},
        {"members": 5, "reward": True, "termination": True},
        {"members": 2, "hidden": (64, 64, 16)},
        {"members": 1, "hidden": (200, 200, 200, 200)},
    ],
    ids=str,
)
def test_every_size_and_head_is_proven(options: dict[str, Any]) -> None:
    model = ensemble(**options)
    Exported(MeanDynamics(model))
    Exported(Thompson(model, member=len(model.elites) - 1))


def test_bayesian_networks_are_proven() -> None:
    model = BayesianModel(3, 2, 0.1, hidden=(8,), generator=seeded())
    Exported(MeanDynamics(model.center))
    assert len(scenarios(model.draw(4, generator=seeded(1))).members) == 4


@pytest.mark.parametrize("kind", [MeanDynamics, Thompson])
def test_it_is_dynamics(kind: Any) -> None:
    model = ensemble(FEATURES["all"]).double()
    x, u = (torch.randn(4, n, generator=seeded(n), dtype=torch.float64) for n in (7, 2))
    dynamics = Exported(kind(model))
    assert isinstance(dynamics, Expressible) and (dynamics.nx, dynamics.nu, dynamics.dt) == (7, 2, 0.1)
    check_dynamics(dynamics, x, u, tolerance=1e-6)
    if kind is MeanDynamics:
        torch.testing.assert_close(dynamics.step(x, u, 0), model.predict(x, u).y_next.mean(0))
    else:
        torch.testing.assert_close(dynamics.step(x, u, 0), model.predict(x, u).y_next[0])


def test_a_member_that_is_no_elite() -> None:
    model = ensemble().double()
    x, u = (torch.randn(4, n, generator=seeded(n), dtype=torch.float64) for n in (3, 2))
    wanted = model.predict(x, u).y_next[1]
    model.elites = torch.tensor([2, 0])
    torch.testing.assert_close(Exported(Thompson(model, member=1)).step(x, u, 0), wanted)


def test_networks_keep_their_dtype() -> None:
    model = ensemble()
    dynamics = Exported(MeanDynamics(model))
    assert model.input_mean.dtype == torch.float32
    x, u = torch.zeros(3), torch.zeros(2)
    assert dynamics.step(x, u, 0).dtype == torch.float32
    found = np.array(dynamics.expression.step(x.numpy(), u.numpy(), 0, dynamics.theta))[:, 0]
    np.testing.assert_allclose(found, dynamics.step(x, u, 0).detach().numpy(), atol=1e-5)


def test_a_hundred_networks_share_one_expression() -> None:
    models = [ensemble(seed=s) for s in range(100)]
    made = [Exported(MeanDynamics(model)) for model in models]
    (expression,) = {id(dynamics.expression) for dynamics in made}
    assert len({dynamics.theta.tobytes() for dynamics in made}) == 100
    for dynamics in made:  # the one expression says what each network says
        x, u = torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        found = np.array(made[0].expression.step(x.numpy(), u.numpy(), 0, dynamics.theta))[:, 0]
        np.testing.assert_allclose(found, dynamics.step(x, u, 0).detach().numpy(), rtol=1e-4, atol=1e-4)
    assert id(Exported(Thompson(models[0])).expression) != expression
    members = scenarios(models[0]).members
    assert len({id(member.expression) for member in members}) == 1  # type: ignore[attr-defined]


def test_theta_follows_a_fit() -> None:
    model = ensemble(hidden=(8,))
    dynamics = Exported(MeanDynamics(model))
    before, expression = dynamics.theta, dynamics.expression
    y, u = torch.randn(64, 3, generator=seeded()), torch.randn(64, 2, generator=seeded(1))
    Trainer(model).fit(y, u, y + 0.1, generator=seeded())
    assert dynamics.expression is expression and not np.array_equal(dynamics.theta, before)
    dynamics.prove()
    with torch.no_grad():
        model.net.weights[0].data[:] += 1  # behind the back of autograd's versions
    assert not np.array_equal(dynamics.theta[: len(before)], before)
    dynamics.prove()


# An addition ε sin(x/δ): value, slope and bend differ by ε, ε/δ and ε/δ², so that one alone is beyond the tolerance.
TAMPERED = {
    "value derived": (1e-6, 1e3),
    "Jacobian derived": (1e-12, 1e-9),
    "Hessian-vector product derived": (1e-15, 1e-4),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_an_expression_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    eps, delta = TAMPERED[what]

    def tampered(model: Any) -> Expression:
        good = casadi_expression(model)
        x, u, k, theta = (casadi.MX.sym(f"i{i}", good.step.numel_in(i)) for i in range(4))
        wrong = good.step(x, u, k, theta) + eps * casadi.sin(x / delta)
        return dataclasses.replace(good, step=casadi.Function("wrong", [x, u, k, theta], [wrong]))

    monkeypatch.setattr(exported, "casadi_expression", tampered)
    with pytest.raises(ContractError, match=f"the {what} by CasADi is off by .* at y = "):
        Exported(MeanDynamics(ensemble(activation="tanh")))


@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_closed_form_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch, i: int) -> None:
    def tampered(model: Any) -> Expression:
        good = casadi_expression(model)
        assert good.batch is not None

        def batch(*args: Any, order: int) -> Any:
            results = list(good.batch(*args, order=order))  # type: ignore[misc]
            results[i] = results[i] * (1 + 1e-8)
            return results

        return dataclasses.replace(good, batch=batch)

    monkeypatch.setattr(exported, "casadi_expression", tampered)
    what = ("value", "Jacobian", "Hessian-vector product")[i]
    with pytest.raises(ContractError, match=f"the {what} in closed form"):
        Exported(MeanDynamics(ensemble()))


def test_a_subclass_that_says_something_else_is_refused() -> None:
    class Damped(Ensemble):
        def predict(self, *args: Any) -> Any:
            said = super().predict(*args)
            return dataclasses.replace(said, y_next=0.9 * said.y_next)

    model = Damped(3, 2, 0.1, hidden=(4,), generator=seeded())
    with pytest.raises(ContractError, match="the value derived by CasADi .* a subclass changes"):
        Exported(MeanDynamics(model))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = ensemble()
    with torch.no_grad():
        model.net.weights[0][0, 0, 0] = torch.nan
    with pytest.raises(ContractError, match="not finite"):
        Exported(MeanDynamics(model))


class Normalised(nn.Module):
    """A network of a user's own."""

    activation = "tanh"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU())


def foreign() -> MeanDynamics:
    model = ensemble()
    model.net = Normalised()  # type: ignore[assignment]
    return MeanDynamics(model)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "ensemble": (lambda: ensemble(), r"MeanDynamics\(model\).*Thompson.*scenarios"),
    "bayesian": (lambda: BayesianModel(3, 2, 0.1, generator=seeded()), r"MeanDynamics\(model\.center\)"),
    "linear with noise": (lambda: LinearGaussian(linear()), r"Exported\(model\.model\)"),
    "TS1": (lambda: TS1(ensemble()), r"MeanDynamics\(way\.model\)"),
    "TS∞": (lambda: TSInf(ensemble()), r"MeanDynamics\(way\.model\)"),
    "moment matching": (lambda: MomentMatching(ensemble()), r"MeanDynamics\(way\.model\)"),
    "heads": (lambda: WithHeads(TS1(ensemble(reward=True))), r"MeanDynamics\(lifted\.way\.model\)"),
    "disagreement": (lambda: WithDisagreement(TS1(ensemble())), r"MeanDynamics\(lifted\.way\.model\)"),
    "exported": (lambda: Exported(linear()), "exported already"),
    "a module": (Normalised, r"layers GELU, LayerNorm, Linear; .* silu, relu or tanh"),
    "other layers": (
        foreign,
        r"EnsembleMLP.* silu, relu, tanh .*but got Normalised with GELU, LayerNorm, Linear",
    ),
    "dynamics": (DoubleIntegrator, r"Symbolic\(dynamics\)"),
    "nonsense": (lambda: 3, "Such as"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_is_refused_with_a_remedy(kind: str) -> None:
    make, remedy = REFUSED[kind]
    with pytest.raises(UnsupportedProblem, match=remedy):
        Exported(make())


@pytest.mark.parametrize("wrap", [MeanDynamics, Thompson, scenarios])
def test_what_has_no_members_is_told_how_to_get_them(wrap: Any) -> None:
    with pytest.raises(ContractError, match=r"needs an Ensemble, but got a BayesianModel.*model\.draw"):
        wrap(BayesianModel(3, 2, 0.1, hidden=(8,), generator=seeded()))
