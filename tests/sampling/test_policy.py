"""A policy from a checkpoint: its answers, its placement, and its one cache of images; exports: test_generate.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from infimed_jax import config
from infimed_jax.data import images
from infimed_jax.data.images import ImageCache, decode_image, prepare_image
from infimed_jax.errors import UserError
from infimed_jax.models.infimed.config import Model, Projector, Vision
from infimed_jax.runs.parameters import save_params
from infimed_jax.sampling.policy import Policy
from infimed_jax.trees import flatten
from tests.rl.conftest import make_tiny
from tests.tiny import one_device, png

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(Tiny, its checkpoint)."""
    folder = tmp_path_factory.mktemp("policy")
    with one_device():
        tiny = make_tiny(folder)
    values = config.to_dict(replace(tiny.cfg, data=replace(tiny.cfg.data, tokenizer=str(tiny.tokenizer.folder))))
    leaves = flatten(jax.tree.map(np.asarray, tiny.params))
    save_params(folder / "run", leaves.items(), {"config": values, "history": []})
    return tiny, folder / "run"


def answers(policy, samples):
    prompts = policy.prompts(samples, reasoning=False)
    return [reply.tokens.tolist() for reply in policy.answer(prompts, policy.config.sampling, jax.random.key(0))]


def test_a_checkpoint_its_parameters_and_its_settings_answer_alike(asked):
    tiny, run = asked
    opened = Policy.open(run, ["sampling.max_tokens=5"], defaults={"sampling": {"max_tokens": 9, "burst": 2}})
    assert (opened.config.sampling.max_tokens, opened.config.sampling.burst) == (5, 2)
    cfg = replace(tiny.cfg, sampling=opened.config.sampling)
    given = Policy.of(tiny.params, cfg, tiny.tokenizer, ImageCache())
    assert answers(opened, tiny.samples) == answers(given, tiny.samples)


def test_settings_of_another_model_are_refused(asked):
    with pytest.raises(UserError, match="the tree of parameters"):
        Policy.open(asked[1], ["model.text.num_layers=3"])
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Policy.open(asked[1], export=True)


def test_a_tokenizer_larger_than_the_model_is_refused(asked, monkeypatch):
    monkeypatch.setattr("infimed_jax.data.chat.Tokenizer.__len__", lambda _: 10**6)
    with pytest.raises(UserError, match="name the model's own"):
        Policy.open(asked[1])


def test_only_tokens_that_text_may_hold_are_sampled(asked, monkeypatch):
    tiny, seen = asked[0], {}

    def watch(decoder, settings, *, stops, banned, **options):
        seen.update(stops=set(stops), banned=set(banned))
        raise UserError("enough")

    monkeypatch.setattr("infimed_jax.sampling.policy.Engine", watch)
    policy = Policy.open(asked[1])
    with pytest.raises(UserError, match="enough"):
        policy.answer(policy.prompts(tiny.samples[:1], reasoning=True), config.Sampling(), jax.random.key(0))
    unknown = set(range(len(tiny.tokenizer), tiny.cfg.model.text.vocab_size))
    assert seen["banned"] >= unknown | {tiny.tokenizer.image_pad}
    assert not seen["banned"] & {tiny.tokenizer.im_end, tiny.tokenizer.think, tiny.tokenizer.end_think}
    assert seen["stops"] == {tiny.tokenizer.im_end, tiny.tokenizer.endoftext}


def test_the_cache_decodes_a_kept_image_once_and_keeps_to_its_limit(monkeypatch):
    decoded = []
    eight, four = (Model(Vision(image_size=side, patch_size=2), Projector(visual_tokens=4)) for side in (8, 4))
    monkeypatch.setattr(
        images, "prepare_image", lambda data, model: (decoded.append(data), prepare_image(data, model))[1]
    )
    files = [png(seed) for seed in range(3)]
    cache = ImageCache(limit=2 * 8 * 8 * 3)
    for number in (0, 1, 0, 2, 0, 1):  # 1 is the least recently used when 2 comes, and 2 when 1 comes back
        np.testing.assert_array_equal(cache.prepare(files[number], eight), decode_image(files[number], 8))
    assert [files.index(data) for data in decoded] == [0, 1, 2, 1]
    assert cache.prepare(files[0], eight) is cache.prepare(files[0], eight)
    assert cache.prepare(files[0], four).shape == (4, 4, 3)


def test_tensor_parallel_evaluation_holds_half_the_text_stack_a_device(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.sampling.policy_program", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "policy on a mesh: ok" in done.stdout
