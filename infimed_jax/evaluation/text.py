"""Text as it is compared: without case, dress and punctuation that carry no meaning in a short medical answer."""

from __future__ import annotations

import re
import unicodedata

_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}


def normalize(text: str) -> str:
    """Text as it is compared: exact match but for what carries no meaning in a short medical answer.

    Unicode NFKC and case; LaTeX and Markdown dress; punctuation as a blank, except where it changes the meaning
    (1.5, -5, 1/2, 80%, T2*, Crohn's); thousands commas; numbers up to twenty as digits; one article at the start
    (only there: "hepatitis A" is not "hepatitis"); runs of blanks, and any before a unit (5 cm); zeros at the end of
    decimals in a number, or in a text that begins with one (2.50 cm is 2.5 cm, but version 1.10 is not version 1.1).
    """
    text = plain(visible(text)).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = "".join(char if _has_meaning(text, i) else " " for i, char in enumerate(text))
    words = [_NUMBERS.get(word, word) for word in text.split()]
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    if words and _DECIMAL.fullmatch(words[0]):
        words = [_shortest(word) for word in words]
    return _BEFORE_UNIT.sub("", " ".join(words))


_UNITS = "% mm cm dm m km µm um nm ml dl l mg µg ug g kg hu kv kvp ma mas hz khz mhz t mmhg bpm s ms"
_BEFORE_UNIT = re.compile(rf"(?<=\d) (?=(?:{'|'.join(_UNITS.split())})(?!\w))")
_DECIMAL = re.compile(rf"(-?)([0-9]+|(?=\.))(\.[0-9]+)?((?:{'|'.join(_UNITS.split())})?)")


def _shortest(word: str) -> str:
    """A decimal without the zeros at its end; any other word as it is (007, 1e3, 1.2.3)."""
    match = _DECIMAL.fullmatch(word)
    if match is None or not match[3]:
        return word
    number = (match[2] or "0") + match[3].rstrip("0").removesuffix(".")
    return (match[1] if number.strip("0.") else "") + number + match[4]


def _has_meaning(text: str, i: int) -> bool:
    """False for blanks, control characters, and punctuation that a short answer could do without."""
    char = text[i]
    if char in "%*" or not unicodedata.category(char).startswith(("P", "Z", "C")):
        return True
    before, after = text[max(i - 1, 0) : i], text[i + 1 : i + 2]
    if char == ".":
        return after.isdigit() and not before.isalpha()
    if char == "-":
        return after.isdigit() and not before.isalnum()
    if char == "/":
        return before.isdigit() and after.isdigit()
    return char == "'" and before.isalpha() and after.isalpha()


def one_space(text: str) -> str:
    """Runs of blanks and of blank lines as one; patterns over long ones would take quadratic time."""
    return re.sub(r"\n(?: ?\n)+", "\n\n", re.sub(r"[^\S\n]+", " ", text))


_SAME_SIGNS = str.maketrans({"‘": "'", "’": "'", "−": "-"})
_LATEX = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\s*\{([^{}]*)\}")
_NESTING = 3
"""How deep LaTeX is unwrapped; without a bound a hostile reply takes quadratic time."""
_MARKUP = re.compile(r"\\[()\[\]]|\\(?=%)|[$`]|\*\*")
_ITALIC = re.compile(r"(?<!\w)\*(?=\S)([^*\n]+)\*(?!\w)")


def visible(text: str) -> str:
    """NFKC (full-width letters and brackets become plain), without zero-width and other format characters."""
    text = unicodedata.normalize("NFKC", text).translate(_SAME_SIGNS)
    return "".join(char for char in text if unicodedata.category(char) != "Cf")


def plain(text: str) -> str:
    """Without the dress of LaTeX and Markdown: `\\text{A}`, `$A$`, `**A**` are A."""
    for _ in range(_NESTING):
        text = _LATEX.sub(r"\1", text)
    return _ITALIC.sub(r"\1", _MARKUP.sub("", text))
