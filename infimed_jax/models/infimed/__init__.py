"""InfiMed-Foundation: SigLIP, adaptive average pooling and a two-layer MLP, Qwen3."""

from infimed_jax.models.infimed.config import Model as MODEL

__all__ = ["MODEL"]
