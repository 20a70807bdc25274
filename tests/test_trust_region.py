"""The trust region around the data: its values, its trace, and plans that it keeps near the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mbrl import ContractError, Features, Problem, UnsupportedProblem
from mbrl.models import (
    TS1,
    BayesianModel,
    Ensemble,
    Exported,
    LinearGaussian,
    LinearModel,
    MeanDynamics,
    trust_region,
)
from mbrl.planners import ILQR, AugmentedLagrangian
from mbrl.tracing import trace
from tests.problems import DoubleIntegrator, Quadratic, box, seeded

FEATURES = Features(4, hidden=(0,), angles=(2,), absolute=(3,))


def fitted(features: Features = FEATURES, n: int = 500) -> tuple[Ensemble, Any, Any]:
    model = Ensemble(features.ny, 1, 0.1, features=features, hidden=(4,), generator=seeded())
    y = 3 + 2 * torch.randn(n, features.ny, generator=seeded(1), dtype=torch.float64)
    u = torch.randn(n, 1, generator=seeded(2), dtype=torch.float64) - 5
    model.normalise(y, u, y)
    return model, y, u


def test_data_are_at_a_distance_of_one_on_average() -> None:
    model, y, u = fitted()
    g = trust_region(model, 1.5)
    assert (g.kind, g.at, g.soft, g.label) == ("le", "path", None, "trust region")
    found = g.fun(y, u, 0, None)
    assert found.shape == (500, 1) and found.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(1 - 1.5**2, abs=1e-4)
    z = (
        torch.cat([y[:, [1, 3]], y[:, 2:3].sin(), y[:, 2:3].cos(), u], -1) - model.input_mean
    ) / model.input_scale
    torch.testing.assert_close(found[:, 0], (z**2).mean(-1) - 1.5**2)
    end = trust_region(model, 1.5, at="terminal", soft=10.0)
    assert (end.at, end.soft) == ("terminal", 10.0)
    torch.testing.assert_close(end.fun(y, None, None, None)[:, 0], (z[:, :4] ** 2).mean(-1) - 1.5**2)


def test_it_can_be_traced() -> None:
    model, y, u = fitted()
    fun = trust_region(model, 2.0).fun
    traced = trace("trust region", lambda y, u: fun(y, u, 0, None), (4,), (1,))
    found = [float(traced(y[i].numpy(), u[i].numpy())) for i in range(5)]
    np.testing.assert_allclose(found, fun(y[:5], u[:5], 0, None)[:, 0], rtol=1e-12)
    at_end = trace("trust region", lambda y: fun(y, None, None, None), (4,))
    assert float(at_end(y[0].numpy())) == pytest.approx(float(fun(y[0], None, None, None)))


def test_it_is_of_the_normaliser_as_it_was() -> None:
    model, y, u = fitted()
    first = trust_region(model, 2.0)
    assert first == trust_region(MeanDynamics(model), 2.0)  # equal, so that nothing is built twice
    model.normalise(y + 1, u, y)
    assert first != trust_region(model, 2.0)
    assert float(first.fun(y, u, 0, None).mean()) == pytest.approx(1 - 4, abs=1e-4)


def test_every_model_has_one() -> None:
    linear = LinearModel(4, 1, 0.1, features=FEATURES)
    bayesian = BayesianModel(4, 1, 0.1, features=FEATURES, hidden=(4,), generator=seeded())
    model, _, _ = fitted()
    for given in (
        linear,
        LinearGaussian(linear),
        Exported(linear),
        bayesian,
        TS1(model),
        Exported(MeanDynamics(model)),
    ):
        assert trust_region(given, 1.0).label == "trust region"


def test_what_is_refused() -> None:
    model, _, _ = fitted()
    for radius in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ContractError, match="finite radius > 0"):
            trust_region(model, radius)
    with pytest.raises(UnsupportedProblem, match="normaliser, .* but got DoubleIntegrator"):
        trust_region(DoubleIntegrator(), 1.0)  # type: ignore[arg-type]


def test_a_plan_stays_near_the_data() -> None:
    """A linear model of slow data; without the trust region the plan is much faster than these."""
    plant, n = DoubleIntegrator(), 400
    y = torch.randn(n, 2, generator=seeded(1), dtype=torch.float64) * torch.tensor([1.0, 0.3])
    u = torch.randn(n, 1, generator=seeded(2), dtype=torch.float64)
    model = LinearModel(2, 1, plant.dt)
    model.fit(y, u, plant.step(y, u, 0))
    region = trust_region(model, 1.2)
    x0 = torch.tensor([[1.5, 0.0]], dtype=torch.float64)
    furthest = []
    for constraints in ((), (region,)):
        problem = Problem(model, Quadratic(), box(1, 10.0), 15, constraints=constraints)
        planner: Any = AugmentedLagrangian() if constraints else ILQR()
        plan, _ = planner.plan(problem, x0, planner.init(problem, x0, generator=seeded()), generator=seeded())
        assert plan.states is not None
        furthest.append(float(region.fun(plan.states[:, :-1], plan.actions, 0, None).max()))
    assert furthest[0] > 1 and furthest[1] < 1e-3
