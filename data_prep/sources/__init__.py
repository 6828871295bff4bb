"""Data sources: the only place that knows a dataset's own files."""

from __future__ import annotations

from data_prep.sources import (
    captions,
    choices,
    conversations,
    dicom,
    interleaved,
    iu_xray,
    phantom,
    shapes,
    slake,
    tables,
    vqa_med_2019,
    vqa_rad,
    webdataset,
)
from data_prep.sources.source import Source

SOURCES: dict[str, Source] = {
    source.name: source
    for source in sorted(
        (
            *captions.SOURCES,
            *choices.SOURCES,
            *conversations.SOURCES,
            *interleaved.SOURCES,
            *tables.SOURCES,
            *webdataset.SOURCES,
            dicom.SOURCE,
            iu_xray.SOURCE,
            phantom.SOURCE,
            shapes.SOURCE,
            slake.SOURCE,
            vqa_med_2019.SOURCE,
            vqa_rad.SOURCE,
        ),
        key=lambda source: source.name,
    )
}

COMMERCIAL_USE: dict[str, bool] = {name: source.commercial_use for name, source in SOURCES.items()}
"""What a model card says of each source where the licence's text alone would have to."""
