"""The text model against Hugging Face: a layer at a time, then logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from infimed_jax.data.batch import Batch
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.ops.attention import Mask, attention
from tests.models.reference import MODEL, TEXT, qwen3_params, torch_qwen3

FLOAT32 = Compute("float32", "none", "xla", 64)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, TEXT.vocab_size, (2, 19)).astype(np.int32)


def text_batch(tokens: np.ndarray) -> Batch:
    rows, width = tokens.shape
    return Batch(
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=np.tile(np.arange(width, dtype=np.int32), (rows, 1, 1)),
        loss_weights=np.ones(tokens.shape, np.float32),
        visual_index=np.full_like(tokens, -1),
        pixels=np.zeros((rows, 0, 30, 30, 3), np.uint8),
    )


def causal(q, k, v):
    return attention(q, k, v, Mask(causal=True), implementation="xla"), k


def test_each_layer_matches(tokens):
    reference = torch_qwen3(TEXT)
    with torch.no_grad():
        expected = reference.model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    layers = qwen3_params(reference, TEXT)["layers"]
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (2, 1, 1))
    for i in range(TEXT.num_layers - 1):  # Hugging Face's last hidden state has the final norm applied
        own = jax.tree.map(lambda x, i=i: x[i], layers)
        x = jnp.asarray(expected.hidden_states[i].numpy())
        out, keys = forward.text_block(own, x, positions, causal, MODEL, FLOAT32)
        np.testing.assert_allclose(out, expected.hidden_states[i + 1].numpy(), atol=1e-4, rtol=0)
        np.testing.assert_allclose(
            jnp.swapaxes(keys, 1, 2), expected.past_key_values.layers[i].keys.numpy(), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("tied", [True, False])
def test_logits_match(tokens, tied):
    model = replace(MODEL, text=replace(TEXT, tie_embeddings=tied))
    reference = torch_qwen3(model.text, seed=1)
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long(), output_hidden_states=True)
    params = {"text": qwen3_params(reference, model.text)}

    def outputs(params, batch):
        hidden = forward.hidden_states(params, batch, model, FLOAT32)
        return hidden, forward.logits(params, hidden, model, FLOAT32)

    hidden, logits = jax.jit(outputs)(params, text_batch(tokens))
    np.testing.assert_allclose(hidden, expected.hidden_states[-1].numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4, rtol=0)


def test_gradients_match_torch(tokens):
    reference = torch_qwen3(TEXT, seed=2)
    ids = torch.from_numpy(tokens).long()
    reference(ids, labels=ids).loss.backward()

    def loss(text, batch):
        params = {"text": text}
        hidden = forward.hidden_states(params, batch, MODEL, FLOAT32)
        weights = jnp.ones_like(batch.loss_weights).at[:, -1].set(0.0)
        logprobs, _ = forward.token_logprobs(params, hidden, jnp.roll(batch.tokens, -1, 1), weights, MODEL, FLOAT32)
        return -logprobs.sum() / weights.sum()

    grads = jax.jit(jax.grad(loss))(qwen3_params(reference, TEXT), jax.tree.map(jnp.asarray, text_batch(tokens)))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    expected = qwen3_params(reference, TEXT)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), grads, expected)


def test_unrolled_blocks_equal_the_scan(tokens):
    params = {"text": qwen3_params(torch_qwen3(TEXT), TEXT)}
    batch = text_batch(tokens)
    x = forward.embed(params, batch.tokens, batch.visual_index, jnp.zeros((2, 0, 32)), MODEL, FLOAT32)
    for i in range(TEXT.num_layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params["text"]["layers"])
        x, _ = forward.text_block(own, x, batch.positions, causal, MODEL, FLOAT32)
    scanned = forward.hidden_states(params, batch, MODEL, FLOAT32)
    np.testing.assert_allclose(forward.final_norm(params, x, MODEL), scanned, atol=1e-5, rtol=0)
