"""Learned models as CasADi expressions: how far from torch, and what their derivatives cost.

    python -m mbrl.experiments.benchmarks.learned_expressions

Errors are those of `Exported.errors`, the largest over `networks` networks of an architecture with random weights and
normalisers, in float64. Times are per place, of value, Jacobian and Hessian of λᵀ f at `places` places, the steps of a
horizon, on one thread: "derived" calls a function that CasADi derives from the expression once per place, from buffers,
without Python's conversions; "batch" is one call of `Expression.batch`. Each is the least of `calls` calls, in which both
take turns, so that a load on the machine meets both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import casadi
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from mbrl.experiments.benchmarks.record import RESULTS, machine, write
from mbrl.expressions import Expression
from mbrl.features import Features
from mbrl.models import Ensemble, Exported, MeanDynamics
from mbrl.models.networks import Activation


@dataclass(frozen=True)
class Config:
    hidden: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64), (200, 200, 200, 200))
    members: tuple[int, ...] = (1, 5)
    networks: int = 3
    places: int = 40
    calls: int = 50
    out: Path = RESULTS / "learned_expressions.json"


def network(hidden: tuple[int, ...], members: int, activation: Activation, seed: int) -> Ensemble:
    """Of a cart-pole: 4 numbers, one of them an angle, and 1 action. Biases and normalisers as after a fit."""
    generator = torch.Generator().manual_seed(seed)
    model = Ensemble(
        4,
        1,
        0.05,
        features=Features(4, angles=(1,)),
        members=members,
        hidden=hidden,
        activation=activation,
        generator=generator,
    )
    with torch.no_grad():
        for value in (*model.net.biases, model.input_mean, model.target_mean):
            value.normal_(generator=generator)
        for value in (model.input_scale, model.target_scale):
            value.uniform_(0.1, 3, generator=generator)
    return model


def derived(expression: Expression) -> casadi.Function:
    """(x, u, k, θ, λ) -> value, Jacobian and Hessian, by CasADi."""
    step = expression.step
    x, u, k, theta = (casadi.MX.sym(f"i{i}", step.numel_in(i)) for i in range(4))
    lam = casadi.MX.sym("lambda", expression.nx)
    (value,) = step.call([x, u, k, theta], True, False)
    s = casadi.vertcat(x, u)
    results = [value, casadi.jacobian(value, s), casadi.hessian(casadi.dot(lam, value), s)[0]]
    return casadi.Function("derived", [x, u, k, theta, lam], [casadi.densify(part) for part in results])


def from_buffers(function: casadi.Function, given: list[np.ndarray]) -> tuple[Callable[[], Any], Any]:
    """A call of a function whose arguments and results stay where they are, and what must live as long."""
    buffer: Any
    buffer, evaluate = function.buffer()
    results = [np.zeros(function.nnz_out(i)) for i in range(function.n_out())]
    for i, value in enumerate(given[: function.n_in()]):
        buffer.set_arg(i, value.data)
    for i, value in enumerate(results):
        buffer.set_res(i, value.data)
    return evaluate, (buffer, results, given)


def run(hidden: tuple[int, ...], members: int, activation: Activation, config: Config) -> dict[str, Any]:
    exported = []
    tic = time.perf_counter()
    for seed in range(config.networks):
        exported.append(Exported(MeanDynamics(network(hidden, members, activation, seed))))
    proof = (time.perf_counter() - tic) / config.networks
    errors = [model.errors() for model in exported]
    expression, theta = exported[0].expression, exported[0].theta
    assert expression.batch is not None
    rng, n, batch = np.random.default_rng(0), config.places, expression.batch
    x, u, lam = (rng.normal(size=(n, m)) for m in (4, 1, 4))
    call, kept = from_buffers(derived(expression), [x[0], u[0], np.zeros(1), theta, lam[0]])
    least = {"derived": np.inf, "batch": np.inf}
    for _ in range(config.calls):
        tic = time.perf_counter()
        for _ in range(n):
            call()
        least["derived"] = min(least["derived"], time.perf_counter() - tic)
        tic = time.perf_counter()
        batch(x, u, theta, lam, order=2)
        least["batch"] = min(least["batch"], time.perf_counter() - tic)
    del kept
    tic = time.perf_counter()
    for _ in range(20):
        exported[0].theta  # noqa: B018
    return {
        "hidden": hidden,
        "members": members,
        "activation": activation,
        "errors": {what: max(e[what] for e in errors) for what in errors[0]},
        "us": {name: 1e6 * value / n for name, value in least.items()},
        "us_theta": 1e6 * (time.perf_counter() - tic) / 20,
        "s_proof": proof,
        "ntheta": expression.ntheta,
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    before = machine()
    cases = [(h, e, a) for h in config.hidden for e in config.members for a in get_args(Activation)]
    rows = [run(hidden, members, activation, config) for hidden, members, activation in cases]
    table = Table(
        "network", "members", "largest error", "f, J, H derived µs", "in a batch µs", "times", "proof s"
    )
    for row in rows:
        us = row["us"]
        table.add_row(
            f"{'-'.join(map(str, row['hidden']))} {row['activation']}",
            str(row["members"]),
            f"{max(row['errors'].values()):.1e}",
            *(f"{us[name]:.1f}" for name in ("derived", "batch")),
            f"{us['derived'] / us['batch']:.2f}",
            f"{row['s_proof']:.2f}",
        )
    Console().print(table)
    write(config.out, {"machine": before, "load_after": machine()["load"], "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
