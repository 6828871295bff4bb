"""A checkpoint's own copy of its tokenizer: a run can be moved, and read from any working folder."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from infimed_jax.data.chat import Tokenizer
from infimed_jax.hf.processor import TEMPLATE, TOKENIZER_FILES
from infimed_jax.train.stored import TOKENIZER

_FILES = (*TOKENIZER_FILES, "tokenizer_config.json", TEMPLATE)


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into `folder`/tokenizer, which appears whole; a copy of the same tokenizer stays.

    `folder` is a run's, or a checkpoint that belongs to no run. `stored.user_metadata` finds the copy.
    """
    kept, part = folder / TOKENIZER, folder / f".{TOKENIZER}.part"
    file = kept / "tokenizer.json"
    if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == tokenizer.fingerprint:
        return
    for old in (part, kept):  # of a run that was killed; of a run that ended before its first checkpoint
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    for name in _FILES:
        if (tokenizer.folder / name).is_file():
            shutil.copyfile(tokenizer.folder / name, part / name)
    part.rename(kept)
