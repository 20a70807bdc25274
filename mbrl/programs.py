"""CasADi expressions, evaluated by a compiled interpreter: no compiler runs for a new problem, and no Python per call.

A function of scalars is a list of instructions on numbered registers. The interpreter takes many columns ("lanes") at
a time, so that what it costs to read an instruction is shared by them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import casadi
import numpy as np

from mbrl.compiled import kernel
from mbrl.errors import ContractError

(
    _ASSIGN, _ADD, _SUB, _MUL, _DIV, _NEG, _SQ, _TWICE, _INV, _SQRT, _SIN, _COS, _TAN, _ASIN, _ACOS, _ATAN, _ATAN2,
    _SINH, _COSH, _TANH, _ASINH, _ACOSH, _ATANH, _EXP, _LOG, _LOG1P, _EXPM1, _POW, _CONSTPOW, _ERF, _FABS, _SIGN,
    _COPYSIGN, _FLOOR, _CEIL, _FMOD, _FMIN, _FMAX, _LT, _LE, _EQ, _NE, _NOT, _AND, _OR, _IF_ELSE_ZERO, _HYPOT,
) = range(47)  # fmt: skip
_CODES = {
    getattr(casadi, f"OP{name}"): code
    for name, code in list(globals().items())
    if name.isupper() and name[0] == "_"
}


class Program(NamedTuple):
    """Instructions of one function, on registers: first the arguments, then constants, then whatever is computed.

    Attributes:
        code: (n, 4) uint32: operation, register of the result, registers of the operands.
        constants: (c,), their values.
        outputs: (m,), where the results are found, one argument or result after another, each a column.
        inputs, registers: how many.
    """

    code: np.ndarray
    constants: np.ndarray
    outputs: np.ndarray
    inputs: int
    registers: int


def program(function: casadi.Function) -> Program:
    """The instructions of a function of SX expressions, whose results are dense.

    Raises:
        ContractError: it holds an operation that the interpreter lacks, or results are sparse.
    """
    if not all(function.sparsity_out(i).is_dense() for i in range(function.n_out())):
        raise ContractError(
            f"{function.name()} needs dense results to be interpreted. Give them to casadi.densify."
        )
    starts = np.cumsum([0, *(function.numel_in(i) for i in range(function.n_in()))])
    ends = np.cumsum([0, *(function.numel_out(i) for i in range(function.n_out()))])
    inputs = int(starts[-1])
    values: dict[float, int] = {}  # of constants, in the order of their registers
    outputs = np.empty(int(ends[-1]), dtype=np.int64)
    # CasADi's registers are written more than once. Here each result has a name: below 0 constants, then inputs,
    # from `inputs` on what is computed.
    names: dict[int, int] = {}
    steps: list[tuple[int, list[int]]] = []
    for i in range(function.n_instructions()):
        op = function.instruction_id(i)
        read = function.instruction_input(i)
        write = function.instruction_output(i)
        if op == casadi.OP_INPUT:
            names[write[0]] = int(starts[read[0]]) + read[1]
        elif op == casadi.OP_CONST:
            names[write[0]] = -1 - values.setdefault(function.instruction_constant(i), len(values))
        elif op == casadi.OP_OUTPUT:
            outputs[int(ends[write[0]]) + write[1]] = names[read[0]]
        elif op in _CODES:
            steps.append((_CODES[op], [names[r] for r in read]))
            names[write[0]] = inputs + len(steps) - 1
        else:
            raise ContractError(
                f"{function.name()} holds an operation that cannot be interpreted, number {op}."
            )
    register = {-1 - c: inputs + c for c in range(len(values))} | {i: i for i in range(inputs)}
    last = {name: i for i, (_, read) in enumerate(steps) for name in read}
    kept, free, count = set(outputs.tolist()), list[int](), inputs + len(values)
    code = np.zeros((len(steps), 4), dtype=np.uint32)
    for i, (op, read) in enumerate(steps):
        if not free:
            free, count = [count], count + 1
        register[inputs + i] = free.pop()
        code[i] = op, register[inputs + i], register[read[0]], register[read[-1]]
        # Free after its last reader, but not for that reader's own result: rows that overlap are slow.
        free += [register[r] for r in set(read) if r >= inputs and last[r] == i and r not in kept]
    outputs = np.array([register[name] for name in outputs.tolist()], dtype=np.int64)
    constants = np.array([float(v) for v in values], dtype=np.float64)
    return Program(code, constants, outputs, inputs, max(1, count))


@kernel
def registers(program: Program, lanes: int) -> np.ndarray:
    """(registers, L), in which the arguments are to be filled in."""
    w = np.empty((program.registers, lanes))
    for c in range(len(program.constants)):
        for j in range(lanes):
            w[program.inputs + c, j] = program.constants[c]
    return w


@kernel
def run(program: Program, w: np.ndarray) -> None:
    """Compute all of w (registers, L) from the arguments in it."""
    code, L = program.code, w.shape[1]
    for i in range(len(code)):
        op, out, first, second = code[i, 0], code[i, 1], code[i, 2], code[i, 3]
        if op == _MUL:
            for j in range(L):
                w[out, j] = w[first, j] * w[second, j]
        elif op == _ADD:
            for j in range(L):
                w[out, j] = w[first, j] + w[second, j]
        elif op == _SUB:
            for j in range(L):
                w[out, j] = w[first, j] - w[second, j]
        elif op == _NEG:
            for j in range(L):
                w[out, j] = -w[first, j]
        elif op == _SQ:
            for j in range(L):
                w[out, j] = w[first, j] * w[first, j]
        elif op == _TWICE:
            for j in range(L):
                w[out, j] = 2.0 * w[first, j]
        elif op == _DIV:
            for j in range(L):
                w[out, j] = w[first, j] / w[second, j]
        elif op == _INV:
            for j in range(L):
                w[out, j] = 1.0 / w[first, j]
        elif op == _FMIN:
            for j in range(L):
                w[out, j] = np.minimum(w[first, j], w[second, j])
        elif op == _FMAX:
            for j in range(L):
                w[out, j] = np.maximum(w[first, j], w[second, j])
        elif op == _IF_ELSE_ZERO:
            for j in range(L):
                w[out, j] = w[second, j] if w[first, j] != 0.0 else 0.0
        elif op == _SQRT:
            for j in range(L):
                w[out, j] = np.sqrt(w[first, j])
        else:
            for j in range(L):
                w[out, j] = _apply(op, w[first, j], w[second, j])


@kernel
def _apply(op: int, a: float, b: float) -> Any:
    if op == _SIN:
        return math.sin(a)
    if op == _COS:
        return math.cos(a)
    if op == _TAN:
        return math.tan(a)
    if op == _ASIN:
        return math.asin(a)
    if op == _ACOS:
        return math.acos(a)
    if op == _ATAN:
        return math.atan(a)
    if op == _ATAN2:
        return math.atan2(a, b)
    if op == _SINH:
        return math.sinh(a)
    if op == _COSH:
        return math.cosh(a)
    if op == _TANH:
        return math.tanh(a)
    if op == _ASINH:
        return math.asinh(a)
    if op == _ACOSH:
        return math.acosh(a)
    if op == _ATANH:
        return math.atanh(a)
    if op == _EXP:
        return math.exp(a)
    if op == _LOG:
        return math.log(a)
    if op == _LOG1P:
        return math.log1p(a)
    if op == _EXPM1:
        return math.expm1(a)
    if op == _POW:
        return a**b
    if op == _CONSTPOW:
        return a**b
    if op == _ERF:
        return math.erf(a)
    if op == _FABS:
        return abs(a)
    if op == _SIGN:
        return np.sign(a)
    if op == _COPYSIGN:
        return math.copysign(a, b)
    if op == _FLOOR:
        return np.floor(a)
    if op == _CEIL:
        return np.ceil(a)
    if op == _FMOD:
        return np.fmod(a, b)
    if op == _LT:
        return 1.0 if a < b else 0.0
    if op == _LE:
        return 1.0 if a <= b else 0.0
    if op == _EQ:
        return 1.0 if a == b else 0.0
    if op == _NE:
        return 1.0 if a != b else 0.0
    if op == _NOT:
        return 1.0 if a == 0.0 else 0.0
    if op == _AND:
        return 1.0 if a != 0.0 and b != 0.0 else 0.0
    if op == _OR:
        return 1.0 if a != 0.0 or b != 0.0 else 0.0
    if op == _HYPOT:
        return math.hypot(a, b)
    return a  # ASSIGN
