"""Rotary embedding against Hugging Face's."""

import numpy as np
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from infimed_jax.ops.rope import apply_rope, rope_tables


def test_rotation_is_hugging_faces():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 7, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 0, 1, 4095, 9000], [5, 6, 7, 8, 9, 10, 40_000]], np.int32)
    settings = Qwen3Config(
        hidden_size=48, num_attention_heads=3, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    cos, sin = Qwen3RotaryEmbedding(settings)(torch.zeros(1), torch.from_numpy(positions))
    swapped = torch.from_numpy(q).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(swapped, swapped, cos, sin)
    out = apply_rope(q, rope_tables(positions, 16, 1e6))
    # Angles near 40,000 rad carry float32 rounding of 0.002.
    np.testing.assert_allclose(out[:, :5], expected.transpose(1, 2)[:, :5], atol=1e-5)
    np.testing.assert_allclose(out, expected.transpose(1, 2), atol=2e-2)


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(at, distance):
        rotate = lambda x, p: np.asarray(apply_rope(x, rope_tables(np.array([[p]]), 16, 1e4)))  # noqa: E731
        return (rotate(q, at + distance) * rotate(k, at)).sum()

    np.testing.assert_allclose(score(0, 5), score(100, 5), rtol=1e-4)
    assert abs(score(0, 5) - score(0, 6)) > 1e-3
