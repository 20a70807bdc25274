# mypy: ignore-errors
"""One PETS plan or one epoch of training by mbrl-lib 0.2.0. Run by the Python of that peer; see `pets_speed`."""

import json
import sys
import time

import numpy as np

np.float_, np.bool8 = np.float64, np.bool_  # gone in NumPy 2, which the library predates

import gymnasium
import omegaconf
import safetensors.torch
import torch

import mbrl.models
import mbrl.planning
import mbrl.util.replay_buffer

setting = json.loads(sys.argv[1])
ny, nu, act = setting["ny"], setting["nu"], {"relu": "ReLU", "silu": "SiLU"}[setting["activation"]]
torch.set_num_threads(setting["threads"])
net = mbrl.models.GaussianMLP(
    ny + nu,
    ny,
    "cpu",
    num_layers=4,
    ensemble_size=5,
    hid_size=200,
    deterministic=False,
    propagation_method="random_model",
    activation_fn_cfg=omegaconf.OmegaConf.create({"_target_": f"torch.nn.{act}"}),
)
with torch.no_grad():  # the weights of the other side
    theirs = safetensors.torch.load_file(setting["weights"])
    layers = [sequential[0] for sequential in net.hidden_layers] + [net.mean_and_logvar]
    for i, layer in enumerate(layers):
        layer.weight.copy_(theirs[f"weight{i}"])
        layer.bias.copy_(theirs[f"bias{i}"])
    net.max_logvar.fill_(setting["max_logvar"])
    net.min_logvar.fill_(-10.0)
dynamics = mbrl.models.OneDTransitionRewardModel(
    net, target_is_delta=True, normalize=True, learned_rewards=False
)
dynamics.input_normalizer.mean = torch.zeros(1, ny + nu)
dynamics.input_normalizer.std = torch.ones(1, ny + nu)


class Spaces:
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (ny,))
    action_space = gymnasium.spaces.Box(-1, 1, (nu,))


world = mbrl.models.ModelEnv(
    Spaces(),
    dynamics,
    lambda u, y: torch.zeros(len(y), 1, dtype=torch.bool),
    lambda u, y: y[:, :1],
    generator=torch.Generator().manual_seed(setting["seed"]),
)
optimizer = mbrl.planning.TrajectoryOptimizer(
    omegaconf.OmegaConf.create(
        {
            "_target_": "mbrl.planning.CEMOptimizer",
            "num_iterations": 5,
            "elite_ratio": 0.1,
            "population_size": setting["population"],
            "alpha": 0.1,
            "device": "cpu",
            "lower_bound": "???",
            "upper_bound": "???",
            "return_mean_elites": True,
            "clipped_normal": False,
        }
    ),
    np.full(nu, -1.0),
    np.full(nu, 1.0),
    setting["horizon"],
    1,
    True,
)
start = np.zeros(ny)


def plan():
    optimizer.reset()
    tic = time.perf_counter()
    plan = optimizer.optimize(lambda u: world.evaluate_action_sequences(u, start, 20))
    seconds = time.perf_counter() - tic
    value = world.evaluate_action_sequences(torch.as_tensor(plan, dtype=torch.float32)[None], start, 1_000)
    return {"seconds": seconds, "return": float(value.mean())}


def epoch():
    tic = time.perf_counter()
    trainer.train(batches, num_epochs=1, evaluate=False, silent=True)
    seconds = time.perf_counter() - tic
    with torch.no_grad():
        said = net.forward(torch.cat([test["y"], test["u"]], -1), use_propagation=False)[0]
    error = (said - (test["y_next"] - test["y"])) / (test["y_next"] - test["y"]).std(0)
    return {"seconds": seconds, "error": float((error**2).mean())}


if setting["work"] == "train":
    data = safetensors.torch.load_file(setting["data"])
    test = {name[5:]: value for name, value in data.items() if name.startswith("test/")}
    rows = [data[name].numpy() for name in ("y", "u", "y_next")]
    zeros = np.zeros(len(rows[0]), dtype=np.float32)
    batches = mbrl.util.replay_buffer.BootstrapIterator(
        mbrl.types.TransitionBatch(*rows, zeros, zeros > 0, zeros > 0),
        256,
        5,
        shuffle_each_epoch=True,
        rng=np.random.default_rng(setting["seed"]),
    )
    trainer = mbrl.models.ModelTrainer(dynamics, optim_lr=1e-3, weight_decay=1e-5)
work = {"plan": plan, "train": epoch}[setting["work"]]
print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps(work()), flush=True)
