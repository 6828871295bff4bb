"""What stands inside the words of annotations: image marks, thoughts, letters before options, and the script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from data_prep.reading.faults import IMAGE_MARKS, NO_QUESTION, THINKING, Unusable
from infimed_jax.data.prompts import LETTERS
from infimed_jax.data.sample import Content

MARK = "<image>"
"""The place of an image in LLaVA-style text."""
_MARK = re.compile("(<image>)")
_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_NAMED_MARK = re.compile(r"(\b(?:the|this|that|an?|each|your)\s+)?<image>", re.IGNORECASE)
_BEFORE_OPTION = r"\s*\(?{letter}\s*[.)、．:：]\s*"
_SCRIPTS = {
    "zh": re.compile(r"[\u4e00-\u9fff]"),
    "ja": re.compile(r"[\u3040-\u30ff]"),
    "ko": re.compile(r"[\uac00-\ud7af]"),
    "ru": re.compile(r"[\u0400-\u04ff]"),
    "ar": re.compile(r"[\u0600-\u06ff]"),
}
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def split_marks(words: str) -> list[str]:
    """The words in pieces, each of which is `MARK` or text without it."""
    return [piece for piece in _MARK.split(words) if piece]


def number_marks(pieces: Iterable[str], images: Sequence[int]) -> Content:
    """The pieces with each mark replaced by the next of the images. Raises Unusable for another number of marks."""
    pieces = list(pieces)
    if (marks := sum(piece == MARK for piece in pieces)) != len(images):
        raise Unusable(IMAGE_MARKS, f"{marks} marks, {len(images)} images")
    left = iter(images)
    return tuple(next(left) if piece == MARK else piece for piece in pieces)


def without_marks(question: str, images: int, language: str = "en") -> str:
    """A question's words for images that stand before them: marks at their ends go, marks within them become words.

    Those words are `the image`, or for several the names by which a prompt introduces them, `<image_1>`. Raises
    Unusable for another number of marks than of images.
    """
    marks = question.count(MARK)
    if not marks:
        return question
    if marks != images:
        raise Unusable(IMAGE_MARKS, f"{marks} marks, {images} images")
    pieces = [piece for piece in split_marks(question) if piece.strip()]
    outside = 0
    while pieces and pieces[0] == MARK:
        pieces, outside = pieces[1:], outside + 1
    while pieces and pieces[-1] == MARK:
        del pieces[-1]
    words = "".join(pieces).strip()
    if not words:
        raise Unusable(NO_QUESTION)
    if marks > 1:
        for number in range(outside + 1, marks + 1):
            words = words.replace(MARK, f"<image_{number}>", 1)
    elif language == "zh":
        words = words.replace(MARK, "图像")
    return _NAMED_MARK.sub(lambda match: f"{match[1] or 'the '}image", words)


def split_thoughts(reply: str) -> tuple[str, str]:
    """What stands in a think block at a reply's start, if any, and the reply after it.

    Raises Unusable where such a block is not closed, begins later, or is followed by another.
    """
    match = _THOUGHTS.match(reply)
    thoughts, rest = (match[1].strip(), reply[match.end() :]) if match else ("", reply)
    if "<think>" in rest or "</think>" in rest or "<think>" in thoughts:
        raise Unusable(THINKING)
    return thoughts, rest


def without_letters(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options without the letters that some files write before them, and without empty ones at the end.

    `A:` goes wherever it is an option's own; `A.` and `(A)`  only where every option has its own in the same
    way, since "C. difficile" is an answer.
    """
    own = [re.compile(_BEFORE_OPTION.format(letter=letter), re.IGNORECASE) for letter in LETTERS]
    lettered = [pattern.match(option) for pattern, option in zip(own, options, strict=False)]
    every = all(lettered[k] or not option.strip() for k, option in enumerate(options[: len(LETTERS)]))
    every = every and len({"".join(match[0].split())[-1] for match in lettered if match}) == 1
    bare = [
        option[match.end() :].strip() if match and (every or match[0].rstrip()[-1] in ":：") else option.strip()
        for option, match in zip(options, lettered, strict=False)
    ]
    while bare and not bare[-1]:
        del bare[-1]
    return (*bare, *options[len(LETTERS) :])


def script_language(words: str) -> str:
    """The language whose script most letters have, Latin ones counting as `en`; "" where there are none."""
    counts = {code: len(script.findall(words)) for code, script in _SCRIPTS.items()}
    counts["en"] = len(_LATIN.findall(words)) // 4  # a letter says less than a Chinese sign
    best = max(counts, key=counts.__getitem__)
    if best == "zh" and counts["ja"]:  # Japanese is written with Chinese signs, too
        best = "ja"
    return best if counts[best] else ""
