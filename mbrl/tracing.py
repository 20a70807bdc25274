"""From torch to CasADi: a function written once in torch, as an expression that is evaluated without torch.

`trace` runs the function once on placeholders, reads off the operations and repeats them on arrays of scalar
expressions. What it needs: no control flow that depends on values (torch.where is fine), and operations of the list
below; whatever else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import casadi
import numpy as np
import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from mbrl.errors import ContractError

Array = Any  # numpy arrays of dtype object, whose entries are casadi.SX or numbers


def trace(
    name: str, fun: Callable[..., Tensor], *shapes: tuple[int, ...], size: int | None = None
) -> casadi.Function:
    """`fun` of float64 tensors of the given shapes as a CasADi function of column vectors, its result flattened.

    The result is compared with torch at two other points.

    Args:
        name: of the function, for messages.
        size: how many numbers it has to return.

    Raises:
        ContractError: it fails in torch, returns something else than a tensor of this size, has an operation without a
            symbolic form here, or control flow that depends on values; or it is not what torch computes, because a part
            of it left torch.
    """
    examples = [torch.full(shape, 0.5, dtype=torch.float64) for shape in shapes]
    given = ", ".join(str(shape) for shape in shapes)
    try:
        plain: Any = fun(*examples)
    except Exception as error:
        raise ContractError(
            f"{name} is called with tensors of shapes {given}, of which a single number, the step k, may be one, and "
            f"fails: {type(error).__name__}: {error}. What changes with the step belongs into Problem.params."
        ) from error
    if not isinstance(plain, Tensor) or size not in (None, plain.numel()):
        wanted = "a tensor" if size is None else f"a tensor of {size} number{'s' if size > 1 else ''}"
        got = (
            f"one of shape {tuple(plain.shape)}" if isinstance(plain, Tensor) else f"a {type(plain).__name__}"
        )
        raise ContractError(f"{name} must return {wanted} for tensors of shapes {given}, but returned {got}.")
    try:
        traced = make_fx(lambda *args: functionalize(fun)(*args))(*examples)
    except RuntimeError as error:
        raise ContractError(
            f"{name} cannot be traced: its control flow depends on values, or torch refuses it. Use torch.where, "
            f"and no .item(). torch says: {error}"
        ) from error
    symbols = [casadi.SX.sym(f"i{i}", math.prod(shape)) for i, shape in enumerate(shapes)]
    waiting = iter(_from_column(s, shape) for s, shape in zip(symbols, shapes, strict=True))
    values: dict[Any, Any] = {}

    def value(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return values[arg]
        if isinstance(arg, (list, tuple)):
            return [value(a) for a in arg]
        return arg

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(waiting)
        elif node.op == "get_attr":
            values[node] = _constant(getattr(traced, node.target))
        elif node.op == "output":
            result = value(node.args[0])
        else:
            values[node] = _apply(
                name, node, [value(a) for a in node.args], {k: value(a) for k, a in node.kwargs.items()}
            )
    column = (
        casadi.vertcat(*[casadi.SX(entry) for entry in result.ravel()]) if result.size else casadi.SX(0, 1)
    )
    made = casadi.Function(casadi.Function.fix_name(name), symbols, [column])
    for away in (-0.2, 0.3):
        points = [
            e + away * torch.cos(torch.arange(float(e.numel())) + i).to(e).reshape(e.shape)
            for i, e in enumerate(examples)
        ]
        truth = fun(*points).double().flatten()
        found = torch.from_numpy(made(*[point.flatten().numpy() for point in points]).full()[:, 0])
        known = truth.abs() < 1e6  # where a model explodes, rounding does too
        if not torch.allclose(found[known], truth[known], rtol=_SAME, atol=_SAME):
            raise ContractError(
                f"{name} is not what torch computes where its arguments differ from those that it was traced with: a part "
                "of it left torch or is random. Use torch's own operations, and none that make constants or integers of "
                "values (.numpy(), .item(), .long())."
            )
    return made


_SAME = 1e-5
"""The largest relative difference from torch: a function may compute in float32."""


def _apply(name: str, node: Any, args: list[Any], options: dict[str, Any]) -> Any:
    if node.target.__name__ == "getitem":
        return args[0][args[1]]
    operation = node.target.overloadpacket.__name__.rstrip("_")
    if operation not in _OPERATIONS:
        raise ContractError(
            f"{name} uses the torch operation {operation}, which has no symbolic form here. Write it with others. "
            "Dynamics can be left to torch, for planners that need derivatives only: Autodiff(dynamics)."
        )
    options = {
        k: v
        for k, v in options.items()
        if k not in ("dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking")
    }
    try:
        result = _OPERATIONS[operation](*args, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ContractError(
            f"{name} uses the torch operation {operation} with {', '.join(options)}, which has no symbolic form here. "
            "Write it without."
        ) from error
    return result if isinstance(result, (np.ndarray, list)) else _box(result)


def _box(entry: Any) -> Array:
    """A 0-dimensional array of one entry; numpy would take an expression apart."""
    array = np.empty((), dtype=object)
    array[()] = entry
    return array


def _from_column(column: casadi.SX, shape: tuple[int, ...]) -> Array:
    array = np.empty(math.prod(shape), dtype=object)
    for i in range(array.size):
        array[i] = column[i]
    return array.reshape(shape)


def _constant(tensor: Tensor) -> Array:
    array = np.empty(tensor.shape, dtype=object)
    for i in np.ndindex(*tensor.shape):
        array[i] = tensor[i].item()
    return array


def _each(fun: Callable[..., Any]) -> Callable[..., Array]:
    """Entry by entry, with broadcasting."""
    ufunc: Any = None

    def apply(*args: Any) -> Array:
        nonlocal ufunc
        if ufunc is None:
            ufunc = np.frompyfunc(fun, len(args), 1)
        return ufunc(*(a if isinstance(a, np.ndarray) else _box(a) for a in args))

    return apply


def _plus(sign: int) -> Callable[..., Array]:
    add = _each(lambda a, b: a + b)
    times = _each(lambda a, b: a * b)

    def apply(a: Any, b: Any, alpha: Any = 1) -> Array:
        return add(a, b if sign * alpha == 1 else _boxed(times(_boxed(b), sign * alpha)))

    return apply


def _boxed(a: Any) -> Array:
    return a if isinstance(a, np.ndarray) else _box(a)


def _is(a: Any) -> bool:
    return isinstance(a, casadi.SX)


def _math(name: str) -> Callable[..., Array]:
    symbolic, plain = getattr(casadi, name), getattr(math, name)
    return _each(lambda a: symbolic(a) if _is(a) else plain(a))


def _power(a: Any, b: Any) -> Any:
    if not _is(b) and float(b).is_integer() and 0 <= b <= 4:
        return math.prod([a] * int(b))
    return a**b


def _clamp(a: Any, low: Any = None, high: Any = None, min: Any = None, max: Any = None) -> Array:
    low, high = low if min is None else min, high if max is None else max
    a = a if low is None else _maximum(a, low)
    return a if high is None else _minimum(a, high)


def _reduce(fun: Callable[[Any, Any], Any], start: Any) -> Callable[..., Array]:
    step = np.frompyfunc(fun, 2, 1)

    def apply(a: Array, dim: Any = None, keepdim: bool = False) -> Array:
        axes = tuple(range(a.ndim)) if dim is None or dim == [] else tuple(np.atleast_1d(dim).tolist())
        for axis in sorted((axis % max(1, a.ndim) for axis in axes), reverse=True):
            if a.ndim == 0:
                break
            shape = (*a.shape[:axis], *([1] if keepdim else []), *a.shape[axis + 1 :])
            if a.shape[axis] == 0:
                a = _filled(shape, start)
            else:
                a = _boxed(step.reduce(a, axis=axis)).reshape(shape)
        return a

    return apply


def _mean(a: Array, dim: Any = None, keepdim: bool = False) -> Array:
    total = _sum(a, dim, keepdim)
    return _each(lambda t: t * (total.size / max(1, a.size)))(total)


def _norm(a: Array, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> Array:
    if ord != 2:
        raise ContractError(f"Only the norm of order 2 has a symbolic form here, but got order {ord}.")
    return _math("sqrt")(_sum(_each(lambda x: x * x)(a), dim, keepdim))


def _running(fun: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    step = np.frompyfunc(fun, 2, 1)
    return lambda a, dim: step.accumulate(a, axis=dim)


def _filled(shape: Sequence[int], entry: Any) -> Array:
    array = np.empty(tuple(shape), dtype=object)
    array[...] = entry
    return array


def _softplus(a: Any, beta: Any = 1, threshold: Any = 20) -> Array:
    grown = _each(
        lambda x: casadi.if_else(
            x * beta > threshold, x, casadi.log1p(casadi.exp(casadi.fmin(x * beta, threshold))) / beta
        )
    )
    return grown(_each(casadi.SX)(a))


def _logistic(x: Any) -> Any:
    return 1 / (1 + (casadi.exp(-x) if _is(x) else math.exp(-x)))


def _slice(a: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    index = [slice(None)] * a.ndim
    index[dim] = slice(start, None if end is None or end > a.shape[dim] else end, step)
    return a[tuple(index)]


def _select(a: Array, dim: int, i: int) -> Array:
    return _boxed(np.take(a, i, axis=dim)) if a.ndim > 1 else _box(a[i])


def _unbind(a: Array, dim: int = 0) -> list[Array]:
    return [_select(a, dim, i) for i in range(a.shape[dim])]


def _split(a: Array, sizes: Any, dim: int = 0) -> list[Array]:
    if isinstance(sizes, int):
        sizes = [min(sizes, a.shape[dim] - i) for i in range(0, a.shape[dim], sizes)]
    ends = np.cumsum(sizes).tolist()
    return [_slice(a, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _expand(a: Array, shape: Sequence[int], implicit: bool = False) -> Array:
    lead = len(shape) - a.ndim
    full = [a.shape[i - lead] if n == -1 else n for i, n in enumerate(shape)]
    return np.broadcast_to(a, full)


def _squeeze(a: Array, dim: Any = None) -> Array:
    dims = range(a.ndim) if dim is None else np.atleast_1d(dim).tolist()
    return a.reshape([n for i, n in enumerate(a.shape) if not (n == 1 and i in {d % a.ndim for d in dims})])


def _index(a: Array, indices: list[Any]) -> Array:
    index = tuple(slice(None) if i is None else _places(i) for i in indices)
    return _boxed(a[index])


def _places(i: Array) -> Array:
    """Of constant entries: a mask, or numbers."""
    if any(_is(entry) for entry in i.flat):
        raise ContractError("Which entries are picked has to be known before, but here it depends on values.")
    return i.astype(bool if i.size and isinstance(i.flat[0], bool) else np.int64)


def _matmul(a: Array, b: Array) -> Array:
    return _boxed(np.matmul(a, b))


def _affine(c: Array, a: Array, b: Array) -> Array:
    return _plus(1)(c, _matmul(a, b))


_maximum = _each(lambda a, b: casadi.fmax(a, b) if _is(a) or _is(b) else max(a, b))
_minimum = _each(lambda a, b: casadi.fmin(a, b) if _is(a) or _is(b) else min(a, b))
_sum = _reduce(lambda a, b: a + b, 0.0)
_times = _each(lambda a, b: a * b)
_and = _each(lambda a, b: casadi.logic_and(a, b) if _is(a) or _is(b) else bool(a) and bool(b))
_or = _each(lambda a, b: casadi.logic_or(a, b) if _is(a) or _is(b) else bool(a) or bool(b))
_not = _each(lambda a: casadi.logic_not(a) if _is(a) else not a)
_where = _each(lambda c, a, b: casadi.if_else(c, a, b) if _is(c) else (a if c else b))
_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{name: _math(name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh")},
    **{name: _math(name) for name in ("exp", "log", "log1p", "expm1", "sqrt", "erf", "log10")},
    "log2": _each(lambda a: casadi.log(a) / math.log(2) if _is(a) else math.log2(a)),
    "hypot": _each(lambda a, b: casadi.sqrt(a * a + b * b) if _is(a) or _is(b) else math.hypot(a, b)),
    "atan2": _each(lambda a, b: casadi.atan2(a, b) if _is(a) or _is(b) else math.atan2(a, b)),
    "neg": _each(lambda a: -a),
    "abs": _each(lambda a: casadi.fabs(a) if _is(a) else abs(a)),
    "sign": _each(lambda a: casadi.sign(a) if _is(a) else float(np.sign(a))),
    "sgn": _each(lambda a: casadi.sign(a) if _is(a) else float(np.sign(a))),
    "floor": _each(lambda a: casadi.floor(a) if _is(a) else math.floor(a)),
    "reciprocal": _each(lambda a: 1 / a),
    "rsqrt": _each(lambda a: 1 / (casadi.sqrt(a) if _is(a) else math.sqrt(a))),
    "square": _each(lambda a: a * a),
    "sigmoid": _each(_logistic),
    "silu": _each(lambda a: a * _logistic(a)),
    "relu": lambda a: _maximum(a, 0.0),
    "softplus": _softplus,
    "add": _plus(1),
    "sub": _plus(-1),
    "rsub": lambda a, b, alpha=1: _plus(-1)(b, a, alpha),
    "mul": _times,
    "div": _each(lambda a, b: a / b),
    "pow": _each(_power),
    "remainder": _each(lambda a, b: a - b * (casadi.floor(a / b) if _is(a) or _is(b) else math.floor(a / b))),
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": _clamp,
    "clamp_min": lambda a, low: _maximum(a, low),
    "clamp_max": lambda a, high: _minimum(a, high),
    "lt": _each(lambda a, b: a < b),
    "le": _each(lambda a, b: a <= b),
    "gt": _each(lambda a, b: a > b),
    "ge": _each(lambda a, b: a >= b),
    "eq": _each(lambda a, b: a == b),
    "ne": _each(lambda a, b: a != b),
    "logical_and": _and,
    "bitwise_and": _and,
    "logical_or": _or,
    "bitwise_or": _or,
    "logical_not": _not,
    "bitwise_not": _not,
    "where": _where,
    "sum": _sum,
    "mean": _mean,
    "prod": _reduce(lambda a, b: a * b, 1.0),
    "amax": _reduce(lambda a, b: casadi.fmax(a, b) if _is(a) or _is(b) else max(a, b), -math.inf),
    "amin": _reduce(lambda a, b: casadi.fmin(a, b) if _is(a) or _is(b) else min(a, b), math.inf),
    "any": _reduce(lambda a, b: casadi.logic_or(a, b) if _is(a) or _is(b) else bool(a) or bool(b), False),
    "all": _reduce(lambda a, b: casadi.logic_and(a, b) if _is(a) or _is(b) else bool(a) and bool(b), True),
    "linalg_vector_norm": _norm,
    "cumsum": _running(lambda a, b: a + b),
    "cumprod": _running(lambda a, b: a * b),
    "linalg_cross": lambda a, b, dim=-1: _plus(-1)(
        _times(np.roll(a, -1, dim), np.roll(b, -2, dim)), _times(np.roll(a, -2, dim), np.roll(b, -1, dim))
    ),
    "mm": _matmul,
    "mv": _matmul,
    "bmm": _matmul,
    "dot": _matmul,
    "matmul": _matmul,
    "addmm": _affine,
    "addmv": _affine,
    "baddbmm": _affine,
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "view_copy", "_reshape_copy"), lambda a, shape: a.reshape(shape)),
    **dict.fromkeys(("unsqueeze", "unsqueeze_copy"), np.expand_dims),
    **dict.fromkeys(("squeeze", "squeeze_copy"), _squeeze),
    **dict.fromkeys(("expand", "expand_copy"), _expand),
    **dict.fromkeys(("permute", "permute_copy"), np.transpose),
    **dict.fromkeys(("transpose", "transpose_copy"), np.swapaxes),
    **dict.fromkeys(("t", "t_copy"), lambda a: a.T),
    **dict.fromkeys(("select", "select_copy"), _select),
    **dict.fromkeys(("slice", "slice_copy"), _slice),
    **dict.fromkeys(("unbind", "unbind_copy"), _unbind),
    **dict.fromkeys(("split", "split_with_sizes", "split_copy", "split_with_sizes_copy"), _split),
    **dict.fromkeys(("diagonal", "diagonal_copy"), lambda a, offset=0, dim1=0, dim2=1: np.diagonal(a, offset, dim1, dim2)),
    "cat": lambda parts, dim=0: np.concatenate(parts, dim),
    "stack": lambda parts, dim=0: np.stack(parts, dim),
    "roll": lambda a, shifts, dims=(): np.roll(a, shifts, tuple(dims) or None),
    "flip": lambda a, dims: np.flip(a, tuple(dims)),
    "index": _index,
    **dict.fromkeys(("clone", "detach", "alias", "_to_copy", "lift_fresh_copy", "lift_fresh", "to", "contiguous"), lambda a: a),
    **dict.fromkeys(("zeros_like", "new_zeros"), lambda a, shape=None: _filled(a.shape if shape is None else shape, 0.0)),
    **dict.fromkeys(("ones_like", "new_ones"), lambda a, shape=None: _filled(a.shape if shape is None else shape, 1.0)),
    "full_like": lambda a, entry: _filled(a.shape, entry),
    "new_full": lambda a, shape, entry: _filled(shape, entry),
    "zeros": lambda shape: _filled(shape, 0.0),
    "ones": lambda shape: _filled(shape, 1.0),
    "full": lambda shape, entry: _filled(shape, entry),
    "scalar_tensor": lambda entry: _box(entry),
    "eye": lambda n, m=None: np.eye(n, m).astype(object),
    "arange": lambda *args, start=0, end=None, step=1: np.arange(*args).astype(object),
}  # fmt: skip
