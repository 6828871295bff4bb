"""Where a step may write: never over what it reads, nor over what is not its own; and what damage ends it."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from data_prep.privacy import scrub
from data_prep.steps.decontaminate import decontaminate
from data_prep.steps.filter import Rules, filter_dataset
from data_prep.steps.ingest import ingest
from data_prep.steps.mix import Part, mix
from data_prep.steps.step import refuse_damage, refuse_other_files
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import damage, question

STEPS = {
    "filter": lambda folder, other, output, **more: filter_dataset(folder, output, Rules(min_image_side=0), **more),
    "scrub": lambda folder, other, output, **more: scrub(folder, output, **more),
    "decontaminate": lambda folder, other, output, **more: decontaminate(folder, [other], output, **more),
    "mix": lambda folder, other, output, **more: mix([Part(folder), Part(other)], output, 0, **more),
}


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    write_samples(tmp_path / "in", [question(i) for i in range(4)], name="toy")
    write_samples(tmp_path / "other", [question(i, question=f"What of {i}?") for i in range(8, 10)], name="toy")
    return tmp_path / "in", tmp_path / "other"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("place", ["in", "in/deeper", "in/../in", "link/../in", "link/deeper"])
def test_no_step_writes_over_what_it_reads(folders, tmp_path, step, place):
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "in.json").write_text("the report of the step before")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="over what is read"):
        STEPS[step](*folders, tmp_path / place)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("step", ["decontaminate", "mix"])
def test_nor_over_its_second_input(folders, tmp_path, step):
    before = tree(tmp_path)
    with pytest.raises(UserError, match="over what is read"):
        STEPS[step](*folders, folders[1])
    assert tree(tmp_path) == before


def test_nor_around_it(folders, tmp_path):
    inner = folders[0] / "inner"
    write_samples(inner, [question(7)], name="toy")
    with pytest.raises(UserError, match="over what is read"):
        filter_dataset(inner, folders[0], Rules(min_image_side=0))
    assert len(open_samples(inner)) == 1 and len(open_samples(folders[0])) == 4


def test_a_report_takes_no_other_files_place(folders, tmp_path):
    mine = '[{"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]'
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "train.json").write_text(mine)
    with pytest.raises(UserError, match=r"raw/train\.json.* is another file"):
        filter_dataset(folders[0], raw / "train", Rules(min_image_side=0))
    for inside in (raw, raw / "prepared"):  # it would be read as input by the next run
        with pytest.raises(UserError, match="would be written over what is read"):
            ingest("llava_json", raw, inside, ["train"])
    assert (raw / "train.json").read_text() == mine and sorted(raw.iterdir()) == [raw / "train.json"]
    report = filter_dataset(folders[0], tmp_path / "out", Rules(min_image_side=0))
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    (tmp_path / "out").rmdir()
    assert (
        filter_dataset(folders[0], tmp_path / "out", Rules(min_image_side=0)) == report
    )  # its own report is no other file


def test_a_link_is_no_output(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for place in ("elsewhere", "in", "nowhere"):
        link = tmp_path / f"to_{place}"
        link.symlink_to(place)
        with pytest.raises(UserError, match=f"is a link: give the folder itself, such as .*{place}"):
            filter_dataset(folders[0], link, Rules(min_image_side=0))
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / ".to_elsewhere.new").exists()


@pytest.mark.parametrize("output", ["", ".", "/", "x/.."])
def test_an_output_needs_a_name(output):
    with pytest.raises(UserError, match="no name of its own"):
        refuse_other_files(Path(output))


@pytest.mark.parametrize("step", STEPS)
def test_more_damage_than_is_allowed_ends_every_step_until_it_is_mended(folders, tmp_path, step):
    (shard,) = folders[0].glob("*.array_record*")
    whole = shard.read_bytes()
    damage(folders[0])
    records = 6 if step == "mix" else 4
    with pytest.raises(
        UserError, match=rf"1 of {records} records .*toy record 0 first.*--max-bad-records 0\.01 allows"
    ):
        STEPS[step](*folders, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.new").exists()
    report = STEPS[step](*folders, tmp_path / "allowed", max_bad_records=0.25)
    assert report["samples"] == records - 1 and report["unreadable_records"] == ["toy record 0"]
    shard.write_bytes(whole)  # copied again: nothing of the first try is left
    assert STEPS[step](*folders, tmp_path / "out")["samples"] == records


def test_the_share_of_damage_is_exact_and_a_share():
    names = [f"toy record {number}" for number in range(3)]
    refuse_damage(names, 300)
    refuse_damage([], 0)
    with pytest.raises(UserError, match=r"3 of 299 records cannot be read \(toy record 0 first\)"):
        refuse_damage(names, 299)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\], not 1.5"):
        refuse_damage(names, 300, 1.5)


def test_a_second_run_waits_for_none_and_spoils_nothing(folders, tmp_path):
    """Two at once: the second is told, in whatever step, and the first goes on."""
    (source, _), output = folders, tmp_path / "out"
    told = []

    def meanwhile(*_: int) -> None:
        with pytest.raises(UserError, match=r"another run is writing .*out: wait for it") as error:
            filter_dataset(source, output, Rules(min_image_side=1))
        told.append(error)

    report = filter_dataset(source, output, Rules(min_image_side=0), on_progress=meanwhile)
    assert told and list(open_samples(output)) == list(open_samples(source))
    assert filter_dataset(source, output, Rules(min_image_side=0)) == report
    assert filter_dataset(source, output, Rules(min_image_side=1))["rules"]["min_image_side"] == 1  # it is free again


def test_without_locks_a_step_runs_all_the_same(folders, tmp_path, monkeypatch):
    def refused(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert filter_dataset(folders[0], tmp_path / "out", Rules(min_image_side=0))["samples"] == 4
