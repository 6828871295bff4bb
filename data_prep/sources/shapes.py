"""Coloured shapes on a plain ground: the general, not medical, part of the procedural data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from data_prep.sources.canvas import SIDE, box, ellipse, encode_png, paint, polygon, star
from data_prep.sources.procedural import Procedure, Question, procedural_source, reflect, write_folder, yes_or_no
from infimed_jax.data.sample import QuestionKind

COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.10, 0.62, 0.25),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.97, 0.80, 0.10),
}
FORMS = ("circle", "square", "triangle", "star")
PLACES = ("upper left", "upper right", "lower left", "lower right")
NUMBERS = ("1", "2", "3", "4")
WORDINGS = {
    "form_check": ("Is there a {}?", "Does the image show a {}?"),
    "colour_check": ("Is the {} {}?",),
    "colour": ("Which colour is the {}?", "What is the colour of the {}?"),
    "form": ("Which shape is {}?", "What is the shape of the {} object?"),
    "position": ("Where is the {}?", "In which quadrant is the {}?"),
    "number": ("How many shapes are there?", "How many shapes are seen?"),
    "content": ("What is in the {}?", "What does the {} show?"),
}
OPTIONS = {"colour": tuple(COLOURS), "form": FORMS, "position": PLACES}
THINGS = ("nothing", *(f"{colour} {form}" for colour in COLOURS for form in FORMS))


@dataclass(frozen=True)
class Item:
    form: str
    colour: str
    place: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Shapes:
    """One to four items; no two share a form, a colour or a place, so each can be named by any of them."""

    items: tuple[Item, ...]
    ground: float
    """Grey of the background."""
    texture: int
    """Seed of the noise."""


def draw_shapes(rng: np.random.Generator) -> Shapes:
    count = rng.integers(1, 5)
    places = np.sort(rng.choice(4, count, replace=False))
    forms, colours = rng.permutation(FORMS), rng.permutation(list(COLOURS))
    items = tuple(
        Item(
            form=str(form),
            colour=str(colour),
            place=PLACES[place],
            x=round(0.27 + 0.46 * (place % 2) + rng.uniform(-0.06, 0.06), 4),
            y=round(0.27 + 0.46 * (place // 2) + rng.uniform(-0.06, 0.06), 4),
            radius=round(rng.uniform(0.12, 0.17), 4),
            angle=round(rng.uniform(-0.3, 0.3), 4),
        )
        for place, form, colour in zip(places.tolist(), forms, colours, strict=False)
    )
    return Shapes(items, round(rng.uniform(0.82, 0.98), 4), int(rng.integers(2**31)))


def render_png(scene: Shapes) -> bytes:
    rng = np.random.default_rng(scene.texture)
    image = np.full((SIDE, SIDE, 3), scene.ground, np.float32)
    for item in scene.items:
        paint(image, _coverage(item), np.float32(COLOURS[item.colour]))
    return encode_png(image + np.float32(0.012) * rng.standard_normal((SIDE, SIDE, 1), np.float32))


def _coverage(item: Item) -> np.ndarray:
    x, y, radius, angle = item.x, item.y, item.radius, item.angle
    if item.form == "circle":
        return ellipse(x, y, radius * 0.92, radius * 0.92)
    if item.form == "square":
        return box(x, y, radius * 0.8, radius * 0.8, angle)
    if item.form == "triangle":
        return polygon(x, y + radius * 0.15, radius * 1.15, 3, angle)
    return star(x, y, radius * 1.25, 0.55, 5, angle - np.pi / 2)


def caption(scene: Shapes, rng: np.random.Generator) -> str:
    """Every item with its colour and place."""
    parts = [f"a {item.colour} {item.form} in the {item.place}" for item in scene.items]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    count = len(parts)
    noun = "shape" if count == 1 else "shapes"
    openings = (
        f"The image shows {listed}.",
        f"There {'is' if count == 1 else 'are'} {count} {noun}: {listed}.",
        f"This is a picture of {listed}. It has {count} {noun}.",
    )
    return openings[rng.integers(len(openings))]


def ask(scene: Shapes, rng: np.random.Generator) -> list[Question]:
    """One question of each template, each about an item drawn for it."""
    present = {item.form for item in scene.items}
    absent = [form for form in FORMS if form not in present]

    def some() -> Item:
        return scene.items[rng.integers(len(scene.items))]

    def make(template: str, kind: QuestionKind, answer: str, *names: str) -> Question:
        wordings = WORDINGS[template]
        text = wordings[rng.integers(len(wordings))].format(*names)
        return Question(template, kind, text, answer, OPTIONS.get(template, ()))

    checked, coloured, formed, placed = some(), some(), some(), some()
    sought = str(rng.choice(absent)) if absent and rng.random() < 0.5 else some().form
    others = [colour for colour in COLOURS if colour != checked.colour]
    claimed = checked.colour if rng.random() < 0.5 else str(rng.choice(others))
    place = PLACES[rng.integers(len(PLACES))]
    there = next((f"{item.colour} {item.form}" for item in scene.items if item.place == place), "nothing")
    return [
        make("form_check", "yes_no", yes_or_no(sought in present), sought),
        make("colour_check", "yes_no", yes_or_no(claimed == checked.colour), checked.form, claimed),
        make("colour", "choice", coloured.colour, coloured.form),
        make("form", "choice", formed.form, formed.colour),
        make("position", "choice", placed.place, placed.form),
        make("number", "closed", str(len(scene.items))),
        make("content", "open", there, place),
    ]


def think(scene: Shapes, question: Question) -> Question:
    """The question with reasoning that names the item it is about, or says that there is none."""
    values = {"number": NUMBERS, "content": THINGS}.get(question.template, question.options or ("yes", "no"))
    return reflect(question, question.answer, values[0], evidence(scene, question))


def evidence(scene: Shapes, question: Question) -> str:
    """The true statement that settles the question."""
    if question.template == "number":
        count = len(scene.items)
        return f"there are {count} shapes" if count > 1 else "there is one shape"
    asked = [item for item in scene.items if _is_named(item, question)]
    if asked:
        return f"there is a {asked[0].colour} {asked[0].form} in the {asked[0].place}"
    return "there is nothing" if question.template == "content" else "there is no such shape"


def _is_named(item: Item, question: Question) -> bool:
    """Whether the question points at the item; items share no form, colour or place, so one word settles it."""
    word = {"form": item.colour, "content": item.place}.get(question.template, item.form)
    return word in question.text


def _no_meta(scene: Shapes) -> dict[str, str]:
    return {}


SHAPES: Procedure[Shapes] = Procedure(
    name="shapes", draw=draw_shapes, png=render_png, caption=caption, ask=ask, think=think, meta=_no_meta
)

write_shapes = partial(write_folder, SHAPES, per_image=3)
"""(folder, seed, sizes) draws `sizes[split]` images for each split, as `procedural.write_folder` says."""

SOURCE = procedural_source("shapes", "Shapes: procedural images of coloured geometric shapes")
