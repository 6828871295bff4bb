"""Questions in tables with the images inside: any Parquet files, any TFDS-prepared set, and PathVQA and VQA-RAD as the
Hugging Face Hub has them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.reading.faults import DAMAGED_FILE, NO_IMAGE, NO_TEXT, NOT_UNICODE, Unusable
from data_prep.reading.files import Images, NoFiles, as_list, find_files, shard_name
from data_prep.reading.parquet import parquet_rows
from data_prep.reading.parts import even_parts, parts_of
from data_prep.reading.rows import WHOLE, Part, Row
from data_prep.sources.source import (
    LANGUAGE_OPTION,
    Option,
    Source,
    as_published,
    caption_sample,
    filled,
    image_name,
    language_of,
    need,
    qa_sample,
    question_and_answers,
    records,
)
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.errors import UserError


def files_of(folder: Path, split: str) -> list[Path]:
    """The usual places of a split's files on the Hub."""
    return find_files(
        folder, f"data/{split}-*.parquet", f"{split}-*.parquet", f"**/{split}-*.parquet", f"{split}/*.parquet",
        f"{split}.parquet",
    )  # fmt: skip


def read_parquet(
    folder: Path,
    split: str,
    part: Part = WHOLE,
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    caption: str | None = None,
    language: str | None = None,
) -> Iterator[Sample | Skipped]:
    """Questions and answers, or captions where `caption` names a column."""
    columns = (image, caption) if caption else (image, question, answer)
    yield from read("parquet", folder, split, part, columns, language)


def read(
    name: str,
    folder: Path,
    split: str,
    part: Part = WHOLE,
    columns: tuple[str, ...] = ("image", "question", "answer"),
    language: str | None = "en",
) -> Iterator[Sample | Skipped]:
    """As `_sample` says of the columns; the files are the Hub's."""
    make = partial(_sample, Images(folder), columns, language)
    for file in [folder / part.file] if part.file else files_of(folder, split):
        rows = parquet_rows(file, columns, part)
        yield from records(f"{name}/{split}/{shard_name(folder, file)}", rows, make, part.first)


def _sample(images: Images, columns: tuple[str, ...], language: str | None, id: str, row: Row) -> Sample:
    """Two columns are images and their caption, three images, a question and its answer."""
    cell = row[columns[0]]
    if len(columns) == 2:
        question, gold = "", (need(row, columns[1], NO_TEXT),)
    else:
        question, gold = question_and_answers(row, *columns[1:])
    encoded = images.cells(cell)
    if not encoded:
        raise Unusable(NO_IMAGE)
    meta = filled(
        image_id=(name := image_name(cell)) and f"{id.split('/')[0]}/{name}",
        language=language_of(language, f"{question} {gold[0]}"),
    )
    if not question:
        return caption_sample(id, encoded, gold[0], meta)
    return qa_sample(id, encoded, question, gold, meta | as_published(row, columns[1]))


def read_tfds(
    folder: Path,
    split: str,
    part: Part = WHOLE,
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    caption: str | None = None,
    tfds_split: str | None = None,
) -> Iterator[Sample | Skipped]:
    """A prepared set in ArrayRecord files, by `tfds.data_source` and without TensorFlow; images stay encoded.

    UserError: no such set, split or column, or one that was prepared as TFRecord.
    """
    columns = (image, caption) if caption else (image, question, answer)
    rows = _tfds_rows(_tfds_source(folder, split, columns, tfds_split), image, part)
    yield from records(f"tfds/{split}", rows, partial(_sample, Images(folder), columns, None), part.first)


def tfds_parts(folder: Path, split: str, tfds_split: str | None = None, **columns: Any) -> list[Part]:
    """`Source.shards`. UserError as `read_tfds`, but for the columns."""
    return even_parts(len(_tfds_source(folder, split, (), tfds_split)))


def _tfds_source(folder: Path, split: str, columns: tuple[str, ...], tfds_split: str | None) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # its own errors, and those of broken JSON
        raise UserError(f"{folder} is no TFDS-prepared set: give the folder with dataset_info.json") from error
    features = builder.info.features
    if missing := [column for column in columns if column not in features]:
        raise UserError(f"{folder} lacks {', '.join(missing)}: its features are {', '.join(features)}")

    class Encoded(tfds.decode.SkipDecoding):
        """Images as they are, in a list as well."""

        def decode_batch_example_np(self, examples: Any) -> list[bytes]:
            return list(examples)

    images = [c for c in columns if isinstance(getattr(features[c], "feature", features[c]), tfds.features.Image)]
    decoders = {column: Encoded() for column in images}
    if not tfds_split and split not in builder.info.splits:
        raise NoFiles(f"{folder} has no split {split}: its splits are {', '.join(builder.info.splits)}")
    try:
        return builder.as_data_source(tfds_split or split, decoders=decoders)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())[:300]}") from error


def _tfds_rows(source: Any, image: str, part: Part) -> Iterator[Row | Unusable]:
    features = source.dataset_info.features
    short = {name for name in features if getattr(features[name], "np_dtype", None) in (np.float16, np.float32)}
    for number in range(part.first, len(source) if part.stop is None else part.stop):
        try:
            row = source[number]
            row |= {name: np.float32(row[name]) for name in short if isinstance(row[name], float)}
            yield {name: value if name == image else _decoded(value) for name, value in row.items()}
        except UnicodeDecodeError:
            yield Unusable(NOT_UNICODE, f"record {number}")
        except MemoryError:
            raise
        except Exception:  # protobuf's, the reader's, and those of the features
            yield Unusable(DAMAGED_FILE, f"record {number}")


def _decoded(value: Any) -> Any:
    """Bytes as text, in a list as well. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    is_list = isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object)
    return [_decoded(each) for each in as_list(value)] if is_list else value


_QA_OPTIONS = (
    Option("image", "column of the image [image]", default="image"),
    Option("question", "column of the question [question]", default="question"),
    Option("answer", "column of the answer [answer]", default="answer"),
    Option("caption", "column of a caption; given, the samples are documents, not questions"),
)
_DOOR: dict[str, Any] = {
    "licence": "unknown",
    "notes": "the licence is that of your files: it is not known here, so nothing of them is sent anywhere",
}


SOURCES = (
    Source(
        name="parquet",
        title="Any Parquet files with images",
        layout="data/SPLIT-*.parquet, SPLIT-*.parquet, SPLIT/*.parquet or SPLIT.parquet; images are bytes, "
        '{"bytes", "path"}, a file name, or a list of these',
        columns=("as the options say",),
        obtain="your own files, or most image sets of the Hugging Face Hub",
        read=read_parquet,
        shards=parts_of(files_of),
        options=(*_QA_OPTIONS, LANGUAGE_OPTION),
        **_DOOR,
    ),
    Source(
        name="tfds",
        title="Any set that TFDS has prepared in ArrayRecord files",
        layout="dataset_info.json, features.json, *.array_record*",
        columns=("as the options say",),
        obtain="tfds build --file_format=array_record",
        read=read_tfds,
        shards=tfds_parts,
        options=(
            *_QA_OPTIONS,
            Option("tfds_split", "the set's own split or slice, such as train[:90%] [SPLIT]", names_split=True),
        ),
        **_DOOR,
    ),
    Source(
        name="pathvqa",
        benchmark="path_vqa",
        title="PathVQA",
        licence="MIT",
        size="32,632 questions, 6,719 of them test",
        layout="data/SPLIT-*.parquet",
        columns=("image", "question", "answer"),
        obtain="flaviagiammarino/path-vqa on the Hugging Face Hub",
        notes="the licence is the card's, not verified here; the images are from textbooks",
        read=partial(read, "pathvqa"),
        shards=parts_of(files_of),
    ),
    Source(
        name="vqa_rad_hf",
        benchmark="vqa_rad",
        title="VQA-RAD as the Hugging Face Hub has it",
        licence="CC0-1.0",
        commercial_use=True,
        allow_external_api=True,
        splits=("train", "test"),
        size="1,793 / 451 questions on 315 images",
        layout="data/SPLIT-*.parquet",
        columns=("image", "question", "answer"),
        obtain="flaviagiammarino/vqa-rad on the Hugging Face Hub",
        notes="the usual split, without the columns of the original files (source vqa_rad)",
        read=partial(read, "vqa_rad_hf"),
        shards=parts_of(files_of),
    ),
)
