"""Iterative LQR and differential dynamic programming: Newton's method along a trajectory, with feedback."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnsupportedProblem, require
from mbrl.horizon import AffinePolicy, Rollout, horizon_of
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Stochastic
from mbrl.quadratize import Expansion

STATUS = (
    "the iterations ran out",
    "converged",
    "no step lowers the cost at the largest damping",
    "the derivatives are not finite",
    "no trajectory to start from stays finite",
)
_FACTOR, _LEAST, _MOST = 1.6, 1e-6, 1e10  # of the schedule of the damping λ
_GOOD = 0.25  # share of the expected improvement at which the full step is taken without trying others


@dataclass(frozen=True)
class ILQRState:
    """What is carried from one plan to the next.

    Attributes:
        actions: (M, H, nu), the controls to start from.
        states: (M, H+1, nx), where they led; with K, what to correct deviations from.
        K: (M, H, nu, ndx), feedback gains; zeros before the first plan.
        damping, growth: (M,), λ and the factor that it last changed by.
    """

    actions: Tensor
    states: Tensor
    K: Tensor
    damping: Tensor
    growth: Tensor


@dataclass(frozen=True, kw_only=True)
class ILQR:
    """A local optimum by sweeps of LQR about the last trajectory, within box limits, with feedback gains.

    Backward, δu = k + K δx minimises a quadratic model of the cost-to-go; forward, the controls
    clip(ū + α k + K (x ⊖ x̄)) are tried with α = 1 and, where that disappoints, with all α at once; the cheapest is
    kept if the cost falls by more than `min_ratio` of what the model expects. Damping λ starts at 0, rises where Quu is not positive definite or no α
    helps (the derivatives are kept then), and falls after each success. Needs `linearize`, `linearize_output` and,
    on manifolds, `retract` and `difference`.

    Attributes:
        iterations: at most; an MPC gets far with a few, since it starts from its last plan.
        damp: "state" adds λ to Vxx, which keeps near the last states; "control" adds it to Quu.
        line_search: how many α from 1 down to 0.001, evenly on a logarithmic scale.
        min_ratio: least share of the expected improvement.
        tolerance: converged where the mean over time of max |k| / (|u| + 1) is below, without damping, or where
            the cost falls by less than this share of itself squared.
        budget_ms: if set, no iteration is begun after this many milliseconds. Results then depend on the machine.

    Reference: Tassa, Erez & Todorov 2012, "Synthesis and stabilization of complex behaviors through online
        trajectory optimization"; Tassa, Mansard & Todorov 2014, "Control-limited differential dynamic programming".
    Differs: λ starts at 0; the best of all α in one batch instead of the first that will do; many problems at once.
    """

    iterations: int = 100
    damp: Literal["state", "control"] = "control"
    line_search: int = 11
    min_ratio: float = 0.0
    tolerance: float = 1e-6
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.iterations < 1 or self.line_search < 1:
            raise ContractError(
                f"{name} needs iterations and line_search ≥ 1, but got {self.iterations} and {self.line_search}."
            )
        if not (0 <= self.min_ratio < 1 and 0 <= self.tolerance < 1):
            raise ContractError(
                f"{name} needs min_ratio and tolerance in [0, 1), but got {self.min_ratio} and {self.tolerance}."
            )
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(
                f"{name} needs a finite budget_ms above 0, or None, but got {self.budget_ms}."
            )

    @property
    def exact(self) -> bool:
        """Whether second derivatives of the dynamics are used."""
        return False

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        name, dynamics = type(self).__name__, problem.dynamics
        if not isinstance(problem.actions, Box):
            raise UnsupportedProblem(
                f"{name} needs Box actions, but {type(problem.actions).__name__} was given. "
                "Use a tree search for discrete actions."
            )
        if isinstance(dynamics, Stochastic):
            raise UnsupportedProblem(
                f"{name} needs deterministic dynamics, but {type(dynamics).__name__} must be drawn first. "
                "Plan on the mean of an ensemble: MeanDynamics(ensemble)."
            )
        remedy = "Wrap it: Autodiff(dynamics) if it is written in torch, else FiniteDifference(dynamics)."
        require(name, "dynamics", dynamics, ("step", "linearize", "linearize_output"), remedy)
        if self.exact:
            remedy = "Wrap it: Autodiff(dynamics), if it is written in torch; else use ILQR."
            require(name, "dynamics", dynamics, ("curvature", "curvature_output"), remedy)
        if problem.constraints:
            raise UnsupportedProblem(
                f"{name} does not hold constraints. Put it into a planner that does: "
                f"AugmentedLagrangian(inner={name}())."
            )

    def init(
        self, problem: Problem[Any, Any, Box], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> ILQRState:
        M, H, nu = x0.shape[0], problem.horizon, problem.actions.nu
        if x0.ndim != 2 or x0.shape[1] != problem.dynamics.nx:
            raise ContractError(
                f"{type(self).__name__} needs x0 (M, nx) = (M, {problem.dynamics.nx}), but got {tuple(x0.shape)}."
            )
        x = x0.double()
        actions = problem.actions.clip(x.new_zeros(M, H, nu))
        if guess is not None:
            if tuple(guess.actions.shape) != (M, H, nu):
                raise ContractError(
                    f"{type(self).__name__} needs a guess with actions (M, H, nu) = {(M, H, nu)}, "
                    f"but got {tuple(guess.actions.shape)}."
                )
            actions = problem.actions.clip(guess.actions.to(x))
        ndx = getattr(problem.dynamics, "ndx", problem.dynamics.nx)
        return ILQRState(
            actions=actions,
            states=x[:, None].repeat(1, H + 1, 1),
            K=x.new_zeros(M, H, nu, ndx),
            damping=x.new_zeros(M),
            growth=x.new_ones(M),
        )

    def shift(self, state: ILQRState, actions_taken: Tensor, x_now: Tensor) -> ILQRState:
        n = actions_taken.shape[-2]

        def moved(v: Tensor) -> Tensor:
            return torch.cat([v[:, n:], v[:, -1:].expand(-1, min(n, v.shape[1]), *v.shape[2:])], 1)

        K = torch.cat([state.K[:, n:], torch.zeros_like(state.K[:, :n])], 1)
        return dataclasses.replace(state, actions=moved(state.actions), states=moved(state.states), K=K)

    @torch.no_grad()
    def plan(
        self, problem: Problem[Any, Any, Box], x0: Tensor, state: ILQRState, *, generator: Generator
    ) -> tuple[Plan, ILQRState]:
        if not torch.isfinite(x0).all():
            raise ContractError(
                f"{type(self).__name__} needs finite states, but x0 (M, nx) = {tuple(x0.shape)} holds NaN or inf."
            )
        started = time.perf_counter()
        search = _Search(self, problem, x0.double(), state)
        search.begin()
        for _ in range(self.iterations):
            if not search.active.any():
                break
            if self.budget_ms is not None and time.perf_counter() - started > 1e-3 * self.budget_ms:
                break
            search.iterate()
        return search.plan(x0), search.state()


@dataclass(frozen=True, kw_only=True)
class DDP(ILQR):
    """ILQR with the curvature of the dynamics: converges quadratically near an optimum.

    Where the exact Quu of a step is not positive definite, that step falls back to Gauss-Newton. Needs `curvature`,
    which `Autodiff` has. In networks of ReLU it is 0 almost everywhere, and DDP is ILQR.

    Reference: Mayne 1966; Jacobson & Mayne 1970; Tassa et al. 2014. The term Vₓ·f as in Nganga & Wensing 2021.
    """

    @property
    def exact(self) -> bool:
        return True


class _Search:
    """The rows of one call of `plan`: M problems, each with its own damping, step and end."""

    def __init__(self, planner: ILQR, problem: Problem[Any, Any, Box], x0: Tensor, state: ILQRState):
        self.planner, self.problem, self.x0, self.given = planner, problem, x0, state
        self.horizon = horizon_of(problem)
        M, H, nu = state.actions.shape
        self.u, self.x, self.K = state.actions.clone(), state.states.clone(), state.K.clone()
        self.k = x0.new_zeros(M, H, nu)
        self.damping, self.growth = state.damping.clone(), state.growth.clone()
        self.cost = x0.new_full((M,), torch.inf)
        self.status = torch.zeros(M, dtype=torch.long)
        self.iterations = torch.zeros(M, dtype=torch.long)
        self.slope = x0.new_full((M,), torch.nan)
        self.costs: list[Tensor] = []
        self.low, self.high = problem.actions.low.to(x0), problem.actions.high.to(x0)
        self.alphas = (
            torch.logspace(0, -3, planner.line_search).to(x0) if planner.line_search > 1 else x0.new_ones(1)
        )
        self.model_steps = 0

    @property
    def active(self) -> Tensor:
        return self.status == 0

    def begin(self) -> None:
        """The trajectory to start from: the given controls with or without feedback, or less of them."""
        every = torch.arange(len(self.x0))
        self._keep(every, self._roll(every, self.x0.new_zeros(2), self.x0.new_tensor([0.0, 1.0])))
        lost = torch.isinf(self.cost).nonzero()[:, 0]
        if len(lost):  # α from 1 to 0 leads from the given controls to none
            middle = self.problem.actions.clip(torch.zeros_like(self.u[lost]))
            self.k[lost], self.u[lost] = self.u[lost] - middle, middle
            self._keep(lost, self._roll(lost, self.alphas, self.x0.new_zeros(len(self.alphas))))
            self.k[lost] = 0.0
            nowhere = torch.isinf(self.cost)
            self.u[nowhere] = self.given.actions[nowhere]
        self.status[torch.isinf(self.cost)] = 4
        self.costs.append(self.cost.clone())

    def iterate(self) -> None:
        """One step of all rows that are not done."""
        rows = self.active.nonzero()[:, 0]
        expansion = self._expand(rows)
        bad = ~_finite(expansion)
        self.status[rows[bad]] = 3
        rows, expansion = rows[~bad], _select(expansion, ~bad)
        gain = self._backward(rows, expansion)
        slope = (self.k[rows].abs() / (self.u[rows].abs() + 1)).amax(-1).mean(-1)
        self.slope[rows] = slope
        going = self.active[rows]
        done = going & (slope < self.planner.tolerance) & (self.damping[rows] < 1e-5)
        self.status[rows[done]] = 1
        going = going & ~done
        rows, gain = rows[going], gain[going]
        if len(rows):
            self.iterations[rows] += 1
            self._forward(rows, gain)
        self.costs.append(self.cost.clone())

    def _expand(self, rows: Tensor) -> Expansion:
        return self.horizon.expand(self.x[rows], self.u[rows], rows, exact=self.planner.exact)

    def _backward(self, rows: Tensor, expansion: Expansion) -> Tensor:
        """Gains of the rows, at the first damping at which their sweep succeeds; returns (n, 2), see `backward`."""
        from mbrl.planners import sweeps  # the compiler takes a second to import

        gain = torch.zeros(len(rows), 2, dtype=torch.float64)
        todo = torch.arange(len(rows))
        while len(todo):
            at = rows[todo]
            E = _select(expansion, todo)
            n, ndx = len(at), E.lx.shape[-1]
            k, K, got = self.k[at].clone(), torch.zeros_like(self.K[at]), torch.zeros(n, 2).double()
            value = np.empty((n, ndx + ndx**2))
            fzz = E.lx.new_zeros(n, 0, 1, 1, 1) if E.fzz is None else E.fzz
            excess = E.lx.new_zeros(n, 0, 1, 1) if E.excess is None else E.excess
            sweep = sweeps.backward if n < 8 else sweeps.backward_parallel
            stopped = sweep(
                fx=_array(E.fx),
                fu=_array(E.fu),
                lx=_array(E.lx),
                lu=_array(E.lu),
                lxx=_array(E.lxx),
                luu=_array(E.luu),
                lux=_array(E.lux),
                excess=_array(excess),
                fzz=_array(fzz),
                low=_array(self.low - self.u[at]),
                high=_array(self.high - self.u[at]),
                damping=_array(self.damping[at]),
                damp_state=self.planner.damp == "state",
                k=k.numpy(),
                K=K.numpy(),
                gain=got.numpy(),
                value=value,
            )
            failed = torch.from_numpy(stopped >= 0)
            self.k[at[~failed]], self.K[at[~failed]] = k[~failed], K[~failed]
            gain[todo[~failed]] = got[~failed]
            todo = todo[failed]
            self._raise(rows[todo])
            todo = todo[self.active[rows[todo]]]
        return gain

    def _forward(self, rows: Tensor, gain: Tensor) -> None:
        """Line search: the full step where it does what is expected of it, else the best of all α."""
        found = self._try(rows, gain, self.alphas[:1], max(_GOOD, self.planner.min_ratio))
        rest = ~found
        if rest.any():
            found[rest] = self._try(rows[rest], gain[rest], self.alphas, self.planner.min_ratio)
        # At an optimum no step lowers the cost any more, by rounding.
        settled = ~found & (-gain.sum(1) <= 1e-12 * self.cost[rows].abs().clamp(min=1e-300))
        self.status[rows[settled]] = 1
        self._raise(rows[~found & ~settled])

    def _try(self, rows: Tensor, gain: Tensor, alphas: Tensor, ratio: float) -> Tensor:
        """Take the cheapest α whose cost falls by `ratio` of what is expected; return where there is one, (n,)."""
        result = self._roll(rows, alphas, torch.ones_like(alphas))
        before = self.cost[rows]
        fall = before[:, None] - result.cost
        expected = -(alphas * gain[:, :1] + alphas**2 * gain[:, 1:])
        enough = (fall > 0) & (fall >= ratio * expected) & torch.isfinite(result.cost)
        found, best = enough.any(1), torch.where(enough, result.cost, torch.inf).argmin(1)
        self._keep(rows[found], _rows(result, found), best[found])
        small = fall[torch.arange(len(rows)), best] <= self.planner.tolerance**2 * before.abs()
        self._lower(rows[found])
        self.status[rows[found & small & (self.damping[rows] < 1e-5)]] = 1
        return found

    def _roll(self, rows: Tensor, alphas: Tensor, feedback: Tensor) -> Rollout:
        """The closed loop from x0 for each α and share of feedback, (n, B)."""
        policy = AffinePolicy(self.x[rows], self.u[rows], self.k[rows], self.K[rows], self.low, self.high)
        self.model_steps += len(rows) * len(alphas) * self.u.shape[1]
        return self.horizon.roll(self.x0[rows], policy, alphas, feedback, rows)

    def _keep(self, rows: Tensor, result: Rollout, which: Tensor | None = None) -> None:
        """Take over candidate `which` (n,) of each row, the cheapest unless given, where it is finite."""
        which = result.cost.argmin(1) if which is None else which
        pick = torch.arange(len(rows)), which
        cost = result.cost[pick]
        fine = torch.isfinite(cost)
        at = rows[fine]
        self.cost[at], self.x[at], self.u[at] = (
            cost[fine],
            result.states[pick][fine],
            result.actions[pick][fine],
        )

    def _raise(self, rows: Tensor) -> None:
        self.growth[rows] = (self.growth[rows] * _FACTOR).clamp(min=_FACTOR)
        self.damping[rows] = (self.damping[rows] * self.growth[rows]).clamp(min=_LEAST)
        self.status[rows[self.damping[rows] > _MOST]] = 2

    def _lower(self, rows: Tensor) -> None:
        self.growth[rows] = (self.growth[rows] / _FACTOR).clamp(max=1 / _FACTOR)
        damping = self.damping[rows] * self.growth[rows]
        self.damping[rows] = torch.where(damping > _LEAST, damping, 0.0)

    def plan(self, x0: Tensor) -> Plan:
        u = self.u.to(x0)
        low, high = self.problem.actions.low.to(x0), self.problem.actions.high.to(x0)
        info: dict[str, Tensor | float | int | str] = {
            "status": self.status,
            "iterations": self.iterations,
            "damping": self.damping,
            "slope": self.slope,
            "costs": torch.stack(self.costs, 1),
            "model_steps": self.model_steps,
        }
        return Plan(
            actions=torch.maximum(torch.minimum(u, high), low),
            cost=self.cost.to(x0),
            states=torch.cat([x0[:, None], self.x[:, 1:].to(x0)], 1),
            K=self.K.to(x0),
            info=info,
        )

    def state(self) -> ILQRState:
        fine = torch.isfinite(self.cost)
        K = torch.where(fine[:, None, None, None], self.K, self.given.K)
        stuck = self.status == 2  # do not begin the next plan with a damping that allows no step
        return ILQRState(
            actions=self.u,
            states=self.x,
            K=K,
            damping=torch.where(stuck, 0.0, self.damping),
            growth=torch.where(stuck, 1.0, self.growth),
        )


def _rows(result: Rollout, rows: Tensor) -> Rollout:
    return Rollout(result.cost[rows], result.states[rows], result.actions[rows])


def _select(expansion: Expansion, rows: Tensor) -> Expansion:
    fields = ((f.name, getattr(expansion, f.name)) for f in dataclasses.fields(expansion))
    return dataclasses.replace(expansion, **{name: v[rows] for name, v in fields if v is not None})


def _finite(expansion: Expansion) -> Tensor:
    """(M,), whether every derivative is finite."""
    fields = (getattr(expansion, f.name) for f in dataclasses.fields(expansion))
    return torch.stack([torch.isfinite(v.flatten(1).sum(1)) for v in fields if v is not None]).all(0)


def _array(v: Tensor) -> Any:
    return np.ascontiguousarray(v.numpy())
