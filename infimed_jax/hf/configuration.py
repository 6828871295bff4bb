"""Which model a folder in Hugging Face's format holds, and the settings of its generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infimed_jax.errors import UserError
from infimed_jax.hf.weights import read_json

MAX_POSITIONS = 40_960
"""Context of Qwen3 as published, for a model whose checkpoint names none because it was never imported."""


def read_architecture(folder: str | Path, allowed: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(architecture, config.json) of a folder; UserError where it is none of `allowed`."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    given = values.get("architectures")
    names = given if isinstance(given, list) else [given] if given else []
    for architecture in allowed:
        if names == [architecture]:
            return architecture, values
    named = ", ".join(map(str, names)) or f"no architecture (model_type {values.get('model_type')!r})"
    raise UserError(f"{path} is of {named}; this reads {' or '.join(allowed)}")


def generation_config(stop_tokens: tuple[int, ...], pad_token: int, suppressed: tuple[int, ...] = ()) -> dict[str, Any]:
    """generation_config.json: greedy, as the model is evaluated, and never a token that our sampler bans."""
    values = {"do_sample": False, "eos_token_id": list(stop_tokens), "pad_token_id": pad_token}
    return values | ({"suppress_tokens": list(suppressed)} if suppressed else {})
