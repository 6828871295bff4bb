"""IU-Xray (Indiana University chest X-rays, Demner-Fushman et al. 2016): one document a report, with its images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from data_prep.reading.csv_rows import Table, csv_rows
from data_prep.reading.faults import IMAGE_MISSING, NO_TEXT, Unusable
from data_prep.reading.files import Images
from data_prep.reading.rows import Row
from data_prep.sources.source import Source, caption_sample, filled, once, records, text
from infimed_jax.data.sample import Sample, Skipped

NAME = "iu_xray"


def read(folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """Frontal views first. A row of the projections that cannot be read is listed too."""
    projections: dict[str, list[tuple[str, str]]] = defaultdict(list)
    broken: list[Unusable] = []
    for row in csv_rows(folder / "indiana_projections.csv", Table(("uid", "filename", "projection"))):
        if isinstance(row, Unusable):
            broken.append(row)
        else:
            projections[text(row["uid"])].append((text(row["projection"]), text(row["filename"])))
    images = Images(folder / "images" / "images_normalized", folder / "images", folder / "images.zip")
    reports = csv_rows(folder / "indiana_reports.csv", Table(("uid", "findings", "impression")))
    rows = chain(once(reports, "uid"), broken)
    yield from records(f"{NAME}/{split}", rows, partial(_sample, images, projections))


def _sample(images: Images, projections: dict[str, list[tuple[str, str]]], id: str, row: Row) -> Sample:
    uid, findings, impression = (text(row[field]) for field in ("uid", "findings", "impression"))
    report = "\n".join(
        f"{title}: {words}" for title, words in (("Findings", findings), ("Impression", impression)) if words
    )
    if not report:
        raise Unusable(NO_TEXT, uid)
    views = sorted(projections.get(uid, ()))
    if not views:
        raise Unusable(IMAGE_MISSING, uid)
    encoded = tuple(images.read(name) for _, name in views)
    meta = filled(source_id=uid, image_id=f"{NAME}/{uid}", modality="X-ray", organ="chest", language="en")
    return caption_sample(id, encoded, report, meta)


SOURCE = Source(
    name=NAME,
    title="IU-Xray: Indiana University chest X-rays with reports",
    licence="not verified here (the Kaggle copy says CC BY-NC-ND 4.0)",
    splits=("all",),
    size="7,470 images, 3,851 reports",
    layout="indiana_reports.csv, indiana_projections.csv, images/images_normalized/*.png or images/*.png",
    columns=("uid", "findings", "impression", "filename", "projection"),
    obtain="Open-i of the National Library of Medicine; the tables are in its copy on Kaggle (raddar)",
    notes="excluded by the paper for its quality; de-identified words are XXXX in the reports; there is no split",
    read=read,
)
