"""Public checks of the contract of models, for your own as for ours. See also `task_checks` and `planner_checks`.

Each raises `ContractError` with what was needed, what came and what is most likely wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from mbrl.errors import ContractError, require
from mbrl.protocols import Dynamics, Stochastic


def fail(user: str, needed: str, got: str, likely: str) -> NoReturn:
    raise ContractError(f"{user} needs {needed}, but {got}. Most likely {likely}.")


def same(a: Tensor, b: Tensor, tolerance: float = 0.0) -> bool:
    """Whether two tensors have one shape and agree, NaN with NaN, to a share of 1 + |b|."""
    if a.shape != b.shape:
        return False
    b = b.to(a)
    if tolerance == 0.0:
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def gap(a: Tensor, b: Tensor) -> str:
    """How far two tensors are apart, for messages."""
    if a.shape != b.shape:
        return f"their shapes are {tuple(a.shape)} and {tuple(b.shape)}"
    a, b = a.detach(), b.detach()
    difference = (a - b.to(a)).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    where = tuple((difference == difference.max()).nonzero()[0].tolist())
    return f"they differ by {float(difference[where]):.3g} at {where} ({float(a[where]):.9g} and {float(b[where]):.9g})"


def check_dynamics(
    dynamics: Dynamics | Stochastic, x: Tensor, u: Tensor, *, tolerance: float = 1e-4, seed: int = 0
) -> None:
    """Check dynamics on typical states and actions.

    Sizes; shapes for several leading dimensions and under broadcasting; determinism; inputs left alone;
    independent rows, a NaN row included; the output; and, where they exist, `realize` and the derivatives
    (`linearize`, `linearize_output`, `difference`, `retract`) against central differences.

    Args:
        dynamics: deterministic, or `Stochastic`: then one realisation is checked too.
        x: (B, nx), at least two different states.
        u: (B, nu).
        tolerance: of the derivatives, relative to 1 + |derivative|.
        seed: of the realisations.

    Raises:
        ContractError: with what was needed, what came and what is most likely wrong.
    """
    name = type(dynamics).__name__
    for size in ("nx", "nu", "ny"):
        value = getattr(dynamics, size, None)
        if not isinstance(value, int) or value < 1:
            fail(
                name,
                f"{size}, an int of at least 1",
                f"it is {value!r}",
                "the property is missing or not an int",
            )
    if not (isinstance(dynamics.dt, float) and dynamics.dt > 0):
        fail(name, "dt, seconds per step, a float above 0", f"it is {dynamics.dt!r}", "it is unset or an int")
    if x.ndim != 2 or u.ndim != 2 or len(x) != len(u) or len(x) < 2:
        raise ContractError(
            f"check_dynamics needs x (B, nx) and u (B, nu) with B ≥ 2, but got {tuple(x.shape)} and {tuple(u.shape)}."
        )
    if x.shape[-1] != dynamics.nx or u.shape[-1] != dynamics.nu:
        fail(
            name,
            f"x (B, {dynamics.nx}) and u (B, {dynamics.nu})",
            f"check_dynamics got {tuple(x.shape)} and {tuple(u.shape)}",
            "nx or nu is wrong, or the samples belong to another model",
        )
    if isinstance(dynamics, Stochastic):
        _check_realize(dynamics, x, u, seed)
        drawn = dynamics.realize((), 1, generator=torch.Generator().manual_seed(seed))
        _check_step(f"A realisation of {name}", drawn, x, u)
    else:
        require(name, "dynamics", dynamics, ("step", "output"), "See mbrl.protocols.Dynamics.")
        _check_step(name, dynamics, x, u)
        if hasattr(dynamics, "linearize"):
            _check_derivatives(name, dynamics, x, u, tolerance)


def _check_step(name: str, dynamics: Dynamics, x: Tensor, u: Tensor) -> None:
    nx, nu, ny = dynamics.nx, dynamics.nu, dynamics.ny
    # A batched matrix product may round differently than a single one.
    rounding = 1e-4 if x.dtype == torch.float32 else 1e-9
    before_x, before_u = x.clone(), u.clone()
    x_next = dynamics.step(x, u, 0)
    if not same(x, before_x) or not same(u, before_u):
        fail(name, "step to leave x and u alone", "it changed them", "an in-place operation on an argument")
    if x_next.shape != x.shape:
        fail(
            name,
            f"step to return {tuple(x.shape)}",
            f"it returned {tuple(x_next.shape)}",
            "a wrong axis or squeeze",
        )
    kept = x_next.clone()
    dynamics.step(x.flip(0), u.flip(0), 0)
    if not same(x_next, kept):
        fail(
            name,
            "step to return a tensor of its own",
            "a later call changed an earlier result",
            "step returns a view of an internal buffer; clone it",
        )
    again = dynamics.step(x, u, torch.tensor(0))
    if not same(again, x_next):
        fail(
            name,
            "step to be a function of (x, u, k)",
            f"two calls with the same arguments disagree: {gap(again, x_next)}",
            "randomness or hidden state inside; draw it in realize",
        )

    pair_x, pair_u = x[:2], u[:2]
    reference = x_next[:2]
    wide = dynamics.step(pair_x[:, None], pair_u[None, :], 0)
    both = dynamics.step(pair_x[:, None].expand(2, 2, nx), pair_u[None].expand(2, 2, nu), 0)
    cases: list[tuple[str, Tensor, Tensor]] = [
        ("x (nx,), u (nu,)", dynamics.step(x[0], u[0], 0), x_next[0]),
        ("x (1, nx), u (1, nu)", dynamics.step(x[:1], u[:1], 0), x_next[:1]),
        (
            "x (2, 1, nx), u (2, 1, nu)",
            dynamics.step(pair_x[:, None], pair_u[:, None], 0),
            reference[:, None],
        ),
        (
            "x (3, 2, nx), u (3, 2, nu)",
            dynamics.step(pair_x.expand(3, 2, nx), pair_u.expand(3, 2, nu), 0),
            reference.expand(3, 2, nx),
        ),
        ("x (2, 1, nx), u (1, 2, nu), broadcast,", wide, both),
    ]
    for text, got, wanted in cases:
        if got.shape != wanted.shape:
            fail(
                name,
                f"step with {text} to return {tuple(wanted.shape)}",
                f"it returned {tuple(got.shape)}",
                "an axis is counted from the front, or squeezed; use ... and negative axes",
            )
        if not same(got, wanted, rounding):
            fail(
                name,
                f"step with {text} to agree with the same rows in one batch",
                gap(got, wanted),
                "rows mix, e.g. a mean, norm or softmax over a batch axis",
            )

    bad_x = x.clone()
    bad_x[1] = torch.nan
    poisoned = dynamics.step(bad_x, u, 0)
    others = torch.arange(len(x), device=x.device) != 1
    if not same(poisoned[others], x_next[others], rounding):
        fail(
            name,
            "independent rows",
            "a NaN state in row 1 changed the other rows",
            "an operation over the batch axis, or the whole batch is discarded when one row fails",
        )
    bad_u = u.clone()
    bad_u[1] = torch.nan
    for what, row in (("state", poisoned[1]), ("action", dynamics.step(x, bad_u, 0)[1])):
        if not torch.isnan(row).any() or (what == "state" and not torch.isnan(row).all()):
            fail(
                name,
                f"a row with a NaN {what} to come out as NaN",
                f"it came out as {row[:6].tolist()}",
                "NaN is replaced on the way (clamp, where, or a simulator that resets the row)",
            )

    y = dynamics.output(x)
    if y.shape != (*x.shape[:-1], ny):
        fail(name, f"output to return {(*x.shape[:-1], ny)}", f"it returned {tuple(y.shape)}", "ny is wrong")
    for text, state, wanted in (("(nx,)", x[0], y[0]), ("(2, 1, nx)", pair_x[:, None], y[:2, None])):
        got = dynamics.output(state)
        if not same(got, wanted, rounding):
            fail(
                name,
                f"output of x {text} to be the same rows as in a batch, {tuple(wanted.shape)}",
                f"it returned {tuple(got.shape)} with other values",
                "an axis is counted from the front",
            )


def _check_realize(dynamics: Stochastic, x: Tensor, u: Tensor, seed: int) -> None:
    """Particles (3, 1, 1), as in planning; two draws alive at once; the seed decides."""
    name = type(dynamics).__name__

    def draw(offset: int = 0) -> Dynamics:
        generator = torch.Generator().manual_seed(seed + offset)
        return dynamics.realize((3, 1, 1), 2, generator=generator)

    states, actions = x[None, :2, None], u[None, :2, None]  # (1, M, 1, ·)
    before = torch.get_rng_state()
    first = draw()
    result = first.step(states, actions, 0)
    if result.shape != (3, 2, 1, dynamics.nx):
        fail(
            name,
            f"realize((3, 1, 1)) to step x (1, 2, 1, nx) to {(3, 2, 1, dynamics.nx)}",
            f"it returned {tuple(result.shape)}",
            "the draw is not of the leading shape that was asked for",
        )
    second = draw(1)
    second.step(states, actions, 0)
    if not same(first.step(states, actions, 0), result):
        fail(
            name,
            "a realisation to stay what it is",
            "stepping another realisation, or stepping twice, changed its result",
            "the draw is stored on the shared model, or step draws again",
        )
    if not same(draw().step(states, actions, 0), result):
        fail(
            name,
            "realize to depend on the generator only",
            "the same seed gave another function",
            "a draw from a global random state, or state kept between calls",
        )
    if not torch.equal(before, torch.get_rng_state()):
        fail(
            name,
            "realize to draw from `generator`",
            "torch's global state moved",
            "a draw without generator=",
        )


def _check_derivatives(name: str, dynamics: Any, x: Tensor, u: Tensor, tolerance: float) -> None:
    """linearize, linearize_output, difference and retract, in float64 by central differences."""
    x, u = x.double(), u.double()
    nu, ndx, eps = dynamics.nu, getattr(dynamics, "ndx", dynamics.nx), 1e-6
    if hasattr(dynamics, "retract") != hasattr(dynamics, "difference"):
        fail(name, "both retract and difference, or neither", "one is missing", "it was forgotten")
    flat = not hasattr(dynamics, "retract")
    retract: Callable[[Tensor, Tensor], Tensor] = torch.add if flat else dynamics.retract
    # difference(a, b) = b ⊖ a, so that retract(a, difference(a, b)) = b.
    difference: Callable[[Tensor, Tensor], Tensor] = (lambda a, b: b - a) if flat else dynamics.difference

    zero = x.new_zeros(len(x), ndx)
    small = 1e-3 * torch.randn(zero.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x)
    for what, got, wanted in (
        ("difference(x, x) = 0", difference(x, x), zero),
        ("difference(x, retract(x, d)) = d", difference(x, retract(x, small)), small),
    ):
        if not same(got, wanted, 1e-8):
            fail(
                name,
                what,
                gap(got, wanted),
                "difference and retract use different tangent spaces, or their arguments are swapped",
            )

    def compare(what: str, got: Tensor, fun: Callable[[Tensor], Tensor], n: int) -> None:
        basis = eps * torch.eye(n, dtype=x.dtype, device=x.device)
        columns = [(fun(d) - fun(-d)) / (2 * eps) for d in basis]
        wanted = torch.stack(columns, -1)
        if got.shape != wanted.shape:
            fail(
                name,
                f"{what} of shape {tuple(wanted.shape)}",
                f"it has {tuple(got.shape)}",
                "the output axis must come before the input axis",
            )
        if not same(got, wanted, tolerance):
            fail(
                name,
                f"{what} to be the derivative of the step that is rolled out",
                f"against central differences {gap(got, wanted)}",
                "a term is missing, an axis is transposed, or another integrator is differentiated",
            )

    fx, fu = dynamics.linearize(x, u, 0)
    x_next = dynamics.step(x, u, 0)
    compare(
        "fx", fx, lambda d: difference(x_next, dynamics.step(retract(x, d.expand(len(x), ndx)), u, 0)), ndx
    )
    compare("fu", fu, lambda d: difference(x_next, dynamics.step(x, u + d, 0)), nu)
    if hasattr(dynamics, "linearize_output"):
        G = dynamics.linearize_output(x)
        refreshed = getattr(dynamics, "refreshed", lambda moved: moved)
        compare(
            "G of linearize_output",
            G,
            lambda d: dynamics.output(refreshed(retract(x, d.expand(len(x), ndx)))),
            ndx,
        )
