"""A Sample as the bytes of one record, and back."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from tensorflow_datasets.proto import tf_example_pb2

from infimed_jax.data.sample import Sample, Turn
from infimed_jax.errors import UserError

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
TEXT_FIELDS = ("id", "source", "split", "kind", "question", "answer")


def check_sample(sample: Sample) -> None:
    """UserError where a sample contradicts itself: no id or turns, an image index without an image, misplaced roles."""
    if not sample.id:
        raise UserError(f"a sample of source {sample.source!r} has no id")
    if not sample.turns:
        raise UserError(f"sample {sample.id}: no turns")
    for turn in sample.turns:
        if (turn.role == "document") != (sample.kind == "document"):
            raise UserError(f"sample {sample.id}: a {sample.kind} sample cannot have a turn of role {turn.role}")
        if turn.reasoning and turn.role != "assistant":
            raise UserError(f"sample {sample.id}: only assistant turns may have reasoning")
        for piece in turn.content:
            if not isinstance(piece, str) and not 0 <= piece < len(sample.images):
                raise UserError(f"sample {sample.id}: image index {piece}, but it has {len(sample.images)} images")


def to_record(sample: Sample) -> bytes:
    """A tf.train.Example. Its fields are in the order of their names: equal samples are equal bytes."""
    example = tf_example_pb2.Example()
    features = example.features.feature
    try:
        for field in TEXT_FIELDS:
            features[field].bytes_list.value.append(getattr(sample, field).encode())
        features["turns"].bytes_list.value.append(_to_json([vars(turn) for turn in sample.turns]).encode())
        features["meta"].bytes_list.value.append(_to_json(sample.meta).encode())
        features["options"].bytes_list.value.extend([option.encode() for option in sample.options])
    except UnicodeEncodeError as error:
        raise UserError(f"sample {sample.id!r} holds text that is not Unicode: {error.reason}") from error
    features["images"].bytes_list.value.extend(sample.images)
    return example.SerializeToString(deterministic=True)


def from_record(record: bytes) -> Sample:
    features = tf_example_pb2.Example.FromString(record).features.feature

    def one(key: str) -> str:
        (value,) = features[key].bytes_list.value
        return value.decode()

    turns = tuple(Turn(t["role"], tuple(t["content"]), t["reasoning"]) for t in json.loads(one("turns")))
    return Sample(
        **{field: one(field) for field in TEXT_FIELDS},
        images=tuple(features["images"].bytes_list.value),
        turns=turns,
        options=tuple(option.decode() for option in features["options"].bytes_list.value),
        meta=json.loads(one("meta")),
    )


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
            raise UserError(f"sample id {sample.id!r} occurs twice: ids must be unique in a dataset")
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
