"""The interpreter of expressions, against CasADi's own."""

from __future__ import annotations

import casadi
import numpy as np
import pytest

from mbrl import ContractError
from mbrl.programs import program, registers, run

X, Y = casadi.SX.sym("x"), casadi.SX.sym("y")
ONE = [
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "asinh",
    "atanh",
    "exp",
    "log",
    "log1p",
    "expm1",
]
ONE += ["sqrt", "erf", "fabs", "sign", "floor", "ceil", "sq"]
TWO = ["atan2", "fmin", "fmax", "fmod", "copysign", "hypot"]
CASES = {
    **{name: getattr(casadi, name)(X) for name in ONE if hasattr(casadi, name)},
    **{name: getattr(casadi, name)(X, Y) for name in TWO if hasattr(casadi, name)},
    "acosh": casadi.acosh(1 + X),
    "arithmetic": (X + Y) * (X - 3) / Y - 2 * X + 1 / (Y + 5) - (-X) * X,
    "power": X**Y + X**3 + X**2.5,
    "logic": casadi.logic_and(X > 0.3, Y <= X)
    + 2 * casadi.logic_or(X == 0.5, casadi.logic_not(Y >= 0.4))
    + (X != Y),
    "choice": casadi.if_else(X > Y, casadi.sin(X), Y),
    "constant": casadi.SX(4.5),
    "argument": Y,
}


def evaluated(function: casadi.Function, arguments: np.ndarray) -> np.ndarray:
    """Results (m, L) of arguments (n, L)."""
    made = program(function)
    w = registers(made, arguments.shape[1])
    w[: made.inputs] = arguments
    run(made, w)
    results: np.ndarray = w[made.outputs]
    return results


@pytest.mark.parametrize("name", CASES)
def test_operations_are_casadis(name: str) -> None:
    function = casadi.Function(name, [X, Y], [CASES[name]])
    arguments = np.random.default_rng(0).uniform(0.05, 0.95, (2, 9))
    arguments[:, 0] = 0.5
    if name in ("floor", "ceil", "fabs", "arithmetic"):
        arguments[0, 1:4] = np.nan, np.inf, 1e300
    wanted = [[float(function(*column)) for column in arguments.T]]
    np.testing.assert_allclose(evaluated(function, arguments), wanted, rtol=1e-13)


def test_many_results_share_registers() -> None:
    """A Hessian: results that are constants, arguments, or read again after they are written."""
    z = casadi.SX.sym("z", 4)
    f = casadi.sin(z[0] * z[1]) * casadi.exp(z[2]) + z[3] ** 2 * z[0]
    bend, slope = casadi.hessian(f, z)
    function = casadi.Function("f", [z], [slope, casadi.densify(bend), z, casadi.SX([1.0, 0.0])])
    arguments = np.random.default_rng(1).normal(size=(4, 5))
    wanted = np.stack(
        [np.concatenate([np.array(v).ravel(order="F") for v in function(c)]) for c in arguments.T], 1
    )
    np.testing.assert_allclose(evaluated(function, arguments), wanted, rtol=1e-12)
    assert program(function).registers < function.n_instructions()


def test_nan_is_not_hidden() -> None:
    function = casadi.Function(
        "f", [X, Y], [casadi.fmin(X, Y), casadi.fmax(X, Y), casadi.if_else(X > 0, X, Y)]
    )
    results = evaluated(function, np.array([[np.nan, 1.0], [1.0, np.nan]]))
    assert np.isnan(results[:2]).all() and results[2, 1] == 1.0


def test_an_operation_that_it_lacks_is_told() -> None:
    function = casadi.Function("inverse", [X], [casadi.erfinv(X)])
    with pytest.raises(ContractError, match="inverse holds an operation that cannot be interpreted"):
        program(function)


def test_sparse_results_are_told() -> None:
    z = casadi.SX.sym("z", 2)
    function = casadi.Function("f", [z], [casadi.jacobian(casadi.vertcat(casadi.sin(z[0]), 3), z)])
    with pytest.raises(ContractError, match="f needs dense results"):
        program(function)
