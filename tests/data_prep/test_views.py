"""Views: chosen samples are the same as copied ones, no image is written twice, and bases are checked."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.privacy.text import scrub
from data_prep.steps.copy import copy_dataset
from data_prep.steps.filter import Rules, filter_dataset
from data_prep.steps.mix import Part, mix
from data_prep.steps.step import make_at_once
from infimed_jax.data.sample import Document
from infimed_jax.data.storage import INDICES, MANIFEST, View, open_samples, write_samples
from infimed_jax.data.training import licences, open_for_training
from infimed_jax.data.views import Choice
from infimed_jax.errors import UserError
from tests.data_prep.samples import damage

IMAGE = np.random.default_rng(0).bytes(50_000)


def base(folder: Path, name: str, count: int, text: str = "words", **info) -> Path:
    samples = [
        Document(f"{name}/train/{n}", name, "train", (IMAGE + bytes([n]),), ((0, said),))
        for n, said in ((n, f"{text} {n} of {name}" if n % 3 else "") for n in range(count))
    ]
    write_samples(folder, samples, name=name, shard_size=16, info=info)
    return folder


@pytest.fixture
def bases(tmp_path) -> list[Path]:
    return [base(tmp_path / "data" / name, name, count) for name, count in (("a", 20), ("b", 15))]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def chain(bases: list[Path], folder: Path) -> Path:
    """filter → mix → mix: a view of views."""
    filter_dataset(bases[0], folder / "filtered", Rules(min_image_side=0))
    mix([Part(folder / "filtered", share=0.8), Part(bases[1])], folder / "mixed", 1)
    mix([Part(folder / "mixed", cap=15)], folder / "again", 2)
    return folder / "again"


def test_a_view_of_views_equals_its_copy_and_names_only_bases_that_hold_shards(bases, tmp_path):
    view = open_samples(chain(bases, tmp_path / "data"))
    report = copy_dataset(view.folder, tmp_path / "copy")
    copied = open_samples(tmp_path / "copy")
    assert isinstance(view, View) and not isinstance(copied, View)
    assert list(view) == list(copied) and len(view) == 15 == report["samples"]
    assert view.fingerprint == copied.fingerprint
    for key in ("samples", "images", "bytes", "kinds", "origins", "name"):
        assert view.manifest[key] == copied.manifest[key]
    assert {entry["folder"] for entry in view.manifest["bases"]} == {"../a", "../b"}
    by_id = {sample.id: sample for folder in bases for sample in open_samples(folder)}
    assert all(by_id[sample.id] == sample for sample in view)
    assert view[-1] == view[len(view) - 1] == list(copied)[-1]
    assert list(pickle.loads(pickle.dumps(view))) == list(view)
    with pytest.raises(IndexError):
        view[15]


def test_a_view_is_what_writing_the_chosen_samples_would_have_made(bases, tmp_path):
    filter_dataset(bases[0], tmp_path / "view", Rules(min_image_side=0))
    kept = [sample for sample in open_samples(bases[0]) if sample.chunks[0][1]]
    assert 0 < len(kept) < 20
    written = write_samples(tmp_path / "written", kept, name="a")
    assert open_samples(tmp_path / "view").manifest["fingerprint"] == written["fingerprint"]


def test_four_mixtures_store_no_image(bases, tmp_path):
    for stage in range(4):
        mix([Part(folder) for folder in bases], tmp_path / "stages" / str(stage), stage)
    assert size(tmp_path / "stages") < len(IMAGE) < size(bases[0]) / 10


def test_what_a_choice_adds_to_meta_travels_and_later_choices_keep_it(bases, tmp_path):
    dataset = open_samples(bases[0])
    marked = [Choice(0, n, *dataset.read(n), {"right_of_draws": f"{n}/9"}) for n in (4, 1, 7)]
    make_at_once(tmp_path / "marked", "marked", {"of": 1}, dataset, marked, {}, view=True)
    mix([Part(tmp_path / "marked"), Part(bases[1])], tmp_path / "mixed", 0)
    mixed = open_samples(tmp_path / "mixed")
    found = {sample.id: sample.meta for sample in mixed if sample.source == "a"}
    assert found == {f"a/train/{n}": {"right_of_draws": f"{n}/9"} for n in (4, 1, 7)}
    again = [Choice(0, n, *mixed.read(n), {"second": "x"}) for n in range(len(mixed))]
    make_at_once(tmp_path / "twice", "twice", {"of": 2}, mixed, again, {}, view=True)
    twice = open_samples(tmp_path / "twice")
    assert list(twice) == [replace(sample, meta=sample.meta | {"second": "x"}) for sample in mixed]
    copy_dataset(tmp_path / "twice", tmp_path / "copy")
    assert open_samples(tmp_path / "copy").fingerprint == twice.fingerprint
    assert list(open_samples(tmp_path / "copy")) == list(twice)


def test_editing_a_manifest_of_a_view_or_its_mark_lifts_no_refusal(tmp_path):
    folder = base(tmp_path / "a", "a", 9, training_allowed=False)
    filter_dataset(folder, tmp_path / "view", Rules(min_image_side=0))
    manifest = json.loads((tmp_path / "view" / MANIFEST).read_text())
    manifest["info"] = {"training_allowed": True}
    (tmp_path / "view" / MANIFEST).write_text(json.dumps(manifest))
    scrub(tmp_path / "view", tmp_path / "scrubbed", "flag")
    copy_dataset(tmp_path / "view", tmp_path / "copy")
    for made in ("view", "scrubbed", "copy"):  # the last two were made after the edit
        with pytest.raises(UserError, match="for evaluation only"):
            open_for_training(tmp_path / made)


def test_licences_are_those_of_the_bases(tmp_path):
    folder = base(tmp_path / "a", "a", 9, source="a", licence="CC-BY-4.0")
    report = mix([Part(folder)], tmp_path / "view", 0)
    assert report["licences"] == {"a": "CC-BY-4.0"}
    manifest = json.loads((tmp_path / "view" / MANIFEST).read_text())
    manifest["info"]["licences"] = {"a": "CC0"}
    (tmp_path / "view" / MANIFEST).write_text(json.dumps(manifest))
    assert licences(tmp_path / "view") == {"a": "CC-BY-4.0"}


def test_bases_that_move_with_their_view_are_followed_and_others_are_named(bases, tmp_path):
    view = chain(bases, tmp_path / "data")
    ids = [sample.id for sample in open_samples(view)]
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    view = tmp_path / "elsewhere" / "again"
    assert [sample.id for sample in open_samples(view)] == ids
    (tmp_path / "elsewhere" / "a").rename(tmp_path / "a")
    with pytest.raises(UserError, match=r"again is a view of \S+elsewhere/a, which is not there: put it back"):
        open_samples(view)
    base(tmp_path / "elsewhere" / "a", "a", 20, "other words")
    with pytest.raises(UserError, match=r"elsewhere/a, which holds other samples by now: make the view again"):
        open_samples(view)
    shutil.rmtree(tmp_path / "elsewhere" / "a")
    base(tmp_path / "elsewhere" / "a", "a", 20)  # the same content, made again
    assert [sample.id for sample in open_samples(view)] == ids


def test_a_view_is_not_written_over_a_base_that_it_would_point_to(bases, tmp_path):
    view = chain(bases, tmp_path / "data")
    for make in (lambda: mix([Part(view)], bases[0], 0), lambda: copy_dataset(view, bases[0])):
        with pytest.raises(UserError, match="choose another output folder"):
            make()
    assert len(open_samples(bases[0])) == 20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "cannot be read"),
        ({"base": [0]}, "cannot be read"),
        ({"base": [0], "number": [0]}, "does not fit"),
        ({"base": [5] * 15, "number": [0] * 15}, "does not fit"),
        ({"base": [0] * 15, "number": [-1] * 15}, "does not fit"),
        ({"base": [0] * 15, "number": [99] * 15}, "samples that its bases lack"),
        ({"base": [0.0] * 15, "number": [0.0] * 15}, "does not fit"),
        ({"base": [0] * 15, "number": [0] * 15, "meta": ["{}"] * 3}, "does not fit"),
        ({"base": [0] * 15, "number": [0] * 15}, "was changed after its manifest.json"),
    ],
)
def test_broken_indices_are_one_line(arrays, message, bases, tmp_path):
    view = chain(bases, tmp_path / "data")
    if arrays is None:
        (view / INDICES).write_bytes(b"no archive")
    else:
        np.savez(view / INDICES, **{key: np.array(value) for key, value in arrays.items()})
    with pytest.raises(UserError, match=message):
        open_samples(view)


@pytest.mark.parametrize("base", [".", "../mixed", "\0", 7, {}])
def test_a_base_that_is_no_dataset_of_its_own_is_one_line(base, bases, tmp_path):
    view = chain(bases, tmp_path / "data")
    manifest = json.loads((view / MANIFEST).read_text())
    entry = base if isinstance(base, dict) else {"folder": base, "fingerprint": manifest["fingerprint"]}
    (view / MANIFEST).write_text(json.dumps(manifest | {"bases": [entry]}))
    with pytest.raises(UserError, match=r"make the view again|put it back"):
        open_samples(view)


def test_damage_in_a_base_is_named_by_the_copy(bases, tmp_path):
    mix([Part(bases[1])], tmp_path / "view", 0)
    damage(bases[1])
    with pytest.raises(UserError, match="1 of 15 records cannot be read"):
        copy_dataset(tmp_path / "view", tmp_path / "copy")
    report = copy_dataset(tmp_path / "view", tmp_path / "copy", max_bad_records=0.1)
    assert report["samples"] == 14 and len(report["unreadable_records"]) == 1
