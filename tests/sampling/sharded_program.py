"""Run by test_sharded_generate.py in a process with eight virtual devices; prints "sharded generate: ok"."""

import re

import jax
import numpy as np

from infimed_jax import config
from infimed_jax.config import Sampling
from infimed_jax.data.batch import Segment
from infimed_jax.errors import UserError
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed.config import Model, Projector, Text, Vision
from infimed_jax.models.params import abstract_params, init_params
from infimed_jax.sampling import decode
from infimed_jax.sampling.engine import Engine, complete
from infimed_jax.sampling.weights import Decoder, sampler_weights
from infimed_jax.sharding import make_mesh

MODEL = Model(
    Vision(image_size=12, patch_size=3, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),
    Projector(visual_tokens=4),
    Text(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8),
)
COMPUTE = Compute("float32", "none", "xla", 16)
SAMPLING = Sampling(temperature=1.0, repetition_penalty=1.1, max_tokens=9, slots=8, burst=4)
IMAGE_TOKEN, STOPS = 3, (7,)


def prompts() -> list[Segment]:
    """Twenty prompts for eight slots; some are groups, some share an image."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (12, 12, 3), np.uint8) for _ in range(5)]
    made = []
    for number in range(12):
        own = tuple(images[number % 5 : number % 5 + number % 3])
        text = rng.integers(8, 64, 5 + number)
        tokens = np.concatenate([np.full(4 * len(own), IMAGE_TOKEN), text]).astype(np.int32)
        made.append(Segment(tokens, np.zeros(len(tokens), np.float32), tokens == IMAGE_TOKEN, own))
    return made + [made[1]] * 5 + [made[11]] * 3


def run(mesh: jax.sharding.Mesh, asked: list[Segment], params: dict) -> list:
    with jax.set_mesh(mesh):
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, jax.sharding.NamedSharding(mesh, like.sharding.spec)),
            params,
            abstract_params(MODEL),
        )
        return complete(engine(placed, SAMPLING), asked, SAMPLING)


def engine(params: dict, sampling: Sampling) -> Engine:
    decoder = Decoder(sampler_weights(params, MODEL, "float32"), MODEL, COMPUTE)
    return Engine(
        decoder, sampling, stops=STOPS, banned=(IMAGE_TOKEN,), key=jax.random.key(3), longest=24, penalties=True
    )


def burst_text(mesh: jax.sharding.Mesh) -> str:
    """The compiled decoding loop."""
    with jax.set_mesh(mesh):
        weights = sampler_weights(init_params(jax.random.key(0), MODEL), MODEL, "float32")
        assert not any("fsdp" in str(x.sharding.spec) for x in jax.tree.leaves(weights))
        slots = decode.empty_slots(8, 64, MODEL, "float32", False)
        keys = slots.cache[0][0]
        assert keys.sharding.shard_shape(keys.shape) == (2, 1, 64, 8)
        stops, banned = np.array(STOPS, np.int32), np.zeros(64, bool)
        lowered = decode.burst.lower(
            Decoder(weights, MODEL, COMPUTE), slots, banned, stops, jax.random.key(0), np.int32(0), 4,
        )  # fmt: skip
        return lowered.compile().as_text()


def main() -> None:
    one = make_mesh(config.Mesh(fsdp=1), jax.devices()[:1])
    eight = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(one):
        params = jax.tree.map_with_path(
            lambda path, x: np.asarray(x) * (1 if "scale" in str(path[-1]) else 4),
            init_params(jax.random.key(0), MODEL),
        )
    asked = prompts()
    expected, sharded = run(one, asked, params), run(eight, asked, params)
    for a, b in zip(expected, sharded, strict=True):
        assert (a.tokens.tolist(), a.finish) == (b.tokens.tolist(), b.finish), (a, b)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
    assert {reply.finish for reply in sharded} == {"stop", "length"}

    text = burst_text(eight)
    assert not re.search(r"f32\[2,1,64,8\]\S* copy\(", text), "the cache is copied, not written in place"
    moved = re.findall(r"= f32\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", text)
    # Gathered are a step's logits over the vocabulary's shards, and a burst's log-probabilities; no weight, no cache.
    sizes = {int(np.prod([int(n) for n in shape.split(",") if n])) for shape, _ in moved}
    assert moved and max(sizes) <= 2 * 64, (moved, sizes)

    try:
        with jax.set_mesh(eight):
            engine(init_params(jax.random.key(0), MODEL), Sampling(slots=6))
    except UserError as error:
        assert "sampling.slots=6 must be a multiple" in str(error)
    else:
        raise AssertionError("six slots went onto four shards")
    print("sharded generate: ok")


if __name__ == "__main__":
    main()
