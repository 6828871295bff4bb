"""Captioned medical images as tables: ROCO, ROCOv2, PMC-OA, MedTrinity-25M, LLaVA-Med's figure captions, MedPix-2.0."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.faults import NO_TEXT, Unusable
from data_prep.reading.files import Images, all_files, find_files, shard_name
from data_prep.reading.parquet import parquet_rows
from data_prep.reading.parts import csv_parts, parts_of
from data_prep.reading.rows import WHOLE, Part, Row, json_rows, read_json
from data_prep.sources.source import Source, caption_sample, filled, image_name, need, once, records, text
from infimed_jax.data.sample import Sample, Skipped


def _sample(images: Images, image: str, caption: str, source_id: str, id: str, row: Row) -> Sample:
    """The three names are columns. The caption is checked first: without it, the image need not be read."""
    words = need(row, caption, NO_TEXT)
    cell = row.get(image)
    meta = filled(source_id=row.get(source_id), modality=row.get("modality"), organ=row.get("organ"), language="en")
    if name := image_name(cell):
        meta["image_id"] = f"{id.split('/')[0]}/{name}"
    return caption_sample(id, images.cells(cell), words, meta)


def _sample_by_id(images: Images, caption: str, source_id: str, id: str, row: Row) -> Sample:
    """A sample of a table without image names: the files are named after the row's identifier."""
    return _sample(images, "image", caption, source_id, id, row | {"image": f"{text(row[source_id])}.jpg"})


def _roco_table(folder: Path, split: str) -> tuple[Path, Table]:
    """The table with the column `name` of image files if there is one, else the repository's tab-separated captions."""
    short = {"train": "train", "validation": "val", "test": "test"}[split]
    names = (f"radiology{short}data.csv", f"radiology{split}data.csv", "radiology/captions.txt")
    file = find_files(folder, *(f"{split}/{name}" for name in names))[0]
    if file.suffix == ".csv":
        return file, Table(("id", "name", "caption"))
    return file, Table(("id", "caption"), delimiter="\t", header=False, quoted=False)


def _roco_parts(folder: Path, split: str) -> list[Part]:
    return csv_parts(*_roco_table(folder, split))


def read_roco(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    images = Images(folder / split / "radiology" / "images", folder / split / "radiology" / "images.zip")
    file, table = _roco_table(folder, split)
    named = partial(_sample, images, "name", "caption", "id")
    make = named if table.header else partial(_sample_by_id, images, "caption", "id")
    yield from records(f"roco/{split}", csv_rows(file, table, part), make, part.first)


def _rocov2_files(folder: Path, split: str) -> list[Path]:
    short = {"train": "train", "validation": "valid", "test": "test"}[split]
    return find_files(folder, f"{short}_captions.csv", f"data/{split}-*.parquet")


def read_rocov2(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    short = {"train": "train", "validation": "valid", "test": "test"}[split]
    images = Images(folder / short, folder / f"{short}_images", folder / short / short, folder / f"{short}_images.zip")
    for file in [folder / part.file] if part.file else _rocov2_files(folder, split):
        if file.suffix == ".csv":
            rows, make = csv_rows(file, Table(("ID", "Caption")), part), partial(_sample_by_id, images, "Caption", "ID")
        else:
            columns = ("image", "image_id", "caption")
            rows, make = parquet_rows(file, columns, part), partial(_sample, images, "image", "caption", "image_id")
        yield from records(f"rocov2/{split}/{shard_name(folder, file)}", rows, make, part.first)


def _pmc_oa_files(folder: Path, split: str) -> list[Path]:
    files = {
        "train": ("train.jsonl", "pmc_oa.jsonl"),
        "validation": ("valid.jsonl",),
        "test": ("test.jsonl",),
        "train_beta": ("pmc_oa_beta.jsonl",),
    }
    return find_files(folder, *files[split])[:1]


def read_pmc_oa(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    places = ("caption_T060_filtered_top4_sep_v0_subfigures", "images")
    images = Images(*(folder / place for place in places), folder / "images.zip")
    rows = json_rows(_pmc_oa_files(folder, split)[0], part)
    yield from records(f"pmc_oa/{split}", rows, partial(_sample, images, "image", "caption", "pmcid"), part.first)


def _medtrinity_files(folder: Path, split: str) -> list[Path]:
    return all_files(folder, ".parquet")


def read_medtrinity(folder: Path, split: str, part: Part = WHOLE) -> Iterator[Sample | Skipped]:
    make = partial(_sample, Images(folder), "image", "caption", "id")
    for file in [folder / part.file] if part.file else _medtrinity_files(folder, split):
        rows = parquet_rows(file, ("image", "id", "caption"), part)
        yield from records(f"medtrinity/{split}/{shard_name(folder, file)}", rows, make, part.first)


def read_fig_captions(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """Reads a dictionary of domains, each a list of figures; a figure of several domains is taken once."""
    name = "llava_med_instruct_fig_captions.json"
    file = find_files(folder, name, f"instruct/{name}")[0]
    images = Images(folder / "images", folder / "images.zip")
    rows = once(_figures(read_json(file, dict)), "pair_id")
    yield from records(f"llava_med_fig_caption/{split}", rows, partial(_figure, images))


def _figures(domains: dict[str, Any]) -> Iterator[Row | Unusable]:
    for domain, figures in domains.items():
        for figure in figures if isinstance(figures, list) else [figures]:
            named = isinstance(figure, dict) and text(figure.get("pair_id"))
            yield figure | {"modality": domain} if named else Unusable(NO_TEXT, "a figure without pair_id")


def _figure(images: Images, id: str, row: Row) -> Sample:
    pair = text(row["pair_id"])
    named = row | {"image": text(row.get("image")) or f"{pair}.jpg"}
    return _sample(images, "image", "fig_caption", "pair_id", id, named)


def read_medpix(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """`all` is the whole of Descriptions.json, the others are the authors' splits, which keep cases together."""
    if split == "all":
        patterns = ("Descriptions.json", "Description.json")
    else:
        patterns = (f"splitted_dataset/descriptions_{split}.jsonl",)
    images = Images(folder / "images", folder / "images.zip")
    rows = json_rows(find_files(folder, *patterns)[0])
    yield from records(f"medpix/{split}", rows, partial(_medpix_sample, images))


def _medpix_sample(images: Images, id: str, row: Row) -> Sample:
    """Age, sex and history stay out: the image does not show them."""
    description = row.get("Description")
    description = description if isinstance(description, dict) else {}
    name = text(row.get("image"))
    flat = {
        "image": f"{name}.png" if name and "." not in name else name,
        "caption": description.get("Caption"),
        "case": row.get("U_id"),
        "modality": row.get("Type"),
        "organ": text(row.get("Location Category")).lower(),
    }
    return _sample(images, "image", "caption", "case", id, flat)


SOURCES = (
    Source(
        name="roco",
        title="ROCO, radiology part",
        licence="each image as its article has it",
        size="about 81,000 radiology images",
        layout="SPLIT/radiologytraindata.csv (valdata, testdata) or SPLIT/radiology/captions.txt; "
        "SPLIT/radiology/images/",
        columns=("id", "name", "caption"),
        obtain="razorx89/roco-dataset, whose scripts/fetch.py fetches the images; the tables are in its copy on Kaggle",
        notes="licences are listed by image in the repository's licences.txt and are not read here",
        read=read_roco,
        shards=_roco_parts,
    ),
    Source(
        name="rocov2",
        title="ROCOv2-radiology",
        licence="CC-BY-NC-SA-4.0",
        size="79,789 images: 59,958 / 9,904 / 9,927",
        layout="train_captions.csv, valid_captions.csv, test_captions.csv with images in train/ or train_images/ …; "
        "or data/SPLIT-*.parquet",
        columns=("ID", "Caption", "image", "image_id", "caption"),
        obtain="Zenodo, or eltorio/ROCOv2-radiology on the Hugging Face Hub (whose train split has 59,962 rows)",
        notes="the licence is the Hub card's; its articles are CC BY or CC BY-NC. The folders of the Zenodo archives "
        "are not verified here",
        read=read_rocov2,
        shards=parts_of(_rocov2_files),
    ),
    Source(
        name="pmc_oa",
        title="PMC-OA (PMC-CLIP's subfigures and captions)",
        licence="not verified here",
        splits=("train", "validation", "test", "train_beta"),
        size="1.65 million pairs",
        layout="train.jsonl, valid.jsonl, test.jsonl, or pmc_oa.jsonl and pmc_oa_beta.jsonl; images.zip, or unpacked",
        columns=("image", "caption", "pmcid"),
        obtain="axiong/pmc_oa on the Hugging Face Hub",
        notes="excluded by the paper for its quality; layout as of the dataset card",
        read=read_pmc_oa,
        shards=parts_of(_pmc_oa_files),
    ),
    Source(
        name="medtrinity",
        title="MedTrinity-25M",
        licence="not verified here: it joins more than 30 sets with their own terms",
        splits=("train",),
        size="25,016,845 images",
        layout="*.parquet, in folders or not",
        columns=("image", "id", "caption"),
        obtain="UCSC-VLAA/MedTrinity-25M on the Hugging Face Hub, on request",
        notes="columns as of the dataset card; not verified here. Credentialed sets may be among its sources",
        read=read_medtrinity,
        shards=parts_of(_medtrinity_files),
    ),
    Source(
        name="llava_med_fig_caption",
        title="LLaVA-Med figure captions",
        licence="CC-BY-NC-4.0",
        splits=("train",),
        size="a file of 161 MiB",
        layout="llava_med_instruct_fig_captions.json, a list of figures by domain; images/PAIR_ID.jpg",
        columns=("pair_id", "fig_caption"),
        obtain="the files linked in the README of microsoft/LLaVA-Med; its download_images.py fetches the images",
        notes="fields as the repository's own scripts use them; not verified on the file",
        read=read_fig_captions,
    ),
    Source(
        name="medpix",
        title="MedPix-2.0",
        licence="not verified here",
        splits=("all", "train", "dev", "test"),
        size="671 cases",
        layout="Descriptions.json, splitted_dataset/descriptions_{train,dev,test}.jsonl, images/*.png",
        columns=("image", "U_id", "Type", "Location Category", "Description.Caption"),
        obtain="CHILab1/MedPix-2.0 and the image archive that it links",
        notes="excluded by the paper for its quality; the rows carry age and sex, which are not read",
        read=read_medpix,
    ),
)
