"""Run by test_train_meshes.py on eight virtual CPU devices: one line of JSON, twenty losses on each mesh."""

import json

import jax
import numpy as np

from infimed_jax import config, sharding
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import init_params
from infimed_jax.train.optimizer import make_optimizer
from infimed_jax.train.state import init_state
from infimed_jax.train.step import make_train_step, next_token_loss
from tests.multi_device.model_worker import MODEL, random_batch

SHAPES = [(1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 8)]
STEPS = 20
CONFIG = config.Config(
    model=MODEL,
    optimizer=config.Optimizer(learning_rate=1e-3),
    train=config.Train(compute_dtype="float32", remat="none", attention="xla", logit_chunk=16),
)


def losses(shape: tuple[int, int, int]) -> list[float]:
    mesh = sharding.make_mesh(config.Mesh(*shape), jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(CONFIG.optimizer)
        state = init_state(init_params(jax.random.key(0), MODEL), CONFIG, optimizer)
        step = make_train_step(next_token_loss(MODEL, Compute.of(CONFIG.train)), optimizer)
        batch = sharding.place_batch(random_batch(), mesh)
        found = []
        for _ in range(STEPS):
            state, metrics = step(state, batch, CONFIG.optimizer.learning_rate)
            found.append(float(metrics["loss"]))
    return found


if __name__ == "__main__":
    print(json.dumps({str(shape): losses(shape) for shape in SHAPES}))
