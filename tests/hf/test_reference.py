"""transformers' side of a proof: the same numbers in another process and with weights widened as they are used."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from infimed_jax.data.chat import load_tokenizer, render_prompt
from infimed_jax.errors import UserError
from infimed_jax.hf import reference
from infimed_jax.hf.verify import builtin_samples, hf_messages, verify
from infimed_jax.models.infimed.hf import HUGGING_FACE
from tests.hf.reading import to_hf


@pytest.fixture
def folder(model, make_params, tokenizer_folder, tmp_path):
    return to_hf(make_params(model), model, tokenizer_folder, tmp_path / "out", dtype="bfloat16")


def test_widened_part_by_part_is_float32_and_no_more_than_a_part(folder):
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = []  # of what is float32, when a module begins

    def count(*_):
        sizes.append(sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))

    reference.widen_as_they_run(model)
    for module in model.modules():
        module.register_forward_pre_hook(count)
    image = model.config.image_token_id
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[image] * 16, 7, 8, 9]]),
        "pixel_values": torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, whole(**inputs).logits
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    parts = [model.lm_head, model.model.language_model.layers[0], model.model.vision_tower.head]
    assert 0 < max(sizes) == max(sum(p.numel() for p in part.parameters()) for part in parts)


def test_a_proof_with_a_process_of_its_own(model, make_params, tokenizer_folder, folder, tmp_path):
    result = verify(make_params(model), model, folder, tokenizer_folder, builtin_samples()[1:2])
    assert result["status"] == "passed", result["failures"]
    assert json.loads((folder / "verify.json").read_text()) == result
    assert list(tmp_path.iterdir()) == [folder]


def test_pieces_are_all_the_logits(model, tokenizer_folder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "POSITIONS", 7)
    sample = builtin_samples()[0]
    tokens = render_prompt(sample, load_tokenizer(tokenizer_folder), 16, ()).tokens.tolist()
    prompt = reference.Prompt(hf_messages(sample), (), tokens)
    (answer,), faults = reference.compute(folder, [prompt], tmp_path, HUGGING_FACE.features)
    assert faults == [] and answer.tokens == tokens
    pieces = list(answer.logits(model.text.vocab_size))
    assert [len(piece) for piece in pieces[:-1]] == [7] * (len(tokens) // 7)
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-5)  # a product of other shapes


def test_a_full_disk_is_known_as_one():
    with pytest.raises(OSError, match="No space left") as raised:
        reference._save(Path("/dev/full"), torch.zeros(3))
    assert raised.value.errno == errno.ENOSPC


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="ended from outside, most likely for want of memory"):
        reference.in_own_process(os._exit, 9)
