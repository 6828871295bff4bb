"""Captioned medical sets, each in its published layout: documents of image and caption, and every gap named."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import SOURCES
from infimed_jax.data.sample import Sample, Skipped


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def outline(records) -> list:
    """(image, text) of a document, the reason of what was skipped."""
    return [
        record.reason if isinstance(record, Skipped) else (record.images[0], record.chunks[0][-1]) for record in records
    ]


def check_documents(records: list[Sample]) -> None:
    assert all(record.kind == "document" and record.chunks[0][0] == 0 for record in records)


def test_roco_from_its_table(tmp_path):
    table = 'id,name,caption\nROCO_1,a.jpg,"Chest, plain.\n"\nROCO_2,b.jpg,Gone.\nROCO_3,a.jpg,\n'
    put(tmp_path, {"train/radiologytraindata.csv": table, "train/radiology/images/a.jpg": b"A"})
    records = list(SOURCES["roco"].read(tmp_path, "train"))
    assert outline(records) == [(b"A", "\nChest, plain."), "image missing", "no text"]
    assert records[0].meta["source_id"] == "ROCO_1" and records[0].meta["image_id"] == "roco/a.jpg"
    put(tmp_path, {"validation/radiologyvaldata.csv": table, "test/radiologytestdata.csv": table})
    assert len(list(SOURCES["roco"].read(tmp_path, "validation"))) == 3
    assert len(list(SOURCES["roco"].read(tmp_path, "test"))) == 3


def test_roco_from_the_repositorys_captions(tmp_path):
    text = 'ROCO_00002\t Computed "tomography\nROCO_00003\t\nROCO_00004\tMR.\n'
    put(tmp_path, {"test/radiology/captions.txt": text, "test/radiology/images/ROCO_00002.jpg": b"A"})
    records = list(SOURCES["roco"].read(tmp_path, "test"))
    assert outline(records) == [(b"A", '\nComputed "tomography'), "no text", "image missing"]


@pytest.mark.parametrize("place", ["valid", "valid_images"])
def test_rocov2_from_zenodo(tmp_path, place):
    table = "ID,Caption\nROCOv2_2023_valid_000001,A mass.\nROCOv2_2023_valid_000002,Gone.\n"
    put(tmp_path, {"valid_captions.csv": table, f"{place}/ROCOv2_2023_valid_000001.jpg": b"A"})
    records = list(SOURCES["rocov2"].read(tmp_path, "validation"))
    assert outline(records) == [(b"A", "\nA mass."), "image missing"]


def test_rocov2_and_medtrinity_from_parquet_read_apart_or_together(tmp_path):
    for name, files, column in [
        ("rocov2", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "image_id"),
        ("medtrinity", ["25M_accessible/a.parquet", "25M_demo/a.parquet"], "id"),
    ]:
        folder = tmp_path / name
        for number, file in enumerate(files):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            table = {
                "image": [{"bytes": b"A%d" % number, "path": "x.jpg"}, {"bytes": None, "path": None}],
                column: [f"id{number}", "none"],
                "caption": ["Liver.", "Gone."],
                "extra": [1, 2],
            }
            pq.write_table(pa.table(table), folder / file)
        source = SOURCES[name]
        records = list(source.read(folder, "train"))
        assert outline(records) == [(b"A0", "\nLiver."), "image missing", (b"A1", "\nLiver."), "image missing"]
        assert records[2].meta["source_id"] == "id1" and len({record.id for record in records}) == 4
        found = source.shards(folder, "train")
        assert [part.file for part in found] == files
        assert records == [record for part in found for record in source.read(folder, "train", part)]
        check_documents(records[::2])


@pytest.mark.parametrize(("split", "file"), [("validation", "valid.jsonl"), ("train_beta", "pmc_oa_beta.jsonl")])
def test_pmc_oa_with_its_images_packed(tmp_path, split, file):
    rows = [
        {"image": "PMC1_Fig3_4.jpg", "caption": "A. ARF1.", "pmcid": "PMC1", "url_name": "u.jpg"},
        {"image": "PMC2.jpg", "caption": "Gone.", "pmcid": "PMC2"},
    ]
    put(tmp_path, {file: "\n".join(map(json.dumps, rows)) + '\n{"image": "PMC1_Fig3_4.jpg"}\n{"caption"'})
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("caption_T060_filtered_top4_sep_v0_subfigures/PMC1_Fig3_4.jpg", b"A")
    records = list(SOURCES["pmc_oa"].read(tmp_path, split))
    assert outline(records) == [(b"A", "\nA. ARF1."), "image missing", "no text", "not valid JSON"]
    assert records[0].meta["source_id"] == "PMC1"


def test_llava_med_figure_captions_take_a_figure_of_several_domains_once(tmp_path):
    figure = {"pair_id": "1_F1", "fig_label": "Fig 1", "fig_caption": "An X-ray.", "in_text_mention": []}
    domains = {"chest_xray": [figure, {"fig_caption": "No id."}], "mri": [figure, figure | {"pair_id": "2_F1"}]}
    put(tmp_path, {"instruct/llava_med_instruct_fig_captions.json": json.dumps(domains), "images/1_F1.jpg": b"A"})
    records = list(SOURCES["llava_med_fig_caption"].read(tmp_path, "train"))
    assert outline(records) == [(b"A", "\nAn X-ray."), "no text", "duplicate id", "image missing"]
    assert records[0].meta["modality"] == "chest_xray"


def test_medpix_has_image_names_without_suffix_and_keeps_age_and_sex_out(tmp_path):
    row = {
        "Type": "CT",
        "U_id": "MPX1031",
        "image": "MPX1031_synpic20041",
        "Description": {"Age": "74", "Sex": "female", "Caption": "Septal thickening.", "Plane": "Axial"},
        "Location": "Chest, Pulmonary",
        "Location Category": "Thorax",
    }
    put(
        tmp_path, {"images/MPX1031_synpic20041.png": b"A", "Descriptions.json": json.dumps([row, row | {"image": "b"}])}
    )
    put(tmp_path, {"splitted_dataset/descriptions_dev.jsonl": json.dumps(row) + "\n" + json.dumps({"image": "x"})})
    records = list(SOURCES["medpix"].read(tmp_path, "all"))
    assert outline(records) == [(b"A", "\nSeptal thickening."), "image missing"]
    assert records[0].meta == {
        "source_id": "MPX1031",
        "modality": "CT",
        "organ": "thorax",
        "language": "en",
        "image_id": "medpix/MPX1031_synpic20041.png",
    }
    assert outline(SOURCES["medpix"].read(tmp_path, "dev")) == [(b"A", "\nSeptal thickening."), "no text"]
