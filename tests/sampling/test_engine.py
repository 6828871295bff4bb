"""The engine against the training graph, token by token, and its promises on batching, groups, bans and ends."""

from collections import defaultdict
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from infimed_jax.config import Sampling
from infimed_jax.data.batch import Segment
from infimed_jax.errors import UserError
from infimed_jax.sampling import decode
from infimed_jax.sampling import engine as engine_module
from infimed_jax.sampling.engine import Engine, complete
from infimed_jax.sampling.sampler import penalizes
from infimed_jax.sampling.weights import Decoder, sampler_weights
from tests.models import reference

IMAGE_TOKEN = 3
STOPS = (33, 45)
GREEDY = Sampling(max_tokens=12, slots=4, burst=5)
DRAWN = replace(GREEDY, temperature=1.0)


def _engine(tiny, sampling=GREEDY, *, stops=STOPS, banned=(IMAGE_TOKEN,), seed=0, weights=None, longest=32):
    decoder = Decoder(weights or tiny.weights, tiny.model, tiny.compute)
    key, penalties = jax.random.key(seed), penalizes(sampling)
    return Engine(decoder, sampling, stops=stops, banned=banned, key=key, longest=longest, penalties=penalties)


def _run(tiny, prompts, sampling=GREEDY, numbers=None, on_progress=None, on_delta=None, **options):
    return complete(_engine(tiny, sampling, **options), prompts, sampling, numbers, on_progress, on_delta)


def _mixed_prompts(tiny):
    """Nine prompts of 0 to 3 images and 2 to 32 tokens, more than the four slots."""
    images = [tiny.image(seed) for seed in range(3)]
    shapes = [(9, 0), (4, 1), (5, 0), (7, 3), (12, 1), (2, 0), (20, 3), (11, 0), (9, 1)]
    return [tiny.prompt(seed, length, tuple(images[:n])) for seed, (length, n) in enumerate(shapes)]


def _assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.tokens.tolist(), a.finish) == (b.tokens.tolist(), b.finish)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_decoding_equals_the_full_forward(tiny, images):
    pixels = tuple(tiny.image(seed) for seed in range(images))
    prompts = [tiny.prompt(seed, 9 + seed, pixels) for seed in range(3)]
    for prompt, reply in zip(prompts, _run(tiny, prompts, stops=()), strict=True):
        assert len(reply.tokens) == 12
        logits = tiny.full_logits(prompt, reply.tokens)
        expected = jax.nn.log_softmax(logits)[np.arange(12), reply.tokens]
        # float32 on both sides, in different orders of summation
        np.testing.assert_allclose(reply.logprobs, expected, atol=2e-5)
        logits[:, IMAGE_TOKEN] = -np.inf
        assert reply.tokens.tolist() == logits.argmax(-1).tolist()
        assert len(set(reply.tokens.tolist())) > 2


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_hugging_face(tiny, penalty):
    text = reference.TEXT
    module = reference.torch_qwen3(text)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, text.vocab_size, length).astype(np.int32) for length in (3, 17, 9, 5, 12)]
    stop = 11
    expected = [
        module.generate(
            torch.from_numpy(prompt)[None].long(),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
            repetition_penalty=penalty,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    params = tiny.params | {"text": reference.qwen3_params(module, text)}
    model = replace(tiny.model, text=text)
    replies = _run(
        replace(tiny, model=model, weights=sampler_weights(params, model, "float32")),
        [Segment(p, np.zeros(len(p), np.float32), np.zeros(len(p), bool)) for p in prompts],
        Sampling(max_tokens=20, slots=2, burst=3, repetition_penalty=penalty),
        stops=(stop,),
        banned=(),
    )
    assert [reply.tokens.tolist() for reply in replies] == expected
    assert len({token for reply in expected for token in reply}) > 8


def test_alone_equals_in_a_batch_with_refills(tiny):
    prompts = _mixed_prompts(tiny)
    for sampling in (GREEDY, DRAWN):
        together = _run(tiny, prompts, sampling)
        assert {reply.finish for reply in together} == {"stop", "length"}
        for number in range(len(prompts)):
            # The request's number is part of its randomness: stand-ins take the places before it.
            stand_ins = [tiny.prompt(99, 3)] * number if sampling.temperature else []
            alone = _run(tiny, [*stand_ins, prompts[number]], sampling)[-1:]
            _assert_equal(alone, together[number : number + 1])


@pytest.mark.parametrize("changes", [{"slots": 1, "burst": 2}, {"slots": 7}])
def test_slots_and_bursts_change_nothing(tiny, changes):
    prompts = _mixed_prompts(tiny)
    changed = _run(tiny, prompts, replace(DRAWN, **changes))
    _assert_equal(changed, _run(tiny, prompts, DRAWN))


def test_group_is_prefilled_once_and_equals_separate_prompts(tiny, monkeypatch):
    image = tiny.image(0)
    group = tiny.prompt(1, 8, (image,))
    other = tiny.prompt(2, 8, (image,))
    copies = [replace(group, tokens=group.tokens.copy(), pixels=(image.copy(),)) for _ in range(3)]
    rows, encoded = [], []
    prefill, encode = decode.prefill, decode.encode

    def count_rows(decoder, slots, batch, *rest):
        rows.append(int(batch.segment_ids.any(1).sum()))
        return prefill(decoder, slots, batch, *rest)

    def count_images(decoder, table, pixels, first):
        encoded.append(int(pixels.any((1, 2, 3)).sum()))
        return encode(decoder, table, pixels, first)

    monkeypatch.setattr(decode, "prefill", count_rows)
    monkeypatch.setattr(decode, "encode", count_images)
    shared = _run(tiny, [group, other, group, group], DRAWN)
    assert (rows, encoded) == ([2], [1])
    separate = _run(tiny, [copies[0], other, copies[1], copies[2]], DRAWN)
    assert (rows[1:], encoded[1:]) == ([4], [4])
    _assert_equal(shared, separate)
    assert len({tuple(reply.tokens) for reply in (shared[0], shared[2], shared[3])}) > 1


def _questions_on_images(tiny, images=3, questions=5):
    """Prompts that begin alike up to the end of an image: one or two images each, some with nothing shared."""
    pixels = [tiny.image(seed) for seed in range(images)]
    rng = np.random.default_rng(0)

    def prompt(start, shown, length):
        pieces = [np.array(start)] + [np.full(4, IMAGE_TOKEN), rng.integers(8, 61, 1)] * (len(shown) - 1)
        pieces += [np.full(4, IMAGE_TOKEN), rng.integers(8, 61, length)] if shown else [rng.integers(8, 61, length)]
        tokens = np.concatenate(pieces).astype(np.int32)
        return Segment(tokens, np.zeros(len(tokens), np.float32), tokens == IMAGE_TOKEN, tuple(shown))

    asked = [prompt([9, 10], [pixels[n % images]], 1 + n % questions) for n in range(images * questions)]
    first = prompt([9, 10], pixels[:2], 3)  # a second image; the first one's end is shared with the above
    again = replace(first, tokens=first.tokens.copy())
    return [*asked, first, again, prompt([9, 10], [], 6), prompt([11], [pixels[0]], 4), asked[1], asked[1]]


def _watch_prefills(monkeypatch):
    """Tokens of each prefill that are no padding, and whether it had prefixes."""
    seen, prefill = [], decode.prefill

    def watch(decoder, slots, batch, *rest):
        seen.append((int((batch.segment_ids > 0).sum()), batch.prefix_ids is not None))
        return prefill(decoder, slots, batch, *rest)

    monkeypatch.setattr(decode, "prefill", watch)
    return seen


@pytest.mark.parametrize("slots", [4, 21])
def test_prompts_that_begin_alike_share_their_image_and_answer_as_without(tiny, monkeypatch, slots):
    seen = _watch_prefills(monkeypatch)
    prompts = _questions_on_images(tiny)
    for sampling in (replace(GREEDY, slots=slots), replace(DRAWN, slots=slots)):
        shared = _run(tiny, prompts, sampling)
        tokens = sum(count for count, _ in seen)
        assert any(prefixes for _, prefixes in seen)
        seen.clear()
        _assert_equal(shared, _run(tiny, prompts, replace(sampling, share_images=False)))
        assert not any(prefixes for _, prefixes in seen)
        assert tokens < sum(count for count, _ in seen)
        seen.clear()


def test_a_trunk_is_computed_once_and_each_branch_once(tiny, monkeypatch):
    """All of an image's questions in one row: its 2 + 4 tokens, and what follows but for the last token."""
    seen = _watch_prefills(monkeypatch)
    image = tiny.image(0)
    base = [9, 10] + [IMAGE_TOKEN] * 4
    asked = [np.array(base + list(range(20, 20 + n)), np.int32) for n in (1, 3, 3, 6)]
    prompts = [Segment(t, np.zeros(len(t), np.float32), t == IMAGE_TOKEN, (image,)) for t in asked]
    _run(tiny, prompts, replace(GREEDY, slots=8))
    assert seen == [(6 + 0 + 2 + 2 + 5, True)]


def test_equal_tokens_before_other_pixels_are_not_shared(tiny, monkeypatch):
    seen = _watch_prefills(monkeypatch)
    prompts = _questions_on_images(tiny, images=1, questions=2)[:2]
    other = [replace(prompt, pixels=(tiny.image(50 + n),)) for n, prompt in enumerate(prompts)]
    replies = _run(tiny, [*prompts[:1], *other])
    assert not any(prefixes for _, prefixes in seen)
    _assert_equal(replies[:1], _run(tiny, prompts[:1]))


def test_a_kernel_without_prefixes_computes_every_prompt_and_says_so_once(tiny, monkeypatch, caplog):
    seen = _watch_prefills(monkeypatch)
    monkeypatch.setattr(engine_module, "shares_prefixes", lambda _: False)
    engine_module._shares_prefixes.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            _run(tiny, _questions_on_images(tiny)[:4])
    engine_module._shares_prefixes.cache_clear()
    assert not any(prefixes for _, prefixes in seen)
    assert caplog.text.count("knows no prefixes") == 1


def test_group_larger_than_the_slots(tiny):
    prompt = tiny.prompt(1, 8)
    assert len(_run(tiny, [prompt] * 11, DRAWN)) == 11


def test_banned_tokens_are_never_sampled_even_when_likeliest(tiny):
    prompts = [tiny.prompt(seed) for seed in range(4)]
    free = _run(tiny, prompts, banned=(), stops=())
    # The image token wins wherever this model's favourite did, and by far.
    favourite = np.bincount(np.concatenate([reply.tokens for reply in free])).argmax()
    head = np.array(tiny.weights["text"]["lm_head"])
    head[:, IMAGE_TOKEN] = head[:, favourite] * 9
    head = jax.device_put(head, tiny.weights["text"]["lm_head"].sharding)
    weights = tiny.weights | {"text": tiny.weights["text"] | {"lm_head": head}}
    eager = _run(tiny, prompts, banned=(), stops=(), weights=weights)
    assert any(IMAGE_TOKEN in reply.tokens for reply in eager)
    for sampling in (GREEDY, DRAWN):
        for reply in _run(tiny, prompts, sampling, stops=(), weights=weights):
            assert IMAGE_TOKEN not in reply.tokens


def test_stop_token_ends_and_is_kept(tiny):
    prompt = tiny.prompt(0)
    free = _run(tiny, [prompt], stops=())[0]
    assert free.finish == "length"
    assert free.text_tokens.tolist() == free.tokens.tolist()
    stop = int(free.tokens[6])
    first = free.tokens.tolist().index(stop)
    ended = _run(tiny, [prompt], stops=(stop, 60))[0]
    assert ended.finish == "stop"
    assert ended.tokens.tolist() == free.tokens[: first + 1].tolist()
    assert ended.text_tokens.tolist() == free.tokens[:first].tolist()
    assert len(ended.logprobs) == first + 1


def test_a_stop_as_the_last_allowed_token_is_a_stop(tiny):
    prompt = tiny.prompt(0)
    free = _run(tiny, [prompt], stops=())[0].tokens.tolist()
    last = next(n for n, token in enumerate(free) if n >= 2 and token not in free[:n])
    ended = _run(tiny, [prompt], replace(GREEDY, max_tokens=last + 1), stops=(free[last],))[0]
    assert (len(ended.tokens), ended.finish) == (last + 1, "stop")
    cut = _run(tiny, [prompt], replace(GREEDY, max_tokens=last), stops=(free[last],))[0]
    assert (len(cut.tokens), cut.finish) == (last, "length")


def test_key_decides_the_draws(tiny):
    prompts = [tiny.prompt(1, 8)] * 4
    once, again, other = (_run(tiny, prompts, DRAWN, seed=seed) for seed in (1, 1, 2))
    _assert_equal(once, again)
    assert [reply.tokens.tolist() for reply in once] != [reply.tokens.tolist() for reply in other]


def test_first_tokens_follow_the_softmax(tiny):
    prompt, draws = tiny.prompt(4, 8), 3000
    sampling = Sampling(temperature=1.0, max_tokens=1, slots=500)
    tokens = np.concatenate([reply.tokens for reply in _run(tiny, [prompt] * draws, sampling)])
    logits = tiny.full_logits(prompt, np.zeros(1, np.int32))[0].astype(np.float64)
    logits[IMAGE_TOKEN] = -np.inf
    wanted = np.exp(logits - logits.max())
    wanted *= draws / wanted.sum()
    counts = np.bincount(tokens, minlength=len(wanted))
    rare = wanted < 5  # the chi-square approximation wants five expected draws a cell
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, wanted))
    assert counts[IMAGE_TOKEN] == 0
    assert len(expected) > 5
    assert chisquare(observed, expected).pvalue > 1e-3


def test_new_weights_keys_and_prompts_compile_nothing(tiny):
    prompts = [tiny.prompt(seed, 8, (tiny.image(seed),)) for seed in range(3)]
    _run(tiny, prompts, DRAWN)
    programs = (decode.encode, decode.prefill, decode.burst, decode.empty_slots)
    before = [program._cache_size() for program in programs]
    changed = jax.tree.map(lambda x: x * 1.01, tiny.weights)
    other = [tiny.prompt(seed, 5 + seed % 5, (tiny.image(seed),)) for seed in range(9)]
    _run(tiny, other, DRAWN, weights=changed, seed=5)
    assert [program._cache_size() for program in programs] == before


VALUES = [
    {"temperature": 0.4},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 5},
    {"repetition_penalty": 1.1, "presence_penalty": 2.0},
    {"frequency_penalty": 0.5, "max_tokens": 7},
]


def test_no_value_of_a_setting_compiles_anything(tiny, monkeypatch):
    """In one engine, one trace serves every mixture of settings; prefill has one a height."""
    for name, traces, static in (("prefill", 2, ()), ("burst", 1, "tokens")):
        counted = chex.assert_max_traces(getattr(decode, name).__wrapped__, n=traces)
        monkeypatch.setattr(decode, name, jax.jit(counted, donate_argnames="slots", static_argnames=static))
    chex.clear_trace_counter()
    engine = _engine(tiny, replace(GREEDY, presence_penalty=1.0))
    prompts = [tiny.prompt(seed, 8) for seed in range(9)]
    plain = [reply.tokens.tolist() for reply in complete(engine, prompts, GREEDY)]
    answered = set()
    for number, prompt in enumerate(prompts):
        engine.submit(prompt, replace(GREEDY, **VALUES[number % 5]) if number % 2 else GREEDY)
    got = defaultdict(list)
    while engine.busy:
        for delta in engine.step():
            got[delta.request - 9].extend(delta.tokens.tolist())
            answered |= {delta.request} if delta.finish else set()
    assert answered == set(range(9, 18))
    assert [got[number] for number in range(0, 9, 2)] == plain[::2]  # neighbours change nothing


def test_penalties_count_the_reply_as_the_reference_does(tiny):
    """Greedy decoding under the published penalties, token by token, against NumPy on the training graph's logits."""
    published = replace(GREEDY, repetition_penalty=1.1, presence_penalty=2.0, frequency_penalty=0.3, max_tokens=20)
    prompts = [tiny.prompt(seed, 9) for seed in range(3)]
    replies = _run(tiny, prompts, published, stops=())
    for prompt, reply in zip(prompts, replies, strict=True):
        logits = tiny.full_logits(prompt, reply.tokens).astype(np.float64)
        for place, token in enumerate(reply.tokens):
            said = reply.tokens[:place].tolist()
            scores = logits[place]
            for seen in {*prompt.tokens.tolist(), *said}:
                scores[seen] *= 1.1 if scores[seen] < 0 else 1 / 1.1
            for seen in set(said):
                scores[seen] -= 2.0 + 0.3 * said.count(seen)
            scores[IMAGE_TOKEN] = -np.inf
            assert scores.argmax() == token
    assert [r.tokens.tolist() for r in replies] != [r.tokens.tolist() for r in _run(tiny, prompts, stops=())]


def test_requests_join_a_running_engine(tiny):
    """A late request gets what it gets from the start, and a slot's new request forgets the old one's reply."""
    sampling = replace(DRAWN, presence_penalty=1.5, slots=2)
    prompts = [tiny.prompt(seed, 5 + seed) for seed in range(6)]
    whole = _run(tiny, prompts, sampling)
    engine = _engine(tiny, sampling)
    got, waiting = defaultdict(list), list(prompts)
    assert engine.step() == []
    while waiting or engine.busy:
        if waiting:
            engine.submit(waiting.pop(0), sampling)
        for delta in engine.step():
            got[delta.request] += delta.tokens.tolist()
    assert [got[number] for number in range(6)] == [reply.tokens.tolist() for reply in whole]


def test_requests_that_do_not_fit_the_engine_are_named(tiny):
    engine = _engine(tiny)
    with pytest.raises(UserError, match="prompt 0 asks for a penalty"):
        engine.submit(tiny.prompt(0), replace(GREEDY, frequency_penalty=0.1))
    with pytest.raises(UserError, match=r"with sampling\.max_tokens=99 it exceeds 44"):
        engine.submit(tiny.prompt(0), replace(GREEDY, max_tokens=99))
    assert not engine.busy


def test_callbacks_report_every_token_once(tiny):
    prompts = _mixed_prompts(tiny)
    pieces, progress = defaultdict(list), []
    replies = _run(
        tiny,
        prompts,
        DRAWN,
        on_delta=lambda delta: pieces[delta.request].extend(delta.tokens),
        on_progress=lambda *state: progress.append(state),
    )
    assert [pieces[number] for number in range(len(prompts))] == [reply.tokens.tolist() for reply in replies]
    tokens = sum(len(reply.tokens) for reply in replies)
    assert progress[-1] == (len(prompts), len(prompts), f"{tokens:,} tokens")
    assert _run(tiny, []) == []


def test_a_reply_depends_on_its_number_and_not_on_which_others_are_asked(tiny):
    prompts = _mixed_prompts(tiny)
    whole = [reply.tokens.tolist() for reply in _run(tiny, prompts, DRAWN)]
    some = (7, 2, 3)
    again = _run(tiny, [prompts[number] for number in some], DRAWN, some)
    assert [reply.tokens.tolist() for reply in again] == [whole[number] for number in some]
    other = _run(tiny, [prompts[number] for number in some], DRAWN)
    assert [reply.tokens.tolist() for reply in other] != [whole[number] for number in some]


def _broken(tiny, problem):
    prompt = tiny.prompt(0, 6, (tiny.image(0),))
    return {
        "is empty": replace(prompt, tokens=prompt.tokens[:0], visual=prompt.visual[:0], pixels=()),
        "ends in an image": replace(prompt, tokens=prompt.tokens[::-1], visual=np.arange(10) > 5),
        "outside the model's vocabulary": replace(prompt, tokens=prompt.tokens + 60),
        "image places for 0 images": replace(prompt, pixels=()),
        "has an image of shape": replace(prompt, pixels=(np.zeros((2, 2, 3), np.uint8),)),
        "more than the 32 allowed": tiny.prompt(0, 33),
    }[problem]


@pytest.mark.parametrize(
    "problem",
    [
        "is empty",
        "ends in an image",
        "outside the model's vocabulary",
        "image places for 0 images",
        "has an image of shape",
        "more than the 32 allowed",
    ],
)
def test_impossible_prompts_are_named(tiny, problem):
    with pytest.raises(UserError, match=f"prompt 1 .*{problem}"):
        _run(tiny, [tiny.prompt(0), _broken(tiny, problem)])


def test_impossible_tokens_and_broken_weights_are_named(tiny):
    prompts = [tiny.prompt(0)]
    with pytest.raises(UserError, match="token 61 is outside"):
        _run(tiny, prompts, stops=(61,))
    with pytest.raises(UserError, match="both banned and a stop"):
        _run(tiny, prompts, banned=(33,))
    with pytest.raises(UserError, match="every token"):
        _run(tiny, prompts, stops=(), banned=range(61))
    broken = jax.tree.map(lambda x: x * np.nan, tiny.weights)
    with pytest.raises(UserError, match="not finite"):
        _run(tiny, prompts, weights=broken)
