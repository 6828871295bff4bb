"""`generate` from the shell against transformers' `generate` on the exported folder."""

import io
import json
import logging
import os
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from infimed_jax.data.sample import Question
from infimed_jax.data.storage import write_samples
from infimed_jax.runs.parameters import load_params, save_params
from infimed_jax.trees import flatten
from tests.launch.hf_sources import PATCHES, QUESTION, command, picture, write_sources

LENGTH = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `checkpoint` and its export `hf`, float32, and images 0.png to 2.png."""
    folder = tmp_path_factory.mktemp("models")
    text, vision = write_sources(folder)
    assert command("convert", "from-hf", "--text", text, "--vision", vision, "--output", folder / "checkpoint",
                   "--visual-tokens", PATCHES, "--dtype", "float32") == 0  # fmt: skip
    assert command("convert", "to-hf", "--checkpoint", folder / "checkpoint", "--output", folder / "hf", "--dtype",
                   "float32", "--vision", vision) == 0  # fmt: skip
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


@pytest.fixture(scope="module")
def transformers_reply(models):
    processor = AutoProcessor.from_pretrained(models / "hf", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(models / "hf").eval()

    def reply(images: int, question: str = QUESTION) -> tuple[list[int], str]:
        parts = []
        for number in range(images):
            parts += [{"type": "text", "text": f"<image_{number + 1}>: "}] if images > 1 else []
            parts.append({"type": "image"})
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        text = processor.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
        )
        files = [Image.open(io.BytesIO(picture(number))) for number in range(images)]
        inputs = processor(images=files or None, text=[text], return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=LENGTH)[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, processor.tokenizer.decode(tokens, skip_special_tokens=True)

    return reply


def ask(models, source, images, *more, question=QUESTION, folder=None):
    """(exit code, the JSON that it wrote)."""
    output = models / "reply.json"
    output.unlink(missing_ok=True)
    files = [part for number in range(images) for part in ("--image", models / f"{number}.png")]
    code = command("generate", f"--{source}", models / (folder or source), "--prompt", question, *files, "--output",
                   output, f"sampling.max_tokens={LENGTH}", *more)  # fmt: skip
    return code, json.loads(output.read_text())


@pytest.mark.parametrize("images", [0, 1, 3])
def test_greedy_text_is_that_of_transformers(models, transformers_reply, capsys, images):
    tokens, text = transformers_reply(images)
    assert len(set(tokens)) > 2  # a reply of one token repeated would prove little
    for source in ("hf", "checkpoint"):
        code, reply = ask(models, source, images)
        assert code == 0 and reply["tokens"] == tokens
        assert reply["reply"] == text
        assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("start", ["\n", "\n\n", "<image_1>", " "])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_however_a_prompt_begins(models, transformers_reply, start, images):
    """Text after an image begins on a new line once, on both sides."""
    tokens, _ = transformers_reply(images, start + QUESTION)
    code, reply = ask(models, "hf", images, question=start + QUESTION)
    assert code == 0 and reply["tokens"] == tokens


def test_a_runs_own_sampling_and_machine_do_not_change_the_greedy_reply(models, transformers_reply, tmp_path):
    params, metadata = load_params(models / "checkpoint")
    metadata["config"]["sampling"] |= {"repetition_penalty": 3.0, "temperature": 1.0, "top_k": 5}
    metadata["config"]["mesh"] |= {"data": 8}
    metadata["config"]["train"] |= {"attention": "splash"}  # which no CPU has
    save_params(models / "penalised", flatten(params).items(), metadata)
    tokens, _ = transformers_reply(1)
    assert ask(models, "checkpoint", 1, folder="penalised")[1]["tokens"] == tokens
    asked = ask(models, "checkpoint", 1, "sampling.repetition_penalty=3", folder="penalised")
    assert asked[1]["tokens"] != tokens


def test_a_drawn_reply_is_a_function_of_the_seed(models):
    def drawn(seed):
        return ask(models, "checkpoint", 1, "sampling.temperature=1.5", f"train.seed={seed}")[1]["tokens"]

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first


def test_mistakes_are_one_line(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    asked = ("generate", "--checkpoint", models / "checkpoint", "--prompt", "x")
    for arguments, words in (
        ((*asked[:-1], " "), "--prompt is empty"),
        ((*asked[:-1], os.fsdecode(b"caf\xe9")), "--prompt is no UTF-8"),
        ((*asked, "model.text.num_layers=3"), "of another shape: text.layers.input_layernorm.scale [2, 32]"),
        ((*asked[:-1], "x " * 2000), "sampling.max_tokens=512 exceed the model's context of 1234: shorten the prompt"),
        ((*asked, "sampling.max_tokens=99999999"), "exceed the model's context of 1234"),
        (("generate", "--hf", models / "hf", *asked[3:], "sampling.max_tokens=1230"), "context of 1234"),
        ((*asked, "--output", tmp_path), "is a folder: name a file in it"),
        ((*asked, "--output", tmp_path / "text.png/reply.json"), "text.png: file exists; name another folder"),
        ((*asked, "--image", tmp_path / "gone.png"), "gone.png: No such file"),
        ((*asked, "--image", tmp_path / "text.png"), "text.png: not a supported image"),
        ((*asked, "sampling.temprature=1"), "did you mean sampling.temperature"),
        (("generate", "--checkpoint", tmp_path, "--prompt", "x"), "no complete checkpoint"),
        (("generate", "--hf", tmp_path, "--prompt", "x"), "config.json is missing"),
    ):
        assert command(*arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line, line


def test_an_evaluation_of_another_model_than_the_checkpoints_is_refused(models, tmp_path, capsys):
    """A layer too many would be a copy of the last one, and the score that of no model."""
    asked = Question("s/test/0", "s", "test", (), kind="yes_no", question="Q?", answer="yes")
    write_samples(tmp_path / "test", [asked], name="toy")
    assert command("evaluate", "--checkpoint", models / "checkpoint", "--dataset", tmp_path / "test",
                   "--output", tmp_path / "out", "model.text.num_layers=3") == 2  # fmt: skip
    assert "of another shape: text.layers.input_layernorm.scale [2, 32]" in capsys.readouterr().err


def test_the_reply_has_standard_output_for_itself(models, capsys):
    """Even where the command line logs there, as it does for every other command."""
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        code, reply = ask(models, "checkpoint", 0)
        logging.getLogger().warning("a note")
    finally:
        logging.getLogger().removeHandler(handler)
    said = capsys.readouterr()
    assert code == 0 and said.out == reply["reply"] + "\n"
    assert "a note" in said.err
