"""Safetensors folders: read strictly and lazily, written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from infimed_jax.errors import UserError
from infimed_jax.files import to_json
from infimed_jax.hf.names import Found
from infimed_jax.progress import Report, gigabytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter"
"""Folder of an export that holds a LoRA run's adapters in PEFT's layout."""
SHARD_BYTES = 4_000_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16))}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


class WeightsFolder:
    """The tensors of a folder's safetensors files; headers are read at once, tensors when asked for.

    A file is mapped only while a tensor is read from it: pages of a mapped file count as memory of the process.
    Raises UserError for pickles, a missing or false index, names that leave the folder, and cut or damaged files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        self._file_of: dict[str, str] = {}
        self.found: dict[str, Found] = {}
        weight_map = self._weight_map()
        files = sorted({SINGLE} if weight_map is None else set(weight_map.values()))
        absent = [name for name in files if not (self.folder / name).is_file()]
        if absent:
            raise UserError(f"{self.folder}: {', '.join(absent)} is missing, though {INDEX} names it")
        if SINGLE not in files and (self.folder / SINGLE).is_file():
            # transformers reads the single file then: another model, where the two differ
            raise UserError(f"{self.folder} holds {SINGLE} beside shards, and {INDEX} does not name it: remove one")
        faults = [fault for name in files for fault in self._scan(name)]
        if faults:
            raise UserError("; ".join(faults))
        if weight_map is not None:
            self._compare(weight_map)

    def read(self, key: str) -> np.ndarray:
        """The tensor in its stored type (float32, bfloat16 or float16)."""
        with self._open(self._file_of[key]) as file:
            return file.get_tensor(key)

    def _weight_map(self) -> dict[str, str] | None:
        """Key → file name as the index says; None where one file holds all."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            named = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
            if not named or not weight_map:
                raise UserError(f"{index} has no weight_map of keys to file names")
            for name in set(weight_map.values()):
                if PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                    raise UserError(f"{index} names {name!r}, which is not a safetensors file of that folder")
            return weight_map
        if (self.folder / SINGLE).is_file():
            return None
        if any(self.folder.glob("*.safetensors")):
            raise UserError(f"{index} is missing: the folder holds shards but does not say which")
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{self.folder} holds only pickles ({', '.join(pickles)}), which can run code and are not opened: give "
                "safetensors, as transformers writes them (from_pretrained(DIR), then save_pretrained(NEW)) where you "
                "trust the files"
            )
        raise UserError(f"{self.folder} holds no {SINGLE}")

    def _open(self, name: str) -> Any:
        path = self.folder / name
        try:
            path.open("rb").close()  # safe_open would call a file without permission absent
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is cut or damaged: {error}") from error

    def _scan(self, name: str) -> list[str]:
        """Take note of a file's tensors; returns what is wrong with it."""
        try:
            file = self._open(name)
        except UserError as error:
            return [str(error)]
        faults = []
        with file:
            for key in file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated over)
                if key in self._file_of:
                    faults.append(f"{key} is in {self._file_of[key]} and in {name} of {self.folder}")
                    continue
                view = file.get_slice(key)
                self._file_of[key] = name
                self.found[key] = Found(tuple(view.get_shape()), str(view.get_dtype()))
        return faults

    def _compare(self, weight_map: Mapping[str, str]) -> None:
        """The index and the files must agree on every key."""
        false = sorted(
            key for key in weight_map.keys() | self._file_of.keys() if weight_map.get(key) != self._file_of.get(key)
        )
        if false:
            raise UserError(f"{self.folder / INDEX} and its shards disagree on {', '.join(false)}")


def plan_shards(sizes: Mapping[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Keys in order, cut into shards of at most `limit` bytes (a larger tensor gets a shard of its own)."""
    shards: list[list[str]] = []
    used = limit + 1
    for key, size in sizes.items():
        if used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += size
    return shards


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    limit: int,
    on_progress: Report | None = None,
) -> None:
    """Write shards (and the index where there are several) into `folder`, holding one tensor at a time.

    `on_progress(bytes, total, note)` is called after each tensor.

    `tensors` yields the keys of `shapes` in that order. A safetensors file is a length, a JSON header with each
    tensor's byte offsets, and the bytes; the header is known before any tensor is, so nothing needs to be kept.
    """
    name, kind = DTYPES[dtype]
    sizes = {key: int(np.prod(shape, dtype=np.int64)) * kind.itemsize for key, shape in shapes.items()}
    shards = plan_shards(sizes, limit)
    stream: Iterator[tuple[str, np.ndarray]] = iter(tensors)
    weight_map: dict[str, str] = {}
    done, total = 0, sum(sizes.values())
    for number, keys in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(_header(keys, shapes, sizes, name))
            for key in keys:
                given, array = next(stream)
                if given != key or array.shape != shapes[key]:
                    raise ValueError(f"{given} {array.shape} where {key} {shapes[key]} was announced")
                out.write(np.ascontiguousarray(array, kind).reshape(-1).view(np.uint8).data)
                done += sizes[key]
                if on_progress:
                    on_progress(done, total, gigabytes(done, total))
        weight_map |= dict.fromkeys(keys, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(to_json(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _header(keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + sizes[key]
        header[key] = {"dtype": dtype, "shape": list(shapes[key]), "data_offsets": [start, end]}
    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes start on a multiple of 8, as the format asks
    return struct.pack("<Q", len(text)) + text
