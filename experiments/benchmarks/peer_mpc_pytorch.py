# mypy: ignore-errors
"""Solves of mpc 0.0.6 (mpc.pytorch) on its own pendulum. Run by the Python of that peer; see `ilqr_speed`.

Its settings are those of its example notebook (Pendulum-Control.ipynb).
"""

import json
import sys
import time

import numpy as np
import torch
from mpc.env_dx.pendulum import PendulumDx
from mpc.mpc import MPC, GradMethods, QuadCost

setting = json.loads(sys.argv[1])
torch.set_num_threads(setting["threads"])


class Analytic(PendulumDx):
    """Its pendulum with the Jacobians that GradMethods.ANALYTIC asks for: of all steps in one call."""

    def grad_input(self, x, u):
        g, m, l = self.params
        c, s, rate = x.unbind(-1)
        faster = rate + self.dt * (1.5 * g / l * s + 3 * u[:, 0] / (m * l**2))
        angle = torch.atan2(s, c) + self.dt * faster
        by_rate = torch.stack(
            [torch.zeros_like(c), 1.5 * self.dt * g / l * torch.ones_like(c), torch.ones_like(c)], -1
        )
        by_angle = torch.stack([-s, c, torch.zeros_like(c)], -1) / (c**2 + s**2)[:, None] + self.dt * by_rate
        R = torch.stack([-angle.sin()[:, None] * by_angle, angle.cos()[:, None] * by_angle, by_rate], 1)
        push = 3 * self.dt / (m * l**2)
        S = push * torch.stack([-self.dt * angle.sin(), self.dt * angle.cos(), torch.ones_like(c)], -1)
        return R, S[..., None]


method = GradMethods[setting["method"]]
plant = Analytic() if method is GradMethods.ANALYTIC else PendulumDx()
x0, T = torch.from_numpy(np.load(setting["starts"])).float(), setting["horizon"]
weights, slope = plant.get_true_obj()
cost = QuadCost(
    torch.diag(weights).repeat(T, len(x0), 1, 1),
    slope.repeat(T, len(x0), 1),
)
solver = MPC(
    plant.n_state,
    plant.n_ctrl,
    T,
    u_lower=plant.lower,
    u_upper=plant.upper,
    lqr_iter=50,
    grad_method=method,
    verbose=0,
    eps=1e-2,
    exit_unconverged=False,
    detach_unconverged=False,
    linesearch_decay=plant.linesearch_decay,
    max_linesearch_iter=plant.max_linesearch_iter,
)


def work():
    tic = time.perf_counter()
    for _ in range(setting["repeats"]):
        solver(x0, cost, plant)
    return {"seconds": (time.perf_counter() - tic) / setting["repeats"]}


_, controls, _ = solver(x0, cost, plant)
np.save(setting["controls"], controls.detach().double().transpose(0, 1).numpy())
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(work()), flush=True)
