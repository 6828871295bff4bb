"""Phantoms: what the annotations say is what the pixels show, and blind guessing stays where it should."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data_prep.sources.phantom import SOURCE, write_phantom
from data_prep.sources.phantom.captions import caption
from data_prep.sources.phantom.questions import ask
from data_prep.sources.phantom.reasoning import think
from data_prep.sources.phantom.render import render
from data_prep.sources.phantom.scene import RADIUS, Lesion, Scene, draw_scene
from data_prep.sources.procedural import SPLITS
from infimed_jax.data.prompts import as_turns
from infimed_jax.data.sample import Sample, Skipped
from infimed_jax.errors import UserError

SIZES = {"pretrain": 30, "train": 400, "reflective": 120, "rl": 30, "test": 200, "alignment": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "data", 7, SIZES)


def scenes(count: int) -> list[Scene]:
    return [draw_scene(np.random.default_rng([99, i])) for i in range(count)]


def read_from_pixels(scene: Scene) -> list[tuple[str, str, float]]:
    """(quadrant, intensity, half of the larger extent) of each lesion, from the image against its lesion-free twin."""
    changed = render(scene) - render(replace(scene, lesions=()))
    changed = changed.mean(axis=-1) if changed.ndim == 3 else changed
    strong = ndimage.binary_closing(np.abs(changed) > 0.08, iterations=1)
    labels, count = ndimage.label(strong, structure=np.ones((3, 3)))
    found = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(labels == number)
        if len(rows) < 8:  # grain, not a lesion
            continue
        y, x = (rows.mean() + 0.5) / 96, (columns.mean() + 0.5) / 96
        quadrant = f"{'lower' if y > 0.5 else 'upper'} {'right' if x > 0.5 else 'left'}"
        bright = changed[labels == number].sum() > 0
        spread = np.hypot(rows - rows.mean(), columns - columns.mean()).max() / 96
        found.append((quadrant, "bright" if bright else "dark", spread))
    return sorted(found)


def test_lesions_in_the_pixels_are_those_of_the_scene():
    for scene in scenes(150):
        found = read_from_pixels(scene)
        assert [f[0] for f in found] == sorted(lesion.quadrant for lesion in scene.lesions), scene
        assert {f[1] for f in found} <= {scene.intensity}, scene


def test_size_and_shape_show_in_the_pixels():
    """Same lesion, other attribute: a large one covers at least twice a small one; the shapes differ as named."""
    base = replace(
        next(s for s in scenes(50) if s.organ == "kidney" and s.modality == "X-ray"), lesions=(Lesion(0.3, 0.35, 0.4),)
    )

    def mask(size: str, shape: str) -> np.ndarray:
        scene = replace(base, size=size, shape=shape, intensity="bright")
        return np.abs(render(scene) - render(replace(scene, lesions=()))) > 0.2

    for shape in ("round", "oval", "irregular", "ring-shaped"):
        assert mask("large", shape).sum() > 2 * mask("small", shape).sum()
    for size in RADIUS:
        centre = int(0.35 * 96), int(0.3 * 96)
        assert mask(size, "round")[centre] and not mask(size, "ring-shaped")[centre]

        def elongation(shape: str, size: str = size) -> float:
            spread = np.linalg.eigvalsh(np.cov(np.stack(np.nonzero(mask(size, shape)))))
            return float(np.sqrt(spread[1] / spread[0]))

        assert elongation("oval") > 1.5 > 1.15 > elongation("round")
        filled = mask(size, "irregular")
        hull = np.hypot(*(np.indices((96, 96)) - np.array(centre)[:, None, None])) <= 96 * RADIUS[size] * 1.35
        assert 0.3 < filled.sum() / hull.sum() < 0.75  # lobes leave gaps, a disc of this reach would not


def expected(scene: Scene, template: str, text: str) -> set[str]:
    """Right answers, derived anew from the scene and the words of the question."""
    quadrants = [f"{'lower' if at.y > 0.5 else 'upper'} {'left' if at.x < 0.5 else 'right'}" for at in scene.lesions]
    count = len(quadrants)
    yes_no = {
        "presence": count > 0,
        "several": count > 1,
        "organ_check": scene.organ in text,
        "intensity_check": scene.intensity in text,
        "side_check": count == 1 and quadrants[0].split()[1] in text,
    }
    if template in yes_no:
        return {"yes" if yes_no[template] else "no"}
    if template in ("modality", "organ", "shape", "size", "intensity"):
        return {getattr(scene, template)}
    (only,) = quadrants if template != "count" else (None,)
    return {
        "count": lambda: {str(count)},
        "quadrant": lambda: {only},
        "side": lambda: {only.split()[1]},
        "place": lambda: {f"{only} {scene.organ}"},
        "describe": lambda: {
            f"{scene.size} {scene.intensity} {scene.shape} lesion in the {only.split()[1]} {scene.organ}"
        },
    }[template]()


def test_answers_follow_from_the_scene(folder):
    asked = Counter()
    for split in ("train", "reflective", "rl", "test"):
        for row in json.loads((folder / f"{split}.json").read_text()):
            scene = Scene(**{**row["scene"], "lesions": tuple(Lesion(**at) for at in row["scene"]["lesions"])})
            for question in row["questions"]:
                assert question["answer"] in expected(scene, question["template"], question["text"]), question
                asked[question["template"]] += 1
    assert len(asked) == 15 and min(asked.values()) > 20


def test_files_show_their_scenes(folder):
    for row in json.loads((folder / "train.json").read_text())[:20]:
        scene = Scene(**{**row["scene"], "lesions": tuple(Lesion(**at) for at in row["scene"]["lesions"])})
        stored = np.asarray(Image.open(folder / row["image"]))
        np.testing.assert_array_equal(stored, (np.clip(render(scene), 0, 1) * 255 + 0.5).astype(np.uint8))


def test_no_question_can_be_guessed_without_its_image(folder):
    """The commonest answer to a template, and to any one wording of it, is at most a half (four options: a quarter)."""
    for split in ("train", "test"):
        answers, letters = defaultdict(Counter), defaultdict(Counter)
        for sample in SOURCE.read(folder, split):
            template = sample.meta["template"]
            right = sample.options["ABCD".index(sample.answer)] if sample.options else sample.answer
            answers[template][right] += 1
            if sample.options:
                letters[template][sample.answer] += 1
        for template, counts in answers.items():
            assert max(counts.values()) <= 0.5 * sum(counts.values()), template
            assert len(counts) in ((3,) if template == "count" else (2, 4)) or template in ("describe", "place")
        for template, counts in letters.items():
            assert max(counts.values()) - min(counts.values()) <= 1, template


def test_checked_claims_are_no_hint():
    """`Is the lesion on the left?` is as often right as wrong, each claim by itself."""
    truths = defaultdict(list)
    for i in range(3000):
        rng = np.random.default_rng([5, i])
        for question in ask(draw_scene(rng), rng):
            if question.template in ("side_check", "intensity_check", "organ_check"):
                claim = re.search(r"left|right|dark|bright|lung|brain|kidney|tissue", question.text).group()
                truths[claim].append(question.answer == "yes")
    assert set(truths) == {"left", "bright", "lung", "brain", "kidney", "tissue"}
    for claim, values in truths.items():
        assert abs(np.mean(values) - 0.5) < 4 * 0.5 / np.sqrt(len(values)), claim


def test_splits_share_no_image_and_no_id(folder):
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "images").iterdir()]
    assert len(hashes) == len(set(hashes)) == sum(SIZES.values())
    samples = [sample for split in SPLITS for sample in SOURCE.read(folder, split)]
    assert len({sample.id for sample in samples}) == len(samples)
    of_split = defaultdict(set)
    for sample in samples:
        of_split[sample.split].update(hashlib.sha256(image).digest() for image in sample.images)
    assert not set.intersection(of_split["train"], of_split["test"])
    assert len({sample.meta["image_id"] for sample in samples}) == len(set().union(*of_split.values()))


def test_a_seed_decides_all(tmp_path):
    sizes = {"train": 12, "test": 5}
    first, again, other = (write_phantom(tmp_path / n, s, sizes) for n, s in (("a", 3), ("b", 3), ("c", 4)))

    def content(folder: Path) -> dict[str, bytes]:
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    assert content(first) == content(again)
    assert content(first) != content(other)
    longer = write_phantom(tmp_path / "d", 3, {"train": 14, "test": 5})
    assert content(first)["images/train_000011.png"] == content(longer)["images/train_000011.png"]


def test_a_folder_made_alike_is_kept_and_another_refused(tmp_path):
    folder = write_phantom(tmp_path / "a", 3, {"train": 4})
    before = (folder / "train.json").stat().st_mtime_ns
    write_phantom(folder, 3, {"train": 4})
    assert (folder / "train.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="remove it"):
        write_phantom(folder, 4, {"train": 4})
    with pytest.raises(UserError, match="no split 'val'"):
        write_phantom(tmp_path / "b", 3, {"val": 4})


def test_stopped_drawing_leaves_nothing(tmp_path, monkeypatch):
    from data_prep.sources import procedural

    monkeypatch.setattr(procedural, "balance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "a", 3, {"train": 4})
    assert list(tmp_path.iterdir()) == []


def test_captions_state_every_attribute():
    for number, scene in enumerate(scenes(200)):
        words = caption(scene, np.random.default_rng(number))
        assert scene.modality in words and scene.organ in words
        assert words.count(".") in (2, 3)
        if not scene.lesions:
            assert "no lesion" in words.lower() or "without a lesion" in words
            continue
        for word in (scene.size, scene.intensity, scene.shape, *(lesion.quadrant for lesion in scene.lesions)):
            assert word in words
        if scene.count > 1:
            assert str(scene.count) in words


def test_reasoning_guesses_unseen_then_corrects_or_confirms(folder):
    """The guess hangs on the template alone, so only the second look can tell the answer."""
    turns, guesses = Counter(), {}
    for sample in SOURCE.read(folder, "reflective"):
        reply, template = as_turns(sample)[-1], sample.meta["template"]
        assert reply.content == (f"\\boxed{{{sample.answer}}}",)
        guess = re.fullmatch(r"At first glance: (.+)\. Wait, let me look again: .+\.", reply.reasoning).group(1)
        assert guesses.setdefault(template, guess) == guess
        right = sample.options["ABCD".index(sample.answer)] if sample.options else sample.answer
        confirmed = guess in right.split() if template in ("describe", "place") else guess == right
        assert sample.meta["reflection"] == ("confirmed" if confirmed else "corrected")
        turns[sample.meta["reflection"]] += 1
    assert 0.35 < turns["corrected"] / turns.total() < 0.65


def test_the_second_look_states_facts():
    """Each attribute word after the reflection is the scene's."""
    vocabulary = {
        "organ": ("lung", "brain", "kidney", "tissue"),
        "size": ("small", "large"),
        "shape": ("round", "oval", "irregular", "ring-shaped"),
        "intensity": ("bright", "dark"),
    }
    for number, scene in enumerate(scenes(150)):
        rng = np.random.default_rng(number)
        for question in ask(scene, rng):
            look = think(scene, question).reasoning.split("look again:")[1]
            if question.template == "modality":
                continue  # speaks of how bone and cells look
            for attribute, words in vocabulary.items():
                for word in words:
                    if re.search(rf"\b{word}(?:er)?\b", look):
                        assert word == getattr(scene, attribute), look
            for quadrant in re.findall(r"(?:upper|lower) (?:left|right)", look):
                assert quadrant in {lesion.quadrant for lesion in scene.lesions}
            if "lesions" in look:
                assert f"{scene.count} lesions" in look
            if "one lesion" in look or "the lesion" in look:
                assert scene.count == 1


def test_forms_of_the_splits(folder):
    by_split = {split: list(SOURCE.read(folder, split)) for split in SPLITS}
    assert {s.kind for s in by_split["pretrain"]} == {"document"}
    assert len(by_split["pretrain"]) == SIZES["pretrain"]
    for sample in by_split["alignment"]:
        assert sample.kind == "chat" and [turn.role for turn in sample.turns] == ["user", "assistant"]
        assert "lesion" in sample.turns[1].content[0]
    assert {s.kind for s in by_split["train"]} == {"yes_no", "choice", "closed", "open"}
    for sample in by_split["train"]:
        assert as_turns(sample)[0].content[0] == 0 and not sample.reasoning
        assert {"modality", "template", "organ", "image_id", "language"} <= set(sample.meta)
        assert Image.open(io.BytesIO(sample.images[0])).size == (96, 96)


def test_a_missing_image_is_skipped_and_broken_annotations_are_named(tmp_path):
    folder = write_phantom(tmp_path / "a", 3, {"train": 6})
    (folder / "images" / "train_000002.png").unlink()
    records = list(SOURCE.read(folder, "train"))
    assert [r for r in records if isinstance(r, Skipped)] == [
        Skipped("phantom/train/000002", "image missing", "images/train_000002.png")
    ]
    assert any(isinstance(r, Sample) for r in records)
    (folder / "train.json").write_text('[{"image": "images/train_000001.png"}]')
    with pytest.raises(UserError, match=r"train\.json: entry 0 is incomplete"):
        list(SOURCE.read(folder, "train"))
    with pytest.raises(UserError, match=r"test\.json does not exist"):
        list(SOURCE.read(folder, "test"))
