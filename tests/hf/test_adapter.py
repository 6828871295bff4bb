"""Adapters in PEFT's layout: `peft` over the exported base computes what our model with its adapters does."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import LlavaForConditionalGeneration

from infimed_jax import config
from infimed_jax.errors import UserError
from infimed_jax.hf import reference
from infimed_jax.hf.import_ import open_export
from infimed_jax.hf.verify import verify
from infimed_jax.models import lora
from infimed_jax.train.state import merge_params
from tests.hf.reading import to_hf

peft = pytest.importorskip("peft", reason="peft is not installed")

SETTINGS = config.Lora(rank=3, alpha=5.0)


@pytest.fixture
def adapted(model, make_params):
    """`adapted(settings)`: random parameters with random adapters."""

    def make(settings: config.Lora = SETTINGS) -> dict:
        rng = np.random.default_rng(1)
        adapters = lora.init_lora(jax.random.key(0), model, settings)
        drawn = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), adapters)
        return merge_params(drawn, make_params(model))

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_computes_what_we_compute(adapted, model, tokenizer_folder, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(reference, "in_own_process", lambda function, *arguments: function(*arguments))
    params, scale = adapted(), lora.scale_of(SETTINGS)
    folder = to_hf(params, model, tokenizer_folder, tmp_path / "out", dtype=dtype, lora=SETTINGS)
    result = verify(params, model, folder, tokenizer_folder, lora_scale=scale)
    assert result["status"] == "passed", result["failures"]
    assert result["versions"]["peft"] == peft.__version__
    failed = verify(params, model, folder, tokenizer_folder, lora_scale=1.1 * scale)
    assert any("text: logits differ" in failure for failure in failed["failures"])


def test_peft_finds_every_adapter_and_no_other_place(adapted, model, tokenizer_folder, tmp_path):
    folder = to_hf(adapted(), model, tokenizer_folder, tmp_path / "out", lora=SETTINGS)
    base, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    loaded = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    written = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(written) == 7 * 2 * model.text.num_layers
    assert {key: tensor.tobytes() for key, tensor in written.items()} == {
        key: tensor.numpy().tobytes() for key, tensor in loaded.items()
    }
    assert (folder / "adapter/README.md").read_text() == (folder / "README.md").read_text()
    assert "LoRA adapters (rank 3, alpha 5)" in (folder / "README.md").read_text()
    assert "transformers and serving engines read `<|im_end|>`" in (folder / "README.md").read_text()
    assert json.loads((folder / "export.json").read_text())["adapter"]["tensors"] == len(written)


def test_merged_by_peft_it_is_the_merged_export(adapted, model, tokenizer_folder, tmp_path):
    settings = dataclasses.replace(SETTINGS, targets=("k_proj", "o_proj", "down_proj"))
    params = adapted(settings)
    apart = to_hf(params, model, tokenizer_folder, tmp_path / "apart", lora=settings)
    with pytest.raises(UserError, match=r"adapter holds LoRA adapters, which this does not read.*merged"):
        open_export(apart)
    ours = lora.merge_lora(params, lora.scale_of(settings))
    merged = to_hf(ours, model, tokenizer_folder, tmp_path / "merged")
    wrapped = peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(apart), apart / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs, expected = (open_export(folder).params() for folder in (tmp_path / "theirs", merged))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), theirs, expected)
    shutil.rmtree(apart / "adapter")
    base = open_export(apart).params()["text"]["layers"]
    for module, name, moved in (("self_attn", "k_proj", True), ("self_attn", "q_proj", False)):
        kernels = [tree[module][name]["kernel"] for tree in (base, expected["text"]["layers"])]
        assert np.array_equal(*kernels) != moved
