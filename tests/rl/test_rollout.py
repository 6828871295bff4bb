"""Which questions are asked, and how completions become rows: nothing lost, nothing moved, one shape."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax import config
from infimed_jax.data.batch import Segment
from infimed_jax.data.chat import render_prompt
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.errors import UserError
from infimed_jax.models import forward
from infimed_jax.models.compute import Compute
from infimed_jax.rl.loss import GrpoBatch, completion_logprobs, grpo_loss, make_scorer
from infimed_jax.rl.rollout import (
    Questions,
    branch,
    join,
    next_fit,
    plan_layout,
    prompt_order,
    questions,
    training_rows,
)
from infimed_jax.sampling.engine import Completion

COMPUTE = Compute("float32", "none", "xla", 16)


def test_prompt_order_is_pure_and_asks_everything_once_an_epoch():
    count, prompts = 10, 4
    stream = np.concatenate([prompt_order(count, prompts, 0, step) for step in range(10)])
    for epoch in stream.reshape(-1, count):
        assert sorted(epoch) == list(range(count))
    assert (stream[:count] != stream[count : 2 * count]).any()
    np.testing.assert_array_equal(prompt_order(count, prompts, 0, 7), stream[28:32])
    assert (prompt_order(100, 50, 0, 0) != prompt_order(100, 50, 1, 0)).any()
    assert sorted(prompt_order(3, 9, 0, 1)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # more prompts than questions


def test_questions_left_out_are_counted_by_reason(tiny):
    chat = Chat("tiny/train/0", "tiny", "train", (), (Turn("user", ("Is it bright?",)),))
    many = tiny.question(1, images=5)
    long = replace(tiny.samples[0], question="Is it bright? " * 100)
    found = questions([chat, *tiny.samples[:3], many, long], tiny.tokenizer, tiny.cfg)
    assert found.numbers.tolist() == [1, 2, 3]
    assert found.dropped == {
        "no gold answer": 1,
        "more images than data.images_per_row": 1,
        "longer than grpo.max_prompt": 1,
    }
    prompts = tiny.prompts(tiny.samples[:3])
    assert (found.longest, found.images) == (max(map(len, prompts)), 1)
    broken = replace(tiny.samples[0], images=(tiny.samples[0].images[0][:40],))
    assert questions([broken, *tiny.samples[:3]], tiny.tokenizer, tiny.cfg).dropped == {"unreadable image": 1}
    with pytest.raises(UserError, match=r"asked in GRPO \(1 no gold answer\): raise the limit"):
        questions([chat], tiny.tokenizer, tiny.cfg)


def test_the_fingerprint_is_of_what_is_asked_and_graded(tiny):
    """Thoughts that a question carries are no part of its prompt."""

    def fingerprint(samples):
        return questions(samples, tiny.tokenizer, tiny.cfg).fingerprint

    first, *rest = tiny.samples[:3]
    choice = {"kind": "choice", "options": ("dark", "bright"), "answer": "A"}
    changes = [
        {"question": "Is it dull?"}, {"answer": "yes"}, {"kind": "open"}, {"images": rest[1].images}, {"id": "other"},
        choice, choice | {"options": ("bright", "dark")}, choice | {"answer": "B"},
    ]  # fmt: skip
    prints = [fingerprint([replace(first, **change), *rest]) for change in ({}, *changes)]
    assert len(set(prints)) == len(prints)
    assert fingerprint([*rest, first]) not in prints
    assert fingerprint([replace(first, reasoning="Hm."), *rest]) == prints[0]


def test_prompts_ask_for_reasoning_and_share_decoded_images(tiny):
    prompts = tiny.prompts(tiny.samples[:4])
    assert prompts[0].pixels[0] is prompts[1].pixels[0] and prompts[2].pixels[0] is prompts[3].pixels[0]
    assert prompts[0].pixels[0] is not prompts[2].pixels[0]
    for sample, prompt in zip(tiny.samples, prompts, strict=False):
        text = tiny.tokenizer.decode(prompt.tokens)
        assert "\\boxed{}" in text and text.endswith("<|im_start|>assistant\n")
        asked = render_prompt(sample, tiny.tokenizer, 4, reasoning=True)
        np.testing.assert_array_equal(prompt.tokens, asked.tokens)


def test_a_completion_that_fits_no_row_is_refused_with_the_mend(tiny):
    found = Questions(np.arange(3), longest=158, images=1, dropped={}, fingerprint="")
    with pytest.raises(config.ConfigError, match=r"data.context 160 .* raise it to 164"):
        plan_layout(found, tiny.cfg)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_planned_rows_hold_every_rollout(data):
    """Next-fit under both budgets never needs more rows than planned, and loses and reorders nothing."""
    group, prompts = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 6))
    longest, reply = data.draw(st.integers(8, 40)), data.draw(st.integers(1, 20))
    images = data.draw(st.integers(0, 3))
    cfg = config.Config(
        data=config.Data(
            context=longest + reply + data.draw(st.integers(0, 200)),
            images_per_row=max(images, data.draw(st.integers(1, 8))),
        ),
        train=config.Train(global_batch=4, micro_batches=2),
        grpo=config.Grpo(
            prompts=prompts,
            update_prompts=prompts,
            group_size=group,
            max_response=reply,
            share_prompts=data.draw(st.booleans()),
        ),
    )
    layout = plan_layout(Questions(np.arange(9), longest, images, {}, ""), cfg)
    asked, said = [], []
    fullest = data.draw(st.booleans())  # everything at its bound, where the planned rows are just enough
    size = lambda low, high: high if fullest else data.draw(st.integers(low, high))  # noqa: E731
    for _ in range(prompts):
        pixels = tuple(np.zeros(0) for _ in range(size(0, images)))
        tokens = np.zeros(size(1, longest), np.int32)
        asked += [Segment(tokens, tokens, tokens > 0, pixels)] * group
        said += [np.zeros(size(1, reply), np.int32) for _ in range(group)]
    bins = next_fit(asked, said, layout)
    assert len(bins) <= layout.rows and layout.piece == 2 and layout.shared == cfg.grpo.share_prompts
    assert [i for numbers in bins for i in numbers] == list(range(len(said)))
    for numbers in bins:
        if layout.shared:
            segments = [segment for segment, _ in branch([asked[i] for i in numbers], [said[i] for i in numbers])]
        else:
            segments = [join(asked[i], said[i]) for i in numbers]
        assert sum(map(len, segments)) <= layout.context
        assert len({id(p) for i in numbers for p in asked[i].pixels}) <= layout.images <= cfg.data.images_per_row


def replies(tiny, number, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        n = rng.integers(1, tiny.cfg.grpo.max_response + 1)
        tokens = rng.integers(0, 90, n).astype(np.int32)
        yield Completion(tokens, -rng.uniform(0.1, 5, n).astype(np.float32), "length")


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "repeated"])
def rollout(tiny, request):
    """(prompts, completions, advantages, layout, GrpoBatch): half the completions that the plan has room for."""
    cfg = replace(tiny.cfg, grpo=replace(tiny.cfg.grpo, share_prompts=request.param))
    group = tiny.cfg.grpo.group_size // 2
    prompts = [p for p in tiny.prompts(tiny.samples[1:5]) for _ in range(group)]
    completions = list(replies(tiny, len(prompts)))
    advantages = np.random.default_rng(1).normal(size=len(prompts)).astype(np.float32)
    layout = plan_layout(questions(tiny.samples, tiny.tokenizer, cfg), cfg)
    assert layout.shared == request.param
    layout = replace(layout, pieces=layout.pieces + 1)  # room for a piece that is all padding
    rows = training_rows(prompts, completions, advantages, layout, tiny.cfg.model)
    return prompts, completions, advantages, layout, rows


def test_rows_hold_each_completion_with_its_own_numbers(rollout):
    prompts, completions, advantages, layout, rows = rollout
    assert rows.batch.tokens.shape == (layout.rows, layout.context)
    found = []
    order = [r % layout.piece * layout.pieces + r // layout.piece for r in range(layout.rows)]
    for place in order:
        segment_ids = rows.batch.segment_ids[place]
        for segment in range(1, segment_ids.max() + 1):
            at = np.flatnonzero(segment_ids == segment)
            weighted = at[rows.batch.loss_weights[place, at] > 0]
            if layout.shared:
                if not len(weighted):  # a prompt
                    continue
                at = np.concatenate([np.flatnonzero(segment_ids == rows.batch.prefix_ids[place, at[0]]), at])
            np.testing.assert_array_equal(rows.batch.positions[place, 0, at], np.arange(len(at)))
            found.append((rows.batch.tokens[place, at], rows.batch.tokens[place, weighted + 1],
                          rows.old_logprobs[place, weighted], rows.advantages[place, weighted]))  # fmt: skip
    assert len(found) == len(prompts)
    for i, (tokens, reply, sampled, credit) in enumerate(found):
        np.testing.assert_array_equal(tokens, np.concatenate([prompts[i].tokens, completions[i].tokens]))
        np.testing.assert_array_equal(reply, completions[i].tokens)
        np.testing.assert_array_equal(sampled, completions[i].logprobs)
        assert (credit == advantages[i]).all()
    outside = rows.batch.loss_weights == 0
    assert not rows.old_logprobs[outside].any() and not rows.advantages[outside].any()


def test_real_rows_stand_in_the_first_pieces(rollout):
    """Micro-batch j of the train step is `[j::pieces]`; the padding must fill the last ones, to be skipped."""
    *_, layout, rows = rollout
    full = [(rows.batch.loss_weights[j :: layout.pieces].any(1)).sum() for j in range(layout.pieces)]
    assert sum(full) < layout.rows
    real = sum(full)
    assert full == [min(layout.piece, max(0, real - j * layout.piece)) for j in range(layout.pieces)]


def test_a_group_shares_its_image_slot(rollout):
    *_, rows = rollout
    used = rows.batch.pixels.any((2, 3, 4)).sum()
    assert used < len(rollout[1]) / 1.5  # 16 completions, two questions an image


def test_sharing_prompts_changes_the_places_but_not_the_gradient(tiny):
    """The same rollout with each prompt once a row, and with each completion bringing its own."""
    prompts = [p for p in tiny.prompts(tiny.samples[1:5]) for _ in range(4)]
    completions, advantages = list(replies(tiny, 16, seed=5)), np.random.default_rng(4).normal(size=16)
    found, sizes = questions(tiny.samples, tiny.tokenizer, tiny.cfg), {}
    for shared in (True, False):
        cfg = replace(tiny.cfg, grpo=replace(tiny.cfg.grpo, share_prompts=shared, kl_coefficient=0.0))
        rows = training_rows(prompts, completions, advantages, plan_layout(found, cfg), cfg.model)
        grad = jax.jit(jax.value_and_grad(grpo_loss(cfg.model, COMPUTE, cfg.grpo), has_aux=True))
        (_, aux), grads = grad(tiny.params, jax.tree.map(jax.numpy.asarray, rows))
        sizes[shared] = (rows.batch.segment_ids != 0).sum(), aux, grads
    assert sizes[True][0] < sizes[False][0] / 2
    assert sizes[True][1].keys() == sizes[False][1].keys()
    for name, value in sizes[True][1].items():
        np.testing.assert_allclose(value, sizes[False][1][name], rtol=1e-5, err_msg=name)
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(sizes[False][2]))
    for ours, expected in zip(*(jax.tree.leaves(sizes[shared][2]) for shared in (True, False)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5 * largest)  # float32 sums in another order


def test_too_many_completions_for_the_plan_are_refused(rollout, tiny):
    prompts, completions, advantages, layout, _ = rollout
    small = replace(layout, piece=1, pieces=1)
    with pytest.raises(ValueError, match="exceed the plan"):
        training_rows(prompts, completions, advantages, small, tiny.cfg.model)


def test_logprobs_alone_equal_those_in_a_mixed_row(rollout, tiny):
    """A completion scored alone, and packed beside others with other images, in float32."""
    prompts, completions, advantages, layout, rows = rollout
    cfg = tiny.cfg
    score = make_scorer(cfg.model, COMPUTE, 1.0, layout.pieces)
    packed = np.asarray(score(tiny.params, jax.tree.map(jax.numpy.asarray, rows.batch)))
    weighted = rows.batch.loss_weights > 0
    assert (packed[~weighted] == 0).all()
    order = [r % layout.piece * layout.pieces + r // layout.piece for r in range(layout.rows)]
    in_rows = np.concatenate([packed[place][weighted[place]] for place in order])
    single = replace(layout, context=96, images=1, piece=1, pieces=1)
    one = jax.jit(completion_logprobs, static_argnums=(2, 3))
    alone = []
    for p, c, a in zip(prompts, completions, advantages, strict=True):
        row = training_rows([p], [c], np.array([a]), single, cfg.model).batch
        alone.append(
            np.asarray(one(tiny.params, jax.tree.map(jax.numpy.asarray, row), cfg.model, COMPUTE)[0])[
                row.loss_weights > 0
            ]
        )
    np.testing.assert_allclose(in_rows, np.concatenate(alone), atol=1e-4)
    assert np.std(in_rows) > 0.1


def test_the_loss_over_rows_equals_the_papers_formula(rollout, tiny):
    """`grpo_loss` through the model, against NumPy on the scorer's log-probabilities; pieces of padding add nothing."""
    *_, layout, rows = rollout
    cfg = tiny.cfg
    g = replace(cfg.grpo, prompts=8, update_prompts=4, kl_coefficient=0.3, clip_low=0.05, clip_high=0.1)
    score = make_scorer(cfg.model, COMPUTE, 1.0, layout.pieces)
    new = np.asarray(score(tiny.params, jax.tree.map(jax.numpy.asarray, rows.batch)), np.float64)
    rng = np.random.default_rng(3)
    w = rows.batch.loss_weights
    batch = replace(
        rows,
        old_logprobs=((new + rng.normal(0, 0.3, new.shape)) * w).astype(np.float32),
        reference_logprobs=((new + rng.normal(0, 0.3, new.shape)) * w).astype(np.float32),
    )
    loss_fn = jax.jit(grpo_loss(cfg.model, COMPUTE, g))
    loss, aux = loss_fn(tiny.params, jax.tree.map(jax.numpy.asarray, batch))
    ratio, a = np.exp(new - batch.old_logprobs), rows.advantages
    pg = np.maximum(-a * ratio, -a * np.clip(ratio, 0.95, 1.1))
    pg = np.where(a < 0, np.minimum(pg, -3.0 * a), pg)
    x = batch.reference_logprobs - new
    kl = np.exp(x) - x - 1
    terms = w * (pg + 0.3 * kl)  # of both signs: the sum's rounding is relative to their sizes
    rounding = 1e-6 * np.abs(terms).sum()
    np.testing.assert_allclose(loss, terms.sum(), rtol=0, atol=rounding)
    np.testing.assert_allclose(aux["kl"], (w * kl).sum(), rtol=1e-3)
    np.testing.assert_allclose(aux["ratio"], (w * ratio).sum(), rtol=1e-4)
    assert float(aux["weight"]) == w.sum() and 0 < float(aux["clip_fraction"]) < w.sum()
    pieces = [
        loss_fn(tiny.params, jax.tree.map(lambda v, j=j: jax.numpy.asarray(v[j :: layout.pieces]), batch))
        for j in range(layout.pieces)
    ]
    np.testing.assert_allclose(sum(p[0] for p in pieces), loss, rtol=0, atol=rounding)
    assert float(pieces[-1][0]) == 0 and float(pieces[-1][1]["weight"]) == 0  # a piece of padding
    assert float(pieces[-1][1]["ratio"]) == 0


def test_groups_that_teach_nothing_count_but_are_not_computed_without_a_reference(rollout, tiny):
    *_, rows = rollout
    quiet = jax.tree.map(jax.numpy.asarray, replace(rows, advantages=np.zeros_like(rows.advantages)))
    tokens = rows.batch.loss_weights.sum()
    for coefficient, computed in ((0.0, 0), (0.1, tokens)):
        g = replace(tiny.cfg.grpo, kl_coefficient=coefficient)
        loss, aux = jax.jit(grpo_loss(tiny.cfg.model, COMPUTE, g))(tiny.params, quiet)
        assert float(aux["weight"]) == tokens and float(aux["computed"]) == computed
        assert (float(loss) == 0) == (coefficient == 0)


def test_on_policy_ignores_what_the_sampler_said_but_reports_the_gap(rollout, tiny):
    *_, rows = rollout
    g = replace(tiny.cfg.grpo, kl_coefficient=0.0)
    grad = jax.jit(jax.value_and_grad(grpo_loss(tiny.cfg.model, COMPUTE, g), has_aux=True))

    def run(batch: GrpoBatch):
        (_, aux), grads = grad(tiny.params, jax.tree.map(jax.numpy.asarray, batch))
        return aux, grads

    aux, grads = run(rows)
    other_aux, other = run(replace(rows, old_logprobs=rows.old_logprobs - 1.0))
    assert float(aux["ratio"]) == float(aux["computed"]) == float(aux["weight"]) and "kl" not in aux
    jax.tree.map(np.testing.assert_array_equal, grads, other)
    assert float(other_aux["logprob_gap"]) != float(aux["logprob_gap"]) > 0
    assert max(float(abs(x).max()) for x in jax.tree.leaves(grads)) > 0


def test_logprobs_at_another_temperature_are_of_the_scaled_logits(rollout, tiny):
    *_, rows = rollout
    batch = jax.tree.map(lambda x: jax.numpy.asarray(x[:2]), rows.batch)
    model = tiny.cfg.model

    @jax.jit
    def both(params, batch):
        hidden = forward.hidden_states(params, batch, model, COMPUTE)
        scaled = forward.logits(params, hidden, model, COMPUTE) / 2.0
        return completion_logprobs(params, batch, model, COMPUTE, 2.0), jax.nn.log_softmax(scaled)

    (logprobs, entropy), expected = both(tiny.params, batch)
    chosen = np.take_along_axis(np.asarray(expected)[:, :-1], np.asarray(batch.tokens)[:, 1:, None], axis=2)[..., 0]
    weighted = np.asarray(batch.loss_weights)[:, :-1] > 0
    np.testing.assert_allclose(np.asarray(logprobs)[:, :-1][weighted], chosen[weighted], atol=1e-4)
    surprise = -(np.exp(expected) * expected).sum(-1)
    np.testing.assert_allclose(np.asarray(entropy)[:, :-1][weighted], surprise[:, :-1][weighted], atol=1e-4)
