"""A chemical reactor with uncertain kinetics, a benchmark of robust nonlinear MPC."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbrl.envs.systems import System


@dataclass(frozen=True)
class CSTR(System):
    """A stirred tank with a cooling jacket, in which A reacts to B and B to C, and two of A to D. Time is in hours.

    x = (A in mol/l, B in mol/l, temperature in 100 °C, the jacket's in 100 °C), u = (inflow in 100 /h, heat given to the
    jacket in 2000 kJ/h): each of the order of 1. The parameters that are uncertain are its fields, p = (alpha, beta);
    values of them are scenarios.

    Attributes:
        alpha: factor of the activation energy of A → D.
        beta: factor of the rate of A → B.

    Reference: Klatt & Engell 1998, "Gain-scheduling trajectory control of a continuous stirred tank reactor"; the numbers
        are those of examples/CSTR of do-mpc.
    """

    alpha: float = 1.0
    beta: float = 1.0
    nx, nu, nq = 4, 2, 0

    def ode(self, x: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        alpha, beta = self._parameters(p)
        a, b, temperature, jacket = x.unbind(-1)
        inflow, heat = 100.0 * u[..., 0], 2000.0 * u[..., 1]
        kelvin = 100.0 * temperature + 273.15
        arrhenius = 1.287e12 * (-9758.3 / kelvin).exp()  # 1/h
        to_b, to_c = beta * arrhenius * a, arrhenius * b
        to_d = 9.043e9 * (-alpha * 8560.0 / kelvin).exp() * a**2
        heating = -4.2 * to_b + 11.0 * to_c + 41.85 * to_d  # kJ/(l h)
        transfer = 4032.0 * 0.215 * 100.0 * (temperature - jacket)  # through the wall, kJ/h
        volumetric = 0.9342 * 3.01  # heat capacity of the mixture, kJ/(l K)
        warmer = (heating - transfer / 10.01) / volumetric + inflow * (130.0 - 100.0 * temperature)
        return torch.stack(
            [
                inflow * (5.1 - a) - to_b - to_d,
                -inflow * b + to_b - to_c,
                warmer / 100.0,
                (heat + transfer) / (5.0 * 2.0) / 100.0,
            ],
            -1,
        )
