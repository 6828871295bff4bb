"""The stream of batches: nothing lost, nothing twice, the same from any step, and damage that stays in its place."""

import dataclasses
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infimed_jax.config import Config, Data, Mesh, Train
from infimed_jax.data import loader
from infimed_jax.data.chat import load_tokenizer
from infimed_jax.data.images import ImageCache, decode_image
from infimed_jax.data.loader import EMPTY, make_loader, plan_epoch
from infimed_jax.data.sample import Chat, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from infimed_jax.models.infimed.config import Model, Projector, Text, Vision
from infimed_jax.sharding import make_mesh

MODEL = Model(
    vision=Vision(image_size=16, patch_size=4, hidden_size=8, num_heads=2),
    projector=Projector(visual_tokens=4),
    text=Text(vocab_size=400),
)
VQA_RAD = Path(__file__).resolve().parents[2].parent / "shared/data/vqa_rad"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (level, 255 - level, level // 2)).save(buffer, "PNG")
    return buffer.getvalue()


def question(number: int, words: int, images: tuple[bytes, ...]) -> Chat:
    pieces = (*range(len(images)), "\nis there " + "the " * words)
    turns = (Turn("user", pieces), Turn("assistant", ("yes",)))
    return Chat(f"q/train/{number}", "q", "train", images, turns)


def toy_samples(count: int = 23) -> list[Chat]:
    rng = np.random.default_rng(3)
    return [
        question(i, int(rng.integers(0, 14)), tuple(png(int(k)) for k in rng.integers(0, 9, rng.integers(0, 3))))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from data_prep.tokenizer import make_tokenizer

    words = ["is there a fracture in the left lung", "yes no the heart is large"] * 3
    return make_tokenizer(words, tmp_path_factory.mktemp("tok"), vocab_size=330)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    write_samples(folder, toy_samples(), name="toy")
    return folder


def make_config(dataset, tokenizer_folder, *, batch=4, seed=0, epochs=1, **data) -> Config:
    options = {"context": 64, "images_per_row": 3, "max_bad_records": 0.5} | data
    return Config(
        model=MODEL,
        data=Data(dataset=str(dataset), tokenizer=str(tokenizer_folder), **options),
        train=Train(global_batch=batch, seed=seed, epochs=epochs),
    )


def open_loader(config, **options):
    samples, tokenizer = open_samples(config.data.dataset), load_tokenizer(config.data.tokenizer)
    return make_loader(config, samples=samples, tokenizer=tokenizer, **options)


def stream(config, start=0, steps=None):
    """[(fields as NumPy, ids)]"""
    mesh = make_mesh(Mesh())
    loader = open_loader(config, mesh=mesh, start_step=start, steps=steps)
    found = []
    for batch, _, ids in loader:
        assert batch.prefix_ids is None  # no sample continues another
        names = [f.name for f in dataclasses.fields(batch) if f.name != "prefix_ids"]
        found.append(({name: np.asarray(getattr(batch, name)) for name in names}, ids))
    return found


def assert_same(a, b):
    assert len(a) == len(b)
    for (x, ids_x), (y, ids_y) in zip(a, b, strict=True):
        assert ids_x == ids_y
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


def test_samples_of_a_row_share_the_slot_of_their_image(tokenizer_folder, tmp_path, monkeypatch):
    """Also where nothing decoded is kept from row to row, so that a stream does not depend on the cache."""
    monkeypatch.setattr(loader, "ImageCache", lambda: ImageCache(limit=0))
    samples = [question(0, 1, (png(1),)), question(1, 2, (png(2),)), question(2, 3, (png(1),))]
    write_samples(tmp_path / "set", samples, name="same")
    ((batch, ids),) = stream(make_config(tmp_path / "set", tokenizer_folder, batch=1, context=128))
    assert len(ids) == 3 and batch["pixels"].shape[1] == 3
    assert batch["pixels"][0].any((1, 2, 3)).sum() == 2
    assert set(batch["visual_index"][0]) == {-1, *range(2 * 4)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
def test_a_plan_has_every_row_once_in_batches_of_one_shape(buckets, batch, seed, epoch):
    row_bucket = np.array(buckets, np.int8)
    plan = plan_epoch(row_bucket, batch, seed, epoch)
    real = plan.rows[plan.rows != EMPTY]
    assert sorted(real.tolist()) == list(range(len(buckets)))
    for rows, bucket in zip(plan.rows, plan.buckets, strict=True):
        assert {buckets[r] for r in rows if r != EMPTY} == {bucket}
    assert len(plan.rows) == sum(-(-n // batch) for n in Counter(buckets).values())
    again = plan_epoch(row_bucket, batch, seed, epoch)
    np.testing.assert_array_equal(plan.rows, again.rows)


def test_plans_differ_by_seed_and_epoch_and_never_change_between_releases():
    row_bucket = np.zeros(8, np.int8)
    plans = {(s, e): plan_epoch(row_bucket, 8, s, e).rows[0].tolist() for s in range(3) for e in range(3)}
    assert len({tuple(p) for p in plans.values()}) == 9
    assert plans[0, 0] == [7, 4, 0, 6, 1, 3, 2, 5]


@pytest.mark.parametrize("how", ["first_fit_decreasing", "none"])
def test_each_sample_comes_once_an_epoch(how, dataset, tokenizer_folder):
    config = make_config(dataset, tokenizer_folder, epochs=3, packing=how)
    batches = stream(config)
    per_epoch = len(batches) // 3
    expected = sorted(s.id for s in toy_samples())
    orders = []
    for epoch in range(3):
        ids = [name for _, names in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for name in names]
        assert sorted(ids) == expected
        orders.append(tuple(ids))
    assert len(set(orders)) == 3
    segments = sum(int(row.max()) for fields, _ in batches for row in fields["segment_ids"])
    assert segments == 3 * len(expected)


def test_content_is_that_of_the_samples(dataset, tokenizer_folder):
    """Text, pixels and shapes of each row, put together anew from the samples."""
    tokenizer = load_tokenizer(tokenizer_folder)
    by_id = {s.id: s for s in toy_samples()}
    for fields, ids in stream(make_config(dataset, tokenizer_folder, packing="none", batch=5)):
        assert fields["tokens"].shape[0] == 5
        used = [r for r in range(5) if fields["segment_ids"][r].any()]
        assert len(used) == len(ids)
        for row, name in zip(used, ids, strict=True):
            sample = by_id[name]
            tokens = fields["tokens"][row][fields["segment_ids"][row] == 1]
            assert f"is there{' the' * (len(sample.turns[0].content[-1].split()) - 2)}" in tokenizer.decode(tokens)
            places = fields["visual_index"][row]
            distinct = list(dict.fromkeys(sample.images))
            expected = [distinct.index(data) * 4 + k for data in sample.images for k in range(4)]
            assert places[places >= 0].tolist() == expected
            for slot, data in enumerate(distinct):
                np.testing.assert_array_equal(fields["pixels"][row, slot], decode_image(data, 16))


@pytest.mark.parametrize("how", ["first_fit_decreasing", "none"])
def test_resuming_at_any_step_gives_the_same_stream(how, dataset, tokenizer_folder):
    config = make_config(dataset, tokenizer_folder, epochs=2, packing=how)
    whole = stream(config)
    for start in range(len(whole) + 1):
        assert_same(stream(config, start=start), whole[start:])
    assert_same(stream(config, start=1, steps=3), whole[1:3])


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (7, 2)])
def test_threads_change_nothing(threads, prefetch, dataset, tokenizer_folder):
    config = make_config(dataset, tokenizer_folder)
    changed = make_config(dataset, tokenizer_folder, threads=threads, prefetch=prefetch)
    assert_same(stream(changed), stream(config))


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2, 3]]])
def test_processes_together_load_the_global_batch(shares, dataset, tokenizer_folder, monkeypatch):
    """Each process reads its own rows of the same plan; the sharding says which, here it is told."""
    config = make_config(dataset, tokenizer_folder, packing="none")
    whole = stream(config)
    monkeypatch.setattr(loader, "place_batch", lambda batch, _mesh: batch)
    for share in shares:
        monkeypatch.setattr(loader, "local_rows", lambda _rows, _mesh, share=share: np.array(share))
        for (mine, _), (everything, _) in zip(stream(config), whole, strict=True):
            for key in mine:
                np.testing.assert_array_equal(mine[key], everything[key][share])


def test_steps_and_fingerprint(dataset, tokenizer_folder):
    mesh = make_mesh(Mesh())

    def made(**changes):
        return open_loader(make_config(dataset, tokenizer_folder, **changes), mesh=mesh)

    base = made(epochs=3)
    assert base.steps == 3 * base.steps_per_epoch
    fixed = make_config(dataset, tokenizer_folder)
    fixed = dataclasses.replace(fixed, train=dataclasses.replace(fixed.train, steps=77))
    assert open_loader(fixed, mesh=mesh).steps == 77
    prints = {made(**c).fingerprint for c in ({}, {"seed": 1}, {"batch": 2}, {"context": 72}, {"packing": "none"})}
    assert len(prints) == 5
    assert made(threads=1, epochs=5).fingerprint in prints


def test_unmasked_packing_is_one_running_sequence(dataset, tokenizer_folder):
    masked = stream(make_config(dataset, tokenizer_folder))
    unmasked = stream(make_config(dataset, tokenizer_folder, mask_segments=False))
    for (a, _), (b, _) in zip(masked, unmasked, strict=True):
        used = a["segment_ids"] > 0
        np.testing.assert_array_equal(b["segment_ids"], used)
        for row, mine in zip(used, b["positions"], strict=True):
            assert mine[0].tolist() == list(range(row.sum())) + [0] * (~row).sum()
        for key in ("tokens", "loss_weights", "visual_index", "pixels"):
            np.testing.assert_array_equal(a[key], b[key])
        assert b["segment_ids"].dtype == b["positions"].dtype == np.int32


def damage_records(folder):
    """Flip a bit of the first record of the only shard, behind the index's back."""
    file = next(folder.glob("*.array_record*"))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(raw)


def test_damage_stays_in_its_place(tmp_path, tokenizer_folder):
    rows = toy_samples()
    good, broken = tmp_path / "good", tmp_path / "broken"
    write_samples(good, rows, name="toy")
    cut, empty = [number for number, sample in enumerate(rows) if number and sample.images][:2]
    rows[cut] = dataclasses.replace(rows[cut], images=(png(1)[:-30],) * len(rows[cut].images))
    rows[empty] = dataclasses.replace(rows[empty], images=(b"",) * len(rows[empty].images))
    write_samples(broken, rows, name="toy")
    mesh = make_mesh(Mesh())
    open_loader(make_config(broken, tokenizer_folder), mesh=mesh)  # builds the index while all is readable
    damage_records(broken)
    damaged = open_loader(make_config(broken, tokenizer_folder), mesh=mesh)
    seen = [(np.asarray(batch.tokens).shape, ids, int(np.sum(bad))) for batch, bad, ids in damaged]
    bad = {f"q/train/{cut}", f"q/train/{empty}", "q/train/0"}
    expected = stream(make_config(good, tokenizer_folder))
    assert [ids for _, ids, _ in seen] == [[i for i in ids if i not in bad] for _, ids in expected]
    assert [shape for shape, *_ in seen] == [fields["tokens"].shape for fields, _ in expected]
    assert [count for *_, count in seen] == [len(bad.intersection(ids)) for _, ids in expected]
    report = damaged.report()
    assert report["bad_record_ids"] == {
        f"q/train/{cut}": "truncated or corrupt",
        f"q/train/{empty}": "empty file",
        "toy record 0": "unreadable record",
    }
    assert report["records_read"] == len(rows) == report["samples"]


def test_the_limit_of_bad_records_is_a_share_of_what_was_read_and_at_first_of_the_data(dataset, tokenizer_folder):
    made = open_loader(make_config(dataset, tokenizer_folder, max_bad_records=0.1), mesh=make_mesh(Mesh()))
    made.check_bad_records(2, 3)  # 23 samples
    with pytest.raises(UserError, match=r"3 of 3 records .* more than data\.max_bad_records=0\.1 allows: repair"):
        made.check_bad_records(3, 3)
    made.check_bad_records(100, 1000)
    with pytest.raises(UserError, match="101 of 1000 records"):
        made.check_bad_records(101, 1000)


def test_a_stale_index_is_an_error(tmp_path, tokenizer_folder):
    write_samples(tmp_path / "d", toy_samples(), name="toy")
    config = make_config(tmp_path / "d", tokenizer_folder)
    stale = open_loader(config, mesh=make_mesh(Mesh()))
    stale._reader.index = dataclasses.replace(stale._reader.index, lengths=stale._reader.index.lengths + 1)
    with pytest.raises(UserError, match="its packing index says"):
        list(stale)


def test_settings_that_cannot_be_are_refused(dataset, tokenizer_folder):
    mesh = make_mesh(Mesh())
    config = make_config(dataset, tokenizer_folder)
    small = dataclasses.replace(config, model=dataclasses.replace(MODEL, text=Text(vocab_size=100)))
    with pytest.raises(UserError, match="vocab_size=100 has no room"):
        open_loader(small, mesh=mesh)
    with pytest.raises(UserError, match="no prepared dataset"):
        open_loader(make_config(tokenizer_folder, tokenizer_folder), mesh=mesh)
    with pytest.raises(UserError, match="cannot read"):
        open_loader(make_config(dataset, dataset), mesh=mesh)


def test_a_plain_script_needs_no_flags_tensorflow_or_torch(dataset, tokenizer_folder):
    program = (
        "import sys; from infimed_jax.config import *; from infimed_jax.data.loader import make_loader\n"
        "from infimed_jax.data.chat import load_tokenizer\n"
        "from infimed_jax.data.storage import open_samples\n"
        "from infimed_jax.sharding import make_mesh\n"
        "config = from_dict(Config, {'model': {'vision': {'image_size': 16, 'patch_size': 4}, "
        "'projector': {'visual_tokens': 4}}, 'train': {'global_batch': 4}, 'data': {"
        f"'dataset': {str(dataset)!r}, 'tokenizer': {str(tokenizer_folder)!r}, 'context': 64, "
        "'images_per_row': 3}})\n"
        "samples, tokenizer = open_samples(config.data.dataset), load_tokenizer(config.data.tokenizer)\n"
        "assert len(list(make_loader(config, samples=samples, tokenizer=tokenizer, mesh=make_mesh(config.mesh)))) > 0\n"
        "sys.exit(sum(m in sys.modules for m in ('tensorflow', 'torch')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program, "--foreign"], cwd=root, check=False).returncode == 0


def test_eight_devices_split_the_rows(dataset, tokenizer_folder):
    program = (
        "import jax, numpy as np; from infimed_jax.config import *; from infimed_jax.data.loader import make_loader\n"
        "from infimed_jax.data.chat import load_tokenizer\n"
        "from infimed_jax.data.storage import open_samples\n"
        "from infimed_jax.sharding import make_mesh\n"
        "config = from_dict(Config, {'model': {'vision': {'image_size': 16, 'patch_size': 4}, "
        "'projector': {'visual_tokens': 4}}, 'mesh': {'data': 2, 'fsdp': 2, 'tensor': 2}, 'train': {'global_batch': 4},"
        f"'data': {{'dataset': {str(dataset)!r}, 'tokenizer': {str(tokenizer_folder)!r}, 'context': 64, "
        "'images_per_row': 3}})\n"
        "samples, tokenizer = open_samples(config.data.dataset), load_tokenizer(config.data.tokenizer)\n"
        "loader = make_loader(config, samples=samples, tokenizer=tokenizer, mesh=make_mesh(config.mesh))\n"
        "batch, bad, ids = next(iter(loader))\n"
        "assert {s.data.shape[0] for s in batch.tokens.addressable_shards} == {1}, batch.tokens.sharding\n"
        "print(','.join(ids)); print(np.asarray(batch.tokens).tolist(), np.asarray(batch.pixels).sum())"
    )
    root = Path(__file__).resolve().parents[2]
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    fields, ids = stream(make_config(dataset, tokenizer_folder), steps=1)[0]
    contents = f"{fields['tokens'].tolist()} {fields['pixels'].sum()}"
    assert done.stdout.splitlines() == [",".join(ids), contents]


@pytest.mark.parametrize("how", ["first_fit_decreasing", "none"])
def test_the_samples_of_a_step_are_those_that_come(how, dataset, tokenizer_folder):
    config = make_config(dataset, tokenizer_folder, epochs=2, packing=how, mask_segments=False)
    made = open_loader(config, mesh=make_mesh(Mesh()))
    assert [made.samples(step) for step in range(made.steps)] == [len(ids) for *_, ids in made]


def test_real_radiographs_packed(tmp_path, tokenizer_folder):
    files = sorted(VQA_RAD.rglob("*.jpg"))[:4]
    if not files:
        pytest.skip("VQA-RAD is not at hand")
    images = [f.read_bytes() for f in files]
    write_samples(tmp_path / "d", [question(i, i, (images[i % 4],)) for i in range(12)], name="rad")
    config = make_config(tmp_path / "d", tokenizer_folder, batch=2)
    assert open_samples(tmp_path / "d")[3].images == (images[3],)
    shown = {}
    for fields, _ in stream(config):
        for row in range(2):
            for slot in set((fields["visual_index"][row][fields["visual_index"][row] >= 0] // 4).tolist()):
                shown[fields["pixels"][row, slot].tobytes()] = True
    assert set(shown) == {decode_image(data, 16).tobytes() for data in images}
