"""One GRPO step: what the sampler is asked, who is graded for what, and what the metrics average over."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from infimed_jax.config import Sampling
from infimed_jax.rl import step
from infimed_jax.rl.grpo import grpo
from infimed_jax.rl.rewards import Reward
from infimed_jax.rl.step import Reply, rollout_metrics, rollout_sampling, update_metrics
from infimed_jax.sampling.engine import Completion
from infimed_jax.sampling.policy import Policy
from tests.rl.conftest import each


def completion(*logprobs, finish="length"):
    return Completion(np.arange(len(logprobs), dtype=np.int32), np.array(logprobs, np.float32), finish)


def test_rollout_metrics_are_means_over_completions_and_entropy_over_tokens():
    completions = [completion(-1.0), completion(-2.0, -3.0, -6.0, finish="stop")]
    earned = [Reward(1.0, {"accuracy": 1.0, "format": 0.0}), Reward(0.25, {"accuracy": 0.0, "format": 1.0})]
    replies = [Reply("s", "", reward, c.finish) for reward, c in zip(earned, completions, strict=True)]
    totals = np.array([[1.0, 0.25]])
    assert rollout_metrics(replies, completions, totals) == {
        "reward": 0.625, "accuracy": 0.5, "format": 0.5, "no_variance": 0.0, "entropy": 3.0, "response_tokens": 2.0,
        "response_tokens_max": 3.0, "truncated": 0.5,
    }  # fmt: skip


def update(weight, *, non_finite=0, **sums):
    """As `make_train_step` gives them: everything but the weight divided by it."""
    sums = {"loss": 0.0, "grad_norm": 0.0, "computed": weight, "ratio": 0.0} | sums
    means = {name: value if name == "grad_norm" else value / weight for name, value in sums.items()}
    return means | {"weight": weight, "non_finite": non_finite, "learning_rate": 0.1}


def test_update_metrics_are_over_tokens_and_leave_out_what_was_skipped():
    updates = [
        update(10.0, loss=5.0, grad_norm=1.0, computed=4.0, ratio=2.0),
        update(1.0, loss=np.nan, grad_norm=np.nan, ratio=np.nan, non_finite=1),
        update(30.0, loss=-1.0, grad_norm=3.0, computed=12.0, ratio=10.0),
    ]
    metrics = update_metrics(updates, [])
    assert metrics == pytest.approx(
        {"skipped": 1, "learning_rate": 0.1, "grad_norm": 2.0, "loss": 0.1, "computed": 0.4, "ratio": 0.75}
    )
    assert update_metrics(updates[1:2], []) == {"skipped": 1, "learning_rate": 0.1}
    gaps = [jax.numpy.array([1.0, 0.0]), jax.numpy.array([2.5, 0.6])]
    metrics = update_metrics(updates, gaps)
    assert (metrics["logprob_gap"], metrics["logprob_gap_max"]) == (pytest.approx(0.1), 2.5)


def test_a_rollout_samples_the_policy_itself(tiny):
    """Whatever generation is set to: a filter or a penalty would sample from another distribution."""
    odd = Sampling(
        temperature=0.3,
        top_p=0.5,
        top_k=7,
        repetition_penalty=1.3,
        presence_penalty=2.0,
        frequency_penalty=1.0,
        max_tokens=99,
        slots=8,
        burst=3,
    )
    grpo = replace(tiny.cfg.grpo, temperature=0.7, top_p=0.9)
    found = rollout_sampling(replace(tiny.cfg, sampling=odd, grpo=grpo))
    assert found == Sampling(temperature=0.7, top_p=0.9, max_tokens=grpo.max_response, slots=8, burst=3)


def test_each_reply_is_graded_for_its_own_question(tiny, tmp_path, monkeypatch):
    """Two steps, two updates each, seen from outside: the sampler's arguments, the rewards' and the updates'."""
    calls, graded, rates, credited = [], [], [], []

    answer = Policy.answer

    def halve(policy, prompts, sampling, key, **options):
        made = answer(policy, prompts, sampling, key, **options)
        for i in range(1, len(made), 2):  # half of them end by themselves
            tokens = np.append(made[i].tokens[:-1], np.int32(tiny.tokenizer.im_end))
            made[i] = Completion(tokens, made[i].logprobs, "stop")
        calls.append((prompts, made, key))
        return made

    def reward(reply, finished, sample, settings):
        graded.append((reply, finished, sample))
        return Reward(float(len(graded) % 3 == 0) if int(sample.id[-1]) % 2 else 1.0, {})

    def training_rows(prompts, completions, advantages, *rest):
        credited.append(advantages)
        return real["training_rows"](prompts, completions, advantages, *rest)

    def learning_rate(cfg, number, total):
        rates.append((number, total))
        return 0.0

    monkeypatch.setattr(Policy, "answer", halve)
    fakes = {"training_rows": training_rows, "learning_rate": learning_rate}
    real = {name: getattr(step, name) for name in fakes}
    for name, fake in fakes.items():
        monkeypatch.setattr(step, name, fake)
    cfg = replace(
        tiny.cfg,
        train=replace(tiny.cfg.train, output=str(tmp_path)),
        grpo=replace(tiny.cfg.grpo, steps=2, update_prompts=2, kl_coefficient=0.05, clip_low=0.05, clip_high=0.05),
    )  # the updates of test_grpo.py
    grpo(cfg, params=tiny.params, reward=each(reward))

    made = [c for _, completions, _ in calls for c in completions]
    prompts = [p for asked, *_ in calls for p in asked]
    assert len(graded) == len(made) == 2 * 4 * 8
    for (reply, finished, sample), c, prompt in zip(graded, made, prompts, strict=True):
        assert reply == tiny.tokenizer.decode(c.text_tokens) and finished == (c.finish == "stop")
        assert sample.question in tiny.tokenizer.decode(prompt.tokens)
    assert {finished for _, finished, _ in graded} == {True, False}
    keys = [jax.random.key_data(key).tolist() for *_, key in calls]
    assert keys[0] != keys[1]
    assert rates == [(i, 4) for i in range(4)]
    for advantages in credited:  # groups that taught nothing stand last
        taught = advantages.reshape(-1, 8).any(axis=1)
        assert taught.tolist() == sorted(taught, reverse=True)
    assert any(not advantages.reshape(-1, 8).any(axis=1).all() for advantages in credited)
