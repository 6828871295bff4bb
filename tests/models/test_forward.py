"""The whole model: what packing and padding may not change, and how many parameters it has."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from infimed_jax import config
from infimed_jax.data.batch import Batch, Segment, build_row, stack_rows
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.models.params import abstract_params, init_params, param_count
from tests.models.reference import MODEL, qwen3_params, siglip_params, torch_qwen3, torch_siglip

FLOAT32 = Compute("float32", "none", "xla", 8)
P = MODEL.projector.visual_tokens
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "models"


@pytest.fixture(scope="module")
def params():
    torch.manual_seed(0)
    projector = torch_projector()
    return {
        "vision": siglip_params(torch_siglip(MODEL.vision), MODEL.vision),
        "projector": {
            name: {"kernel": layer.weight.detach().numpy().T.copy(), "bias": layer.bias.detach().numpy().copy()}
            for name, layer in (("linear_1", projector[0]), ("linear_2", projector[2]))
        },
        "text": qwen3_params(torch_qwen3(MODEL.text), MODEL.text),
    }


def torch_projector() -> torch.nn.Sequential:
    torch.manual_seed(3)
    widths = (MODEL.vision.hidden_size, MODEL.text.hidden_size)
    return torch.nn.Sequential(torch.nn.Linear(*widths), torch.nn.GELU(), torch.nn.Linear(widths[1], widths[1]))


def segment(rng: np.random.Generator, text: int, *pixels: np.ndarray) -> Segment:
    """One text token, then each image with its visual places, then the rest of the text."""
    places = len(pixels) * P
    visual = np.zeros(text + places, bool)
    visual[1 : 1 + places] = True
    tokens = rng.integers(0, MODEL.text.vocab_size, text + places).astype(np.int32)
    return Segment(tokens, np.where(visual, 0.0, 1.0).astype(np.float32), visual, pixels)


def image(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)


def row(segments: list[Segment], context: int, images: int) -> Batch:
    return build_row(segments, context=context, images=images, model=MODEL)


def loss_and_logprobs(params, batch: Batch, compute: Compute):
    hidden = forward.hidden_states(params, batch, MODEL, compute)
    targets = jnp.roll(batch.tokens, -1, axis=1)
    logprobs, _ = forward.token_logprobs(params, hidden, targets, batch.loss_weights, MODEL, compute)
    return -(logprobs * batch.loss_weights).sum(), logprobs


scored = jax.jit(loss_and_logprobs, static_argnums=2)
scored_and_grad = jax.jit(jax.value_and_grad(loss_and_logprobs, has_aux=True), static_argnums=2)
"""Most tests share the shape (2 rows, 32 tokens, 2 images), so that it compiles once."""


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), a, b)


def test_visual_tokens_match_torch(params):
    rng = np.random.default_rng(1)
    pixels = np.stack([image(rng) for _ in range(6)]).reshape(2, 3, 30, 30, 3)
    visual = forward.encode_images(params, pixels, MODEL, FLOAT32)
    scaled = torch.from_numpy(pixels.reshape(6, 30, 30, 3) / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = torch_siglip(MODEL.vision)(pixel_values=scaled, output_hidden_states=True).hidden_states[-1]
        square = features.transpose(1, 2).reshape(6, -1, 4, 4)
        pooled = torch.nn.AdaptiveAvgPool2d(2)(square).flatten(2).transpose(1, 2)
        expected = torch_projector()(pooled).reshape(2, 3 * P, -1).numpy()
    np.testing.assert_allclose(visual, expected, atol=1e-4, rtol=0)


def test_packed_equals_unpacked(params):
    rng = np.random.default_rng(2)
    shared = image(rng)
    segments = [
        segment(rng, 7, image(rng)),
        segment(rng, 5),
        segment(rng, 6, shared, image(rng)),
        segment(rng, 9, shared),
        segment(rng, 2),
    ]
    packed_loss, packed = scored(params, stack_rows([row(segments, 56, 4)]), FLOAT32)
    alone_loss, alone = scored(params, stack_rows([row([s], 24, 2) for s in segments]), FLOAT32)
    start = 0
    for i, s in enumerate(segments):
        np.testing.assert_allclose(packed[0, start : start + len(s)], alone[i, : len(s)], atol=2e-5)
        start += len(s)
    np.testing.assert_allclose(packed_loss, alone_loss, rtol=1e-5)


def test_padding_content_changes_nothing(params):
    rng = np.random.default_rng(3)
    clean = stack_rows([row([segment(rng, 9, image(rng)), segment(rng, 4)], 32, 2) for _ in range(2)])
    padding = clean.segment_ids == 0
    noise = rng.integers(0, MODEL.text.vocab_size, clean.tokens.shape).astype(np.int32)
    pixels = clean.pixels.copy()
    pixels[:, 1] = image(rng)
    dirty = replace(
        clean,
        tokens=np.where(padding, noise, clean.tokens),
        positions=np.where(padding[:, None], noise[:, None], clean.positions),
        visual_index=np.where(padding, P + noise % P, clean.visual_index).astype(np.int32),
        pixels=pixels,
    )
    expected, actual = scored_and_grad(params, clean, FLOAT32), scored_and_grad(params, dirty, FLOAT32)
    close(actual, expected, atol=0, rtol=0)


def test_an_empty_row_is_finite_forward_and_backward(params):
    rng = np.random.default_rng(4)
    full, empty = row([segment(rng, 9, image(rng))], 32, 2), row([], 32, 2)
    (twice, _), twice_grads = scored_and_grad(params, stack_rows([full, full]), FLOAT32)
    (once, _), once_grads = scored_and_grad(params, stack_rows([full, empty]), FLOAT32)
    np.testing.assert_allclose(2 * once, twice, rtol=1e-6)
    close(jax.tree.map(lambda x: 2 * x, once_grads), twice_grads, atol=1e-4, rtol=1e-4)
    (none, _), none_grads = scored_and_grad(params, stack_rows([empty, empty]), FLOAT32)
    assert none == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none_grads))


@pytest.mark.parametrize(
    "compute",
    [replace(FLOAT32, remat="dots"), replace(FLOAT32, remat="full"), replace(FLOAT32, attention="auto")],
    ids=["dots", "full", "attention of this platform"],
)
def test_how_it_is_computed_changes_no_gradient(params, compute):
    rng = np.random.default_rng(5)
    batch = stack_rows([row([segment(rng, 9, image(rng)), segment(rng, 4)], 32, 2), row([], 32, 2)])
    close(scored_and_grad(params, batch, compute), scored_and_grad(params, batch, FLOAT32), atol=1e-4, rtol=1e-4)


def test_a_token_or_image_place_that_does_not_exist_is_nan(params):
    batch = stack_rows([row([segment(np.random.default_rng(7), 9)], 10, 0)])
    visual = jnp.ones((1, 2 * P, MODEL.text.hidden_size))

    def nan_places(tokens, index):
        out = forward.embed(params, jnp.asarray(tokens), jnp.asarray(index), visual, MODEL, FLOAT32)
        return np.flatnonzero(np.isnan(out).all(-1)[0]).tolist()

    tokens, index = batch.tokens.copy(), batch.visual_index.copy()
    index[0, 3] = 2 * P - 1
    assert nan_places(tokens, index) == []
    tokens[0, 1], index[0, 5] = MODEL.text.vocab_size, 2 * P
    assert nan_places(tokens, index) == [1, 5]


def test_bfloat16_is_close_to_float32(params):
    rng = np.random.default_rng(6)
    batch = stack_rows([row([segment(rng, 9, image(rng)), segment(rng, 4)], 32, 2)] * 2)
    expected, _ = scored(params, batch, FLOAT32)
    actual, logprobs = scored(params, batch, replace(FLOAT32, dtype="bfloat16"))
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=0.02)  # 8 bits of mantissa through three layers


@pytest.mark.parametrize(
    ("name", "text", "width"), [("foundation_4b", 4_022_468_096, 2560), ("foundation_1p7b", 1_720_574_976, 2048)]
)
def test_parameter_counts_are_the_published_ones(name, text, width):
    model = config.load([CONFIGS / f"{name}.yaml"]).model
    vision, projector = 397_745_440, 1152 * width + width + width * width + width
    counts = {"vision": vision, "projector": projector, "text": text, "total": vision + projector + text}
    assert param_count(model) == counts


def test_initial_parameters_are_those_of_hugging_face():
    params = init_params(jax.random.key(0), MODEL)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(MODEL))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32, name
        if "bias" in name:
            assert not np.any(leaf), name
        elif "scale" in name:
            assert np.all(np.asarray(leaf) == 1), name
        elif "text" in name or "projector" in name:
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.15, err_msg=name)
    layers = params["text"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert not np.array_equal(layers[0], layers[1])
