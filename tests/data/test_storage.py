"""Prepared datasets: exact round trips, TFDS as the independent reader, and damage that is seen."""

import dataclasses
import errno
import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infimed_jax.data import records, storage
from infimed_jax.data.sample import Chat, Document, Question, Turn
from infimed_jax.data.storage import CorruptRecord, open_samples, write_samples
from infimed_jax.errors import UserError


def make_sample(number: int, **changes) -> Chat:
    sample = Chat(
        id=f"toy/train/{number}",
        source="toy",
        split="train",
        images=(b"\x00first\x00\x00", bytes([number % 256]) * 7),
        turns=(Turn("user", (0, "\nwhat é <|im_end|> ", 1)), Turn("assistant", ("A",), reasoning="weil …")),
        meta={"modality": "CT", "z": "", "a": "中文"},
    )
    return dataclasses.replace(sample, **changes)


def make_question(number: int, **changes) -> Question:
    shared = {key: value for key, value in vars(make_sample(number)).items() if key != "turns"}
    facts = {"question": "what", "options": ("", "b\n"), "answer": "A", "reasoning": "weil …", "system": "sei kurz"}
    return Question(**shared | {"kind": "choice"} | facts | changes)


texts = st.text(max_size=12)
turns = st.builds(
    Turn,
    role=st.just("assistant"),
    content=st.lists(texts | st.just(0), max_size=3).map(tuple),
    reasoning=texts,
)
common = {
    "id": st.text(min_size=1, max_size=8),
    "source": texts,
    "split": texts,
    "images": st.lists(st.binary(max_size=9), min_size=1, max_size=3).map(tuple),
    "meta": st.dictionaries(texts.filter(lambda key: key != "language"), texts, max_size=3),
}
asked = common | {"question": texts.map("Q{}".format), "reasoning": texts, "system": texts}
samples = st.one_of(
    st.builds(Chat, **common, turns=st.lists(turns, min_size=1, max_size=3).map(tuple)),
    st.builds(Document, **common, chunks=st.lists(turns.map(lambda t: t.content), min_size=1, max_size=3).map(tuple)),
    st.builds(
        Question, **asked, kind=st.sampled_from(["open", "closed"]), answer=texts.map("A{}".format),
        alternatives=st.lists(texts.map("B{}".format), max_size=2).map(tuple),
    ),
    st.builds(
        Question, **asked, kind=st.just("choice"), answer=st.sampled_from("AB"),
        options=st.lists(texts, min_size=2, max_size=3).map(tuple),
    ),
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(samples, min_size=1, max_size=7, unique_by=lambda s: s.id), st.integers(1, 3))
def test_every_field_comes_back_exactly(tmp_path_factory, written, shard_size):
    folder = tmp_path_factory.mktemp("set") / "d"
    manifest = write_samples(folder, iter(written), name="toy", shard_size=shard_size)
    read = open_samples(folder)
    assert list(read) == written
    assert read[-1] == written[-1]
    assert [s["samples"] for s in manifest["shards"]] == [
        min(shard_size, len(written) - i) for i in range(0, len(written), shard_size)
    ]
    assert manifest["images"] == sum(len(s.images) for s in written)


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "7153e1c47c07f246d2ecf1af2b766b8f2b66812e1d4128ac0be004c5409260fc"),
        ({"images": (), "options": ()}, "97cae0f6f4ae507a42b279d258ef20b28974706744ddb645f04b3ef1189854b4"),
    ],
)
def test_a_samples_record_never_changes(changes, digest):
    """Fingerprints of all datasets of this format are of these bytes: another protobuf must not give others."""
    assert hashlib.sha256(records.to_record(make_question(0, **changes))).hexdigest() == digest


def test_few_of_many_images_are_in_memory(tmp_path):
    rows = (make_sample(i, images=(bytes(2**22), b"")) for i in range(20))
    tracemalloc.start()
    write_samples(tmp_path / "d", rows, name="toy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 2**22  # the first sample, two others, a record


def test_shards_written_apart_and_in_any_order_are_the_same_dataset(tmp_path):
    rows = [make_sample(i) for i in range(7)]
    whole = write_samples(tmp_path / "whole", rows, name="toy", shard_size=3)
    part = tmp_path / "part"
    part.mkdir()
    for number in (2, 0, 3, 1):
        storage.write_shard(part, f"{number}", rows[number * 3 : number * 3 + 3])
    joined = storage.join_shards(part, ["0", "1", "2", "3"], name="toy")  # the last one is empty
    assert joined == whole
    assert list(open_samples(part)) == rows
    assert sorted(f.name for f in part.iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir())


def test_an_id_in_two_shards_is_named(tmp_path):
    for number in range(2):
        storage.write_shard(tmp_path, f"{number}", [make_sample(number), make_sample(7)])
    with pytest.raises(UserError, match="'toy/train/7' occurs twice"):
        storage.join_shards(tmp_path, ["0", "1"], name="toy")


def test_joining_survives_a_kill_among_the_renames(tmp_path, monkeypatch):
    for number in range(3):
        storage.write_shard(tmp_path, f"{number}", [make_sample(number)])
    rename, calls = storage.os.rename, []

    def killed(*names):
        calls.append(names)
        if len(calls) == 2:
            raise SystemExit
        rename(*names)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(storage.os, "rename", killed)
        storage.join_shards(tmp_path, ["0", "1", "2"], name="toy")
    storage.join_shards(tmp_path, ["0", "1", "2"], name="toy")
    assert list(open_samples(tmp_path)) == [make_sample(i) for i in range(3)]


def test_tfds_reads_it(tmp_path):
    import tensorflow_datasets as tfds

    written = [*(make_sample(i) for i in range(3)), make_question(3), make_question(4)]
    write_samples(tmp_path / "d", written, name="toy", shard_size=2)
    builder = tfds.builder_from_directory(tmp_path / "d")
    source = builder.as_data_source(split="samples")
    assert len(source) == 5
    assert builder.info.splits["samples"].num_examples == 5
    for sample, row in zip(written, source, strict=True):
        assert row["id"].decode() == sample.id
        assert tuple(row["images"]) == sample.images
        assert row["kind"].decode() == sample.kind and json.loads(row["meta"]) == sample.meta
        turns = [turn["content"] for turn in json.loads(row["turns"])]
        if isinstance(sample, Chat):
            assert turns == [list(turn.content) for turn in sample.turns]
            continue
        assert tuple(o.decode() for o in row["options"]) == sample.options and turns == []
        assert [row[key].decode() for key in ("question", "answer", "system")] == ["what", "A", "sei kurz"]


def test_writing_and_reading_import_no_tensorflow_or_torch(tmp_path):
    program = (
        "import sys; from infimed_jax.data import storage, sample as s\n"
        f"x = s.Chat('a', 'b', 'c', (), (s.Turn('user', ('q',)),)); f = {str(tmp_path / 'd')!r}\n"
        "storage.write_samples(f, [x], name='toy'); assert storage.open_samples(f)[0] == x\n"
        "sys.exit(sum(m in sys.modules for m in ('tensorflow', 'torch')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_fingerprint_is_of_content_and_order_not_of_shards(tmp_path):
    a, b = make_sample(0), make_sample(1)
    meta_reordered = dataclasses.replace(a, meta=dict(a.meta))
    versions = {
        "base": ([a, b], 4096),
        "sharded": ([meta_reordered, b], 1),
        "order": ([b, a], 4096),
        "pixel": ([dataclasses.replace(a, images=(a.images[0], b"x")), b], 4096),
        "text": ([a, dataclasses.replace(b, turns=b.turns[:1])], 4096),
    }
    prints = {
        key: write_samples(tmp_path / key, rows, name="toy", shard_size=size)["fingerprint"]
        for key, (rows, size) in versions.items()
    }
    assert prints["base"] == prints["sharded"]
    assert len(set(prints.values())) == 4
    assert open_samples(tmp_path / "base").fingerprint == prints["base"]


def test_a_stopped_run_leaves_nothing(tmp_path):
    def stops():
        yield make_sample(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path / "d", stops(), name="toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no samples"),
        ([make_sample(0), make_sample(0)], "occurs twice"),
        ([make_sample(0, turns=())], "no turns"),
        ([make_sample(0, turns=(Turn("user", (2,)),))], "image index 2"),
        ([make_sample(0, turns=(Turn("user", (-1,)),))], "image index -1"),
        ([make_sample(0, turns=(Turn("user", ("q",), reasoning="r"),))], "only assistant"),
        ([make_sample(0, turns=(Turn("document", ("q",)),))], "cannot have a turn of role document"),
        ([make_sample(0, meta={"a": "\ud800"})], "not Unicode"),
        ([make_question(0, question="\ud800")], "not Unicode"),
        ([Document("a/b/0", "a", "b", (), ())], "no chunks"),
        ([Document("a/b/0", "a", "b", (), ((0,),))], "image index 0"),
        ([make_question(0, kind="chat")], "toy/train/0: no wording for a question of kind 'chat'"),
        ([make_question(0, meta={"language": "fr"})], "in language 'fr'"),
        *(
            ([make_question(0, **changes)], "toy/train/0: a")
            for changes in (
                {"answer": "C"},
                {"answer": "b"},
                {"answer": "AB"},
                {"answer": ""},
                {"kind": "yes_no", "options": (), "answer": "Yes"},
                {"kind": "open", "options": (), "answer": " "},
                {"options": ("one",)},
            )
        ),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        write_samples(tmp_path / "d", rows, name="toy")
    assert not (tmp_path / "d").exists()


def test_an_existing_folder_is_not_overwritten(tmp_path):
    write_samples(tmp_path / "d", [make_sample(0)], name="toy")
    with pytest.raises(UserError, match="exists already"):
        write_samples(tmp_path / "d", [make_sample(1)], name="toy")
    assert open_samples(tmp_path / "d")[0] == make_sample(0)


def test_one_flipped_bit_costs_one_record(tmp_path):
    written = [make_sample(i, images=(bytes([i]) * 3000, b"")) for i in range(20)]
    manifest = write_samples(tmp_path / "d", written, name="toy")
    file = tmp_path / "d" / manifest["shards"][0]["file"]
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1  # inside the first record
    file.write_bytes(raw)
    read = open_samples(tmp_path / "d")
    bad = []
    for number, sample in enumerate(written):
        try:
            assert read[number] == sample
        except CorruptRecord as error:
            assert f"record {number} of" in str(error)
            bad.append(number)
    assert bad == [0]


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset"):
        open_samples(tmp_path)
    manifest = write_samples(tmp_path / "d", [make_sample(0)], name="toy")
    (tmp_path / "d" / manifest["shards"][0]["file"]).unlink()
    with pytest.raises(UserError, match="lacks its shard toy-samples"):
        open_samples(tmp_path / "d")
    write_samples(tmp_path / "other", [make_sample(1, images=(random.Random(0).randbytes(2**17), b""))], name="toy")
    shard = tmp_path / "d" / manifest["shards"][0]["file"]
    shutil.copy(next((tmp_path / "other").glob("*array_record*")), shard)  # overwritten, and the name is the same
    with pytest.raises(UserError, match=rf"{shard.name} has [\d,]+ bytes, and its manifest.json says .* copy it again"):
        open_samples(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        open_samples(tmp_path / "d")


def test_survives_pickling_for_worker_processes(tmp_path):
    write_samples(tmp_path / "d", [make_sample(i) for i in range(3)], name="toy")
    read = open_samples(tmp_path / "d")
    assert read[1] == make_sample(1)
    assert pickle.loads(pickle.dumps(read))[2] == make_sample(2)


@pytest.mark.parametrize("fails", ["write", "close"])
def test_a_disk_that_fills_is_told_as_one(tmp_path, monkeypatch, fails):
    written = []

    class Full:
        """What ArrayRecord's writer does where nothing can be written."""

        def __init__(self, path, options):
            pass

        def write(self, record):
            written.append(record)
            self._does("write")

        def close(self):
            self._does("close")

        def _does(self, call):
            if call == fails:
                raise RuntimeError("write() failed: No space left on device; writing shard")

    monkeypatch.setattr(storage, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="No space left") as error:
        write_samples(tmp_path / "set", (make_sample(i) for i in range(1000)), name="toy")
    assert error.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    assert len(written) == (1 if fails == "write" else 1000)  # the first failure ends it


def test_a_shard_that_could_not_be_finished_takes_no_room(tmp_path):
    def samples():
        yield from (make_sample(i) for i in range(3))
        raise OSError(errno.ENOSPC, "No space left on device")

    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            storage.write_shard(tmp_path, "000000", samples())
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({key: None}, f"incomplete .{key}.")
            for key in ("name", "kinds", "origins", "shards", "fingerprint", "info")
        ),
        ({"shards": []}, "no usable shards"),
        ({"shards": ["a"]}, "no usable shards"),
        ({"shards": [{"file": "../other/secret", "samples": 1}]}, "no usable shards"),
        ({"shards": [{"file": "a", "samples": 0}]}, "no usable shards"),
        ({"shards": [{"file": "a", "samples": True}]}, "no usable shards"),
        ({"shards": [{"file": "a", "samples": 1}]}, "no usable shards"),
        ({"shards": [{"file": "\0", "samples": 1, "bytes": 1}]}, "no usable shards"),
        ({"info": {"derived_from": 7}}, "damaged .info.derived_from."),
    ],
)
def test_a_manifest_that_was_edited_is_told_at_once(tmp_path, change, words):
    manifest = write_samples(tmp_path / "d", [make_sample(0)], name="toy")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_text("not of this dataset")
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=f"{words}.* prepare the dataset again"):
        open_samples(tmp_path / "d")
