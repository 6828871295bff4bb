"""Data steps against what they cannot beat: ingest against reading and hashing the same files, packing against time.

Ingest is timed in a process that has imported everything, as is what it is compared with.

    python benchmarks/data.py ingest --work /tmp/bench_data
    python benchmarks/data.py pack

Each prints its table and writes it as JSON (`--output`). Rounds alternate, so that other load falls on both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.engine import Engine
from data_prep.steps.ingest import ingest
from infimed_jax.data.bins import first_fit_decreasing, least_bins, minimum_bin_slack
from infimed_jax.files import to_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("data_benchmark.json"))
    steps = parser.add_subparsers(required=True)
    p = steps.add_parser("ingest")
    p.add_argument("--work", type=Path, required=True, help="a new folder, deleted at the end")
    p.add_argument("--images", type=int, default=4000)
    p.add_argument("--rounds", type=int, default=5)
    p.set_defaults(run=measure_ingest)
    p = steps.add_parser("pack")
    p.add_argument("--samples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    p.set_defaults(run=measure_packing)
    args = parser.parse_args()
    rows = args.run(args)
    for row in rows:
        print(to_json(row))
    write_json(args.output, rows)
    print(f"Outputs: {args.output}")


def measure_ingest(args: argparse.Namespace) -> list[dict[str, Any]]:
    """JPEGs of about 100 KB beside a JSON file, the same in eight tars, and in one Parquet file: the best round's
    seconds, and their ratios.

    Copying them into one file, hashed, is the least that ingest could do.
    """
    folder, tars, table, out = (args.work / name for name in ("files", "tars", "table", "out"))
    images = write_images(folder, args.images)
    write_tars(tars, images, 8)
    write_table(table, images)
    rows = []
    for (source, input), jobs in itertools.product(
        (("llava_json", folder), ("datacomp", tars), ("parquet", table)), (1, -1)
    ):
        files = images if source == "llava_json" else sorted(input.iterdir())
        reads, copies, ingests = [], [], []
        for _ in range(args.rounds):
            reads.append(seconds(lambda files=files: copy_and_hash(files, None)))
            copies.append(seconds(lambda files=files: copy_and_hash(files, args.work / "copy")))
            (args.work / "copy").unlink()
            shutil.rmtree(out, ignore_errors=True)
            ingests.append(
                seconds(lambda: ingest(source, input, out, ["train"], engine=Engine(jobs=jobs)))  # noqa: B023
            )
        read, copy, took = min(reads), min(copies), min(ingests)
        megabytes = sum(file.stat().st_size for file in files) / 1e6
        rows.append({"source": source, "jobs": jobs, "samples": args.images, "megabytes": round(megabytes, 1),
                     "read_and_hash_s": round(read, 3), "copy_and_hash_s": round(copy, 3), "ingest_s": round(took, 3),
                     "speed_of_reading_and_hashing": round(read / took, 3),
                     "copys_speed_of_reading_and_hashing": round(read / copy, 3)})  # fmt: skip
    shutil.rmtree(args.work)
    return rows


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy_and_hash(files: list[Path], target: Path | None) -> None:
    """Each file's SHA-256, by the fastest way of reading it: small ones whole. Without a target nothing is copied."""
    with target.open("wb", buffering=0) if target else nullcontext() as copy:
        for file in files:
            digest = hashlib.sha256()
            for data in [file.read_bytes()] if file.stat().st_size < 2**20 else read_in_pieces(file):
                digest.update(data)
                if copy:
                    copy.write(data)
            digest.digest()


def read_in_pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb", buffering=0) as stream:
        while data := stream.read(2**20):
            yield data


def write_images(folder: Path, count: int) -> list[Path]:
    """16 different pictures over and over: their size matters here, not what they show."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(16):
        grey = np.asarray(Image.fromarray(rng.integers(0, 256, (96, 96), np.uint8)).resize((640, 640)))
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    (folder / "images").mkdir(parents=True)
    files, rows = [], []
    for number in range(count):
        files.append(folder / "images" / f"{number:06d}.jpg")
        files[-1].write_bytes(encoded[number % 16])
        turns = [{"from": "human", "value": "<image>\nWhat is seen?"}, {"from": "gpt", "value": f"Finding {number}."}]
        rows.append({"id": str(number), "image": f"images/{files[-1].name}", "conversations": turns})
    (folder / "train.json").write_text(to_json(rows))
    return files


def write_tars(folder: Path, images: list[Path], count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in images[number::count]:
                tar.add(file, file.name)
                text = f"Finding of {file.stem}.".encode()
                member = tarfile.TarInfo(f"{file.stem}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))


def write_table(folder: Path, images: list[Path]) -> None:
    """One file and one group of rows, which is Arrow's default; a dictionary would store equal pictures once."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in images]
    answers = [f"Finding {file.stem}." for file in images]
    table = arrow.table({"image": cells, "question": ["What is seen?"] * len(images), "answer": answers})
    parquet.write_table(table, folder / "train.parquet", use_dictionary=False)


def measure_packing(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The paper's caption mix (144 image tokens and about 50 of text), and lengths that differ widely."""
    rows = []
    for count in args.samples:
        rng = np.random.default_rng(0)
        captions = 144 + np.clip(rng.lognormal(np.log(45), 0.45, count), 5, 1500).astype(int)
        wide = np.clip(rng.lognormal(6, 0.8, count), 20, 4096).astype(int)
        sets = {"captions": (captions, np.ones(count, int)), "wide": (wide, rng.integers(0, 9, count))}
        for name, (lengths, images) in sets.items():
            least = least_bins(lengths, images, 4096, 24)
            for pack in (first_fit_decreasing, minimum_bin_slack):
                began = time.perf_counter()
                bins = len(pack(lengths, images, 4096, 24)[0]) - 1
                took = time.perf_counter() - began
                rows.append({"set": name, "samples": count, "packer": pack.__name__, "seconds": round(took, 2),
                             "fill": round(lengths.sum() / 4096 / bins, 5),
                             "bound": round(lengths.sum() / 4096 / least, 5)})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
