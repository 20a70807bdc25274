"""Nonlinear MPC on networks: derivatives of its programs, refitted models without a rebuild, scenarios."""

from __future__ import annotations

import dataclasses
from typing import Any

import casadi
import numpy as np
import pytest
import torch

from mbrl import Box, Constraint, Features, Problem, evaluate
from mbrl.models import Ensemble, Exported, MeanDynamics, scenarios
from mbrl.models.networks import Activation
from mbrl.planners import NMPC, ScenarioNMPC
from tests.problems import seeded
from tests.test_nmpc import SwingUp, Track, solve, tensor

FEATURES = (
    Features(4, hidden=(0,), angles=(1,)),
    Features(4, absolute=(2,), constant=(3,)),
    Features(4, unit=((2, 3),)),
)


def network(
    activation: Activation = "tanh", features: Features = FEATURES[0], members: int = 3, seed: int = 0
) -> Ensemble:
    model = Ensemble(
        4,
        1,
        dt=0.05,
        features=features,
        members=members,
        hidden=(9, 8),
        activation=activation,
        generator=seeded(seed),
    )
    with torch.no_grad():
        for part in (*model.net.weights, *model.net.biases):
            part.normal_(std=0.3, generator=seeded(seed + 1))
        model.input_mean.normal_(generator=seeded(seed + 2))
        model.target_scale.uniform_(0.05, 0.1, generator=seeded(seed + 3))
    return model


def learned(
    dynamics: Any, horizon: int = 5, *, soft: float | None = 5.0, particles: int = 1
) -> Problem[Any, Any, Any]:
    box = Box(tensor(-2.0), tensor(2.0))
    constraints = (Constraint(Track(0.4), soft=soft, name="track"),)
    return Problem(dynamics, SwingUp(), box, horizon, constraints=constraints, particles=particles)


X0 = tensor(0.1, 2.0, 0.3, 0.8)[None]


@pytest.mark.parametrize("hessian", ["exact", "gauss-newton"])
@pytest.mark.parametrize("features", FEATURES, ids=["angle", "absolute", "unit"])
@pytest.mark.parametrize("activation", ["silu", "tanh", "relu"])
def test_predictions_in_a_batch_give_what_casadi_derives(
    activation: Any, features: Features, hessian: Any
) -> None:
    model = network(activation, features)
    for planner, problem in (
        (NMPC(solver="ipopt", hessian=hessian), learned(Exported(MeanDynamics(model)))),
        (ScenarioNMPC(solver="ipopt", shared=2, hessian=hessian), learned(scenarios(model), particles=3)),
        (ScenarioNMPC(solver="ipopt", spread=1.0, hessian=hessian), learned(scenarios(model), particles=3)),
    ):
        program = planner._program(problem).control.program
        symbols, found = program.expressions()
        names = ("f", "g", "grad_f_x", "jac_g_x", "hess_gamma_x_x")
        whole = casadi.Function("whole", list(symbols.values()), [found[name] for name in names])
        rng = np.random.default_rng(0)
        z, multipliers = rng.normal(size=program.nz), rng.normal(size=program.ng)
        p = np.concatenate([rng.normal(size=program.np - program.ntheta), planner._theta(problem)])
        program.give(p)
        wanted = [part.nonzeros() for part in whole(z, p, 0.7, multipliers)]
        slopes = [part.copy() for part in program.slopes(z)]
        given = [*slopes, program.curvature(z, np.array([0.7]), multipliers)]
        for name, a, b in zip(names, given, wanted, strict=True):
            scale = max(1e-3, float(np.abs(b).max()))
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * scale, err_msg=name)
        np.testing.assert_allclose(program.values(z)[1], slopes[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_derivatives_against_finite_differences(activation: Any) -> None:
    problem = learned(Exported(MeanDynamics(network(activation))), 3)
    planner = NMPC()
    program = planner._program(problem).control.program
    rng = np.random.default_rng(1)
    z, multipliers, sigma = rng.normal(size=program.nz), rng.normal(size=program.ng), np.array([1.3])
    program.give(np.concatenate([rng.normal(size=program.np - program.ntheta), planner._theta(problem)]))

    def slope(z: np.ndarray) -> np.ndarray:
        _, _, gradient, jacobian = program.slopes(z)
        return np.asarray(sigma * gradient + casadi.DM(program.jacobian, jacobian).full().T @ multipliers)

    H = casadi.DM(program.hessian, program.curvature(z, sigma, multipliers).copy()).full()
    base = slope(z)
    for i in range(program.nz):
        e = np.zeros(program.nz)
        e[i] = 1e-6
        f = [
            float((sigma * program.values(z + s * e)[0])[0] + program.values(z + s * e)[1] @ multipliers)
            for s in (1, -1)
        ]
        assert base[i] == pytest.approx((f[0] - f[1]) / 2e-6, abs=1e-6)
        np.testing.assert_allclose(H[:, i], (slope(z + e) - slope(z - e)) / 2e-6, atol=1e-6)


def test_a_hundred_networks_through_one_program() -> None:
    """The program is built for an architecture; weights are arguments, and plans are those of the weights given."""
    programs, costs = set(), set()
    for seed in range(100):
        dynamics = Exported(MeanDynamics(network("silu", members=2, seed=10 * seed)), tolerance=1e-9)
        problem = learned(dynamics)
        planner = NMPC(iterations=100)
        programs.add(id(planner._program(problem)))
        if seed % 20 == 0:
            plan = solve(planner, problem, X0)
            twin = network("silu", members=2, seed=10 * seed).double()
            fresh = evaluate(problem, MeanDynamics(twin), X0, plan.actions[:, None]).cost[:, 0]
            torch.testing.assert_close(plan.cost, fresh, rtol=1e-5, atol=0)
            costs.add(round(float(plan.cost), 6))
    assert len(programs) == 1 and len(costs) == 5


@pytest.mark.parametrize("solver", ["fatrop", "ipopt", "sqp"])
def test_scenarios_of_equal_members_are_the_mean(solver: Any) -> None:
    model = network()
    with torch.no_grad():
        for part in (*model.net.weights, *model.net.biases):
            part.copy_(part[:1].expand_as(part))
    mean = solve(NMPC(solver=solver), learned(Exported(MeanDynamics(model))), X0)
    every = solve(ScenarioNMPC(solver=solver), learned(scenarios(model), particles=3), X0)
    torch.testing.assert_close(every.cost, mean.cost, rtol=1e-5, atol=0)
    torch.testing.assert_close(every.actions, mean.actions, rtol=0, atol=1e-3)


def test_generated_code_of_networks_is_the_same(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    problem = learned(Exported(MeanDynamics(network(members=1))), 3)
    plain = solve(NMPC(), problem, X0)
    compiled = solve(NMPC(generate_code=True), problem, X0)
    torch.testing.assert_close(compiled.actions, plain.actions, atol=1e-7, rtol=0)


def test_a_learned_model_that_was_refitted_is_seen() -> None:
    model = network()
    problem = learned(Exported(MeanDynamics(model)))
    first = solve(NMPC(), problem, X0)
    with torch.no_grad():
        model.target_scale.mul_(1.5)
    again = solve(NMPC(), problem, X0)
    assert float((first.cost - again.cost).abs()) > 1e-3
    dynamics = dataclasses.replace(problem.dynamics)
    fresh = solve(NMPC(), dataclasses.replace(problem, dynamics=dynamics), X0)
    assert torch.equal(again.actions, fresh.actions)
