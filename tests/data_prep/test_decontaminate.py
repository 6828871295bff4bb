"""Decontamination: planted copies are found however they were changed, strangers are not, and affected tests listed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.reading.hashes import ALIKE, THRESHOLD, distances, likeness, ngrams, normalised, perceptual_hashes
from data_prep.steps.decontaminate import decontaminate
from infimed_jax.data.sample import Chat, Document, Question, Turn
from infimed_jax.data.storage import open_samples, write_samples
from infimed_jax.errors import UserError
from tests.data_prep.samples import damage

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "vqa_rad" / "images"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")


def picture(seed: int, size: int = 200) -> Image.Image:
    """Smooth and of its own: random blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return Image.fromarray(small).resize((size, size + 20), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = share * image.width, share * image.height
    return image.crop((round(x), round(y), round(image.width - x), round(image.height - y)))


COPIES = {
    "as it is": encoded,
    "another format": lambda image: encoded(image, "PNG"),
    "resized": lambda image: encoded(image.resize((image.width * 2 // 3, image.height * 2 // 3))),
    "stretched": lambda image: encoded(image.resize((224, 224))),
    "quality 50": lambda image: encoded(image, quality=50),
    "grey": lambda image: encoded(image.convert("L")),
    "cropped": lambda image: encoded(cropped(image, 0.02)),
    "all at once": lambda image: encoded(cropped(image, 0.02).convert("L").resize((256, 256)), quality=50),
}


def body(patient: int, size: int = 256) -> Image.Image:
    """What all patients have in common, and under it what is each one's own."""
    common = np.asarray(picture(1000, size).convert("L"), np.float32)
    own = np.random.default_rng(patient).integers(0, 256, (33, 33), np.uint8)
    own = np.asarray(Image.fromarray(own).resize(common.shape[::-1], Image.Resampling.BICUBIC), np.float32)
    return Image.fromarray(np.clip(0.85 * common + 0.15 * own, 0, 255).astype(np.uint8))


def asked(id: str, image: bytes | None, question: str) -> Question:
    return Question(
        id=id, source="toy", split=id.split("/")[1], kind="open", images=(image,) if image else (),
        question=question, answer="gas",
    )  # fmt: skip


@pytest.fixture
def test_set(tmp_path) -> Path:
    rows = [asked(f"toy/test/{i}", encoded(picture(i)), "What is seen?") for i in range(6)]
    rows.append(asked("toy/test/6", encoded(picture(6)), "Which of the two lobes of the left lung is the darker one?"))
    rows.append(asked("toy/test/7", None, "What is a stent?"))
    write_samples(tmp_path / "test", rows, name="toy")
    return tmp_path / "test"


@pytest.mark.parametrize("copy", COPIES)
def test_a_planted_copy_is_found(copy, test_set, tmp_path):
    rows = [asked(f"toy/train/{i}", encoded(picture(100 + i)), "What is seen?") for i in range(20)]
    rows[11] = asked("toy/train/11", COPIES[copy](picture(3)), "Why?")
    rows[12] = asked("toy/train/12", COPIES[copy](picture(4)), "WHAT is seen ?")
    write_samples(tmp_path / "train", rows, name="toy", shard_size=8)
    report = decontaminate(tmp_path / "train", [test_set], tmp_path / "clean")
    assert report["removed_ids"] == {"image": ["toy/train/11"], "image and question": ["toy/train/12"]}
    assert report["affected"] == {"image": ["toy/test/3", "toy/test/4"], "question": ["toy/test/4"],
                                  "both": ["toy/test/4"], "any": ["toy/test/3", "toy/test/4"]}  # fmt: skip
    assert [s.id for s in open_samples(tmp_path / "clean")] == [s.id for s in rows if s.id[-2:] not in ("11", "12")]
    assert report["read"] == 20 == report["samples"] + 2
    assert json.loads((tmp_path / "clean.json").read_text()) == report
    assert decontaminate(tmp_path / "train", [test_set], tmp_path / "clean") == report


def test_questions_are_found_in_other_words_around_them(test_set, tmp_path):
    said = "Look: which of the two LOBES of the left lung, is the darker?"
    rows = [
        asked("toy/train/0", encoded(picture(50)), "What is seen?"),  # short: everybody's
        Chat("toy/train/1", "toy", "train", (), (Turn("user", (said,)), Turn("assistant", ("a",)))),
        Document("toy/train/2", "toy", "train", (), ((f"A text. {said} No.",),)),
        asked("toy/train/3", None, "what is a STENT"),
        asked("toy/train/4", None, "What is a stent graft?"),
    ]
    write_samples(tmp_path / "train", rows, name="toy")
    report = decontaminate(tmp_path / "train", [test_set], tmp_path / "clean")
    assert report["removed_ids"] == {"question": [f"toy/train/{i}" for i in (1, 2, 3)]}
    assert report["affected"]["question"] == ["toy/test/6", "toy/test/7"]


def test_a_wording_of_many_test_images_is_everybodys_but_with_its_image(tmp_path):
    def words(i: int) -> str:
        return f"Which part of the body does this image belong to{', please' * i}?"

    rows = [asked(f"toy/test/{i}", encoded(picture(i)), words(0)) for i in range(3)]
    rows += [asked(f"toy/test/{i}", encoded(picture(i)), "How many of the lobes are of a darker grey?") for i in (3, 4)]
    rows += [asked("toy/test/5", encoded(picture(4)), "How many of the lobes are of a darker grey?")]
    write_samples(tmp_path / "test", rows, name="toy")
    rows = [
        asked("toy/train/0", encoded(picture(50)), words(0)),
        asked("toy/train/1", encoded(picture(51)), words(1)),
        asked("toy/train/2", encoded(picture(52)), "How many of the lobes are of a darker grey?"),
        asked("toy/train/3", encoded(picture(2)), words(0)),
        asked("toy/train/4", encoded(picture(53)), "What is seen?"),
    ]
    write_samples(tmp_path / "train", rows, name="toy")
    report = decontaminate(tmp_path / "train", [tmp_path / "test"], tmp_path / "clean")
    assert report["removed_ids"] == {"question": ["toy/train/2"], "image and question": ["toy/train/3"]}
    assert report["affected"]["question"] == ["toy/test/2", "toy/test/3", "toy/test/4", "toy/test/5"]
    assert report["test_questions_of_many_images"] == 3
    write_samples(tmp_path / "text", [asked("toy/text/0", None, words(0))], name="toy")  # a test of text alone
    report = decontaminate(tmp_path / "train", [tmp_path / "test", tmp_path / "text"], tmp_path / "clean")
    assert set(report["removed_ids"]["question"]) == {"toy/train/0", "toy/train/1", "toy/train/2"}
    assert report["test_questions_of_many_images"] == 0


def test_images_of_one_shade_are_compared_by_bytes(tmp_path, monkeypatch):
    def black(side: int, kind: str = "PNG") -> bytes:
        return encoded(Image.new("L", (side, side)), kind)

    write_samples(tmp_path / "test", [asked("toy/test/0", black(64), "What is seen?")], name="toy")
    rows = [asked(f"toy/train/{side}", black(side), "What is it?") for side in (64, 65, 66)]
    rows.append(asked("toy/train/jpeg", black(64, "JPEG"), "What is it?"))
    write_samples(tmp_path / "train", rows, name="toy")
    monkeypatch.setattr(
        "data_prep.steps.decontaminate.likeness", lambda *_: pytest.fail("each pair of them was compared")
    )
    report = decontaminate(tmp_path / "train", [tmp_path / "test"], tmp_path / "clean")
    assert report["removed_ids"] == {"image": ["toy/train/64"]}
    assert report["test_images_compared_by_bytes_only"] == 1


def test_words():
    assert normalised("The pneumo\u00adthorax\u200b of the STRASSE") == normalised("the Pneumothorax of the Straße")
    assert normalised("Où est l'Épanchement?  (CT)") == ["ou", "est", "l", "epanchement", "ct"]
    assert normalised("肺部CT正常吗?") == ["肺", "部", "ct", "正", "常", "吗"]
    assert ngrams("a b c") == {"a b c"} and ngrams("?!") == set()
    assert ngrams("1 2 3 4 5 6 7 8 9") == {"1 2 3 4 5 6 7 8", "2 3 4 5 6 7 8 9"}


def test_user_errors(test_set, tmp_path):
    with pytest.raises(UserError, match="at least one test set"):
        decontaminate(test_set, [], tmp_path / "clean")
    with pytest.raises(UserError, match="nothing is left"):
        decontaminate(test_set, [test_set], tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
    report = json.loads((tmp_path / "clean.json").read_text())  # which questions are affected is known all the same
    assert report["samples"] == 0 and set(report["affected"]["any"]) == {s.id for s in open_samples(test_set)}


def test_damaged_records_are_left_out_by_name_but_a_test_set_must_be_whole(test_set, tmp_path):
    rows = [asked(f"toy/train/{i}", encoded(picture(100 + i)), "What is seen?") for i in range(4)]
    write_samples(tmp_path / "train", rows, name="toy")
    damage(tmp_path / "train")
    report = decontaminate(tmp_path / "train", [test_set], tmp_path / "clean", max_bad_records=0.25)
    assert list(open_samples(tmp_path / "clean")) == rows[1:]
    assert report["removed"] == {"unreadable record": 1} and report["unreadable_records"] == ["toy record 0"]
    damage(test_set)
    with pytest.raises(UserError, match=r"1 records of the test set .*test cannot be read \(toy record 0 first\)"):
        decontaminate(tmp_path / "train", [test_set], tmp_path / "other")


def test_an_image_that_cannot_be_decoded_is_compared_by_its_bytes(tmp_path):
    write_samples(tmp_path / "test", [asked("toy/test/0", b"broken", "Why?")], name="toy")
    rows = [asked("toy/train/0", b"broken", "How?"), asked("toy/train/1", b"other", "How?")]
    write_samples(tmp_path / "train", rows, name="toy")
    report = decontaminate(tmp_path / "train", [tmp_path / "test"], tmp_path / "clean")
    assert report["removed_ids"] == {"image": ["toy/train/0"]}
    assert report["test_images_compared_by_bytes_only"] == 1


@needs_real
def test_no_two_real_radiographs_are_taken_for_copies():
    looks = np.stack([perceptual_hashes(file.read_bytes()) for file in sorted(REAL.iterdir())])
    nearest = np.min([distances(looks[:, i], looks[:, j]) for i in range(2) for j in range(2)], axis=0)
    assert nearest[np.triu_indices(len(looks), 1)].min() > THRESHOLD


@needs_real
@pytest.mark.parametrize("copy", COPIES)
def test_changed_copies_of_real_radiographs_are_found(copy):
    for file in sorted(REAL.iterdir())[::30]:
        changed, whole = COPIES[copy](Image.open(file).convert("RGB")), file.read_bytes()
        assert distances(perceptual_hashes(whole), perceptual_hashes(changed)).min() <= THRESHOLD
        assert likeness(whole, changed) >= ALIKE


@needs_real
def test_the_nearest_of_different_real_radiographs_are_not_alike():
    """Were the hash's threshold higher, likeness alone would still tell them apart."""
    files = [file.read_bytes() for file in sorted(REAL.iterdir())]
    looks = np.stack([perceptual_hashes(data) for data in files])
    nearest = np.min([distances(looks[:, i], looks[:, j]) for i in range(2) for j in range(2)], axis=0)
    one, two = np.triu_indices(len(files), 1)
    order = nearest[one, two].argsort()[:20]
    assert max(likeness(files[one[k]], files[two[k]]) for k in order) < ALIKE - 0.05


def test_bodies_with_the_same_outlines_are_no_copies_and_a_copy_among_them_is(tmp_path):
    rows = [asked(f"toy/test/{i}", encoded(body(i)), "What is seen?") for i in range(4)]
    write_samples(tmp_path / "test", rows, name="toy")
    rows = [asked(f"toy/train/{i}", encoded(body(100 + i)), "What is it?") for i in range(4)]
    rows.append(asked("toy/train/copy", encoded(cropped(body(2), 0.02), quality=70), "What is it?"))
    looks = [perceptual_hashes(encoded(body(patient))) for patient in (0, 100)]
    assert distances(*looks).min() <= THRESHOLD  # the hash alone would take them for one
    write_samples(tmp_path / "train", rows, name="toy")
    report = decontaminate(tmp_path / "train", [tmp_path / "test"], tmp_path / "clean")
    assert report["removed_ids"] == {"image": ["toy/train/copy"]}
    assert report["affected"]["image"] == ["toy/test/2"]


def test_likeness_is_that_of_the_best_crop_whichever_side_was_cut():
    whole = picture(5)
    for cut in ((0.02, 0.02, 0, 0), (0, 0.02, 0, 0.02), (0.015, 0, 0.005, 0.02), (0.02, 0.02, 0.02, 0.02)):
        left, top, right, bottom = (
            round(share * side) for share, side in zip(cut, (whole.width, whole.height) * 2, strict=True)
        )
        part = encoded(whole.crop((left, top, whole.width - right, whole.height - bottom)), "PNG")
        assert likeness(encoded(whole, "PNG"), part) > 0.97
        assert likeness(part, encoded(whole, "PNG")) == likeness(encoded(whole, "PNG"), part)
    assert likeness(encoded(whole), encoded(whole)) == pytest.approx(1)
    assert likeness(encoded(whole), b"broken") == 0 == likeness(encoded(whole), encoded(Image.new("RGB", (99, 99))))
