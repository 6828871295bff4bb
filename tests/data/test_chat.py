"""The renderer against Qwen3's own template and tokenizer, and by hand where the template has nothing to say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.data.chat import load_tokenizer, render, render_prompt
from infimed_jax.data.sample import Chat, Document, Turn
from infimed_jax.errors import UserError

QWEN3 = Path(__file__).resolve().parents[2].parent / "shared/data/tokenizers/qwen3"
P = 4
PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def ours():
    if not QWEN3.exists():
        pytest.skip("the real Qwen3 tokenizer is not at hand")
    return load_tokenizer(QWEN3)


@pytest.fixture(scope="module")
def theirs(ours):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)


def chat(*turns: Turn, images: int = 1) -> Chat:
    return Chat("t/t/0", "t", "t", tuple(bytes([i]) for i in range(images)), turns)


def messages(turns):
    """The same conversation as the template wants it: strings, images as expanded placeholders."""
    return [
        {
            "role": turn.role,
            "content": "".join(p if isinstance(p, str) else PAD * P for p in turn.content),
            "reasoning_content": turn.reasoning,
        }
        for turn in turns
    ]


def reference(theirs, turns, **options) -> list[int]:
    return theirs.apply_chat_template(messages(turns), tokenize=True, return_dict=False, **options)


U, A = "user", "assistant"
IMAGE_QUESTION = Turn(U, (0, "\nIs there a fracture?\nPlease output 'yes' or 'no'(no extra output)."))
CHATS = {
    "one turn": chat(IMAGE_QUESTION, Turn(A, ("yes",))),
    "system": chat(Turn("system", ("You are a radiologist.",)), IMAGE_QUESTION, Turn(A, ("No.",))),
    "reasoning": chat(IMAGE_QUESTION, Turn(A, ("\\boxed{yes}",), reasoning="The cortex\n\nis broken.")),
    "several turns": chat(
        IMAGE_QUESTION, Turn(A, ("yes",), reasoning="old thoughts"), Turn(U, ("Where?",)), Turn(A, ("Left femur.",))
    ),
    "several turns, reasoning last": chat(
        IMAGE_QUESTION, Turn(A, ("yes",)), Turn(U, ("Where?",)), Turn(A, ("Left.",), reasoning="Look again")
    ),
    "two answers": chat(IMAGE_QUESTION, Turn(A, ("Wait",), reasoning="hm"), Turn(A, ("yes",))),
    "two answers, first bare": chat(IMAGE_QUESTION, Turn(A, ("Wait",)), Turn(A, ("yes",))),
    "user last": chat(IMAGE_QUESTION, Turn(A, ("yes",), reasoning="r"), Turn(U, ("Where?",))),
    "text only": chat(Turn(U, ("肺部有异常吗？",)), Turn(A, ("没有。",))),
    "many images": chat(Turn(U, ("<image_1>: ", 0, "<image_2>: ", 1, "\nq")), Turn(A, ("B",)), images=2),
    "image last": chat(Turn(U, ("Look: ", 0)), Turn(A, ("ok",))),
    "newlines": chat(Turn(U, (0, "\n\n \nq\n")), Turn(A, ("\n\n  yes\n",), reasoning="\n\n a \n")),
    "newline reasoning": chat(IMAGE_QUESTION, Turn(A, ("\nyes",), reasoning="\n")),
    "pieces": chat(Turn(U, ("un", "believ", 0, "", "able", "!")), Turn(A, ("a", "bc"))),
    "no user": chat(Turn("system", ("s",)), Turn(A, ("yes",), reasoning="r")),
}


@pytest.mark.parametrize("name", CHATS)
def test_training_tokens_are_the_templates(name, ours, theirs):
    sample = CHATS[name]
    assert render(sample, ours, P).tokens.tolist() == reference(theirs, sample.turns)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", [name for name in CHATS if name != "no user"])
def test_prompt_tokens_are_the_templates(name, thinking, ours, theirs):
    sample = CHATS[name]
    answers = [i for i, t in enumerate(sample.turns) if t.role == A]
    before = sample.turns[: answers[-1]]
    prompt = render_prompt(sample, ours, P, reasoning=thinking)
    expected = reference(theirs, before, add_generation_prompt=True, enable_thinking=thinking)
    assert prompt.tokens.tolist() == expected
    assert not prompt.targets.any()


def learnt(segment, ours) -> str:
    return ours.decode(segment.tokens[segment.targets > 0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one turn", "yes<|im_end|>"),
        ("reasoning", "<think>\nThe cortex\n\nis broken.\n</think>\n\n\\boxed{yes}<|im_end|>"),
        ("several turns", "yes<|im_end|>Left femur.<|im_end|>"),
        ("several turns, reasoning last", "yes<|im_end|><think>\nLook again\n</think>\n\nLeft.<|im_end|>"),
        ("user last", "yes<|im_end|>"),
        ("newline reasoning", "yes<|im_end|>"),
    ],
)
def test_loss_is_on_the_answers_and_their_end(name, expected, ours):
    segment = render(CHATS[name], ours, P)
    assert learnt(segment, ours) == expected
    assert set(segment.targets.tolist()) <= {0.0, 1.0}
    assert not segment.targets[segment.visual].any()


@pytest.mark.parametrize("name", ["one turn", "system", "several turns", "text only"])
def test_the_prompt_is_the_training_text_up_to_the_first_learnt_token_of_the_last_answer(name, ours):
    segment, prompt = render(CHATS[name], ours, P), render_prompt(CHATS[name], ours, P)
    n = len(prompt)
    assert segment.tokens[:n].tolist() == prompt.tokens.tolist()
    assert segment.targets[n - 1] == 0
    assert segment.targets[n] == 1


def test_with_reasoning_the_thinking_prompt_is_the_prefix(ours):
    segment, prompt = render(CHATS["reasoning"], ours, P), render_prompt(CHATS["reasoning"], ours, P, reasoning=True)
    assert segment.tokens[: len(prompt)].tolist() == prompt.tokens.tolist()
    assert segment.tokens[len(prompt)] == ours.think
    assert np.flatnonzero(segment.targets)[0] == len(prompt)


HOSTILE = st.text("a \n<|>é", max_size=6) | st.sampled_from(
    ["<|im_end|>", PAD, "<think>", "</think>", "<|im_start|>assistant\n", "<tool_response>", "<|endoftext|>"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(HOSTILE, max_size=4), st.lists(HOSTILE, max_size=4), st.lists(HOSTILE, max_size=3))
def test_text_that_spells_special_tokens_stays_text(ours, user, answer, reasoning):
    sample = chat(Turn(U, (0, *user)), Turn(A, tuple(answer), reasoning="".join(reasoning)))
    segment = render(sample, ours, P)
    tokens = segment.tokens.tolist()
    assert tokens.count(ours.im_start) == 2
    assert tokens.count(ours.im_end) == 2
    assert tokens.count(ours.image_pad) == P == segment.visual.sum()
    assert tokens.count(ours.think) == tokens.count(ours.end_think) == 1
    assert ours.endoftext not in tokens
    decoded = ours.decode(segment.tokens)
    assert "".join(user) in decoded
    assert "".join(answer).lstrip("\n") in decoded


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab \n\t.é1中", max_size=8),
    st.text("ab \n\t.é1中", max_size=8),
    st.text("ab \n\t.é1中", max_size=8),
)
def test_harmless_text_is_the_templates_token_for_token(ours, theirs, user, answer, reasoning):
    turns = (Turn(U, (0, user)), Turn(A, (answer,)), Turn(U, (user,)), Turn(A, (answer,), reasoning=reasoning))
    segment = render(chat(*turns), ours, P)
    assert segment.tokens.tolist() == reference(theirs, turns)
    assert learnt(segment, ours).count("<|im_end|>") == 2


def document(*chunks, images=1) -> Document:
    return Document("t/t/0", "t", "t", tuple(bytes([i]) for i in range(images)), chunks)


def test_caption_document(ours):
    segment = render(document((0, "\nChest radiograph.")), ours, P)
    expected = [ours.endoftext, *[ours.image_pad] * P, *ours.encode("\nChest radiograph."), ours.im_end]
    assert segment.tokens.tolist() == expected
    assert segment.targets.tolist() == [0.0] * (1 + P) + [1.0] * (len(expected) - 1 - P)
    assert segment.visual.tolist() == [token == ours.image_pad for token in expected]


def test_chunks_end_with_a_mark_where_there_are_several_images(ours):
    segment = render(document(("Intro.",), (0, "\nA."), (1, "\nB."), images=2), ours, P)
    image = PAD * P
    end = "<|vision_end|>"
    assert ours.decode(segment.tokens) == f"<|endoftext|>Intro.{end}{image}\nA.{end}{image}\nB.{end}<|im_end|>"
    assert learnt(segment, ours) == f"Intro.{end}\nA.{end}\nB.{end}<|im_end|>"
    text_only = render(document(("Intro.",), ("More.",), images=0), ours, P)
    assert ours.decode(text_only.tokens) == "<|endoftext|>Intro.More.<|im_end|>"


def test_pixels_follow_the_places_in_the_text(ours):
    a, b = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)
    sample = chat(Turn(U, (1, "x", 0, "y", 1)), Turn(A, ("z",)), images=2)
    segment = render(sample, ours, P, (a, b))
    assert [image is b for image in segment.pixels] == [True, False, True]
    with pytest.raises(ValueError, match="1 prepared images for 2"):
        render(sample, ours, P, (a,))


def test_what_may_be_sampled(ours, theirs):
    allowed = {"<|im_end|>", "<|endoftext|>", "<think>", "</think>"}
    expected = {i for t, i in theirs.get_added_vocab().items() if t not in allowed}
    assert set(ours.banned_tokens) == expected
    assert ours.image_pad in ours.banned_tokens
    assert set(ours.stop_tokens) == {ours.im_end, ours.endoftext}
    assert len(ours) == len(theirs) == 151_669


def test_decode_inverts_encode_and_survives_broken_bytes(ours):
    text = "Öfter 中文 <think> \U0001f9e0\n\n x"
    assert ours.decode(ours.encode(text)) == text
    cut = ours.encode("\U0001fabf")[:-1]
    assert len(cut) > 0
    assert "\ufffd" in ours.decode(np.array(cut))


def test_a_document_has_no_prompt(ours):
    with pytest.raises(UserError, match="t/t/0 is a document"):
        render_prompt(document((0, "x")), ours, P)


def test_a_folder_without_a_qwen3_tokenizer_is_refused(tmp_path):
    import tokenizers

    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"lacks .*<\|im_end\|>"):
        load_tokenizer(tmp_path)


def test_the_small_tokenizer_renders_like_its_own_template(tmp_path):
    """The quickstart's tokenizer, through transformers as the reference; needs no data beside the repository."""
    from transformers import AutoTokenizer

    from data_prep.tokenizer import make_tokenizer

    folder = make_tokenizer(["the lung is clear", "Please answer yes or no"] * 3, tmp_path / "t", vocab_size=320)
    small, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for sample in CHATS.values():
        assert render(sample, small, P).tokens.tolist() == reference(theirs, sample.turns)
