"""What the procedural sources share: questions balanced so that blind guessing fails, and their folder of plain files.

A folder holds `images/*.png`, one `SPLIT.json` a split (a list of `{image, scene, caption, questions}`) and
`recipe.json`, which says how it was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import joblib
import numpy as np

from data_prep.reading.faults import Unusable
from data_prep.reading.files import Images
from data_prep.reading.rows import read_json, read_rows
from data_prep.sources.source import Source
from infimed_jax.data import sample as samples
from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Chat, Document, QuestionKind, Sample, Skipped, Turn
from infimed_jax.errors import UserError
from infimed_jax.files import to_json, whole_folder

SceneT = TypeVar("SceneT")

SPLITS = ("pretrain", "train", "reflective", "rl", "test", "alignment")
"""`pretrain` holds captions as documents, `alignment` captions that a user asks for, `reflective` questions with
reasoning, the others plain questions. No image is shared."""
CAPTIONED = ("pretrain", "alignment")
_PIECE = 400
"""Images that one process draws at a time, about a second of work."""
RECIPE = "recipe.json"
VERSION = 5
"""Version of the drawings and wordings; raise it when they change, so that old folders are not taken for new ones."""


@dataclass(frozen=True)
class Question:
    template: str
    kind: QuestionKind
    text: str
    answer: str
    """`yes`/`no`, the text, or (in a choice) the right option's text."""
    options: tuple[str, ...] = ()
    reasoning: str = ""
    reflection: str = ""
    """`corrected` or `confirmed`: what the reasoning's second look does to its first guess."""

    @property
    def letter(self) -> str:
        """Letter of a choice's right option."""
        return LETTERS[self.options.index(self.answer)]


def yes_or_no(truth: bool) -> str:
    return "yes" if truth else "no"


def reflect(question: Question, answer: str, guess: str, evidence: str) -> Question:
    """The question with its reasoning, and in `reflection` whether the first guess was corrected or confirmed.

    The reasoning is a guess without the image, then a second look at it. The guess is the same for every image, so it
    is right only by chance and does not reveal the answer. `answer` is what is guessed, `evidence` the true statement
    that settles it, without a full stop.
    """
    reasoning = f"At first glance: {guess}. Wait, let me look again: {evidence}."
    return replace(question, reasoning=reasoning, reflection="confirmed" if guess == answer else "corrected")


@dataclass(frozen=True)
class Procedure(Generic[SceneT]):
    """How one procedural source makes an image and what belongs to it; every function is pure."""

    name: str
    draw: Callable[[np.random.Generator], SceneT]
    png: Callable[[SceneT], bytes]
    caption: Callable[[SceneT, np.random.Generator], str]
    ask: Callable[[SceneT, np.random.Generator], list[Question]]
    """One question of each template that fits the scene."""
    think: Callable[[SceneT, Question], Question]
    """The question with reasoning."""
    meta: Callable[[SceneT], dict[str, str]]


def write_folder(
    procedure: Procedure, folder: str | Path, seed: int, sizes: Mapping[str, int], per_image: int = 4
) -> Path:
    """Draw `sizes[split]` images for each split and write the folder, whole or not at all.

    The same arguments give the same bytes. `per_image` bounds the questions of an image; balancing removes some. A
    folder of the same recipe is kept as it is.
    UserError: an unknown split, or the folder holds something else.
    """
    for split in sizes:
        if split not in SPLITS:
            raise UserError(f"{procedure.name} has no split {split!r}: its splits are {', '.join(SPLITS)}")
    folder = Path(folder)
    recipe = {"source": procedure.name, "version": VERSION, "seed": seed, "sizes": dict(sizes), "per_image": per_image}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / RECIPE).is_file() and read_json(folder / RECIPE, dict) == recipe:
            return folder
        raise UserError(f"{folder} holds other files than {procedure.name} images of seed {seed}: remove it")
    with whole_folder(folder) as part:
        (part / "images").mkdir()
        for split, count in sizes.items():
            _write_split(procedure, part, seed, split, count, per_image)
        (part / RECIPE).write_text(to_json(recipe, indent=2) + "\n", encoding="utf-8")
    return folder


def _write_split(procedure: Procedure, folder: Path, seed: int, split: str, count: int, per_image: int) -> None:
    stream = SPLITS.index(split)
    pieces = [range(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
    drawn = joblib.Parallel(n_jobs=-1 if len(pieces) > 1 else 1)(
        joblib.delayed(_draw)(procedure, folder / "images", [seed, stream], split, piece, per_image) for piece in pieces
    )
    scenes, captions, asked = ([entry[k] for piece in drawn for entry in piece] for k in range(3))
    rng = np.random.default_rng([seed, stream, count, 1])
    records = []
    for number, questions in enumerate(balance(asked, rng)):
        questions = [procedure.think(scenes[number], question) for question in questions]
        record = {
            "image": f"images/{split}_{number:06d}.png",
            "meta": procedure.meta(scenes[number]),
            "scene": asdict(scenes[number]),
            "caption": captions[number],
            "questions": [asdict(question) for question in questions],
        }
        records.append(to_json(record, ensure_ascii=False))
    (folder / f"{split}.json").write_text("[\n" + ",\n".join(records) + "\n]\n", encoding="utf-8")


def _draw(
    procedure: Procedure[SceneT], folder: Path, key: Sequence[int], split: str, numbers: Iterable[int], per_image: int
) -> list[tuple[SceneT, str, list[Question]]]:
    """Draw the images of these numbers: scene, caption and questions of each."""
    drawn = []
    for number in numbers:
        rng = np.random.default_rng([*key, number])  # a longer split starts with the same images
        scene = procedure.draw(rng)
        (folder / f"{split}_{number:06d}.png").write_bytes(procedure.png(scene))
        caption = procedure.caption(scene, rng)
        questions = procedure.ask(scene, rng) if split not in CAPTIONED else []
        drawn.append((scene, caption, [questions[i] for i in rng.permutation(len(questions))[:per_image]]))
    return drawn


def balance(asked: Sequence[Sequence[Question]], rng: np.random.Generator) -> list[list[Question]]:
    """The questions of each image, thinned so that within a template every answer is equally frequent.

    Options stand in a fixed order, so letters are as balanced as answers. Open questions stay as they are.
    """
    places: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for image, questions in enumerate(asked):
        for number, question in enumerate(questions):
            places[question.template][question.answer].append((image, number))
    kept: dict[tuple[int, int], Question] = {}
    for by_answer in places.values():
        is_open = any(asked[i][j].kind == "open" for group in by_answer.values() for i, j in group)
        # a template with one answer can be answered without the image
        size = min(map(len, by_answer.values())) if len(by_answer) > 1 else 0
        for answer in sorted(by_answer):
            group = by_answer[answer]
            for image, number in group if is_open else [group[i] for i in rng.permutation(len(group))[:size]]:
                kept[image, number] = asked[image][number]
    return [[kept[i, j] for j in range(len(asked[i])) if (i, j) in kept] for i in range(len(asked))]


def read_folder(name: str, folder: Path, split: str) -> Iterator[Sample | Skipped]:
    """The samples of a split: one caption or several questions an image. UserError: the folder is unusable."""
    images = Images(folder)
    for number, row in enumerate(read_rows(folder / f"{split}.json")):
        id = f"{name}/{split}/{number:06d}"
        try:
            image_name, caption, questions = row["image"], row["caption"], [_question(q) for q in row["questions"]]
            meta = {**row["meta"], "language": "en", "image_id": f"{name}/{split}/{number:06d}"}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / f'{split}.json'}: entry {number} is incomplete ({error})") from error
        try:
            image = images.read(image_name)
        except Unusable as fault:
            yield Skipped(id, fault.reason, fault.detail)
            continue
        if split == "pretrain":
            chunk = (0, "\n" + caption)
            yield Document(id, name, split, (image,), (chunk,), meta=meta | {"template": "caption"})
        elif split == "alignment":
            turns = (Turn("user", (0, "\nDescribe this image.")), Turn("assistant", (caption,)))
            yield Chat(id, name, split, (image,), turns, meta=meta | {"template": "caption"})
        else:
            for q, question in enumerate(questions):
                yield _sample(f"{id}-{q}", name, split, image, question, meta)


def procedural_source(name: str, title: str) -> Source:
    """The source of a folder that `write_NAME` of its module draws."""
    return Source(
        name=name,
        title=title,
        licence="Apache-2.0",
        commercial_use=True,
        allow_external_api=True,
        splits=SPLITS,
        layout="images/*.png, SPLIT.json for each split",
        obtain=f"data_prep.sources.{name}.write_{name}(folder, seed, sizes) draws them",
        read=partial(read_folder, name),
    )


def _question(values: dict[str, Any]) -> Question:
    return Question(**{**values, "options": tuple(values["options"])})


def _sample(id: str, name: str, split: str, image: bytes, question: Question, meta: dict[str, str]) -> Sample:
    reflective = split == "reflective"
    return samples.Question(
        id=id,
        source=name,
        split=split,
        images=(image,),
        kind=question.kind,
        question=question.text,
        answer=question.letter if question.options else question.answer,
        options=question.options,
        reasoning=question.reasoning if reflective else "",
        meta=meta | {"template": question.template} | ({"reflection": question.reflection} if reflective else {}),
    )
