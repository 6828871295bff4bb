"""A Sample as the bytes of one record, and back; and what a manifest says of many records."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from infimed_jax.data.prompts import LETTERS, as_turns, question_text
from infimed_jax.data.sample import Chat, Document, Question, Sample, Turn
from infimed_jax.errors import UserError

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=vars).encode
TEXT_FIELDS = ("id", "source", "split", "kind", "question", "answer", "reasoning", "system")
JSON_FIELDS = ("chunks", "turns", "meta")
LIST_FIELDS = ("options", "alternatives")
FORMAT = 2
"""Layout of a prepared dataset; another number in a manifest is refused."""


def check_sample(sample: Sample) -> None:
    """UserError where a sample contradicts itself: no id, nothing in it, an image index without an image, a reply
    without a role that may reason, an answer that the question's kind cannot have."""
    if not sample.id:
        raise UserError(f"a sample of source {sample.source!r} has no id")
    if isinstance(sample, Question):
        _check_question(sample)
        return
    turns = as_turns(sample)
    if not turns:
        raise UserError(f"sample {sample.id}: no {'turns' if isinstance(sample, Chat) else 'chunks'}")
    for turn in turns:
        if isinstance(sample, Chat) and turn.role == "document":
            raise UserError(f"sample {sample.id}: a chat cannot have a turn of role document")
        if turn.reasoning and turn.role != "assistant":
            raise UserError(f"sample {sample.id}: only assistant turns may have reasoning")
        for piece in turn.content:
            if not isinstance(piece, str) and not 0 <= piece < len(sample.images):
                raise UserError(f"sample {sample.id}: image index {piece}, but it has {len(sample.images)} images")


def _check_question(sample: Question) -> None:
    kind, answer = sample.kind, sample.answer
    if kind == "yes_no" and answer not in ("yes", "no"):
        raise UserError(f"sample {sample.id}: a yes_no answer must be 'yes' or 'no', not {answer!r}")
    if kind == "choice" and (len(answer) != 1 or answer not in LETTERS[: len(sample.options)]):
        raise UserError(
            f"sample {sample.id}: a choice's answer must be the letter of one of its options, not {answer!r}"
        )
    if sample.alternatives and kind not in ("closed", "open"):
        raise UserError(f"sample {sample.id}: a {kind} question has one answer, no alternatives")
    if not all(text.strip() for text in (answer, *sample.alternatives)):
        raise UserError(f"sample {sample.id}: a {kind} question needs a gold answer")
    question_text(sample)  # raises where there is no wording for it


def to_record(sample: Sample) -> bytes:
    """A tf.train.Example. Its fields are in the order of their names: equal samples are equal bytes."""
    example = tf_example_pb2.Example()
    features = example.features.feature
    try:
        for field in TEXT_FIELDS:
            features[field].bytes_list.value.append(getattr(sample, field, "").encode())
        for field in JSON_FIELDS:
            features[field].bytes_list.value.append(_to_json(getattr(sample, field, ())).encode())
        features["options"].bytes_list.value.extend([option.encode() for option in getattr(sample, "options", ())])
        if alternatives := getattr(sample, "alternatives", ()):  # without any, the bytes are those of earlier versions
            features["alternatives"].bytes_list.value.extend([text.encode() for text in alternatives])
    except UnicodeEncodeError as error:
        raise UserError(f"sample {sample.id!r} holds text that is not Unicode: {error.reason}") from error
    features["images"].bytes_list.value.extend(sample.images)
    return example.SerializeToString(deterministic=True)


def from_record(record: bytes) -> Sample:
    features = tf_example_pb2.Example.FromString(record).features.feature

    def one(key: str) -> str:
        (value,) = features[key].bytes_list.value
        return value.decode()

    values: dict[str, Any] = {field: one(field) for field in TEXT_FIELDS}
    values |= {field: json.loads(one(field)) for field in JSON_FIELDS}
    values |= {field: [text.decode() for text in features[field].bytes_list.value] for field in LIST_FIELDS}
    return from_values(values | {"images": features["images"].bytes_list.value})


def from_values(values: dict[str, Any]) -> Sample:
    """The sample of fields as JSON has them, images as bytes; fields of other kinds are ignored."""
    common = {field: values[field] for field in ("id", "source", "split", "meta")} | {"images": tuple(values["images"])}
    if values["kind"] == Document.kind:
        return Document(**common, chunks=tuple(map(tuple, values["chunks"])))
    if values["kind"] == Chat.kind:
        turns = tuple(Turn(t["role"], tuple(t["content"]), t.get("reasoning", "")) for t in values["turns"])
        return Chat(**common, turns=turns)
    texts = {field: values[field] for field in ("kind", "question", "answer", "reasoning", "system")}
    lists = {field: tuple(values.get(field, ())) for field in LIST_FIELDS}
    return Question(**common, **texts, **lists)


class Tally:
    """What a dataset's manifest needs of the samples of one shard."""

    def __init__(self) -> None:
        self.ids: dict[str, None] = {}
        self._kinds: Counter[str] = Counter()
        self._origins: Counter[str] = Counter()
        self._digests: list[bytes] = []
        self._images = self._size = 0

    def add(self, sample: Sample, record: bytes) -> None:
        """UserError: the id occurred before."""
        if sample.id in self.ids:
            raise _repeated(sample.id)
        self.ids[sample.id] = None
        # Not in a thread of its own: what that gained on two free cores, changes of threads cost.
        self._digests.append(hashlib.sha256(record).digest())
        self._kinds[sample.kind] += 1
        self._origins[f"{sample.source}/{sample.split}"] += 1
        self._images += len(sample.images)
        self._size += len(record)

    def facts(self) -> dict[str, Any]:
        """JSON values, which `sum_facts` adds up."""
        return {
            "samples": len(self.ids),
            "images": self._images,
            "bytes": self._size,
            "kinds": self._kinds,
            "origins": self._origins,
            "ids": list(self.ids),
            "digests": b"".join(self._digests).hex(),
        }


def sum_facts(folder: Path, shards: Sequence[str], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The manifest of all shards but for where their samples lie, and the samples of each shard that has any.

    UserError: there are no samples, or an id occurs twice.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"dataset name {name!r} must be lower-case letters, digits and underscores")
    digest = hashlib.sha256()
    sums: dict[str, Counter[str]] = {"kinds": Counter(), "origins": Counter(), "counts": Counter()}
    hashed: list[np.ndarray] = []
    lengths: dict[str, int] = {}
    for shard in shards:
        facts = json.loads((folder / f"{shard}.json").read_text(encoding="utf-8"))
        digest.update(bytes.fromhex(facts["digests"]))
        sums["kinds"].update(facts["kinds"])
        sums["origins"].update(facts["origins"])
        sums["counts"].update({key: facts[key] for key in ("samples", "images", "bytes")})
        hashed.append(np.array([_short_hash(id) for id in facts["ids"]], np.uint64))
        if facts["samples"]:
            lengths[shard] = facts["samples"]
    if not lengths:
        raise UserError(f"dataset {name}: no samples to write")
    _refuse_repeated_ids(folder, shards, np.concatenate(hashed))
    summed = {
        "format": FORMAT,
        "name": name,
        **sums["counts"],
        "kinds": dict(sorted(sums["kinds"].items())),
        "origins": dict(sorted(sums["origins"].items())),
        "fingerprint": digest.hexdigest(),
    }
    return summed, lengths


def _refuse_repeated_ids(folder: Path, shards: Sequence[str], hashed: np.ndarray) -> None:
    """Hashes are compared (8 bytes an id, where a set of names would need a hundred), then the names of equal ones."""
    ordered = np.sort(hashed)
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    seen: set[str] = set()
    for shard in shards:
        for id in json.loads((folder / f"{shard}.json").read_text(encoding="utf-8"))["ids"]:
            if _short_hash(id) not in repeated:
                continue
            if id in seen:
                raise _repeated(id)
            seen.add(id)


def _repeated(id: str) -> UserError:
    return UserError(
        f"sample id {id!r} occurs twice, but is unique in a dataset: give each of several inputs of one source a name "
        "of its own by `data ingest --name`"
    )


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
