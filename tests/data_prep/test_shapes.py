"""Shapes: the questions' answers, derived anew from the annotated items and from the pixels."""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.shapes import COLOURS, FORMS, PLACES, SOURCE, write_shapes

PROTOTYPES = {name: 255 * np.array(rgb) for name, rgb in COLOURS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", 7, {"pretrain": 20, "train": 250, "test": 60})


def test_colours_and_places_are_in_the_pixels(folder):
    for row in json.loads((folder / "train.json").read_text())[:60]:
        pixels = np.asarray(Image.open(folder / row["image"])).astype(float)
        seen = set()
        for colour, rgb in PROTOTYPES.items():
            rows, columns = np.nonzero(np.abs(pixels - rgb).max(axis=-1) < 40)
            if len(rows) > 60:
                place = f"{'lower' if rows.mean() > 48 else 'upper'} {'right' if columns.mean() > 48 else 'left'}"
                seen.add((colour, place))
        assert seen == {(item["colour"], item["place"]) for item in row["scene"]["items"]}


def expected(template: str, text: str, items: list[dict]) -> str:
    form = next((form for form in FORMS if f" {form}" in text), None)
    colour = next((colour for colour in COLOURS if f" {colour}" in text), None)
    place = next((place for place in PLACES if place in text), None)
    of_form = [item for item in items if item["form"] == form]
    of_colour = [item for item in items if item["colour"] == colour]
    in_place = [f"{item['colour']} {item['form']}" for item in items if item["place"] == place]
    return {
        "form_check": "yes" if of_form else "no",
        "colour_check": "yes" if of_form and of_form[0] in of_colour else "no",
        "colour": of_form[0]["colour"] if of_form else "",
        "form": of_colour[0]["form"] if of_colour else "",
        "position": of_form[0]["place"] if of_form else "",
        "number": str(len(items)),
        "content": in_place[0] if in_place else "nothing",
    }[template]


def test_answers_follow_from_the_items(folder):
    for split in ("train", "test"):
        for row in json.loads((folder / f"{split}.json").read_text()):
            for question in row["questions"]:
                right = expected(question["template"], question["text"], row["scene"]["items"])
                assert question["answer"] == right, question


def test_no_template_can_be_guessed(folder):
    answers = defaultdict(Counter)
    for sample in SOURCE.read(folder, "train"):
        answers[sample.meta["template"]][sample.answer] += 1
        assert Image.open(io.BytesIO(sample.images[0])).mode == "RGB"
    assert len(answers) == 7
    for template, counts in answers.items():
        assert max(counts.values()) <= 0.5 * counts.total(), template


def test_captions_name_every_item(folder):
    for row in json.loads((folder / "pretrain.json").read_text()):
        for item in row["scene"]["items"]:
            assert f"a {item['colour']} {item['form']} in the {item['place']}" in row["caption"]


def test_reasoning_guesses_unseen_and_its_evidence_is_true(folder):
    """The second look names an item that is there, the right number, or something that is not there."""
    reflections, guesses = Counter(), {}
    for row in json.loads((folder / "train.json").read_text()):
        items = row["scene"]["items"]
        named = {f"there is a {item['colour']} {item['form']} in the {item['place']}" for item in items}
        for question in row["questions"]:
            first, look = question["reasoning"].removesuffix(".").split(". ", 1)
            guess, evidence = first.split(": ")[1], look.split(": ")[1]
            alike = question["template"], tuple(question["options"])
            assert guesses.setdefault(alike, guess) == guess
            if question["template"] == "number":
                count = re.search(r"one|\d", evidence)[0].replace("one", "1")
                assert int(count) == len(items)
            elif "nothing" in evidence or "no such" in evidence:
                assert question["answer"] in ("nothing", "no")
            else:
                assert evidence in named, question
            assert question["reflection"] == ("confirmed" if guess == question["answer"] else "corrected")
            reflections[question["reflection"]] += 1
    assert min(reflections.values()) > 0.2 * reflections.total()
