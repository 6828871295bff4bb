"""Text of a reply while it grows: a token may end in the middle of a character, so what is not whole waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from infimed_jax.data.chat import Tokenizer

BROKEN = "\ufffd"


class TextStream:
    """Tokens in, text out through `write`; all pieces together are the decoded reply."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._written = ""

    def add(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Tokens that follow those before; a stop token ends the text and is not part of it."""
        self._tokens += [int(token) for token in tokens if int(token) not in self._tokenizer.stop_tokens]
        self._advance(self._tokenizer.decode(self._tokens).rstrip(BROKEN))

    def end(self) -> str:
        """Write what was held back, and return the whole text."""
        text = self._tokenizer.decode(self._tokens)
        self._advance(text)
        return text

    def _advance(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text
