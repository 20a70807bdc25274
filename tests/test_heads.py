"""Planning by learned reward and end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mbrl.errors import ContractError
from mbrl.estimators import Observed, Padded
from mbrl.models import TS1, Ensemble, FitConfig, MomentMatching, Trainer, TSInf, WithHeads, from_heads
from mbrl.mpc import MPC
from mbrl.planners import CEM
from mbrl.problem import Box
from mbrl.risk import Mean
from mbrl.rollout import evaluate, realize

BOX = Box(-torch.ones(1), torch.ones(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line(n: int, g: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Steps on a line: reward for being near 1, over beyond -1."""
    y, u = 4 * torch.rand(n, 1, generator=g) - 2, 2 * torch.rand(n, 1, generator=g) - 1
    y_next = y + 0.3 * u
    return y, u, y_next, 2 - (y_next[:, 0] - 1.0).abs(), y_next[:, 0] < -1.0


@pytest.fixture(scope="module")
def model() -> Ensemble:
    g = seeded()
    model = Ensemble(1, 1, 0.1, members=3, hidden=(32, 32), reward=True, termination=True, generator=g)
    y, u, y_next, reward, end = line(3_000, g)
    Trainer(model, FitConfig(epochs=60, batch=64)).fit(y, u, y_next, reward, end, generator=g)
    return model


@pytest.mark.parametrize("way", [TS1, TSInf, MomentMatching])
def test_the_heads_are_those_of_each_particles_network(model: Ensemble, way: Any) -> None:
    draw = WithHeads(way(model)).realize((6, 1, 1), 2, generator=seeded(1))
    y, u = torch.linspace(-1.5, 1.5, 5)[:, None], torch.full((5, 1), 0.5)
    x_next = draw.step(torch.nn.functional.pad(y, (0, 2)).expand(6, 1, 5, 3), u, 0)
    assert x_next.shape == (6, 1, 5, 3)
    said = model.predict(y, u)
    assert said.reward is not None and said.end is not None
    asked = set()
    for particle in x_next[:, 0]:
        member = (particle[:, 1] - said.reward).abs().amax(-1).argmin()
        torch.testing.assert_close(particle[:, 1], said.reward[member], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(particle[:, 2], said.end[member], atol=1e-5, rtol=1e-4)
        asked.add(int(member))
    assert asked == {0, 1, 2}


def test_a_plan_costs_the_rewards_until_the_probable_end(model: Ensemble) -> None:
    problem = from_heads(TSInf(model), BOX, 5, particles=3)
    x0, u = torch.tensor([[0.0, 0.0, 0.0], [-0.8, 0.0, 0.0]]), torch.full((2, 1, 5, 1), -1.0)
    draw, particles = realize(problem, generator=seeded())
    cost = evaluate(problem, draw, x0, u, particles=particles).cost[:, 0]
    # From 0, at -0.3 a step: -0.3, -0.6, -0.9, -1.2 (the end counts). From -0.8: -1.1.
    wanted = torch.tensor([-(0.7 + 0.4 + 0.1 - 0.2), 0.1])
    torch.testing.assert_close(cost, wanted, atol=0.25, rtol=0.0)


def test_plans_to_the_goal_without_a_task(model: Ensemble) -> None:
    mpc = MPC(
        from_heads(TSInf(model), BOX, 6, particles=3, risk=Mean()),
        CEM(population=60, iterations=3, elites=8),
        estimator=Padded(Observed(torch.float32), 2),
        generator=seeded(),
    )
    y = torch.tensor([[-0.5]])
    for _ in range(10):
        y = y + 0.3 * mpc(y)
    assert abs(float(y) - 1.0) < 0.1


def test_needs_a_reward_head() -> None:
    plain = Ensemble(1, 1, 0.1, members=2, hidden=(4,), generator=seeded())
    with pytest.raises(ContractError, match=r"reward=True"):
        from_heads(TSInf(plain), BOX, 3)
