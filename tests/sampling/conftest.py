"""A tiny model with images on one device, and prompts for it."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from infimed_jax.data.batch import Segment, build_row, stack_rows
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.infimed.config import Model
from infimed_jax.models.params import init_params
from infimed_jax.sampling.weights import sampler_weights
from tests.tiny import mesh, one_device, pixels  # noqa: F401
from tests.tiny import model as tiny_model

IMAGE_TOKEN = 3


@dataclass
class Tiny:
    model: Model
    compute: Compute
    params: dict
    weights: dict

    def image(self, seed: int) -> np.ndarray:
        return pixels(seed)

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
    model = tiny_model(vocab_size=61, tie_embeddings=False)
    compute = Compute("float32", "none", "xla", 16)
    with one_device():
        params = init_params(jax.random.key(10), model)
        # Sharper than at initialisation: likelihoods are far from equal. Untied, or it would repeat the last token.
        params = jax.tree.map_with_path(lambda path, x: x if "scale" in str(path[-1]) else x * 4, params)
        params["text"]["lm_head"] *= 4
        return Tiny(model, compute, params, sampler_weights(params, model, "float32"))
