"""The licence of a source reaches the model card through every step between its ingestion and training."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.privacy import scrub
from data_prep.sources import SOURCES
from data_prep.steps.decontaminate import decontaminate
from data_prep.steps.filter import Rules, filter_dataset
from data_prep.steps.mix import Part, mix
from infimed_jax.config import Config, Data
from infimed_jax.data.storage import write_samples
from infimed_jax.runs.history import stage_entry
from tests.data_prep.samples import question

LICENCE = {"vqa_rad": SOURCES["vqa_rad"].licence}


def licences_of(folder: Path) -> dict[str, str]:
    """As a stage that learns from the dataset remembers them."""
    return stage_entry(Config(data=Data(dataset=str(folder))), {})["licences"]


def decontaminated(folder: Path, output: Path) -> None:
    write_samples(folder.with_name("test"), [question(99, "slake", question="Is it another?")], name="slake")
    decontaminate(folder, [folder.with_name("test")], output)


STEPS = {
    "mix": lambda folder, output: mix([Part(folder)], output, 0),
    "filter": lambda folder, output: filter_dataset(folder, output, Rules(min_image_side=0)),
    "decontaminate": decontaminated,
    "scrub": scrub,
}


@pytest.fixture
def ingested(tmp_path) -> Path:
    info = {"source": "vqa_rad", "licence": LICENCE["vqa_rad"]}
    write_samples(tmp_path / "in", [question(i) for i in range(3)], name="vqa_rad", info=info)
    return tmp_path / "in"


@pytest.mark.parametrize("step", STEPS)
def test_a_step_hands_the_licence_on(ingested, tmp_path, step):
    STEPS[step](ingested, tmp_path / "out")
    assert licences_of(ingested) == licences_of(tmp_path / "out") == LICENCE


def test_all_steps_in_a_row_do(ingested, tmp_path):
    folder = ingested
    for step in STEPS:
        STEPS[step](folder, tmp_path / step)
        folder = tmp_path / step
    assert licences_of(folder) == LICENCE
