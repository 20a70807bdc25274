"""Episodes in the true world, several at once, and whether plans came true."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbrl.envs import World
from mbrl.mpc import MPC
from mbrl.problem import Problem
from mbrl.protocols import Policy
from mbrl.rollout import evaluate


@dataclass(frozen=True)
class Episode:
    """One episode of T steps. What is not known of a step is NaN.

    Attributes:
        seed: of the environment's reset.
        states: (T+1, nx), of the simulator.
        actions: (T, nu).
        rewards: (T,); that of a step that diverged is NaN and no part of the return.
        terminated, truncated, diverged: how it ended.
        planned: (T,), the return over the horizon that the plan begun at a step expects of its actions.
        realised: (T,), what the same actions earn in the plant.
        plan_ms: (T,), of the plan begun at a step, for all episodes that were planned together.
        model_steps: (T,), what it cost, in steps of the model.
        certified: (T,), 1 where the planner says that it found an optimum, 0 where it says that it did not.
        fallbacks: how many plans could not be followed.
    """

    seed: int
    states: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: bool
    truncated: bool
    diverged: bool
    planned: Tensor
    realised: Tensor
    plan_ms: Tensor
    model_steps: Tensor
    certified: Tensor
    fallbacks: int

    @property
    def total(self) -> float:
        """The undiscounted return."""
        return float(self.rewards.nansum())


@dataclass
class _Trace:
    states: list[Tensor]
    rows: list[list[float]]
    actions: list[Tensor]
    end: tuple[bool, bool, bool] = (False, False, False)
    fallbacks: int = 0


def run_episodes(
    world: World,
    policy: Policy,
    seeds: Sequence[int],
    *,
    steps: int,
    audit_every: int = 1,
    threads: int = 1,
) -> list[Episode]:
    """An episode for each seed, all M stepped together; one that has ended waits for the others in its last state.

    The environment's reset is all that a seed decides, so policies meet the same starts.

    Args:
        policy: acts for M worlds at once; of an `MPC` it is recorded how planning went.
        steps: at most.
        audit_every: plans of every so many steps are also tried in the plant, from the true state; 0 for none.
        threads: of that simulation.
    """
    envs = [world.make() for _ in seeds]
    traces, shown = [], []
    for env, seed in zip(envs, seeds, strict=True):
        obs, info = env.reset(seed=int(seed))
        traces.append(_Trace([torch.as_tensor(info["state"])], [], []))
        shown.append(torch.as_tensor(np.asarray(obs)))
    plant: Any = None
    if isinstance(policy, MPC) and audit_every:
        plant = dataclasses.replace(
            policy.problem, dynamics=world.dynamics(threads=threads), constraints=(), particles=1
        )
    for k in range(steps):
        if all(any(trace.end) for trace in traces):
            break
        x = torch.stack([trace.states[-1] for trace in traces])
        actions = policy(torch.stack(shown), {"state": x})
        planning = _planning(policy, plant if audit_every and k % audit_every == 0 else None, x)
        for i, (env, trace) in enumerate(zip(envs, traces, strict=True)):
            if any(trace.end):
                continue
            obs, reward, terminated, truncated, info = env.step(actions[i].numpy().astype(np.float32))
            trace.end = bool(terminated), bool(truncated), bool(info["diverged"])
            trace.actions.append(actions[i])
            trace.rows.append(
                [float("nan") if info["diverged"] else float(reward), *planning[i, :-1].tolist()]
            )
            trace.fallbacks += int(planning[i, -1])
            trace.states.append(torch.as_tensor(info["state"]))
            shown[i] = torch.as_tensor(np.asarray(obs))
    for env in envs:
        env.close()
    return [_episode(int(seed), trace) for seed, trace in zip(seeds, traces, strict=True)]


def _planning(policy: Policy, plant: Problem[Any, Any, Any] | None, x: Tensor) -> Tensor:
    """(M, 6): planned, realised, plan_ms, model_steps, certified and fallback of the plan just begun."""
    nothing = torch.full((len(x), 6), torch.nan, dtype=torch.float64)
    nothing[:, -1] = 0.0
    report = policy.report if isinstance(policy, MPC) else None
    if report is None or report.begun is None:
        return nothing
    plan, found = report.begun, nothing
    found[:, 0] = -plan.cost
    found[:, 2] = report.plan_ms
    found[:, 3] = torch.as_tensor(plan.info.get("model_steps", torch.nan))
    certified = plan.info.get("certified")
    if certified is not None:
        found[:, 4] = torch.as_tensor(certified).double()
    found[:, 5] = report.fallback.double()
    if plant is not None:
        found[:, 1] = -evaluate(plant, plant.dynamics, x, plan.actions[:, None].to(x)).cost[:, 0]
    return found


def _episode(seed: int, trace: _Trace) -> Episode:
    columns = torch.tensor(trace.rows, dtype=torch.float64).reshape(len(trace.rows), 6)
    rewards, planned, realised, plan_ms, model_steps, certified = columns.unbind(1)
    terminated, truncated, diverged = trace.end
    return Episode(
        seed=seed,
        states=torch.stack(trace.states),
        actions=torch.stack(trace.actions),
        rewards=rewards,
        terminated=terminated,
        truncated=truncated,
        diverged=diverged,
        planned=planned,
        realised=realised,
        plan_ms=plan_ms,
        model_steps=model_steps,
        certified=certified,
        fallbacks=trace.fallbacks,
    )
