"""OBELICS and MMC4: chunks are turns, missing images are counted one by one, too few or many images skip a document."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.reading.faults import Unusable
from data_prep.sources import SOURCES, interleaved
from infimed_jax.data.sample import Sample, Skipped


def document(id: str, pieces: list, joint: str) -> list:
    return list(interleaved.document(lambda row: row, joint, id, pieces))


def test_a_chunk_is_its_images_and_the_text_after_them():
    (sample,) = document("x/train/0", ["intro", b"A", "one", "more", b"B", b"C", "two", b"D"], " ")
    assert list(sample.chunks) == [
        ("intro",),
        (0, "\none more"),
        (1, 2, "\ntwo"),
        (3,),
    ]
    assert sample.images == (b"A", b"B", b"C", b"D")
    (sample,) = document("x/train/0", [b"A", "one"], " ")
    assert sample.chunks == ((0, "\none"),)


def test_no_image_or_ten_skip_a_document():
    assert list(document("x/train/0", ["text"], " ")) == [Skipped("x/train/0", "no image")]
    assert list(document("x/train/0", [b"A"], " ")) == [Skipped("x/train/0", "no text")]
    (nine,) = document("x/train/0", ["text", *[b"A"] * 9], " ")
    assert isinstance(nine, Sample)
    assert list(document("x/train/0", ["text", *[b"A"] * 10], " ")) == [Skipped("x/train/0", "ten images or more")]


def test_missing_images_are_counted_and_the_document_kept():
    lost, sample = document("x/train/0", [b"A", "one", Unusable("image missing", "b.jpg"), "two"], " ")
    assert lost == Skipped("x/train/0-image1", "image missing, document kept without it", "b.jpg")
    assert sample.meta["images_missing"] == "1" and sample.chunks[0] == (0, "\none two")
    gone, none = document("x/train/0", [Unusable("image missing"), "two"], " ")
    assert none == Skipped("x/train/0", "no image") and gone.id == "x/train/0-image0"


def test_obelics_joins_urls_with_fetched_images(tmp_path):
    """The published columns; the images as img2dataset's `files` output puts them."""
    rows = {
        "images": [["u0", None, "u1"], [None, "u2"], [None], ["u0"]],
        "texts": [[None, "between", None], ["before", None], ["text only"], ["a", "b"]],
        "metadata": ["[]"] * 4,
        "general_metadata": ["{}"] * 4,
    }
    stem = "train-00000-of-01439-aa"
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / f"{stem}.parquet")
    fetched = tmp_path / "images" / stem
    (fetched / "00000").mkdir(parents=True)
    (fetched / "00000" / "000000000.jpg").write_bytes(b"U0")
    (fetched / "00000" / "000000001.jpg").write_bytes(b"U1")
    table = {
        "url": ["u0", "u1", "u2"],
        "key": ["000000000", "000000001", "000000002"],
        "status": ["success", "success", "failed_to_download"],
    }
    pq.write_table(pa.table(table), fetched / "00000.parquet")
    source = SOURCES["obelics"]
    records = list(source.read(tmp_path, "train"))
    prefix = f"obelics/train/data/{stem}.parquet"
    assert list(records[0].chunks) == [(0, "\nbetween"), (1,)] and records[0].images == (
        b"U0",
        b"U1",
    )
    assert records[1:] == [
        Skipped(f"{prefix}/00001-image0", "image missing, document kept without it"),
        Skipped(f"{prefix}/00001", "no image"),
        Skipped(f"{prefix}/00002", "no image"),
        Skipped(f"{prefix}/00003", "file is damaged", "images and texts of different length"),
    ]
    (part,) = source.shards(tmp_path, "train")
    assert part.file == f"data/{stem}.parquet" and list(source.read(tmp_path, "train", part)) == records


def mmc4(**changes) -> dict:
    infos = [
        {"image_name": "a.jpg", "raw_url": "u", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "b.jpg", "raw_url": "u", "matched_text_index": 1, "matched_sim": 0.2},
    ]
    return {"url": "w", "text_list": ["First.", "Second.", "Third."], "image_info": infos, **changes}


def test_mmc4_puts_images_before_their_sentence(tmp_path):
    stray = [*mmc4()["image_info"], {"image_name": "a.jpg", "matched_text_index": 9}]
    lines = [mmc4(), mmc4(image_info=[]), mmc4(text_list=None), mmc4(image_info=stray)]
    (tmp_path / "docs_no_face_shard_0_v2.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"A")
    (tmp_path / "images" / "b.jpg").write_bytes(b"B")
    records = list(SOURCES["mmc4"].read(tmp_path, "train"))
    assert list(records[0].chunks) == [("First.",), (0, 1, "\nSecond. Third.")]
    assert records[0].images == (b"A", b"B")
    reasons = [record.reason if isinstance(record, Skipped) else "kept" for record in records[1:]]
    assert reasons == ["no image", "no text", "file is damaged", "kept", "not valid JSON"]


def test_mmc4_in_tars_with_images_as_base64(tmp_path: Path):
    infos = [
        {"matched_text_index": 0, "image_base64": str(base64.b64encode(b"A"))},  # "b'QQ=='", as the converter has it
        {"matched_text_index": 1, "image_base64": base64.b64encode(b"B").decode()},
        {"matched_text_index": 2, "image_base64": "%%%"},
    ]
    members = {"k1.json": json.dumps(mmc4(image_info=infos)).encode(), "k2.json": b"[]", "k3.txt": b"x"}
    with tarfile.open(tmp_path / "000000000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    lost, sample, *bad = SOURCES["mmc4"].read(tmp_path, "train")
    assert lost.reason == "image that is no Base64" and sample.images == (b"A", b"B")
    assert list(sample.chunks) == [(0, "\nFirst."), (1, "\nSecond. Third.")]
    assert [record.reason for record in bad] == ["not valid JSON", "not valid JSON"]
