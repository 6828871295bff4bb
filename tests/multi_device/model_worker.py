"""Run by test_model_meshes.py on eight virtual CPU devices: one line of JSON with what the model does on each mesh."""

import functools
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from infimed_jax import config, sharding
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.models import forward
from infimed_jax.models.params import abstract_params, init_params
from tests import tiny

_TINY = tiny.model(vocab_size=96, intermediate_size=64, num_heads=16, num_kv_heads=8, head_dim=4)
MODEL = replace(_TINY, vision=replace(_TINY.vision, hidden_size=32, intermediate_size=48, num_heads=8))  # for tensor=8
COMPUTE = forward.Compute("float32", "full", "xla", 8)
COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def random_batch():
    """Eight rows of two segments, the first with one or two images; every row ends in padding."""
    rng = np.random.default_rng(0)

    def segment(images: int, text: int) -> Segment:
        visual = np.zeros(text + 4 * images, bool)
        visual[1 : 1 + 4 * images] = True
        tokens = rng.integers(0, 96, len(visual)).astype(np.int32)
        pixels = tuple(rng.integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8) for _ in range(images))
        return Segment(tokens, (~visual).astype(np.float32), visual, pixels)

    def row(i: int):
        segments = [segment(1 + i % 2, 3 + i), segment(0, 5)]
        return build_row(segments, context=28, images=2, model=MODEL)

    return stack_rows([row(i) for i in range(8)])


def loss(params, batch, model, compute):
    hidden = forward.hidden_states(params, batch, model, compute)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    logprobs, entropy = forward.token_logprobs(params, hidden, targets, batch.loss_weights, model, compute)
    return -(logprobs * batch.loss_weights).sum() / batch.loss_weights.sum(), entropy.sum()


def on_mesh(shape: tuple[int, int, int], devices: list, model: config.Model, compute: forward.Compute):
    """(parameters, loss and entropy, gradients), placed as the mesh says."""
    mesh = sharding.make_mesh(config.Mesh(*shape), devices)
    with jax.set_mesh(mesh):
        params = init_params(jax.random.key(0), model)
        batch = sharding.place_batch(random_batch(), mesh)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(2, 3))
        (value, entropy), grads = step(params, batch, model, compute)
    return params, (float(value), float(entropy)), grads


@functools.cache
def on_one_device(model: config.Model):
    return on_mesh((1, 1, 1), jax.devices()[:1], model, COMPUTE)


def largest_gap(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


def report(shape: tuple[int, int, int], attention: str, tied: bool) -> dict:
    model = replace(MODEL, text=replace(MODEL.text, tie_embeddings=tied))
    expected_params, expected, expected_grads = on_one_device(model)
    params, actual, grads = on_mesh(shape, jax.devices(), model, replace(COMPUTE, attention=attention))
    with jax.set_mesh(sharding.make_mesh(config.Mesh(*shape))):
        abstract = abstract_params(model)
    specs = lambda tree: [tuple(x.sharding.spec) for x in jax.tree.leaves(tree)]  # noqa: E731
    stored = {
        "q_proj": params["text"]["layers"]["self_attn"]["q_proj"]["kernel"],
        "embed": params["text"]["embed_tokens"],
    }
    return {
        "loss": [expected[0], actual[0]],
        "entropy": [expected[1], actual[1]],
        "init_gap": largest_gap(params, expected_params),
        "grad_gap": largest_gap(grads, expected_grads),
        "grads_placed": specs(grads) == specs(params),
        "abstract_placed": specs(abstract) == specs(params),
        "shards": {name: x.addressable_shards[0].data.shape for name, x in stored.items()},
    }


def merge_collectives(shape: tuple[int, int, int]) -> dict[str, list[str]]:
    """Collectives of laying visual tokens over text, and of its gradient; the table is whole, so none are its own."""
    mesh = sharding.make_mesh(config.Mesh(*shape))
    with jax.set_mesh(mesh):
        batch = sharding.place_batch(random_batch(), mesh)
        visual = sharding.place_batch(np.ones((8, 8, 32), np.float32), mesh)
        table = jax.device_put(np.ones((96, 32), np.float32), jax.NamedSharding(mesh, jax.P()))

        def ours(visual, batch):
            params = {"text": {"embed_tokens": table}}
            return forward.embed(params, batch.tokens, batch.visual_index, visual, MODEL, COMPUTE)

        def across_rows(visual, batch):
            """The control: the same values, gathered over all rows at once."""
            rows = sharding.place_batch(np.arange(8)[:, None], mesh)
            split = jax.typeof(batch.tokens).sharding
            return visual.at[rows, jnp.maximum(batch.visual_index, 0)].get(out_sharding=split)

        def collectives(merge) -> list[str]:
            def both_ways(visual, batch):
                out, backward = jax.vjp(lambda v: merge(v, batch), visual)
                return out, backward(out)

            return COLLECTIVE.findall(jax.jit(both_ways).lower(visual, batch).compile().as_text())

        return {"ours": collectives(ours), "across rows": collectives(across_rows)}


if __name__ == "__main__":
    cases = [((8, 1, 1), "xla", True), ((1, 8, 1), "xla", True), ((1, 1, 8), "xla", True)]
    cases += [((2, 2, 2), "xla", False), ((2, 2, 2), "auto", True)]
    print(
        json.dumps(
            {
                "cases": {
                    f"{shape} {attention} {tied}": report(shape, attention, tied) for shape, attention, tied in cases
                },
                "merge": {str(shape): merge_collectives(shape) for shape in [(8, 1, 1), (2, 2, 2)]},
            }
        )
    )
