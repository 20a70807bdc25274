"""Nonlinear model predictive control: a problem with constraints as one sparse nonlinear program, built once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import casadi
import numpy as np
import torch
from torch import Generator, Tensor

from mbrl.errors import ContractError, UnknownName, UnsupportedProblem, require
from mbrl.expressions import Expression
from mbrl.planners.buffered import Array
from mbrl.planners.nlp import OptimalControl
from mbrl.planners.nlp_solver import QP, Solution, SolverName
from mbrl.planners.nmpc_program import NMPCProgram, Roll, Settings, nmpc_program
from mbrl.planners.transcription import Transcription
from mbrl.problem import Box, Plan, Problem
from mbrl.protocols import Stochastic

STATUS = (
    "optimal",
    "not optimal, but what must hold holds",
    "what must hold does not hold",
    "not finite",
)
"""The meaning of `Plan.info["status"]`; plans of the last two cost inf and are not followed."""


@dataclass(frozen=True)
class NMPCState:
    """What is carried from one plan to the next, by stages k = 0 … H; S branches, 1 but for scenarios.

    Attributes:
        states: (M, H+1, S·nx).
        rest: (M, H+1, n), what else a stage has: controls and other variables, then the multipliers of the bounds of all
            its variables, and of its constraints.
    """

    states: Tensor
    rest: Tensor


@dataclass(frozen=True)
class _Found:
    """What came of one problem.

    Attributes:
        status, why: an index into `STATUS`, and the reason where it is not 0.
        actions: (H, nu). states: (H+1, nx).
        cost: (S,), of each branch; inf where the plan is not to be followed.
        carried: z, the multipliers of its bounds and of g, and a 0: to start from next time.
    """

    status: int
    why: str
    actions: Array
    states: Array
    cost: Array
    carried: Array
    objective: float = math.nan
    violation: float = math.nan
    gap: float = math.nan
    iterations: int = 0


@dataclass(frozen=True, kw_only=True)
class NMPC:
    """A local optimum of a constrained problem by direct transcription and a sparse solver, in float64.

    Dynamics must be a CasADi expression (`Symbolic`, `Exported`). The program is built once per structure: x0, params,
    bounds and weights of networks are its arguments. Each plan starts from the last one, with its multipliers.

    Attributes:
        transcription: "shooting", the model's own step between the nodes; "radau" or "legendre" collocation, or
            "hermite-simpson", of dynamics that are an ODE. The last has a free control in the middle of each step, where
            path constraints that a control enters hold too; where a fast control can exploit Simpson's rule it may end
            below the true optimum, so compare it with another one.
        degree: of the collocation polynomials.
        solver: "fatrop" follows the structure in time; "ipopt"; or "sqp", whose steps are quadratic programs.
        qp: what solves those.
        hessian: "exact", or "gauss-newton": without second derivatives of dynamics and constraints.
        iterations: at most. "sqp" with 1 is the real-time iteration: one step towards the optimum per plan.
        tolerance: of the conditions of optimality.
        feasible: by how much a plan that is not optimal may violate a hard constraint, in its units, and be followed.
        final_time: shortest and longest duration in s of the whole horizon, which becomes a variable then: for open-loop
            plans. Their steps last `info["final_time"]` / H instead of dt; `cost` is the objective then, and `states` are
            those of the program.
        generate_code: compile the program's functions as C code, where there is a compiler; kept on disk. It pays for
            networks; expressions of scalars are as fast interpreted.
        budget_ms: if set, no iteration is begun after this many milliseconds; not with fatrop, which cannot be stopped.
            Results then depend on the machine.

    `Plan.actions` are held for a step each: of "hermite-simpson", whose controls are quadratic in time, they are means.
    `Plan.cost` is that of these actions by the model's own step, without penalties. `info` has "objective" (M,), the
    optimum of the program, with penalties and its own quadrature; "violation" (M,), the largest of a hard constraint
    along `Plan.states`, which a collocation, optimal at its own points, may have as well; "gap" (M,), the largest by
    which the program's equations are violated; "status" (M,), an index into `STATUS`; "explanation", which constraints
    are violated where, or "".

    Reference: Rawlings, Mayne & Diehl 2017, "Model predictive control", chapter 8; Diehl, Bock & Schlöder 2005, "A
        real-time iteration scheme for nonlinear optimization in optimal feedback control".
    """

    transcription: Transcription = "shooting"
    degree: int = 3
    solver: SolverName = "fatrop"
    qp: QP = "qrqp"
    hessian: Literal["exact", "gauss-newton"] = "exact"
    iterations: int = 200
    tolerance: float = 1e-6
    feasible: float = 1e-3
    final_time: tuple[float, float] | None = None
    generate_code: bool = False
    budget_ms: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for option, kind in (("transcription", Transcription), ("solver", SolverName), ("qp", QP)):
            if getattr(self, option) not in get_args(kind):
                raise UnknownName(option, str(getattr(self, option)), get_args(kind))
        if self.hessian not in ("exact", "gauss-newton"):
            raise UnknownName("hessian", str(self.hessian), ("exact", "gauss-newton"))
        if self.iterations < 1 or not 1 <= self.degree <= 9:
            raise ContractError(
                f"{name} needs iterations ≥ 1 and a degree of 1 to 9, but got {self.iterations} and {self.degree}."
            )
        if not (0 < self.tolerance < 1 and self.feasible >= 0):
            raise ContractError(
                f"{name} needs a tolerance in (0, 1) and feasible ≥ 0, but got {self.tolerance} and {self.feasible}."
            )
        if self.budget_ms is not None and not 0 < self.budget_ms < math.inf:
            raise ContractError(
                f"{name} needs a finite budget_ms above 0, or None, but got {self.budget_ms}."
            )
        if self.final_time is not None and not 0 < self.final_time[0] <= self.final_time[1] < math.inf:
            raise ContractError(
                f"{name} needs 0 < shortest ≤ longest final_time in s, but got {self.final_time}."
            )
        together = self.transcription == "hermite-simpson" or self.final_time is not None
        if self.solver == "fatrop" and together:
            raise ContractError(
                f"{name} needs stages that meet in their states only for the solver fatrop, but hermite-simpson shares "
                'controls between them, and a free final_time is shared by all. Use solver="ipopt".'
            )
        if self.solver == "fatrop" and self.budget_ms is not None:
            raise ContractError(
                f"{name} cannot stop the solver fatrop in time. Give it fewer iterations instead of budget_ms, or use "
                'solver="ipopt" or "sqp".'
            )
        if self.final_time is not None and self.transcription == "shooting":
            raise ContractError(
                f"{name} with a free final_time needs steps of any length, but shooting takes the model's own. Use "
                'transcription="radau", "legendre" or "hermite-simpson".'
            )

    def check(self, problem: Problem[Any, Any, Any]) -> None:
        name, dynamics = type(self).__name__, problem.dynamics
        if not isinstance(problem.actions, Box):
            raise UnsupportedProblem(
                f"{name} needs Box actions, but {type(problem.actions).__name__} was given. "
                "Use a tree search for discrete actions."
            )
        self._check_dynamics(dynamics)
        if problem.terminated is not None:
            raise UnsupportedProblem(
                f"{name} plans to the horizon and cannot end early, but the problem has `terminated`. Say what ends an "
                "episode as a Constraint, and leave it out: dataclasses.replace(problem, terminated=None)."
            )
        if self.transcription != "shooting" and any(e.ode is None for e in self._expressions(problem)):
            raise UnsupportedProblem(
                f"{name} with {self.transcription} needs dynamics that are an ODE, but {type(dynamics).__name__} only "
                'has steps. Use transcription="shooting".'
            )
        self._program(problem)

    def init(
        self, problem: Problem[Any, Any, Box], x0: Tensor, *, generator: Generator, guess: Plan | None = None
    ) -> NMPCState:
        """Without a guess the state stays where it is, under the controls nearest to 0."""
        built, x = self._program(problem), self._states(problem, x0)
        control, M, H = built.control, len(x0), problem.horizon
        S, nx = control.branches, x.shape[1]
        low, high = _array(problem.actions.low), _array(problem.actions.high)
        actions = np.broadcast_to(np.clip(0.0, low, high), (M, H, len(low)))
        states = np.broadcast_to(x[:, None, None], (M, H + 1, S, nx)).copy()
        if guess is not None:
            actions = np.clip(_array(guess.actions), low, high)
            states = self._led(problem, built, x, actions, guess, states)
        z = np.zeros((M, control.program.nz))
        z[:, control.states], z[:, control.controls] = states.reshape(M, H + 1, -1), actions[:, :, None]
        if self.transcription == "hermite-simpson":
            z[:, control.own], z[:, control.ahead] = actions[:, :, None], actions[:, -1:]
        elif self.transcription != "shooting":
            n = control.own.shape[-1] // self.degree
            here, there = states[:, :-1, :, :n], states[:, 1:, :, :n]
            points = casadi.collocation_points(self.degree, self.transcription)
            z[:, control.own] = np.concatenate([here + t * (there - here) for t in points], -1)
        if self.final_time is not None:
            z[:, control.time] = np.clip(H * problem.dynamics.dt, *self.final_time)
        return _pack(
            control, np.concatenate([z, np.zeros((M, control.program.nz + control.program.ng + 1))], 1)
        )

    def shift(self, state: NMPCState, actions_taken: Tensor, x_now: Tensor) -> NMPCState:
        H = state.states.shape[1] - 1
        n = min(actions_taken.shape[-2], H)
        last, end = state.states[:, -1:].expand(-1, n, -1), state.rest[:, -1:]
        again = state.rest[:, -2:-1].expand(-1, n, -1)  # the last step is repeated, and the end stays
        return NMPCState(
            torch.cat([state.states[:, n:], last], 1), torch.cat([state.rest[:, n:-1], again, end], 1)
        )

    def plan(
        self, problem: Problem[Any, Any, Box], x0: Tensor, state: NMPCState, *, generator: Generator
    ) -> tuple[Plan, NMPCState]:
        built, x = self._program(problem), self._states(problem, x0)
        if state.states.shape[1] != problem.horizon + 1:
            raise ContractError(
                f"{type(self).__name__} needs a state of horizon {problem.horizon}, but got one of "
                f"{state.states.shape[1] - 1}. Begin with a new one: init(), or MPC.reset()."
            )
        control, box = built.control, (_array(problem.actions.low), _array(problem.actions.high))
        start = _unpack(control, state)
        lost = ~np.isfinite(start).all(1)
        if lost.any():
            start[lost] = _unpack(control, self.init(problem, x0, generator=generator))[lost]
        start[:, control.states[0]] = np.tile(x, control.branches)
        q, theta = _steps(problem, len(x)), self._theta(problem)
        found = [self._solve(built, *row, theta, box) for row in zip(x, q, start, strict=True)]
        carried = np.array([one.carried for one in found])
        names = ("objective", "violation", "gap", "status", "iterations")
        info: dict[str, Any] = {
            n: torch.from_numpy(np.array([getattr(one, n) for one in found])) for n in names
        }
        told = [
            f"problem {m}: {one.why}" if len(x) > 1 else one.why for m, one in enumerate(found) if one.why
        ]
        info["explanation"] = "; ".join(told)
        info["certified"] = info["status"] == 0
        # An iteration counts as one rollout and one Jacobian by forward differences; its Hessian is not counted.
        work = problem.horizon * (1 + problem.dynamics.nx + problem.dynamics.nu) * control.branches
        info["model_steps"] = info["iterations"] * work
        if self.final_time is not None:
            info["final_time"] = torch.from_numpy(carried[:, control.time[0]])
        cost = torch.from_numpy(np.array([one.cost for one in found]))
        total = cost[:, 0] if control.branches == 1 else problem.risk(cost.T[..., None])[:, 0]
        held = torch.from_numpy(np.array([one.actions for one in found])).to(x0)
        led = torch.from_numpy(np.array([one.states[1:] for one in found])).to(x0)
        plan = Plan(
            actions=torch.maximum(
                torch.minimum(held, problem.actions.high.to(x0)), problem.actions.low.to(x0)
            ),
            cost=torch.where(total.isnan(), math.inf, total).to(x0),
            states=torch.cat([x0[:, None], led], 1),
            info=info,
        )
        return plan, _pack(control, carried)

    def _solve(
        self, built: NMPCProgram, x: Array, q: Array, start: Array, theta: Array, box: tuple[Array, Array]
    ) -> _Found:
        """One problem: x (nx,), q (H+1, 2 + np) of `_steps`, start as `_Found.carried`."""
        control = built.control
        ends = control.program.nz, 2 * control.program.nz
        z, bound_multipliers, multipliers = start[: ends[0]], start[ends[0] : ends[1]], start[ends[1] : -1]
        status, why, carried = 3, "the initial state is not finite", start
        solved: dict[str, Any] = {}
        if np.isfinite(x).all():
            p = np.concatenate([z[control.states[0]], q[:-1].T.ravel(), q[-1], theta])
            bounds = control.bounds(*box, self.final_time)
            found = built.solver(z, bound_multipliers, multipliers, p, bounds, budget_ms=self.budget_ms)
            solved["iterations"] = found.iterations
            why = f"the solver left the finite numbers ({found.message})"
            if found.finite:
                tried = np.clip(built.actions(found.z), *box)
                if self.final_time is None:
                    led = built.roll(x, tried, q, theta)
                else:
                    led = built.nodes(found.z, found.f, found.g)
                solved |= {"objective": found.f, "violation": led.violation, "gap": found.gap(bounds)}
                status, why = self._judge(found, led)
            if status < 2:
                carried = np.concatenate([found.z, found.bound_multipliers, found.multipliers, [0.0]])
                return _Found(status, why, tried.mean(0), led.states[0], led.cost, carried, **solved)
            carried = np.zeros_like(start)  # again from the guess, but not with its multipliers
            carried[: len(z)] = z
            if not found.iterations and not found.finite and not start[ends[0] :].any():
                carried[:] = np.nan  # a guess that leads nowhere: from a new one
        u = built.actions(z)
        states = built.roll(x, u, q, theta).states[0]
        nothing = np.full(control.branches, np.inf)
        return _Found(status, why, u.mean(0), states, nothing, carried, **solved)

    def _judge(self, found: Solution, led: Roll) -> tuple[int, str]:
        """An index into `STATUS`, and why it is not 0."""
        if not np.isfinite(led.cost).all():
            return 3, f"its actions lead out of the finite numbers ({found.message})"
        if found.converged:
            return 0, ""
        why = "time ran out" if found.late else found.message
        if led.violation <= self.feasible:
            return 1, why
        return 2, f"{', '.join(led.violated)} ({why})"

    def _led(
        self,
        problem: Problem[Any, Any, Box],
        built: NMPCProgram,
        x: Array,
        actions: Array,
        guess: Plan,
        stay: Array,
    ) -> Array:
        """States (M, H+1, S, nx) of a guess, or where its actions lead, or where that is not finite, `stay`."""
        M, S = len(x), built.control.branches
        if guess.states is not None:
            led = np.repeat(_array(guess.states)[:, :, None], S, 2)
        else:
            q, theta = _steps(problem, M), self._theta(problem)
            rolls = [built.roll(x[m], np.tile(actions[m], (S, 1, 1)), q[m], theta).states for m in range(M)]
            led = np.stack(rolls).swapaxes(1, 2)
        finite = np.isfinite(led).all((1, 2, 3), keepdims=True)
        return np.where(finite, led, stay)

    def _check_dynamics(self, dynamics: Any) -> None:
        name = type(self).__name__
        if isinstance(dynamics, Stochastic):
            raise UnsupportedProblem(
                f"{name} needs deterministic dynamics, but {type(dynamics).__name__} must be drawn first. Plan on the "
                "mean of an ensemble, Exported(MeanDynamics(ensemble)), or on its members: ScenarioNMPC."
            )
        remedy = "Wrap it: Symbolic(dynamics) if it is written in torch, Exported(model) if it was learned."
        require(name, "dynamics", dynamics, ("expression", "theta"), remedy)

    def _states(self, problem: Problem[Any, Any, Any], x0: Tensor) -> Array:
        if x0.ndim != 2 or x0.shape[1] != problem.dynamics.nx:
            raise ContractError(
                f"{type(self).__name__} needs states (M, nx) = (M, {problem.dynamics.nx}), but got {tuple(x0.shape)}."
            )
        return _array(x0)

    def _expressions(self, problem: Problem[Any, Any, Any]) -> tuple[Expression, ...]:
        return (problem.dynamics.expression,)

    def _theta(self, problem: Problem[Any, Any, Any]) -> Array:
        theta: Array = problem.dynamics.theta
        return theta

    def _program(self, problem: Problem[Any, Any, Any]) -> NMPCProgram:
        return nmpc_program(self._expressions(problem), problem, self._settings(problem))

    def _settings(self, problem: Problem[Any, Any, Any]) -> Settings:
        return Settings(
            transcription=self.transcription,
            degree=self.degree,
            solver=self.solver,
            qp=self.qp,
            gauss_newton=self.hessian == "gauss-newton",
            iterations=self.iterations,
            tolerance=self.tolerance,
            generate_code=self.generate_code,
            deadline=self.budget_ms is not None,
            free_time=self.final_time is not None,
            shared=problem.horizon,
            spread=None,
        )


def _array(values: Tensor) -> Array:
    array: Array = values.detach().double().cpu().numpy()
    return array


def _steps(problem: Problem[Any, Any, Any], M: int) -> Array:
    """(k, γᵏ, p) of every step, (M, H+1, 2 + np)."""
    once = _numbered(problem.horizon, problem.discount)
    steps = np.broadcast_to(once, (M, *once.shape))
    if problem.params is None:
        return steps
    params = _array(problem.params)
    return np.concatenate([steps, np.broadcast_to(params, (M, *params.shape[-2:]))], -1)


@functools.lru_cache(maxsize=32)
def _numbered(horizon: int, discount: float) -> Array:
    k = np.arange(horizon + 1.0)
    numbered: Array = np.stack([k, discount**k], -1)
    return numbered


def _pack(control: OptimalControl, carried: Array) -> NMPCState:
    """By stages; carried: (M, …) of `_Found`."""
    stages, n = torch.from_numpy(carried[:, control.stages]), control.states.shape[1]
    return NMPCState(stages[..., :n], stages[..., n:])


def _unpack(control: OptimalControl, state: NMPCState) -> Array:
    """What was packed."""
    carried = np.zeros((len(state.states), 2 * control.program.nz + control.program.ng + 1))
    carried[:, control.stages] = torch.cat([state.states, state.rest], -1).numpy()
    carried[:, -1] = 0.0  # what has no place
    return carried
