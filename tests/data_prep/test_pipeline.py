"""Ingest: what goes in comes out or is counted, bad images by reason; done work is kept, stopped work gone."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import SOURCES
from data_prep.sources.phantom import write_phantom
from data_prep.steps import ingest as ingestion
from data_prep.steps import step
from data_prep.steps.ingest import ingest
from infimed_jax.data.sample import Document, Sample, Skipped
from infimed_jax.data.storage import MANIFEST, open_samples
from infimed_jax.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 60,000 × 60,000 pixels in a few hundred bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


RGB = Image.fromarray(PIXELS)
JPEG = encoded(RGB, "JPEG")
USABLE = {
    "rgb": JPEG,
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "sixteen": encoded(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "alpha": encoded(RGB.convert("RGBA"), "PNG"),
    "palette": encoded(RGB.convert("P"), "PNG"),
    "grey": encoded(RGB.convert("L"), "BMP"),
}
UNUSABLE = {
    "empty": (b"", "empty file"),
    "text": (b"<html>not found</html>", "not a supported image"),
    "truncated": (JPEG[: len(JPEG) // 2], "truncated or corrupt"),
    "bomb": (bomb(), "too many pixels"),
}


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A VQA-RAD folder with each kind of image, one that is missing, and a question without an answer."""
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    for name, data in (USABLE | {name: data for name, (data, _) in UNUSABLE.items()}).items():
        (folder / "images" / name).write_bytes(data)
    rows = [
        {"image_name": name, "question": "Why?", "answer": "SECRET", "answer_type": "OPEN"}
        for name in (*USABLE, *UNUSABLE, "missing", "bomb")
    ]
    rows.append({"image_name": "rgb", "question": "Why?", "answer": None})
    (folder / "trainset.json").write_text(json.dumps(rows))
    (folder / "testset.json").write_text("[]")
    return folder


def test_every_record_is_kept_or_counted(hostile, tmp_path, capfd):
    seen = []
    report = ingest("vqa_rad", hostile, tmp_path / "out", ["train"], on_progress=lambda *at: seen.append(at))["train"]
    assert report["skipped"] == {
        "empty file": 1,
        "image missing": 1,
        "no answer": 1,
        "not a supported image": 1,
        "too many pixels": 2,
        "truncated or corrupt": 1,
    }
    assert report["samples"] == len(USABLE)
    assert report["samples"] + sum(report["skipped"].values()) == len(USABLE) + len(UNUSABLE) + 3
    assert (
        seen == [(n, 0, f"train: {n} records") for n in range(1, len(seen) + 1)]
        and len(seen) == len(USABLE) + len(UNUSABLE) + 3
    )
    of_image = {record["detail"]: record["reason"] for record in report["skipped_records"]}
    for name, (_, reason) in UNUSABLE.items():
        assert of_image[f"vqa_rad/{name}"] == reason
    assert of_image["missing"] == "image missing"
    samples = open_samples(tmp_path / "out" / "train")
    assert {s.meta["image_id"].split("/")[1]: s.images[0] for s in samples} == USABLE  # bytes untouched
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == report
    assert report["licence"] == "CC0-1.0" and report["fingerprint"] == samples.fingerprint
    assert "SECRET" not in (tmp_path / "out" / "train.json").read_text() + "".join(capfd.readouterr())


def test_a_link_to_nothing_is_a_missing_image_and_done_work_is_kept(hostile, tmp_path):
    link = hostile / "images" / "missing"
    link.symlink_to("nowhere")
    report = ingest("vqa_rad", hostile, tmp_path / "out", ["train"])["train"]
    assert report["samples"] == len(USABLE) and report["skipped"]["image missing"] == 1
    made = (tmp_path / "out" / "train").stat().st_mtime_ns
    ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    assert (tmp_path / "out" / "train").stat().st_mtime_ns == made
    (hostile / "images" / "nowhere").write_bytes(JPEG)  # it comes later
    assert ingest("vqa_rad", hostile, tmp_path / "out", ["train"])["train"]["samples"] == len(USABLE) + 1


def test_nothing_usable_is_an_error_that_counts_the_reasons_and_leaves_the_list(hostile, tmp_path):
    for name in USABLE:
        (hostile / "images" / name).unlink()
    with pytest.raises(
        UserError, match=r"no record .*image missing: 7.*too many pixels: 2.*image missing first at \S+/\d+, \S+;"
    ):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    with pytest.raises(UserError, match="it has none"):
        ingest("vqa_rad", hostile, tmp_path / "out", ["test"])
    assert sorted(path.name for path in tmp_path.glob("out/*")) == ["test.json", "train.json"]
    report = json.loads((tmp_path / "out" / "train.json").read_text())
    assert report["samples"] == 0 and report["skipped"]["image missing"] == 7
    assert report["skipped_first"]["image missing"].endswith(", " + next(iter(USABLE)))
    missing = [record["detail"] for record in report["skipped_records"] if record["reason"] == "image missing"]
    assert missing == [*USABLE, "missing"]
    for name, data in USABLE.items():
        (hostile / "images" / name).write_bytes(data)
    assert ingest("vqa_rad", hostile, tmp_path / "out", ["train"])["train"]["samples"] == len(USABLE)


def test_user_errors_name_the_thing(hostile, tmp_path):
    with pytest.raises(UserError, match="no data source 'vqarad', perhaps vqa_rad: `data sources` lists them"):
        ingest("vqarad", hostile, tmp_path / "out")
    with pytest.raises(UserError, match="vqa_rad has no split 'dev': its splits are train, train_usual"):
        ingest("vqa_rad", hostile, tmp_path / "out", ["dev"])
    with pytest.raises(UserError, match=r"nowhere is not a folder: vqa_rad wants trainset\.json"):
        ingest("vqa_rad", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="limit must be at least 1"):
        ingest("vqa_rad", hostile, tmp_path / "out", limit=0)
    (hostile / "trainset.json").write_text("[{")
    with pytest.raises(UserError, match=r"trainset\.json is not valid JSON"):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "thesis.txt").write_text("mine")
    (hostile / "trainset.json").write_text('[{"image_name": "rgb", "question": "Why?", "answer": "gas"}]')
    with pytest.raises(UserError, match="holds other files"):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    assert (tmp_path / "out" / "train" / "thesis.txt").read_text() == "mine"


def test_limit_keeps_the_first_samples(hostile, tmp_path):
    whole = ingest("vqa_rad", hostile, tmp_path / "whole", ["train"])["train"]
    report = ingest("vqa_rad", hostile, tmp_path / "out", ["train"], limit=3)["train"]
    assert report["samples"] == 3 < whole["samples"]
    ids = [[s.id for s in open_samples(tmp_path / name / "train")] for name in ("out", "whole")]
    assert ids[0] == ids[1][:3]


def test_done_work_is_kept_until_its_inputs_change(hostile, tmp_path, monkeypatch):
    first = ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "write_shard", lambda *_: pytest.fail("written again"))
        assert ingest("vqa_rad", hostile, tmp_path / "out", ["train"]) == first
    rows = json.loads((hostile / "trainset.json").read_text())[1:]
    (hostile / "trainset.json").write_text(json.dumps(rows))
    second = ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    assert second["train"]["samples"] == first["train"]["samples"] - 1
    assert len(open_samples(tmp_path / "out" / "train")) == second["train"]["samples"]


def test_the_same_folder_by_another_path_is_not_prepared_again(hostile, tmp_path, monkeypatch):
    first = ingest("vqa_rad", hostile, tmp_path / "out", ["train"])
    monkeypatch.setattr(ingestion, "write_shard", lambda *_: pytest.fail("written again"))
    monkeypatch.chdir(hostile)
    for path in (".", f"../{hostile.name}", f"{hostile}/"):
        assert ingest("vqa_rad", path, tmp_path / "out", ["train"]) == first


def lose_report(out: Path) -> None:
    (out / "train.json").unlink()


def break_report(out: Path) -> None:
    (out / "train.json").write_text('{"fingerprint": ')


def lose_shard(out: Path) -> None:
    next((out / "train").glob("*array_record*")).unlink()


def break_manifest(out: Path) -> None:
    (out / "train" / MANIFEST).write_text("")


@pytest.mark.parametrize("damage", [lose_report, break_report, lose_shard, break_manifest])
def test_damaged_results_are_made_again(hostile, tmp_path, damage):
    out = tmp_path / "out"
    first = ingest("vqa_rad", hostile, out, ["train"])
    damage(out)
    assert ingest("vqa_rad", hostile, out, ["train"]) == first
    assert json.loads((out / "train.json").read_text()) == first["train"]
    assert len(list(open_samples(out / "train"))) == len(USABLE)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_stopped_ingest_leaves_nothing_that_looks_whole(hostile, tmp_path, monkeypatch, earlier):
    out = tmp_path / "out"
    before = ingest("vqa_rad", hostile, out, ["train"], limit=1) if earlier else None
    stopped = []

    def stop(number: int, *_: object) -> None:
        stopped.append(number)
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest("vqa_rad", hostile, out, ["train"], on_progress=stop)
    assert stopped[-1] == 4
    if earlier:
        assert open_samples(out / "train").fingerprint == before["train"]["fingerprint"]
    else:
        assert not list(out.rglob(MANIFEST))
    whole = ingest("vqa_rad", hostile, out, ["train"])
    assert len(open_samples(out / "train")) == whole["train"]["samples"] == len(USABLE)
    assert sorted(os.listdir(out)) == ["train", "train.json"]


@pytest.mark.parametrize("at", ["join_shards", "report", "rename"])
def test_a_kill_between_writing_and_renaming_is_survived(hostile, tmp_path, monkeypatch, at):
    whole = ingest("vqa_rad", hostile, tmp_path / "whole", ["train"])
    out = tmp_path / "out"

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        if at == "join_shards":
            patch.setattr(step, "join_shards", killed)
        elif at == "report":
            patch.setattr(step, "write_json", killed)
        else:
            patch.setattr(step.os, "rename", killed)
        ingest("vqa_rad", hostile, out, ["train"])
    assert not (out / "train").exists()
    with monkeypatch.context() as patch:
        patch.setattr(ingestion, "write_shard", lambda *_: pytest.fail("written again"))
        assert ingest("vqa_rad", hostile, out, ["train"]) == whole
    files = sorted(file.name for file in (tmp_path / "whole" / "train").iterdir())
    assert sorted(file.name for file in (out / "train").iterdir()) == files
    assert sorted(os.listdir(out)) == ["train", "train.json"]


def test_a_stopped_stream_goes_on_behind_its_last_whole_shard(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(ingestion, "SHARD_SIZE", 2)
    whole = ingest("vqa_rad", hostile, tmp_path / "whole", ["train"])
    judged = []
    keep = ingestion._keep
    monkeypatch.setattr(ingestion, "_keep", lambda data, seen: judged.append(data) or keep(data, seen))

    def stop(number: int, *_: object) -> None:
        if number == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"], on_progress=stop)
    judged.clear()
    assert ingest("vqa_rad", hostile, tmp_path / "out", ["train"]) == whole
    assert not {*USABLE.values()}.isdisjoint(judged)
    assert not set(list(USABLE.values())[:4]) & set(judged)  # two shards of two stood already
    assert list(open_samples(tmp_path / "out" / "train")) == list(open_samples(tmp_path / "whole" / "train"))


def test_what_a_killed_worker_had_begun_makes_room_before_work_begins(hostile, tmp_path, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"], on_progress=stop)
    begun = tmp_path / "out" / ".train.new" / ".000000-000000.0123.part"
    begun.write_bytes(b"x" * 1000)
    with pytest.raises(KeyboardInterrupt):
        ingest("vqa_rad", hostile, tmp_path / "out", ["train"], on_progress=stop)
    assert not begun.exists()


def lettered(folder: Path, split: str, shard: str | None = None) -> Iterator[Sample | Skipped]:
    """A source whose shards are files, a sample a line."""
    for file in [folder / shard] if shard else sorted(folder.iterdir()):
        for number, line in enumerate(file.read_text().splitlines()):
            id = f"lettered/{split}/{file.name}/{number}"
            yield (Document(id, "lettered", split, (), ((line,),)) if line else Skipped(id, "blank"))


def test_a_source_in_shards_is_read_apart_and_joined_in_order(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name, text in {"a": "x\n\ny", "b": "\n", "c": "z"}.items():
        (tmp_path / "in" / name).write_text(text)
    source = replace(SOURCES["vqa_rad"], name="lettered", splits=("train",), read=lettered,
                     shards=lambda folder, _: sorted(f.name for f in folder.iterdir()))  # fmt: skip
    monkeypatch.setitem(SOURCES, "lettered", source)
    report = ingest("lettered", tmp_path / "in", tmp_path / "out")["train"]
    assert (report["samples"], report["skipped"]) == (3, {"blank": 2})
    assert [s.chunks[0][0] for s in open_samples(tmp_path / "out" / "train")] == ["x", "y", "z"]
    assert ingest("lettered", tmp_path / "in", tmp_path / "two", limit=2)["train"]["samples"] == 2


def test_procedural_sources_go_through_the_same_door(tmp_path):
    sizes = {"pretrain": 4, "alignment": 4, "train": 12, "reflective": 12, "rl": 12, "test": 12}
    reports = ingest("phantom", write_phantom(tmp_path / "in", 1, sizes), tmp_path / "out")
    assert set(reports) == set(SOURCES["phantom"].splits)
    for split, report in reports.items():
        assert report["skipped"] == {}
        assert list(open_samples(tmp_path / "out" / split)) == list(SOURCES["phantom"].read(tmp_path / "in", split))


def test_every_source_says_what_it_is():
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.splits and len(set(source.splits)) == len(source.splits)
        assert all((source.title, source.licence, source.layout, source.obtain))


@pytest.mark.skipif(not (REAL / "vqa_rad").is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_real_vqa_rad_test_split(tmp_path):
    report = ingest("vqa_rad", REAL / "vqa_rad", tmp_path / "out", ["test"])["test"]
    assert (report["samples"], report["skipped"]) == (451, {})
    assert report["kinds"] == {"closed": 21, "open": 179, "yes_no": 251}
