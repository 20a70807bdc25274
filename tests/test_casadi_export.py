"""Models in CasADi say what they say in torch: values, Jacobians and Hessians, and are built once."""

from __future__ import annotations

from typing import Any

import casadi
import numpy as np
import pytest
import torch
from torch import Tensor

from mbrl import Features
from mbrl.models import (
    Ensemble,
    LinearModel,
    MeanDynamics,
    Thompson,
    casadi_function,
    casadi_weights,
)
from tests.problems import seeded

FEATURES = {
    "all": Features(3),
    "angle, force and direction": Features(
        6, hidden=(2,), angles=(5, 0), absolute=(2,), unit=((3, 4),), constant=(1,)
    ),
    "two directions side by side": Features(6, hidden=(0,), unit=((1, 2), (3, 4, 5))),
}


def ensemble(features: Features, **options: Any) -> Ensemble:
    model = Ensemble(
        features.ny,
        2,
        0.1,
        features=features,
        **{"members": 3, "hidden": (7, 5), "generator": seeded(), **options},
    )
    with torch.no_grad():
        for i, value in enumerate((*model.net.biases, model.input_mean, model.target_mean)):
            value.normal_(generator=seeded(i))
        for value in (model.input_scale, model.target_scale):
            value.uniform_(0.5, 2, generator=seeded(3))
    return model.double()


def point(features: Features, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    return (torch.randn(n, generator=g, dtype=torch.float64) for n in (features.ny, 2))  # type: ignore[return-value]


def close(found: casadi.DM, expected: Tensor) -> None:
    np.testing.assert_allclose(np.array(found), expected.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=list(FEATURES))
def test_value_jacobian_and_hessian_are_torchs(features: Features, activation: Any) -> None:
    model = ensemble(features, activation=activation)
    mean = MeanDynamics(model)
    f, w = casadi_function(mean), casadi_weights(mean)
    y, u = point(features)
    close(f(y.numpy(), u.numpy(), 0, w), mean.step(y, u, 0)[:, None])

    sy, su, sw = (casadi.MX.sym(name, f.size1_in(i)) for name, i in (("y", 0), ("u", 1), ("w", 3)))
    s = casadi.vertcat(sy, su)
    jacobian = casadi.Function("J", [sy, su, sw], [casadi.jacobian(f(sy, su, 0, sw), s)])
    close(jacobian(y.numpy(), u.numpy(), w), torch.cat(mean.linearize(y, u, 0), -1))

    lam, v = (
        torch.randn(n, generator=seeded(i), dtype=torch.float64)
        for i, n in enumerate((features.ny, features.ny + 2))
    )
    gradient = casadi.gradient(casadi.dot(lam.numpy(), f(sy, su, 0, sw)), s)
    product = casadi.Function("Hv", [sy, su, sw], [casadi.jtimes(gradient, s, v.numpy())])

    def value(x: Tensor) -> Tensor:
        return lam @ mean.step(x[: features.ny], x[features.ny :], 0)

    _, expected = torch.autograd.functional.hvp(value, torch.cat([y, u]), v)  # type: ignore[no-untyped-call]
    close(product(y.numpy(), u.numpy(), w), expected[:, None])


def test_each_elite_and_one_member() -> None:
    model = ensemble(FEATURES["all"], reward=True, termination=True)
    model.elites = torch.tensor([2, 0])
    y, u = point(FEATURES["all"])
    said = model.predict(y[None], u[None]).y_next[:, 0]
    close(casadi_function(model)(y.numpy(), u.numpy(), 0, casadi_weights(model)), said.T)
    one = Thompson(model, member=0)
    close(casadi_function(one)(y.numpy(), u.numpy(), 0, casadi_weights(one)), said[1][:, None])


def test_linear_models() -> None:
    features = FEATURES["angle, force and direction"]
    g = seeded()
    y, y_next = (torch.randn(50, 6, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.randn(50, 2, generator=g, dtype=torch.float64)
    model = LinearModel(6, 2, 0.1, features=features)
    model.fit(y, u, y_next)
    found = casadi_function(model)(y[0].numpy(), u[0].numpy(), 0, casadi_weights(model))
    close(found, model.step(y[0], u[0], 0)[:, None])


def test_one_function_serves_every_model_of_an_architecture() -> None:
    first, second = (ensemble(Features(3), generator=seeded(s)) for s in (0, 1))
    assert casadi_function(first) is casadi_function(second)
    assert not np.array_equal(casadi_weights(first), casadi_weights(second))
    second.elites = torch.tensor([1])
    assert casadi_function(first) is not casadi_function(second)
    assert casadi_function(MeanDynamics(first)) is not casadi_function(first)
    assert casadi_function(ensemble(Features(3), activation="tanh")) is not casadi_function(first)


def test_derivatives_stay_finite_far_away() -> None:
    model = ensemble(Features(3))
    f, w = casadi_function(MeanDynamics(model)), casadi_weights(MeanDynamics(model))
    sy, su = casadi.MX.sym("y", 3), casadi.MX.sym("u", 2)
    hessian = casadi.hessian(casadi.sum1(f(sy, su, 0, w)), sy)[0]
    found = casadi.Function("H", [sy, su], [hessian])([-1e6, 1e6, 1e6], [0, 0])
    assert np.isfinite(np.array(found)).all()


def test_it_plans() -> None:
    """One shooting problem, weights as its parameter, solved for two models."""
    models = [ensemble(Features(2), generator=seeded(s), hidden=(8,)) for s in (0, 1)]
    f = casadi_function(MeanDynamics(models[0]))
    u, p = casadi.MX.sym("u", 2, 3), casadi.MX.sym("p", f.size1_in(3))
    y, cost = casadi.MX([0.5, -0.5]), casadi.MX(0)
    for k in range(3):
        y = f(y, u[:, k], k, p)
        cost += casadi.sumsqr(y) + 0.1 * casadi.sumsqr(u[:, k])
    options: Any = {"print_time": False, "ipopt": {"print_level": 0, "sb": "yes"}}
    nlp: Any = {"x": casadi.vec(u), "p": p, "f": cost}
    solver = casadi.nlpsol("plan", "ipopt", nlp, options)
    for model in models:
        start = torch.zeros(3, 2, dtype=torch.float64)
        solution = solver(x0=0, p=casadi_weights(MeanDynamics(model)))
        assert solver.stats()["success"]
        actions = torch.from_numpy(np.array(solution["x"])).reshape(3, 2)
        costs = []
        for plan in (actions, start):
            at, total = torch.tensor([0.5, -0.5], dtype=torch.float64), 0.0
            for k in range(3):
                at = MeanDynamics(model).step(at, plan[k], k).detach()
                total += float((at**2).sum() + 0.1 * (plan[k] ** 2).sum())
            costs.append(total)
        assert costs[0] == pytest.approx(float(solution["f"])) and costs[0] < costs[1]
