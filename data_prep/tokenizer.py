"""A small tokenizer of Qwen3's kind, trained on given texts: same pre-tokenizer, special tokens and chat template.

It stands in for the real one (151,669 tokens, 11 MB) where the model is tiny. Run as a module, it is trained on the
texts of the procedural sources: `python -m data_prep.tokenizer --output DIR`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_prep.sources import phantom, shapes
from data_prep.sources.procedural import write_folder
from infimed_jax.data.prompts import as_turns, exchange
from infimed_jax.data.sample import Question
from infimed_jax.errors import UserError
from infimed_jax.files import to_json

PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen3's own: digits stand alone, a word takes the blank before it."""

# The 26 added tokens in Qwen3's order; the transformers library hides the first 14 on request, the others never.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
OTHER_ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
ADDED_TOKENS = SPECIAL_TOKENS + OTHER_ADDED_TOKENS
BYTES = 256
_CHAT_TEMPLATE = Path(__file__).parent / "assets" / "qwen3_chat_template.jinja"


def make_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = 1024) -> Path:
    """Train a byte-level BPE tokenizer on `texts` and write it as a Hugging Face folder, which is returned.

    `vocab_size` is the most it may have, the added tokens counted, which come last as in Qwen3; few texts give fewer.
    The same texts give the same bytes. UserError: not even the bytes and the added tokens would fit.
    """
    if vocab_size < BYTES + len(ADDED_TOKENS):
        raise UserError(f"vocab_size {vocab_size} cannot hold {BYTES} bytes and {len(ADDED_TOKENS)} added tokens")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    first_added = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in OTHER_ADDED_TOKENS])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = to_json(_config(first_added), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizer


def _config(first_added: int) -> dict[str, object]:
    """The content of tokenizer_config.json; Qwen3's values, with the added tokens at their places here."""
    added = {
        str(first_added + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for i, token in enumerate(ADDED_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE.read_text(encoding="utf-8"),
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _procedural_texts(images: int = 400) -> list[str]:
    """Every kind of text that the procedural sources hold, prompts and reasoning included; no image is drawn."""
    texts = []
    for procedure, source in ((phantom.PHANTOM, phantom.SOURCE), (shapes.SHAPES, shapes.SOURCE)):
        blank = replace(procedure, png=lambda scene: b"")
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_folder(blank, Path(scratch) / source.name, 0, dict.fromkeys(source.splits, images))
            for split in source.splits:
                for sample in source.read(folder, split):
                    asked = exchange(sample, reasoning=True) if isinstance(sample, Question) else ()
                    for turn in (*as_turns(sample), *asked):
                        texts += [piece for piece in (*turn.content, turn.reasoning) if isinstance(piece, str)]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small tokenizer of the procedural sources.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens at most, the added ones counted")
    arguments = parser.parse_args()
    make_tokenizer(_procedural_texts(), arguments.output, arguments.vocab_size)
    print(f"tokenizer: {arguments.output}")


if __name__ == "__main__":
    main()
