# mypy: ignore-errors
"""Closed loops of do-mpc 5.1.2 with its own defaults: a cart-pole, and its example CSTR. Run by the Python of that peer.

See `nmpc_speed`. The printing of the solver is off. Nothing else differs from the defaults or, of the CSTR, from the
example as shipped (examples/CSTR: model, costs, bounds, scaling, uncertain values, simulator), but that n_robust 0 takes
the first scenario alone.
"""

import json
import sys
import warnings

import casadi
import numpy as np
import plants

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of parts that are optional
    import do_mpc


def cart_pole():
    """A controller of the swing-up: one step of it, x -> u."""
    model = do_mpc.model.Model("continuous")
    names = ("cart", "angle", "velocity", "rate")
    x, u = [model.set_variable("_x", name) for name in names], model.set_variable("_u", "force")
    for name, expression in zip(names, plants.cart_pole(x, u, casadi.sin, casadi.cos), strict=True):
        model.set_rhs(name, expression)
    model.setup()
    mpc = do_mpc.controller.MPC(model)
    mpc.settings.n_horizon, mpc.settings.t_step = plants.HORIZON, plants.DT
    mpc.settings.supress_ipopt_output()
    mpc.set_objective(mterm=plants.stage(x, 0.0, casadi.cos), lterm=plants.stage(x, u, casadi.cos))
    mpc.set_rterm(force=0.0)
    mpc.bounds["lower", "_u", "force"], mpc.bounds["upper", "_u", "force"] = -plants.LIMIT, plants.LIMIT
    mpc.setup()
    return ready(mpc, plants.START)


def reactor(n_robust, tolerance=None):
    """A controller of the CSTR: one step of it, x -> u; and its simulator. tolerance: of ipopt, its default unless given."""
    model = do_mpc.model.Model("continuous")
    names = ("C_a", "C_b", "T_R", "T_K")
    x = [model.set_variable("_x", name) for name in names]
    u = [model.set_variable("_u", name) for name in ("F", "Q_dot")]
    p = [model.set_variable("_p", name) for name in ("alpha", "beta")]
    for name, expression in zip(names, plants.reactor(x, u, p, casadi.exp), strict=True):
        model.set_rhs(name, expression)
    model.setup()
    mpc = do_mpc.controller.MPC(model)
    mpc.settings.n_horizon, mpc.settings.t_step = plants.REACTOR_HORIZON, plants.REACTOR_DT
    mpc.settings.n_robust, mpc.settings.store_full_solution = n_robust, True
    mpc.settings.supress_ipopt_output()
    if tolerance is not None:
        mpc.settings.nlpsol_opts["ipopt.tol"] = tolerance
    for kind, name, size in (("_x", "T_R", 100), ("_x", "T_K", 100), ("_u", "F", 100), ("_u", "Q_dot", 2000)):
        mpc.scaling[kind, name] = size
    aim = (x[1] - 0.6) ** 2
    mpc.set_objective(mterm=aim, lterm=aim)
    mpc.set_rterm(F=0.1, Q_dot=1e-3)
    for name, low, high in (("C_a", 0.1, 2), ("C_b", 0.1, 2), ("T_R", 50, None), ("T_K", 50, 140)):
        mpc.bounds["lower", "_x", name] = low
        if high is not None:
            mpc.bounds["upper", "_x", name] = high
    for name, low, high in (("F", 5, 100), ("Q_dot", -8500, 0)):
        mpc.bounds["lower", "_u", name], mpc.bounds["upper", "_u", name] = low, high
    mpc.set_nl_cons("T_R", x[2], ub=140, soft_constraint=True, penalty_term_cons=1e2)
    mpc.set_uncertainty_values(alpha=np.array([1.0, 1.05, 0.95]), beta=np.array([1.0, 1.1, 0.9]))
    mpc.setup()

    simulator = do_mpc.simulator.Simulator(model)
    simulator.set_param(integration_tool="cvodes", abstol=1e-10, reltol=1e-10, t_step=plants.REACTOR_DT)
    truth = simulator.get_p_template()
    truth["alpha"], truth["beta"] = 1, 1
    simulator.set_p_fun(lambda t: truth)
    simulator.setup()
    simulator.x0 = np.array(plants.REACTOR_START)
    simulator.set_initial_guess()
    return ready(mpc, plants.REACTOR_START), lambda x, u: simulator.make_step(u[:, None])


def ready(mpc, start):
    mpc.x0 = np.array(start)
    mpc.set_initial_guess()
    return plants.Clock(lambda x: mpc.make_step(x[:, None]).ravel())


def work(setting):
    """A closed loop of a controller that is built anew; only its steps are timed."""
    if setting["case"] == "swing-up":
        step = cart_pole()
        result = plants.swing_up(lambda x: step(x)[0])
    else:
        step, simulator = reactor(setting["n_robust"], setting.get("tolerance"))
        result = plants.react(step, simulator)
    wall, processor = step.seconds
    return {**result, "wall_s": wall, "processor_s": processor}


setting = json.loads(sys.argv[1])
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(work(setting)), flush=True)
