# mypy: ignore-errors
"""The swing-up by CasADi and fatrop, as one would write it by hand for this problem. A process of its own; see `nmpc_speed`.

Multiple shooting with a step of RK4, scalar expressions, exact Hessian, variables and constraints ordered by stage, each
solve started at the last, shifted by one step. Compiled: the functions of the NLP in C, by gcc -O3 -march=native, before
the clock starts.
"""

import contextlib
import json
import subprocess
import sys
import tempfile

import casadi as ca
import numpy as np
import plants

NX, N = 4, plants.HORIZON


def solver(compiled):
    """nlpsol over z = (x0, u0, x1, u1, …, xN) with the state at the start as its parameter; the bounds of z."""
    x, u, dt = ca.SX.sym("x", NX), ca.SX.sym("u"), plants.DT
    f = ca.Function("f", [x, u], [ca.vertcat(*plants.cart_pole(ca.vertsplit(x), u, ca.sin, ca.cos))])
    a = f(x, u)
    b = f(x + dt / 2 * a, u)
    c = f(x + dt / 2 * b, u)
    F = ca.Function("F", [x, u], [x + dt / 6 * (a + 2 * b + 2 * c + f(x + dt * c, u))])

    X, U = [ca.SX.sym(f"x{k}", NX) for k in range(N + 1)], [ca.SX.sym(f"u{k}") for k in range(N)]
    start = ca.SX.sym("start", NX)
    gaps = [X[k + 1] - F(X[k], U[k]) for k in range(N)]
    gaps.insert(1, X[0] - start)
    cost = sum(plants.stage(ca.vertsplit(X[k]), U[k], ca.cos) for k in range(N))
    cost += plants.stage(ca.vertsplit(X[N]), 0.0, ca.cos)
    z = ca.vertcat(*(ca.vertcat(*pair) for pair in zip(X, U, strict=False)), X[N])
    g = ca.vertcat(*gaps)
    options = {"print_time": False, "structure_detection": "auto", "equality": [True] * g.numel()}
    options |= {"fatrop.print_level": 0, "fatrop.tolerance": 1e-6}
    nlp = {"x": z, "p": start, "f": cost, "g": g}
    solve = ca.nlpsol("solve", "fatrop", nlp, {**options, "expand": True})
    if compiled:
        flags = ["-O3", "-march=native", "-fPIC", "-shared"]
        with contextlib.chdir(tempfile.mkdtemp()):
            solve.generate_dependencies("nlp.c")
            subprocess.run(["gcc", *flags, "nlp.c", "-o", "nlp.so", "-lm"], check=True)
            solve = ca.nlpsol("solve", "fatrop", "./nlp.so", options)
    high = np.full(z.numel(), np.inf)
    high[NX :: NX + 1] = plants.LIMIT
    return solve, high


def controller(solve, high):
    """x -> u, with what it remembers of the last solve."""
    z = np.zeros(high.size)
    memory = {}

    def act(x):
        if not memory:
            for k in range(N + 1):
                z[(NX + 1) * k : (NX + 1) * k + NX] = x
            memory.update(x0=z, lam_x0=np.zeros(high.size), lam_g0=np.zeros(solve.size1_in("lam_g0")))
        r = solve(p=x, lbx=-high, ubx=high, lbg=0, ubg=0, **memory)
        if not solve.stats()["success"]:
            raise RuntimeError(f"fatrop: {solve.stats()['return_status']} at {x}")
        best = np.array(r["x"]).ravel()
        shifted = np.concatenate([best[NX + 1 :], best[-NX - 1 :]])
        memory.update(x0=shifted, lam_x0=r["lam_x"], lam_g0=r["lam_g"])
        return best[NX]

    return act


setting = json.loads(sys.argv[1])
built = solver(setting["compiled"])


def work():
    step = plants.Clock(controller(*built))
    result = plants.swing_up(step)
    wall, processor = step.seconds
    return {**result, "wall_s": wall, "processor_s": processor}


print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(work()), flush=True)
