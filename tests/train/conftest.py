"""A model of a few thousand parameters, a handful of samples and a tokenizer: a whole stage in seconds."""

import dataclasses
from pathlib import Path

import pytest

from data_prep.tokenizer import make_tokenizer
from infimed_jax.config import Config, Data, Optimizer, Train
from infimed_jax.data.sample import Chat, Document, Sample, Turn
from infimed_jax.data.storage import write_samples
from infimed_jax.models.infimed.config import Model, Projector
from tests import tiny

MODEL = tiny.model(visual_tokens=16)


@pytest.fixture
def model() -> Model:
    return MODEL


def _samples(kind: str, count: int) -> list[Sample]:
    answers = ("yes", "no", "left lung", "the heart is large")
    samples = []
    for number in range(count):
        answer, image = answers[number % 4], tiny.png(number)
        if kind == "document":
            chunk = (0, "\n", f"image {number}: {answer}")
            samples.append(Document(f"toy/train/{number}", "toy", "train", (image,), (chunk,)))
        else:
            reasoning = f"Wait. I see {number}, so {answer}." if kind == "reasoning" else ""
            turns = (Turn("user", (0, f"\nwhat is {number}?")), Turn("assistant", (answer,), reasoning))
            samples.append(Chat(f"toy/train/{number}", "toy", "train", (image,), turns))
    return samples


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["what is the heart? the heart is large", "left lung: yes no", "Wait. I see so image"] * 3
    return make_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=330)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    """`dataset(kind, count)` is the folder of a prepared dataset of `document`, `question` or `reasoning` samples."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str = "question", count: int = 12) -> Path:
        if (kind, count) not in made:
            made[kind, count] = tmp_path_factory.mktemp(kind) / "dataset"
            write_samples(made[kind, count], _samples(kind, count), name="toy")
        return made[kind, count]

    return make


@pytest.fixture
def stage(dataset, tokenizer_folder: Path, tmp_path: Path):
    """`stage(**settings)`: a Config; settings are fields of Train, or `kind`, `count`, `visual_tokens`, `rate`."""

    def make(
        *, kind: str = "question", count: int = 12, visual_tokens: int = 16, rate: float = 3e-3, **train
    ) -> Config:
        options = {
            "global_batch": 2,
            "steps": 7,
            "checkpoint_every": 3,
            "compute_dtype": "float32",
            "remat": "none",
            "logit_chunk": 64,
            "output": str(tmp_path / "run"),
        }
        return Config(
            model=dataclasses.replace(MODEL, projector=Projector(visual_tokens)),
            data=Data(dataset=str(dataset(kind, count)), tokenizer=str(tokenizer_folder), context=64, images_per_row=2),
            optimizer=Optimizer(learning_rate=rate),
            train=Train(**options | train),
        )

    return make
