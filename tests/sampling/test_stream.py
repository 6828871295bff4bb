"""A reply's text while it grows, against the whole reply decoded at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import make_tokenizer
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.sampling.stream import TextStream


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_tokenizer(["the left lung"] * 3, tmp_path_factory.mktemp("tokenizer"), vocab_size=300))


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), size=st.integers(1, 4))
def test_pieces_make_the_text_and_no_character_is_cut(tokenizer, text, size):
    """Letters outside ASCII are several byte tokens here, so pieces end inside of them."""
    tokens = tokenizer.encode(text)
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    for start in range(0, len(tokens), size):
        stream.add(tokens[start : start + size])
    before_the_end = "".join(pieces)
    whole = tokenizer.decode(tokens)
    assert stream.end() == "".join(pieces) == whole
    assert whole.startswith(before_the_end)
    assert before_the_end.count("\ufffd") == whole[: len(before_the_end)].count("\ufffd")


def test_it_streams_and_the_stop_token_is_no_text(tokenizer):
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.add(tokenizer.encode("the left"))
    assert "".join(pieces) == "the left"
    stream.add([*tokenizer.encode(" lung"), tokenizer.im_end])
    assert stream.end() == "".join(pieces) == "the left lung"


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer):
    first_of_three = tokenizer.encode("心")[:1]
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.add(first_of_three)
    assert pieces == []
    assert stream.end() == "".join(pieces) == "\ufffd"
