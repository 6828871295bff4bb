"""A tiny model with images on one device, and prompts for it."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed.config import Model, Projector, Text, Vision
from infimed_jax.models.params import init_params
from infimed_jax.sampling.weights import sampler_weights
from infimed_jax.sharding import make_mesh

IMAGE_TOKEN = 3


@dataclass
class Tiny:
    model: Model
    compute: Compute
    params: dict
    weights: dict

    def image(self, seed: int) -> np.ndarray:
        side = self.model.vision.image_size
        return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)

    def prompt(self, seed: int, length: int = 9, images: tuple[np.ndarray, ...] = ()) -> Segment:
        """`length` text tokens with the images' places spread among them; text comes last."""
        rng = np.random.default_rng(seed)
        text = rng.integers(8, self.model.text.vocab_size, length)
        cuts = sorted(rng.integers(0, length - 1, len(images)))
        pieces = np.split(text, cuts)
        span = np.full(self.model.projector.visual_tokens, IMAGE_TOKEN)
        tokens = np.concatenate([x for piece in pieces[:-1] for x in (piece, span)] + [pieces[-1]]).astype(np.int32)
        return Segment(tokens, np.zeros(len(tokens), np.float32), tokens == IMAGE_TOKEN, images)

    def full_logits(self, prompt: Segment, reply: np.ndarray) -> np.ndarray:
        """f32[len(reply), V]: what the training graph says before each token of the reply."""
        tokens = np.concatenate([prompt.tokens, reply]).astype(np.int32)
        places = np.concatenate([prompt.visual, np.zeros(len(reply), bool)])
        whole = Segment(tokens, np.zeros(len(tokens), np.float32), places, prompt.pixels)
        context = -(-len(tokens) // 16) * 16
        row = build_row(
            [whole],
            context=context,
            images=4,
            model=self.model,
        )
        logits = np.array(_forward(self.params, stack_rows([row]), self.model, self.compute))[0]
        return logits[len(prompt) - 1 : len(tokens) - 1]


@jax.jit(static_argnames=("model", "compute"))
def _forward(params, batch, model, compute):
    return forward.logits(params, forward.hidden_states(params, batch, model, compute), model, compute)


@pytest.fixture(scope="session")
def tiny():
    model = Model(
        Vision(image_size=12, patch_size=3, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2),
        Projector(visual_tokens=4),
        Text(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            rope_theta=1e4,
            tie_embeddings=False,
        ),
    )
    compute = Compute("float32", "none", "xla", 16)
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        params = init_params(jax.random.key(10), model)
        # Sharper than at initialisation: likelihoods are far from equal. Untied, or it would repeat the last token.
        params = jax.tree.map_with_path(lambda path, x: x if "scale" in str(path[-1]) else x * 4, params)
        params["text"]["lm_head"] *= 4
        return Tiny(model, compute, params, sampler_weights(params, model, "float32"))


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1])):
        yield
