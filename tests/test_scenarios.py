"""Scenarios: particles are members, in equal shares, and all sampling planners plan on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mbrl import Box, ContractError, Problem, Scenarios, Worst, check_dynamics, check_planner, evaluate
from mbrl.models import Ensemble, TSInf, scenarios
from mbrl.planners import SamplingPlanner
from tests.problems import PLANNERS, DoubleIntegrator, Noisy, Quadratic, box, name, seeded


@dataclass(frozen=True)
class Pushed(DoubleIntegrator):
    """A double integrator in a wind that grows with k."""

    wind: float = 0.0

    def step(self, x: Tensor, u: Tensor, k: int | Tensor) -> Tensor:
        k = k[..., None] if isinstance(k, Tensor) and k.ndim else k
        return super().step(x, u + self.wind * (1 + k), k)


WINDS = (-0.5, 0.0, 1.0)
PLANT = Scenarios(tuple(Pushed(wind=wind) for wind in WINDS))


def rows(*shape: int) -> tuple[Tensor, Tensor]:
    x, u = (torch.randn(*shape, n, generator=seeded(n), dtype=torch.float64) for n in (2, 1))
    return x, u


def test_they_keep_the_contract() -> None:
    check_dynamics(PLANT, *rows(5))
    check_dynamics(scenarios(Ensemble(2, 1, 0.1, hidden=(4,), generator=seeded()).double()), *rows(5))


def test_as_many_particles_as_members_are_the_members() -> None:
    draw = PLANT.realize((3, 1, 1), 4, generator=seeded())
    x, u = rows(3, 2, 5)
    reached = draw.step(x, u, 2)
    assert reached.shape == (3, 2, 5, 2)
    for p, member in enumerate(PLANT.members):
        torch.testing.assert_close(reached[p], member.step(x[p], u[p], 2))


def test_members_are_dealt_in_equal_shares_and_kept() -> None:
    x, u = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    dealt = []
    for seed in range(20):
        draw = PLANT.realize((8, 1, 1), 4, generator=seeded(seed))
        first, later = (draw.step(x, u, k)[:, 0, 0, 1] / DoubleIntegrator().dt for k in (0, 3))
        torch.testing.assert_close(later, 4 * first)
        counts = [int(torch.isclose(first, torch.tensor(wind, dtype=torch.float64)).sum()) for wind in WINDS]
        assert sum(counts) == 8 and set(counts) == {2, 3}
        dealt.append(tuple(first.tolist()))
    assert len(set(dealt)) > 10  # who is whose is drawn


def test_rows_of_any_shape_and_steps_of_their_own() -> None:
    draw = PLANT.realize((4,), 6, generator=seeded())
    x, u = rows(4)
    k = torch.tensor([0, 5, 1, 3])
    together = draw.step(x, u, k)
    for i in range(4):
        torch.testing.assert_close(together[i], draw.step(x, u, k[i])[i])
    wide = draw.step(x[:, None], u[None, :1], 0)
    for i in range(4):
        torch.testing.assert_close(wide[i], draw.step(x[i].expand(4, 2), u[0], 0))
    single = PLANT.realize((), 6, generator=seeded())
    assert single.step(x, u, 0).shape == (4, 2) and single.output(x) is x


def test_gradients_pass() -> None:
    x, u = rows(3, 2, 1)
    u.requires_grad_()
    PLANT.realize((3, 1, 1), 1, generator=seeded()).step(x, u, 0).sum().backward()  # type: ignore[no-untyped-call]
    assert u.grad is not None and bool((u.grad != 0).all())


def test_members_of_an_ensemble_are_its_particles_without_noise() -> None:
    model = Ensemble(2, 1, 0.1, members=4, probabilistic=False, hidden=(6,), generator=seeded()).double()
    model.elites = torch.tensor([3, 0, 2])
    found = scenarios(model)
    assert [member.model.member for member in found.members] == [3, 0, 2]  # type: ignore[attr-defined]
    x, u = rows(3, 4)
    wanted = model.predict(x.reshape(-1, 2), u.reshape(-1, 1)).y_next.reshape(3, 3, 4, 2)
    reached = found.realize((3, 1), 1, generator=seeded()).step(x, u, 0)
    for p in range(3):
        torch.testing.assert_close(reached[p], wanted[p, p])
    # and the particles of TS∞ are of the same set
    drawn = TSInf(model).realize((3, 1), 1, generator=seeded()).step(x, u, 0)
    for p in range(3):
        assert any(torch.allclose(drawn[p], wanted[e, p]) for e in range(3))


def problem(**options: Any) -> Problem[Scenarios, Quadratic, Box]:
    return Problem(PLANT, Quadratic(), box(1, 2.0), 5, **options)


def test_the_worst_scenario_counts() -> None:
    x0, u = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(1, 1, 5, 1, dtype=torch.float64)
    alone = [
        float(evaluate(Problem(member, Quadratic(), box(1, 2.0), 5), member, x0, u).cost)
        for member in PLANT.members
    ]
    worst = problem(particles=3, risk=Worst())
    draw = PLANT.realize((3, 1, 1), 5, generator=seeded())
    assert float(evaluate(worst, draw, x0, u, particles=3).cost) == pytest.approx(max(alone))


@pytest.mark.parametrize("planner", PLANNERS, ids=name)
def test_sampling_planners_plan_on_them(planner: SamplingPlanner[Any]) -> None:
    check_planner(planner, problem(particles=3), torch.tensor([[1.0, 0.0], [-0.5, 0.3]], dtype=torch.float64))


def test_what_is_refused() -> None:
    with pytest.raises(ContractError, match="at least one member"):
        Scenarios(())
    with pytest.raises(ContractError, match="member 1, Noisy, must be drawn"):
        Scenarios((DoubleIntegrator(), Noisy()))  # type: ignore[arg-type]
    with pytest.raises(
        ContractError, match=r"member 0 has \(2, 1, 2, 0.2\) and member 1 has \(2, 1, 2, 0.3\)"
    ):
        Scenarios((DoubleIntegrator(), DoubleIntegrator(dt=0.3)))
