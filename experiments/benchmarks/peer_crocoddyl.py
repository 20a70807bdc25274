# mypy: ignore-errors
"""Solves of crocoddyl 3.2.1, one problem after another on one thread. Run by the Python of that peer; see `ilqr_speed`."""

import json
import sys
import time

import crocoddyl
import numpy as np

setting = json.loads(sys.argv[1])
x0, horizon = np.load(setting["starts"]), setting["horizon"]


def linear_quadratic(Q):
    """A step of x' = A x + B u with cost ½ xᵀQx + ½ uᵀRu and |u| ≤ 1."""
    A, B, R = (np.array(setting[name]) for name in "ABR")
    nx, nu = B.shape
    model = crocoddyl.ActionModelLQR(A, B, Q, R, np.zeros((nx, nu)), np.zeros(nx), np.zeros(nx), np.zeros(nu))
    model.u_lb, model.u_ub = -np.ones(nu), np.ones(nu)
    return model


if setting["case"] == "unicycle":
    step = last = crocoddyl.ActionModelUnicycle()
    make_solver = crocoddyl.SolverDDP
else:
    step, last = linear_quadratic(np.array(setting["Q"])), linear_quadratic(np.array(setting["Qf"]))
    make_solver = crocoddyl.SolverBoxDDP
problem = crocoddyl.ShootingProblem(x0[0], [step] * horizon, last)
problem.nthreads = 1
solver = make_solver(problem)


def solve(x):
    problem.x0 = x
    solver.solve()  # from its own start: of all that were tried the fastest
    return solver.iter


def work():
    tic = time.perf_counter()
    for _ in range(setting["repeats"]):
        iterations = [solve(x) for x in x0]
    seconds = (time.perf_counter() - tic) / setting["repeats"]
    return {"seconds": seconds, "iterations": float(np.mean(iterations))}


controls = []
for x in x0:
    solve(x)
    controls.append(np.array(solver.us.tolist()))
np.save(setting["controls"], controls)
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(work()), flush=True)
