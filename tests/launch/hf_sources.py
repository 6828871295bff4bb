"""Tiny Qwen3 and SigLIP folders as they are published, and a dataset: what the conversion's tests start from."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from data_prep.tokenizer import make_tokenizer
from infimed_jax.data.prompts import question_text
from infimed_jax.data.sample import Document, Question
from infimed_jax.data.storage import write_samples
from launch import run

SIDE, PATCHES = 16, 16
QUESTION = "Is it bright, or is it dark?"


def command(*arguments) -> int:
    """`launch/run.py ARGUMENTS` in this process; its exit code."""
    try:
        return run.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def write_sources(folder: Path) -> tuple[Path, Path]:
    """(a bfloat16 Qwen3 folder with tokenizer and licence, a float32 SigLIP folder)."""
    text, vision = folder / "Qwen3-tiny", folder / "siglip-tiny"
    words = [question_text(question(0), reasoning) + " image left lung" for reasoning in (False, True)]
    make_tokenizer(words * 4, text, vocab_size=400)
    torch.manual_seed(0)
    settings = Qwen3Config(
        vocab_size=448,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1234,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        tie_word_embeddings=False,
    )
    _save(Qwen3ForCausalLM(settings).to(torch.bfloat16), text, scale=4)  # else every reply is one token repeated
    (text / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Qwen3\n")
    settings = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=4
    )
    _save(SiglipVisionModel(settings), vision, scale=2)
    return text, vision


def _save(module: torch.nn.Module, folder: Path, scale: float) -> None:
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.ndim > 1:
                tensor *= scale
    module.save_pretrained(folder)


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def question(number: int) -> Question:
    answer = "yes" if number % 2 else "no"
    return Question(f"closed/train/{number}", "closed", "train", (picture(number),), "yes_no", QUESTION, answer)


def write_datasets(folder: Path) -> tuple[Path, Path]:
    """(documents of a source that allows commercial use, questions of one that does not)."""
    documents = [Document(f"open/train/{n}", "open", "train", (picture(n),), ((0, f"\nlung {n}"),)) for n in range(6)]
    questions = [question(n) for n in range(8)]
    write_samples(folder / "documents", documents, name="open", info={"source": "open", "licence": "CC BY 4.0"})
    licences = {"licences": {"closed": "CC BY-NC 4.0"}}
    write_samples(folder / "questions", questions, name="mixture", info=licences)
    return folder / "documents", folder / "questions"
