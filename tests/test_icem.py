"""iCEM: the details that make it differ from CEM, as in the authors' software."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mbrl.planners import ICEM
from mbrl.planners.icem import ICEMState
from tests.problems import lq_problem, seeded

PLANNER = ICEM(population=40, elites=10, keep=0.3, decay=1.25)


def start(planner: ICEM = PLANNER) -> ICEMState:
    return planner.start(torch.full((1, 5, 2), 0.1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))


def ranked(B: int) -> Tensor:
    """Costs under which candidate i is the i-th best from the end: B − i."""
    return torch.arange(B, 0, -1, dtype=torch.float64)[None]


def test_population_shrinks_as_published() -> None:
    assert [PLANNER.candidates(i) for i in range(4)] == [40, 32, 25, 20]
    assert ICEM(population=40, elites=15).candidates(9) == 30  # never below twice the elites
    state = start()
    for i, B in enumerate((40, 32, 25)):
        assert PLANNER.propose(state, i, False, generator=seeded()).shape == (1, B, 5, 2)
    problem, x0 = lq_problem(horizon=5), torch.ones(1, 2, dtype=torch.float64)
    plan, _ = PLANNER.plan(problem, x0, PLANNER.init(problem, x0, generator=seeded()), generator=seeded())
    assert plan.info["model_steps"] == (40 + 32 + 25 + 2) * 5  # two to score the old and the new plan


def test_elites_are_kept_within_a_plan() -> None:
    state = start()
    knots = PLANNER.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    after, _ = PLANNER.update(state, knots, ranked(40))
    assert after.kept.shape == (1, 3, 5, 2) and bool(after.valid)
    assert torch.equal(after.kept[0], knots[0, [39, 38, 37]])
    again = PLANNER.propose(after, 1, False, generator=seeded(1))
    assert torch.equal(again[0, -3:], after.kept[0])


def test_nothing_is_kept_before_the_first_update() -> None:
    state = start()
    knots = PLANNER.propose(state, 0, False, generator=seeded())
    assert not (knots[0, -3:] == state.kept[0]).all(-1).any()


def test_shifted_elites_join_the_next_control_step_with_a_fresh_end() -> None:
    state = start()
    knots = PLANNER.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    after, _ = PLANNER.update(state, knots, ranked(40))
    moved = PLANNER.advance(after, lambda z: torch.cat([z[..., 1:, :], z[..., -1:, :]], -2))
    assert torch.equal(moved.kept[..., :-1, :], after.kept[..., 1:, :])
    assert torch.equal(moved.mean[:, :-1], after.mean[:, 1:])
    assert torch.equal(moved.mean[:, -1], after.mean[:, -1])  # repeated, not zero
    again = PLANNER.propose(moved, 0, False, generator=seeded(1))
    assert torch.equal(again[0, -3:, :-1], moved.kept[0, :, :-1])
    assert not (again[0, -3:, -1] == moved.kept[0, :, -1]).any()


def test_deviation_is_inflated_again_at_each_control_step() -> None:
    state = start()
    knots = PLANNER.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    after, _ = PLANNER.update(state, knots, ranked(40))
    assert not (after.std == PLANNER.std).any()
    assert (PLANNER.advance(after, lambda z: z).std == PLANNER.std).all()


@pytest.mark.parametrize("i", [0, 1, 2])
def test_the_mean_is_a_candidate_in_the_last_iteration_only(i: int) -> None:
    state = start()
    for last in (False, True):
        knots = PLANNER.propose(state, i, last, generator=seeded())
        assert (knots == state.mean[:, None]).all((-1, -2)).any() == last
        assert torch.equal(knots[:, 0], state.mean) == last


def test_update_is_the_momentum_fit_and_the_best_is_executed() -> None:
    planner = ICEM(population=40, elites=4, alpha=0.2)
    state = start(planner)
    knots = planner.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    after, weights = planner.update(state, knots, ranked(40))
    chosen = knots[0, 36:]
    torch.testing.assert_close(after.mean[0], 0.2 * state.mean[0] + 0.8 * chosen.mean(0))
    torch.testing.assert_close(after.std[0], 0.2 * state.std[0] + 0.8 * chosen.std(0, correction=0))
    assert torch.equal(after.solution[0], knots[0, 39])
    assert weights[0].nonzero().ravel().tolist() == [36, 37, 38, 39]


def test_fewer_finite_candidates_than_elites_keep_the_gaussian_but_not_a_worse_plan() -> None:
    state = start()
    knots = PLANNER.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    cost = torch.full((1, 40), torch.inf, dtype=torch.float64)
    lost, weights = PLANNER.update(state, knots, cost)
    for field in ("solution", "mean", "std", "kept", "valid"):
        assert torch.equal(getattr(lost, field), getattr(state, field))
    assert (weights == 0).all()
    cost[0, 7] = 1.0
    one, _ = PLANNER.update(state, knots, cost)
    assert torch.equal(one.solution[0], knots[0, 7])
    assert torch.equal(one.mean, state.mean) and torch.equal(one.std, state.std) and not bool(one.valid)


def test_no_elites_kept() -> None:
    planner = ICEM(keep=0.0)
    state = start(planner)
    knots = planner.propose(state, 0, False, generator=seeded()).clamp(-1, 1)
    after, _ = planner.update(state, knots, ranked(40))
    assert after.kept.shape == (1, 0, 5, 2)
    assert planner.propose(after, 1, True, generator=seeded()).shape == (1, 32, 5, 2)
