"""The small tokenizer: lossless, deterministic, Qwen3 in everything but its vocabulary."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep.sources.phantom.questions import ask
from data_prep.sources.phantom.reasoning import think
from data_prep.sources.phantom.scene import draw_scene
from data_prep.tokenizer import ADDED_TOKENS, make_tokenizer
from infimed_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
QWEN3 = ROOT.parent / "shared" / "data" / "tokenizers" / "qwen3"
TEXTS = [
    f"The {size} {look} lesion lies in the {side} {organ}, wait: {n} of them?"
    for n, size in enumerate(("small", "large"))
    for look in ("bright", "dark")
    for side in ("left", "right")
    for organ in ("lung", "brain", "kidney")
] + (ROOT / "infimed_jax" / "config" / "settings.py").read_text(encoding="utf-8").splitlines()
MESSAGES = (
    [{"role": "user", "content": "Is there a lesion?"}],
    [
        {"role": "user", "content": "<|vision_start|><|image_pad|><|vision_end|>Where?"},
        {"role": "assistant", "content": "left"},
    ],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Count."},
        {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n\\boxed{2}"},
        {"role": "user", "content": "Sure?"},
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer"), 700)


@pytest.fixture(scope="module")
def auto(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def qwen3():
    if not QWEN3.is_dir():
        pytest.skip(f"the real Qwen3 tokenizer is not at {QWEN3}")
    return AutoTokenizer.from_pretrained(QWEN3)


def test_size_and_places_of_the_added_tokens(folder, auto):
    assert len(auto) == 700
    assert [auto.convert_tokens_to_ids(token) for token in ADDED_TOKENS] == list(range(700 - 26, 700))
    assert (auto.eos_token, auto.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 400_000


def test_few_texts_give_fewer_tokens_and_too_small_a_vocabulary_is_refused(tmp_path):
    assert len(AutoTokenizer.from_pretrained(make_tokenizer(["abab"], tmp_path / "few"))) == 256 + 2 + 26
    with pytest.raises(UserError, match="vocab_size 200 cannot hold 256 bytes and 26 added tokens"):
        make_tokenizer(TEXTS, tmp_path / "small", 200)


def test_same_texts_same_bytes_in_another_process(folder, tmp_path):
    code = (
        "import sys, json; from data_prep.tokenizer import make_tokenizer;"
        "make_tokenizer(json.load(open(sys.argv[1])), sys.argv[2], 700)"
    )
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    subprocess.run([sys.executable, "-c", code, tmp_path / "texts.json", tmp_path / "again"], check=True, cwd=ROOT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back_in_its_composed_form(auto, text):
    ids = auto(text, add_special_tokens=False).input_ids
    assert auto.decode(ids) == unicodedata.normalize("NFC", text)


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([*ADDED_TOKENS, " lesion", "the left", "12", "\n\n", "é", "中", "\\boxed{A}", " "]))
)
def test_transformers_reads_the_tokenizer_as_it_was_trained(folder, auto, pieces):
    """AutoTokenizer builds its own pre-tokenizer from the class name; the file says the same."""
    text = "".join(pieces)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert auto(text).input_ids == plain.encode(text).ids
    assert auto.decode(auto(text).input_ids) == text


def test_digits_stand_alone_and_words_take_their_blank(auto):
    assert auto.tokenize("12 lesion 128 left") == ["1", "2", "Ġlesion", "Ġ", "1", "2", "8", "Ġleft"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40) | st.text("ab'sS \r\n12.,—éß中\t", max_size=40))
def test_pre_tokenizer_is_that_of_qwen3(folder, qwen3, text):
    def pieces(tokenizer: Tokenizer) -> list[str]:
        normal = tokenizer.normalizer.normalize_str(text)
        return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]

    assert pieces(Tokenizer.from_file(str(folder / "tokenizer.json"))) == pieces(qwen3.backend_tokenizer)


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"enable_thinking": False}])
def test_chat_template_is_that_of_qwen3(auto, qwen3, messages, options):
    ours = auto.apply_chat_template(messages, tokenize=False, **options)
    assert ours == qwen3.apply_chat_template(messages, tokenize=False, **options)


def test_added_tokens_are_those_of_qwen3(auto, qwen3):
    def flags(tokenizer) -> list[tuple]:
        return [
            (t.content, t.special, t.normalized, t.lstrip, t.rstrip, t.single_word)
            for _, t in sorted(tokenizer.added_tokens_decoder.items())
        ]

    assert flags(auto) == flags(qwen3)
    assert auto.all_special_tokens == qwen3.all_special_tokens
    every = "a".join(ADDED_TOKENS)
    assert auto.decode(auto(every).input_ids, skip_special_tokens=True) == qwen3.decode(
        qwen3(every).input_ids, skip_special_tokens=True
    )


def test_the_module_makes_the_tokenizer_of_the_procedural_sources(tmp_path):
    """Reasoning stays within 40 tokens in it, so that the quickstart's rollouts are short."""
    command = [sys.executable, "-m", "data_prep.tokenizer", "--output", tmp_path / "tokenizer"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith(f"tokenizer: {tmp_path / 'tokenizer'}\n")
    small = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(small) <= 1024
    lengths = []
    for number in range(300):
        rng = np.random.default_rng([8, number])
        scene = draw_scene(rng)
        lengths += [len(small(think(scene, question).reasoning).input_ids) for question in ask(scene, rng)]
    assert max(lengths) <= 40
