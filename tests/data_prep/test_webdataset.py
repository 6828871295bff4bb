"""DataComp and CCS as img2dataset writes them: tars of image, caption and metadata, each read apart or together."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_prep.sources import SOURCES
from data_prep.steps.ingest import ingest
from infimed_jax.data.sample import Sample, Skipped


def shard(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def pair(key: str, caption: str) -> dict[str, bytes]:
    info = {"uid": f"uid-{key}", "url": "u", "key": key, "status": "success", "caption": caption}
    return {f"{key}.jpg": key.encode(), f"{key}.json": json.dumps(info).encode(), f"{key}.txt": caption.encode()}


@pytest.mark.parametrize("name", ["datacomp", "ccs"])
def test_pairs_become_documents(tmp_path, name):
    shard(tmp_path / "00000000.tar", pair("000000000", " A cat. ") | pair("000000001", ""))
    shard(
        tmp_path / "00000001.tar",
        {"000010000.json": b'{"caption": "no image"}', "000010001.jpg": b"x", "000010001.txt": b"caf\xe9"}
        | {"000010002.png": b"y", "000010002.json": b'{"caption": "From JSON."}', "000010003.jpg": b"z"}
        | {"000010004.jpg": b"z", "000010004.json": b"{broken", "../evil.jpg": b"e"},
    )  # fmt: skip
    records = list(SOURCES[name].read(tmp_path, "train"))
    prefix = f"{name}/train"
    document = records[0]
    assert isinstance(document, Sample) and document.id == f"{prefix}/00000000.tar/00000"
    assert document.kind == "document" and document.chunks == ((0, "\nA cat."),)
    assert document.images == (b"000000000",) and document.meta["source_id"] == "uid-000000000"
    assert records[4].chunks[0] == (0, "\nFrom JSON.") and records[4].images == (b"y",)
    reasons = [record.reason if isinstance(record, Skipped) else record.id for record in records]
    assert reasons == [
        f"{prefix}/00000000.tar/00000",
        "no text",
        "no image",
        "text is not valid UTF-8",
        f"{prefix}/00000001.tar/00002",
        "no text",
        "archive member with an unsafe name",
        "not valid JSON",
    ]
    keys = [record.detail for record in records if isinstance(record, Skipped)]
    named = ["000000001", "000010000", "000010001", "000010003"]
    assert keys == [*named, "00000001.tar member 9", "000010004"]


def test_an_image_that_cannot_be_used_is_named_in_the_report(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    shard(tmp_path / "in" / "0.tar", {"a.jpg": whole, "a.txt": b"A cat.", "b.jpg": whole[:-40], "b.txt": b"A dog."})
    report = ingest("datacomp", tmp_path / "in", tmp_path / "out")["train"]
    assert [(r["reason"], r["detail"]) for r in report["skipped_records"]] == [("truncated or corrupt", "b")]


def test_shards_read_apart_give_the_same_records(tmp_path):
    for number in range(3):
        shard(tmp_path / "deep" / f"{number:05d}.tar", pair(f"{number}-a", "one") | pair(f"{number}-b", ""))
    source = SOURCES["datacomp"]
    shards = source.shards(tmp_path, "train")
    assert [part.file for part in shards] == ["deep/00000.tar", "deep/00001.tar", "deep/00002.tar"]
    apart = [record for shard in shards for record in source.read(tmp_path, "train", shard)]
    assert apart == list(source.read(tmp_path, "train"))
    assert len({record.id for record in apart}) == 6
