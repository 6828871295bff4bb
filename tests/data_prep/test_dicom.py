"""DICOM: no identifier comes through, grey values follow the chosen window, odd files are named by their number."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.engine import Engine
from data_prep.sources import dicom
from data_prep.sources.dicom import BODY_PARTS, SOURCE, hashed
from data_prep.sources.source import secret_file, with_options
from data_prep.steps.ingest import ingest
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.data.storage import open_samples
from infimed_jax.errors import UserError

pydicom = pytest.importorskip("pydicom", reason="pydicom (extra `medical`) is not installed")

IDENTIFIERS = {
    "PatientName": "Kowalska^Anna",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Hauptstrasse 5",
    "AccessionNumber": "ACC-99",
    "InstitutionName": "Klinikum Nord",
    "ReferringPhysicianName": "Dr^Meier",
    "StudyDate": "20240506",
    "StudyDescription": "CT for Kowalska",
    "SeriesDescription": "secret series",
    "PatientComments": "lives with sister",
    "DeviceSerialNumber": "SN-123",
    "StudyInstanceUID": "1.2.3.4.5",
    "SeriesInstanceUID": "1.2.3.4.6",
    "SOPInstanceUID": "1.2.3.4.7",
}
GREY = np.random.default_rng(0).integers(-1000, 2000, (12, 16)).astype(np.int16)


def write(file: Path, pixels: np.ndarray = GREY, syntax: str | None = None, **changes) -> Path:
    """A CT image with every identifier filled in; `changes` are header fields, None removes one."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    data.SOPClassUID = CTImageStorage
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    fields = IDENTIFIERS | {
        "Modality": "CT",
        "BodyPartExamined": "CHEST",
        "Rows": pixels.shape[-3 if colour else -2],
        "Columns": pixels.shape[-2 if colour else -1],
        "BitsAllocated": pixels.itemsize * 8,
        "BitsStored": pixels.itemsize * 8,
        "HighBit": pixels.itemsize * 8 - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "PixelData": pixels.tobytes(),
    }
    if colour:
        fields["PlanarConfiguration"] = 0
    for name, value in (fields | changes).items():
        if value is not None:
            setattr(data, name, value)
    file.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(file, enforce_file_format=True)
    return file


@pytest.fixture
def salt(tmp_path) -> str:
    (tmp_path / "salt").write_bytes(b"0123456789abcdef0123456789abcdef\n")
    return str(tmp_path / "salt")


def read(folder: Path, salt: str, **options: str) -> list:
    source, _ = with_options(SOURCE, {"salt": salt, "window": "full"} | options)
    return list(source.read(folder, "all"))


def png(sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.images[0]))


def test_no_identifier_comes_through(tmp_path, salt, capfd):
    """Nor does a file's or folder's name, in the dataset, its report, its manifest or on the screen."""
    folder = tmp_path / "in"
    write(folder / "Kowalska_Anna" / "CT.1.2.3.4.7.dcm")
    write(folder / "Kowalska_Anna" / "copy.dcm")
    (folder / "Kowalska_Anna" / "notes-MRN-4711.txt").write_text("no DICOM")
    options = {"salt": salt, "window": "40:400"}
    report = ingest("dicom", folder, tmp_path / "out", options=options)["all"]
    assert report["samples"] == 1 and report["skipped"] == {"duplicate id": 1, "not a DICOM file": 1}
    assert [row["detail"] for row in report["skipped_records"]] == [
        "file 2 of the sorted listing",
        "file 3 of the sorted listing",
    ]
    (sample,) = open_samples(tmp_path / "out" / "all")
    written = repr(sample) + json.dumps(report) + (tmp_path / "out" / "all" / "manifest.json").read_text()
    written += "".join(capfd.readouterr())
    for value in [*IDENTIFIERS.values(), "Kowalska", "copy.dcm", "notes", "0123456789abcdef"]:
        assert value not in written
    assert png(sample).info == {}
    assert sample.chunks[0] == (0, "\nCT, chest")
    secret = secret_file(salt)
    assert report["options"]["salt"] == str(secret)
    for key, identifier in [("patient", "MRN-4711"), ("study", "1.2.3.4.5")]:
        assert sample.meta[key] == hashed(secret, identifier) != hashed(b"another salt 0123", identifier)
    assert sample.meta["image_id"] == f"dicom/{hashed(secret, '1.2.3.4.7')}"


def test_the_parser_does_not_print_what_it_doubts(tmp_path, salt, recwarn, caplog, capfd):
    with pytest.warns(UserWarning, match="Kowalska"):  # as pydicom does by itself
        write(tmp_path / "in" / "a.dcm", StudyInstanceUID="Kowalska Anna", PatientBirthDate="born 1961")
    recwarn.clear()
    caplog.clear()
    (sample,) = read(tmp_path / "in", salt)
    assert sample.meta["study"]
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")


def test_files_without_a_uid_are_no_duplicates(tmp_path, salt):
    for name in "ab":
        file = write(tmp_path / "in" / f"{name}.dcm")
        data = pydicom.dcmread(file)
        del data.SOPInstanceUID
        data.save_as(file)
    assert [s.meta["image_id"] for s in read(tmp_path / "in", salt)] == ["dicom/all/000001", "dicom/all/000002"]


def test_a_folder_in_parts_is_what_it_is_whole_duplicates_included(tmp_path, salt, monkeypatch):
    monkeypatch.setattr(dicom, "_PART", 2)
    folder = tmp_path / "in"
    for number, uid in enumerate((1, 2, 1, 3, 3, 2, 4, 1)):
        write(folder / f"{number % 3}" / f"{number}.dcm", GREY + number, SOPInstanceUID=f"1.2.{uid}")
    write(folder / "0" / "DICOMDIR")
    (folder / "0" / "notes").write_text("no DICOM")
    data = pydicom.dcmread(folder / "0" / "0.dcm")  # the first of the copies of 1.2.1 cannot be read, the second can
    data.NumberOfFrames = 2
    data.save_as(folder / "0" / "0.dcm")
    raw = (folder / "0" / "0.dcm").read_bytes()
    (folder / "0" / "0.dcm").write_bytes(raw.replace(b"IS\x02\x002 ", b"IS\x02\x00xx"))
    source, _ = with_options(SOURCE, {"salt": salt, "window": "full"})
    found = source.shards(folder, "all")
    whole = list(source.read(folder, "all"))
    assert [part.first for part in found] == [1, 3, 6, 8, 10] and len(whole) == 9
    assert [record for part in found for record in source.read(folder, "all", part)] == whole
    reasons = [record.reason for record in whole if isinstance(record, Skipped)]
    assert reasons.count("duplicate id") == 3 and reasons.count("not a DICOM file") == 2
    options = {"salt": salt, "window": "full"}
    made = [ingest("dicom", folder, tmp_path / str(jobs), options=options, engine=Engine(jobs=jobs)) for jobs in (1, 2)]
    assert made[0] == made[1] and made[0]["all"]["samples"] == 4
    write(folder / "0" / "later.dcm")
    with pytest.raises(UserError, match="has changed since its files were listed: run this again"):
        list(source.read(folder, "all", found[1]))


def test_another_salt_prepares_again(tmp_path, salt):
    write(tmp_path / "in" / "a.dcm")
    first = ingest("dicom", tmp_path / "in", tmp_path / "out", options={"salt": salt, "window": "full"})
    Path(salt).write_bytes(b"another salt of enough bytes")
    second = ingest("dicom", tmp_path / "in", tmp_path / "out", options={"salt": salt, "window": "full"})
    assert first["all"]["fingerprint"] != second["all"]["fingerprint"]


def test_real_files_give_each_one_record_and_no_header_text(salt, recwarn, caplog, capfd):
    """The files that come with pydicom: several makers, transfer syntaxes, colour, reports, broken ones."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    if not (folder / "MR_small.dcm").is_file():
        pytest.skip(f"pydicom's own files are not at {folder}")
    records = read(folder, salt, burned_in="keep")
    assert not recwarn.list and not caplog.records and capfd.readouterr() == ("", "")
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name != "DICOMDIR"]
    assert len(records) == len(files) > 100
    samples = [record for record in records if isinstance(record, Sample)]
    assert len(samples) > 30
    texts = set()
    for file in files:
        with contextlib.suppress(Exception):
            for element in pydicom.dcmread(file, stop_before_pixels=True).iterall():
                if element.VR in ("PN", "LO", "SH", "LT", "ST", "UT", "UI", "DA", "TM", "DT", "AS"):
                    texts |= {part for part in str(element.value).split("^") if len(part) > 5}
    assert len(texts) > 300
    written = repr([dataclasses.replace(s, images=(), id="", meta=s.meta | {"image_id": ""}) for s in samples])
    written += repr([(record.reason, record.detail) for record in records if isinstance(record, Skipped)])
    assert {text.upper() for text in texts if text in written} <= BODY_PARTS
    assert all(png(sample).info == {} for sample in samples)


def test_free_text_in_coded_fields_does_not_pass(tmp_path, salt):
    write(tmp_path / "in" / "a.dcm", BodyPartExamined="KOWALSKA", ViewPosition="DR MEIER", Modality="CT")
    write(tmp_path / "in" / "b.dcm", Modality="KOWALSKA", SOPInstanceUID="1.2.9")
    first, second = read(tmp_path / "in", salt, burned_in="keep")
    assert first.chunks[0] == (0, "\nCT") and second.chunks[0] == (0, "\nchest")
    assert "KOWALSKA" not in repr((first, second)).upper()


@pytest.mark.parametrize(
    ("centre", "width", "function"), [(40, 400, None), (-600, 1500, "LINEAR"), (50, 351, "LINEAR_EXACT")]
)
def test_windows_equal_pydicoms(tmp_path, salt, centre, width, function):
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    fields = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": centre, "WindowWidth": width}
    file = write(tmp_path / "in" / "a.dcm", VOILUTFunction=function, **fields)
    (sample,) = read(tmp_path / "in", salt, window="header")
    data = pydicom.dcmread(file)
    expected = apply_voi_lut(apply_modality_lut(GREY, data), data)
    low, high = expected.min(), expected.max()
    assert len(np.unique(expected)) > 10  # both ends of the window are met
    grey = np.asarray(png(sample)).astype(float)
    assert np.abs(grey - 255 * (expected - low) / (high - low)).max() <= 0.5 + 1e-6  # rounding to 8 bits
    if function != "LINEAR_EXACT":
        (chosen,) = read(tmp_path / "in", salt, window=f"{centre}:{width}")
        assert chosen.images == sample.images


def test_full_range_leaves_padding_out(tmp_path, salt):
    pixels = GREY.copy()
    pixels[0] = -32768
    write(tmp_path / "in" / "a.dcm", pixels, PixelPaddingValue=-32768)
    (sample,) = read(tmp_path / "in", salt, window="full")
    low, high = GREY[1:].min(), GREY[1:].max()
    expected = np.clip((pixels.astype(float) - low) / (high - low), 0, 1)
    assert np.abs(np.asarray(png(sample)) - 255 * expected).max() <= 0.5 + 1e-6


def test_monochrome1_is_inverted_and_none_keeps_sixteen_bits(tmp_path, salt):
    unsigned = (GREY.astype(np.int32) + 1000).astype(np.uint16)
    write(tmp_path / "in" / "a.dcm", unsigned)
    write(tmp_path / "in" / "b.dcm", unsigned, PhotometricInterpretation="MONOCHROME1", SOPInstanceUID="1.2.8")
    write(tmp_path / "in" / "c.dcm", GREY, SOPInstanceUID="1.2.9", RescaleSlope=3)
    plain, inverted, signed = read(tmp_path / "in", salt, window="none")
    assert png(plain).mode == "I;16" and np.array_equal(np.asarray(png(plain)), unsigned)
    assert np.array_equal(np.asarray(png(inverted)), 65535 - unsigned)
    assert np.array_equal(np.asarray(png(signed)).astype(np.int32) - 32768, GREY)  # stored values, not rescaled
    plain, inverted, _ = read(tmp_path / "in", salt, window="full")
    assert np.abs(np.asarray(png(plain)).astype(int) + np.asarray(png(inverted)) - 255).max() <= 1  # both round


def test_a_constant_image_has_no_window_to_divide_by(tmp_path, salt):
    write(tmp_path / "in" / "a.dcm", np.full((4, 4), 7, np.int16))
    (sample,) = read(tmp_path / "in", salt, window="full")
    assert not np.asarray(png(sample)).any()


def test_colour_and_frames(tmp_path, salt):
    colour = np.random.default_rng(1).integers(0, 256, (6, 5, 3), np.uint8)
    write(tmp_path / "in" / "a.dcm", colour, SOPInstanceUID="1.2.8")
    frames = np.random.default_rng(2).integers(0, 256, (5, 6, 7), np.uint8)
    write(tmp_path / "in" / "b.dcm", frames, NumberOfFrames=5)
    first, middle = read(tmp_path / "in", salt)
    assert np.array_equal(np.asarray(png(first)), colour)
    _, *every = read(tmp_path / "in", salt, frames="all")
    assert len(every) == 5 and len({sample.id for sample in every}) == len({s.meta["image_id"] for s in every}) == 5
    assert middle.images == every[2].images
    grey = np.asarray(png(every[4])).astype(float)
    low, high = int(frames[4].min()), int(frames[4].max())
    assert np.abs(grey - 255 * (frames[4].astype(float) - low) / (high - low)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("changes", "risk"),
    [
        ({"BurnedInAnnotation": "YES"}, "tag"),
        ({"Modality": "US"}, "modality"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, "modality"),
        ({"Modality": "XYZ"}, "modality"),
        ({"Modality": None}, "modality"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, "secondary capture"),
        ({"ConversionType": "DF"}, "secondary capture"),
        ({"RecognizableVisualFeatures": "YES"}, "recognizable features"),
        ({}, ""),
        ({"BurnedInAnnotation": "NO"}, ""),
    ],
)
def test_burned_in_risk_is_flagged_or_skipped(tmp_path, salt, changes, risk):
    write(tmp_path / "in" / "a.dcm", **changes)
    (kept,) = read(tmp_path / "in", salt, burned_in="keep")
    assert kept.meta.get("burned_in_risk", "") == risk
    (default,) = read(tmp_path / "in", salt)
    assert isinstance(default, Skipped) == bool(risk)
    if risk:
        assert default == Skipped("dicom/all/000001", "burned-in text risk", "file 1 of the sorted listing")


def test_hostile_and_odd_files_are_named_by_number(tmp_path, salt):
    folder = tmp_path / "in"
    write(folder / "0_good.dcm")
    (folder / "1_empty.dcm").write_bytes(b"")
    (folder / "2_text.dcm").write_bytes(b"DICM" * 100)
    raw = write(folder / "3_cut.dcm", SOPInstanceUID="1.2.8").read_bytes()
    (folder / "3_cut.dcm").write_bytes(raw[:-50])
    write(folder / "4_huge.dcm", Rows=60_000, Columns=60_000, SOPInstanceUID="1.2.9")
    write(folder / "5_report.dcm", Rows=None, Columns=None, PixelData=None, SOPInstanceUID="1.2.10")
    write(folder / "6_no_window.dcm", SOPInstanceUID="1.2.11")
    head = raw[: raw.index(b"1.2.840.10008.1.2.1\0")]
    deflate = zlib.compressobj(wbits=-15)
    bomb = deflate.compress(bytes(2**24)) + deflate.flush()
    (folder / "7_deflated.dcm").write_bytes(head[:-2] + b"\x16\0" + b"1.2.840.10008.1.2.1.99" + bomb)
    write(folder / "8_jpeg.dcm", syntax="1.2.840.10008.1.2.1", SOPInstanceUID="1.2.12")
    os.mkfifo(folder / "9_pipe")  # would block whoever opens it
    write(folder / "DICOMDIR")
    records = read(folder, salt, window="header")
    reasons = {int(record.id.rsplit("/")[-1]): record.reason for record in records if isinstance(record, Skipped)}
    assert reasons == {
        1: "DICOM header has no window",
        2: "not a DICOM file",
        3: "DICOM file without an image",
        4: "DICOM pixels cannot be decoded",
        5: "too many pixels",
        6: "DICOM file without an image",
        7: "DICOM header has no window",
        8: "deflated transfer syntax",
        9: "DICOM header has no window",
    }
    assert len(records) == 9 and all(".dcm" not in str(vars(record)) for record in records)
    (good,) = (record for record in read(folder, salt) if record.id.endswith("000001"))
    assert png(good).size == (16, 12)


@pytest.mark.parametrize("window", ["", "auto", "40", "40:0", "a:b", "1:2:3", "40:nan"])
def test_a_window_that_is_none_is_refused(salt, window):
    with pytest.raises(UserError, match="option window of dicom"):
        with_options(SOURCE, {"salt": salt, "window": window})


def test_without_pydicom_the_error_says_what_to_install(tmp_path, salt, monkeypatch):
    write(tmp_path / "in" / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"needs pydicom: pip install 'infimed-jax\[medical\]'"):
        read(tmp_path / "in", salt)


def test_the_window_must_be_chosen(salt):
    with pytest.raises(UserError, match=r"dicom needs --option window=…: how grey values become 8 bits"):
        with_options(SOURCE, {"salt": salt})
