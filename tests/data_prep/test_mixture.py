"""Mixing: the right number of each part, once each, in an order that only the seed decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.mixture import Part, mix
from infimed_jax.data.sample import Sample, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError


def dataset(folder: Path, source: str, count: int, split: str = "train") -> Path:
    samples = [
        Sample(f"{source}/{split}/{i}", source, split, "document", (), (Turn("document", (f"{source} {i}",)),))
        for i in range(count)
    ]
    write_samples(folder, samples, name=source)
    return folder


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return [dataset(tmp_path / "a", "phantom", 40), dataset(tmp_path / "b", "mine", 30)]


def ids(folder: Path) -> list[str]:
    return [sample.id for sample in open_samples(folder)]


def test_all_of_all_parts_once(parts, tmp_path):
    report = mix([Part(folder) for folder in parts], tmp_path / "mix", 0)
    mixed = ids(tmp_path / "mix")
    assert sorted(mixed) == sorted(ids(parts[0]) + ids(parts[1]))
    assert mixed != sorted(mixed)
    assert report["samples"] == 70 and [row["taken"] for row in report["parts"]] == [40, 30]
    assert report["licences"] == {"mine": "unknown", "phantom": "Apache-2.0"}
    assert json.loads((tmp_path / "mix.json").read_text()) == report
    assert next(iter(open_samples(tmp_path / "mix"))) in [*open_samples(parts[0]), *open_samples(parts[1])]


def test_share_and_cap(parts, tmp_path):
    report = mix([Part(parts[0], share=0.5), Part(parts[1], share=0.9, cap=7)], tmp_path / "mix", 0)
    counts = Counter(id.split("/")[0] for id in ids(tmp_path / "mix"))
    assert counts == {"phantom": 20, "mine": 7}
    assert [(row["share"], row["cap"], row["taken"], row["samples"]) for row in report["parts"]] == [
        (0.5, 0, 20, 40),
        (0.9, 7, 7, 30),
    ]
    mix([Part(parts[0], share=0.75), Part(parts[1], cap=9)], tmp_path / "more", 0)
    assert set(ids(tmp_path / "mix")) <= set(ids(tmp_path / "more"))


def test_the_seed_decides_the_order_and_the_draw(parts, tmp_path):
    specs = [Part(parts[0], share=0.5), Part(parts[1])]
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        mix(specs, tmp_path / name, seed)
    one, again, two = (ids(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again
    assert one != two and set(one) != set(two)


def test_a_mixture_is_made_once_and_anew_when_its_recipe_changes(parts, tmp_path):
    out = tmp_path / "mix"
    mix([Part(parts[0])], out, 0)
    made = (out / "manifest.json").stat().st_mtime_ns
    mix([Part(parts[0])], out, 0)
    assert (out / "manifest.json").stat().st_mtime_ns == made
    mix([Part(parts[0], cap=5)], out, 0)
    assert len(ids(out)) == 5


def test_an_id_twice_is_refused_and_leaves_nothing(parts, tmp_path):
    with pytest.raises(UserError, match="occurs twice"):
        mix([Part(parts[0]), Part(parts[0])], tmp_path / "mix", 0)
    assert not (tmp_path / "mix").exists() and not (tmp_path / "mix.json").exists()


def test_user_errors(parts, tmp_path):
    with pytest.raises(UserError, match="at least one part"):
        mix([], tmp_path / "mix", 0)
    with pytest.raises(UserError, match=r"share of .* must lie in \(0, 1\], not 2"):
        Part(parts[0], share=2)
    with pytest.raises(UserError, match="cap of"):
        Part(parts[0], cap=-1)
    with pytest.raises(UserError, match="no prepared dataset"):
        mix([Part(tmp_path / "nowhere")], tmp_path / "mix", 0)


def test_a_corrupt_record_stops_the_mixture(parts, tmp_path):
    (shard,) = parts[0].glob("*array_record*")
    data = bytearray(shard.read_bytes())
    records = slice(1000, 6000)  # in a file that is mostly padding
    data[records] = bytes(records.stop - records.start)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read.*prepare that dataset again"):
        mix([Part(folder) for folder in parts], tmp_path / "mix", 0)
    assert not (tmp_path / "mix").exists()
