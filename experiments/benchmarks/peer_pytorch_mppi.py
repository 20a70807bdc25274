# mypy: ignore-errors
"""One command of pytorch_mppi 0.9.1. Run by the Python of that peer; see `mppi_speed`."""

import itertools
import json
import sys
import time

import safetensors.torch
import torch
from pytorch_mppi import MPPI

setting = json.loads(sys.argv[1])
ny, nu = setting["ny"], setting["nu"]
torch.set_num_threads(setting["threads"])
act = {"relu": torch.nn.ReLU, "silu": torch.nn.SiLU}[setting["activation"]]
sizes = [ny + nu, 200, 200, 200, 200, ny]
layers = []
for n, m in itertools.pairwise(sizes):
    layers += [torch.nn.Linear(n, m), act()]
net = torch.nn.Sequential(*layers[:-1])
with torch.no_grad():  # the weights of the other side
    theirs = safetensors.torch.load_file(setting["weights"])
    for i, layer in enumerate(net[::2]):
        layer.weight.copy_(theirs[f"weight{i}"][0].T)
        layer.bias.copy_(theirs[f"bias{i}"][0, 0])


def step(x, u):
    return x + 0.1 * net(torch.cat([x, u], -1))


def cost(x, u):
    return (x * x).sum(-1) + 0.01 * (u * u).sum(-1)


planner = MPPI(
    step,
    cost,
    ny,
    torch.eye(nu),
    num_samples=setting["population"],
    horizon=setting["horizon"],
    lambda_=1.0,
    u_min=-torch.ones(nu),
    u_max=torch.ones(nu),
)
start = torch.ones(ny)


@torch.no_grad()
def command():
    tic = time.perf_counter()
    planner.command(start)
    seconds = time.perf_counter() - tic
    x, total = start, 0.0
    for u in planner.U:
        x = step(x, u)
        total += float(cost(x, u))
    return {"seconds": seconds, "return": -total}


print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(command()), flush=True)
