"""CEM: the fit, its floor and what failures leave alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mbrl.planners import CEM
from mbrl.planners.cem import CEMState
from tests.problems import seeded

PHASE = torch.zeros(1, dtype=torch.long)


def start(planner: CEM) -> tuple[CEMState, Tensor]:
    state = planner.start(torch.full((1, 4, 2), 0.1, dtype=torch.float64), PHASE)
    return state, planner.propose(state, 0, False, generator=seeded()).clamp(-1, 1)


def test_update_is_the_momentum_fit_of_the_elites() -> None:
    planner = CEM(population=10, elites=3, alpha=0.25)
    state, knots = start(planner)
    cost = torch.tensor([[5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 6.0, 4.0, 10.0]], dtype=torch.float64)
    after, weights = planner.update(state, knots, cost)
    chosen = knots[0, [1, 3, 5]]
    torch.testing.assert_close(after.solution[0], 0.25 * state.solution[0] + 0.75 * chosen.mean(0))
    # The deviation divides by n, as numpy does.
    deviation = ((chosen - chosen.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(after.std[0], 0.25 * state.std[0] + 0.75 * deviation)
    assert weights[0].nonzero().ravel().tolist() == [1, 3, 5]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, dtype=torch.float64))


def test_deviation_has_a_floor() -> None:
    planner = CEM(population=6, elites=2, alpha=0.0, min_std=0.07)
    state, knots = start(planner)
    after, _ = planner.update(state, torch.zeros_like(knots), torch.arange(6.0)[None])
    assert (after.std == 0.07).all()


def test_fewer_finite_candidates_than_elites_change_nothing() -> None:
    planner = CEM(population=6, elites=3)
    state, knots = start(planner)
    cost = torch.tensor([[1.0, 2.0, torch.inf, torch.inf, torch.inf, torch.inf]])
    after, weights = planner.update(state, knots, cost)
    assert torch.equal(after.solution, state.solution) and torch.equal(after.std, state.std)
    assert (weights == 0).all()


def test_each_control_step_starts_with_the_full_deviation() -> None:
    planner = CEM(population=6, elites=2, std=0.6)
    state, knots = start(planner)
    after, _ = planner.update(state, knots, torch.arange(6.0)[None])
    assert not (after.std == 0.6).any()
    moved = planner.advance(after, lambda z: z.flip(1))
    assert (moved.std == 0.6).all() and torch.equal(moved.solution, after.solution.flip(1))
