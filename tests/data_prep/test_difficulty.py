"""Difficulty: counts that the reward would give, shares that the plan names, and a run that goes on where it was."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from data_prep.steps.difficulty import histogram, measure
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.rl import difficulty
from infimed_jax.rl.difficulty import Plan
from infimed_jax.rl.step import rollout_sampling
from infimed_jax.sampling.engine import Completion
from infimed_jax.sampling.policy import Policy
from tests.data_prep.samples import caption, damage
from tests.rl.conftest import make_tiny
from tests.tiny import mesh, one_device  # noqa: F401

reward = difficulty.score


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with one_device():
        return make_tiny(tmp_path_factory.mktemp("tiny"))


def candidates(tmp_path, tiny, count=20):
    write_samples(tmp_path / "in", [*(tiny.question(i) for i in range(count)), caption(99)], name="candidates")
    return tmp_path / "in"


def script(monkeypatch, tiny, calls):
    """Question n gets n % 9 right answers of 8, some wrong ones, some without form or cut; `calls` counts prompts."""

    def fake(policy, prompts, sampling, key, *, longest, on_progress):
        calls.append(len(prompts))
        completions = []
        for place, prompt in enumerate(prompts):
            number, draw = numbers[prompt.tokens.tobytes(), prompt.pixels[0].tobytes()], place % 8
            gold = tiny.question(number).answer
            other = "no" if gold == "yes" else "yes"
            right = draw < number % 9
            text = f"<think>a</think>\\boxed{{{gold if right else other}}}" if draw % 2 or right else f"\\boxed{{{gold}"
            tokens = np.array(tiny.tokenizer.encode(text), np.int32)
            # a right answer that the limit cut is none
            finish = "stop"
            if not right and draw == 7:
                tokens, finish = np.array(tiny.tokenizer.encode(f"<think>a \\boxed{{{gold}}}"), np.int32), "length"
            if finish == "stop":
                tokens = np.append(tokens, tiny.tokenizer.stop_tokens[0]).astype(np.int32)
            completions.append(Completion(tokens, np.zeros(len(tokens), np.float32), finish))
        on_progress(len(prompts), len(prompts), "")
        return completions

    samples = [tiny.question(i) for i in range(20)]
    prompts = tiny.prompts(samples)
    numbers = {(p.tokens.tobytes(), p.pixels[0].tobytes()): i for i, p in enumerate(prompts)}
    assert len(numbers) == 20
    monkeypatch.setattr(Policy, "answer", fake)


def run(folder, output, tiny, plan=None, **options):
    return measure(folder, output, plan or Plan(), policy=tiny.policy, **({"checkpoint": "c"} | options))


def test_questions_are_counted_kept_by_their_share_and_marked(tmp_path, tiny, monkeypatch):
    folder = candidates(tmp_path, tiny)
    script(monkeypatch, tiny, calls := [])
    told = []
    report = run(folder, tmp_path / "out", tiny, Plan(between=0.5, extreme=0.0), on_progress=lambda *a: told.append(a))
    expected = {f"tiny/train/{i}": i % 9 for i in range(20)}
    assert report["right"] == expected and calls == [160]
    assert (
        report["histogram"] == np.bincount(list(expected.values()), minlength=9).tolist() == [3, 3, 2, 2, 2, 2, 2, 2, 2]
    )
    assert report["kept_of"] == [0, 2, 1, 2, 2, 2, 1, 1, 0]
    assert report["mean_right"] == pytest.approx(sum(expected.values()) / 160)
    assert report["pass_at_8"] == pytest.approx(17 / 20)
    assert report["left_out"] == {"no gold answer": 1} and report["questions"] == 20
    kept = list(open_samples(tmp_path / "out"))
    assert report["samples"] == len(kept) == 11
    originals = {sample.id: sample for sample in open_samples(folder)}
    for sample in kept:
        right = expected[sample.id]
        assert right not in (0, 8) and sample.meta["right_of_draws"] == f"{right}/8"
        assert replace(sample, meta=originals[sample.id].meta) == originals[sample.id]
    assert {i for i, right in expected.items() if 3 <= right <= 5} <= {sample.id for sample in kept}
    assert json.loads((tmp_path / "out.json").read_text()) == report
    pixels = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).reshape(-1, 3)
    assert {(11, 110, 117), (211, 221, 224)} <= set(map(tuple, pixels))
    assert told[-1][:2] == (20, 20)


def test_a_stopped_measurement_goes_on_and_another_share_measures_nothing(tmp_path, tiny, monkeypatch):
    folder = candidates(tmp_path, tiny)
    monkeypatch.setattr(difficulty, "CHUNK", 8)
    script(monkeypatch, tiny, calls := [])
    whole, counted = run(folder, tmp_path / "whole", tiny), Policy.answer
    assert calls == [64, 64, 32]

    def failing(*args, **kwargs):
        if len(calls) == 4:
            raise RuntimeError("killed")
        return counted(*args, **kwargs)

    monkeypatch.setattr(Policy, "answer", failing)
    with pytest.raises(RuntimeError):
        run(folder, tmp_path / "out", tiny)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()
    monkeypatch.setattr(Policy, "answer", counted)
    assert run(folder, tmp_path / "out", tiny)["right"] == whole["right"]
    assert calls[3:] == [64, 64, 32]  # the first chunk was kept
    assert run(folder, tmp_path / "out", tiny) == run(folder, tmp_path / "out", tiny)
    assert run(folder, tmp_path / "out", tiny, Plan(extreme=1.0, between=1.0))["samples"] == 20
    assert len(calls) == 6
    run(folder, tmp_path / "out", tiny, checkpoint="other weights")
    assert len(calls) == 9


def test_a_damaged_chunk_is_measured_again(tmp_path, tiny, monkeypatch):
    folder = candidates(tmp_path, tiny)
    script(monkeypatch, tiny, calls := [])
    first = run(folder, tmp_path / "out", tiny)
    (part,) = (tmp_path / "out.parts").glob("*.json")
    part.write_text('{"right": {')
    (tmp_path / "out.json").unlink()
    assert run(folder, tmp_path / "out", tiny) == first and len(calls) == 2


def test_unreadable_records_are_counted_and_the_rest_measured(tmp_path, tiny, monkeypatch):
    folder = candidates(tmp_path, tiny)
    damage(folder)
    script(monkeypatch, tiny, [])
    with pytest.raises(UserError, match=r"1 of 21 records cannot be read .*--max-bad-records"):
        run(folder, tmp_path / "out", tiny)
    report = run(folder, tmp_path / "out", tiny, max_bad_records=0.05)
    assert report["left_out"] == {"no gold answer": 1, "unreadable record": 1}
    assert report["unreadable_records"] == [f"{open_samples(folder).name} record 0"]
    assert report["right"] == {f"tiny/train/{i}": i % 9 for i in range(1, 20)}


def test_nothing_kept_and_nothing_to_ask_are_told(tmp_path, tiny, monkeypatch):
    script(monkeypatch, tiny, [])
    write_samples(tmp_path / "hard", [tiny.question(0), tiny.question(9)], name="hard")
    with pytest.raises(UserError, match="none of 2 questions is kept: raise --between or --extreme"):
        run(tmp_path / "hard", tmp_path / "out", tiny, Plan(extreme=0.0))
    write_samples(tmp_path / "text", [caption(0)], name="text")
    with pytest.raises(UserError, match="no gold answer"):
        run(tmp_path / "text", tmp_path / "out", tiny)


def test_a_real_model_is_asked_as_in_grpo(tmp_path, tiny):
    """A random model answers nothing right; the draws themselves are those of the policy with the plan's seed."""
    folder = candidates(tmp_path, tiny, 3)
    said = []

    def listen(attempt, grpo):
        said.append((attempt.sample.id, attempt.reply, attempt.finished))
        return reward(attempt, grpo)

    plan = Plan(draws=4, low=1, high=2, between=1.0, extreme=1.0, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(difficulty, "score", listen)
        report = run(folder, tmp_path / "out", tiny, plan)
    samples = [tiny.question(i) for i in range(3)]
    prompts = [p for p in tiny.prompts(samples) for _ in range(4)]
    key = jax.random.fold_in(jax.random.key(5), 0)
    expected = tiny.policy.answer(prompts, rollout_sampling(tiny.cfg), key)
    assert [reply for _, reply, _ in said] == [tiny.tokenizer.decode(c.text_tokens) for c in expected]
    assert [finished for *_, finished in said] == [c.finish == "stop" for c in expected]
    assert Counter(id for id, *_ in said) == {sample.id: 4 for sample in samples}
    assert len({reply for _, reply, _ in said}) > 3  # temperature 1, not greedy
    assert report["questions"] == report["samples"] == 3


@pytest.mark.parametrize(
    "counts", [[12_000, 9_000, 8_000, 7_000, 6_500, 7_000, 9_000, 40_000, 99_999], [99_999] * 17, [0] * 8 + [3]]
)
def test_the_pictures_words_lie_beside_each_other(counts):
    figure = histogram({"histogram": counts, "kept_of": counts})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in (*axes.texts, *axes.get_legend().get_texts(), axes._left_title)]
    assert len(boxes) == len(counts) + 3
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    legend = axes.get_legend().get_window_extent()
    assert not any(legend.overlaps(bar.get_window_extent()) for bar in axes.patches if bar.get_height())
