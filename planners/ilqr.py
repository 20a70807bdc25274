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

from mbrl.compiled import in_threads
from mbrl.errors import ContractError, UnsupportedProblem, require
from mbrl.horizon import AffinePolicy, Derivatives, Rollout, horizon_of
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Stochastic
from mbrl.rollout import follow

STATUS = (
    "the iterations ran out",
    "converged",
    "no step lowers the cost at the largest damping",
    "the derivatives are not finite",
    "no trajectory to start from stays finite",
)
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
    kept if the cost falls by more than `min_ratio` of what the model expects. Damping λ starts at 0, rises where Quu
    is not positive definite (the derivatives are kept then) or no α helps, and falls after each success. Needs
    `linearize`, `linearize_output` and, on manifolds, `retract` and `difference`.

    Attributes:
        iterations: at most; an MPC gets far with a few, since it starts from its last plan.
        damp: "state" adds λ to Vxx, which keeps near the last states; "control" adds it to Quu.
        line_search: how many α from 1 down to 0.001, evenly on a logarithmic scale.
        min_ratio: least share of the expected improvement.
        tolerance: converged where the mean over time of max |k| / (|u| + 1) is below, without damping, or where
            the cost falls by less than this share of itself squared.
        budget_ms: if set, no iteration but the first is begun after this many milliseconds. Results then depend on
            the machine.

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

    @property
    def multiple_shooting(self) -> bool:
        """Whether the states of a guess are kept, with gaps between them."""
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
        if problem.params is not None and problem.params.ndim == 3 and len(problem.params) != M:
            raise ContractError(
                f"{type(self).__name__} needs params (M, H+1, np) for M = {M} problems, "
                f"but got {tuple(problem.params.shape)}."
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
        states = x[:, None].repeat(1, H + 1, 1)
        if self.multiple_shooting and guess is not None and guess.states is not None:
            if guess.states.shape != states.shape or not torch.isfinite(guess.states).all():
                raise ContractError(
                    f"{type(self).__name__} needs a guess with finite states (M, H+1, nx) = {tuple(states.shape)}, "
                    f"but got {tuple(guess.states.shape)}."
                )
            states[:, 1:] = guess.states[:, 1:].to(x)
        return ILQRState(
            actions=actions,
            states=states,
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
        for i in range(self.iterations):
            if not len(search.active):
                break
            if i and self.budget_ms is not None and time.perf_counter() - started > 1e-3 * self.budget_ms:
                break
            search.iterate()
        search.close()
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


@dataclass(frozen=True, kw_only=True)
class FDDP(ILQR):
    """ILQR that starts from a guess of the states: they need not follow from the controls.

    The gaps f(x̄ₜ, ūₜ) ⊖ x̄ₜ₊₁ enter the backward sweep, and a step α closes the share α of each. Steps are compared by
    the cost plus a price for what is left of the gaps. A guess of states avoids the local optima, and the exploding
    rollouts, that a guess of controls leads to. `Plan.actions` are rolled out in the end, so the plan has no gaps.

    The states are those of the `guess` given to `init`, without one x0 at all times, and those of the last plan
    afterwards.

    Reference: Giftthaler et al. 2018, "A family of iterative Gauss-Newton shooting methods"; Mastalli et al. 2020,
        "Crocoddyl", section IV.
    Differs: an exact penalty for gaps (Nocedal & Wright 2006, section 18.3) in place of a sign of the expected change.
    """

    @property
    def multiple_shooting(self) -> bool:
        return True


class _Search:
    """One call of `plan`: M problems, each with its own damping, step and end."""

    def __init__(self, planner: ILQR, problem: Problem[Any, Any, Box], x0: Tensor, state: ILQRState):
        from mbrl.planners import sweeps  # the compiler takes a second to import

        self.planner, self.problem, self.given, self.sweeps = planner, problem, state, sweeps
        self.horizon, self.x0 = horizon_of(problem), _array(x0)
        M, H, nu = state.actions.shape
        self.policy = AffinePolicy(
            x=_array(state.states).copy(),
            u=_array(state.actions).copy(),
            k=np.zeros((M, H, nu)),
            K=_array(state.K).copy(),
            gap=np.zeros((M, 0, state.K.shape[-1])),
            low=_array(problem.actions.low.double()),
            high=_array(problem.actions.high.double()),
        )
        self.progress = sweeps.Progress(
            cost=np.full(M, np.inf),
            damping=_array(state.damping).copy(),
            growth=_array(state.growth).copy(),
            status=np.zeros(M, dtype=np.int64),
            iterations=np.zeros(M, dtype=np.int64),
            slope=np.full(M, np.nan),
            gain=np.zeros((M, 2)),
            price=np.zeros(M),
        )
        self.costs: list[np.ndarray] = []
        self.alphas = np.logspace(0, -3, planner.line_search) if planner.line_search > 1 else np.ones(1)
        self.model_steps = np.zeros(M, dtype=np.int64)

    @property
    def active(self) -> np.ndarray:
        """The rows (n,) that are not done."""
        return np.flatnonzero(self.progress.status == self.sweeps.ONGOING)

    def begin(self) -> None:
        """The trajectory to start from: the given controls with or without feedback, or less of them."""
        policy = self.policy
        every = np.arange(len(self.x0))
        if self.planner.multiple_shooting:
            policy.x[:, 0] = self.x0
            self.policy = policy = policy._replace(gap=self._gaps())
            self.progress.cost[:] = self._cost_with_gaps()
            lost = np.isinf(self.progress.cost)
            policy.gap[lost] = 0.0  # the states are no guess: roll out
            if not lost.any():
                self.costs.append(self.progress.cost.copy())
                return
            every = np.flatnonzero(lost)
        self._keep(every, self._roll(every, np.zeros(2), np.array([0.0, 1.0])))
        lost = np.flatnonzero(np.isinf(self.progress.cost))
        if len(lost):  # α from 1 to 0 leads from the given controls to none
            middle = np.clip(np.zeros_like(policy.u[lost]), policy.low, policy.high)
            given = policy.u[lost]
            policy.k[lost], policy.u[lost] = given - middle, middle
            less = np.append(np.logspace(0, -3, 11), 0.0)
            self._keep(lost, self._roll(lost, less, np.zeros(len(less))))
            policy.k[lost] = 0.0
            nowhere = np.isinf(self.progress.cost[lost])
            policy.u[lost[nowhere]] = given[nowhere]
        self.progress.status[np.isinf(self.progress.cost)] = self.sweeps.NOWHERE
        self.costs.append(self.progress.cost.copy())

    def iterate(self) -> None:
        """One step of all rows that are not done."""
        planner, policy, progress, rows = self.planner, self.policy, self.progress, self.active
        D = self.horizon.expand(policy, rows, exact=planner.exact)
        # However it was found, a Jacobian counts as the steps of forward differences.
        self.model_steps[rows] += policy.u.shape[1] * (policy.K.shape[-1] + policy.u.shape[-1])
        self._backward(rows, D)
        rows = rows[progress.status[rows] == self.sweeps.ONGOING]
        if len(rows):
            progress.iterations[rows] += 1
            self._step(rows)
        self.costs.append(progress.cost.copy())

    def _backward(self, rows: np.ndarray, D: Derivatives) -> None:
        """New gains of the rows, or an end of their search."""
        damp_state, tolerance = self.planner.damp == "state", self.planner.tolerance

        def part(start: int, stop: int) -> None:
            self.sweeps.backward(start, stop, rows, D, self.policy, self.progress, damp_state, tolerance)

        in_threads(part, len(rows), steps=len(rows) * self.policy.u.shape[1])

    def _step(self, rows: np.ndarray) -> None:
        """Line search: the full step where it does what is expected of it, else the best of all α."""
        searched = len(self.alphas) > 1
        good = max(_GOOD, self.planner.min_ratio) if searched else self.planner.min_ratio
        rest = self._try(rows, self.alphas[:1], good, last=not searched)
        if searched and len(rest):
            self._try(rest, self.alphas, self.planner.min_ratio, last=True)

    def _try(self, rows: np.ndarray, alphas: np.ndarray, ratio: float, *, last: bool) -> np.ndarray:
        result = self._roll(rows, alphas, np.ones_like(alphas))
        left: np.ndarray = self.sweeps.accept(
            rows, alphas, result, ratio, self.planner.tolerance, last, self.policy, self.progress
        )
        return left

    def _gaps(self) -> np.ndarray:
        """(M, H, ndx), from where each state is to where the step before leads."""
        dynamics = self.problem.dynamics
        x, u = torch.from_numpy(self.policy.x), torch.from_numpy(self.policy.u)
        reached = dynamics.step(x[:, :-1], u, torch.arange(u.shape[1]))
        difference = getattr(dynamics, "difference", lambda a, b: b - a)
        return _array(difference(x[:, 1:], reached).nan_to_num(nan=0.0))

    def _cost_with_gaps(self) -> np.ndarray:
        """(M,), of the states as they are; a rollout from gap to gap would let rounding grow."""
        x, u = torch.from_numpy(self.policy.x), torch.from_numpy(self.policy.u)
        result = follow(
            self.problem,
            self.problem.dynamics,
            x[:, None, 0],
            lambda t, _: u[:, None, t],
            horizon=u.shape[1],
            jump=lambda t, _: x[:, None, t + 1],
        )
        return _array(result.cost[:, 0]).copy()

    def close(self) -> None:
        """Roll out what has gaps left, so that the plan is one of states that will be met."""
        policy, progress = self.policy, self.progress
        open_ = np.flatnonzero(np.abs(policy.gap).sum((1, 2)) > 0)
        if len(open_):
            policy.gap[open_] = 0.0
            policy.k[open_] = 0.0
            progress.cost[open_] = np.inf
            self._keep(open_, self._roll(open_, np.zeros(2), np.array([0.0, 1.0])))
            nowhere = open_[np.isinf(progress.cost[open_])]
            progress.status[nowhere] = self.sweeps.NOWHERE

    def _roll(self, rows: np.ndarray, alphas: np.ndarray, feedback: np.ndarray) -> Rollout:
        """The closed loop from x0 for each α and share of feedback."""
        self.model_steps[rows] += len(alphas) * self.policy.u.shape[1]
        return self.horizon.roll(self.x0, self.policy, alphas, feedback, rows)

    def _keep(self, rows: np.ndarray, result: Rollout) -> None:
        """Take over the cheapest candidate of each row, where it is finite."""
        best = result.cost.argmin(1)
        for i, (r, b) in enumerate(zip(rows, best, strict=True)):
            if np.isfinite(result.cost[i, b]):
                self.progress.cost[r] = result.cost[i, b]
                self.policy.x[r], self.policy.u[r] = result.states[i, b], result.actions[i, b]

    def plan(self, x0: Tensor) -> Plan:
        progress, policy = self.progress, self.policy
        actions = torch.from_numpy(policy.u).to(x0)
        states, K = torch.from_numpy(policy.x).to(x0), torch.from_numpy(policy.K).to(x0)
        info: dict[str, Tensor | float | int | str] = {
            "status": torch.from_numpy(progress.status),
            "certified": torch.from_numpy(progress.status == self.sweeps.CONVERGED),
            "iterations": torch.from_numpy(progress.iterations),
            "damping": torch.from_numpy(progress.damping),
            "slope": torch.from_numpy(progress.slope),
            "costs": torch.from_numpy(np.stack(self.costs, 1)),
            "model_steps": torch.from_numpy(self.model_steps),
        }
        return Plan(
            actions=self.problem.actions.clip(actions),
            cost=torch.from_numpy(progress.cost).to(x0),
            states=torch.cat([x0[:, None], states[:, 1:]], 1),
            K=K,
            info=info,
        )

    def state(self) -> ILQRState:
        progress, policy = self.progress, self.policy
        K = policy.K.copy()
        if not np.isfinite(progress.cost).all():
            K = np.where(np.isfinite(progress.cost)[:, None, None, None], K, _array(self.given.K))
        stuck = progress.status == self.sweeps.STUCK  # the next plan must not begin with such a damping
        return ILQRState(
            actions=torch.from_numpy(policy.u),
            states=torch.from_numpy(policy.x),
            K=torch.from_numpy(K),
            damping=torch.from_numpy(np.where(stuck, 0.0, progress.damping)),
            growth=torch.from_numpy(np.where(stuck, 1.0, progress.growth)),
        )


def _array(v: Tensor) -> np.ndarray:
    return np.ascontiguousarray(v.numpy())
