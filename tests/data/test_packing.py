"""Packing against the textbook algorithm, and the index against the samples that went in."""

import dataclasses
import errno
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax import config
from infimed_jax.data import packing
from infimed_jax.data.chat import load_tokenizer, render
from infimed_jax.data.packing import build_index, load_index, row_shapes
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.models.infimed import config as infimed


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_row_shapes_hold_everything_and_more_never_pad_more(lengths, count):
    def padded(shapes):
        return sum(min(s for s in shapes if s >= n) for n in lengths)

    shapes = row_shapes(np.array(lengths), 100, count)
    assert shapes == sorted(set(shapes))
    assert len(shapes) <= count
    assert padded(shapes) <= padded([100])
    if count > 1:
        assert padded(shapes) <= padded(row_shapes(np.array(lengths), 100, count - 1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from data_prep.tokenizer import make_tokenizer

    words = ["is there a fracture in the left lung", "yes no the heart is large"] * 3
    return load_tokenizer(make_tokenizer(words, tmp_path_factory.mktemp("tok"), vocab_size=330))


MODEL = infimed.Model(
    vision=infimed.Vision(image_size=16, patch_size=4, hidden_size=8, num_heads=2),
    projector=infimed.Projector(visual_tokens=4),
)


def question(number: int, words: int, images: int = 1) -> Chat:
    places = (*range(images), "\nis there " + "the " * words)
    return Chat(
        f"q/train/{number}",
        "q",
        "train",
        tuple(bytes([i]) for i in range(images)),
        (Turn("user", places), Turn("assistant", ("yes",))),
    )


def data(**changes) -> config.Data:
    return config.Data(**({"context": 64, "images_per_row": 3, "max_bad_records": 0.2} | changes))


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(1)
    rows = [question(i, int(rng.integers(0, 12)), int(rng.integers(0, 3))) for i in range(40)]
    rows[7] = question(7, 80)
    rows[9] = question(9, 1, images=4)
    rows[11] = Chat("q/train/11", "q", "train", (), (Turn("user", ("unanswered",)),))
    write_samples(tmp_path / "set", rows, name="toy")
    return open_samples(tmp_path / "set")


@pytest.mark.parametrize("how", ["first_fit_decreasing", "minimum_bin_slack", "none"])
def test_each_sample_is_in_one_row_or_dropped_with_its_reason(how, samples, tokenizer, tmp_path):
    index = build_index(samples, tokenizer, data(packing=how), MODEL, tmp_path / "p")
    assert dict(index.dropped) == {
        "q/train/7": "too long",
        "q/train/9": "too many images",
        "q/train/11": "nothing to learn",
    }
    assert sorted(index.samples.tolist()) == [i for i in range(40) if i not in (7, 9, 11)]
    used = 0
    for row in range(index.rows):
        numbers, lengths = index.row(row)
        tokens, images = index.buckets[index.row_bucket[row]]
        segments = [render(samples[int(n)], tokenizer, 4) for n in numbers]
        assert [len(s) for s in segments] == lengths.tolist()
        assert sum(lengths) <= tokens <= 64
        assert sum(len(samples[int(n)].images) for n in numbers) <= images <= 3
        assert how != "none" or len(numbers) == 1
        used += tokens
    assert index.fill == pytest.approx(index.lengths.sum() / used)
    assert len(index.buckets) <= (4 if how == "none" else 1)
    assert how != "none" or len(index.buckets) > 1


def test_a_sample_of_the_whole_context_is_kept_and_one_token_more_is_not(tokenizer, tmp_path):
    rows = [question(0, 30), question(1, 3)]
    write_samples(tmp_path / "set", rows, name="set")
    samples = open_samples(tmp_path / "set")
    long, short = (len(render(sample, tokenizer, 4)) for sample in rows)
    whole = build_index(samples, tokenizer, data(context=long), MODEL, tmp_path / "p")
    assert (whole.dropped, sorted(whole.lengths.tolist())) == ((), [short, long])
    less = build_index(samples, tokenizer, data(context=long - 1), MODEL, tmp_path / "p")
    assert (less.dropped, less.lengths.tolist()) == ((("q/train/0", "too long"),), [short])


def test_an_image_shown_twice_takes_its_places_twice_and_one_slot(tokenizer, tmp_path):
    sample = dataclasses.replace(question(0, 2), turns=(Turn("user", (0, "\nand ", 0)), Turn("assistant", ("yes",))))
    write_samples(tmp_path / "set", [sample], name="set")
    index = build_index(open_samples(tmp_path / "set"), tokenizer, data(images_per_row=1), MODEL, tmp_path / "p")
    assert index.lengths.tolist() == [len(render(sample, tokenizer, 4))] and index.buckets == ((64, 1),)


def test_the_bound_of_the_fill_is_that_of_the_fewest_rows(tokenizer, tmp_path):
    """Five equal samples, two of which fit a row: no packing needs fewer than three rows."""
    rows = [question(i, 4) for i in range(5)]
    write_samples(tmp_path / "set", rows, name="set")
    length = len(render(rows[0], tokenizer, 4))
    context = 2 * length + 3
    index = build_index(open_samples(tmp_path / "set"), tokenizer, data(context=context), MODEL, tmp_path / "p")
    assert index.fill == index.fill_bound == pytest.approx(5 * length / (3 * context))


def test_fewer_images_than_the_budget_make_a_smaller_row(tokenizer, tmp_path):
    write_samples(tmp_path / "a", [question(i, 20) for i in range(3)], name="a")
    index = build_index(open_samples(tmp_path / "a"), tokenizer, data(images_per_row=24), MODEL, tmp_path)
    assert index.buckets == ((64, 1),)
    write_samples(tmp_path / "b", [question(i, 0, images=0) for i in range(3)], name="b")
    index = build_index(open_samples(tmp_path / "b"), tokenizer, data(images_per_row=0), MODEL, tmp_path)
    assert index.buckets == ((64, 0),)
    write_samples(tmp_path / "c", [question(i, 0, images=5) for i in range(3)], name="c")
    for budget, expected in ((24, 8), (7, 7)):
        index = build_index(open_samples(tmp_path / "c"), tokenizer, data(images_per_row=budget), MODEL, tmp_path)
        assert index.buckets == ((64, expected),)


def assert_same(a, b):
    assert (a.buckets, a.fingerprint, a.dropped) == (b.buckets, b.fingerprint, b.dropped)
    for key in ("offsets", "samples", "lengths", "row_bucket"):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
        assert getattr(a, key).dtype == getattr(b, key).dtype


def test_a_second_call_only_loads_and_other_settings_do_not_render_again(samples, tokenizer, tmp_path, monkeypatch):
    first = build_index(samples, tokenizer, data(), MODEL, tmp_path / "p")

    def never(*_args, **_kwargs):
        raise AssertionError("rendered or packed again")

    monkeypatch.setattr(packing, "render", never)
    longer = build_index(samples, tokenizer, data(context=128), MODEL, tmp_path / "p")
    assert longer.rows < first.rows
    monkeypatch.setattr(packing, "first_fit_decreasing", never)
    assert_same(build_index(samples, tokenizer, data(), MODEL, tmp_path / "p"), first)
    assert_same(load_index(tmp_path / "p", first.fingerprint), first)


def test_the_fingerprint_binds_what_shapes_the_rows(samples, tokenizer, tmp_path):
    write_samples(tmp_path / "other", [question(0, 3)], name="toy")
    pooled = dataclasses.replace(MODEL, projector=infimed.Projector(visual_tokens=1))
    prints = [
        build_index(source, tokenizer, settings, model, tmp_path / "p").fingerprint
        for source, settings, model in [
            (samples, data(), MODEL),
            (samples, data(context=72), MODEL),
            (samples, data(images_per_row=4), MODEL),
            (samples, data(packing="none"), MODEL),
            (samples, data(packing="none", buckets=2), MODEL),
            (samples, data(), pooled),
            (open_samples(tmp_path / "other"), data(), MODEL),
            (samples, data(), dataclasses.replace(MODEL, text=infimed.Text(num_layers=1))),
            (samples, data(prefetch=1, buckets=1), MODEL),
        ]
    ]
    assert len(set(prints)) == 7
    assert prints[0] == prints[-1] == prints[-2]


def test_unreadable_records_are_dropped_up_to_the_limit(samples, tokenizer, tmp_path):
    file = samples.folder / samples.manifest["shards"][0]["file"]
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1  # inside the first record
    file.write_bytes(raw)
    damaged = open_samples(samples.folder)
    index = build_index(damaged, tokenizer, data(), MODEL, tmp_path / "p")
    assert [name for name, reason in index.dropped if reason == "unreadable record"] == ["toy record 0"]
    assert len(index.samples) + len(index.dropped) == 40
    with pytest.raises(UserError, match="1 of 40 records"):
        build_index(damaged, tokenizer, data(max_bad_records=0.01, context=72), MODEL, tmp_path / "p")


def test_nothing_to_train_on_is_an_error(samples, tokenizer, tmp_path):
    with pytest.raises(UserError, match="no sample fits a row"):
        build_index(samples, tokenizer, data(context=8), MODEL, tmp_path / "p")


def test_a_damaged_index_is_named_and_a_half_written_one_is_built_again(samples, tokenizer, tmp_path):
    first = build_index(samples, tokenizer, data(), MODEL, tmp_path)
    text = tmp_path / f"{first.fingerprint[:16]}.json"
    summary = json.loads(text.read_text())
    assert summary["samples"] == 37
    assert summary["dropped_by_reason"] == {"too long": 1, "too many images": 1, "nothing to learn": 1}
    text.with_suffix(".npz").write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged: remove it"):
        load_index(tmp_path, first.fingerprint)
    text.unlink()
    assert_same(build_index(samples, tokenizer, data(), MODEL, tmp_path), first)


def test_a_full_disk_is_one_line_and_leaves_nothing_of_the_index(samples, tokenizer, tmp_path, monkeypatch):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "index"
    monkeypatch.setattr(packing.Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write the packing index .*No space left"):
        build_index(samples, tokenizer, data(), MODEL, folder)
    assert list(folder.iterdir()) == []
