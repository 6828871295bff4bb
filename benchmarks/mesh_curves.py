"""The tiny model's loss under each mesh of eight virtual CPU devices, overlaid in one picture.

    python benchmarks/mesh_curves.py [--steps 200] [--output docs/mesh_curves.png]

Same parameters, same batches, one curve a mesh: they must lie on each other. Below, each curve's distance to the one of
a single device, which is float32 rounding carried along. The data are random pictures and repeated patterns of tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
BATCHES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/mesh_curves.png")
    parser.add_argument("--json", type=Path, help="also write the losses here")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["NPROC"] = "64"  # XLA's threads: with one a device, two collectives can wait for each other
    curves = {}
    for shape in SHAPES:
        curves[shape] = losses(shape, args.steps)
        print(f"data {shape[0]}, fsdp {shape[1]}, tensor {shape[2]}: {curves[shape][0]:.5f} -> {curves[shape][-1]:.5f}")
    draw(curves, args.output)
    if args.json:
        from infimed_jax.files import write_json

        write_json(args.json, {str(shape): curve for shape, curve in curves.items()})
    print(f"Outputs: {args.output}")


def model():
    """configs/models/tiny.yaml with heads, feed-forward and vocabulary that eight devices divide."""
    from infimed_jax.config import load

    heads = [
        "model.text.num_heads=8",
        "model.text.num_kv_heads=8",
        "model.text.head_dim=12",
        "model.vision.num_heads=8",
    ]
    return load([ROOT / "configs/models/tiny.yaml"], [*heads, "model.text.vocab_size=512"]).model


def losses(shape: tuple[int, int, int], steps: int) -> list[float]:
    """Losses of `steps` steps on the first devices that `shape` needs."""
    import jax

    from infimed_jax import config, sharding
    from infimed_jax.models.compute import Compute
    from infimed_jax.models.params import init_params
    from infimed_jax.train.optimizer import learning_rate, make_optimizer
    from infimed_jax.train.state import init_state
    from infimed_jax.train.step import make_train_step, next_token_loss

    cfg = config.Config(
        model=model(),
        optimizer=config.Optimizer(learning_rate=3e-3),
        train=config.Train(compute_dtype="float32", remat="none", attention="xla", logit_chunk=64),
    )
    devices = jax.devices()[: shape[0] * shape[1] * shape[2]]
    mesh = sharding.make_mesh(config.Mesh(*shape), devices)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(cfg.optimizer)
        state = init_state(init_params(jax.random.key(0), cfg.model), cfg, optimizer)
        step = make_train_step(next_token_loss(cfg.model, Compute.of(cfg.train)), optimizer)
        batches = [sharding.place_batch(random_batch(number, cfg.model), mesh) for number in range(BATCHES)]
        found = []
        for number in range(steps):
            state, metrics = step(state, batches[number % BATCHES], learning_rate(cfg.optimizer, number, steps))
            found.append(float(metrics["loss"]))
    return found


def random_batch(seed: int, model):
    """Eight rows of 64 places: two segments of a repeated pattern, the first with an image."""
    import numpy as np

    from infimed_jax.data.batch import Segment, build_row, stack_rows

    rng = np.random.default_rng(seed)
    places, shape = model.visual_tokens, model.blank_image().shape

    def segment(images: int, text: int) -> Segment:
        visual = np.zeros(text + places * images, bool)
        visual[1 : 1 + places * images] = True
        tokens = np.resize(rng.integers(0, model.vocab_size, 4), len(visual)).astype(np.int32)
        pixels = tuple(rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(images))
        return Segment(tokens, (~visual).astype(np.float32), visual, pixels)

    rows = [[segment(1, 10), segment(0, 12)] for _ in range(8)]
    return stack_rows([build_row(row, context=64, images=1, model=model) for row in rows])


def draw(curves: dict[tuple[int, int, int], list[float]], file: Path) -> None:
    import numpy as np

    from infimed_jax.report.plot import LEGEND, SERIES, panels, save

    figure, (above, below) = panels(8, 6.4, 2, 1, sharex=True)
    single = np.array(curves[1, 1, 1])
    steps = np.arange(1, len(single) + 1)
    for number, (shape, curve) in enumerate(curves.items()):
        label = f"data {shape[0]} · fsdp {shape[1]} · tensor {shape[2]}"
        width = 1 + 1.1 * (len(curves) - number)  # the last lies on top, the others show at its sides
        above.plot(steps, curve, color=SERIES[number], linewidth=width, label=label)
        if shape != (1, 1, 1):
            gap = np.abs(np.array(curve) / single - 1)
            below.semilogy(steps, np.maximum(gap, 1e-9), color=SERIES[number], linewidth=1)
    above.set(ylabel="loss, nats a token", title="One model, the same batches, seven meshes")
    above.legend(**LEGEND)
    below.set(xlabel="step", ylabel="|loss / loss on one device - 1|")
    save(figure, file)


if __name__ == "__main__":
    main()
