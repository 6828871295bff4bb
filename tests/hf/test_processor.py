import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from infimed_jax.data.chat import load_tokenizer, render_prompt
from infimed_jax.data.images import decode_image
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.errors import UserError
from infimed_jax.hf.processor import write_processor
from infimed_jax.models.infimed import config as infimed

QWEN3 = Path(__file__).resolve().parents[3] / "shared/data/tokenizers/qwen3"


@pytest.fixture(scope="module", params=["tiny", "qwen3"])
def tokenizer(request, tokenizer_folder):
    if request.param == "tiny":
        return tokenizer_folder
    if not QWEN3.is_dir():
        pytest.skip("shared/data/tokenizers is absent")
    return QWEN3


@pytest.fixture(scope="module")
def processor(tokenizer, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    write_processor(tokenizer, model, folder)
    return AutoProcessor.from_pretrained(folder, backend="pil")  # also where torchvision is installed


@pytest.fixture(scope="module")
def original(tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer)


def picture(seed: int = 0, size=(50, 37)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def ask(*content, before=()):
    images = tuple(png(picture(n)) for n in range(sum(isinstance(piece, int) for piece in content)))
    turns = (*before, Turn("user", content), Turn("assistant", ("Yes.",)))
    return Chat("s", "s", "test", images, turns)


EARLIER = (
    Turn("system", ("Answer briefly.",)),
    Turn("user", ("Hello",)),
    Turn("assistant", ("Hi.",), reasoning="A greeting."),
)
SAMPLES = [
    ask("Which organ makes insulin?"),
    ask(0, "\nIs the heart enlarged? 心脏"),
    ask(0, 1, 2, "\nWhich shows a fracture?"),
    ask("First", 0, "\nthen", 1, "\nwhich?"),
    ask("<image_1>: ", 0, "<image_2>: ", 1, "\nWhich?"),  # as questions with several images are put
    ask(0, "\nIs it?", before=EARLIER),
]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("thinking", [False, True])
def test_exported_processor_gives_the_tokens_of_training(processor, tokenizer, model, sample, thinking):
    """String content with one mark an image, and list content, both expand to the renderer's tokens."""
    ours = render_prompt(sample, load_tokenizer(tokenizer), model.projector.visual_tokens, reasoning=thinking)
    as_strings, as_lists = [], []
    for turn in sample.turns[:-1]:
        more = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
        text = "".join(p if isinstance(p, str) else "<|image_pad|>" for p in turn.content)
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.content]
        as_strings.append({"role": turn.role, "content": text, **more})
        as_lists.append({"role": turn.role, "content": parts if turn.role == "user" else text, **more})
    images = [picture(n) for n in range(len(sample.images))]
    for messages in (as_strings, as_lists):
        text = processor.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, tokenize=False
        )
        assert text.count("<|image_pad|>") == len(images)
        tokens = processor(images=images or None, text=[text])["input_ids"][0]
        assert list(tokens) == ours.tokens.tolist()


def test_natural_messages_give_the_training_layout(processor, tokenizer, model):
    """Image, then text without a newline, tokenised in one call, as a user would write it."""
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "Is it?"}]}
    ]
    out = processor.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=True, return_dict=True
    )
    ours = render_prompt(ask(0, "\nIs it?"), load_tokenizer(tokenizer), model.projector.visual_tokens)
    assert list(np.asarray(out["input_ids"]).reshape(-1)) == ours.tokens.tolist()
    assert np.asarray(out["pixel_values"]).shape == (1, 3, 30, 30)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nx\n</think>\n\nHello"},
        {"role": "user", "content": "\n<|image_pad|>"},
        {"role": "assistant", "content": "Bye", "reasoning_content": "why"},
    ],
    [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "seen"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "again"},
    ],
]
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("options", [{}, {"tools": [TOOL]}, {"enable_thinking": False}])
def test_string_content_renders_as_before(processor, original, chat, options):
    options = options | {"tokenize": False, "add_generation_prompt": True}
    assert processor.apply_chat_template(chat, **options) == original.apply_chat_template(chat, **options)
    assert processor.tokenizer.apply_chat_template(chat, **options) == original.apply_chat_template(chat, **options)


@pytest.mark.parametrize("seed", range(5))
def test_pixels_are_those_of_training(processor, model, seed):
    image = picture(seed, size=(20 + 13 * seed, 90 - 11 * seed))
    ours = decode_image(png(image), model.vision.image_size).astype(np.float32) / 127.5 - 1
    theirs = np.asarray(processor(images=[image], text=["<|image_pad|>"])["pixel_values"])
    np.testing.assert_allclose(theirs[0].transpose(1, 2, 0), ours, atol=1e-6, rtol=0)  # float32 in another order


def test_so400m_expands_to_729(tokenizer_folder, tmp_path):
    """384 is no multiple of 14: the remainder is not counted."""
    write_processor(tokenizer_folder, infimed.Model(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    out = processor(images=[picture()], text=["<|image_pad|>"])
    assert list(out["input_ids"][0]) == [processor.image_token_id] * 729
    assert np.asarray(out["pixel_values"]).shape == (1, 3, 384, 384)


def test_a_tokenizer_taken_from_an_export_is_not_wrapped_twice(tokenizer_folder, model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for source, output in ((tokenizer_folder, first), (first, second)):
        output.mkdir()
        write_processor(source, model, output)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_a_tokenizer_without_a_template_is_refused(tokenizer_folder, model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no chat template"):
        write_processor(source, model, tmp_path)
