"""Questions in Parquet and in TFDS-prepared sets: the Hub's copies, and anyone's own columns."""

from __future__ import annotations

import io
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.reading import parts
from data_prep.sources import SOURCES
from data_prep.sources.source import with_options
from infimed_jax.data.prompts import question_text
from infimed_jax.data.sample import Skipped
from infimed_jax.errors import UserError
from tests.data_prep.samples import picture

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hub(folder: Path, split: str, images: list, questions: list, answers: list) -> Path:
    (folder / "data").mkdir(exist_ok=True, parents=True)
    table = pa.table({"image": pa.array(images, STRUCT), "question": questions, "answer": answers})
    pq.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("name", ["pathvqa", "vqa_rad_hf"])
def test_the_hubs_copies(tmp_path, name):
    image = {"bytes": b"A", "path": "x.jpg"}
    hub(
        tmp_path, "test", [image] * 4 + [None], ["Is it?", "What?", " ", "What?", "Why?"], ["No", "gas", "a", None, "b"]
    )
    records = list(SOURCES[name].read(tmp_path, "test"))
    shown = [record.reason if isinstance(record, Skipped) else (record.kind, record.answer) for record in records]
    assert shown == [("yes_no", "no"), ("open", "gas"), "no question", "no answer", "image missing"]
    assert records[0].id == f"{name}/test/data/test-00000-of-00001.parquet/00000" and records[0].images == (b"A",)
    with pytest.raises(UserError, match=r"holds none of data/train-\*\.parquet"):
        list(SOURCES[name].read(tmp_path, "train"))


def test_own_columns_by_option(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    pq.write_table(
        pa.table({"file": ["a.png", "b.png"], "ask": ["Q", "Q"], "say": ["A", "A"]}), tmp_path / "train.parquet"
    )
    source, _ = with_options(SOURCES["parquet"], {"image": "file", "question": "ask", "answer": "say"})
    sample, missing = source.read(tmp_path, "train")
    assert (sample.images, sample.question, sample.answer) == ((b"A",), "Q", "A")
    assert missing == Skipped("parquet/train/train.parquet/00001", "image missing", "b.png")
    (part,) = source.shards(tmp_path, "train")
    assert part.file == "train.parquet" and list(source.read(tmp_path, "train", part)) == [sample, missing]
    source, _ = with_options(SOURCES["parquet"], {"image": "file", "caption": "say"})
    document, _ = source.read(tmp_path, "train")
    assert document.kind == "document" and document.chunks[0] == (0, "\nA")
    with pytest.raises(UserError, match=r"train\.parquet lacks image, question, answer: its columns are file"):
        list(SOURCES["parquet"].read(tmp_path, "train"))


def test_values_marks_and_languages_of_ones_own_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    images = [["a.png", "A.png"], ["a.png"], ["a.png"], [], ["a.png"], ["https://example.org/a.png"]]
    asked = ["<image><image>Same?", "<image>\nHow many?", "<image> <image>?", "Q", "左肺怎么样？", "Q"]
    gold = pa.array([1.0, 3.0, 3.0, 4.0, 2.3, 1.0], pa.float32())
    pq.write_table(pa.table({"image": images, "question": asked, "answer": gold}), tmp_path / "train.parquet")
    two, one, marks, none, chinese, address = SOURCES["parquet"].read(tmp_path, "train")
    assert (two.images, two.question, two.answer) == ((b"A", b"A"), "Same?", "1")
    assert (one.question, one.answer, one.meta) == ("How many?", "3", {"image_id": "parquet/a.png"})
    assert (marks.reason, none.reason) == ("image marks do not match images", "no image")
    assert (chinese.answer, chinese.meta["language"]) == ("2.3", "zh") and "请简要回答" in question_text(chinese)
    assert address == Skipped(
        "parquet/train/train.parquet/00005", "image missing: an address, which is not downloaded", images[-1][0]
    )
    source, _ = with_options(SOURCES["parquet"], {"language": "en"})
    assert {row.meta["language"] for row in source.read(tmp_path, "train") if not isinstance(row, Skipped)} == {"en"}
    for column, shown in (
        (pa.array([True, False, None]), ["yes", "no", "no answer"]),
        (pa.array([["left", "the left"], ["yes"], []]), ["left", "yes", "no answer"]),
        (pa.array([1, None, 3], pa.float64()), ["1", "no answer", "3"]),
        (pa.array([Decimal("2.50"), Decimal("3.00"), None]), ["2.5", "3", "no answer"]),
    ):
        rows = pa.table({"image": ["a.png"] * 3, "question": ["Q"] * 3, "answer": column})
        pq.write_table(rows, tmp_path / "train.parquet")
        records = list(SOURCES["parquet"].read(tmp_path, "train"))
        assert [r.reason if isinstance(r, Skipped) else r.answer for r in records] == shown


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A set as `tfds build --file_format=array_record` leaves it, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    folder = tmp_path / "my_set" / "1.0.0"
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(buffer, "JPEG")
    (folder / "jpeg").write_bytes(buffer.getvalue())
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "q": text, "a": text})
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="my_set", split="train", filetype_suffix="array_record"
    )
    writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
    for question in (b"Is it?", b"caf\xe9", b"What?"):
        values = {"image": buffer.getvalue(), "q": question, "a": b"yes"}
        feature = {
            key: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
            for key, value in values.items()
        }
        writer.write(tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString())
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[3], num_bytes=1, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[split], filename_template=template, check_data=False
    )
    return folder


def test_tfds_sets_keep_their_encoded_images(prepared, monkeypatch):
    source, _ = with_options(SOURCES["tfds"], {"question": "q", "answer": "a"})
    first, broken, last = source.read(prepared, "train")
    assert first.images == last.images == ((prepared / "jpeg").read_bytes(),)
    assert (first.kind, first.question, first.answer) == ("yes_no", "Is it?", "yes")
    assert broken == Skipped("tfds/train/00001", "text is not valid UTF-8", "record 1")
    monkeypatch.setattr(parts, "LEAST", 1)
    pieces = [list(source.read(prepared, "train", part)) for part in source.shards(prepared, "train")]
    assert pieces == [[first], [broken], [last]]
    source, _ = with_options(SOURCES["tfds"], {"image": "image", "caption": "q", "tfds_split": "train[2:]"})
    (document,) = source.read(prepared, "validation")
    assert document.id == "tfds/validation/00000" and document.chunks[0] == (0, "\nWhat?")


def test_tfds_values_of_any_type_and_lists_of_images(tmp_path):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    pictures = (picture(1), picture(2))

    images = tfds.features.Sequence(tfds.features.Image())
    features = tfds.features.FeaturesDict(
        {
            "image": images,
            "question": tfds.features.Text(),
            "answer": tfds.features.Scalar(np.float32),
            "said": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path, dataset_name="my_set", split="train", filetype_suffix="array_record"
    )
    writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)), "group_size:1")
    for answer in (3.0, 2.3):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.extend(pictures)
        example.features.feature["question"].bytes_list.value.append(b"Q")
        example.features.feature["answer"].float_list.value.append(answer)
        example.features.feature["said"].bytes_list.value.extend([b"left", "l\u00e0".encode()])
        writer.write(example.SerializeToString())
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[2], num_bytes=1, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path, features=features, split_infos=[split], filename_template=template, check_data=False
    )
    whole, tenths = SOURCES["tfds"].read(tmp_path, "train")
    assert (whole.answer, tenths.answer) == ("3", "2.3") and whole.images == tenths.images == pictures
    source, _ = with_options(SOURCES["tfds"], {"answer": "said"})
    assert [(row.answer, row.alternatives) for row in source.read(tmp_path, "train")] == [("left", ("l\u00e0",))] * 2


def test_tfds_errors_name_the_thing(prepared, tmp_path):
    with pytest.raises(UserError, match="is no TFDS-prepared set"):
        list(SOURCES["tfds"].read(tmp_path, "train"))
    with pytest.raises(UserError, match="lacks question, answer: its features are"):
        list(SOURCES["tfds"].read(prepared, "train"))
    source, _ = with_options(SOURCES["tfds"], {"question": "q", "answer": "a"})
    with pytest.raises(UserError, match="has no split test: its splits are train"):
        list(source.read(prepared, "test"))


def test_the_sources_need_no_tensorflow_and_import_nothing_heavy():
    heavy = ("tensorflow", "tensorflow_datasets", "jax", "pyarrow", "pydicom", "torch")
    code = f"import sys, data_prep.sources; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
